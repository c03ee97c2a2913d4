"""Training of a latent text-to-image model.

    z = codec(x),   cond = text (or "" with probability ``text_dropout``),
    L = E [ w(level) |y(z, eps) - network(alpha z + sigma eps, timestep, cond)|^2 ]

(Rombach et al. 2022, eq. 3; Ho & Salimans 2022, algorithm 1). Item n of ``LatentDraws`` holds all
that is random about the n-th image of the run; the task below only computes.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPTextModel

from ldm.data.cache import TensorCache, fingerprint
from ldm.data.collection import Item, spread
from ldm.data.images import to_pixels
from ldm.data.order import Order
from ldm.data.source import cache_root
from ldm.diffusion import Condition, normal, stratified, stream
from ldm.engine import pictures
from ldm.engine.parts import Parts
from ldm.engine.schema import TrainConfig
from ldm.models.codec import Codec, Moments
from ldm.models.conditioner import ClipConditioner
from ldm.models.denoiser import UNetDenoiser
from ldm.pipeline import LatentDiffusionPipeline


@lru_cache(maxsize=8)
def _times(seed: int, batch: int, size: int) -> np.ndarray:
    return stratified(seed, "time", batch, size)


class Encoded:
    """Pictures and captions through the frozen networks, from a cache or straight.

    Args:
        config: whether to cache, and the image transform.
        codec: the frozen autoencoder.
        conditioner: the text encoder, frozen or not.
        device: where the networks are.
    """

    def __init__(
        self, config: TrainConfig, codec: Codec, conditioner: ClipConditioner, device: torch.device
    ) -> None:
        self.transform, self.codec, self.conditioner = config.images, codec, conditioner
        self.device = device
        self.batch = config.micro_batch_size or min(config.batch_size, 64)
        self.latents: TensorCache | None = None
        self.text: TensorCache | None = None
        self.latents_cached = config.cache_latents and config.images.deterministic
        self.text_cached = config.cache_text and "text_encoder" not in config.train

    def prepare(self, items: list[Item], captions: list[str]) -> None:
        """Fills the caches with what a run over ``items`` and ``captions`` will ask for."""
        if self.latents_cached:
            wanted = [(i, v) for i in items for v in range(self.transform.variants)]
            still = replace(self.transform, flip=False)  # a flip is a second entry, not a space
            space = fingerprint("latents", still, self.codec.vae, "float32")
            self.latents = TensorCache(cache_root() / "latents", space)
            self.latents.build(
                [_latent_key(i, v) for i, v in wanted],
                lambda rows: self._moments([wanted[r] for r in rows]),
                what="latents",
                batch=self.batch,
            )
        if self.text_cached:
            tokenizer = self.conditioner.tokenizer
            vocabulary = sorted(tokenizer.get_vocab().items())
            space = fingerprint(
                "text",
                vocabulary,
                self.conditioner.length,
                self.conditioner.text_encoder,
                "float32",
            )
            self.text = TensorCache(cache_root() / "text", space)
            self.text.build(
                [_text_key(c) for c in captions],
                lambda rows: self._texts([captions[r] for r in rows]),
                what="captions",
                batch=self.batch,
            )

    @torch.no_grad()
    def _moments(self, wanted: list[tuple[Item, int]]) -> dict[str, Tensor]:
        x = torch.stack([to_pixels(self.transform.apply(i.load(), v)) for i, v in wanted])
        return self.codec.encode(x.to(self.device))._asdict()

    @torch.no_grad()
    def _texts(self, captions: list[str]) -> dict[str, Tensor]:
        cond = self.conditioner.encode(captions)
        assert cond.mask is not None and cond.pooled is not None
        return {"tokens": cond.tokens, "mask": cond.mask, "pooled": cond.pooled}

    def picture(self, item: Item, variant: int, draw: np.random.Generator) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` of the latent, or ``pixels`` where latents are not cached."""
        if self.latents is not None:
            return self.latents[_latent_key(item, variant)]
        if self.transform.deterministic:
            return {"pixels": to_pixels(self.transform.apply(item.load(), variant))}
        return {"pixels": to_pixels(self.transform(item.load(), draw))}

    def caption(self, text: str) -> dict[str, Tensor]:
        """``tokens``, ``mask`` and ``pooled``, or ``ids`` where text is not cached."""
        if self.text is not None:
            return self.text[_text_key(text)]
        return {"ids": self.conditioner.tokenize([text])[0]}


def _latent_key(item: Item, variant: int) -> str:
    return f"{item.digest()}/{variant}"


