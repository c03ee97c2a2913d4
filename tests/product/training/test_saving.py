"""Checkpoints are written beside the steps, and hold what they held when each was due."""

import errno
import shutil
import threading
import time

import pytest
import torch
from torch import nn

from launched import digests
from ldm.engine import state
from ldm.engine.metrics import Metrics
from ldm.models.on_host import on_host
from ldm.storage import checkpoint
from ldm.tasks.denoising import DenoisingTask
from programs import told
from runs import train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")

SETTINGS = {"duration": "3 steps", "checkpoints": {"every": "1 step", "keep": 9},
            "ema": {"half_life": ["16 images", "64 images"]}, "train": ["unet", "text_encoder"],
            "validation": {"every": "2 steps", "images": 2, "levels": 2}}  # fmt: skip


@pytest.mark.parametrize("adds", [{}, {"lora": {"rank": 2}, "train": ["unet"], "ema": None}])
def test_what_is_written_later_is_what_was_there(tmp_path, monkeypatch, adds):
    settings = SETTINGS | adds
    with monkeypatch.context() as patch:
        patch.setattr(DenoisingTask, "snapshot", lambda task: None)
        train(tmp_path / "waiting" / "run", **settings)
    went_on, threads, steps = threading.Event(), [], []
    forward, write_folder = DenoisingTask.forward, checkpoint.write_folder

    def counted(task, batch):
        steps.append(threading.current_thread())
        if len(steps) == 2:  # inside the second step, before it has ended
            went_on.set()
        return forward(task, batch)

    def slow(folder, write):
        threads.append(threading.current_thread())
        if len(threads) == 1:
            assert went_on.wait(60)  # nothing is written before the next step has begun
        write_folder(folder, write)

    monkeypatch.setattr(DenoisingTask, "forward", counted)
    monkeypatch.setattr(checkpoint, "write_folder", slow)
    train(tmp_path / "beside" / "run", **settings)
    assert {thread.name for thread in threads[:2]} == {"checkpoint"}
    assert {*threads[2:]} == {*steps} == {threading.main_thread()}  # the last, and the result
    for images in (16, 32, 48):
        name = f"run/checkpoints/{checkpoint.name_of(images)}"
        waiting = digests(tmp_path / "waiting" / name, at_least=3)
        assert digests(tmp_path / "beside" / name, at_least=3) == waiting, name
        assert checkpoint.problem(tmp_path / "beside" / name) is None


def test_a_full_disk_is_told_at_the_next_step_and_the_run_goes_on(tmp_path, command, monkeypatch):
    config = tree(tmp_path / "run", duration="4 steps", checkpoints={"every": "2 steps"})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "write", full)
        line = told(*command(config))
    assert line.startswith(f"checkpoint {checkpoint.name_of(32)} cannot be written in ")
    assert not checkpoint.folders(tmp_path / "run" / "checkpoints")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_what_ends_the_run_waits_to_say_where_it_goes_on_from(tmp_path, command, monkeypatch):
    run, failed = tmp_path / "run", threading.Event()
    write_folder, write = checkpoint.write_folder, Metrics.write

    def slow(folder, fill):
        assert failed.wait(60)  # it is not there yet when the disk is full
        time.sleep(0.1)
        write_folder(folder, fill)

    def full(metrics, **values):
        if values["images"] == 48:
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        write(metrics, **values)

    monkeypatch.setattr(checkpoint, "write_folder", slow)
    monkeypatch.setattr(Metrics, "write", full)
    line = told(*command(tree(run, duration="4 steps", checkpoints={"every": "2 steps"})))
    assert line.startswith("a line of metrics.jsonl cannot be written in ")
    assert line.endswith(f"goes on from {run}/checkpoints/{checkpoint.name_of(32)}")


def test_a_bug_in_the_thread_ends_the_run(tmp_path, monkeypatch):
    real, calls = state.write, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("a bug")
        real(*arguments)

    monkeypatch.setattr(state, "write", broken)
    with pytest.raises(KeyError, match="a bug"):
        train(tmp_path / "run", duration="4 steps", checkpoints={"every": "2 steps"})
    shutil.rmtree(tmp_path / "run")


def test_a_copy_on_the_host_is_of_now():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network[2].requires_grad_(False)
    network[0].compile(backend="eager")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    held = on_host(network)
    network(torch.randn(5, 3)).sum().backward()
    with torch.no_grad():
        for parameter in network[0].parameters():
            parameter.add_(1)
    assert held.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())
    assert held[2].weight is network[2].weight and held[0].weight is not network[0].weight
    assert [p.requires_grad for p in held.parameters()] == [
        p.requires_grad for p in network.parameters()
    ]
