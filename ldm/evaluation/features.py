"""Spaces in which pictures are compared, with each other and with texts.

Every one of them takes pixels ``b 3 h w`` in [-1, 1] and returns features ``b d`` in float32. A
figure in a learnt space says how pictures look to that network; ``pixels`` is the one that was
trained on nothing.

    CLIP score = 100 max(cos(f(text), g(picture)), 0)        (Hessel et al. 2021, w = 1, in percent)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPTokenizer

from ldm.data.images import to_image, to_levels
from ldm.errors import FeatureError
from ldm.formats import open_clip
from ldm.models.clip import Clip
from ldm.models.lengths import shortened

Extract = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Judge:
    """A CLIP: texts and pictures in one space.

    Args:
        text: texts to unit vectors ``b d``.
        picture: pixels ``b 3 h w`` in [-1, 1] to unit vectors ``b d``.
    """

    text: Callable[[Sequence[str]], Tensor]
    picture: Extract

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], pictures: Tensor, batch: int = 64) -> Tensor:
        """The CLIP score of each text and its picture (``n 3 h w``), ``n`` float32."""
        found = [
            (self.text(texts[n : n + batch]) * self.picture(pictures[n : n + batch])).sum(-1).cpu()
            for n in range(0, len(pictures), batch)
        ]
        return 100 * torch.cat(found).float().clamp(min=0)


@dataclass(frozen=True)
class Space:
    """A space of features.

    Args:
        name: as reports call it.
        extract: pixels ``b 3 h w`` in [-1, 1] to features ``b d``.
        made_by: the network that extracts, if one does, and how it is shown pictures.
        judge: of the space of a CLIP, all of it.
    """

    name: str
    extract: Extract
    made_by: tuple[Any, ...] = ()
    judge: Judge | None = None

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
    ``clip:FOLDER`` (a CLIP: a pipeline folder with ``image_encoder``, a model of transformers, or
    one of open_clip); ``inception`` or ``inception:FILE`` (pool3 of the network of the Frechet
    Inception distance, by torch-fidelity); ``folder:FOLDER`` (any vision model of transformers,
    DINOv2 for instance: its class token or pooled output).

    Raises:
        FeatureError: there is no such space, or what it needs is not there.
    """
    kind, _, argument = spec.partition(":")
    try:
        if kind == "pixels":
            return Space(spec, _pixels(argument))
        if kind == "clip" and argument:
            judge, made_by = _clip(argument, device)
            return Space(spec, judge.picture, made_by, judge)
        if kind == "inception":
            return Space(spec, *_inception(argument or None, device))
        if kind == "folder" and argument:
            return Space(spec, *_transformers(argument, device))
    except (OSError, RuntimeError, SafetensorError) as error:  # of files not there, or not whole
        line = " ".join(str(error).split())[:200]
        raise FeatureError(f"{spec!r} cannot be loaded: {line}") from None
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


def _clip(folder: str, device: torch.device | str) -> tuple[Judge, tuple[Any, ...]]:
    if (Path(folder) / open_clip.CONFIG).is_file():
        return _clip_of_open_clip(folder, device)
    if (Path(folder) / "config.json").is_file():
        return _clip_of_transformers(folder, device)
    towers = clip(folder).to(device)
    if not (Path(folder) / "tokenizer").is_dir():
        raise FeatureError(f"'clip:{folder}': there is no {Path(folder) / 'tokenizer'}")
    words = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")

    def text(texts: Sequence[str]) -> Tensor:
        short = [shortened(text, words.model_max_length) for text in texts]
        ids = words(short, padding="max_length", truncation=True, return_tensors="pt")
        return towers.text_features(ids.input_ids.to(device))

    return Judge(text, lambda x: towers.image_features(x.to(device))), (towers.model,)


def _clip_of_transformers(folder: str, device: torch.device | str) -> tuple[Judge, tuple[Any, ...]]:
    network = _whole(f"clip:{folder}", folder).to(device)
    if not hasattr(network, "get_text_features"):
        raise FeatureError(
            f"'clip:{folder}': a {network.config.model_type} has no texts beside its pictures:"
            f" write folder:{folder}"
        )
    words = AutoTokenizer.from_pretrained(folder)
    length = network.config.text_config.max_position_embeddings
    processor = AutoImageProcessor.from_pretrained(folder)

    def text(texts: Sequence[str]) -> Tensor:
        inputs = words(
            [shortened(text, length) for text in texts], padding="max_length", truncation=True,
            max_length=length, return_tensors="pt",
        )  # fmt: skip
        return normalize(network.get_text_features(**inputs.to(device)).pooler_output, dim=-1)

    def picture(x: Tensor) -> Tensor:
        inputs = processor(images=list(to_levels(x).cpu()), return_tensors="pt").to(device)
        return normalize(network.get_image_features(**inputs).pooler_output, dim=-1)

    return Judge(text, picture), (network, processor)


def _clip_of_open_clip(folder: str, device: torch.device | str) -> tuple[Judge, tuple[Any, ...]]:
    try:
        import open_clip as theirs
    except ImportError:
        raise FeatureError(
            f"'clip:{folder}': open_clip is not installed: pip install open_clip_torch"
        ) from None
    name, settings = f"local-dir:{folder}", Path(folder) / open_clip.CONFIG
    network, _, prepare = theirs.create_model_and_transforms(
        name, device=device, require_pretrained=True
    )
    words = theirs.get_tokenizer(name)
    network.eval()

    def picture(x: Tensor) -> Tensor:
        ready = torch.stack([prepare(to_image(one)) for one in x])
        return network.encode_image(ready.to(device), normalize=True)

    def text(texts: Sequence[str]) -> Tensor:
        short = [shortened(text, words.context_length) for text in texts]
        return network.encode_text(words(short).to(device), normalize=True)

    return Judge(text, picture), (network, settings.read_text(encoding="utf-8"))


def _inception(weights: str | None, device: torch.device | str) -> tuple[Extract, tuple[Any, ...]]:
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

    return extract, (network,)


def _whole(spec: str, folder: str) -> Any:
    """A model of transformers, every weight of which was read: others would be random."""
    network, found = AutoModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        told = f"its weights lack {len(missing)} tensors, {missing[0]} for one"
        raise FeatureError(f"{spec!r} cannot be loaded: {told}")
    return network.eval()


def _transformers(folder: str, device: torch.device | str) -> tuple[Extract, tuple[Any, ...]]:
    if not (Path(folder) / "config.json").is_file():
        raise FeatureError(f"'folder:{folder}': there is no model (it has no config.json)")
    network = _whole(f"folder:{folder}", folder).to(device)
    if hasattr(network, "get_text_features"):
        raise FeatureError(f"'folder:{folder}': it also reads texts: write clip:{folder}")
    processor = AutoImageProcessor.from_pretrained(folder)

    def extract(x: Tensor) -> Tensor:
        inputs = processor(images=list(to_levels(x).cpu()), return_tensors="pt").to(device)
        output = network(**inputs)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    return extract, (network, processor)
