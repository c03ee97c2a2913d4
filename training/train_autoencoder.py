"""Trains a KL autoencoder on captioned or uncaptioned pictures.

    accelerate launch training/train_autoencoder.py --config configs/autoencoder.yaml a.b=c

It ends with the latent statistics folded into the quant convolutions: latents have mean 0 and std 1
per channel, and ``scaling_factor`` is 1. The result is ``RUN/final``.
"""

from __future__ import annotations

from ldm.config.autoencoder import AutoencoderConfig
from ldm.tasks.command import Command


def main() -> None:
    """The command line."""
    command = Command(AutoencoderConfig, __doc__)
    # Only now, since they take seconds to import: a mistake is told at once.
    from ldm.tasks.autoencoder import step, train
    from ldm.tasks.program import run

    run(command, train, step)


if __name__ == "__main__":
    main()
