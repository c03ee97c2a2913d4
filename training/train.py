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
    if config.score and config.score.before and config.model is None:
        raise ConfigError("score.before draws from what a run starts from: give model")
    collection = collect(config, accelerator)
    captions = [] if collection.epoch is None else collection.captions()
    prompt = collection.prompt()
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
        f" {_count(collection.epoch)} pictures, {len(collection.held_out):,} held out"
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
    command = [str(Path(sys.executable).with_name("ldm")), "sample", prompt, "--model", str(base)]
    if lora:
        side = config.images.size
        command += ["--lora", str(lora), "--size", f"{side}x{side}"]
    accelerator.print(f"the {'LoRA' if lora else 'pipeline'} is in {final}; draw with:")
    accelerator.print(f"  {shlex.join(command)}")
    if config.score and accelerator.is_main_process:
        pipes = {"drawn": LatentDiffusionPipeline.from_pretrained(base)}
        if lora:
            pipes["drawn"].load_lora_weights(lora)
        if config.score.before:
            pipes = {"before": LatentDiffusionPipeline.from_pretrained(config.model)} | pipes
        for pipe in pipes.values():
            pipe.to(accelerator.device)
        with writing("the score", Path(config.run), "the same command draws it again"):
            scores = score(pipes, config, collection.train, Path(config.run))
        print("nearest training picture (pixels) is the one asked for:")
        for source, models in scores.items():
            for model, hits in models.items():
                print(f"  {source}, {model}: {hits}")
        print(f"{' | '.join(pipes)} | true pictures side by side: {config.run}/samples.png")
    return final


def _count(pictures: int | None) -> str:
    return "an unknown number of" if pictures is None else f"{pictures:,}"


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
        program.report({name: getattr(parts, name) for name in ("unet", "text_encoder", "vae")})
    else:
        train(program.config, program.accelerator())


if __name__ == "__main__":
    main()
