"""The pictures of a call, batch by batch: x_0 = decode(sampler(guidance(denoiser), noise))."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.calls.arguments import Pictures, refuse
from ldm.calls.begin import Begin
from ldm.calls.running import Call, Interrupted
from ldm.calls.texts import Texts, alike
from ldm.diffusion import Condition, Predictor
from ldm.guidance import Threshold
from ldm.models.codec import Codec
from ldm.models.conditioner import silent
from ldm.models.wrapped import bare
from ldm.sampling import Sampler, SchedulerSampler
from ldm.sampling.parts import noised as noised_by


@dataclass(frozen=True)
class Walk:
    """A sampler whose steps are set.

    Args:
        run: (predict, noise, condition, generators, callback) -> latents.
        noised: (latents, noise) -> where it sets out from them, in place of noise.
    """

    run: Callable[..., Tensor]
    noised: Callable[[Tensor, Tensor], Tensor]


def walk(
    call: Call,
    stepper: Sampler,
    device: torch.device,
    steps: int,
    timesteps: Sequence[int] | None,
    sigmas: Sequence[float] | None,
    part: tuple[float, float] = (0.0, 1.0),
    spaced: Callable[[int], Sequence[float] | None] = lambda steps: None,
    taken: Callable[[int], int] = lambda steps: steps,
) -> Walk:
    """The way from the noise of a batch to its latents, each time with a fresh scheduler that
    ``call`` knows; or the ``part`` of it from one share of the noise to another, or as many of its
    last steps as ``taken`` says of all. What ``spaced`` says are the sigmas of a number of steps,
    where a scheduler takes some.

    Raises:
        ValueError: the sampler cannot take these steps.
    """
    own = {"timesteps": timesteps, "sigmas": sigmas}
    shares: dict[str, Any] = dict(zip(("denoising_start", "denoising_end"), part, strict=True))
    if not isinstance(stepper, SchedulerSampler):
        refuse(**own)
        begin = steps - taken(steps)
        shares["begin"] = begin
        call.num_timesteps = stepper.evaluations(steps, **shares)
        noised = partial(stepper.noised, steps=steps, begin=begin)
        return Walk(partial(stepper, steps=steps, **shares), noised)
    listed = any(value is not None for value in own.values())
    if not listed and stepper.takes("sigmas", steps):
        own["sigmas"] = spaced(steps)
        listed = own["sigmas"] is not None
    steps = 0 if listed else steps
    begun = stepper.start(steps, device, **own)
    count = -(-len(begun.timesteps) // begun.order) if listed else steps
    begin = count - taken(count)
    shares["begin"] = begin
    call.num_timesteps = len(stepper.part(copy.deepcopy(begun), **shares))

    def walked(*told: Any, **named: Any) -> Tensor:
        call.scheduler = copy.deepcopy(begun)
        seen = call.callback is not None
        return stepper.run(call.scheduler, *told, **named, **shares, itself=seen)

    return Walk(walked, lambda x0, eps: noised_by(copy.deepcopy(begun), x0, eps, begin))


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
        beside: the same, of every picture by itself, ``n ...``.
        unsaid: in place of that with those of the negative prompts.
    """

    call: Call
    pictures: Pictures
    texts: Texts
    codec: Codec
    predict: Predictor
    clip: Threshold | None
    device: torch.device
    told: Told = field(default_factory=lambda: ({}, {}))
    beside: dict[str, Tensor] = field(default_factory=dict)
    unsaid: dict[str, Tensor] = field(default_factory=dict)

    def draw(self, begin: Begin, walk: Walk, bar: Any, *, latent: bool) -> Tensor:
        """Pixels of all pictures, or their latents; of the batches that nobody interrupted.

        Args:
            begin: of all.
            walk: to the latents of a batch.
            bar: of progress, an evaluation a step.
            latent: latents, in the dtype of the pipeline.
        """
        call, found, first = self.call, [], begin.x(walk.noised)
        self.beside, self.unsaid = begin.beside, begin.unsaid

        def after(*told: Any) -> Tensor:
            bar.update()
            return call.after(*told)

        for part in self.pictures.batches():
            call.begin(self._encode(part, self.texts.prompts), partial(self._null, part))
            guided = call.guide(self.predict, self.clip, begin.kept(part))
            draws = self.pictures.of(part)
            try:
                x = walk.run(guided, first[part], call.cond, generators=draws, callback=after)
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
                found[-1] = begin.pasted(found[-1], part)
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
        return self._with(cond, self.told[0], self.beside, part)

    def _null(self, part: slice) -> Condition:
        """What guidance steers away from in a batch."""
        if self.pictures.steered or not self.texts.zeros:
            cond = alike(self.call.cond, self._encode(part, self.texts.negatives))
        else:
            cond = silent(self.call.cond)  # of the same batch: of the same shape
        return self._with(cond, self.told[1], self.unsaid, part)

    def _with(
        self, cond: Condition, told: dict[str, Tensor], own: dict[str, Tensor], part: slice
    ) -> Condition:
        """``cond`` of a batch, each sample told the same beside it, and what is its ``own``."""
        count = part.stop - part.start
        beside = {name: value.expand(count, *value.shape[1:]) for name, value in told.items()}
        beside |= {name: value[part] for name, value in own.items()}
        return replace(cond, extra=cond.extra | beside)
