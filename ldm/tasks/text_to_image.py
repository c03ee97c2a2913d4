"""Training of a latent text-to-image model, or of one of pixels, of classes, or unconditional.

    z = codec(x),   cond = text (or "" with probability ``text_dropout``),
    L = E [ w(level) |y(z, eps) - network(alpha z + sigma eps, timestep, cond)|^2 ]

(Rombach et al. 2022, eq. 3; Ho & Salimans 2022, algorithm 1). All that is random comes with the
batch (``ldm.encoding.encoder``): the task below only computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from ldm.config.schema import TrainConfig
from ldm.data.items import Item, Items, spread
from ldm.diffusion.times import LossSecondMoment
from ldm.encoding.encoder import Encoded
from ldm.engine.sampler_state import LossMemory, Memory
from ldm.evaluation import sheets
from ldm.evaluation.heldout import errors_by_level
from ldm.evaluation.report import flat
from ldm.families.adapt import learn, trained
from ldm.families.model import Parts
from ldm.formats import lora, textual_inversion
from ldm.models.denoiser import UNetDenoiser
from ldm.models.lora import collect, named
from ldm.pipeline import LatentDiffusionPipeline
from ldm.progress import Progress
from ldm.tasks.frozen import loaded, save_linked
from ldm.tasks.previews import Previews
from ldm.tasks.suites import Suites


class TextToImageTask(nn.Module):
    """A U-Net, and on request a text encoder, that learn; saved as a pipeline folder.

    With ``config.lora`` their adapters learn, and the folder is that of a LoRA; with
    ``config.textual_inversion`` a new word does, and the folder holds its embeddings.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        held_out: Items,
        encoded: Encoded,
        suites: Suites | None = None,
        previews: Previews | None = None,
    ) -> None:
        super().__init__()
        self.config, self.process, self.objective = config, parts.process, parts.objective
        self.parts, self.held_out, self.encoded = parts, held_out, encoded
        self.suites, self.previews = suites, previews
        times, self.memory = self.objective.times, Memory()
        if isinstance(times, LossSecondMoment):
            self.memory = LossMemory(times, self.process)
        self.denoiser = UNetDenoiser(parts.unet)
        # Only what learns is registered: DDP and the optimiser must not see the frozen rest.
        self.text_encoder = parts.text_encoder if "text_encoder" in config.learns else None
        learn(parts, config)
        if config.dropout is not None:
            for module in parts.unet.modules():
                if isinstance(module, ResnetBlock2D):
                    module.dropout.p = config.dropout
        self.origin = parts.origin

    def place(self, device: torch.device) -> None:
        """Brings to ``device`` what is in memory."""
        parts = self.parts
        for network in (parts.unet,) if parts.stored else parts.all().values():
            network.to(device)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, as ``unet.NAME`` and ``text_encoder.NAME``."""
        return trained(self.parts, self.config)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` (weighted), ``mse`` and, of a learned variance, ``bound`` per sample, ``b``."""
        terms = self.objective(
            self.process,
            self.denoiser,
            self.encoded.latent(batch),
            self.encoded.condition(batch, learns=self.text_encoder is not None),
            u=batch["u"],
            eps=batch["noise"],
        )
        if isinstance(self.memory, LossMemory):
            self.memory.add(batch["position"], batch["u"], terms.term)
        bound = {} if terms.bound is None else {"bound": terms.bound}
        return {"loss": terms.loss, "mse": terms.mse, **bound}

    def pipeline(self) -> LatentDiffusionPipeline:
        """A pipeline over the networks as they are."""
        return pipeline(self.parts)

    @torch.no_grad()
    def validate(
        self, accelerator: Accelerator, folder: Path | None, images: int
    ) -> dict[str, float]:
        """Held-out mean squared error per noise level, a sheet of previews, and the suites, also as
        a table beside the sheet.
        """
        validation = self.config.validation
        if validation is None:
            return {}
        measured = self._held_out_loss(accelerator) if validation.images and self.held_out else {}
        if not folder or not (self.previews or self.suites):
            return measured
        pipe = self.pipeline()
        if self.parts.stored:
            what = self.previews.key if self.previews else "validation.suites"
            pipe = loaded(pipe, self.parts.stored, what)
        page = self.previews.page(pipe, accelerator) if self.previews else None
        reports = self.suites.measure(pipe, accelerator) if self.suites else {}
        # Only once all have drawn: who cannot write would leave the others waiting.
        sheet = sheets.sheet_name(folder, images)
        if page and accelerator.is_main_process:
            sheets.save(page, sheet)
        if self.suites and accelerator.is_main_process:
            self.suites.write(reports, sheet.with_suffix(".md"))
        return measured | flat(reports)

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
        codec = self.encoded.codec
        with Progress("measuring held-out loss", "pictures", len(mine)) as progress:
            for numbers in _of_one_shape(chosen, mine, self.encoded.batch):
                items = [chosen[n] for n in numbers]
                moments, cond = self.encoded.evaluated(items)
                z = codec.sample(moments, torch.zeros_like(moments.mean))
                errors = errors_by_level(
                    self.objective, self.process, self.denoiser, z, cond,
                    levels=levels, seed=validation.seed, name="validation", numbers=numbers,
                )  # fmt: skip
                for k, error in enumerate(errors):
                    sums[k] += error.sum()
                    progress.advance(len(z) / levels)
                sums[-1] += len(z)
        sums = accelerator.reduce(sums, "sum")
        per_level = (sums[:-1] / sums[-1]).tolist()
        return {
            "held_out_loss": sum(per_level) / levels,
            **{f"held_out_loss/{(k + 0.5) / levels:.2f}": v for k, v in enumerate(per_level)},
        }

    def save(self, folder: Path) -> None:
        """A pipeline folder, or that of a LoRA or of a new word."""
        parts, word = self.parts, self.config.textual_inversion
        if self.config.lora:
            updates = {part: collect(getattr(parts, part)) for part in self.config.learns}
            lora.write(updates, folder, base=self.origin)
        elif word is not None:
            (rows,) = self.trained().values()
            textual_inversion.write(word.token, rows, folder, self.origin)
        else:
            save_pipeline(parts, folder)

    finish = save

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of what learns, as ``trained`` names them."""
        found: dict[str, Tensor] = {}
        learns = self.config.learns
        if self.config.textual_inversion is not None:
            (name,) = self.trained()
            return {name: textual_inversion.read(folder)[1]}
        if self.config.lora:
            for part, updates in lora.read(folder).items():
                found |= {f"{part}.{name}": value for name, value in named(updates).items()}
            return found
        if "unet" in learns:
            weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
            found |= {f"unet.{name}": value for name, value in weights.items()}
        if "text_encoder" in learns:
            text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
            found |= {f"text_encoder.{n}": v for n, v in text.named_parameters()}
        mine = self.trained()
        return {name: value for name, value in found.items() if name in mine}


def pipeline(parts: Parts) -> LatentDiffusionPipeline:
    """A pipeline over the networks of ``parts``."""
    stated = parts.scheduler_config()
    scheduler = getattr(diffusers, stated.pop("_class_name"))
    if parts.vae is not None:
        # What Stable Diffusion's folders say, and what diffusers asks for in a saved pipeline.
        stated |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    known = inspect.signature(scheduler.__init__).parameters
    scheduler = scheduler(**{key: value for key, value in stated.items() if key in known})
    return LatentDiffusionPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        parts.unet,
        scheduler,
        classes=parts.classes,
        sampling=parts.sampling,
    )


def save_pipeline(parts: Parts, folder: Path) -> None:
    """A pipeline folder of ``parts``, which have no adapters."""
    if parts.stored:
        save_linked(pipeline(parts), folder, parts.stored)
    else:
        pipeline(parts).save_pretrained(folder)


def _of_one_shape(items: Sequence[Item], numbers: list[int], size: int) -> Iterator[list[int]]:
    """``numbers`` in batches of up to ``size`` whose items have one shape."""
    for shape in sorted({items[n].shape for n in numbers}):
        alike = [n for n in numbers if items[n].shape == shape]
        for at in range(0, len(alike), size):
            yield alike[at : at + size]
