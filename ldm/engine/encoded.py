"""Pictures and captions on their way to the U-Net, with all that is random about each.

    item n = (moments or pixels, tokens or ids, posterior, noise, u)

Item n of ``LatentDraws`` holds all that is random about the n-th image of a run; what trains on it
only computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import PIL
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.cache import TensorCache, fingerprint, key_of
from ldm.data.collection import Collection, Item, Items
from ldm.data.images import View, coordinates, to_pixels
from ldm.data.source import cache_root
from ldm.diffusion import Condition, normal, stratified, stream
from ldm.engine.learning import parts
from ldm.engine.schema import TrainConfig
from ldm.models.codec import Codec, Moments
from ldm.models.conditioner import ClipConditioner

log = logging.getLogger(__name__)


@lru_cache(maxsize=8)
def _times(seed: int, batch: int, size: int) -> np.ndarray:
    return stratified(seed, "time", batch, size)


class _Wanted:
    """Every (item, variant) whose latent is to be cached, by one number."""

    def __init__(self, items: Items, variants: int) -> None:
        self.items, self.variants = items, variants

    def at(self, row: int) -> tuple[Item, int]:
        item, variant = divmod(row, self.variants)
        return self.items[item], variant

    def __iter__(self) -> Iterator[tuple[Item, int]]:
        return map(self.at, range(len(self.items) * self.variants))


class Encoded:
    """Pictures and captions through the frozen networks, from a cache or straight.

    Args:
        config: whether to cache, and the image transform.
        codec: the frozen autoencoder.
        conditioner: the text encoder, frozen or not.
        accelerator: where the networks are, and which part of a cache this process makes.
    """

    def __init__(
        self,
        config: TrainConfig,
        codec: Codec,
        conditioner: ClipConditioner,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.transform, self.codec = config, config.images, codec
        self.conditioner, self.accelerator = conditioner, accelerator
        self.batch = config.micro_batch_size or min(config.batch_size, 64)
        self.latents: dict[tuple[int, int], TensorCache] = {}  # by width and height
        self.text: TensorCache | None = None
        self.latents_cached = config.cache_latents and config.images.deterministic
        self.text_cached = config.cache_text and "text_encoder" not in parts(config)

    def prepare(self, collection: Collection, captions: list[str]) -> None:
        """Fills the caches with what a run over ``collection`` and its ``captions`` will ask for,
        in all processes.
        """
        if collection.epoch is None:
            log.info("a stream is not encoded ahead: both encoders run at every step")
            self.latents_cached = self.text_cached = False
        if self.text_cached and collection.endless:
            log.warning(
                "captions vary endlessly, so the text encoder runs at every step: set"
                " data.grammar.variants to draw some of each once and cache them"
            )
            self.text_cached = False
        if self.latents_cached:
            self._prepare_latents(collection)
        if self.text_cached:
            self._prepare_text(captions)

    def _prepare_latents(self, collection: Collection) -> None:
        items = collection.train
        # What a view cannot change: a flip is a second entry, a bucket a space of its own.
        settings = (self.transform.background, PIL.__version__, "float32")
        weights = fingerprint(self.codec.vae)
        for shape in np.unique(items.shapes, axis=0).tolist():
            shape = (shape[0], shape[1])
            space = fingerprint("moments", settings, shape, weights)
            cache = self.latents[shape] = TensorCache(cache_root() / "latents", space)
            mine = items.where((items.shapes == shape).all(1))
            wanted = _Wanted(mine, self.transform.variants)
            keys = [_latent_key(item, variant) for item, variant in wanted]
            what = f"latents of {shape[0]}x{shape[1]}"
            self._build(cache, keys, partial(self._moments, wanted), what)

    def _prepare_text(self, captions: list[str]) -> None:
        conditioner, tokenizer = self.conditioner, self.conditioner.tokenizer
        tokenizer.backend_tokenizer.no_truncation()  # of the last call, no part of the tokenizer
        tokenizer.backend_tokenizer.no_padding()
        space = fingerprint(
            "tokens",
            tokenizer.backend_tokenizer.to_str(),
            (tokenizer.pad_token_id, conditioner.length),
            conditioner.text_encoder,
            "float32",
        )
        self.text = TensorCache(cache_root() / "text", space)
        self._build(
            self.text,
            [key_of(caption) for caption in captions],
            partial(self._texts, captions),
            "captions",
        )

    def _build(
        self,
        cache: TensorCache,
        keys: list[bytes],
        make: Callable[[Sequence[int]], Mapping[str, Tensor]],
        what: str,
    ) -> None:
        accelerator = self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        accelerator.wait_for_everyone()  # all must see the same entries missing
        cache.refresh()
        cache.build(keys, make, what=what, batch=self.batch, rank=rank, world=world)
        accelerator.wait_for_everyone()
        cache.refresh()
        # Where another run removed or lost something meanwhile, each makes what it lacks.
        cache.build(keys, make, what=what, batch=self.batch)

    @torch.no_grad()
    def _moments(self, wanted: _Wanted, rows: Sequence[int]) -> dict[str, Tensor]:
        seen = ((item, View(mirrored=bool(variant))) for item, variant in map(wanted.at, rows))
        x = torch.stack([self._pixels(item, view) for item, view in seen])
        return self.codec.encode(x.to(self.accelerator.device))._asdict()

    @torch.no_grad()
    def _texts(self, captions: list[str], rows: Sequence[int]) -> dict[str, Tensor]:
        cond = self.conditioner.encode([captions[row] for row in rows])
        assert cond.mask is not None and cond.pooled is not None
        return {"tokens": cond.tokens, "mask": cond.mask, "pooled": cond.pooled}

    def _pixels(self, item: Item, view: View) -> Tensor:
        return to_pixels(self.transform(item.load(), view, item.shape))

    def picture(self, item: Item, view: View) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` of the latent, or ``pixels`` where latents are not cached."""
        if self.latents:
            return self.latents[item.shape][_latent_key(item, int(view.mirrored))]
        return {"pixels": self._pixels(item, view)}

    def caption(self, text: str) -> dict[str, Tensor]:
        """``tokens``, ``mask`` and ``pooled``, or ``ids`` where text is not cached."""
        if self.text is not None:
            return self.text[key_of(text)]
        return {"ids": self.conditioner.tokenize([text])[0]}

    def latent(self, batch: dict[str, Tensor]) -> Tensor:
        """What the denoiser sees of the pictures of ``batch``, ``b c h w``."""
        if "mean" in batch:
            moments = Moments(batch["mean"], batch["logvar"])
        else:
            # Frozen networks run in float32 also where autocast is on: cached or not, same latents.
            with torch.no_grad(), torch.autocast(batch["pixels"].device.type, enabled=False):
                moments = self.codec.encode(batch["pixels"])
        return self.codec.sample(moments, batch["posterior"])

    def condition(self, batch: dict[str, Tensor], *, learns: bool) -> Condition:
        """What the denoiser is told; ``learns``: gradients flow into the text encoder."""
        extra = {"coordinates": batch["coordinates"]}
        if "tokens" in batch:
            return Condition(batch["tokens"], batch["mask"], batch["pooled"], extra)
        if learns:
            cond = self.conditioner.encode_ids(batch["ids"])
        else:
            with torch.no_grad(), torch.autocast(batch["ids"].device.type, enabled=False):
                cond = self.conditioner.encode_ids(batch["ids"])
        return Condition(cond.tokens, cond.mask, cond.pooled, extra)


