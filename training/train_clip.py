"""Trains a small CLIP, and its tokenizer, on captioned pictures.

    accelerate launch training/train_clip.py --config configs/clip.yaml a.b=c ...

The result is ``RUN/final``: ``text_encoder`` and ``tokenizer`` for a pipeline (``text: RUN/final``
in the config of training/train.py), ``image_encoder`` for evaluation. With ``text`` the text side
is there already and a picture tower learns to meet it (configs/clip_picture_tower.yaml). With
``model`` the picture tower sees that model's latents under noise, for guidance
(configs/clip_noised.yaml).
"""

from __future__ import annotations

from ldm.config.clip import ClipConfig
from ldm.tasks.command import Command


def main() -> None:
    """The command line."""
    command = Command(ClipConfig, __doc__)
    # Only now, since they take seconds to import: a mistake is told at once.
    from ldm.tasks.clip import step, train
    from ldm.tasks.program import run

    run(command, train, step)


if __name__ == "__main__":
    main()
