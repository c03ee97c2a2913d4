"""Training of a latent text-to-image model.

    z = codec(x),   cond = text (or "" with probability ``text_dropout``),
    L = E [ w(level) |y(z, eps) - network(alpha z + sigma eps, timestep, cond)|^2 ]

(Rombach et al. 2022, eq. 3; Ho & Salimans 2022, algorithm 1). All that is random comes with the
batch (``ldm.engine.encoded``): the task below only computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from ldm.data.collection import Item, Items, spread
from ldm.data.images import View, to_pixels
from ldm.diffusion import normal
from ldm.engine import pictures
from ldm.engine.encoded import Encoded
from ldm.engine.parts import Parts
from ldm.engine.schema import TrainConfig
from ldm.interop import lora
from ldm.models.denoiser import UNetDenoiser
from ldm.models.lora import collect, named, weights
from ldm.pipeline import LatentDiffusionPipeline


class TextToImageTask(nn.Module):
    """A U-Net, and on request a text encoder, that learn; saved as a pipeline folder.

    With ``config.lora`` their adapters learn, and the folder is that of a LoRA.
    """

    def __init__(
        self, config: TrainConfig, parts: Parts, held_out: Items, encoded: Encoded
    ) -> None:
        super().__init__()
        self.config, self.process, self.objective = config, parts.process, parts.objective
        self.parts, self.held_out, self.encoded = parts, held_out, encoded
        self.denoiser = UNetDenoiser(parts.unet)
        # Only what learns is registered: DDP and the optimiser must not see the frozen rest.
        self.text_encoder = parts.text_encoder if "text_encoder" in config.train else None
        for name, part in (("unet", parts.unet), ("text_encoder", parts.text_encoder)):
            part.requires_grad_(name in config.train and config.lora is None)
        for learning in self.trained().values():
            learning.requires_grad_(True)
        parts.vae.requires_grad_(False).eval()

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of the parts that learn, or of their adapters, as ``unet.NAME`` and
        ``text_encoder.NAME``.
        """
        found = {}
        for part in self.config.train:
            network: nn.Module = getattr(self.parts, part)
            mine = weights(network) if self.config.lora else dict(network.named_parameters())
            found |= {f"{part}.{name}": parameter for name, parameter in mine.items()}
        return found

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` (weighted) and ``mse`` per sample, ``b``."""
        terms = self.objective(
            self.process,
            self.denoiser,
            self.encoded.latent(batch),
            self.encoded.condition(batch, learns=self.text_encoder is not None),
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
            pictures.save(page, pictures.sheet_name(folder, images))
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
        for numbers in _of_one_shape(chosen, mine, self.encoded.batch):
            items = [chosen[n] for n in numbers]
            transform = self.config.images
            x = torch.stack([to_pixels(transform(i.load(), View(), i.shape)) for i in items])
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
        """A pipeline folder, or that of a LoRA."""
        if self.config.lora:
            lora.write(
                {part: collect(getattr(self.parts, part)) for part in self.config.train}, folder
            )
        else:
            self.pipeline().save_pretrained(folder)

    finish = save

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of what learns, as ``trained`` names them."""
        found = {}
        if self.config.lora:
            for part, updates in lora.read(folder).items():
                found |= {f"{part}.{name}": value for name, value in named(updates).items()}
            return found
        if "unet" in self.config.train:
            weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
            found |= {f"unet.{name}": value for name, value in weights.items()}
        if "text_encoder" in self.config.train:
            text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
            found |= {f"text_encoder.{n}": v for n, v in text.named_parameters()}
        return found


def _of_one_shape(items: Sequence[Item], numbers: list[int], size: int) -> Iterator[list[int]]:
    """``numbers`` in batches of up to ``size`` whose items have one shape."""
    for shape in sorted({items[n].shape for n in numbers}):
        alike = [n for n in numbers if items[n].shape == shape]
        for at in range(0, len(alike), size):
            yield alike[at : at + size]
