"""Cached sets (``ldm.data.cached``): making one, in any number of processes, and checking one.

What is made is found again after a kill: entries by their content, as in every cache. What the
whole depends on is written first, what it holds last, so that no half of a set is taken for one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ldm.config.loader import plain
from ldm.config.provenance import PACKAGES, versions, write_skipped
from ldm.config.schema import TrainConfig
from ldm.data.cached import FORMAT, MADE_WITH, MANIFEST, CachedData, texts, write_index
from ldm.data.collection import Collection
from ldm.data.items import Items, evenly_spaced
from ldm.encoding import long_captions
from ldm.encoding.cache_keys import CacheKeys, reading
from ldm.encoding.encoder import Encoder
from ldm.engine.hold import hold
from ldm.errors import ConfigError, DataError, RunError
from ldm.families import reads
from ldm.families.build import frozen_origin, frozen_parts
from ldm.models.clip import save_text_encoder
from ldm.models.codec import VaeCodec
from ldm.models.half_storage import halve
from ldm.models.strip_paths import strip_paths
from ldm.models.tokenizer import save_tokenizer
from ldm.progress import track
from ldm.storage.checkpoint import sha256
from ldm.storage.disk import write_text, writing
from ldm.storage.lock import NAME as LOCK
from ldm.storage.lock import Lock
from ldm.storage.tensor_cache import column_of, key_of
from ldm.tasks.frozen import described, fingerprints, of_texts, refuse_other
from ldm.tasks.program import collect

SAMPLE = 32  # pictures and captions that a check encodes again
TOLERANCE = 1e-3  # of numbers of size 1: another batch, another device add up in another order
_AGAIN = "the same command goes on with what is there already"


class Precompute:
    """Makes and checks the cached set of a config.

    Args:
        config: the run that is to be trained on it.
        folder: of the set.
        accelerator: the processes.

    Raises:
        ConfigError: the config cannot be cached, or the folder holds something else.
        DataError: the data cannot be used.
    """

    def __init__(self, config: TrainConfig, folder: Path, accelerator: Accelerator) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.held = CachedData(str(folder))
        _refuse(config)
        self.collection = collect(config, accelerator)
        if self.collection.epoch is None:
            raise ConfigError("data.streaming: a stream has no end and cannot be cached")
        for source in self.collection.sources:
            if len(source.examples) and source.captions(0) is None:
                raise ConfigError(
                    f"data.grammar.variants: captions of {source.name} vary endlessly, set how many"
                    " of each to draw and cache (of sd-scripts' data, data.variants)"
                )
        self.captions = self.collection.captions()
        both = self.collection.train, self.collection.held_out
        self._content = [self.collection.content(items) for items in both]
        self.family = reads.family(config)
        self.networks, self.tokenizers = frozen_parts(config, self.captions)
        for network in self.networks.values():
            network.requires_grad_(False).eval()  # the encoder brings each to the device
        self.conditioner = self.family.conditioner(self.networks, self.tokenizers)
        codec = VaeCodec(self.networks["vae"])
        self.encoder = Encoder(config, codec, self.conditioner, accelerator, folder)

    def build(self) -> bool:
        """Makes what is missing; returns whether anything was.

        Raises:
            ConfigError: the folder holds a set that was made with something else.
            DiskError: the disk takes no more.
        """
        made_with = json.loads(json.dumps(self._made_with()))
        self._refuse_folder(made_with)
        place = hold(self.folder, "--out", self.accelerator)
        if self._complete():
            return False
        self.accelerator.wait_for_everyone()
        with writing("the cached set", self.folder, _AGAIN):
            if self.accelerator.is_main_process:
                self._begin(made_with)
            self.accelerator.wait_for_everyone()
            self._halve()
            collection, content = self.collection, self._content
            self.encoder.cache_latents(collection.train, content[0])
            self.encoder.cache_text(self.captions, content[0])
            # Apart, and last: batches of training pictures are those of a run without a set.
            self.encoder.cache_latents(collection.held_out, content[1])
            held_out = sorted({item.caption(None) for item in collection.held_out})
            self.encoder.cache_text(held_out, content[1])
            self._finish(place)
        self.held = CachedData(str(self.folder))
        return True

    def _made_with(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "images": plain(self.config.images),
            "described": described(self.config),
            "fingerprints": fingerprints(self.family, self.networks, self.tokenizers),
            "origin": frozen_origin(self.family, self.networks, self.tokenizers),
            "pillow": PIL.__version__,
            "cache_dtype": self.config.cache_dtype,
            "cache_precision": self.config.cache_precision,
            "frozen": of_texts(self.config),
            "prompts": reading(self.config),
        }

    def _halve(self) -> None:
        """What encodes is held as ``frozen`` says; what a set keeps of it is not."""
        half = of_texts(self.config) == "bfloat16"
        for tower in self.family.present(self.networks) if half else ():
            halve(self.networks[tower.part])

    def _refuse_folder(self, made_with: dict[str, Any]) -> None:
        if not self.folder.exists() or {file.name for file in self.folder.iterdir()} <= {LOCK}:
            return
        other = f"choose another --out, or remove {self.folder}"
        if not (self.folder / MADE_WITH).is_file():
            raise ConfigError(f"--out {self.folder}: it holds something else, {other}")
        dtypes = ("cache_dtype", "cache_precision", "frozen")
        for name in ("format", "images", "fingerprints", "pillow", *dtypes, "prompts"):
            # Sets of before these keys are of float32.
            was = self.held.made_with.get(name, "float32" if name in dtypes else None)
            now = made_with[name]
            if isinstance(was, dict) and isinstance(
                now, dict
            ):  # a key that an older set does not know is at None
                key = next((key for key in {**was, **now} if was.get(key) != now.get(key)), None)
                if key is None:
                    continue
                name = key if name == "fingerprints" else f"{name}.{key}"
            elif was == now:
                continue
            raise ConfigError(f"--out {self.folder}: its set was made with another {name}, {other}")

    def _complete(self) -> bool:
        """Whether nothing is missing, for all processes."""
        try:
            complete = self.held.manifest["content"] == self._content
        except DataError:
            complete = False
        mine = torch.tensor([complete], dtype=torch.float64, device=self.accelerator.device)
        return bool(self.accelerator.gather(mine).all())

    def _begin(self, made_with: dict[str, Any]) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MADE_WITH).is_file():
            write_text(folder / MADE_WITH, json.dumps(made_with, indent=1))
        (folder / MANIFEST).unlink(missing_ok=True)  # from now on it is not complete
        for left in folder.rglob(".*.partial"):  # of a build that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        _write(folder / "vae", self.networks["vae"].save_pretrained)
        for tower in self.family.present(self.networks):
            network, words = self.networks[tower.part], self.tokenizers[tower.words]
            _write(folder / tower.part, partial(save_text_encoder, network))
            _write(folder / tower.words, partial(save_tokenizer, words))

    def _finish(self, place: Lock | None) -> None:
        """Index and manifest; every process hashes its part of the files."""
        accelerator, collection = self.accelerator, self.collection
        if accelerator.is_main_process:
            write_skipped(self.folder, collection.skipped)
            long_captions.tell(self.folder, collection.sources, self.encoder.conditioner)
            for number, source in enumerate(collection.sources):
                write_index(self.folder / _index(number), source, *_rows_of(collection, number))
        accelerator.wait_for_everyone()
        hashes = dict(self._hashes(_files(self.folder)))
        if place and place.gone():
            raise RunError(f"--out: {self.folder} was removed, renamed or replaced meanwhile")
        if accelerator.is_main_process:
            manifest = {
                "sources": [
                    {"name": source.name, "weight": source.weight, "index": _index(number)}
                    for number, source in enumerate(collection.sources)
                ],
                "pictures": {"train": len(collection.train), "held_out": len(collection.held_out)},
                "content": self._content,
                "data": plain(self.config.data),
                "packages": versions(PACKAGES),
                "sha256": hashes,
            }
            write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        accelerator.wait_for_everyone()

    def _hashes(self, names: Sequence[str]) -> list[tuple[str, str]]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        some = track(names[rank::world], f"hashing {self.folder}", "files")
        mine = [(name, sha256(self.folder / name)) for name in some]
        return sorted(gather_object(mine))

    # -- checking --

    def problems(self) -> Iterator[str]:
        """What is wrong with the set, a line each: every file is read, every entry looked for, and
        a sample made again.
        """
        try:
            manifest = self.held.manifest
            refuse_other(self.config, self.held)
        except (DataError, ConfigError) as error:
            yield str(error)
            return
        if manifest["content"] != self._content:
            yield "the pictures or captions of the config have changed since it was made"
        broken = False
        for name, digest in self._hashes(list(manifest["sha256"])):
            if digest != manifest["sha256"][name]:
                broken = True
                yield (
                    f"{name} is not what was written (its SHA-256 differs): remove it, and what was"
                    " in it is made again"
                )
        if not broken:
            yield from self._entries()

    def _entries(self) -> Iterator[str]:
        held = Collection(self.held, self.config.images)
        self._halve()
        encoder, views = self.encoder, self.config.images.views
        encoder.prepare(held, ())
        assert encoder.text
        sources = [held.train, held.held_out]
        for items in sources:
            for shape, numbers in items.by_shape():
                chosen = np.zeros(len(items), bool)
                chosen[numbers] = True
                wanted = CacheKeys(items.where(chosen).distinct(), views)
                if lacking := len(encoder.latents[shape].missing(wanted.keys())):
                    yield f"latents of {shape[0]}x{shape[1]}: {lacking} are missing"
        lacking = 0
        for cache in encoder.text.values():
            lacking += len(cache.missing(column_of(map(key_of, texts(held.sources)))))
        if lacking:
            yield f"text: {lacking} are missing"
        else:
            yield from self._sampled()

    def _sampled(self) -> Iterator[str]:
        """What is not made again as it is there; a sample by even spread."""
        encoder, collection = self.encoder, self.collection
        assert encoder.text
        for items in (collection.train, collection.held_out):
            for item in track(evenly_spaced(items, SAMPLE // 2), "encoding a sample again"):
                one = Items([item.source], *_alone(item))
                wanted = CacheKeys(one, self.config.images.views)
                for variant in range(len(wanted)):
                    stored = encoder.latents[item.shape][wanted.key(variant)]
                    if not _same(stored, encoder.encode_pictures(wanted, [variant])):
                        yield f"{item.example.key}: its latent is not what encoding it gives now"
        for caption in track(
            evenly_spaced(self.captions, SAMPLE), "encoding a sample again", "captions"
        ):
            for tower, cache in encoder.text.items():
                made = encoder.encode_captions(tower, [caption], [0])
                if not _same(cache[key_of(caption)], made):
                    yield f"{caption!r}: its embedding is not what encoding it gives now"


def _refuse(config: TrainConfig) -> None:
    """What a set cannot hold."""
    data = config.data if isinstance(config.data, tuple) else (config.data,)
    if any(isinstance(part, CachedData) for part in data):
        raise ConfigError("data: this is a cached set already, name what it is to be made from")
    if any(part.startswith("text_encoder") for part in config.learns):
        raise ConfigError(
            "train: what a text encoder that learns writes cannot be cached, leave it out"
        )
    if reads.pixels(config) or reads.classes(config) is not None:
        raise ConfigError(
            "vae, condition: a set holds latents and embeddings of text: others need no set"
        )
    if reads.family(config).picture_tower:
        raise ConfigError(
            "family: a set holds latents and embeddings of text, and no embeddings of pictures,"
            " which runs of this family cache by themselves"
        )
    if not config.images.deterministic:
        raise ConfigError(
            "images: a random crop, shift or background is another picture at every use and cannot"
            " be cached; set crop to center, or how many crops there are (images.crops: 5),"
            " and random_shift and random_background to 0"
        )


def _write(folder: Path, save: Callable[[Path], object]) -> None:
    """A part, unless it is there."""
    if folder.exists():
        return
    staging = folder.with_name(f".{folder.name}.partial")
    staging.mkdir()
    save(staging)
    strip_paths(staging)
    staging.rename(folder)


def _files(folder: Path) -> list[str]:
    """All of a set but its manifest and lock, sorted; notes of what caches cover are left out."""
    every = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in every)
    return [name for name in names if name not in (MANIFEST, LOCK) and "/covers-" not in name]


def _index(number: int) -> str:
    return f"source-{number:03d}.arrow"


def _rows_of(collection: Collection, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places in its source, shapes, and whether they are held out, of the items of source
    ``number``, in its order.
    """
    both = (collection.train, False), (collection.held_out, True)
    mine = [(items, items.source == number, out) for items, out in both]
    index = np.concatenate([items.index[chosen] for items, chosen, _ in mine])
    shapes = np.concatenate([items.shapes[chosen] for items, chosen, _ in mine])
    held_out = np.concatenate([np.full(chosen.sum(), out) for _, chosen, out in mine])
    order = np.argsort(index)
    return index[order], shapes[order], held_out[order]


def _alone(item: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros(1, np.int16), np.array([item.index]), np.array([item.shape], np.int32)


def _same(stored: dict[str, torch.Tensor], made: Any) -> bool:
    def near(value: torch.Tensor, again: torch.Tensor) -> bool:
        # Where both round to another neighbour there is a digit between them.
        rounded = 2 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0
        error = max(TOLERANCE, rounded)
        return torch.allclose(value.float(), again.cpu().float(), rtol=error, atol=error)

    return all(near(value, made[name][0]) for name, value in stored.items())
