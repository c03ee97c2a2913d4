"""What the networks beside a U-Net are told in a call, and when they speak, by stock's names for
it: ControlNets here, adapters in ``ldm.calls.adapters``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ldm.calls.adapters import Features, embedded, given_to
from ldm.calls.arguments import Pictures
from ldm.calls.running import Call
from ldm.calls.values import each, several, shown
from ldm.editing.pictures import KINDS, is_picture, numbers, pictures, resized, size
from ldm.models.control import HINT, IMAGE, SHARE, Strength, nets_of, numbered
from ldm.models.wrapped import bare

_IMAGE = "control_image"
_ARGUMENTS = (
    _IMAGE, "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end",
    "guess_mode",
)  # fmt: skip


@dataclass(frozen=True)
class Control:
    """The pictures of a call that its network is told by others; without any there is nothing of
    it.

    Args:
        hints: pictures for each, as ``ldm.editing.pictures.pictures`` has them.
        scales: of each.
        spans: shares of the evaluations between which each speaks.
        guess: whether they speak to prompts alone, and less the further from the middle.
        features: of T2I-Adapters.
        images: what IP-Adapters are told beside prompts, and beside negative ones.
    """

    hints: tuple[Any, ...] = ()
    scales: tuple[float, ...] = ()
    spans: tuple[tuple[float, float], ...] = ()
    guess: bool = False
    features: Features = field(default_factory=Features)
    images: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())

    @classmethod
    def taken(cls, call: Call, told: dict[str, Any], image: Any, embeds: Any) -> Control:
        """Takes its arguments out of ``told``.

        Args:
            call: of a pipeline.
            told: its further arguments.
            image: ``ip_adapter_image``.
            embeds: ``ip_adapter_image_embeds``.

        Raises:
            ValueError: a network or what it is to be told is missing, or they do not go together.
        """
        parts, family = call.pipeline.components, call.pipeline.family
        if not family.controlled:  # which says that it knows none of the other arguments
            here = {name: parts.get(name) for name in ("controlnet", "adapter")}
            here |= {"ip_adapter_image": image, "ip_adapter_image_embeds": embeds}
            for name, value in here.items():
                if value is not None:
                    raise ValueError(f"{name}: a model of the family {family.name} takes none")
            return cls()
        guided = call.guided or call.guidance is not None
        features = Features.taken(parts, told)
        found = cls._of_controlnets(parts, told)
        return replace(
            found, features=features, images=embedded(call.pipeline, image, embeds, guided)
        )

    @classmethod
    def _of_controlnets(cls, parts: Mapping[str, Any], told: dict[str, Any]) -> Control:
        nets = nets_of(parts.get("controlnet"))
        given = given_to(nets, told, _ARGUMENTS, "ControlNet", "controlnet")
        if not nets:
            return cls()
        image = given.get(_IMAGE)
        if image is None:
            raise ValueError(
                f"{_IMAGE} is missing: the picture that the ControlNet of this pipeline follows"
                " (image is one that is edited)"
            )
        count, alone = len(nets), bare(parts["controlnet"]) is nets[0]
        hints = [image] if alone else several(_IMAGE, image, count)
        scales = each("controlnet_conditioning_scale", given, 1.0, count)
        spans = list(
            zip(
                each("control_guidance_start", given, 0.0, count),
                each("control_guidance_end", given, 1.0, count),
                strict=True,
            )
        )
        for start, end in spans:
            if not 0 <= start < end <= 1:
                raise ValueError(
                    "control_guidance_start must be less than control_guidance_end, both in"
                    f" [0, 1], not {start:g} and {end:g}"
                )
        guess = given.get("guess_mode", False)
        if not isinstance(guess, bool):
            raise ValueError(f"guess_mode must be True or False, not {shown(guess)}")
        guess = guess or bool(bare(nets[0]).config.global_pool_conditions)
        found = []
        for hint in hints:
            if not is_picture(hint):
                raise ValueError(f"{_IMAGE} must be {KINDS}, not {shown(hint)}")
            found.append(pictures(_IMAGE, hint))
        return cls(tuple(found), tuple(scales), tuple(spans), guess)

    def sides(
        self, height: int | None, width: int | None, image: Any, unit: int
    ) -> tuple[int | None, int | None]:
        """Height and width of a call that is asked for those: without them, and without an
        ``image`` that is edited, those of the hint, cut to multiples of ``unit`` as in stock.
        """
        own = self.features.sides(unit)
        if self.hints:
            own = tuple(side - side % unit for side in size(self.hints[0]))
        if own is None or image is not None:
            return height, width
        rows, columns = own
        return rows if height is None else height, columns if width is None else width

    def beside(
        self, drawn: Pictures, sides: tuple[int, int], device: torch.device
    ) -> dict[str, Tensor]:
        """The hints of every picture that is ``drawn``, of height and width ``sides``, for
        ``Condition.extra``.
        """
        found = []
        for hint in self.hints:
            pixels = resized(hint, *sides).to(device, torch.float32)
            found.append(pixels[numbers(_IMAGE, len(pixels), len(drawn.prompts), drawn.each)])
        return numbered(HINT, found) | self.features.beside(drawn, sides, device)

    def told(self, said: dict[str, Tensor], null: dict[str, Tensor]) -> tuple[Any, Any]:
        """What is told beside prompts and negative prompts, with how much those hear of the hints:
        in a guess negative prompts hear nothing.
        """
        said, null = (
            a | numbered(IMAGE, b) for a, b in zip((said, null), self.images, strict=True)
        )
        if not self.guess:
            return said, null
        return said | {SHARE: torch.ones(1)}, null | {SHARE: torch.zeros(1)}

    def strength(self, call: Call) -> Strength:
        """How strongly they speak at the evaluation that ``call`` has come to."""
        count = call.num_timesteps
        first, last = call.done / count, (call.done + 1) / count
        scales = [
            0.0 if first < start or last > end else scale
            for scale, (start, end) in zip(self.scales, self.spans, strict=True)
        ]
        return Strength(scales, self.guess, self.features.heard(call.done, count))
