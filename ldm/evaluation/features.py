"""Spaces in which pictures are compared.

Every one of them takes pixels ``b 3 h w`` in [-1, 1] and returns features ``b d`` in float32. A
figure in a learnt space says how pictures look to that network; ``pixels`` is the one that was
trained on nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from ldm.data.images import to_levels
from ldm.models.clip import Clip

Extract = Callable[[Tensor], Tensor]


class FeatureError(ValueError):
    """A space that cannot be had; the message is one line."""


@dataclass(frozen=True)
class Space:
    """A space of features.

    Args:
        name: as reports call it.
        extract: pixels ``b 3 h w`` in [-1, 1] to features ``b d``.
    """

    name: str
    extract: Extract

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Tensor] | Tensor, batch: int = 64) -> Tensor:
        """Features ``n d`` of pictures ``3 h w``, ``batch`` at a time."""
        found, waiting = [], []
        for picture in pictures:
            waiting.append(picture)
            if len(waiting) == batch:
                found.append(self.extract(torch.stack(waiting)).float().cpu())
                waiting = []
        if waiting:
            found.append(self.extract(torch.stack(waiting)).float().cpu())
        return torch.cat(found)


def space(spec: str, device: torch.device | str = "cpu") -> Space:
    """The space that ``spec`` names.

    ``pixels``; ``pixels:16`` (averaged down to 16 x 16, so that a shift of a pixel weighs little);
    ``clip:FOLDER`` (the picture tower of a pipeline folder with ``image_encoder``); ``inception``
    or ``inception:FILE`` (pool3 of the network of the Frechet Inception distance, by
    torch-fidelity); ``folder:FOLDER`` (any vision model of transformers, DINOv2 for instance: its
    class token or pooled output).

    Raises:
        FeatureError: there is no such space, or what it needs is not there.
    """
    kind, _, argument = spec.partition(":")
    if kind == "pixels":
        return Space(spec, _pixels(argument))
    if kind == "clip" and argument:
        return Space(spec, clip(argument).to(device).image_features)
    if kind == "inception":
        return Space(spec, _inception(argument or None, device))
    if kind == "folder" and argument:
        return Space(spec, _transformers(argument, device))
    raise FeatureError(
        f"{spec!r} is no space of features: write pixels, pixels:SIDE, clip:FOLDER, inception,"
        " inception:FILE or folder:FOLDER"
    )


def _pixels(side: str) -> Extract:
    if not side:
        return lambda x: x.flatten(1)
    if not side.isdecimal() or not int(side):
        raise FeatureError(f"'pixels:{side}': the side must be a number of pixels, pixels:16")

    def extract(x: Tensor) -> Tensor:
        # What one of the small pixels then weighs as much as all that it stands for.
        smaller = interpolate(x, size=(int(side), int(side)), mode="area")
        return smaller.flatten(1) * (x.shape[-1] / int(side))

    return extract


def clip(folder: str) -> Clip:
    """Both towers of a pipeline folder with ``text_encoder`` and ``image_encoder``."""
    root = Path(folder)
    for part in ("text_encoder", "image_encoder"):
        if not (root / part / "config.json").is_file():
            raise FeatureError(f"'clip:{folder}': there is no {root / part}")
    try:
        return Clip.load(root / "text_encoder", root / "image_encoder")
    except ValueError as error:
        raise FeatureError(f"'clip:{folder}': {error}") from None


def _inception(weights: str | None, device: torch.device | str) -> Extract:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise FeatureError(
            "'inception': torch-fidelity is not installed: pip install 'ldm[evaluate]'"
        ) from None
    if weights is not None and not Path(weights).is_file():
        raise FeatureError(f"'inception:{weights}': there is no such file")
    try:
        network: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
        )
    except (OSError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise FeatureError(
            f"'inception': its weights cannot be had ({line}): name their file, inception:FILE"
        ) from None
    network = network.to(device).eval()

    def extract(x: Tensor) -> Tensor:
        return network(to_levels(x).to(device))[0]

    return extract


def _transformers(folder: str, device: torch.device | str) -> Extract:
    if not (Path(folder) / "config.json").is_file():
        raise FeatureError(f"'folder:{folder}': there is no model (it has no config.json)")
    config = AutoConfig.from_pretrained(folder)
    network = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
    network = network.to(device).eval()
    processor = AutoImageProcessor.from_pretrained(folder)

    def extract(x: Tensor) -> Tensor:
        inputs = processor(images=list(to_levels(x).cpu()), return_tensors="pt").to(device)
        output = network(**inputs)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    return extract


def clip_score(model: Clip, tokens: Tensor, pixels: Tensor) -> Tensor:
    """100 max(cos, 0) of each text and its picture, ``b`` (Hessel et al. 2021, w = 1 and in
    percent).

    Args:
        model: both towers.
        tokens: ids ``b l``.
        pixels: ``b 3 h w`` in [-1, 1].
    """
    text, image = model.text_features(tokens), model.image_features(pixels)
    return 100 * (text * image).sum(-1).clamp(min=0)  # both are unit vectors
