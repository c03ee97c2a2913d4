"""Trackers show what metrics.jsonl says, over images, and the file stays the truth."""

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launched import logged
from programs import told
from runs import tree

PROMPTS = {"every": "4 steps", "images": 4, "levels": 2, "steps": 2, "prompts": ["a red circle"]}


def settings(run: Path, *trackers: str, **changes) -> dict:
    every = {"every": "4 steps", "keep": 9}
    return tree(run, trackers=list(trackers), checkpoints=every, validation=PROMPTS, **changes)


def shown(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def same_as_the_file(run: Path) -> list[int]:
    """Holds every number of metrics.jsonl against the event files; returns the images of losses."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = shown(run)
    names = {name for line in lines for name in line if is_number(line[name])} - {"images", "step"}
    assert set(events.Tags()["scalars"]) == names >= {"loss", "learning_rate", "held_out_loss"}
    for name in names:
        found = [(event.step, np.float32(event.value)) for event in events.Scalars(name)]
        assert found == [(line["images"], np.float32(line[name])) for line in lines if name in line]
    return [line["images"] for line in lines if "loss" in line]


def test_tensorboard_shows_what_the_file_says(command, tmp_path):
    run = tmp_path / "run"
    status, output = command(settings(run, "tensorboard", duration="8 steps"))
    assert status == 0, output
    assert same_as_the_file(run) == list(range(16, 129, 16))
    pictures = shown(run).Images("samples")
    assert [picture.step for picture in pictures] == [64, 128]
    assert (run / "samples" / f"images-{128:012d}.png").is_file()


def test_what_lies_behind_the_checkpoint_is_left_out(command, monkeypatch, tmp_path):
    """A run that is killed after its checkpoint has told more than the one that goes on knows."""
    from ldm.engine.trainer import Trainer

    run = tmp_path / "run"
    log, killed = Trainer._log, RuntimeError("killed")

    def last(self, *arguments):
        note = log(self, *arguments)
        if self.seen == 112:
            raise killed
        return note

    config = settings(run, "tensorboard", duration="9 steps")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", last)
        assert command(config)[0] == 1
    assert same_as_the_file(run)[-1] == 112
    config = settings(run, "tensorboard", duration="6 steps")  # now less than was told
    status, output = command(config)
    assert status == 0, output
    assert same_as_the_file(run) == list(range(16, 97, 16))


def test_a_tracker_that_is_not_installed(command, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "wandb" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    message = told(*command(settings(tmp_path / "run", "tensorboard", "wandb")))
    assert message == (
        "trackers: wandb is not installed: pip install wandb, or leave wandb out of trackers"
    )
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_tracker_that_is_not_known(command, tmp_path):
    message = told(*command(settings(tmp_path / "run", "tensorbord")))
    assert "key 'trackers.0' is 'tensorbord'" in message and "'tensorboard'" in message


def test_other_trackers_are_the_same_run(command, tmp_path):
    run = tmp_path / "run"
    assert command(settings(run, duration="4 steps"))[0] == 0
    status, output = command(settings(run, "tensorboard", duration="8 steps"))
    assert status == 0, output
    assert [event.step for event in shown(run).Scalars("loss")] == [80, 96, 112, 128]


def records(file: Path) -> Iterator[bytes]:
    """What a .wandb file holds: LevelDB's log format behind a header of 7 bytes."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def offline(run: Path) -> list[dict]:
    """What wandb kept of each start of the run: its id, and its losses and pictures by images."""
    from wandb.proto import wandb_internal_pb2

    starts = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        found = {"losses": {}, "pictures": []}
        for record in map(wandb_internal_pb2.Record.FromString, records(file)):
            if record.WhichOneof("record_type") == "run":
                found |= {"id": record.run.run_id, "project": record.run.project}
            row = {".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if "loss" in row:
                found["losses"][int(row["_step"])] = float(row["loss"])
            if any(name.startswith("samples") for name in row):
                found["pictures"].append(int(row["_step"]))
        starts.append(found)
    return starts


@pytest.mark.slow
def test_wandb_without_a_network(command, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the settings of the first run of a process
    for name, value in {"MODE": "offline", "SILENT": "true", "PROJECT": "mine"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for folder in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / folder))
    run = tmp_path / "run"
    for duration in ("4 steps", "8 steps"):
        status, output = command(settings(run, "wandb", duration=duration))
        assert status == 0, output
    wandb.teardown()  # its own process writes the last row when it ends
    first, second = offline(run)
    assert first["id"] == second["id"] == json.loads((run / "wandb.json").read_text())["id"]
    assert first["project"] == "mine"
    losses = dict(zip(range(16, 129, 16), logged(run, "loss"), strict=True))
    assert {**first["losses"], **second["losses"]} == losses
    assert list(second["losses"]) == [80, 96, 112, 128]
    assert (first["pictures"], second["pictures"]) == ([64], [128])


@pytest.mark.slow
def test_wandb_without_a_key_is_one_line(command, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    message = told(*command(settings(tmp_path / "run", "wandb")))
    assert message.startswith("trackers: wandb cannot start: ")
    assert "WANDB_MODE=offline" in message
