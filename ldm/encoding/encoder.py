"""Pictures and captions on their way to the U-Net, with all that is random about each.

    item n = (moments or pixels, tokens or ids, posterior, noise, u)

Item n of ``LatentDraws`` holds all that is random about the n-th image of a run; what trains on it
only computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.data.images import View, coordinates, to_pixels
from ldm.data.items import Item, Items
from ldm.diffusion import Condition, normal, stratified, stream
from ldm.encoding import long_captions
from ldm.errors import DataError
from ldm.models.codec import Codec, Moments, VaeCodec
from ldm.models.conditioner import ClipConditioner, Conditioner, unnamed
from ldm.storage.cache_root import cache_root
from ldm.storage.tensor_cache import TensorCache, column_of, fingerprint, key_of

log = logging.getLogger(__name__)


@lru_cache(maxsize=8)
def _times(seed: int, batch: int, size: int) -> np.ndarray:
    return stratified(seed, "time", batch, size)


class Wanted:
    """Every (item, variant) whose latent is to be cached, by one number."""

    def __init__(self, items: Items, variants: int) -> None:
        self.items, self.variants = items, variants

    def __len__(self) -> int:
        return len(self.items) * self.variants

    def at(self, row: int) -> tuple[Item, int]:
        """Item and variant of number ``row``."""
        item, variant = divmod(row, self.variants)
        return self.items[item], variant

    def key(self, row: int) -> bytes:
        """The key of the moments of number ``row``, by its content."""
        item, variant = self.at(row)
        return latent_key(item, variant)

    def keys(self) -> np.ndarray:
        """All keys, S16."""
        return column_of(map(self.key, range(len(self))))


class Encoded:
    """Pictures and captions through the frozen networks, from a cache or straight.

    Args:
        config: whether to cache, and the image transform.
        codec: the frozen autoencoder; of a cached set its shape alone, on the meta device.
        conditioner: the text encoder, frozen or not; of a cached set its shape alone. Pixels and
            labels are not cached.
        accelerator: where the networks are, and which part of a cache this process makes.
        folder: of a cached set, which has all of its own; None: the caches are those of all runs of
            this machine.
    """

    def __init__(
        self,
        config: TrainConfig,
        codec: Codec,
        conditioner: Conditioner,
        accelerator: Accelerator,
        folder: Path | None = None,
    ) -> None:
        self.config, self.transform, self.codec = config, config.images, codec
        self.conditioner, self.accelerator, self.folder = conditioner, accelerator, folder
        self.batch = config.micro_batch_size or min(config.batch_size, 64)
        self.latents: dict[tuple[int, int], TensorCache] = {}  # by width and height
        self.text: TensorCache | None = None
        self.latents_cached = config.cache_latents and config.images.deterministic
        self.latents_cached &= isinstance(codec, VaeCodec)
        self.text_cached = config.cache_text and "text_encoder" not in config.learns
        self.text_cached &= isinstance(conditioner, ClipConditioner)
        self.listed = False  # captions that are too long, once and for all

    def prepare(self, collection: Collection, captions: Sequence[str]) -> None:
        """Fills the caches with what a run over ``collection`` and its ``captions`` will ask for,
        in all processes. A cached set has all of it.

        Raises:
            DataError: a shard of a cached set cannot be read.
        """
        if self.folder:
            self.text = self._text_cache(whole=True)
            for items in (collection.train, collection.held_out):
                for shape, _ in items.by_shape():
                    self.latents[shape] = self._latents_cache(shape, whole=True)
            return
        if not isinstance(self.conditioner, ClipConditioner):
            for text in [*captions, *(item.caption(None) for item in collection.held_out)]:
                self.caption(text)  # whether it says a class
        if collection.epoch is None:
            log.info("a stream is not encoded ahead: both encoders run at every step")
            self.latents_cached = self.text_cached = False
        elif isinstance(self.conditioner, ClipConditioner):
            self.listed = True
            if self.accelerator.is_main_process:
                long_captions.tell(Path(self.config.run), collection.sources, self.conditioner)
                if (validation := self.config.validation) and validation.prompts:
                    self.conditioner.tokenize(validation.prompts)  # names what it cuts
        if self.text_cached and collection.endless:
            log.warning(
                "captions vary endlessly, so the text encoder runs at every step: set"
                " data.grammar.variants to draw some of each once and cache them"
            )
            self.text_cached = False
        if self.latents_cached:
            self.cache_latents(collection.train, collection.content(collection.train))
        if self.text_cached:
            self.cache_text(captions, collection.content(collection.train))

    def cache_latents(self, items: Items, of: str) -> None:
        """Makes what is missing of the moments of ``items``, which are told by the hash ``of``."""
        variants = self.transform.variants
        for shape, numbers in items.by_shape():
            cache = self.latents[shape] = self._latents_cache(shape)
            chosen = np.zeros(len(items), bool)
            chosen[numbers] = True

            def make(
                chosen: np.ndarray = chosen,
                cache: TensorCache = cache,
                shape: tuple[int, int] = shape,
            ) -> None:
                wanted = Wanted(items.where(chosen).distinct(), variants)
                keys = wanted.keys()
                what = f"latents of {shape[0]}x{shape[1]}"
                self._build(cache, keys, partial(self.encode_pictures, wanted), what, "images")

            self._unless_there(cache, fingerprint(of, variants), make)

    def cache_text(self, captions: Sequence[str], of: str) -> None:
        """Makes what is missing of the embeddings of ``captions``, which are told by the hash
        ``of``.
        """
        cache = self.text = self._text_cache()

        def make() -> None:
            keys = column_of(map(key_of, captions))
            self._build(cache, keys, partial(self.encode_captions, captions), "text", "captions")

        self._unless_there(cache, fingerprint(of), make)

    def _latents_cache(self, shape: tuple[int, int], *, whole: bool = False) -> TensorCache:
        if self.folder:
            name = f"{shape[0]}x{shape[1]}"
            return TensorCache(self.folder / "latents", name, whole=whole)
        # What a view cannot change: a flip is a second entry, a bucket a space of its own.
        settings = (self.transform.background, PIL.__version__, "float32")
        space = fingerprint("moments", settings, shape, self._codec_print)
        return TensorCache(cache_root() / "latents", space)

    def _text_cache(self, *, whole: bool = False) -> TensorCache:
        if self.folder:
            return TensorCache(self.folder, "text", whole=whole)
        assert isinstance(self.conditioner, ClipConditioner)
        space = fingerprint(
            "tokens", *self.conditioner.printed, self.conditioner.text_encoder, "float32"
        )
        return TensorCache(cache_root() / "text", space)

    @cached_property
    def _codec_print(self) -> str:
        assert isinstance(self.codec, VaeCodec)
        return fingerprint(self.codec.vae)

    def _unless_there(self, cache: TensorCache, of: str, make: Callable[[], None]) -> None:
        """``make`` unless all processes know that it was done before: then there is no need to go
        through a million rows to find nothing missing.
        """
        self.accelerator.wait_for_everyone()
        cache.refresh()
        there = torch.tensor([cache.covers(of)], dtype=torch.float64)
        if bool(self.accelerator.gather(there.to(self.accelerator.device)).all()):
            return
        make()
        if self.accelerator.is_main_process:
            cache.cover(of)

    def _build(
        self,
        cache: TensorCache,
        keys: np.ndarray,
        make: Callable[[Sequence[int]], Mapping[str, Tensor]],
        what: str,
        unit: str,
    ) -> None:
        accelerator = self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        cache.build(keys, make, what=what, unit=unit, batch=self.batch, rank=rank, world=world)
        accelerator.wait_for_everyone()
        cache.refresh()
        # Where another run removed or lost something meanwhile, each makes what it lacks.
        cache.build(keys, make, what=what, unit=unit, batch=self.batch)

    @torch.no_grad()
    def encode_pictures(self, wanted: Wanted, rows: Sequence[int]) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` of what ``rows`` are numbers of, each ``b c h w``."""
        seen = ((item, View(mirrored=bool(variant))) for item, variant in map(wanted.at, rows))
        x = torch.stack([self._pixels(item, view) for item, view in seen])
        return self.codec.encode(x.to(self.accelerator.device))._asdict()

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
        """``tokens``, ``mask`` and ``pooled`` of the captions that ``rows`` are numbers of."""
        with unnamed():
            cond = self.conditioner.encode([captions[row] for row in rows])
        assert cond.mask is not None and cond.pooled is not None
        return {"tokens": cond.tokens, "mask": cond.mask, "pooled": cond.pooled}

    def evaluated(self, items: Sequence[Item]) -> tuple[Moments, Condition]:
        """Moments and conditions of ``items`` of one shape as evaluation sees them."""
        captions, device = [item.caption(None) for item in items], self.accelerator.device
        if self.folder:
            both = zip(items, captions, strict=True)
            rows = [{**self.picture(i, View()), **self.caption(c)} for i, c in both]
            batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
            cond = Condition(batch["tokens"], batch["mask"], batch["pooled"])
            return Moments(batch["mean"], batch["logvar"]), cond
        x = torch.stack([self._pixels(item, View()) for item in items])
        with self._telling():
            return self.codec.encode(x.to(device)), self.conditioner.encode(captions).to(device)

    def _pixels(self, item: Item, view: View) -> Tensor:
        return to_pixels(self.transform(item.load(), view, item.shape))

    def picture(self, item: Item, view: View) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` of the latent, or ``pixels`` where latents are not cached."""
        if self.latents:
            return self.latents[item.shape][latent_key(item, int(view.mirrored))]
        return {"pixels": self._pixels(item, view)}

    def caption(self, text: str) -> dict[str, Tensor]:
        """``tokens``, ``mask`` and ``pooled``, or ``ids`` where text is not cached.

        Raises:
            DataError: the text says no class of a model of classes.
        """
        if self.text is not None:
            return self.text[key_of(text)]
        try:
            with self._telling():
                return {"ids": self.conditioner.tokenize([text])[0]}
        except ValueError as error:
            raise DataError(f"condition: the caption {error}") from None

    def _telling(self) -> AbstractContextManager[None]:
        """Where texts are cut that are listed already, unless they are a stream's."""
        return unnamed() if self.listed else nullcontext()

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
        return Condition(cond.tokens, cond.mask, cond.pooled, {**cond.extra, **extra})


def latent_key(item: Item, variant: int) -> bytes:
    """The key of the moments of a picture, by its content."""
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
