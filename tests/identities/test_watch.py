"""Who is at fault when a run of several processes stands still, and who tells it."""

import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from torch import distributed

from launched import ENVIRONMENT, free_port, launch, wait_for
from ldm.engine import watch
from ldm.engine.watch import Table, Word, patience
from ldm.errors import ConfigError


def words(*said: tuple[int, int, bool] | tuple[int, int, bool, str]) -> list[Word]:
    """Of processes by (beats, marks, inside, over)."""
    return [Word("host", 100 + rank, *word) for rank, word in enumerate(said)]


def test_a_process_that_does_not_answer_is_silent():
    table = Table()
    for second in range(10):
        table.take(words((second, 0, False), (min(second, 4), 0, False), (3, 0, False, "done")), 1)
    assert table.silence == [0, 5, 9]
    assert table.silent(4.5) == [1] and table.silent(5) == []
    assert table.hung(0) == []  # nobody is inside a step
    assert table.told([1]) == "rank 1 (process 101 on host)"
    assert table.told([0, 1, 2, 0, 1]).endswith("rank 0 (process 100 on host) and 1 more")


def test_a_process_that_is_behind_in_a_step_hangs():
    table = Table()
    for second in range(10):
        table.take(words((second, 7, True), (second, 6, True), (second, 7, True)), 1)
    assert table.hung(8) == [1] and table.hung(9) == [] and table.silent(0.5) == []
    # One that draws or fills a cache is waited for.
    table.take(words((11, 7, True), (11, 6, False), (11, 7, True)), 100)
    assert table.hung(8) == []
    table.take(words((12, 8, True), (12, 8, True), (12, 8, True)), 1)
    assert table.hung(8) == []
    table.take(words((13, 8, True), (13, 8, True), (13, 8, True)), 9)
    assert table.hung(8) == [0, 1, 2]


def test_a_process_that_failed():
    table = Table()
    for _ in range(5):
        table.take(words((1, 7, True), (2, 6, True, "failed")), 1)
    assert table.failed(3) == [1] and table.failed(4) == [] and table.hung(0) == []
    assert table.first([0]) is None  # it has told itself
    table.take(words((1, 7, True), (2, 6, True), (2, 6, True)), 1)
    assert table.first([0]) == 1 and table.first([1]) == 0 and table.first([0, 1, 2]) == 0


def test_seconds_that_a_step_may_take(monkeypatch):
    monkeypatch.delenv("LDM_TIMEOUT", raising=False)
    assert patience() == 1800
    monkeypatch.setenv("LDM_TIMEOUT", "2.5")
    assert patience() == 2.5
    for text in ("soon", "0", "-3", "nan", "inf"):
        monkeypatch.setenv("LDM_TIMEOUT", text)
        with pytest.raises(ConfigError, match="give a number of seconds"):
            patience()


def test_what_torchrun_shows_last(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    watch.leave_note("rank 1 is gone")
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "rank 1 is gone"
    assert abs(failure.timestamp - time.time()) < 60


@pytest.mark.parametrize(
    ("over", "rank", "agent", "hurries"),
    [
        ("done", 0, "True", True),
        ("done", 1, "False", True),
        ("done", 0, "False", False),  # which keeps the store
        ("failed", 1, "True", False),
    ],
)
def test_who_ends_without_waiting_for_the_others(monkeypatch, over, rank, agent, hurries):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    leaving, slept = watch.Watch(), []
    leaving.rank, leaving.interval, leaving._store = rank, 60.0, distributed.HashStore()

    def lost() -> str:
        raise RuntimeError

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        while leaving._hurry.is_set():  # until the other thread has seen it
            time.sleep(0.001)

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep))
    thread = threading.Thread(target=leaving._exchange, args=(rank + 1,), daemon=True)
    thread.start()
    while not leaving._rounds:
        time.sleep(0.001)
    before = leaving._rounds
    leaving.leave(over)
    assert json.loads(leaving._store.get(str(rank)))["over"] == over
    # Two rounds, of which the first may have begun before; or twice the seconds between two.
    assert (leaving._rounds > before + 1) == hurries
    assert len(slept) <= 4 if hurries else sum(slept) == 120
    monkeypatch.setattr(leaving.word, "sent", lost)
    leaving._hurry.set()
    thread.join(60)
    assert not thread.is_alive()


