"""Images/s of CPU time that the loader gives: batches of cached latents and text with all draws.

    python tests/benchmarks/loader.py [--pictures 600] [--seconds 3] [--profile]

Real pictures, caches and plan; only the networks are stand-ins, whose moments and tokens are random
numbers of the shapes of Stable Diffusion 1 (tokens 77 x 768 and a pooled one), since no network
runs once the caches are made. With ``PYTHONPATH`` it measures another tree: where both print the
same hash, their batches are equal to the bit.
"""

import argparse
import cProfile
import hashlib
import itertools
import os
import pstats
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

BATCH, HASHED = 64, 8  # images, batches


class Codec:
    """Eight pixels a cell, four channels, and noise for moments."""

    factor, channels, printed = 8, 4, ()

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)

    def shape(self, width, height):
        return 4, height // 8, width // 8

    def encode(self, pixels):
        from ldm.models.codec import Moments

        shape = len(pixels), *self.shape(*pixels.shape[:1:-1])
        return Moments(torch.randn(shape), torch.randn(shape))


class Tower:
    """77 tokens of 768 numbers, and a pooled one."""

    name, length, layer, pooled, printed, columns = "text_encoder", 77, None, None, ("",), 77

    def __init__(self) -> None:
        self.text_encoder = nn.Linear(1, 1)

    def counts(self, texts):
        return [1] * len(texts)

    def encode(self, texts):
        from ldm.diffusion import Condition

        n = len(texts)
        return Condition(torch.randn(n, 77, 768), torch.ones(n, 77, dtype=torch.bool),
                         torch.randn(n, 768))  # fmt: skip


class Conditioner:
    """The one tower."""

    zeros = mutes = False

    def __init__(self) -> None:
        self.towers = {"text_encoder": Tower()}


def pictures(folder: Path, count: int) -> None:
    """Small pictures with captions of their own."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")


def draws(folder: Path, size: int, dtype: str):
    """The images of a run over ``folder`` whose caches are full."""
    from accelerate import Accelerator

    from ldm.config.loader import validate
    from ldm.config.schema import TrainConfig
    from ldm.data.collection import Collection
    from ldm.encoding.dataset import ImageDraws
    from ldm.encoding.encoder import Encoder

    plain = {
        "run": str(folder / "run"),
        "model": str(folder),
        "images": {"size": size, "flip": True},
        "data": {"path": str(folder / "pictures"), "held_out_fraction": 0.0},
        "batch_size": BATCH,
        "duration": "1 epochs",
        "precision": "float32",
        "validation": None,
        "cache_dtype": dtype,
    }
    config = validate(TrainConfig, plain)
    collection = Collection(config.data, config.images)
    torch.manual_seed(0)
    encoder = Encoder(config, Codec(), Conditioner(), Accelerator(cpu=True))
    encoder.prepare(collection, collection.captions())
    return ImageDraws(config, collection, encoder)


def digest(batches) -> str:
    """Hash of all tensors of some batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LDM_CACHE"] = str(Path(folder) / "cache")
        (Path(folder) / "pictures").mkdir()
        pictures(Path(folder) / "pictures", arguments.pictures)
        from ldm.engine.workers import loader

        for size, dtype in ((128, "float32"), (512, "float32"), (512, "bfloat16")):
            data = draws(Path(folder), size, dtype)
            sampler = ([*range(n, n + BATCH)] for n in itertools.count(0, BATCH))
            batches = iter(loader(data, sampler, 0))
            same = digest(itertools.islice(batches, HASHED))
            profile = cProfile.Profile(time.process_time)
            count, begin, clock = 0, time.process_time(), time.perf_counter()
            if arguments.profile:
                profile.enable()
            while time.process_time() - begin < arguments.seconds:
                next(batches)
                count += BATCH
            used, passed = time.process_time() - begin, time.perf_counter() - clock
            profile.disable()
            cells = size // 8
            print(
                f"latents 4 x {cells} x {cells}, text 77 x 768 {dtype}: {count / used:,.0f} images"
                f" a CPU second, {count / passed:,.0f} a second; batches {same}"
            )
            if arguments.profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(22)


if __name__ == "__main__":
    main()
