"""What a call of the pipeline is asked for, checked: one clear line for what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.calls.values import real, shown

TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
"""What a callback may ask for of every model of texts; of others the first."""

_OUTPUT_TYPES = ("pil", "np", "numpy", "pt", "latent")
_SEEDS = 2**32  # torch's CPU generator keeps no more of a seed than this
_INSTEAD = {
    "callback": "use callback_on_step_end",
    "callback_steps": "use callback_on_step_end, which is told the number of the step",
}

_ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs")

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a call, those of one prompt side by side.

    Args:
        prompts: texts.
        negatives: as many.
        each: pictures of every prompt.
        generators: one for all, one a picture, or None.
        batch: pictures at a time.
        steered: whether a negative prompt was given.
        varied: generators of other noise, one a picture, and how far to it each goes, if it does.
    """

    prompts: list[str]
    negatives: list[str]
    each: int
    generators: Generators | None
    batch: int
    steered: bool = False
    varied: tuple[list[torch.Generator], list[float]] | None = None

    @classmethod
    def asked(
        cls,
        prompt: Any,
        negative_prompt: Any,
        num_images_per_prompt: int,
        generator: Generators | None,
        seed: int | list[int] | None,
        batch_size: int | None,
        variation: tuple[Any, Any] | None = None,
    ) -> Pictures:
        """Those of the arguments of these names, whose kinds ``ldm.calls.values`` has checked.

        Raises:
            ValueError: they are none, or do not fit each other.
        """
        prompts = _texts("prompt", prompt)
        negatives = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(negatives) == 1:
            negatives = negatives * len(prompts)
        if len(negatives) != len(prompts):
            raise ValueError(
                f"negative_prompt has {len(negatives)} texts for {len(prompts)} prompts"
            )
        each = _positive("num_images_per_prompt", num_images_per_prompt)
        count = len(prompts) * each
        batch = count if batch_size is None else _positive("batch_size", batch_size)
        draws = _generators(generator, seed, count)
        steered = negative_prompt is not None
        if variation is None:
            return cls(prompts, negatives, each, draws, batch, steered)
        other = _generators(None, variation[0], count)
        assert isinstance(other, list)
        strengths = [variation[1]] * count if isinstance(variation[1], float) else variation[1]
        if len(strengths) != count:
            raise ValueError(f"variation: {len(strengths)} strengths for {count} images")
        if isinstance(draws, list):  # those that are another's are, whatever else is drawn by them
            again = _generators(None, variation[0], count)
            assert isinstance(again, list)
            pairs = zip(draws, again, strengths, strict=True)
            draws = [theirs if strength == 1 else own for own, theirs, strength in pairs]
        return cls(prompts, negatives, each, draws, batch, steered, (other, strengths))

    def __len__(self) -> int:
        return len(self.prompts) * self.each

    def batches(self) -> list[slice]:
        """Numbers of the pictures that are drawn together."""
        return [slice(n, min(n + self.batch, len(self))) for n in range(0, len(self), self.batch)]

    def of(self, part: slice) -> Generators | None:
        """The generators of a batch."""
        return self.generators[part] if isinstance(self.generators, list) else self.generators


def output_type(value: Any) -> str:
    """``value``, ``ValueError`` if pictures have no such form."""
    if value not in _OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, not {value!r}")
    return "np" if value == "numpy" else value


def part(
    start: float | None, end: float | None, image: Any, latents: torch.Tensor | None, **edit: Any
) -> tuple[tuple[float, float], torch.Tensor | None]:
    """The shares of the noise between which a call draws, ``denoising_start`` and
    ``denoising_end``, and what it goes on from in place of noise: ``image``, of a start.

    Raises:
        ValueError: it is to go on from nothing, or from two things, or there are arguments of an
            ``edit`` beside it.
    """
    shares = start or 0.0, 1.0 if end is None else end
    if start is None:
        if end is not None and image is not None:
            raise ValueError("denoising_end: a picture is edited to the end; leave it out")
        return shares, latents
    if not isinstance(image, torch.Tensor) or image.ndim != 4:
        raise ValueError(
            "image and denoising_start belong together: latents to go on from, and how far they are"
        )
    if latents is not None:
        raise ValueError("pass either image or latents, not both")
    for name, value in edit.items():
        if value is not None:
            raise ValueError(f"{name} edits a picture: it does not go with denoising_start")
    return shares, image


def tensor_inputs(callback: Any, names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """What ``callback`` is handed: ``names``, or what one of diffusers' own says that it needs.

    Raises:
        ValueError: some of them are none of ``known``.
    """
    if callback is None:
        return ()
    names = tuple(getattr(callback, "tensor_inputs", names) or ())
    if wrong := sorted(set(names) - set(known)):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: only {', '.join(known)} can be passed, not"
            f" {wrong}"
        )
    return names


def strength(cross_attention_kwargs: Any, told: dict[str, Any]) -> float:
    """How strong LoRAs are in a call: what ``{"scale": ...}`` says in ``cross_attention_kwargs``,
    or in ``joint_attention_kwargs`` of ``told``, which it is taken out of.

    Raises:
        ValueError: one says another thing.
    """
    found = 1.0
    joint = told.pop("joint_attention_kwargs", None)
    for name, value in zip(_ATTENTION, (cross_attention_kwargs, joint), strict=True):
        if value is not None and not (isinstance(value, dict) and set(value) <= {"scale"}):
            raise ValueError(
                f'{name} takes {{"scale": strength of the LoRAs}} alone, not {shown(value)}'
            )
        if value:
            found = real(f"scale of {name}", value["scale"])
    return found


def refuse(**arguments: Any) -> None:
    """``ValueError`` for the first that is not None: stock's arguments that do nothing here."""
    for name, value in arguments.items():
        if value is not None:
            instead = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise ValueError(f"{name} is not supported{instead}")


def _texts(name: str, texts: Any) -> list[str]:
    many = [texts] if isinstance(texts, str) else texts
    if not isinstance(many, list) or not many or not all(isinstance(text, str) for text in many):
        raise ValueError(f"{name} must be a text or a list of texts, not {texts!r}")
    return many


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return value


def _generators(generator: Any, seed: int | list[int] | None, count: int) -> Generators | None:
    if seed is None:
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images")
        return generator
    if generator is not None:
        raise ValueError("pass either generator or seed, not both")
    seeds = seed if isinstance(seed, list) else [seed + i for i in range(count)]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} images")
    if not all(0 <= each < _SEEDS for each in seeds):
        raise ValueError(f"seeds must lie in 0..2^32 - 1, not {seed}")
    return [torch.Generator().manual_seed(each) for each in seeds]