def _latent_key(item: Item, variant: int) -> bytes:
    return key_of(item.digest(), str(variant))


class LatentDraws(Dataset[dict[str, Any]]):
    """Item n: the n-th image of the run with its caption, dropout, posterior, noise and time."""

    def __init__(self, config: TrainConfig, collection: Collection, encoded: Encoded) -> None:
        self.config, self.encoded = config, encoded
        self.plan = collection.plan(config.batch_size, config.seed, config.order.window)

    def item(self, position: int) -> Item:
        """The example that the image at ``position`` is made from."""
        return self.plan[position]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Tensors without a batch axis; every draw depends on (seed, position) alone.

        ``coordinates`` are those of ``ldm.data.images.coordinates``.
        """
        seed, batch, images = self.config.seed, self.config.batch_size, self.config.images
        item = self.item(position)
        if images.deterministic:
            variant = int(stream(seed, "flip", position).integers(images.variants))
            view = View(mirrored=bool(variant))
        else:
            view = images.view(stream(seed, "transform", position))
        caption = item.caption(stream(seed, "caption", position))
        if stream(seed, "text dropout", position).random() < self.config.text_dropout:
            caption = ""
        width, height = (side // self.encoded.codec.factor for side in item.shape)
        shape = (self.encoded.codec.channels, height, width)
        return {
            "position": position,
            **self.encoded.picture(item, view),
            **self.encoded.caption(caption),
            "coordinates": torch.tensor(coordinates(item.size, view, item.shape)),
            "posterior": normal(seed, "posterior", position, shape),
            "noise": normal(seed, "noise", position, shape),
            "u": _times(seed, position // batch, batch)[position % batch],
        }
