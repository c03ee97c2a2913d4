"""Trains a latent text-to-image model, or one of pixels, of classes, or unconditional."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm.config.learning import CONTROLNET, TextualInversion
from ldm.config.loader import images
from ldm.config.schema import TrainConfig
from ldm.data import hints
from ldm.data.cached import CachedData
from ldm.data.collection import Collection
from ldm.encoding.dataset import ImageDraws
from ldm.encoding.encoder import Encoder
from ldm.encoding.statistics import measure
from ldm.engine import memory, shards
from ldm.engine.precision import device_at_hand
from ldm.engine.sampler_state import Memory
from ldm.engine.trainer import Trainer
from ldm.errors import ConfigError
from ldm.families import reads
from ldm.families.build import is_model, parameters
from ldm.families.model import Model
from ldm.formats.recognised import INDEX
from ldm.models import compiled
from ldm.models.attention import set_attention
from ldm.models.tokenizer import folded
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage.cache_root import cache_root
from ldm.storage.checkpoint import write_folder
from ldm.storage.disk import writing
from ldm.tasks import lora_metadata
from ldm.tasks.continued import build
from ldm.tasks.denoising import DenoisingTask, save_pipeline
from ldm.tasks.estimate import Step
from ldm.tasks.frozen import cached_set
from ldm.tasks.previews import Previews
from ldm.tasks.program import collect
from ldm.tasks.score import score
from ldm.tasks.suites import Suites

_OPTIONS = {"sampler": "sampler", "num_inference_steps": "steps", "guidance_scale": "guidance"}
"""Of ``ldm sample``, by the arguments of ``SamplingDefaults``."""


def train(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Builds the model of ``config``, trains it, and returns the folder of the result."""
    if config.score and config.images.buckets:
        raise ConfigError("score compares squares: leave out score, or images.buckets")
    if config.score and config.score.before and config.model is None:
        raise ConfigError("score.before draws from what a run starts from: give model")
    if config.adds and config.frozen != "float32" and shards.asked_for():
        raise ConfigError(
            f"frozen: {config.frozen} is not supported in shards (FSDP): leave it out"
        )
    held = cached_set(config)
    collection = collect(config, accelerator)
    if config.textual_inversion:
        speak_of(config.textual_inversion, collection)
    captions = [] if collection.epoch is None else collection.captions()
    prompt = collection.prompt()
    kept = Path(config.run) / "frozen" if _rounds(config, held) else None
    if kept and accelerator.is_main_process:  # before there is a model beside that
        with writing("what does not learn", kept.parent, "the same command writes it again"):
            save_frozen(config, captions, kept)
    model = build(config, captions, held=held)
    model.kept = kept
    bfloat16 = config.precision == "bfloat16"
    for network in _denoising(model):
        set_attention(network, config.attention, accelerator.device, bfloat16=bfloat16)
    compile_for(config, model, accelerator, collection.epoch)
    frozen = model.codec, model.conditioner
    encoder = Encoder(config, *frozen, accelerator, model.stored, model.aside)
    suites = None
    if config.validation and config.validation.suites:
        suites = Suites(config, model, collection, accelerator, encoder.batch)
    previews = Previews(config, model, collection)
    told = lora_metadata.told(config, model, collection.epoch) if config.lora else None
    task = DenoisingTask(config, model, collection.held_out, encoder, suites, previews, told)
    if not shards.asked_for():
        memory.refuse(config, task.trained(), task.frozen(), accelerator.device)
    task.place(accelerator.device)
    if model.aside is not None and model.aside.hinted:
        if collection.epoch is None:
            raise ConfigError("train: a stream has no hints, which a ControlNet learns from")
        hints.check([collection.train, collection.held_out])
    draws = ImageDraws(config, collection, encoder)
    accelerator.print(
        f"{'U-Net' if model.family.network == 'unet' else model.family.network} of"
        f" {parameters(model.network):,} parameters,"
        f" {sum(p.numel() for p in task.trained().values()):,} learn;"
        f" {_count(collection.epoch)} pictures, {len(collection.held_out):,} held out"
        f"{_uses(config, collection.epoch)}"
    )
    trainer = Trainer(config, task, draws, collection, accelerator)
    # What the result is used with: of a pipeline, itself.
    base = Path(config.run) / "final"
    if config.adds:
        base = Path(config.model or "")
        if not is_model(config, model):
            base = Path(config.run) / "base"
            if accelerator.is_main_process:
                with writing("the base", base.parent, "the same command writes it again"):
                    save_base(config, captions, held, base)
    then = "the same command goes on with what is in the cache already"
    with writing("the cache", cache_root(), then):
        encoder.prepare(collection, captions)
        if model.measures:
            measure(model, encoder, collection, Path(config.run))
    task.rest(accelerator.device, base if config.adds else None)
    final = trainer.fit()
    told = [] if model.classes == () else [prompt]  # an unconditional model reads none
    ldm = str(Path(sys.executable).with_name("ldm"))
    drawn_by = ["--model", str(base)]
    if model.family.enlarges(model.network):  # it goes on from what another draws
        drawn_by = ["--model", "BASE", "--then", str(base)]
    elif model.aside is not None:
        drawn_by += ["--image", "PICTURE"]
    command = [ldm, "sample", *told, *drawn_by]
    if model.family.embeds:
        command = [ldm, "export", "OUT", "--prior", str(base), "--decoder", "DECODER"]
    kind = "LoRA" if config.lora else "embedding" if config.textual_inversion else None
    if CONTROLNET in config.learns:
        kind = "ControlNet"
        command += ["--control", "HINT.png"]
    if kind:
        side = config.images.size
        command += [f"--{kind.lower()}", str(final), "--size", f"{side}x{side}"]
        if config.distil:  # a folder would state it
            command += [f"--{_OPTIONS[name]}={value}" for name, value in model.sampling.items()]
    command += ["--syntax", config.prompt_syntax] if config.prompt_syntax else []
    how = "put it before a decoder" if model.family.embeds else "draw"
    accelerator.print(f"the {kind or 'pipeline'} is in {final}; {how} with:")
    accelerator.print(f"  {shlex.join(command)}")
    if config.score:
        accelerator.wait_for_everyone()  # for the base
        pipes = {"drawn": LatentDiffusionPipeline.from_pretrained(base)}
        if config.lora:
            pipes["drawn"].load_lora_weights(final)
        elif config.textual_inversion:
            pipes["drawn"].load_textual_inversion(final)
        if config.score.before:
            pipes = {"before": LatentDiffusionPipeline.from_pretrained(config.model)} | pipes
        for pipe in pipes.values():
            pipe.to(accelerator.device)
        with writing("the score", Path(config.run), "the same command draws it again"):
            how = model.drawn_with(config.score)
            scores = score(pipes, config, collection.train, Path(config.run), accelerator, how)
        accelerator.print("nearest training picture (pixels) is the one asked for:")
        for source, models in scores.items():
            for model, hits in models.items():
                accelerator.print(f"  {source}, {model}: {hits}")
        shown = " | ".join(pipes)
        accelerator.print(f"{shown} | true pictures side by side: {config.run}/samples.png")
    return final


