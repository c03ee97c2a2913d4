"""What the ControlNets of a pipeline are told in a call, and when they speak, by stock's names for
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.calls.arguments import Pictures
from ldm.calls.running import Call
from ldm.calls.values import real, shown
from ldm.editing.pictures import KINDS, is_picture, numbers, pictures, resized, size
from ldm.families import Family
from ldm.models.control import HINT, SHARE, Strength, nets_of, numbered
from ldm.models.wrapped import bare

_IMAGE = "control_image"
_ARGUMENTS = (
    _IMAGE, "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end",
    "guess_mode",
)  # fmt: skip


@dataclass(frozen=True)
class Control:
    """The hints of a call and how its ControlNets speak; without any there is nothing of it.

    Args:
        hints: pictures for each, as ``ldm.editing.pictures.pictures`` has them.
        scales: of each.
        spans: shares of the evaluations between which each speaks.
        guess: whether they speak to prompts alone, and less the further from the middle.
    """

    hints: tuple[Any, ...] = ()
    scales: tuple[float, ...] = ()
    spans: tuple[tuple[float, float], ...] = ()
    guess: bool = False

    @classmethod
    def taken(cls, family: Family, parts: Mapping[str, Any], told: dict[str, Any]) -> Control:
        """Takes its arguments out of ``told``.

        Args:
            family: of the model.
            parts: of the pipeline, by name.
            told: further arguments of the call.

        Raises:
            ValueError: there is no ControlNet or no hint, or they do not go together.
        """
        if not family.controlled:  # which says that it knows none of the arguments
            if parts.get("controlnet") is not None:
                raise ValueError(f"controlnet: a model of the family {family.name} has none")
            return cls()
        given = {name: told.pop(name) for name in _ARGUMENTS if name in told}
        nets = nets_of(parts.get("controlnet"))
        if not nets:
            for name in given:
                raise ValueError(
                    f"{name} is told a ControlNet, and this pipeline has none: open it with"
                    " from_pretrained(FOLDER, controlnet=...)"
                )
            return cls()
        image = given.get(_IMAGE)
        if image is None:
            raise ValueError(
                f"{_IMAGE} is missing: the picture that the ControlNet of this pipeline follows"
                " (image is one that is edited)"
            )
        count, several = len(nets), bare(parts["controlnet"]) is not nets[0]
        hints = _hints(image, count) if several else [image]
        scales = _each("controlnet_conditioning_scale", given, 1.0, count)
        spans = list(
            zip(
                _each("control_guidance_start", given, 0.0, count),
                _each("control_guidance_end", given, 1.0, count),
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
        if not self.hints or image is not None:
            return height, width
        rows, columns = (side - side % unit for side in size(self.hints[0]))
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
        return numbered(HINT, found)

    def told(self, said: dict[str, Tensor], null: dict[str, Tensor]) -> tuple[Any, Any]:
        """What is told beside prompts and negative prompts, with how much those hear of the hints:
        in a guess negative prompts hear nothing.
        """
        if not self.guess:
            return said, null
        return said | {SHARE: torch.ones(1)}, null | {SHARE: torch.zeros(1)}

    def strength(self, call: Call) -> Strength:
        """How strongly they speak at the evaluation that ``call`` has come to."""
        first, last = call.done / call.num_timesteps, (call.done + 1) / call.num_timesteps
        scales = [
            0.0 if first < start or last > end else scale
            for scale, (start, end) in zip(self.scales, self.spans, strict=True)
        ]
        return Strength(scales, self.guess)


def _hints(image: Any, count: int) -> Sequence[Any]:
    """Pictures for each of several ControlNets; lists of a picture for each, one a prompt, are
    turned as in stock.
    """
    if isinstance(image, (list, tuple)) and image and isinstance(image[0], (list, tuple)):
        image = [list(each) for each in zip(*image, strict=False)]
    if not isinstance(image, (list, tuple)) or len(image) != count:
        raise ValueError(f"{_IMAGE} must be a list of {count}, for each ControlNet one")
    return image


def _each(name: str, given: Mapping[str, Any], usual: float, count: int) -> list[float]:
    """A number for each ControlNet, or one for all."""
    value = given.get(name, usual)
    many = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(many) != count:
        raise ValueError(f"{name} has {len(many)} numbers for {count} ControlNets")
    return [real(name, one) for one in many]
