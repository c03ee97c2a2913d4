"""What one request asks for: the settings of ``ldm sample`` by their names, strictly typed.

Every API makes one of these, a job keeps it in its file, and a drawer calls the pipeline with it.
Read without torch, so that a schema can be told before a model is loaded.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from ldm.sampling.names import canonical
from ldm.serving.limits import Limits

SEEDS = 2**32
_OF_IMAGE = ("mask", "strength", "feather", "outpaint", "mask_crop")


def _known(name: str) -> str:
    return name if name == "model" else canonical(name)


def _sides(sides: list[int]) -> list[int]:
    if not any(sides):
        raise ValueError("outpainting by 0 pixels on every side: there is nothing to draw")
    return sides


def _base64(text: str) -> str:
    content(text)
    return text


def content(text: str) -> bytes:
    """The bytes of a picture in base64, also of a ``data:`` URL of one; ``ValueError`` if it is
    none.
    """
    _, comma, behind = text.partition(",") if text.startswith("data:") else ("", "", "")
    try:
        found = base64.b64decode(behind if comma else text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a picture is a file in base64, as PNG, JPEG or WebP") from None
    if not found:
        raise ValueError("a picture is a file in base64, and this is none")
    return found


Picture = Annotated[str, AfterValidator(_base64)]


class Lora(BaseModel):
    """A LoRA of the configured folder.

    Args:
        name: its file without suffix.
        weight: how much of it; 1 is as trained.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    name: str = Field(max_length=200)
    weight: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)


class Draw(BaseModel):
    """Pictures of one prompt.

    Args:
        prompt: the text; a class's name, or nothing, of a model of these.
        negative: what to steer away from.
        model: a name of the shelf; None: the first.
        count: pictures, the i-th from seed + i.
        seed: None: one is drawn, and told.
        width: pixels; by default those of ``image``, else the model's own.
        height: pixels.
        steps: of the sampler; by default what the model's folder states.
        guidance: scale, 1 is none; likewise.
        guidance_rescale: 0 to 1.
        sampler: a name, or "model"; likewise.
        syntax: "a1111" reads weights in brackets.
        image: a picture to set out from, in base64.
        mask: white is drawn, the rest of ``image`` stays.
        strength: share of the steps that is taken from ``image``.
        feather: pixels on which what is drawn fades into the rest.
        outpaint: pixels that are drawn around ``image``: left, top, right, bottom.
        mask_crop: what is masked is drawn alone, at ``width`` and ``height``, with so many pixels
            of ``image`` around it, and put back.
        variation_seed: other noise; picture i goes towards this + i, and ``seed`` stays.
        variation_strength: how far towards it.
        loras: of the folder.
        previews: pictures on the way.
        deadline: seconds from now at which the job is given up.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str = ""
    negative: str = ""
    model: str | None = Field(None, max_length=200)
    count: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    guidance: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False)
    guidance_rescale: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    sampler: Annotated[str, AfterValidator(_known)] | None = Field(None, max_length=100)
    syntax: Literal["a1111"] | None = None
    image: Picture | None = None
    mask: Picture | None = None
    strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    feather: int | None = Field(None, ge=0, le=1000)
    outpaint: (
        Annotated[
            list[Annotated[int, Field(ge=0, le=4096)]],
            Field(min_length=4, max_length=4),
            AfterValidator(_sides),
        ]
        | None
    ) = None
    mask_crop: int | None = Field(None, ge=0, le=4096)
    variation_seed: int | None = Field(None, ge=0, lt=SEEDS)
    variation_strength: float = Field(0.1, ge=0, le=1, allow_inf_nan=False)
    loras: list[Lora] = Field([], max_length=8)
    previews: int = Field(0, ge=0, le=16)
    deadline: float | None = Field(None, gt=0, le=86_400, allow_inf_nan=False)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.image is None:
            for name in _OF_IMAGE:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs an image: the picture that is edited")
        if self.mask is not None and self.outpaint is not None:
            raise ValueError("outpaint makes a mask of its own: leave out mask")
        for name in ("feather", "mask_crop"):
            if getattr(self, name) is not None and self.mask is None and self.outpaint is None:
                raise ValueError(f"{name} is that of a mask, or of outpaint")
        if len({lora.name for lora in self.loras}) < len(self.loras):
            raise ValueError("loras: one is named twice")
        return self

    def seeds(self, number: int) -> tuple[int, int | None]:
        """Seed and variation seed of picture ``number``, once there is a seed."""
        assert self.seed is not None
        if self.variation_seed is None:
            return (self.seed + number) % SEEDS, None
        return self.seed, (self.variation_seed + number) % SEEDS

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """Names and weights of its LoRAs."""
        return tuple((lora.name, lora.weight) for lora in self.loras)


def limited(limits: Limits, unit: int) -> type[Draw]:
    """``Draw`` within ``limits``, of a model that draws multiples of ``unit`` pixels: what the
    schema of the API says.
    """
    side: Any = Annotated[int, Field(ge=unit, le=limits.side, multiple_of=unit)]
    text: Any = Annotated[str, Field(max_length=limits.text)]
    fields: dict[str, Any] = {
        "prompt": (text, ""),
        "negative": (text, ""),
        "count": (Annotated[int, Field(ge=1, le=limits.count)], 1),
        "steps": (Annotated[int, Field(ge=1, le=limits.steps)] | None, None),
        "width": (side | None, None),
        "height": (side | None, None),
    }
    return create_model("Draw", __base__=Draw, __doc__=Draw.__doc__, **fields)
