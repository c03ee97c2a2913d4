"""Trains a classifier of noised pictures, for classifier guidance.

    accelerate launch training/train_classifier.py --config configs/classifier.yaml a.b=c ...

The result is ``RUN/final``, a folder of ``ldm.models.classifier.NoisyClassifier``.
"""

from __future__ import annotations

from pathlib import Path

from ldm.config.classifier import ClassifierConfig
from ldm.tasks.command import Command

# Read before what is imported next takes seconds: a mistake is told at once.
COMMAND = Command(ClassifierConfig, __doc__) if __name__ == "__main__" else None

from accelerate import Accelerator

from ldm.engine.trainer import Trainer
from ldm.errors import ConfigError
from ldm.families.build import parameters
from ldm.families.networks import described, initialised, on_meta
from ldm.models.classifier import NoisyClassifier
from ldm.tasks.classifier import ClassificationTask, LabelledDraws, Labels
from ldm.tasks.noisy_input import NoisyInput
from ldm.tasks.program import Program, collect
from ldm.tasks.steps import classification


def train(config: ClassifierConfig, accelerator: Accelerator) -> Path:
    """Builds the classifier of ``config``, trains it, and returns the folder of the result."""
    if config.images.buckets:
        raise ConfigError("images.buckets: a classifier's pictures are squares: leave it out")
    noised = NoisyInput.of(config.model, config.images, config.process)
    if noised.codec is not None:
        noised.codec.vae.to(accelerator.device)
    collection, labels = collect(config, accelerator), Labels(config.labels)
    if collection.epoch is None:
        raise ConfigError("data: a stream's labels are not known ahead: train on files or tables")
    without = labels.restrict(collection)
    classifier = make(config, noised.shape[0]).to(accelerator.device)
    task = ClassificationTask(config, classifier, noised, labels, collection.held_out)
    draws = LabelledDraws(collection, config, labels, noised)
    accelerator.print(
        f"{parameters(classifier):,} parameters, {len(labels.names)} labels,"
        f" {len(collection.train):,} pictures, {len(collection.held_out):,} held out,"
        f" {without:,} left out that none or several of the labels fit"
    )
    final = Trainer(config, task, draws, collection, accelerator).fit()
    accelerator.print(f"the classifier is in {final}")
    return final


def make(config: ClassifierConfig, channels: int) -> NoisyClassifier:
    """The classifier of ``config`` from random init, for ``channels``."""
    with initialised(config.seed, "classifier"), described("classifier"):
        return NoisyClassifier(list(config.labels), channels, **vars(config.classifier))


def main() -> None:
    """The command line."""
    program = Program(COMMAND or Command(ClassifierConfig, __doc__))
    if program.dry_run:
        noised = NoisyInput.of(program.config.model, program.config.images, program.config.process)
        classifier = on_meta(lambda: make(program.config, noised.shape[0]))
        program.report(classification(classifier, noised.shape))
    else:
        train(program.config, program.accelerator())


if __name__ == "__main__":
    main()
