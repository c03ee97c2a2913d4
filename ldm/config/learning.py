"""What of a text-to-image model learns: whole parts, chosen parameters, adapters, or new words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from ldm.config.loader import config_class
from ldm.config.shapes import Widths

CONTROLNET = "controlnet"
"""Part that learns beside a U-Net, and its name among the networks of a model."""
PARTS = (
    "unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3", CONTROLNET,
)  # fmt: skip


def _of_a_part(entry: str) -> str:
    part = part_of(entry)
    if part not in PARTS or entry == f"{part}.":
        near = difflib.get_close_matches(part, PARTS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{entry!r} is no part: write unet or text_encoder, or parameters of one of them as"
            f" unet.PATTERN (unet.*attn2*){hint}"
        )
    return entry


Learning = Annotated[
    str,
    AfterValidator(_of_a_part),
    WithJsonSchema({"type": "string", "pattern": rf"^({'|'.join(PARTS)})(\..+)?$"}),
]
"""A part, or ``PART.PATTERN``: those of its parameters whose name fits the glob PATTERN."""


_NEW = {"rank": 8, "dora": False, "text_targets": ("q_proj", "k_proj", "v_proj", "out_proj")}
"""Of a LoRA that no file says more about."""


@config_class
class Lora:
    """Low-rank adapters that learn in place of the parts named in ``train`` (``ldm.models.lora``).

    Args:
        rank: r, the inner width of every update; None: 8, or as in ``file``.
        alpha: the update is scaled by ``alpha / rank``; None: by 1, or as in ``file``.
        dora: learn a magnitude per output beside it (Liu et al. 2024); None: if ``file`` has them.
        targets: names that modules of the U-Net or transformer end in; None: all of attention, as
            its family calls it, or the modules of ``file``.
        text_targets: the same in the text encoder; None: ``q_proj``, ``k_proj``, ``v_proj`` and
            ``out_proj``, or the modules of ``file``.
        file: a LoRA that learns on, diffusers' or kohya's: its file or folder; None: a new one.
        trigger: words of a prompt that call what it has learnt, for the header of its file, where
            others show them.
    """

    rank: Annotated[int, Field(gt=0, le=2**14)] | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dora: bool | None = None
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    text_targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    file: str | None = None
    trigger: Annotated[str, Field(min_length=1)] | None = None

    def __post_init__(self) -> None:
        if self.file is None:  # as runs have recorded them ever since
            for key, usual in _NEW.items():
                if getattr(self, key) is None:
                    object.__setattr__(self, key, usual)


@config_class
class ControlNet:
    """A ControlNet that learns beside a U-Net, which stays as it is (Zhang et al. 2023).

    Args:
        folder: of one that learns on, as diffusers saves it; None: a copy of the U-Net's first half
            behind convolutions that begin as 0.
        channels: of the layers that bring a hint to the size of the latent: all but the first halve
            its sides. None: 16, 32, 96 and 256, as many as the autoencoder asks for.
    """

    folder: str | None = None
    channels: Widths | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and self.channels is not None:
            raise ValueError("channels: those of the folder stand there: leave them out")


@config_class
class TextualInversion:
    """A new word whose embedding alone learns (Gal et al. 2022, eq. 2).

    Args:
        token: the word as captions and prompts spell it, ``<my-cat>``.
        initializer: words of the model's own whose embeddings it starts from.
        vectors: embeddings that stand for it; the second is spelt ``<my-cat>_1``, and a text names
            the first alone.
        templates: captions to learn from in place of the data's own; ``{}`` stands for the token.
    """

    token: Annotated[str, Field(min_length=1, pattern=r"^\S+$")]
    initializer: Annotated[str, Field(min_length=1)]
    vectors: Annotated[int, Field(gt=0, le=1000)] = 1
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"templates: {template!r} does not say where the token goes: {{}}")

    @property
    def captions(self) -> tuple[str, ...]:
        """The templates with the token in them."""
        return tuple(template.replace("{}", self.token) for template in self.templates)


def part_of(entry: str) -> str:
    """The part that an entry of ``train`` names."""
    return entry.partition(".")[0]


def parts(train: Sequence[str], word: TextualInversion | None) -> tuple[str, ...]:
    """The parts in which something learns, in order."""
    if word is not None:
        return ("text_encoder",)
    return tuple(dict.fromkeys(part_of(entry) for entry in train))


def refuse(
    train: Sequence[str],
    lora: Lora | None,
    word: TextualInversion | None,
    text_encoder_lr: float | None,
    controlnet: ControlNet | None = None,
) -> None:
    """``ValueError`` for keys that contradict each other about what learns."""
    _refuse_beside(train, lora, word, controlnet)
    patterns = [entry for entry in train if entry not in PARTS]
    if lora is not None and patterns:
        raise ValueError(
            f"train: {patterns[0]!r} chooses parameters, and with lora adapters learn: name the"
            " part, and choose its modules with lora.targets (lora.text_targets)"
        )
    if word is not None:
        if lora is not None:
            raise ValueError("textual_inversion and lora are two kinds of run: leave one out")
        if tuple(train) != ("unet",):
            raise ValueError("train: with textual_inversion a new word alone learns: leave it out")
        if text_encoder_lr is not None:
            raise ValueError(
                "optimizer.text_encoder_lr: a new word learns at optimizer.lr: leave this out"
            )
    learning = parts(train, word)
    if text_encoder_lr is not None and not any(p.startswith("text_encoder") for p in learning):
        raise ValueError(
            "optimizer.text_encoder_lr: the text encoder does not learn: add it to train, or leave"
            " this out"
        )


def _refuse_beside(
    train: Sequence[str],
    lora: Lora | None,
    word: TextualInversion | None,
    controlnet: ControlNet | None,
) -> None:
    """The same about a ControlNet."""
    named = CONTROLNET in map(part_of, train)
    if not named:
        if controlnet is not None:
            raise ValueError("controlnet: it does not learn: set train to [controlnet]")
        return
    if len(parts(train, None)) > 1:
        raise ValueError("train: a ControlNet learns alone, beside a model that stays as it is")
    for key, other in (("lora", lora), ("textual_inversion", word)):
        if other is not None:
            raise ValueError(f"{key}: train names a ControlNet, which is another run: leave it out")
