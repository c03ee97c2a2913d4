"""The pictures of a call, batch by batch: x_0 = decode(sampler(guidance(denoiser), noise))."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.calls.arguments import Pictures, refuse
from ldm.calls.running import Call, Interrupted
from ldm.calls.texts import Texts, alike
from ldm.diffusion import Condition, Predictor
from ldm.guidance import Threshold
from ldm.models.codec import Codec
from ldm.models.conditioner import silent
from ldm.models.wrapped import bare
from ldm.sampling import Sampler, SchedulerSampler

Walk = Callable[..., Tensor]
"""A sampler whose steps are set: (predict, noise, condition, generators, callback) -> latents."""


def walk(
    call: Call,
    stepper: Sampler,
    device: torch.device,
    steps: int,
    timesteps: Sequence[int] | None,
    sigmas: Sequence[float] | None,
    part: tuple[float, float] = (0.0, 1.0),
    spaced: Callable[[int], Sequence[float] | None] = lambda steps: None,
) -> Walk:
    """The way from the noise of a batch to its latents, each time with a fresh scheduler that
    ``call`` knows; or the ``part`` of it from one share of the noise to another. What ``spaced``
    says are the sigmas of a number of steps, where a scheduler takes some.

    Raises:
        ValueError: the sampler cannot take these steps.
    """
    own = {"timesteps": timesteps, "sigmas": sigmas}
    shares = dict(zip(("denoising_start", "denoising_end"), part, strict=True))
    if not isinstance(stepper, SchedulerSampler):
        refuse(**own)
        call.num_timesteps = stepper.evaluations(steps, **shares)
        return partial(stepper, steps=steps, **shares)
    listed = any(value is not None for value in own.values())
    if not listed and stepper.takes("sigmas", steps):
        own["sigmas"] = spaced(steps)
        listed = own["sigmas"] is not None
    steps = 0 if listed else steps
    begun = stepper.start(steps, device, **own)
    call.num_timesteps = len(stepper.part(copy.deepcopy(begun), *part))

    def walked(*told: Any, **named: Any) -> Tensor:
        call.scheduler = copy.deepcopy(begun)
        return stepper.run(call.scheduler, *told, **named, **shares)

    return walked


def noise(
    pictures: Pictures,
    codec: Codec,
    channels: int,
    side: int | Sequence[int] | None,
    height: int | None,
    width: int | None,
    latents: Tensor | None,
    device: torch.device,
    patch: int = 1,
) -> Tensor:
    """Standard normal noise ``n c h w``: ``latents``, or a draw for pictures of this size.

    Args:
        pictures: which.
        codec: from latents to pixels.
        channels: of the latents.
        side: of latents whose size is not given, or their height and width, in cells.
        height: in pixels, or None.
        width: in pixels, or None.
        latents: noise, or None.
        device: where it is to lie.
        patch: side of a token of the denoiser, in latent cells.

    Raises:
        ValueError: there are no latents of this size, or ``latents`` are of another, or are not
            finite.
    """
    rows, columns = (side, side) if side is None or isinstance(side, int) else side
    if latents is not None and latents.ndim == 4:
        rows, columns = latents.shape[2:]
    sizes, unit = list[int](), codec.factor * patch
    for name, pixels, cells in (("height", height, rows), ("width", width, columns)):
        if pixels is None and cells is None:
            raise ValueError("this U-Net states no sample_size: pass both height and width")
        asked = cells * codec.factor if pixels is None else pixels
        if asked < 1 or asked % unit:
            raise ValueError(f"{name} must be a multiple of {unit} pixels, not {asked}")
        sizes.append(asked // codec.factor)
    shape = (len(pictures), channels, *sizes)
    if latents is None:
        draws = pictures.generators
        return randn_tensor(shape, generator=draws, device=device, dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, not {shape}")
    x = latents.to(device, torch.float32)
    if not bool(x.isfinite().all()):
        raise ValueError("latents hold nan or inf: pass standard normal noise")
    return x


Told = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What the network is told beside the texts, and with those of the negative prompts, ``1 ...``."""


@dataclass
class Batches:
    """All batches of a call.

    Args:
        call: which.
        pictures: what it draws.
        texts: what they are told.
        codec: from latents to pixels.
        predict: the network, not guided.
        clip: what keeps pixels within bounds, if something must.
        device: where the network is.
        told: beside the texts.
    """

    call: Call
    pictures: Pictures
    texts: Texts
    codec: Codec
    predict: Predictor
    clip: Threshold | None
    device: torch.device
    told: Told = field(default_factory=lambda: ({}, {}))

    def draw(self, noise: Tensor, walk: Walk, bar: Any, *, latent: bool) -> Tensor:
        """Pixels of all pictures, or their latents; of the batches that nobody interrupted.

        Args:
            noise: of all.
            walk: to the latents of a batch.
            bar: of progress, an evaluation a step.
            latent: latents, in the dtype of the pipeline.
        """
        call, found = self.call, []

        def after(*told: Any) -> Tensor:
            bar.update()
            return call.after(*told)

        for part in self.pictures.batches():
            call.begin(self._encode(part, self.texts.prompts), partial(self._null, part))
            guided, draws = call.guide(self.predict, self.clip), self.pictures.of(part)
            try:
                x = walk(guided, noise[part], call.cond, generators=draws, callback=after)
            except Interrupted as interrupted:
                x = interrupted.latent
            except ValueError:
                call.watch.check()  # what is not finite is why a sampler cannot go on
                raise
            if latent:
                found.append(x.to(call.dtype))
            else:
                found.append(self.codec.decode(x, draws).float())
                call.watch.see(found[-1], "the decoder", bare(getattr(self.codec, "vae", None)))
            if call.interrupt:
                break
        call.watch.check()
        return torch.cat(found)

    def _encode(self, part: slice, said: Callable[[slice], Condition]) -> Condition:
        """The condition of a batch; pictures of one text share its encoding."""
        each = self.pictures.each
        first, last = part.start // each, (part.stop - 1) // each
        skip, count = part.start - first * each, part.stop - part.start
        cond = said(slice(first, last + 1)).to(self.device, self.call.dtype)
        if cond.tokens is not None:
            towers = self.texts.towers.values()
            network = bare(next(iter(towers)).text_encoder) if len(towers) == 1 else None
            self.call.watch.see(cond.tokens, "the text encoder", network)
        cond = cond.map(lambda x: x.repeat_interleave(each, 0)[skip : skip + count])
        return _with(cond, self.told[0], count)

    def _null(self, part: slice) -> Condition:
        """What guidance steers away from in a batch."""
        if self.pictures.steered or not self.texts.zeros:
            cond = alike(self.call.cond, self._encode(part, self.texts.negatives))
        else:
            cond = silent(self.call.cond)  # of the same batch: of the same shape
        return _with(cond, self.told[1], part.stop - part.start)


def _with(cond: Condition, told: dict[str, Tensor], count: int) -> Condition:
    """``cond``, each sample told the same beside it."""
    beside = {name: value.expand(count, *value.shape[1:]) for name, value in told.items()}
    return replace(cond, extra=cond.extra | beside)
