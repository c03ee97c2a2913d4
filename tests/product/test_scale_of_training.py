"""A training over many pictures: what a row costs in memory, and how long it is to the first batch.

``LDM_SCALE_ROWS=1000000 python -m pytest tests/product/test_scale_of_training.py --slow -s`` for a
million (nearly all of the time is to index them once); the figures are printed. Linux only: memory
is read from ``/proc``. Each row has a caption of its own, and one of 64 pictures.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_scale import ROWS, write

from launched import ENVIRONMENT
from ldm.models.tokenizer import save_tokenizer, train_tokenizer
from runs import tree

MEBIBYTE = 2**20
WORDS = "a photograph of thing number"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]

# What an entry of a cache holds does not matter to what is measured, and takes long to make.
FILLED = """
from ldm.models.conditioner import ClipConditioner

encode = ClipConditioner.encode

def one(self, texts):
    return encode(self, [""]).map(lambda x: x.expand(len(texts), *x.shape[1:]).clone())

ClipConditioner.encode = one
"""
CACHE = """
from ldm.cli import app

app()
"""
PROBE = """
import json, sys, time
from pathlib import Path
from ldm.engine.config import validate
from ldm.engine.schema import TrainConfig
from ldm.engine.text_to_image import TextToImageTask
from runs import accelerator, program

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def told():
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time(),
            "anon": memory("RssAnon"), "resident": memory("VmHWM")}

train, found, forward = program("train").train, {}, TextToImageTask.forward

def first(task, batch):
    found.setdefault("first", told())
    return forward(task, batch)

TextToImageTask.forward = first
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
            python("-c", FILLED + PROBE, made)
        found[rows] = json.loads(python("-c", PROBE, config(tmp_path, data, 16)).splitlines()[-1])
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
