"""Contrastive training of a small CLIP on pictures and their captions.

    L = (CE(s F_i F_t^T) + CE(s F_t F_i^T)) / 2,   F unit features, s the learned scale

(Radford et al. 2021, figure 3), with open_clip's loss over the global batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from open_clip import ClipLoss
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from ldm.data.collection import Collection, Item, Items, spread
from ldm.data.images import to_pixels
from ldm.diffusion import stream
from ldm.engine.memory import Memory
from ldm.engine.schema import ClipConfig
from ldm.evaluation.retrieval import ranks
from ldm.models.clip import Clip
from ldm.models.conditioner import ClipConditioner
from ldm.models.tokenizer import save_tokenizer


class CaptionedDraws(Dataset[dict[str, Any]]):
    """Item n: the n-th picture of the run with a drawn caption.

    Args:
        collection: its training pictures.
        config: transform with augmentation drawn per image, batch, seed.
        conditioner: tokenizes.
    """

    def __init__(
        self, collection: Collection, config: ClipConfig, conditioner: ClipConditioner
    ) -> None:
        self.plan = collection.plan(config.batch_size, config.seed, config.order.window)
        self.transform, self.seed = config.images, config.seed
        self.conditioner = conditioner

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.plan[position]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``pixels`` 3 h w in [-1, 1], ``ids`` l, ``position``."""
        item = self.item(position)
        caption = item.caption(stream(self.seed, "caption", position))
        view = self.transform.view(stream(self.seed, "transform", position))
        picture = self.transform(item.load(), view)
        return {
            "position": position,
            "pixels": to_pixels(picture),
            "ids": self.conditioner.tokenize([caption])[0],
        }


class ContrastiveTask(nn.Module):
    """A CLIP that learns; saved as ``text_encoder``, ``tokenizer`` and ``image_encoder``."""

    def __init__(
        self,
        config: ClipConfig,
        clip: Clip,
        tokenizer: CLIPTokenizer,
        held_out: Items,
        accelerator: Accelerator,
    ) -> None:
        super().__init__()
        self.origin: dict[str, str] = {}
        self.memory = Memory()
        self.config, self.clip, self.tokenizer, self.held_out = config, clip, tokenizer, held_out
        self.conditioner = ClipConditioner(tokenizer, clip.model.text_model)
        self.contrast = ClipLoss(
            gather_with_grad=True,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of both towers and the scale."""
        return dict(self.clip.named_parameters())

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` of the global batch, the same for every sample, ``b``."""
        images, texts, scale = self.clip(batch["pixels"], batch["ids"])
        # The scale is capped at 100, as in the paper.
        with torch.autocast(images.device.type, enabled=False):
            loss = self.contrast(images.float(), texts.float(), scale.float().clamp(max=100))
        return {"loss": loss.expand(len(images))}

    @torch.no_grad()
    def validate(
        self, accelerator: Accelerator, folder: Path | None, images: int
    ) -> dict[str, float]:
        """Share of held-out first captions whose nearest held-out picture is their own."""
        validation = self.config.validation
        if validation is None or not validation.images or not self.held_out:
            return {}
        chosen = spread(self.held_out, validation.images)
        pixels = torch.stack([to_pixels(self.config.images(i.load())) for i in chosen])
        ids = self.conditioner.tokenize([i.caption(None) for i in chosen])
        device = accelerator.device
        pictures = torch.cat([self.clip.image_features(x.to(device)) for x in pixels.split(64)])
        texts = torch.cat([self.clip.text_features(x.to(device)) for x in ids.split(64)])
        rank = ranks(texts, pictures, torch.arange(len(chosen), device=device))
        return {
            "held_out_top1": float((rank < 1).double().mean()),
            "held_out_top5": float((rank < 5).double().mean()),
        }

    def save(self, folder: Path) -> None:
        """The two towers and the tokenizer, each as transformers reads it."""
        self.clip.save_text(folder / "text_encoder")
        self.clip.save_vision(folder / "image_encoder")
        save_tokenizer(self.tokenizer, folder / "tokenizer")

    finish = save

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of both towers."""
        clip = Clip.load(folder / "text_encoder", folder / "image_encoder")
        return dict(clip.named_parameters())
