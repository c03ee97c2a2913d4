"""Trains a classifier of noised pictures, for classifier guidance.

    accelerate launch training/train_classifier.py --config configs/classifier.yaml a.b=c ...

The result is ``RUN/final``, a folder of ``ldm.models.classifier.NoisyClassifier``.
"""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from diffusers import AutoencoderKL

from ldm.engine.classification import ClassificationTask, LabelledDraws, Labels
from ldm.engine.config import ConfigError
from ldm.engine.networks import described, digest, in_model, initialised, on_meta
from ldm.engine.noise import process_of
from ldm.engine.parts import latent_side, parameters, read_vae
from ldm.engine.program import Program, collect
from ldm.engine.schema import ClassifierConfig
from ldm.engine.steps import classification
from ldm.engine.trainer import Trainer
from ldm.models.classifier import NoisyClassifier
from ldm.models.codec import Codec


def train(config: ClassifierConfig, accelerator: Accelerator) -> Path:
    """Builds the classifier of ``config``, trains it, and returns the folder of the result."""
    if config.images.buckets:
        raise ConfigError("images.buckets: a classifier's pictures are squares: leave it out")
    process, side = process_of(config.process, config.model), config.images.size
    codec, shape, origin = None, (3, side, side), {"process": repr(process)}
    vae = frozen(config)
    if vae is not None:
        vae.to(accelerator.device)
        cells = latent_side(vae, config.images)
        codec, origin["model.vae"] = Codec(vae), digest(vae)
        shape = (codec.channels, cells, cells)
    collection, labels = collect(config, accelerator), Labels(config.labels)
    if collection.epoch is None:
        raise ConfigError("data: a stream's labels are not known ahead: train on files or tables")
    labels.restrict(collection)
    classifier = make(config, vae).to(accelerator.device)
    task = ClassificationTask(
        config, classifier, process, codec, labels, collection.held_out, origin
    )
    draws = LabelledDraws(collection, config, labels, shape)
    accelerator.print(
        f"{parameters(classifier):,} parameters, {len(labels.names)} labels,"
        f" {len(collection.train):,} pictures, {len(collection.held_out):,} held out"
    )
    final = Trainer(config, task, draws, collection, accelerator).fit()
    accelerator.print(f"the classifier is in {final}")
    return final


def frozen(config: ClassifierConfig, *, meta: bool = False) -> AutoencoderKL | None:
    """The autoencoder whose latents are seen."""
    if config.model is None:
        return None
    return read_vae(str(in_model(config.model, "model", "vae")), meta=meta)


def make(config: ClassifierConfig, vae: AutoencoderKL | None) -> NoisyClassifier:
    """The classifier of ``config`` from random init."""
    channels = 3 if vae is None else vae.config.latent_channels
    with initialised(config.seed, "classifier"), described("classifier"):
        return NoisyClassifier(list(config.labels), channels, **vars(config.classifier))


def main() -> None:
    """The command line."""
    program = Program(ClassifierConfig, __doc__)
    if program.dry_run:
        vae = frozen(program.config, meta=True)
        classifier = on_meta(lambda: make(program.config, vae))
        program.report(classification(program.config, classifier, vae))
    else:
        train(program.config, program.accelerator())


if __name__ == "__main__":
    main()
