"""The numbers that make a CLIP. They are their own config, which is read before torch and
transformers are imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import CLIPConfig, CLIPTokenizer

    from ldm.models.clip import Clip

_MOST = 2**16


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
        position_std: standard deviation of the position embeddings of the picture tower at random
            init: 0.02 in transformers, ``vision_width ** -0.5`` in OpenAI's CLIP.
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
    position_std: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.position_std <= 1:
            raise ValueError(f"position_std={self.position_std} must lie in (0, 1]")
        for name, value in vars(self).items():
            if name != "position_std" and not 1 <= value <= _MOST:
                raise ValueError(f"{name}={value} must lie in 1..{_MOST}")
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
        from transformers import CLIPConfig

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
        return self._initialised(self.config(tokenizer), seed)

    def _initialised(self, config: CLIPConfig, seed: int) -> Clip:
        from ldm.models.clip import Clip, initialised

        model = initialised(config, seed)
        positions = model.vision_model.embeddings.position_embedding.weight
        positions.data *= self.position_std / config.vision_config.initializer_range
        return Clip(model)

    def meeting(self, text_model: nn.Module, seed: int, channels: int = 3) -> Clip:
        """``text_model``, which does not learn any more, and randomly initialised a picture tower
        for ``channels`` and both projections, float32, on the CPU; the numbers of the text tower
        are its own.
        """
        from transformers import CLIPConfig

        config = CLIPConfig(
            text_config=text_model.config.to_dict() | {"projection_dim": self.projection},
            vision_config=self._vision() | {"num_channels": channels},
            projection_dim=self.projection,
        )
        clip = self._initialised(config, seed)
        clip.model.text_model.load_state_dict(text_model.state_dict())
        clip.model.text_model.requires_grad_(False)
        return clip

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
