"""A source of many pictures: what a row costs in memory and in time once it is indexed.

``LDM_SCALE_ROWS=1000000 python -m pytest tests/product/data/test_scale.py --slow -s`` for a
million; the figures are printed. Linux only: resident memory is read from ``/proc``.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from launched import ENVIRONMENT
from ldm.data.tar import TarData
from ldm.models.tokenizer import save_tokenizer, train_tokenizer
from runs import tree

ROWS = int(os.environ.get("LDM_SCALE_ROWS", "100000"))
SHARD = 10_000
LOADS = 1000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]


def header(name: str, size: int) -> bytes:
    """A ustar header; ``tarfile`` needs minutes for two million of them."""
    fields = (
        name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size
        + b"0" * 11 + b"\0" + b" " * 8 + b"0" + b"\0" * 100 + b"ustar\x0000"
    ).ljust(512, b"\0")  # fmt: skip
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def write(folder: Path, rows: int) -> None:
    """Tars of ``rows`` samples with one of 64 pictures each and a caption of its own."""
    blocks = []
    for n in range(64):
        buffer = io.BytesIO()
        Image.new("RGB", (2, 2), (4 * n, 9, 9)).save(buffer, "BMP")
        blocks.append(buffer.getvalue())
    folder.mkdir()
    for first in range(0, rows, SHARD):
        with open(folder / f"{first // SHARD:04d}.tar", "wb") as file:
            for n in range(first, min(first + SHARD, rows)):
                text = f"a photograph of thing number {n}, in the style of number {n % 97}".encode()
                for suffix, data in (("bmp", blocks[n % 64]), ("txt", text)):
                    file.write(header(f"{n:09d}.{suffix}", len(data)))
                    file.write(data + b"\0" * (-len(data) % 512))
            file.write(bytes(1024))


PROBE = """
import json, sys, time
from pathlib import Path
import numpy as np
from ldm.data.tar import TarData

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

path, loads = sys.argv[1], int(sys.argv[2])
anon, resident, start = memory("RssAnon"), memory("VmRSS"), time.perf_counter()
source = TarData(path=path)
found = {"rows": len(source.examples), "open": time.perf_counter() - start}
start = time.perf_counter()
found["held"] = int(source.held_out.sum())
assert source.sizes.shape == (found["rows"], 2) and not source.problems
found["columns"] = time.perf_counter() - start
start = time.perf_counter()
for n in np.random.default_rng(0).integers(found["rows"], size=loads):
    assert source.load(int(n)).size == (2, 2) and source.examples[int(n)].captions
found["loads"] = time.perf_counter() - start
found["anon"], found["resident"] = memory("RssAnon") - anon, memory("VmRSS") - resident
print(json.dumps(found))
"""


def probe(path: Path, cache: Path) -> dict[str, float]:
    """Growth of memory and seconds in a fresh process, with the index there."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(path), str(LOADS)],
        env={**os.environ, "LDM_CACHE": str(cache)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout)


def test_memory_and_time_of_many_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    found = {}
    for rows in (1000, ROWS):
        start = time.perf_counter()
        write(tmp_path / f"{rows}", rows)
        written = time.perf_counter()
        assert len(TarData(path=str(tmp_path / f"{rows}")).examples) == rows
        indexed = time.perf_counter()
        found[rows] = probe(tmp_path / f"{rows}", tmp_path / "cache")
        times = f"written {written - start:.1f} s, indexed {indexed - written:.1f} s;"
        figures = " ".join(f"{key} {value:.6g}" for key, value in found[rows].items())
        with capsys.disabled():
            print(f"\n{rows} rows: {times} {figures}")
    few, many = found[1000], found[ROWS]
    more = ROWS - 1000
    assert (many["anon"] - few["anon"]) / more < 150  # bytes a row that are the process's own
    assert (many["resident"] - few["resident"]) / more < 450  # mapped pages of the index included
    assert many["open"] + many["columns"] < 1 + 1e-5 * ROWS  # 10 s for a million


# -- a training over them: each row has a caption of its own, and one of 64 pictures --

MEBIBYTE = 2**20
WORDS = "a photograph of thing number"


# What an entry of a cache holds does not matter to what is measured, and takes long to make.
FILLED = """
from ldm.models.conditioner import TextConditioner

encode = TextConditioner.encode

def one(self, texts):
    return encode(self, [""]).map(lambda x: x.expand(len(texts), *x.shape[1:]).clone())

TextConditioner.encode = one
"""
CACHE = """
from ldm.cli import app

app()
"""
TRAINING = """
import json, sys, time
from pathlib import Path
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.tasks.denoising import DenoisingTask
from ldm.tasks.text_to_image import train
from runs import accelerator

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def told():
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time(),
            "anon": memory("RssAnon"), "resident": memory("VmHWM")}

found, forward = {}, DenoisingTask.forward

def first(task, batch):
    found.setdefault("first", told())
    return forward(task, batch)

DenoisingTask.forward = first
start = time.perf_counter()
found["begin"] = told()
train(validate(TrainConfig, json.loads(Path(sys.argv[1]).read_text())), accelerator())
found["end"] = told()
print(json.dumps(found))
"""


def python(*arguments: str | Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout


def config(root: Path, data: Path, batch: int) -> Path:
    """A run of few steps, whose text encoder is as small as it can be."""
    text = {"tokenizer": str(root / "words"), "max_length": 8, "hidden_size": 8}
    text |= {"intermediate_size": 16, "heads": 1, "vocab_size": 600}
    run = root / "run"
    shutil.rmtree(run, ignore_errors=True)
    settings = dict(text=text, data={"path": str(data)}, batch_size=batch, duration="5 steps")
    file = root / "config.json"
    file.write_text(json.dumps(tree(run, **settings, micro_batch_size=batch)))
    return file


@pytest.mark.parametrize("kind", ["ordinary", "cached"])
def test_memory_and_first_batch(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(tmp_path / "cache"))
    save_tokenizer(train_tokenizer([WORDS] * 2, 600, 8), tmp_path / "words")
    found = {}
    for rows in (1000, ROWS):
        data = tmp_path / f"{rows}"
        write(data, rows)
        made = config(tmp_path, data, 1024)  # large batches, to be done soon
        if kind == "cached":
            data = tmp_path / f"set-{rows}"
            python("-c", FILLED + CACHE, "data", "cache", "--config", made, "--out", data)
            shutil.rmtree(tmp_path / "cache")
        else:
            python("-c", FILLED + TRAINING, made)
        found[rows] = json.loads(
            python("-c", TRAINING, config(tmp_path, data, 16)).splitlines()[-1]
        )
        with capsys.disabled():
            for when, figures in found[rows].items():
                shown = " ".join(f"{key} {value:.4g}" for key, value in figures.items())
                print(f"\n{kind} {rows} {when}: {shown}", end="")
    few, many = found[1000], found[ROWS]
    share = max(ROWS / 1_000_000, 0.2)  # with fewer what is measured is noise
    for key in ("anon", "resident"):
        assert many["end"][key] - few["end"][key] < 300 * MEBIBYTE * share
    # Of the program alone: the imports before it cost the same for any data.
    assert many["first"]["cpu"] - many["begin"]["cpu"] < 2 + 6 * share