def _denoising(model: Model) -> list[Any]:
    """The networks of ``model`` that are told noise: its own, its teacher's, a ControlNet."""
    teacher = model.teacher and model.teacher.network
    every = (model.network, teacher, model.networks.get(CONTROLNET))
    return [network for network in every if network is not None]


def compile_for(
    config: TrainConfig, model: Model, accelerator: Accelerator, epoch: int | None
) -> None:
    """Compiles blocks of the network that predicts, if ``config.compile`` says so.

    Raises:
        ConfigError: it is to be in shards.
    """
    steps, device = images(config.duration, config.batch_size, epoch), accelerator.device
    steps, shapes = steps // config.batch_size, config.images.buckets is not None
    if not compiled.chosen(config.compile, device, steps, shapes=shapes):
        return
    if shards.asked_for():
        if config.compile == "auto":
            return
        raise ConfigError("compile: not supported in shards (FSDP): leave it out")
    count = compiled.compile_blocks(model.network)
    if device.type == "cuda":
        compiled.channels_last(model.network, config.optimizer.kind)
    accelerator.print(f"{count} blocks are compiled in the first step")


def _count(pictures: int | None) -> str:
    return "an unknown number of" if pictures is None else f"{pictures:,}"


def _uses(config: TrainConfig, pictures: int | None) -> str:
    """How often the run comes back to each picture, where that is more often than once."""
    if pictures is None:
        return ""
    uses = images(config.duration, config.batch_size, pictures) / pictures
    return f"; each is used {uses:,.0f} times" if uses >= 1.5 else ""


