"""Twenty times ``kill -9``, at any moment, and the run of two processes ends in the same bits."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from launched import ENVIRONMENT, digests, finish, losses, start, steps
from ldm.engine import checkpoint
from runs import tree

BATCH, STEPS, KILLS = 16, 100, 20


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


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(tmp_path / "cache"))
    settings = dict(
        duration=f"{STEPS} steps",
        checkpoints={"every": "3 steps", "keep": 2},
        validation={"every": "10 steps", "images": 3, "levels": 2},
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(tree(whole, **settings), tmp_path / "uninterrupted", processes=2))
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(tmp_path / "another-cache"))

    draw = random.Random(11)
    # A quarter of the kills falls some time after the start: while it reads, caches or goes on.
    late = sorted(draw.sample(range(1, STEPS - 10), KILLS - KILLS // 4))
    moments = [(None, draw.uniform(1, 8)) for _ in range(KILLS // 4)]
    moments += [(step, draw.uniform(0, 0.15)) for step in late]
    draw.shuffle(moments)
    aims = iter(late)
    moments = [(next(aims) if step else None, delay) for step, delay in moments]

    resumed, records, where = 0, [], []
    for number, (step, delay) in enumerate(moments):
        record = tmp_path / f"session-{number}"
        process = start(tree(run, **settings), record, processes=2)
        began, before = time.monotonic(), steps(run)
        while step is not None and not (record / "positions-1.txt").exists():
            assert process.poll() is None and time.monotonic() - began < 120, process.stdout.read()
            time.sleep(0.001)
        while step is not None and steps(run) < step:
            assert process.poll() is None and time.monotonic() - began < 120, process.stdout.read()
            time.sleep(0.001)
        time.sleep(delay)
        assert process.poll() is None, process.stdout.read()
        assert kill(record) >= 1
        process.wait()
        resumed += "going on from" in process.stdout.read()
        process.stdout.close()
        records.append(record)
        staging = any((run / "checkpoints").glob(".staging-*"))
        where.append(f"{before} -> {steps(run)} lines{', inside a save' * staging}")
    record = tmp_path / "last"
    output = finish(start(tree(run, **settings), record, processes=2))
    assert "going on from" in output
    records.append(record)
    print(*where, f"{resumed} went on before they were killed again", sep="\n")

    last = f"checkpoints/{checkpoint.name_of(STEPS * BATCH)}"
    assert checkpoint.problem(run / last) is None
    assert digests(run / last) == digests(whole / last)  # raw weights, average, optimiser
    assert losses(run) == losses(whole) and len(losses(run)) == STEPS
    assert not list((run / "checkpoints").glob(".staging-*"))
    for rank in (0, 1):
        assert consumed(records, rank) == positions(tmp_path / "uninterrupted", rank)
        assert len(consumed(records, rank)) == STEPS


def consumed(records: list[Path], rank: int) -> list[list[int]]:
    """What the result is made from: of each session what came before the start of the next."""
    effective: list[list[int]] = []
    for record in records:
        session = positions(record, rank)
        if session:
            effective = [batch for batch in effective if batch[0] < session[0][0]] + session
    return effective
