"""Trains a classifier of noised pictures, for classifier guidance.

    accelerate launch training/train_classifier.py --config configs/classifier.yaml a.b=c ...

The result is ``RUN/final``, a folder of ``ldm.models.classifier.NoisyClassifier``.
"""

from __future__ import annotations

from ldm.config.classifier import ClassifierConfig
from ldm.tasks.command import Command


def main() -> None:
    """The command line."""
    command = Command(ClassifierConfig, __doc__)
    # Only now, since they take seconds to import: a mistake is told at once.
    from ldm.tasks.classifier import step, train
    from ldm.tasks.program import run

    run(command, train, step)


if __name__ == "__main__":
    main()