def test_nothing_asks_the_store_when_the_process_has_left():
    """A thread that the interpreter stops inside of the store's code aborts the process."""
    leaving = watch.Watch()
    leaving.interval, leaving._store = 0.2, distributed.HashStore()
    thread = threading.Thread(target=leaving._exchange, args=(1,), daemon=True)
    thread.start()
    leaving._leave_with(thread)
    assert json.loads(leaving._store.get("0"))["over"] == "done" and not thread.is_alive()


def test_a_launcher_that_has_ended_stops_the_run(monkeypatch):
    """``accelerate launch`` does not hand SIGTERM on to a single process."""
    reader, writer = os.pipe()
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
            signal.signal(signal.SIGTERM, lambda *_: os.write(writer, b"stops") and os._exit(0))
            watch.Watch().start(0, 1)
            os.write(writer, b"ready")
            time.sleep(60)
            os._exit(1)
        signal.pause()
    assert os.read(reader, 5) == b"ready"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(reader, 5) == b"stops"


STEPS = """
import os, sys, time
from datetime import timedelta
from torch import distributed, ones
from ldm.engine.watch import WATCH

rank, what = int(os.environ["RANK"]), sys.argv[1]
distributed.init_process_group("gloo", timeout=timedelta(hours=1))
WATCH.start(rank, int(os.environ["WORLD_SIZE"]))
print(rank, os.getpid(), flush=True)
for step in range(10**6):
    WATCH.mark()
    if what == "hang" and rank == 1 and step == 20:
        time.sleep(600)
    try:
        distributed.all_reduce(ones(1))
    except RuntimeError:
        line = WATCH.lost()
        line and print("error:", line, flush=True, file=sys.stderr)
        WATCH.leave("failed")
        os._exit(2)
    WATCH.rest()
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("what", "culprit", "world"),
    [
        ("stop", 1, 2),
        pytest.param("stop", 0, 3, marks=pytest.mark.slow),
        pytest.param("hang", 1, 3, marks=pytest.mark.slow),
        pytest.param("kill", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_processes_of_which_one_stands_still(what, culprit, world, tmp_path, monkeypatch):
    """Each by its own, without a launcher that would end the others."""
    (tmp_path / "steps.py").write_text(STEPS)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    processes = []
    for rank in range(world):
        for name, value in (place | {"RANK": str(rank), "LDM_TIMEOUT": "4"}).items():
            monkeypatch.setitem(ENVIRONMENT, name, value)
        processes.append(launch(tmp_path / "steps.py", what))
    for process in processes:
        wait_for(process.stdout.readline, process)
    time.sleep(2)
    if what != "hang":
        os.kill(processes[culprit].pid, signal.SIGSTOP if what == "stop" else signal.SIGKILL)
    started = time.monotonic()
    rest = [process for rank, process in enumerate(processes) if rank != culprit]
    said = [process.communicate(timeout=60)[0] for process in rest]
    took = time.monotonic() - started
    processes[culprit].kill()
    processes[culprit].communicate()
    lines = [line for line in "".join(said).splitlines() if line.startswith("error: ")]
    name = f"rank {culprit} (process {processes[culprit].pid} on {os.uname().nodename})"
    words = {
        "stop": "has not answered for 4 seconds: it is stopped",
        "hang": "has come no further for 4 seconds, and the others wait for it",
        "kill": "is gone without a word: it was killed",
    }
    if culprit == 0:  # it keeps the store at which they meet
        words["stop"] = "or its launcher, does not answer"
    assert len(lines) == 1 and name in lines[0] and words[what] in lines[0], said
    assert [process.returncode for process in rest] == [2] * (world - 1) and took < 25
