"""A run folder that another run has, that goes away, or that there can never be."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from launched import locked
from ldm.engine.trainer import Trainer
from ldm.storage import checkpoint
from ldm.storage.lock import NAME
from programs import told
from runs import train, tree

SETTINGS = dict(duration="4 steps", checkpoints={"every": "2 steps", "keep": 2})


def test_two_runs_in_one_folder(command, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with locked(run) as other:
        message = told(*command(tree(run, **SETTINGS)))
    assert message == (
        f"run: {run} is in use by process {other} on {os.uname().nodename}: wait until that has"
        " ended, end it, or choose another folder"
    )
    assert [p.name for p in run.iterdir()] == [NAME]  # nothing of the other's was touched


def moved(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def replaced(run: Path) -> None:
    moved(run)
    run.mkdir()


def at_step(monkeypatch, number: int, action) -> None:
    real, calls = Trainer._gradient, []

    def gradient(*arguments):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*arguments)

    monkeypatch.setattr(Trainer, "_gradient", gradient)


@pytest.mark.parametrize("away", [shutil.rmtree, moved, replaced])
def test_a_run_folder_that_goes_away(command, monkeypatch, tmp_path, away):
    run = tmp_path / "run"

    def goes():
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # it is written beside the steps
                thread.join()
        assert (run / "checkpoints" / checkpoint.name_of(32)).is_dir()
        away(run)

    with monkeypatch.context() as patch:
        at_step(patch, 3, goes)
        message = told(*command(tree(run, **SETTINGS)))
    assert message == (
        f"run: {run} was removed, renamed or replaced while the run went on, and nothing is"
        " written elsewhere: put it back, and the same command goes on from"
        f" {run}/checkpoints/{checkpoint.name_of(32)}"
    )
    assert not run.exists() or not list(run.iterdir())
    if away is moved:
        moved_back = tmp_path / "elsewhere"
        moved_back.rename(run)
        assert command(tree(run, **SETTINGS))[0] == 0
        assert checkpoint.problem(run / "final") is None


def test_a_run_folder_that_goes_away_while_it_is_saved(command, monkeypatch, tmp_path):
    run, real = tmp_path / "run", checkpoint.write_folder

    def write_folder(folder, write):
        # At once: while it is emptied, the step beside may write into it.
        real(folder, lambda staging: (run.rename(tmp_path / "gone"), write(staging)))

    monkeypatch.setattr(checkpoint, "write_folder", write_folder)
    message = told(*command(tree(run, **SETTINGS)))
    assert message.startswith(f"run: {run} was removed, renamed or replaced")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, "cannot be a folder: File name too long"),
        ("/".join(["x" * 200] * 30), "cannot be a folder: File name too long"),
        ("a\0b", "cannot be a folder: embedded null byte"),
        ("/proc/a/run", "run: /proc/a/run cannot be made: No such file or directory"),
    ],
)
def test_run_folders_that_cannot_be(command, tmp_path, name, words):
    config = {**tree(tmp_path / "run", **SETTINGS), "run": str(tmp_path / name)}
    message = told(*command(config))
    assert message.startswith("run: ") and words in message and len(message) < 300


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x" * 5000, "data.path"),
        ("/".join(["x" * 200] * 30), "is no path: File name too long"),
        ("a\0b", "is no path: embedded null byte"),
        ("~nobody-of-that-name/x", "is no path: Could not determine home directory"),
        ("{0..999999999}.tar", "its braces spell out more than 1,000,000 files"),
    ],
)
@pytest.mark.parametrize("kind", [None, "webdataset", "folder"])
def test_data_that_cannot_be(command, tmp_path, kind, path, words):
    data = {"path": path} | ({"kind": kind} if kind else {})
    message = told(*command({**tree(tmp_path / "run"), "data": data}))
    if kind == "folder" and path.startswith("{"):
        words = "this folder does not exist"  # a folder's name may have braces
    assert words in message or "is no path: File name too long" in message
    assert len(message) < 300
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_without_locks_is_used_with_a_warning(own_cache, monkeypatch, tmp_path, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    train(tmp_path / "run", **SETTINGS)
    assert f"{tmp_path}/run: its file system has no locks" in caplog.text
