"""Trains a latent text-to-image model: from random init, or from a pipeline folder.

    accelerate launch training/train.py --config configs/quickstart.yaml a.b=c ...
    accelerate launch training/train.py --config configs/finetune.yaml data.path=my_images

The result is the pipeline folder ``RUN/final``.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from accelerate import Accelerator

from ldm.data.collection import Collection
from ldm.data.source import cache_root
from ldm.engine.disk import writing
from ldm.engine.parts import build, parameters
from ldm.engine.program import Program
from ldm.engine.schema import TrainConfig
from ldm.engine.score import score
from ldm.engine.text_to_image import Encoded, LatentDraws, TextToImageTask
from ldm.engine.trainer import Trainer
from ldm.models.attention import set_attention
from ldm.models.codec import Codec
from ldm.models.conditioner import ClipConditioner
from ldm.pipeline import LatentDiffusionPipeline


def train(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Builds the parts of ``config``, trains them, and returns the folder of the final pipeline."""
    collection = Collection(config.data)
    parts = build(config, collection.captions())
    bfloat16 = config.precision == "bfloat16"
    set_attention(parts.unet, config.attention, accelerator.device, bfloat16=bfloat16)
    for network in (parts.vae, parts.text_encoder, parts.unet):
        network.to(accelerator.device)
    conditioner = ClipConditioner(parts.tokenizer, parts.text_encoder)
    encoded = Encoded(config, Codec(parts.vae), conditioner, accelerator.device)
    task = TextToImageTask(config, parts, collection.held_out, encoded)
    draws = LatentDraws(config, collection.train, encoded)
    accelerator.print(
        f"U-Net of {parameters(parts.unet):,} parameters, {len(collection.train):,} pictures,"
        f" {len(collection.held_out):,} held out"
    )
    trainer = Trainer(config, task, draws, collection, accelerator)
    collection.verify(train=not encoded.latents_cached)  # the cache reads every picture it encodes
    place, then = cache_root(), "the same command goes on with what is in the cache already"
    with accelerator.main_process_first(), writing("the cache", place, then):
        encoded.prepare(collection.train, collection.captions())
    final = trainer.fit()
    prompt = collection.train[0].caption(None)
    accelerator.print(f"the pipeline is in {final}; draw with:")
    command = Path(sys.executable).with_name("ldm")
    accelerator.print(f"  {command} sample {shlex.quote(prompt)} --model {final}")
    if config.score and accelerator.is_main_process:
        pipe = LatentDiffusionPipeline.from_pretrained(final).to(accelerator.device)
        with writing("the score", Path(config.run), "the same command draws it again"):
            hits = score(pipe, config, collection.train, Path(config.run))
        print(f"nearest training picture (pixels) is the one asked for: {hits}")
        print(f"drawn and true pictures side by side: {config.run}/samples.png")
    return final


def main() -> None:
    """The command line."""
    program = Program(TrainConfig, __doc__)
    if program.dry_run:
        parts = build(program.config, [], meta=True)
        program.report({name: getattr(parts, name) for name in ("unet", "text_encoder", "vae")})
    else:
        train(program.config, program.accelerator())


if __name__ == "__main__":
    main()
