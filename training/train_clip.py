"""Trains a small CLIP, and its tokenizer, on captioned pictures.

    accelerate launch training/train_clip.py --config configs/clip.yaml a.b=c ...

The result is ``RUN/final``: ``text_encoder`` and ``tokenizer`` for a pipeline (``text: RUN/final``
in the config of training/train.py), ``image_encoder`` for evaluation. With ``text`` the text side
is there already and a picture tower learns to meet it (configs/clip_picture_tower.yaml). With
``model`` the picture tower sees that model's latents under noise, for guidance
(configs/clip_noised.yaml).
"""

from __future__ import annotations

from pathlib import Path

from ldm.config.schema import ClipConfig
from ldm.tasks.command import Command

# Read before what is imported next takes seconds: a mistake is told at once.
COMMAND = Command(ClipConfig, __doc__) if __name__ == "__main__" else None

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm.data.source import Contrary
from ldm.encoding import long_captions
from ldm.engine.batch import split_batch
from ldm.engine.trainer import Trainer
from ldm.errors import ConfigError
from ldm.families.build import parameters
from ldm.families.networks import described, in_model, read
from ldm.families.text import own_tokenizer, read_tokenizer
from ldm.models.clip import Clip
from ldm.models.conditioner import ClipConditioner
from ldm.models.tokenizer import train_tokenizer
from ldm.tasks.clip import CaptionedDraws, ContrastiveTask
from ldm.tasks.noisy_input import NoisyInput
from ldm.tasks.program import Program, collect
from ldm.tasks.steps import contrastive


def train(config: ClipConfig, accelerator: Accelerator) -> Path:
    """Builds the towers of ``config``, trains them, and returns the folder of the result."""
    share, micro = split_batch(config, accelerator.num_processes)
    if micro != share:
        raise ConfigError(
            "micro_batch_size: a contrastive loss compares the whole batch: leave it out, or lower"
            " batch_size"
        )
    noised = noise(config)
    side = noised.shape[1] if noised else config.images.size
    if config.clip.size != side:
        raise ConfigError(
            f"clip.size {config.clip.size} is not {side}, the side of what the picture tower sees"
        )
    if config.images.buckets:
        raise ConfigError(
            "images.buckets: a CLIP's pictures are squares of clip.size: leave it out"
        )
    if config.contraries and config.images.flip:
        raise ConfigError(
            "images.flip: of a mirrored picture a contrary may be true: leave out one of the two"
        )
    collection = collect(config, accelerator)
    if config.contraries and not any(isinstance(source, Contrary) for source in collection.sources):
        raise ConfigError(
            "contraries: no source of data knows texts that are false of its pictures (shapes"
            " does): leave it out"
        )
    if noised is not None:
        clip, tokenizer = beside(config, noised)
    elif config.text is not None:
        clip, tokenizer = meeting(config, config.text)
    else:
        tokenizer = own_tokenizer(
            config.run, "tokenizer", collection.captions(), config.vocab_size, config.max_length
        )
        clip = config.clip.build(tokenizer, config.seed)
    clip.to(accelerator.device)
    if noised is not None and noised.codec is not None:
        noised.codec.vae.to(accelerator.device)
    task = ContrastiveTask(config, clip, tokenizer, collection.held_out, accelerator, noised)
    draws = CaptionedDraws(collection, config, task.conditioner, noised)
    accelerator.print(
        f"{parameters(clip):,} parameters, {len(tokenizer):,} tokens,"
        f" {len(collection.train):,} pictures, {len(collection.held_out):,} held out"
    )
    trainer = Trainer(config, task, draws, collection, accelerator)
    if accelerator.is_main_process:
        long_captions.tell(Path(config.run), collection.sources, task.conditioner)
    final = trainer.fit()
    accelerator.print(f"the text encoder, its tokenizer and the image encoder are in {final}")
    return final


def noise(config: ClipConfig) -> NoisyInput | None:
    """What a picture tower sees that is not to see pixels."""
    if config.model is not None and config.text is not None:
        raise ConfigError("text: the text side is that of model: leave one of the two out")
    return None if config.model is None else NoisyInput.of(config.model, config.images)


def beside(config: ClipConfig, noised: NoisyInput) -> tuple[Clip, CLIPTokenizer]:
    """A new picture tower with the text side of the model's CLIP, and its tokenizer."""
    text, vision, words = (
        in_model(config.model, "model", part)
        for part in ("text_encoder", "image_encoder", "tokenizer")
    )
    if not (vision / "config.json").is_file():
        raise ConfigError(f"model: {config.model} has no image_encoder, so it is half a CLIP")
    try:
        whole = Clip.load(text, vision)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"model: {config.model} holds no CLIP that can be read: {line}") from None
    with described("clip"):
        clip = config.clip.beside(whole, noised.shape[0], config.seed)
    return clip, read_tokenizer(words)


def meeting(config: ClipConfig, folder: str) -> tuple[Clip, CLIPTokenizer]:
    """A new picture tower and projections for the text encoder in ``folder``, and its tokenizer."""
    text_encoder = read(CLIPTextModel, Path(folder) / "text_encoder", "text", meta=False)
    tokenizer = read_tokenizer(Path(folder) / "tokenizer")
    with described("text"):
        ClipConditioner(tokenizer, text_encoder)  # do they fit?
    with described("clip"):
        return config.clip.meeting(text_encoder, config.seed), tokenizer


def main() -> None:
    """The command line."""
    program = Program(COMMAND or Command(ClipConfig, __doc__))
    config = program.config
    if program.dry_run and (noised := noise(config)):
        program.report(contrastive(beside(config, noised)[0].model.to("meta"), config.contraries))
    elif program.dry_run and config.text is not None:
        program.report(
            contrastive(meeting(config, config.text)[0].model.to("meta"), config.contraries)
        )
    elif program.dry_run:
        shape = config.clip.config(train_tokenizer([], config.vocab_size, config.max_length))
        shape.text_config.vocab_size = config.vocab_size  # what the captions may fill
        with torch.device("meta"):
            clip = CLIPModel(shape)
        program.report(contrastive(clip, config.contraries))
    else:
        train(config, program.accelerator())


if __name__ == "__main__":
    main()
