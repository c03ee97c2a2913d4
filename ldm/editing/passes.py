"""Pictures drawn in several calls: large ones in two passes, and rows of them from one to another.

Each takes the pipeline as what it is asked for, and further arguments of its call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate

from ldm.editing.enlarge import Enlarge

_OF_ANOTHER = (
    "image", "mask_image", "feather", "padding_mask_crop", "denoising_start", "denoising_end",
)  # fmt: skip
_OF_FIRST = ("height", "width", "latents")


def enlarged(
    pipe: Any,
    prompt: str | list[str],
    *,
    scale: float = 2.0,
    strength: float = 0.6,
    by: str = "latent",
    **call: Any,
) -> Any:
    """What the call of ``pipe`` returns, of pictures that are drawn, made larger, and drawn again
    from there: a "hires fix", which ``pipe(prompt, enlarge=scale)`` asks for. A model draws large
    pictures well where a small one says what goes where; of a size that it was not trained at it
    would repeat things.

    Args:
        pipe: the pipeline.
        prompt: see its call.
        scale: of both sides.
        strength: of the second pass.
        by: what is made larger: ``latent`` by bilinear interpolation, or ``pixel``, decoded, by
            Lanczos' filter.
        call: further arguments of both passes; ``height``, ``width`` and ``latents`` are those of
            the first.

    Raises:
        ValueError: ``scale`` does not make them larger, there are no latents, or an argument is one
            of another picture that is drawn from.
    """
    if not scale > 1:
        raise ValueError(f"scale must be more than 1, not {scale:g}")
    return drawn_twice(pipe, prompt, Enlarge(scale, strength, by), call)


def drawn_twice(pipe: Any, prompt: str | list[str], how: Enlarge, call: Mapping[str, Any]) -> Any:
    """What ``enlarged`` returns, by the arguments of a call; ``ValueError`` as it has it."""
    for name in _OF_ANOTHER:
        if call.get(name) is not None:
            raise ValueError(f"enlarge draws anew, and to the end: leave out {name}")
    if call.get("strength") is not None:
        raise ValueError("strength is that of an image; that of the second pass: enlarge=(2, 0.6)")
    latent, strength = how.by == "latent", how.strength
    if latent and pipe.codec.network is None:
        raise ValueError("this model has no latents to make larger: make pixels, by='pixel'")
    unit = pipe.family.patch(pipe.network) * (1 if latent else pipe.codec.factor)
    told = {"output_type": "latent" if latent else "pil", "return_dict": True}
    first = pipe(prompt, **{**call, **told}).images
    if pipe.interrupt:  # what there is, as large as it was to be
        strength = 0.0
    rows, columns = first.shape[2:] if latent else reversed(first[0].size)
    size = [max(unit, round(side * how.scale / unit) * unit) for side in (rows, columns)]
    if latent:
        image: Any = interpolate(first.float(), size=size, mode="bilinear")
    else:
        image = [one.resize(size[::-1], Image.Resampling.LANCZOS) for one in first]
    kept = {name: value for name, value in call.items() if name not in _OF_FIRST}
    return pipe(prompt, **kept | {"image": image, "strength": strength})


def between_seeds(pipe: Any, prompt: str, seeds: tuple[int, int], count: int, **call: Any) -> Any:
    """What the call of ``pipe`` returns of ``count`` pictures, from that of the first seed to that
    of the second by equal steps on the arc between their noise.

    Raises:
        ValueError: these are less than two.
    """
    shares = _shares(count)
    first, last = seeds
    told = {"seed": [first] * count, "variation": ([last] * count, shares)}
    return pipe(prompt, num_images_per_prompt=count, **told, **call)


@torch.no_grad()
def between_prompts(
    pipe: Any,
    prompts: tuple[str, str],
    count: int,
    *,
    seeds: tuple[int, int] = (0, 0),
    **call: Any,
) -> Any:
    """What the call of ``pipe`` returns of ``count`` pictures, by equal steps on the line between
    what its text encoders say to two prompts, and on the arc between the noise of two seeds. The
    ends are the pictures of these; brackets are text.

    Raises:
        ValueError: these are less than two, or the model reads no text.
    """
    if prompts[0] == prompts[1]:
        return between_seeds(pipe, prompts[0], seeds, count, **call)
    if not pipe.family.towers:
        raise ValueError("this model reads no text that there were something between")
    shares = _shares(count)
    said = [pipe.conditioner.encode([text]) for text in prompts]

    def line(*ends: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.lerp(*ends, share) for share in shares])

    told = {"prompt_embeds": line(*(cond.tokens for cond in said))}
    if pipe.family.pooled:
        told["pooled_prompt_embeds"] = line(*(cond.pooled for cond in said))
    told |= {"seed": [seeds[0]] * count}
    if seeds[0] != seeds[1]:
        told["variation"] = [seeds[1]] * count, shares
    return pipe(**told, **call)


@torch.no_grad()
def between_pictures(
    pipe: Any,
    prompt: str,
    pictures: tuple[Image.Image, Image.Image],
    count: int,
    *,
    strength: float = 0.5,
    seed: int = 0,
    **call: Any,
) -> Any:
    """What the call of ``pipe`` returns of ``count`` pictures, drawn with the same noise and
    ``strength`` from latents on the line between those of two pictures of one size.

    Raises:
        ValueError: these are less than two, or there are no latents.
    """
    if pipe.codec.network is None:
        raise ValueError("this model has no latents between those of two pictures")
    ends = [
        pipe(prompt, image=one, strength=0.0, seed=seed, output_type="latent", **call).images
        for one in pictures
    ]
    latents = torch.cat([torch.lerp(*ends, share) for share in _shares(count)])
    told = {"image": latents, "strength": strength, "seed": [seed] * count}
    return pipe(prompt, num_images_per_prompt=count, **told, **call)


def _shares(count: int) -> list[float]:
    if count < 2:
        raise ValueError(f"from one to another there are 2 pictures at least, not {count}")
    return [n / (count - 1) for n in range(count)]


def save_gif(
    images: Sequence[Image.Image], path: str | PathLike[str], milliseconds: int = 80
) -> None:
    """Writes PIL ``images`` as an endless GIF, there and back."""
    there_and_back = [*images, *reversed(images[1:-1])]
    first, *rest = there_and_back
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)
