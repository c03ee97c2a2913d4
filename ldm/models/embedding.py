"""Pictures as one vector each, by the picture tower of a CLIP: as a latent and as an aside.

    e = W tower(pixels)[class],   z = (e - mean) / std
    told = [mean + std (alpha z + sigma noise), sinusoids of the level],   or zeros

(Ramesh et al. 2022, section 2, in the form of Stable unCLIP). Mean and standard deviation are those
of the training pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float
from torch import Tensor, nn

from ldm.diffusion import NoiseProcess, normal, stream
from ldm.models.codec import Generators, Moments
from ldm.models.wrapped import bare

PICTURE_TOWER = "image_encoder"
"""Folder of the tower."""
EMBEDDED = "embedded"
"""``Condition.extra`` of networks that are told an embedding: it as it is told, ``b 2 d``."""
EMBEDDING = "embedding"
_ROWS = 16


@dataclass(frozen=True)
class PictureTower:
    """A picture tower of a CLIP, and how its pictures are prepared.

    Args:
        network: a ``CLIPVisionModelWithProjection``.
        processor: a ``CLIPImageProcessor``, of which the mean and the standard deviation of
            channels hold for pixels.
    """

    network: Any
    processor: Any

    @property
    def width(self) -> int:
        """Numbers of an embedding, d."""
        return bare(self.network).config.projection_dim

    @property
    def printed(self) -> tuple[Any, ...]:
        """All that embeddings depend on beside pixels and network, with a repr that tells it."""
        return tuple(self.processor.image_mean), tuple(self.processor.image_std)

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embeddings of ``pixels`` in [-1, 1], float32, the same in a batch of few as of many."""
        ready, many = self.prepared(pixels), len(pixels)
        # Products of few rows are other kernels, whose last digits differ.
        rows = [ready, ready.new_zeros(max(0, _ROWS - many), *ready.shape[1:])]
        return self.read(torch.cat(rows))[:many]

    def of(self, pictures: Any, device: torch.device) -> Float[Tensor, "n d"]:
        """Embeddings of pictures as stock reads them: PIL, or a list of them, through the
        processor; a tensor ``n 3 side side`` is what the tower reads, prepared.

        Raises:
            ValueError: they are none of these.
        """
        if isinstance(pictures, Tensor):
            side = bare(self.network).config.image_size
            ready = pictures if pictures.ndim == 4 else pictures[None]
            if tuple(ready.shape[1:]) != (3, side, side) or not bool(ready.isfinite().all()):
                raise ValueError(
                    f"image: a tensor is what the picture tower reads, n 3 {side} {side} of finite"
                    f" numbers, not {tuple(pictures.shape)}: pass a PIL picture"
                )
            return self.read(ready.to(device))
        try:
            ready = self.processor(images=pictures, return_tensors="pt").pixel_values
        except (TypeError, ValueError, AttributeError) as error:
            line = " ".join(str(error).split())[:200]
            raise ValueError(f"image must be a PIL picture or a list of them: {line}") from None
        return self.read(ready.to(device))

    def read(self, ready: Float[Tensor, "b 3 side side"]) -> Float[Tensor, "b d"]:
        """Embeddings of prepared pictures, float32."""
        return self.network(ready.to(self.network.dtype)).image_embeds.float()

    def prepared(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 side side"]:
        """``pixels`` in [-1, 1] scaled to the tower's side, their middle cut out, normalised."""
        side, sides = bare(self.network).config.image_size, pixels.shape[-2:]
        if tuple(sides) != (side, side):
            size = [max(side, round(s * side / min(sides))) for s in sides]
            pixels = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
            top, left = ((s - side) // 2 for s in size)
            pixels = pixels.clamp(-1, 1)[..., top : top + side, left : left + side]
        mean, std = (
            torch.tensor(part, dtype=pixels.dtype, device=pixels.device).reshape(3, 1, 1)
            for part in self.printed
        )
        return ((pixels + 1) / 2 - mean) / std


class EmbeddingCodec:
    """Embeddings are the latents, ``b d``: a ``Codec`` of which no picture comes back.

    Args:
        tower: makes them.
        prior: a ``PriorTransformer``, whose ``clip_mean`` and ``clip_std`` normalise them; None:
            it is not there yet, and shapes alone are asked for.
    """

    factor, part = 1, PICTURE_TOWER

    def __init__(self, tower: PictureTower, prior: Any) -> None:
        self.tower, self.prior = tower, prior

    @property
    def channels(self) -> int:
        """Numbers of an embedding."""
        return self.tower.width

    @property
    def network(self) -> nn.Module:
        """The tower."""
        return self.tower.network

    @property
    def printed(self) -> tuple[Any, ...]:
        """How pictures are prepared."""
        return EMBEDDING, *self.tower.printed

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """``d``, of any picture."""
        return (self.channels,)

    def size(self, latent: Tensor) -> tuple[int, int]:
        """None: 0 and 0."""
        return 0, 0

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Moments:
        """Embeddings ``b d``, not normalised, without variance."""
        mean = self.tower(pixels)
        return Moments(mean, torch.full_like(mean, -torch.inf))

    def sample(self, moments: Moments, eps: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The embeddings normalised, whatever ``eps``."""
        mean, std = self._statistics(moments.mean)
        return (moments.mean - mean) / std

    def decode(
        self, latent: Float[Tensor, "b d"], generators: Generators | None = None
    ) -> Float[Tensor, "b d"]:
        """Embeddings, not normalised."""
        mean, std = self._statistics(latent)
        return latent * std + mean

    def _statistics(self, beside: Tensor) -> tuple[Tensor, Tensor]:
        prior = bare(self.prior)
        return prior.clip_mean.detach().to(beside), prior.clip_std.detach().to(beside)


@dataclass(frozen=True)
class ImageEmbedding:
    """The embedding of the picture itself, noised: what a decoder draws the picture of.

    Args:
        tower: makes it; None: it is made already.
        normaliser: a ``StableUnCLIPImageNormalizer``, whose mean and standard deviation it is
            noised in.
        process: the noise.
        levels: between which shares of its levels training draws, in [0, 1].
        dropout: share of pictures of which training tells zeros.
    """

    tower: PictureTower | None
    normaliser: Any
    process: NoiseProcess
    levels: tuple[float, float] = (0.0, 1.0)
    dropout: float = 0.0

    part = PICTURE_TOWER
    hinted = False

    @property
    def network(self) -> nn.Module | None:
        """The tower."""
        return self.tower and self.tower.network

    @property
    def printed(self) -> tuple[Any, ...]:
        """How pictures are prepared."""
        assert self.tower is not None
        return EMBEDDING, *self.tower.printed

    def made(self, pixels: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """``embedding``, ``b d``, not normalised."""
        assert self.tower is not None
        return {EMBEDDING: self.tower(pixels)}

    def drawn(
        self, seed: int, index: int, shape: tuple[int, int], name: str = "aside"
    ) -> dict[str, Tensor]:
        """``noise`` ``d``, ``level``, the number of one of the process, and ``told``, a bool."""
        assert self.tower is not None
        count, (low, high) = self.process.num_train_timesteps, self.levels
        share = low + (high - low) * stream(seed, f"{name} level", index).random()
        told = stream(seed, f"{name} dropout", index).random() >= self.dropout
        return {
            "noise": normal(seed, f"{name} noise", index, (self.tower.width,)),
            "level": torch.tensor(min(int(share * count), count - 1)),
            "told": torch.tensor(bool(told)),
        }

    @torch.no_grad()
    def told(self, made: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``embedded``, ``b 2 d``."""
        embedding, level = made[EMBEDDING], drawn["level"]
        mean, std = (x.to(embedding) for x in (self.normaliser.mean, self.normaliser.std))
        time = (level.double() + 1) / self.process.num_train_timesteps
        noised = self.process.perturb((embedding - mean) / std, drawn["noise"], time)
        width = embedding.shape[-1]
        turns = get_timestep_embedding(level, width, flip_sin_to_cos=True, downscale_freq_shift=0)
        row = torch.cat([noised * std + mean, turns.to(embedding)], 1)
        return {EMBEDDED: torch.where(drawn["told"][:, None], row, 0)}

    def asked(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``image_embeds``."""
        return {"image_embeds": made[EMBEDDING]}
