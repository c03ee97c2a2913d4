"""Trains a small CLIP, and its tokenizer, on captioned pictures.

    accelerate launch training/train_clip.py --config configs/clip.yaml a.b=c ...

The result is ``RUN/final``: ``text_encoder`` and ``tokenizer`` for a pipeline (``text: RUN/final``
in the config of training/train.py), ``image_encoder`` for evaluation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import CLIPModel

from ldm.engine.batch import split_batch
from ldm.engine.config import ConfigError
from ldm.engine.contrastive import CaptionedDraws, ContrastiveTask
from ldm.engine.parts import parameters
from ldm.engine.program import Program, collect
from ldm.engine.schema import ClipConfig
from ldm.engine.steps import contrastive
from ldm.engine.text import own_tokenizer
from ldm.engine.trainer import Trainer
from ldm.models.tokenizer import train_tokenizer


def train(config: ClipConfig, accelerator: Accelerator) -> Path:
    """Builds the towers of ``config``, trains them, and returns the folder of the result."""
    share, micro = split_batch(config, accelerator.num_processes)
    if micro != share:
        raise ConfigError(
            "micro_batch_size: a contrastive loss compares the whole batch: leave it out, or lower"
            " batch_size"
        )
    if config.clip.size != config.images.size:
        raise ConfigError(
            f"clip.size {config.clip.size} and images.size {config.images.size} must be the same"
        )
    if config.images.buckets:
        raise ConfigError(
            "images.buckets: a CLIP's pictures are squares of clip.size: leave it out"
        )
    collection = collect(config, accelerator)
    tokenizer = own_tokenizer(
        config.run, collection.captions(), config.vocab_size, config.max_length
    )
    clip = config.clip.build(tokenizer, config.seed).to(accelerator.device)
    task = ContrastiveTask(config, clip, tokenizer, collection.held_out, accelerator)
    draws = CaptionedDraws(collection, config, task.conditioner)
    accelerator.print(
        f"{parameters(clip):,} parameters, {len(tokenizer):,} tokens,"
        f" {len(collection.train):,} pictures, {len(collection.held_out):,} held out"
    )
    trainer = Trainer(config, task, draws, collection, accelerator)
    final = trainer.fit()
    accelerator.print(f"the text encoder, its tokenizer and the image encoder are in {final}")
    return final


def main() -> None:
    """The command line."""
    program = Program(ClipConfig, __doc__)
    config = program.config
    if program.dry_run:
        shape = config.clip.config(train_tokenizer([], config.vocab_size, config.max_length))
        shape.text_config.vocab_size = config.vocab_size  # what the captions may fill
        with torch.device("meta"):
            clip = CLIPModel(shape)
        program.report(contrastive(config, clip))
    else:
        train(config, program.accelerator())


if __name__ == "__main__":
    main()
