"""Trains a latent text-to-image model, or one of pixels, of classes, or unconditional: from random
init, or from a pipeline folder.

    accelerate launch training/train.py --config configs/quickstart.yaml a.b=c ...
    accelerate launch training/train.py --config configs/finetune.yaml data.path=my_images
    accelerate launch training/train.py --config configs/lora.yaml data.path=my_images
    accelerate launch training/train.py --config configs/textual_inversion.yaml data.path=my_images

The result is ``RUN/final``, the folder of a pipeline, of a LoRA, or of a new word.
"""

from __future__ import annotations

from ldm.config.schema import TrainConfig
from ldm.tasks.command import Command


def main() -> None:
    """The command line."""
    command = Command(TrainConfig, __doc__)
    # Only now, since they take seconds to import: a mistake is told at once.
    from ldm.tasks.program import run
    from ldm.tasks.text_to_image import step, train

    run(command, train, step, sharded=True)


if __name__ == "__main__":
    main()
