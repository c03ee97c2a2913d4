"""Files as such: JSON from outside, and the lock of a folder."""

import os
import signal
from typing import Any

import pytest
from typing_extensions import TypedDict

from ldm.storage.json import JsonError, parse_json, read_json
from ldm.storage.lock import NAME, InUseError, lock


class Pair(TypedDict):
    name: str
    count: int


GOOD = b'{"name": "a", "count": 3, "more": null}'
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not valid JSON (Expecting value)"),
    "half": (GOOD[:-9], "not valid JSON ("),
    "two": (GOOD + GOOD, "not valid JSON (Extra data)"),
    "deep": (b'{"name": ' + b"[" * 10_000, "not valid JSON (too deep)"),
    "closed deep": (b"[" * 10_000 + b"]" * 10_000, "not valid JSON (too deep)"),
    "digits": (b'{"count": ' + b"9" * 5_000 + b"}", "not valid JSON (a number of too many digits)"),
    "Latin-1": (b'{"name": "caf\xe9"}', "not valid JSON (not UTF-8 text)"),
    "list": (b"[]", "no JSON object"),
    "null": (b"null", "no JSON object"),
    "number as text": (b'{"name": "a", "count": "3"}', "not what is due at count: input should be"),
    "NaN": (b'{"name": "a", "count": NaN}', "not what is due at count: input should be a valid"),
    "half a number": (b'{"name": "a", "count": 1.5}', "not what is due at count: input should be"),
    "lacks a key": (b'{"name": "a"}', "not what is due at count: field required"),
}


@pytest.mark.parametrize("name", BAD)
def test_json_that_is_not_what_is_due_is_one_line_with_its_file(name, tmp_path):
    data, words = BAD[name]
    with pytest.raises(JsonError) as error:
        parse_json(data, Pair)
    assert str(error.value).startswith(words)
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(JsonError) as error:
        read_json(tmp_path / "a.json", Pair)
    line = str(error.value)
    assert line.startswith(f"{tmp_path}/a.json cannot be read: it is {words}")
    assert "\n" not in line and len(line) < 300 + len(str(tmp_path))


def test_json_that_is(tmp_path):
    assert parse_json(GOOD, Pair) == {"name": "a", "count": 3}
    assert parse_json(GOOD, dict[str, Any])["more"] is None
    assert parse_json("[1, 2]", list[float]) == [1, 2]
    with pytest.raises(JsonError, match="no JSON list"):
        parse_json("{}", list[str])
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json", Pair)
    with pytest.raises(JsonError, match="cannot be read: Is a directory"):
        read_json(tmp_path, Pair)


# -- the lock --


def forked(body) -> tuple[int, int]:
    """A process that runs ``body(ready)`` and stays; its id, and what tells that it is ready."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        body(lambda word=b".": os.write(writer, word))
        signal.pause()
    os.close(writer)
    return child, reader


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_names_its_process_and_dies_with_it(tmp_path):
    def body(ready):
        body.kept = lock(tmp_path)
        ready()

    child, reader = forked(body)
    assert os.read(reader, 1) == b"."
    with pytest.raises(InUseError, match=f"in use by process {child} on {os.uname().nodename}"):
        lock(tmp_path)
    end(child)
    held = lock(tmp_path)
    assert held.sure and str(os.getpid()) in (tmp_path / NAME).read_text()
    assert lock(tmp_path) is held


def test_a_data_worker_that_outlives_its_run_keeps_no_lock(tmp_path):
    """What a process forks inherits its open files; a lock of ``flock`` would live on in them."""

    def body(ready):
        body.kept = lock(tmp_path)
        worker, _ = forked(lambda _: None)
        ready(b"%9d" % worker)

    child, reader = forked(body)
    worker = int(os.read(reader, 9))
    with pytest.raises(InUseError):
        lock(tmp_path)
    end(child)
    try:
        os.kill(worker, 0)  # it is there
        assert lock(tmp_path).sure
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_knows_when_its_folder_is_gone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    held = lock(folder)
    assert not held.gone()
    (folder / NAME).unlink()
    assert not held.gone()  # a swept-up file is no reason to end
    folder.rename(tmp_path / "moved")
    assert held.gone()
    folder.mkdir()
    assert held.gone()
    folder.rmdir()
    (tmp_path / "moved").rename(folder)
    assert not held.gone()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert not lock(tmp_path).sure
