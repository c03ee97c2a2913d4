"""Trains a latent text-to-image model: from random init, or from a pipeline folder.

    accelerate launch training/train.py --config configs/quickstart.yaml a.b=c ...
    accelerate launch training/train.py --config configs/finetune.yaml data.path=my_images
    accelerate launch training/train.py --config configs/lora.yaml data.path=my_images

The result is ``RUN/final``, the folder of a pipeline, or of a LoRA.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from accelerate import Accelerator

from ldm.data.source import cache_root
from ldm.engine.checkpoint import write_folder
from ldm.engine.config import ConfigError
from ldm.engine.disk import writing
from ldm.engine.encoded import Encoded, LatentDraws
from ldm.engine.parts import build, is_model, parameters
from ldm.engine.program import Program, collect
from ldm.engine.schema import TrainConfig
from ldm.engine.score import score
from ldm.engine.steps import text_to_image
from ldm.engine.text_to_image import TextToImageTask
from ldm.engine.trainer import Trainer
from ldm.models.attention import set_attention
from ldm.models.codec import Codec
from ldm.models.conditioner import ClipConditioner
from ldm.pipeline import LatentDiffusionPipeline


def train(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Builds the parts of ``config``, trains them, and returns the folder of the result."""
    if config.score and config.images.buckets:
        raise ConfigError("score compares squares: leave out score, or images.buckets")
    collection = collect(config, accelerator)
    captions = collection.captions()
    parts = build(config, captions)
    bfloat16 = config.precision == "bfloat16"
    set_attention(parts.unet, config.attention, accelerator.device, bfloat16=bfloat16)
    for network in (parts.vae, parts.text_encoder, parts.unet):
        network.to(accelerator.device)
    conditioner = ClipConditioner(parts.tokenizer, parts.text_encoder)
    encoded = Encoded(config, Codec(parts.vae), conditioner, accelerator)
    task = TextToImageTask(config, parts, collection.held_out, encoded)
    draws = LatentDraws(config, collection, encoded)
    accelerator.print(
        f"U-Net of {parameters(parts.unet):,} parameters,"
        f" {sum(p.numel() for p in task.trained().values()):,} learn;"
        f" {len(collection.train):,} pictures, {len(collection.held_out):,} held out"
    )
    trainer = Trainer(config, task, draws, collection, accelerator)
    then = "the same command goes on with what is in the cache already"
    with writing("the cache", cache_root(), then):
        encoded.prepare(collection, captions)
    final = trainer.fit()
    base, lora = final, None
    if config.lora:
        lora, base = final, Path(config.model or "")
        if not is_model(config, parts):
            base = Path(config.run) / "base"
            if accelerator.is_main_process:
                with writing("the base", base.parent, "the same command writes it again"):
                    save_base(task, base)
    prompt = collection.train[0].caption(None)
    command = [str(Path(sys.executable).with_name("ldm")), "sample", prompt, "--model", str(base)]
    if lora:
        side = config.images.size
        command += ["--lora", str(lora), "--size", f"{side}x{side}"]
    accelerator.print(f"the {'LoRA' if lora else 'pipeline'} is in {final}; draw with:")
    accelerator.print(f"  {shlex.join(command)}")
    if config.score and accelerator.is_main_process:
        pipe = LatentDiffusionPipeline.from_pretrained(base)
        if lora:
            pipe.load_lora_weights(lora)
        with writing("the score", Path(config.run), "the same command draws it again"):
            hits = score(pipe.to(accelerator.device), config, collection.train, Path(config.run))
        print(f"nearest training picture (pixels) is the one asked for: {hits}")
        print(f"drawn and true pictures side by side: {config.run}/samples.png")
    return final


def save_base(task: TextToImageTask, folder: Path) -> None:
    """Writes what a LoRA was trained on, where no folder is that already; the task's networks lose
    their adapters.
    """
    pipe = task.pipeline()
    pipe.unload_lora_weights()
    write_folder(folder, pipe.save_pretrained)


def main() -> None:
    """The command line."""
    program = Program(TrainConfig, __doc__)
    if program.dry_run:
        parts = build(program.config, [], meta=True)
        program.report(text_to_image(program.config, parts))
    else:
        train(program.config, program.accelerator())


if __name__ == "__main__":
    main()
