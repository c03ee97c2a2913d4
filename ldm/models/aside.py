"""What a network is told of the picture itself, beside its text: the asides of a picture.

    made  = a function of the pixels alone: a smaller picture, the embedding of a picture tower
    told  = alpha(level) made + sigma(level) noise,   and the level

The level is a condition of the network, drawn anew for every picture of a training and chosen for
every drawing (noise conditioning augmentation: Ho et al. 2022, section 4.2; Saharia et al. 2022,
section 2.4), so that what is told need not be as good as what was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.diffusion import NoiseProcess, normal, stream

LOW, LOW_TIMESTEP = "low", "low_timestep"
"""``Condition.extra`` of networks that enlarge a picture: it as it is told, ``b 3 h w``, and the
number of its level, ``b``."""


@runtime_checkable
class Aside(Protocol):
    """What a network is told of the picture itself: what is made of the pixels, which a cache may
    hold, and what is drawn for it.
    """

    @property
    def network(self) -> nn.Module | None:
        """What makes it; None: nothing but arithmetic does, at no cost where pixels are at
        hand.
        """
        ...

    @property
    def part(self) -> str | None:
        """Folder of that network, where it is one of the model's."""
        ...

    @property
    def printed(self) -> tuple[Any, ...]:
        """All that what is made depends on beside pixels and network, with a repr that tells it."""
        ...

    @property
    def hinted(self) -> bool:
        """Whether it is a hint: a picture that lies beside, of which the pixels tell nothing."""
        ...

    def made(self, pixels: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """What is made of ``pixels`` in [-1, 1], by name, ``b ...``; of a hint nothing."""
        ...

    def drawn(
        self, seed: int, index: int, shape: tuple[int, int], name: str = "aside"
    ) -> dict[str, Tensor]:
        """The draws of image ``index``, without a batch axis.

        Args:
            seed: of the streams.
            index: number of the image.
            shape: width and height of the picture.
            name: what names of the streams begin with.
        """
        ...

    def told(self, made: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``Condition.extra`` of what was made and drawn, each ``b ...``."""
        ...

    def asked(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Arguments of a pipeline's call that tell its network what was made, ``b ...``."""
        ...


class Drawn(Protocol):
    """The pictures of a call."""

    prompts: list[str]
    each: int
    """Pictures of every prompt, side by side."""
    generators: Any
    """One for all, one a picture, or None."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class LowResolution:
    """The same picture ``factor`` times smaller along each side: what a super-resolution network
    enlarges.

    It is scaled down with an antialiasing cubic filter, and told scaled up again (bilinear, corners
    on corners, as in stock), noised.

    Args:
        factor: of a side.
        process: the noise.
        levels: between which shares of its levels training draws, in [0, 1].
    """

    factor: int
    process: NoiseProcess
    levels: tuple[float, float] = (0.0, 1.0)

    network = part = None
    hinted = False

    @property
    def printed(self) -> tuple[Any, ...]:
        """The factor."""
        return LOW, self.factor

    def made(self, pixels: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """``low``, ``b 3 h/factor w/factor`` in [-1, 1]."""
        size = [side // self.factor for side in pixels.shape[-2:]]
        low = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        return {LOW: low.clamp(-1, 1)}

    def drawn(
        self, seed: int, index: int, shape: tuple[int, int], name: str = "aside"
    ) -> dict[str, Tensor]:
        """``noise`` ``3 h w`` and ``level``, the number of one of the process."""
        count, (low, high) = self.process.num_train_timesteps, self.levels
        share = low + (high - low) * stream(seed, f"{name} level", index).random()
        noise = normal(seed, f"{name} noise", index, (3, shape[1], shape[0]))
        return {"noise": noise, "level": torch.tensor(min(int(share * count), count - 1))}

    def told(self, made: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``low`` as large as the noise, and ``low_timestep``."""
        noise, level = drawn["noise"], drawn["level"]
        time = (level.double() + 1) / self.process.num_train_timesteps
        large = enlarged(made[LOW], noise.shape[-2:])
        return {LOW: self.process.perturb(large, noise, time), LOW_TIMESTEP: level}

    def asked(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``image``."""
        return {"image": made[LOW]}


def enlarged(
    low: Float[Tensor, "b 3 low_h low_w"], size: Sequence[int]
) -> Float[Tensor, "b 3 h w"]:
    """A picture scaled to height and width ``size``, corners on corners, as it is told."""
    return nn.functional.interpolate(low, tuple(size), mode="bilinear", align_corners=True)
