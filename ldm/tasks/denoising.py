"""The denoiser of a latent text-to-image model, or of one of pixels, of classes, or unconditional,
as what learns.

    z = codec(x),   cond = text (or "" with probability ``text_dropout``),
    L = E [ w(level) |y(z, eps) - network(alpha z + sigma eps, timestep, cond)|^2 ]

(Rombach et al. 2022, eq. 3; Ho & Salimans 2022, algorithm 1). All that is random comes with the
batch (``ldm.encoding.encoder``): the task below only computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ldm.config.learning import CONTROLNET
from ldm.config.schema import TrainConfig
from ldm.data.items import Item, Items, evenly_spaced
from ldm.diffusion.times import LossSecondMoment
from ldm.encoding.encoder import Encoder
from ldm.engine.ema import Averages
from ldm.engine.sampler_state import LossMemory, Memory
from ldm.evaluation import sheets
from ldm.evaluation.heldout import errors_by_level
from ldm.evaluation.report import flat
from ldm.families import reads
from ldm.families.adapt import learn, trained
from ldm.families.model import Model
from ldm.families.noise import process_and_objective
from ldm.formats import lora, lora_names, textual_inversion
from ldm.models.compiled import eager
from ldm.models.lora import collect, named
from ldm.models.on_host import on_host
from ldm.models.strip_paths import strip_paths
from ldm.models.wrapped import bare
from ldm.pipeline import LatentDiffusionPipeline
from ldm.progress import Progress
from ldm.storage.tensors import read_network
from ldm.tasks.distilling import of_a_teacher
from ldm.tasks.frozen import save_linked
from ldm.tasks.previews import Previews
from ldm.tasks.resting import Resting
from ldm.tasks.suites import Suites


class DenoisingTask(nn.Module):
    """A U-Net, and on request a text encoder, that learn; saved as a pipeline folder.

    With ``config.lora`` their adapters learn, and the folder is that of a LoRA; with
    ``config.textual_inversion`` a new word does, and the folder holds its embeddings; a ControlNet
    that learns is saved alone, as diffusers saves it.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        held_out: Items,
        encoder: Encoder,
        suites: Suites | None = None,
        previews: Previews | None = None,
        told: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.told = told  # by the file of a LoRA, beside its base
        self.config, self.process = config, model.process
        _, self.objective = process_and_objective(config)
        self.model, self.held_out, self.encoder = model, held_out, encoder
        self.resting = Resting(model, (), None, half=False)  # until the caches are made
        self.suites, self.previews = suites, previews
        times, self.memory = self.objective.times, Memory()
        if isinstance(times, LossSecondMoment):
            self.memory = LossMemory(times, self.process)
        # Only what learns is registered: DDP and the optimiser must not see the frozen rest.
        self.denoiser = model.denoiser
        self.learns = reads.learns(config, model)
        beside = (model.family.network, CONTROLNET)  # which the denoiser has
        towers = [name for name in self.learns if name not in beside]
        self.towers = nn.ModuleDict({name: model.networks[name] for name in towers})
        learn(model, config)
        if config.dropout is not None:
            for module in model.network.modules():
                if isinstance(module, ResnetBlock2D):
                    module.dropout.p = config.dropout
        self.origin = model.origin
        self.average: Averages | None = None
        if config.distil is not None:
            self.objective = of_a_teacher(config.distil, self.objective, self)
            if model.teacher is not None:
                self.origin = {**model.origin, "distil.teacher": model.teacher.fingerprint}

    def example(self, n: int) -> dict[str, Tensor]:
        """A micro-batch of ``n`` images without values."""
        return self.encoder.example(n)

    def frozen(self) -> dict[str, Tensor]:
        """What does not learn of what the steps read, by name."""
        networks = dict(self.model.networks)
        if self.model.teacher is not None and self.model.teacher.network is not None:
            networks["teacher"] = self.model.teacher.network
        return {
            f"{part}.{name}": value
            for part, network in networks.items()
            if part not in self.encoder.unread
            for name, value in network.named_parameters()
            if not value.requires_grad
        }

    def place(self, device: torch.device) -> None:
        """Brings to ``device`` what the steps read."""
        for name, network in self.model.networks.items():
            if name not in self.encoder.unread:
                network.to(device)
        teacher = self.model.teacher
        if teacher is not None and teacher.network is not None:
            teacher.network.to(device)

    def rest(self, device: torch.device, base: Path | None) -> None:
        """Lets go, once the caches are made, of the networks that no step reads.

        Args:
            device: where the run computes.
            base: folder with all of them, which the run does not save; None: it does, from memory
                or from a folder that the model tells.
        """
        self.place(device)  # a stream, or endless captions, are not cached after all
        source = self.model.stored or self.model.kept or base
        half = self.config.frozen != "float32"
        self.resting = Resting(self.model, self.encoder.unread, source, half=half)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, as ``PART.NAME``."""
        return trained(self.model, self.config)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` (weighted), ``mse`` and, of a learned variance, ``bound`` per sample, ``b``."""
        z = self.encoder.latent(batch)
        terms = self.objective(
            self.model.seen_by(z),
            self.denoiser,
            z,
            self.encoder.condition(batch),
            u=batch["u"],
            eps=batch["noise"],
        )
        if isinstance(self.memory, LossMemory):
            self.memory.add(batch["position"], batch["u"], terms.term)
        bound = {} if terms.bound is None else {"bound": terms.bound}
        return {"loss": terms.loss, "mse": terms.mse, **bound}

    def pipeline(self) -> LatentDiffusionPipeline:
        """A pipeline over the networks as they are."""
        return pipeline(self.model)

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
        measures = bool(validation.images and self.held_out)
        draws = folder is not None and bool(self.previews or self.suites)
        # A cached set has what its held-out pictures are encoded to.
        encodes = measures and not self.model.stored
        what = "validation.images" if encodes else "validation.suites"
        if draws and self.previews:
            what = self.previews.key
        back = self.resting.back(accelerator.device, what) if draws or encodes else nullcontext()
        with eager(self.model.network), back:
            measured = self._held_out_loss(accelerator) if measures else {}
            if folder and draws:
                measured |= self._drawn(accelerator, folder, images)
        return measured

    def _drawn(self, accelerator: Accelerator, folder: Path, images: int) -> dict[str, float]:
        """Draws the previews and what the suites measure; see ``validate``."""
        pipe = self.pipeline()
        page = self.previews.page(pipe, accelerator) if self.previews else None
        reports = self.suites.measure(pipe, accelerator) if self.suites else {}
        # Only once all have drawn: who cannot write would leave the others waiting.
        sheet = sheets.sheet_name(folder, images)
        if page and accelerator.is_main_process:
            sheets.save(page, sheet)
        if self.suites and accelerator.is_main_process:
            self.suites.write(reports, sheet.with_suffix(".md"))
        return flat(reports)

    def _held_out_loss(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean squared error in target space; every held-out picture meets the same noise at every
        level and at every validation.
        """
        validation = self.config.validation
        assert validation is not None
        chosen = evenly_spaced(self.held_out, validation.images)
        mine = list(range(len(chosen)))[accelerator.process_index :: accelerator.num_processes]
        levels, device = validation.levels, accelerator.device
        sums = torch.zeros(levels + 1, dtype=torch.float64, device=device)
        codec = self.encoder.codec
        with Progress("measuring held-out loss", "pictures", len(mine)) as progress:
            for numbers in _of_one_shape(chosen, mine, self.encoder.batch):
                items = [chosen[n] for n in numbers]
                moments, cond = self.encoder.evaluated(items, validation.seed, numbers)
                z = codec.sample(moments, torch.zeros_like(moments.mean))
                errors = errors_by_level(
                    self.objective, self.model.seen_by(z), self.denoiser, z, cond,
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
        self._write(self.model, folder)

    def snapshot(self) -> Callable[[Path], None]:
        """``save`` of the weights as they are now."""
        networks = self.model.networks
        held = {name: on_host(networks[name]) for name in self.learns}
        return partial(self._write, replace(self.model, networks={**networks, **held}))

    def _write(self, model: Model, folder: Path) -> None:
        word = self.config.textual_inversion
        if self.config.lora:
            updates = {part: collect(model.networks[part]) for part in self.learns}
            lora.write(updates, folder, base=model.origin, told=self.told)
        elif word is not None:
            rows = [*trained(model, self.config).values()]  # of each text encoder
            textual_inversion.write(word.token, rows, folder, model.origin)
        elif CONTROLNET in self.learns:
            bare(model.networks[CONTROLNET]).save_pretrained(folder)
            strip_paths(folder)
        else:
            save_pipeline(model, folder)

    finish = save

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of what learns, as ``trained`` names them."""
        found: dict[str, Tensor] = {}
        learns = self.learns
        if self.config.textual_inversion is not None:
            rows = textual_inversion.read_towers(folder)[1]
            return dict(zip(self.trained(), rows, strict=True))
        if self.config.lora:
            read = lora_names.as_in(self.model.networks, lora.read(folder))
            for part, updates in read.items():
                found |= {f"{part}.{name}": value for name, value in named(updates).items()}
            return found
        for part in learns:
            if part == CONTROLNET:
                weights = read_network(folder)
            elif part == self.model.family.network:
                weights = read_network(folder / part)
            else:
                network = type(bare(self.model.networks[part]))
                found_there = network.from_pretrained(folder / part, dtype=torch.float32)
                weights = dict(found_there.named_parameters())
            found |= {f"{part}.{name}": value for name, value in weights.items()}
        mine = self.trained()
        return {name: value for name, value in found.items() if name in mine}


def pipeline(model: Model) -> LatentDiffusionPipeline:
    """A pipeline over the networks of ``model``."""
    stated = model.scheduler_config()
    scheduler = getattr(diffusers, stated.pop("_class_name"))
    if model.codec.network is not None:
        # What Stable Diffusion's folders say, and what diffusers asks for in a saved pipeline.
        stated |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    stated |= model.family.stepping
    known = inspect.signature(scheduler.__init__).parameters
    scheduler = scheduler(**{key: value for key, value in stated.items() if key in known})
    return LatentDiffusionPipeline.of(model, scheduler)


def save_pipeline(model: Model, folder: Path) -> None:
    """A pipeline folder of ``model``, which has no adapters."""
    if source := model.stored or model.kept:
        save_linked(pipeline(model), folder, source)
    else:
        pipeline(model).save_pretrained(folder)


def _of_one_shape(items: Sequence[Item], numbers: list[int], size: int) -> Iterator[list[int]]:
    """``numbers`` in batches of up to ``size`` whose items have one shape."""
    for shape in sorted({items[n].shape for n in numbers}):
        alike = [n for n in numbers if items[n].shape == shape]
        for at in range(0, len(alike), size):
            yield alike[at : at + size]
