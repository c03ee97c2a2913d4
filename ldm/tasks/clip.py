"""Contrastive training of a small CLIP on pictures and their captions.

    L = (CE(s F_i F_t^T) + CE(s F_t F_i^T)) / 2,   F unit features, s the learned scale

(Radford et al. 2021, figure 3), with open_clip's loss over the global batch. With
``config.contraries`` the caption is also to be nearer than a text c in nearly the same words that
is false of the picture, log(1 + exp(s (F_i . F_c - F_i . F_t))): the captions of a batch can mostly
be told apart by their words in any order (Yuksekgonul et al. 2023, who put such texts into the
first softmax). With ``noised`` the pictures are latents under noise, so that the fit of a text can
guide at every level (Nichol et al. 2022, section 2.4): the text side is that of a trained CLIP and
stays as it is. With ``config.text`` the text tower is one that a denoiser knows, and stays so; only
its projection learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from open_clip import ClipLoss
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import Dataset, default_collate
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm.config.clip import ClipConfig
from ldm.data.collection import Collection
from ldm.data.images import to_pixels
from ldm.data.items import Item, Items, evenly_spaced
from ldm.diffusion import stream
from ldm.encoding import long_captions
from ldm.engine.batch import split_batch
from ldm.engine.sampler_state import Memory
from ldm.engine.trainer import Trainer
from ldm.errors import ConfigError
from ldm.evaluation.retrieval import ranks
from ldm.families.build import parameters
from ldm.families.networks import described, digest, in_model, read
from ldm.families.text import own_tokenizer, read_tokenizer
from ldm.models.clip import Clip
from ldm.models.conditioner import TextConditioner, unnamed
from ldm.models.tokenizer import TokenizerShape, save_tokenizer, settings_of, train_tokenizer
from ldm.progress import track
from ldm.tasks.estimate import Step
from ldm.tasks.noisy_input import NoisyInput
from ldm.tasks.program import collect


def train(config: ClipConfig, accelerator: Accelerator) -> Path:
    """Builds the towers of ``config``, trains them, and returns the folder of the result."""
    share, micro = split_batch(config, accelerator.num_processes)
    if micro != share:
        raise ConfigError(
            "micro_batch_size: a contrastive loss compares the whole batch: leave it out, or lower"
            " batch_size"
        )
    noised = _noise(config)
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
    some = evenly_spaced(collection.train, 256) if config.contraries else ()
    if some and all(item.contrary(stream(0, "caption", n)) is None for n, item in enumerate(some)):
        raise ConfigError(
            f"contraries: of {len(some)} pictures no source knows a text that is false of them"
            " (shapes does, of its contrary_scenes): leave it out"
        )
    if noised is not None:
        clip, tokenizer = _beside(config, noised)
    elif config.text is not None:
        clip, tokenizer = _meeting(config, config.text)
    else:
        tokenizer = own_tokenizer(
            config.run, "tokenizer", collection.captions(), config.vocab_size, config.max_length
        )
        clip = config.clip.build(tokenizer, config.seed)
    clip.to(accelerator.device)
    if noised is not None and noised.codec is not None:
        noised.codec.vae.to(accelerator.device)
    task = ContrastiveTask(config, clip, tokenizer, collection.held_out, accelerator, noised=noised)
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


def step(config: ClipConfig) -> Step:
    """What a step of ``config`` computes, on the meta device."""
    noised = _noise(config, meta=True)
    if noised is not None:
        clip, _ = _beside(config, noised)
    elif config.text is not None:
        clip, _ = _meeting(config, config.text)
    else:
        shape = config.clip.config(train_tokenizer([], config.vocab_size, config.max_length))
        shape.text_config.vocab_size = config.vocab_size  # what the captions may fill
        with torch.device("meta"):
            clip = Clip(CLIPModel(shape))
    model = clip.to("meta").model
    text = model.text_model
    words = TokenizerShape.of(text, text.config.max_position_embeddings)
    task = ContrastiveTask(config, clip, words, noised=noised)
    return Step({"clip": model, **(noised.networks if noised else {})}, task, ("clip",))


def _noise(config: ClipConfig, *, meta: bool = False) -> NoisyInput | None:
    """What a picture tower sees that is not to see pixels."""
    if config.model is not None and config.text is not None:
        raise ConfigError("text: the text side is that of model: leave one of the two out")
    return None if config.model is None else NoisyInput.of(config.model, config.images, meta=meta)


def _beside(config: ClipConfig, noised: NoisyInput) -> tuple[Clip, CLIPTokenizer]:
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


def _meeting(config: ClipConfig, folder: str) -> tuple[Clip, CLIPTokenizer]:
    """A new picture tower and projections for the text encoder in ``folder``, and its tokenizer."""
    text_encoder = read(CLIPTextModel, Path(folder) / "text_encoder", "text", meta=False)
    tokenizer = read_tokenizer(Path(folder) / "tokenizer")
    with described("text"):
        TextConditioner(tokenizer, text_encoder)  # do they fit?
    with described("clip"):
        return config.clip.meeting(text_encoder, config.seed), tokenizer


class CaptionedDraws(Dataset[dict[str, Any]]):
    """Item n: the n-th picture of the run with a drawn caption.

    Args:
        collection: its training pictures.
        config: transform with augmentation drawn per image, batch, seed.
        conditioner: tokenizes.
        noised: what the picture tower sees in place of pixels.
    """

    def __init__(
        self,
        collection: Collection,
        config: ClipConfig,
        conditioner: TextConditioner,
        noised: NoisyInput | None = None,
    ) -> None:
        self.plan = collection.plan(config.batch_size, config.seed, config.order.window)
        self.transform, self.seed = config.images, config.seed
        self.conditioner, self.noised, self.batch = conditioner, noised, config.batch_size
        self.contraries = config.contraries > 0

    one_reader = False

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.plan[position]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``pixels`` 3 h w in [-1, 1], ``ids`` l, ``position``, the draws of ``NoisyInput``, and
        with contraries ``false_ids`` l (those of the caption where there is no contrary).
        """
        item = self.item(position)
        caption = item.caption(stream(self.seed, "caption", position))
        view = self.transform.view(stream(self.seed, "transform", position))
        picture = self.transform(item.load(), view)
        false = item.contrary(stream(self.seed, "caption", position)) if self.contraries else None
        with unnamed():
            ids = self.conditioner.tokenize([caption])[0]
            false_ids = ids if false is None else self.conditioner.tokenize([false])[0]
        return {
            "position": position,
            "pixels": to_pixels(picture),
            "ids": ids,
            **({"false_ids": false_ids} if self.contraries else {}),
            **(self.noised.draws(self.seed, position, self.batch) if self.noised else {}),
        }


