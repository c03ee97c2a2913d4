"""Reading processes end with the loop that they read for, however it ends."""

import os
import signal
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, Dataset

from launched import ENVIRONMENT, TRAIN, launch, logged, steps, wait_for
from ldm.engine import workers
from ldm.engine.workers import ignore_signals, reading
from ldm.errors import RunError
from runs import tree


class Numbers(Dataset[int]):
    """One of them cannot be read, and another takes for ever."""

    def __init__(self, *, broken: int = -1, stuck: int = -1) -> None:
        self.broken, self.stuck = broken, stuck

    def __getitem__(self, number: int) -> int:
        if number == self.broken:
            raise KeyError(number)
        if number == self.stuck:
            time.sleep(1000)
        return number


def loader(numbers: Numbers) -> DataLoader[int]:
    batches = [[n] for n in range(40)]
    return DataLoader(numbers, batch_sampler=batches, num_workers=2, worker_init_fn=ignore_signals)


def test_all_is_read_and_they_end():
    with reading(loader(Numbers())) as batches:
        assert len(active_children()) == 2
        assert [int(batch) for batch in batches] == list(range(40))
    assert not active_children()


@pytest.mark.parametrize("numbers", [Numbers(), Numbers(broken=9)], ids=["here", "there"])
def test_an_error_ends_them(numbers):
    began = time.monotonic()
    with pytest.raises(KeyError) as kept:  # its traceback holds the loader
        with reading(loader(numbers)) as batches:
            for batch in batches:
                if int(batch) == 3:  # both have started
                    for reader in active_children():
                        os.kill(reader.pid, signal.SIGTERM)  # they do not hear
                if int(batch) == 7 and numbers.broken < 0:
                    raise KeyError
    assert kept.traceback and not active_children()
    assert time.monotonic() - began < 10


def test_one_that_is_stuck_is_killed(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    with reading(loader(Numbers(stuck=3))) as batches:
        assert int(next(batches)) == 0
    assert not active_children()


def test_one_that_hangs_ends_the_run_in_a_line(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setenv("LDM_TIMEOUT", "1")
    batches = [[n] for n in range(9)]
    began = time.monotonic()
    with pytest.raises(RunError) as error:
        with reading(workers.loader(Numbers(stuck=5), batches, 2)) as read:
            pids = [child.pid for child in active_children()]
            assert [int(next(read)) for _ in range(9)]
    assert str(error.value) == (
        f"rank 0: no batch came from the processes that read pictures ({pids[0]}, {pids[1]}) for 1"
        " seconds: one of them hangs, or the disk or network that it reads; the same command goes"
        " on from the newest checkpoint (LDM_TIMEOUT sets the seconds)"
    )
    assert time.monotonic() - began < 20 and not active_children()
    assert workers.loader(Numbers(), batches, 0).timeout == 0


def test_one_that_is_killed_ends_the_run_in_a_line():
    with pytest.raises(RunError) as error:
        with reading(loader(Numbers(stuck=5))) as batches:
            for batch in batches:
                if int(batch) == 4:
                    killed = sorted(active_children(), key=lambda child: child.name)[-1]
                    os.kill(killed.pid, signal.SIGKILL)
    told = str(error.value)
    assert told.startswith("rank 0: a process that reads pictures is gone, (pid")
    assert str(killed.pid) in told and "\n" not in told


def test_an_error_of_another_kind_is_left_alone():
    with pytest.raises(RuntimeError, match="^out of memory$") as error:
        with reading(loader(Numbers())):
            raise RuntimeError("out of memory")
    assert not isinstance(error.value, RunError)


def test_how_many_read(monkeypatch):
    class Draws:
        def __init__(self, one_reader: bool) -> None:
            self.one_reader = one_reader

    def many(asked: int | str, device: str, one_reader: bool = False) -> int:
        return workers.readers(asked, Draws(one_reader), torch.device(device))

    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert [many(asked, "cuda", True) for asked in (0, 3, "auto")] == [0, 3, 1]
    assert many("auto", "cpu") == 0 and many("auto", "cuda") == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert many("auto", "cuda") == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert many("auto", "cuda") == 1


def test_without_processes_there_is_nothing_to_end():
    with reading(DataLoader(Numbers(), batch_sampler=[[1], [2]])) as batches:
        assert [int(batch) for batch in batches] == [1, 2]


FAULTY = """
from ldm.engine.ema import Average
from runs import program

real = Average.update

def update(self, factor):
    real(self, factor)
    raise LookupError("a bug")

Average.update = update
program("train").main()
"""


SLOW = [pytest.param(end, marks=pytest.mark.slow) for end in ("over", "signal")]


@pytest.mark.parametrize("end", ["bug", *SLOW])
def test_a_run_with_readers_ends(tmp_path, monkeypatch, end):
    """Within seconds, leaving none behind; a traceback took for ever."""
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(tmp_path / "cache"))
    file, run, script = tmp_path / "config.yaml", tmp_path / "run", tmp_path / "faulty.py"
    length = "3 steps" if end == "over" else "1000 steps"
    plain = tree(run, duration=length, workers=2, cache_latents=False, cache_text=False)
    file.write_text(yaml.safe_dump(plain))
    script.write_text(FAULTY)
    process = launch(script if end == "bug" else TRAIN, "--config", file, start_new_session=True)
    wait_for(lambda: end == "bug" or steps(run) >= 3, process)
    if end == "signal":
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == {"over": 0, "bug": 1, "signal": 75}[end], output
    assert ("LookupError: a bug" in output) == (end == "bug")
    assert end != "over" or len(logged(run, "loss")) == 3
    assert not [pid for pid in Path("/proc").iterdir() if started_by(pid, process.pid)]


def started_by(process: Path, leader: int) -> bool:
    """Whether it runs in the session of ``leader``."""
    try:
        state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return False  # no process, or it ended meanwhile
    return int(session) == leader and state != "Z"
