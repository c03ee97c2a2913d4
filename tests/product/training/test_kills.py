"""Ten times ``kill -9``, at any moment, and a run of two processes ends in the same bits: all
weights, and a LoRA.
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launched import ENVIRONMENT, digests, finish, losses, start, steps
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.data.plan import Plan
from ldm.storage import checkpoint
from runs import tree

BATCH, STEPS = 8, 40
SHAPES = [(32, 16), (16, 32), (24, 24)]


def kill(record: Path) -> int:
    """``kill -9`` of every process that was started for ``record``; returns how many there were."""
    killed = set()
    while found := {pid for pid in running(record) if pid not in killed}:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        killed |= found
    return len(killed)


def running(record: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(record) in (entry / "cmdline").read_text().split("\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def positions(record: Path, rank: int) -> list[list[int]]:
    """Of every micro-batch that a process consumed, also one that was killed."""
    file = record / f"positions-{rank}.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [[int(position) for position in line.split()] for line in lines]


def moments(record: Path, rank: int = 0) -> list[str]:
    file = record / f"moments-{rank}.txt"
    return file.read_text().splitlines() if file.exists() else []


def aims(draw: random.Random) -> list[tuple[str, int, float]]:
    """What a session is killed at, the how-manieth of it (or the step), and how many seconds later.

    The caches are filled first, and the result is written last: two kills each. One comes at any
    time of the start, four after a step, and one inside a save.
    """
    found = [("caching", draw.randint(1, 3), draw.uniform(0, 0.05)) for _ in range(2)]
    late = sorted(draw.sample(range(1, STEPS - 4), 6))
    kinds = ["start", "save", "step", "step", "step", "step"]
    draw.shuffle(kinds)
    for kind, step in zip(kinds, late, strict=True):
        delay = {"start": draw.uniform(1, 8), "save": draw.uniform(0, 0.1)}
        found.append((kind, step, delay.get(kind, draw.uniform(0, 0.15))))
    return found + [("result", 1, draw.uniform(0, 0.1)) for _ in range(2)]


def reached(kind: str, number: int, run: Path, record: Path) -> bool:
    if kind == "start":
        return True
    if kind == "step":
        return (record / "positions-1.txt").exists() and steps(run) >= number
    begun = {
        "caching": "begins caching",
        "save": "begins writing images-",
        "result": "begins writing final",
    }[kind]
    enough = kind != "save" or steps(run) >= number
    mine = [line for line in moments(record) if line.startswith(begun)]
    # Once more is begun than has ended: it is inside.
    inside = moments(record)[-1:] == mine[-1:] and bool(mine)
    return inside and enough and (kind == "save" or len(mine) >= number)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_killed_ten_times(tmp_path, monkeypatch, lora):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(tmp_path / "cache"))
    pictures(tmp_path / "pictures")
    settings = dict(
        data={"path": str(tmp_path / "pictures"), "held_out_fraction": 0.1},
        images={"size": 24, "buckets": {"step": 8}},
        batch_size=BATCH,
        duration=f"{STEPS} steps",
        checkpoints={"every": "3 steps", "keep": 2},
        validation={"every": "10 steps", "images": 3, "levels": 2},
        lora=lora,
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(tree(whole, **settings), tmp_path / "uninterrupted", processes=2, fresh=True))
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(tmp_path / "another-cache"))

    resumed, records, told, inside = 0, [], [], Counter()
    for number, (kind, nth, delay) in enumerate(aims(random.Random(11))):
        record = tmp_path / f"session-{number}"
        process = start(tree(run, **settings), record, processes=2, fresh=True)
        began, before = time.monotonic(), steps(run)
        while not reached(kind, nth, run, record):
            assert process.poll() is None and time.monotonic() - began < 300, process.stdout.read()
            time.sleep(0.001)
        time.sleep(delay)
        assert process.poll() is None, process.stdout.read()
        assert kill(record) >= 1
        process.wait()
        resumed += "going on from" in process.stdout.read()
        process.stdout.close()
        records.append(record)
        last = (moments(record) or [""])[-1]
        inside[kind] += last.startswith("begins")
        told.append(f"{kind:>8}: {before} -> {steps(run)} lines, last it {last or 'started'}")
    record = tmp_path / "last"
    assert "going on from" in finish(start(tree(run, **settings), record, processes=2, fresh=True))
    records.append(record)
    print(*told, f"{resumed} went on before they were killed again", sep="\n")
    assert inside["caching"] and inside["save"] and inside["result"], told

    for last in (f"checkpoints/{checkpoint.name_of(STEPS * BATCH)}", "final"):
        assert checkpoint.problem(run / last) is None
        # Raw weights, average and optimiser, bit for bit.
        assert digests(run / last, at_least=1) == digests(whole / last, at_least=1)
    assert losses(run) == losses(whole) and len(losses(run)) == STEPS
    assert not list(run.rglob(".staging-*"))
    order = []
    for rank in (0, 1):
        mine = consumed(records, rank)
        assert mine == positions(tmp_path / "uninterrupted", rank) and len(mine) == STEPS
        order.append(mine)
    used_equally(tree(run, **settings), [a + b for a, b in zip(*order, strict=True)])


def pictures(folder: Path) -> None:
    """30 captioned pictures of three shapes."""
    folder.mkdir()
    drawn = np.random.default_rng(0)
    for n in range(30):
        width, height = SHAPES[n % 7 % 3]
        pixels = drawn.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")


def used_equally(plain: dict, batches: list[list[int]]) -> None:
    """After every step the use counts of two pictures of a bucket differ by at most one."""
    config = validate(TrainConfig, plain)
    items = Collection(config.data, config.images, config.on_bad_sample).train
    plan = Plan(items, config.batch_size, config.seed)
    buckets = {item.example.key: item.shape for item in items}
    counts = dict.fromkeys(buckets, 0)
    assert len(set(buckets.values())) == 3
    for batch in batches:
        for position in batch:
            counts[plan[position].example.key] += 1
        for shape in set(buckets.values()):
            mine = [counts[key] for key, one in buckets.items() if one == shape]
            assert max(mine) - min(mine) <= 1
    assert sum(counts.values()) == STEPS * BATCH and min(counts.values()) > 1


def consumed(records: list[Path], rank: int) -> list[list[int]]:
    """What the result is made from: of each session what came before the start of the next."""
    effective: list[list[int]] = []
    for record in records:
        session = positions(record, rank)
        if session:
            effective = [batch for batch in effective if batch[0] < session[0][0]] + session
    return effective
