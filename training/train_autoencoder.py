"""Trains a KL autoencoder on captioned or uncaptioned pictures.

    accelerate launch training/train_autoencoder.py --config configs/autoencoder.yaml a.b=c

It ends with the latent statistics folded into the quant convolutions: latents have mean 0 and std 1
per channel, and ``scaling_factor`` is 1. The result is ``RUN/final``.
"""

from __future__ import annotations

from pathlib import Path

from ldm.config.schema import AutoencoderConfig
from ldm.tasks.command import Command

# Read before what is imported next takes seconds: a mistake is told at once.
COMMAND = Command(AutoencoderConfig, __doc__) if __name__ == "__main__" else None

from accelerate import Accelerator
from diffusers import AutoencoderKL

from ldm.engine.trainer import Trainer
from ldm.errors import ConfigError
from ldm.families.build import parameters
from ldm.families.vae import latent_side, make_vae, read_vae
from ldm.models.codec import VaeCodec
from ldm.tasks.autoencoder import AutoencoderTask, PictureDraws
from ldm.tasks.program import Program, collect
from ldm.tasks.steps import autoencoder


def train(config: AutoencoderConfig, accelerator: Accelerator) -> Path:
    """Builds the autoencoder of ``config``, trains it, and returns the folder of the result."""
    collection = collect(config, accelerator)
    vae = make(config).to(accelerator.device)
    task = AutoencoderTask(config, vae, collection)
    latent_side(VaeCodec(vae), config.images)  # refuses a size that the network cannot halve
    if config.train == "all" and (vae.quant_conv is None or vae.post_quant_conv is None):
        raise ConfigError(f"vae: {config.vae} has no quant convolutions to fold statistics into")
    draws = PictureDraws(collection, config, task.codec)
    accelerator.print(
        f"{parameters(vae):,} parameters, {len(collection.train):,} pictures,"
        f" {len(collection.held_out):,} held out"
    )
    trainer = Trainer(config, task, draws, collection, accelerator)
    final = trainer.fit()
    accelerator.print(f"the autoencoder is in {final}")
    return final


def make(config: AutoencoderConfig, *, meta: bool = False) -> AutoencoderKL:
    """The autoencoder of ``config``, from its folder or from random init."""
    if isinstance(config.vae, str):
        return read_vae(config.vae, meta=meta)
    return make_vae(config.vae, config.seed, meta=meta)


def main() -> None:
    """The command line."""
    program = Program(COMMAND or Command(AutoencoderConfig, __doc__))
    if program.dry_run:
        program.report(autoencoder(program.config, make(program.config, meta=True)))
    else:
        train(program.config, program.accelerator())


if __name__ == "__main__":
    main()
