"""CLIP from numbers: a small text tower and a small picture tower that meet in one space.

    f(text) = W_t tower_t(ids)[end of text],   g(picture) = W_v tower_v(pixels)[class],

both scaled to length 1 (Radford et al. 2021, section 2.4). The text tower becomes the text encoder
of a pipeline; both together measure how well a picture fits a text. The networks are transformers'
own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ldm.diffusion import stream
from ldm.storage.tensors import write_tensors

_PREFIX = "text_model."
_PROJECTION = "text_projection.safetensors"
_MEETS = "text_encoder"


@dataclass(frozen=True)
class ClipSize:
    """The numbers that make a CLIP; the length and the vocabulary of its texts come from the
    tokenizer.

    Args:
        text_width: also the width of the tokens that a U-Net's cross-attention reads.
        text_layers: depth of the text tower.
        text_heads: attention heads of the text tower; divides ``text_width``.
        vision_width: width of the picture tower.
        vision_layers: depth of the picture tower.
        vision_heads: attention heads of the picture tower; divides ``vision_width``.
        patch: side of a patch in pixels; divides ``size``.
        size: side of the pictures in pixels.
        projection: dimensions of the common space.
    """

    text_width: int = 256
    text_layers: int = 4
    text_heads: int = 4
    vision_width: int = 256
    vision_layers: int = 4
    vision_heads: int = 4
    patch: int = 8
    size: int = 64
    projection: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for whole, part in (
            ("text_width", "text_heads"),
            ("vision_width", "vision_heads"),
            ("size", "patch"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole}={getattr(self, whole)} is no multiple of {part}={getattr(self, part)}"
                )

    def config(self, tokenizer: CLIPTokenizer) -> CLIPConfig:
        """Transformers' config of both towers for texts of ``tokenizer``."""
        text = {
            "hidden_size": self.text_width,
            "intermediate_size": 4 * self.text_width,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.text_heads,
            "max_position_embeddings": tokenizer.model_max_length,
            "vocab_size": len(tokenizer),
            "projection_dim": self.projection,
            # The tower pools at this id: transformers' default belongs to OpenAI's tokenizer.
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return CLIPConfig(
            text_config=text, vision_config=self._vision(), projection_dim=self.projection
        )

    def _vision(self) -> dict[str, Any]:
        return {
            "hidden_size": self.vision_width,
            "intermediate_size": 4 * self.vision_width,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "patch_size": self.patch,
            "image_size": self.size,
            "projection_dim": self.projection,
        }

    def build(self, tokenizer: CLIPTokenizer, seed: int) -> Clip:
        """A randomly initialised CLIP, float32, on the CPU; the global generator is left alone."""
        return Clip(_initialised(self.config(tokenizer), seed))

    def meeting(self, text_model: nn.Module, seed: int, channels: int = 3) -> Clip:
        """``text_model``, which does not learn any more, and randomly initialised a picture tower
        for ``channels`` and both projections, float32, on the CPU; the numbers of the text tower
        are its own.
        """
        config = CLIPConfig(
            text_config=text_model.config.to_dict() | {"projection_dim": self.projection},
            vision_config=self._vision() | {"num_channels": channels},
            projection_dim=self.projection,
        )
        model = _initialised(config, seed)
        model.text_model.load_state_dict(text_model.state_dict())
        model.text_model.requires_grad_(False)
        return Clip(model)

    def beside(self, known: Clip, channels: int, seed: int) -> Clip:
        """The text side of ``known``, which does not learn any more, and a randomly initialised
        picture tower for ``channels``, float32, on the CPU.
        """
        common = replace(self, projection=known.model.config.projection_dim)
        clip = common.meeting(known.model.text_model, seed, channels)
        clip.model.text_projection.load_state_dict(known.model.text_projection.state_dict())
        clip.model.text_projection.requires_grad_(False)
        clip.model.logit_scale.data.copy_(known.model.logit_scale)
        return clip


class Clip(nn.Module):
    """Two towers. Pixels are ``b 3 h w`` in [-1, 1] throughout, as everywhere in this library; the
    picture tower may see latents ``b c h w`` instead.
    """

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def text_features(self, ids: Tensor) -> Tensor:
        """Unit vectors ``b p`` of token ids ``b l``."""
        return normalize(self.model.get_text_features(ids).pooler_output, dim=-1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors ``b p`` of ``pixels``; their side has to be the tower's (``ValueError``)."""
        return normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``image_features b p``, ``text_features b p`` and the scale ``()``: what open_clip's loss
        takes.
        """
        return self.image_features(pixels), self.text_features(ids), self.model.logit_scale.exp()

    def save_text(self, folder: str | Path) -> None:
        """Writes the text tower as a ``CLIPTextModel`` folder (its projection goes with the picture
        tower).
        """
        save_text_encoder(self.model.text_model, folder)

    def save_vision(self, folder: str | Path) -> None:
        """Writes the picture tower as a ``CLIPVisionModelWithProjection`` folder, for evaluation.

        Beside it ``text_projection.safetensors`` (the text's projection, the logarithm of the scale
        and which text tower they belong to) and a ``preprocessor_config.json`` that maps 8-bit
        pictures to [-1, 1].
        """
        folder = Path(folder)
        with torch.random.fork_rng(devices=[]):  # saving must not move a random number of the run
            tower = CLIPVisionModelWithProjection(self.model.config.vision_config)
        tower.vision_model.load_state_dict(self.model.vision_model.state_dict())
        tower.visual_projection.load_state_dict(self.model.visual_projection.state_dict())
        tower.to(self.model.dtype).save_pretrained(folder)
        extra = {
            "text_projection.weight": self.model.text_projection.weight,
            "logit_scale": self.model.logit_scale,
        }
        met = {_MEETS: fingerprint(self.model.text_model)}
        write_tensors(extra, folder / _PROJECTION, met)
        vision = self.model.config.vision_config
        if vision.num_channels != 3:
            return  # of latents no picture's preprocessing
        side = vision.image_size
        CLIPImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(folder)

    @staticmethod
    def load(text_folder: str | Path, vision_folder: str | Path) -> Clip:
        """The CLIP that ``save_text`` and ``save_vision`` wrote, in evaluation mode, float32 on the
        CPU.

        Raises:
            ValueError: the picture tower learnt to meet another text tower than that in
                ``text_folder``, which has learnt on since then, for instance.
        """
        text = CLIPTextModel.from_pretrained(text_folder, dtype=torch.float32)
        vision = CLIPVisionModelWithProjection.from_pretrained(vision_folder, dtype=torch.float32)
        config = CLIPConfig(
            text_config=text.config.to_dict(),
            vision_config=vision.config.to_dict(),
            projection_dim=vision.config.projection_dim,
        )
        with torch.random.fork_rng(devices=[]):
            model = CLIPModel(config)
        model.text_model.load_state_dict(text.state_dict())
        model.vision_model.load_state_dict(vision.vision_model.state_dict())
        model.visual_projection.load_state_dict(vision.visual_projection.state_dict())
        with safe_open(Path(vision_folder) / _PROJECTION, "pt") as file:
            met = (file.metadata() or {}).get(_MEETS)  # older ones do not tell
        if met not in (None, fingerprint(model.text_model)):
            raise ValueError(
                f"{vision_folder} belongs to another text encoder than {text_folder} (or to one of"
                " other precision than float32 and float16): remove it, or train a picture tower"
                " that meets the encoder, train_clip.py with text=FOLDER"
            )
        extra = load_file(Path(vision_folder) / _PROJECTION)
        model.text_projection.load_state_dict({"weight": extra["text_projection.weight"]})
        model.logit_scale.data.copy_(extra["logit_scale"])
        return Clip(model).eval()


def _initialised(config: CLIPConfig, seed: int) -> CLIPModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(stream(seed, "init clip").integers(2**32)))
        return CLIPModel(config)


def is_beside(folder: str | Path) -> bool:
    """Whether ``folder``, of a pipeline, holds a picture tower as ``save_vision`` writes it."""
    return (Path(folder) / "image_encoder" / _PROJECTION).is_file()


def fingerprint(text_model: nn.Module) -> str:
    """Of a text tower's weights in float16, which is the same before and after an export."""
    told = hashlib.sha256()
    for name, value in sorted(text_model.state_dict().items()):
        told.update(name.removeprefix(_PREFIX).encode())
        told.update(value.detach().cpu().half().contiguous().numpy().tobytes())
    return told.hexdigest()[:32]


def save_text_encoder(text_encoder: CLIPTextModel, folder: str | Path) -> None:
    """Writes ``text_encoder`` as a folder with the keys ``text_model.*``.

    Transformers 5.6 and later writes them bare when the tower was made from scratch, which older
    readers, A1111 and ComfyUI do not find; transformers itself reads both.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        _PREFIX + name.removeprefix(_PREFIX): value
        for name, value in text_encoder.state_dict().items()
    }
    write_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    config = text_encoder.config.to_diff_dict()
    config["architectures"] = ["CLIPTextModel"]
    # Transformers loads in this dtype unless told otherwise: a half-precision one would meet a
    # float32 U-Net.
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
