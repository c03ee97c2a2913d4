"""CLIP: a small text tower and a small picture tower that meet in one space.

    f(text) = W_t tower_t(ids)[end of text],   g(picture) = W_v tower_v(pixels)[class],

both scaled to length 1 (Radford et al. 2021, section 2.4). The text tower becomes the text encoder
of a pipeline; both together measure how well a picture fits a text. The networks are transformers'
own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from ldm.diffusion import stream
from ldm.storage.tensors import write_tensors

_PREFIX = "text_model."
_PROJECTION = "text_projection.safetensors"
_MEETS = "text_encoder"


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

    def text_with_projection(self) -> CLIPTextModelWithProjection:
        """The text tower with its projection, a copy in float32."""
        shape = CLIPTextConfig.from_dict(self.model.config.text_config.to_dict())
        shape.projection_dim = self.model.config.projection_dim
        with torch.random.fork_rng(devices=[]):
            tower = CLIPTextModelWithProjection(shape)
        tower.text_model.load_state_dict(self.model.text_model.state_dict())
        tower.text_projection.load_state_dict(self.model.text_projection.state_dict())
        return tower.eval()

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


def initialised(config: CLIPConfig, seed: int) -> CLIPModel:
    """Random init from a seed of its own; the global generator comes back unmoved."""
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


def save_text_encoder(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection | T5EncoderModel, folder: str | Path
) -> None:
    """Writes ``text_encoder`` as a folder, that of a CLIP with the keys ``text_model.*``.

    Transformers 5.6 and later writes them bare when the tower was made from scratch, which older
    readers, A1111 and ComfyUI do not find; transformers itself reads both.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(text_encoder, T5EncoderModel):
        text_encoder.save_pretrained(folder)
    else:
        weights = {}
        for name, value in text_encoder.state_dict().items():
            beside = name.startswith("text_projection")
            weights[name if beside else _PREFIX + name.removeprefix(_PREFIX)] = value
        write_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    config = text_encoder.config.to_diff_dict()
    config["architectures"] = [type(text_encoder).__name__]
    # Transformers loads in this dtype unless told otherwise: a half-precision one would meet a
    # float32 U-Net.
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
