"""The teacher of a student: a folder's network, frozen, or the student's without its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config.distil import ConsistencyDistil, Distil
from ldm.config.noise import ObjectiveSettings, ProcessSettings
from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition, VariancePreserving, predictor
from ldm.errors import ConfigError
from ldm.families import reads
from ldm.families.model import FamilyDenoiser, Model, Teacher
from ldm.families.networks import described, digest, in_model, read
from ldm.families.noise import process_and_objective
from ldm.families.unet import hears_guidance


def teacher_of(
    config: TrainConfig, model: Model, check: Callable[[TrainConfig], None], *, meta: bool
) -> Teacher | None:
    """The teacher of ``config.distil``, if it asks one.

    Args:
        config: the run.
        model: its student, which has no adapters yet.
        check: refuses another folder, a config of which it is given, whose autoencoder or text
            encoders are not those of the run.
        meta: shapes only.

    Raises:
        ConfigError: there is none, or it is of another family, or knows other noise, latents or
            texts than the student.
    """
    distil = config.distil
    assert distil is not None
    if not distil.taught:
        return None
    if distil.guided and model.classes == ():
        raise ConfigError("distil.guidance: an unconditional teacher has none: leave it out")
    folder = _folder(distil.teacher or config.model or "")
    alone = folder != Path(config.model or "")
    with _named(folder, alone=alone):
        there = replace(
            config, model=str(folder), family=None, vae=None, condition=None, text=None,
            text_layers=None, unet=None, transformer=None, prior=None, lora=None, distil=None,
            process=ProcessSettings(), objective=ObjectiveSettings(),
        )  # fmt: skip
        family = reads.family(there)
        if family is not model.family:
            raise ConfigError(f"it is of the family {family.name}, not {model.family.name}")
        process, objective = process_and_objective(there)
        if process != model.process:
            raise ConfigError(f"it knows other noise: {process}, not {model.process}")
        if alone and not meta:
            check(there)
        shared = config.lora is not None and not alone and config.network is None
        if shared:
            network = model.network
        else:
            network = read(family.reads, in_model(str(folder), "model", family.network), "it", meta)
            checked = replace(model, learned_variance=objective.learned_variance)
            family.check(there, checked, network)
            network.requires_grad_(False).eval()
    whole = FamilyDenoiser(family, network)
    denoiser = _Bare(whole) if shared else whole
    return Teacher(
        predictor(denoiser, objective.target),
        None if shared else network,
        family.hears(network),
        "" if meta else digest(network),
    )


def student(distil: Distil, model: Model) -> None:
    """Lets ``model`` hear the scale of guidance, if it is to, and state how it is drawn.

    Raises:
        ConfigError: it cannot hear it, or ``lcm`` would ask at other timesteps than are trained.
    """
    if distil.embedding:
        hears_guidance(model.network, distil.embedding)
    heard = model.family.hears(model.network)
    scale = distil.middle if heard else 1.0
    known = isinstance(model.process, VariancePreserving)
    model.stated |= {"guidance_scale": scale}
    if known or isinstance(
        distil, ConsistencyDistil
    ):  # of other processes no sampler with a name asks at i / steps
        model.stated |= distil.drawing
    if known and isinstance(distil, ConsistencyDistil):
        if (count := model.process.num_train_timesteps) % distil.steps:
            raise ConfigError(f"distil.steps {distil.steps}: it must divide {count}, the timesteps")
        model.scheduler = {
            "_class_name": "LCMScheduler",
            "original_inference_steps": distil.steps,
            "timestep_spacing": "trailing",
        }


def _folder(given: str) -> Path:
    """A pipeline folder, or that which the run in a folder has ended in."""
    final = Path(given) / "final"
    run = not (Path(given) / "model_index.json").is_file() and final.is_dir()
    return final if run else Path(given)


@contextmanager
def _named(folder: Path, *, alone: bool) -> Iterator[None]:
    """What is wrong with a teacher is told of it."""
    try:
        with described("distil.teacher"):
            yield
    except ConfigError as error:
        told = str(error).removeprefix("distil.teacher: ")
        raise ConfigError(f"distil.teacher {folder}: {told}" if alone else told) from None


class _Bare:
    """The network without its adapters, in evaluation mode; the adapters are on outside.

    Args:
        denoiser: of a network that has no adapters yet.
    """

    def __init__(self, denoiser: FamilyDenoiser) -> None:
        self.denoiser = denoiser

    def __call__(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """What it says, without a gradient."""
        network: Any = self.denoiser.network
        training = network.training
        network.eval()
        network.disable_adapters()
        try:
            return self.denoiser(x_t, timestep, cond)
        finally:
            network.enable_adapters()
            network.train(training)