def _text_key(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


class LatentDraws(Dataset[dict[str, Any]]):
    """Item n: the n-th image of the run with its caption, dropout, posterior, noise and time."""

    def __init__(self, config: TrainConfig, items: list[Item], encoded: Encoded) -> None:
        self.config, self.items, self.encoded = config, items, encoded
        self.order = Order(len(items), config.seed)
        side = config.images.size // encoded.codec.factor
        self.latent_shape = (encoded.codec.channels, side, side)

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.items[self.order[position]]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Tensors without a batch axis; every draw depends on (seed, position) alone."""
        seed, batch = self.config.seed, self.config.batch_size
        item = self.item(position)
        variant = int(stream(seed, "flip", position).integers(self.config.images.variants))
        caption = item.caption(stream(seed, "caption", position))
        if stream(seed, "text dropout", position).random() < self.config.text_dropout:
            caption = ""
        return {
            "position": position,
            **self.encoded.picture(item, variant, stream(seed, "transform", position)),
            **self.encoded.caption(caption),
            "posterior": normal(seed, "posterior", position, self.latent_shape),
            "noise": normal(seed, "noise", position, self.latent_shape),
            "u": _times(seed, position // batch, batch)[position % batch],
        }


class TextToImageTask(nn.Module):
    """A U-Net, and on request a text encoder, that learn; saved as a pipeline folder."""

    def __init__(
        self, config: TrainConfig, parts: Parts, held_out: list[Item], encoded: Encoded
    ) -> None:
        super().__init__()
        self.config, self.process, self.objective = config, parts.process, parts.objective
        self.parts, self.held_out, self.encoded = parts, held_out, encoded
        self.denoiser = UNetDenoiser(parts.unet)
        # Only what learns is registered: DDP and the optimiser must not see the frozen rest.
        self.text_encoder = parts.text_encoder if "text_encoder" in config.train else None
        for name, part in (("unet", parts.unet), ("text_encoder", parts.text_encoder)):
            part.requires_grad_(name in config.train)
        parts.vae.requires_grad_(False).eval()

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of the parts that learn, as ``unet.NAME`` and ``text_encoder.NAME``."""
        return {
            f"{part}.{name}": parameter
            for part in self.config.train
            for name, parameter in getattr(self.parts, part).named_parameters()
        }

    def _latent(self, batch: dict[str, Tensor]) -> Tensor:
        if "mean" in batch:
            moments = Moments(batch["mean"], batch["logvar"])
        else:
            # Frozen networks run in float32 also where autocast is on: cached or not, same latents.
            with torch.no_grad(), torch.autocast(batch["pixels"].device.type, enabled=False):
                moments = self.encoded.codec.encode(batch["pixels"])
        return self.encoded.codec.sample(moments, batch["posterior"])

    def _condition(self, batch: dict[str, Tensor]) -> Condition:
        if "tokens" in batch:
            return Condition(batch["tokens"], batch["mask"], batch["pooled"])
        if self.text_encoder is not None:
            return self.encoded.conditioner.encode_ids(batch["ids"])
        with torch.no_grad(), torch.autocast(batch["ids"].device.type, enabled=False):
            return self.encoded.conditioner.encode_ids(batch["ids"])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` (weighted) and ``mse`` per sample, ``b``."""
        terms = self.objective(
            self.process,
            self.denoiser,
            self._latent(batch),
            self._condition(batch),
            u=batch["u"],
            eps=batch["noise"],
        )
        return {"loss": terms.loss, "mse": terms.mse}

    def pipeline(self) -> LatentDiffusionPipeline:
        """A pipeline over the networks as they are."""
        scheduler = DDIMScheduler(
            **self.process.scheduler_config(self.objective.target),
            # What Stable Diffusion's folders say, and what diffusers asks for in a saved pipeline.
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        parts = self.parts
        return LatentDiffusionPipeline(
            parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, scheduler
        )

    @torch.no_grad()
    def validate(self, accelerator: Accelerator, folder: Path, images: int) -> dict[str, float]:
        """Held-out mean squared error per noise level, and a sheet of the validation prompts."""
        validation = self.config.validation
        if validation is None:
            return {}
        measured = self._held_out_loss(accelerator) if validation.images and self.held_out else {}
        if validation.prompts and accelerator.is_main_process:
            pipe = self.pipeline()
            pipe.set_progress_bar_config(disable=True)
            drawn = pipe(
                list(validation.prompts),
                num_inference_steps=validation.steps,
                guidance_scale=validation.guidance,
                sampler=validation.sampler,
                seed=validation.seed,
                height=self.config.images.size,
                width=self.config.images.size,
            ).images
            page = pictures.sheet([[i] for i in drawn], validation.prompts, columns=8)
            pictures.save(page, folder / f"images-{images:012d}.png")
        return measured

    def _held_out_loss(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean squared error in target space; every held-out picture meets the same noise at every
        level and at every validation.
        """
        validation = self.config.validation
        assert validation is not None
        chosen = spread(self.held_out, validation.images)
        mine = list(range(len(chosen)))[accelerator.process_index :: accelerator.num_processes]
        levels, device = validation.levels, accelerator.device
        sums = torch.zeros(levels + 1, dtype=torch.float64, device=device)
        seed, codec = validation.seed, self.encoded.codec
        for at in range(0, len(mine), self.encoded.batch):
            numbers = mine[at : at + self.encoded.batch]
            items = [chosen[n] for n in numbers]
            x = torch.stack([to_pixels(self.config.images(i.load(), None)) for i in items])
            moments = codec.encode(x.to(device))
            z = codec.sample(moments, torch.zeros_like(moments.mean))
            cond = self.encoded.conditioner.encode([i.caption(None) for i in items])
            shape = tuple(z.shape[1:])
            for k in range(levels):
                eps = [normal(seed, f"validation {k}", n, shape) for n in numbers]
                terms = self.objective(
                    self.process,
                    self.denoiser,
                    z,
                    cond,
                    u=torch.full((len(z),), (k + 0.5) / levels, dtype=torch.float64, device=device),
                    eps=torch.stack(eps).to(device),
                )
                sums[k] += terms.mse.double().sum()
            sums[-1] += len(z)
        sums = accelerator.reduce(sums, "sum")
        per_level = (sums[:-1] / sums[-1]).tolist()
        return {
            "held_out_loss": sum(per_level) / levels,
            **{f"held_out_loss/{(k + 0.5) / levels:.2f}": v for k, v in enumerate(per_level)},
        }

    def save(self, folder: Path) -> None:
        """A pipeline folder."""
        self.pipeline().save_pretrained(folder)

    finish = save

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of the parts that learn, as ``trained`` names them."""
        found = {}
        if "unet" in self.config.train:
            weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
            found |= {f"unet.{name}": value for name, value in weights.items()}
        if "text_encoder" in self.config.train:
            text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
            found |= {f"text_encoder.{n}": v for n, v in text.named_parameters()}
        return found