def speak_of(word: TextualInversion, collection: Collection) -> None:
    """Makes captions of the templates; ``ConfigError`` if no caption says the word."""
    if word.templates:
        collection.retell(word.captions)
    token = folded(word.token)
    if not any(token in folded(caption) for caption in collection.captions()):
        raise ConfigError(
            f"textual_inversion.token: no caption says {word.token!r}: write it into the captions,"
            ' or set textual_inversion.templates (["a photo of {}"])'
        )


def save_base(
    config: TrainConfig, captions: Sequence[str], held: CachedData | None, folder: Path
) -> None:
    """Writes what adapters or a new word are learnt on, where no folder is that already."""
    adds = {"lora": None, "textual_inversion": None, "controlnet": None}
    train = tuple(part for part in config.train if part != CONTROLNET) or ("unet",)
    config = replace(config, **adds, train=train, frozen="float32", weights="float32")
    bare = build(config, captions, held=held)
    write_folder(folder, partial(save_pipeline, bare))


def _rounds(config: TrainConfig, held: CachedData | None) -> bool:
    """Whether the run saves text encoders that it holds in bfloat16."""
    if config.frozen == "float32" or config.adds or held is not None:
        return False
    towers = reads.texts(config, reads.family(config))
    return any(tower.part not in config.learns for tower, _ in towers)


def save_frozen(config: TrainConfig, captions: Sequence[str], folder: Path) -> None:
    """Writes the parts of the result that do not learn, as they are in float32."""
    whole = build(replace(config, frozen="float32"), captions)

    def write(staging: Path) -> None:
        save_pipeline(whole, staging)
        (staging / INDEX).unlink()  # it is none without the rest
        for part in whole.family.own | {*config.learns}:
            shutil.rmtree(staging / part)

    write_folder(folder, write)


def step(config: TrainConfig) -> Step:
    """What a step of ``config`` computes, on the meta device."""
    held = cached_set(config)
    model = build(config, [], meta=True, held=held)
    here = "sdpa" if config.attention == "xformers" else config.attention  # which needs a GPU
    bfloat16 = config.precision == "bfloat16"
    teacher = model.teacher and model.teacher.network
    for network in _denoising(model):
        set_attention(network, here, device_at_hand(), bfloat16=bfloat16)
    frozen = model.codec, model.conditioner
    encoder = Encoder(config, *frozen, None, model.stored, model.aside)
    task = DenoisingTask(config, model, [], encoder)
    task.memory = Memory()  # there are no losses to learn from
    # Those of a cached set are shapes alone in a run too.
    rounds = _rounds(config, held)
    networks = {model.family.network: model.network} if model.stored else model.networks
    saved = None if config.adds else tuple(networks)
    if rounds:
        saved = tuple({model.family.network: 0, **dict.fromkeys(config.learns)})
    if teacher is not None:
        networks = {**networks, "teacher": teacher}
    # What a run saves waits in memory, which on a CPU is where it computes.
    leave = config.adds or rounds or device_at_hand().type != "cpu"
    unread = () if model.stored or not leave else tuple(encoder.unread)
    return Step(networks, task, saved, encoder.entries(), unread)
