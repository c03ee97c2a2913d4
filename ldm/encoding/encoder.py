"""Pictures and captions through the frozen networks: from a cache, or straight."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.data.images import View, coordinates, to_pixels
from ldm.data.items import Item, Items
from ldm.diffusion import Condition
from ldm.encoding import long_captions
from ldm.encoding.asides import MADE, Asides, named
from ldm.encoding.cache_keys import CacheKeys, latent_key, pictures_space, reading
from ldm.encoding.filling import Filling, OfPictures
from ldm.errors import ConfigError, DataError
from ldm.families.text import text_key
from ldm.guidance.told import SCALE
from ldm.models.aside import Aside
from ldm.models.codec import Codec, Moments
from ldm.models.conditioner import Conditioner, silent, unnamed
from ldm.models.tf32 import exact
from ldm.prompts.windows import written
from ldm.storage.cache_root import cache_root
from ldm.storage.tensor_cache import TensorCache, column_of, fingerprint, key_of

log = logging.getLogger(__name__)


class Encoder:
    """Pictures and captions through the frozen networks, from a cache or straight.

    Args:
        config: whether to cache, and the image transform.
        codec: the frozen autoencoder; of a cached set its shape alone, on the meta device.
        conditioner: the text encoder, frozen or not; of a cached set its shape alone. Pixels and
            labels are not cached.
        accelerator: where the networks are, and which part of a cache this process makes; None:
            nothing is encoded, for ``example``.
        folder: of a cached set, which has all of its own; None: the caches are those of all runs of
            this machine.
        aside: what the network is told of the picture itself, if anything.
    """

    def __init__(
        self,
        config: TrainConfig,
        codec: Codec,
        conditioner: Conditioner,
        accelerator: Accelerator | None,
        folder: Path | None = None,
        aside: Aside | None = None,
    ) -> None:
        self.config, self.transform, self.codec = config, config.images, codec
        if reading(config):
            conditioner = written(conditioner, config.prompt_windows, config.prompt_syntax)
        self.conditioner, self.folder = conditioner, folder
        self._accelerator = accelerator
        self.batch = config.micro_batch_size or min(config.batch_size, 64)
        self.latents: dict[tuple[int, int], TensorCache] = {}  # by width and height
        self.text: dict[str, TensorCache] = {}  # by tower
        cached = config.cache_latents and config.images.deterministic
        self.latents_cached = cached and codec.network is not None
        if aside is not None:  # where pixels are at hand, arithmetic alone is no work
            made = codec.network is not None or aside.network is not None
            cached &= made and not aside.hinted
        self.asides = aside and Asides(aside, config.images, cached=cached)
        towers, dropout = conditioner.towers, config.text_dropout
        self.learning = [*towers] if config.textual_inversion else [*config.learns]
        self.text_cached = [t for t in towers if config.cache_text and t not in self.learning]
        if isinstance(dropout, tuple) and len(dropout) != len(towers):
            raise ConfigError(
                f"text_dropout: {len(dropout)} shares for {len(towers)} text encoders: give a"
                " number for all of them, or one for each"
            )
        self.dtype = getattr(torch, config.cache_dtype)
        self._computed = getattr(torch, config.cache_precision)
        self.listed = False  # captions that are too long, once and for all
        self._null: Condition | None = None

    @property
    def accelerator(self) -> Accelerator:
        """Where the networks are."""
        assert self._accelerator is not None
        return self._accelerator

    @property
    def _filling(self) -> Filling:
        return Filling(self.accelerator, self.batch)

    @property
    def unread(self) -> list[str]:
        """Folders of the frozen networks that no step reads, all that they say being cached."""
        if self.folder:
            return [self.codec.part, *self.conditioner.towers]
        seen = self.asides.unread if self.asides else []
        return [self.codec.part] * self.latents_cached + seen + self.text_cached

    def prepare(self, collection: Collection, captions: Sequence[str]) -> None:
        """Fills the caches with what a run over ``collection`` and its ``captions`` will ask for,
        in all processes. A cached set has all of it.

        Raises:
            DataError: a shard of a cached set cannot be read.
        """
        if self.folder:
            self.text = {t: self._text_cache(t, whole=True) for t in self.conditioner.towers}
            for items in (collection.train, collection.held_out):
                for shape, _ in items.by_shape():
                    self.latents[shape] = self._latents_cache(shape, whole=True)
            return
        if not self.conditioner.towers:
            for text in [*captions, *(item.caption(None) for item in collection.held_out)]:
                self.captions([text])  # whether it says a class
        if collection.epoch is None:
            log.info("a stream is not encoded ahead: both encoders run at every step")
            self.latents_cached, self.text_cached = False, []
            if self.asides:
                self.asides.cached = False
        elif self.conditioner.towers:
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
            self.text_cached = []
        if self.latents_cached:
            self.cache_latents(collection.train, collection.content(collection.train))
        if self.asides and self.asides.cached:
            self.cache_asides(collection.train, collection.content(collection.train))
        if self.text_cached:
            self.cache_text(captions, collection.content(collection.train))

    def cache_latents(self, items: Items, of: str) -> None:
        """Makes what is missing of the moments of ``items``, which are told by the hash ``of``."""
        latents = OfPictures(
            "latents",
            self.latents,
            self._latents_cache,
            self.encode_pictures,
            lambda: self.codec.network.to("cpu"),  # room for the next
        )
        self._filling.pictures(latents, items, self.transform.views, of)

    def cache_asides(self, items: Items, of: str) -> None:
        """The same of what the network is told of the pictures themselves."""
        assert self.asides is not None
        caches, opened = self.asides.caches, self.asides.cache
        asides = OfPictures("asides", caches, opened, self._make_asides)
        self._filling.pictures(asides, items, self.transform.views, of)

    def cache_text(self, captions: Sequence[str], of: str) -> None:
        """Makes what is missing of the embeddings of ``captions``, which are told by the hash
        ``of``.
        """
        for tower in self.text_cached:
            cache = self.text[tower] = self._text_cache(tower)

            def make(tower: str = tower, cache: TensorCache = cache) -> None:
                keys = column_of(map(key_of, captions))
                encode = partial(self.encode_captions, tower, captions)
                self._filling.build(cache, keys, encode, "text", "captions")
                self.conditioner.towers[tower].text_encoder.to("cpu")

            self._filling.unless_there(cache, fingerprint(of), make)

    def _latents_cache(self, shape: tuple[int, int], *, whole: bool = False) -> TensorCache:
        if self.folder:
            return TensorCache(self.folder / "latents", f"{shape[0]}x{shape[1]}", whole=whole)
        made_by, precision = self._codec_print, self.config.cache_precision
        space = pictures_space("moments", self.transform, shape, *made_by, precision=precision)
        return TensorCache(cache_root() / "latents", space)

    def _text_cache(self, name: str, *, whole: bool = False) -> TensorCache:
        if self.folder:
            return TensorCache(self.folder, text_key(name), whole=whole)
        tower = self.conditioner.towers[name]
        read = () if tower.layer is None else (tower.layer, tower.pooled)
        low = {self.config.cache_precision} - {"float32"}  # which older caches do not name
        how = (tower.text_encoder, *read, self.config.cache_dtype, *low)
        return TensorCache(cache_root() / "text", fingerprint("tokens", *tower.printed, *how))

    @cached_property
    def _codec_print(self) -> tuple[Any, ...]:
        return fingerprint(self.codec.network), *self.codec.printed

    def encode_pictures(self, wanted: CacheKeys, rows: Sequence[int]) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` of what ``rows`` are numbers of, each ``b c h w``."""
        x = self._seen(wanted, rows)
        self.codec.network.to(x.device)
        with exact(x.device.type, self._computed):
            moments = self.codec.encode(x)
        return {name: value.float() for name, value in moments._asdict().items()}

    def _make_asides(self, wanted: CacheKeys, rows: Sequence[int]) -> dict[str, Tensor]:
        assert self.asides is not None
        return self.asides.made(self._seen(wanted, rows))

    def _seen(self, wanted: CacheKeys, rows: Sequence[int]) -> Tensor:
        """Pixels ``b 3 h w`` of what ``rows`` are numbers of."""
        items, views = zip(*map(wanted.at, rows), strict=True)
        return self._pixels(items, views).to(self.accelerator.device)

    def encode_captions(
        self, tower: str, captions: Sequence[str], rows: Sequence[int]
    ) -> dict[str, Tensor]:
        """What ``tower`` says to the captions that ``rows`` are numbers of, by name."""
        reader = self.conditioner.towers[tower]
        reader.text_encoder.to(self.accelerator.device)
        with unnamed(), exact(self.accelerator.device.type, self._computed):
            said = reader.encode([captions[row] for row in rows])
        return said.to("cpu", self.dtype).tensors()

    def evaluated(
        self, items: Sequence[Item], seed: int = 0, numbers: Sequence[int] | None = None
    ) -> tuple[Moments, Condition]:
        """Moments and conditions of ``items`` of one shape as evaluation sees them; what is drawn
        for them is by ``seed`` and their ``numbers``.
        """
        captions, device = [item.caption(None) for item in items], self.accelerator.device
        seen = [coordinates(item.size, View(), item.shape) for item in items]
        told = {"coordinates": torch.tensor(seen, device=device)}
        if distil := self.config.distil:
            told[SCALE] = torch.full((len(items),), distil.middle, dtype=torch.float64).to(device)
        if self.folder:
            rows = self.pictures(items, [View()] * len(items)) | self.captions(captions)
            batch = {name: value.to(device) for name, value in rows.items()}
            return Moments(batch["mean"], batch["logvar"]), self.condition(batch | told)
        x = self._pixels(items, [View()] * len(items)).to(device)
        if self.asides:
            told |= self.asides.evaluated(x, items, seed, numbers or range(len(items)))
        with self._telling():
            cond = self.conditioner.encode(captions).to(device)
        cond = replace(cond, extra=cond.extra | told)
        return self.codec.encode(x), cond

    def _pixels(self, items: Sequence[Item], views: Sequence[View]) -> Tensor:
        seen = [self.transform(i.load(), v, i.shape) for i, v in zip(items, views, strict=True)]
        return to_pixels(torch.stack(seen))

    def pictures(self, items: Sequence[Item], views: Sequence[View]) -> dict[str, Tensor]:
        """Of ``items`` of one shape ``mean`` and ``logvar``, or ``pixels`` where those are not
        cached; and what is cached of what the network is told of them. ``b ...``.
        """
        asides, shape = self.asides.caches if self.asides else {}, items[0].shape
        keys = [*map(latent_key, items, views)] if self.latents or asides else []
        told = named(MADE, asides[shape].rows(keys)) if asides else {}
        told |= self.asides.beside(items, views) if self.asides else {}
        if self.latents:
            return {**self.latents[shape].rows(keys), **told}
        return {"pixels": self._pixels(items, views), **told}

    def captions(
        self, texts: Sequence[str], told: Sequence[Sequence[bool]] = ()
    ) -> dict[str, Tensor]:
        """What each text tower says to ``texts``, as ``TOWER.NAME``, or ``TOWER.ids`` where that is
        not cached; of a model of classes ``ids``. All ``b ...``.

        Args:
            texts: the captions.
            told: whether each tower is told each, ``b towers``, or the empty text; empty: all are.

        Raises:
            DataError: a text says no class of a model of classes.
        """
        towers, found = self.conditioner.towers, dict[str, Tensor]()
        shares = told or [[True] * max(1, len(towers))] * len(texts)
        heard = [
            [text if tells else "" for text, tells in zip(texts, column, strict=True)]
            for column in zip(*shares, strict=True)
        ]
        try:
            with self._telling():
                for name, mine in zip(towers, heard, strict=bool(towers)):
                    if name in self.text:
                        said = self.text[name].rows([key_of(text) for text in mine])
                    else:
                        said = {"ids": towers[name].tokenize(mine)}
                    found |= {f"{name}.{key}": value for key, value in said.items()}
                if not towers:
                    found["ids"] = self.conditioner.tokenize(heard[0])
        except ValueError as error:
            raise DataError(f"condition: the caption {error}") from None
        if self.conditioner.zeros or self.conditioner.mutes:
            tells = found["told"] = torch.tensor(shares)
            # Where all of those are told nothing it is "", from which guidance steers away.
            tells[~tells.any(1)] |= self.conditioner.mutes
        return found

    @torch.no_grad()
    def example(self, n: int) -> dict[str, Tensor]:
        """A batch of ``n`` images, squares of ``images.size``, as ``ImageDraws`` makes them, on the
        device of the networks and without values: what a step costs depends on nothing else.
        """
        side, towers = self.transform.size, self.conditioner.towers
        shape = self.codec.shape(side, side)
        held = self.folder is not None
        names = ("mean", "logvar") if held or self.latents_cached else ("pixels",)
        batch = {name: torch.empty(n, *shape) for name in (*names, "posterior", "noise")}
        if "pixels" in batch:
            batch["pixels"] = torch.empty(n, 3, side, side)
        for name, tower in towers.items():
            ids = torch.empty(1, tower.columns, dtype=torch.int64)
            said = {"ids": ids}
            if held or name in self.text_cached:
                here = tower.text_encoder.device
                said = tower.encode_ids(ids).to(here, self.dtype).tensors()
            batch |= {f"{name}.{k}": x.new_empty(n, *x.shape[1:]) for k, x in said.items()}
        if not towers:
            batch["ids"] = torch.empty(n, 1, dtype=torch.int64)
        if self.conditioner.zeros or self.conditioner.mutes:
            batch["told"] = torch.empty(n, len(towers), dtype=torch.bool)
        if self.config.distil:
            batch[SCALE] = torch.empty(n, dtype=torch.float64)
        batch |= self.asides.example(n) if self.asides else {}
        batch["coordinates"] = torch.empty(n, 6, dtype=torch.int64)
        batch["position"] = torch.empty(n, dtype=torch.int64)
        return batch | {"u": torch.empty(n, dtype=torch.float64)}

    def entries(self) -> tuple[int, int]:
        """Bytes that the caches keep of each picture and of each caption; of a cached set none are
        made.
        """
        one = {} if self.folder else self.example(1)
        stated = [x.nbytes for name, x in one.items() if name.startswith(("mean", "logvar", MADE))]
        told = [x.nbytes for name, x in one.items() if "." in name and ".ids" not in name]
        return sum(stated), sum(told)

    def _telling(self) -> AbstractContextManager[None]:
        """Where texts are cut that are listed already, unless they are a stream's."""
        return unnamed() if self.listed else nullcontext()

    def latent(self, batch: dict[str, Tensor]) -> Tensor:
        """What the denoiser sees of the pictures of ``batch``, ``b c h w``."""
        if "mean" in batch:
            moments = Moments(batch["mean"], batch["logvar"])
        else:
            # Frozen networks run in float32 also where autocast is on: cached or not, same latents.
            with exact(batch["pixels"].device.type):
                moments = self.codec.encode(batch["pixels"])
        return self.codec.sample(moments, batch["posterior"])

    def condition(self, batch: dict[str, Tensor]) -> Condition:
        """What the denoiser is told; gradients flow into text towers that learn."""
        told = {name: batch[name] for name in ("coordinates", SCALE) if name in batch}
        told |= self.asides.told(batch) if self.asides else {}
        cond = self._heard(batch)
        return replace(cond, extra=cond.extra | told)

    def null(self, cond: Condition) -> Condition:
        """What guidance steers away from, of length 1, of the texts alone; beside shapes alone it
        is one of ``cond``'s.

        Args:
            cond: of a batch.
        """
        if self._accelerator is None:
            return Condition.of({name: x[:1] for name, x in cond.tensors().items()})
        if self._null is None:
            row = self.captions([""], [[False] * max(1, len(self.conditioner.towers))])
            device = self.accelerator.device
            self._null = self._heard({name: x.to(device) for name, x in row.items()})
        return self._null

    def _heard(self, batch: dict[str, Tensor]) -> Condition:
        """What is said to the captions of ``batch``."""
        conditioner = self.conditioner
        if conditioner.towers:
            return conditioner.join([self._said(name, batch) for name in conditioner.towers])
        return conditioner.encode_ids(batch["ids"])

    def _said(self, name: str, batch: dict[str, Tensor]) -> Condition:
        """What a tower says to the captions of ``batch``."""
        towers, start = self.conditioner.towers, f"{name}."
        mine = {key.removeprefix(start): x for key, x in batch.items() if key.startswith(start)}
        if "ids" not in mine:
            said = Condition.of(mine).to(mine["tokens"].device, torch.float32)
        elif name in self.learning:
            said = towers[name].encode_ids(mine["ids"])
        else:
            with exact(mine["ids"].device.type):
                said = towers[name].encode_ids(mine["ids"])
        if "told" in batch:
            said = said.where(batch["told"][:, [*towers].index(name)], silent(said))
        return said