class ContrastiveTask(nn.Module):
    """A CLIP that learns; saved as ``text_encoder``, ``tokenizer`` and ``image_encoder``.

    Under noise (``noised``) only its picture tower does; beside a given text tower both projections
    as well. Without an accelerator nothing is trained, for ``example``.
    """

    def __init__(
        self,
        config: ClipConfig,
        clip: Clip,
        tokenizer: CLIPTokenizer | TokenizerShape,
        held_out: Items | None = None,
        accelerator: Accelerator | None = None,
        *,
        noised: NoisyInput | None = None,
    ) -> None:
        super().__init__()
        self.noised = noised
        self.origin = {} if accelerator is None else _origin(config, clip, tokenizer, noised)
        self.memory = Memory()
        self.config, self.clip, self.tokenizer, self.held_out = config, clip, tokenizer, held_out
        self.conditioner = TextConditioner(tokenizer, clip.model.text_model)
        self.contrast = ClipLoss(
            gather_with_grad=True,
            rank=accelerator.process_index if accelerator else 0,
            world_size=accelerator.num_processes if accelerator else 1,
        )

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of both towers and the scale, but for those that are given."""
        return {n: p for n, p in self.clip.named_parameters() if p.requires_grad}

    def example(self, n: int) -> dict[str, Tensor]:
        """A micro-batch of ``n`` pictures, without values."""
        side = self.config.images.size
        ids = torch.empty(n, self.conditioner.length, dtype=torch.int64)
        false = {"false_ids": torch.empty_like(ids)} if self.config.contraries else {}
        drawn = self.noised.example(n) if self.noised else {}
        return {"pixels": torch.empty(n, 3, side, side), "ids": ids, **false, **drawn}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` ``b``: that of the global batch, the same for every sample, and with contraries
        that of each caption beside its own, 0 where there is none.
        """
        seen = self.noised(batch["pixels"], batch)[0] if self.noised else batch["pixels"]
        ids = batch["ids"]
        told = torch.cat([ids, batch["false_ids"]]) if "false_ids" in batch else ids
        images, texts, scale = self.clip(seen, told)
        with torch.autocast(images.device.type, enabled=False):
            # The scale is capped at 100, as in the paper.
            images, texts, scale = images.float(), texts.float(), scale.float().clamp(max=100)
            true, false = texts[: len(ids)], texts[len(ids) :]
            loss = self.contrast(images, true, scale).expand(len(images))
            if len(false):
                known = (batch["false_ids"] != ids).any(1)
                nearer = (images * (false - true)).sum(1)
                loss = loss + self.config.contraries * softplus(scale * nearer) * known
        return {"loss": loss}

    @torch.no_grad()
    def validate(
        self, accelerator: Accelerator, folder: Path | None, images: int
    ) -> dict[str, float]:
        """Share of held-out first captions whose nearest held-out picture is their own; under noise
        the mean over the levels, and at each of them. With contraries ``told_apart``.
        """
        validation = self.config.validation
        if validation is None or not validation.images or not self.held_out:
            return {}
        chosen = evenly_spaced(self.held_out, validation.images)
        shown = track(chosen, "reading held-out pictures")
        pixels = torch.stack([to_pixels(self.config.images(i.load())) for i in shown])
        with unnamed():
            ids = self.conditioner.tokenize([i.caption(None) for i in chosen])
        device = accelerator.device
        texts = torch.cat([self.clip.text_features(x.to(device)) for x in ids.split(64)])
        levels = validation.levels if self.noised else 1
        found: dict[str, float] = {}
        for k in track(range(levels), "measuring held-out pictures", "levels"):
            pictures = []
            for at in range(0, len(pixels), 64):
                x = pixels[at : at + 64].to(device)
                if self.noised is not None:
                    numbers = range(at, at + len(x))
                    draws = default_collate(
                        [self.noised.held_out(validation.seed, n, k, levels) for n in numbers]
                    )
                    x, _ = self.noised(x, {name: d.to(device) for name, d in draws.items()})
                pictures.append(self.clip.image_features(x))
            rank = ranks(texts, torch.cat(pictures), torch.arange(len(chosen), device=device))
            for top in (1, 5):
                share, name = float((rank < top).double().mean()), f"held_out_top{top}"
                found[name] = found.get(name, 0.0) + share / levels
                if self.noised is not None:
                    found[f"{name}/{(k + 0.5) / levels:.2f}"] = share
        if self.config.contraries and self.noised is None:
            found |= self.told_apart(chosen, torch.cat(pictures))
        return found

    def told_apart(self, chosen: Sequence[Item], images: Tensor) -> dict[str, float]:
        """Share of held-out pictures, of those that have a contrary, whose features (``n p``) are
        nearer to their caption than to it.
        """
        seed = self.config.validation.seed
        known, true, false = [], [], []
        for n, item in enumerate(chosen):
            text = item.contrary(stream(seed, "caption", n))
            if text is not None:
                known.append(n)
                true.append(item.caption(stream(seed, "caption", n)))
                false.append(text)
        if not known:
            return {}
        fits = []
        for texts in (true, false):
            ids = self.conditioner.tokenize(texts).to(images.device)
            told = torch.cat([self.clip.text_features(some) for some in ids.split(64)])
            fits.append((images[known] * told).sum(1))
        return {"held_out_contraries": float((fits[0] > fits[1]).double().mean())}

    def save(self, folder: Path) -> None:
        """The two towers and the tokenizer, each as transformers reads it."""
        self.clip.save_text(folder / "text_encoder")
        self.clip.save_vision(folder / "image_encoder")
        save_tokenizer(self.tokenizer, folder / "tokenizer")

    def snapshot(self) -> None:
        """There is only ``save``, which makes networks, and so must not run beside a step: the
        generator of random numbers is one for all threads.
        """

    finish = save

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Weights of both towers."""
        clip = Clip.load(folder / "text_encoder", folder / "image_encoder")
        mine = self.trained()
        return {name: p for name, p in clip.named_parameters() if name in mine}


def _origin(
    config: ClipConfig, clip: Clip, tokenizer: CLIPTokenizer, noised: NoisyInput | None
) -> dict[str, Any]:
    """What is read from folders, by keys of a run's identity."""
    found: dict[str, Any] = {}
    if noised is not None or config.text is not None:
        key = "text.folder" if noised is None else "model.text"
        found = {key: digest(clip.model.text_model, settings_of(tokenizer))}
    if noised is not None:
        joint = digest(clip.model.text_projection, str(clip.model.logit_scale.item()))
        found |= {**noised.origin(), "model.text_projection": joint}
    return found
