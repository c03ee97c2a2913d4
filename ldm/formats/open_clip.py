"""open_clip's text towers as transformers' ``CLIPTextModel``, and its tokenizer as
``CLIPTokenizer``.

    resblocks.N.attn.in_proj_weight = [q_proj; k_proj; v_proj],   mlp.c_fc = fc1,   mlp.c_proj = fc2

A folder holds ``open_clip_config.json`` and ``open_clip_model.safetensors`` or
``open_clip_pytorch_model.bin``, as on the Hub. What becomes of the tower's last tokens
(``text_projection``) is no part of a text encoder and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.models.tokenizer import END, START

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Settings of a tower that computes what CLIPTextModel computes; what pools and projects its tokens
# is not asked for.
_KNOWN = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs",
    "norm_kwargs", "tokenizer_kwargs", "pad_id", "eos_id", "pool_type", "proj_bias", "proj_type",
    "output_tokens", "final_ln_after_pool", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(\w+(?:\.\w+)?)\.(weight|bias)")
MODULES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def is_one(path: str | Path) -> bool:
    """Whether ``path`` is meant as open_clip's: a folder with its config, or a file of weights."""
    return (Path(path) / CONFIG).is_file() or Path(path).is_file()


class Tower:
    """A text tower of open_clip.

    Args:
        path: its folder, or the file of weights in it; the config lies beside the weights.

    Raises:
        ValueError: there is no config, or one of a tower that is no ``CLIPTextModel``.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.folder = path.parent if path.is_file() else path
        self.file = path if path.is_file() else None
        file = self.folder / CONFIG
        try:
            model = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
            text: dict[str, Any] = dict(model["text_cfg"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = "it is not there" if isinstance(error, OSError) else repr(error)
            raise ValueError(f"{file} cannot be read as a config of open_clip: {reason}") from None
        other = sorted(key for key, value in text.items() if value and key not in _KNOWN)
        if other:
            raise ValueError(
                f"{file}: a tower with {other[0]} {text[other[0]]!r} is no CLIPTextModel: choose"
                " one of open_clip's plain text towers"
            )
        self.settings = text
        self.config = self._config(file, text, bool(model.get("quick_gelu")))

    @staticmethod
    def _config(file: Path, text: Mapping[str, Any], quick: bool) -> CLIPTextConfig:
        arguments = text.get("act_kwargs") or {}
        exact, tanh = {"approximate": "none"}, {"approximate": "tanh"}
        if arguments not in ({}, exact, tanh) or (quick and arguments):
            raise ValueError(f"{file}: act_kwargs {arguments} are not known")
        activation = "quick_gelu" if quick else "gelu"
        norm = text.get("norm_kwargs") or {}
        if set(norm) - {"eps"}:
            raise ValueError(f"{file}: norm_kwargs {norm} are not known")
        width, size = text.get("width", 512), text.get("vocab_size", 49408)
        return CLIPTextConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
            num_hidden_layers=text.get("layers", 12),
            num_attention_heads=text.get("heads", 8),
            max_position_embeddings=text.get("context_length", 77),
            hidden_act="gelu_pytorch_tanh" if arguments == tanh else activation,
            layer_norm_eps=norm.get("eps", 1e-5),
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=0,
        )

    def shape(self) -> CLIPTextModel:
        """The tower without its weights."""
        return CLIPTextModel(self.config)

    def text_encoder(self) -> CLIPTextModel:
        """The tower, float32; the global generator is left alone.

        Raises:
            ValueError: the weights cannot be read, or are not those of the config.
        """
        file = self._weights()
        found = convert(_load(file))
        with torch.device("meta"):
            tower = self.shape()
        expected = {name: value.shape for name, value in tower.state_dict().items()}
        for name in sorted(expected.keys() ^ found.keys()):
            verb = "lacks" if name in expected else "has, beyond its config,"
            raise ValueError(f"{file} {verb} {name}: it is not of this {CONFIG}")
        for name, value in found.items():
            if value.shape != expected[name]:
                raise ValueError(
                    f"{file}: {name} is {tuple(value.shape)}, and by {CONFIG}"
                    f" {tuple(expected[name])}"
                )
        tower.load_state_dict(found, assign=True)
        # Made of nothing on the meta device, and in no file.
        tower.embeddings.position_ids = torch.arange(len(found[_POSITIONS])).expand((1, -1))
        return tower.eval()

    def _weights(self) -> Path:
        if self.file is not None:
            return self.file
        for name in WEIGHTS:
            if (self.folder / name).is_file():
                return self.folder / name
        raise ValueError(f"{self.folder} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}")

    def tokenizer(self) -> CLIPTokenizer:
        """Its tokenizer, which pads with 0 ("!") as open_clip does.

        Only what open_clip repairs first is not repaired: HTML entities and broken encodings.

        Raises:
            ValueError: it is another kind of tokenizer, or open_clip is not installed.
        """
        try:
            from open_clip.tokenizer import SimpleTokenizer
        except ImportError:
            raise ValueError(
                "open_clip's tokenizer comes with its package, which is missing:"
                " pip install open_clip_torch"
            ) from None
        if unknown := self.settings.get("tokenizer_kwargs"):
            raise ValueError(f"tokenizer_kwargs {unknown} are not known")
        theirs = SimpleTokenizer()
        vocab = dict(theirs.encoder)
        for here, there in ((START, theirs.sot_token_id), (END, theirs.eot_token_id)):
            vocab = {here if i == there else token: i for token, i in vocab.items()}
        return CLIPTokenizer(
            vocab=vocab,
            merges=list(theirs.bpe_ranks),
            pad_token="!",
            # Else every "!" of a text would be one of padding.
            split_special_tokens=True,
            model_max_length=self.config.max_position_embeddings,
        )


_POSITIONS = NAMES["positional_embedding"]


def _load(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)  # never runs what it reads
    except (OSError, SafetensorError, RuntimeError, UnpicklingError, ValueError, EOFError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read as weights: {line}") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else None
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file} holds no state dict")
    return found


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower in a state dict of open_clip's ``CLIP`` or ``CustomTextCLIP``, under the names
    of ``CLIPTextModel``, float32.

    Raises:
        ValueError: a tensor of the tower has no place there.
    """
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    if any(name.startswith("text.") for name in weights):  # CustomTextCLIP: a tower of its own
        weights = {n.removeprefix("text."): v for n, v in weights.items() if n.startswith("text.")}
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.startswith(("visual.", "text_projection")) or name in (
            "logit_scale",
            "logit_bias",
            "attn_mask",
        ):
            continue
        value = value.float()
        if name in NAMES:
            found[NAMES[name]] = value
        elif fused := _FUSED.fullmatch(name):
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                stem = f"encoder.layers.{fused[1]}.self_attn.{projection}_proj"
                found[f"{stem}.{fused[2]}"] = part.contiguous()
        elif (match := _LAYER.fullmatch(name)) and match[2] in MODULES:
            found[f"encoder.layers.{match[1]}.{MODULES[match[2]]}.{match[3]}"] = value
        else:
            raise ValueError(f"{name} is no tensor of a CLIP text tower")
    return found
