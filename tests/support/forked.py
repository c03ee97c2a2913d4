"""Programs as ``python PROGRAM`` starts them, without the ten seconds in which it imports torch.

A server, started once for all processes of a run of tests, imports what a training imports, makes
what reads its config, and does nothing else. Each program is a fork of it with its own arguments,
environment and output, runs as ``__main__`` and ends as the interpreter ends. What ``torchrun``
starts from such a program is forked as well. Not a fork's own are its parent, which is the server,
its name in the list of processes, and what an interpreter draws when it starts: the seed of hashes,
and that of numpy's global generator.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

IMPORTED = (
    "accelerate.commands.launch",
    "diffusers.guiders",
    "ldm.cli",
    "ldm.tasks.text_to_image",
    "ldm.pipeline",
    "torch.distributed.run",
)
SOCKET: list[str] = []  # of the server; here, once it is started, and in every fork
HOME = "LDM_TESTS_FORKED"  # names the folder in which processes find their server
ALIVE: list[int] = []  # what this one holds open; the server ends where nobody does


class Forked:
    """Of ``subprocess.Popen`` what tests need. The outputs are files: reading ends where they have
    come to.
    """

    stdout: IO[str]
    stderr: IO[str]

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        outputs: int = 1,
        start_new_session: bool = False,
    ) -> None:
        """``FILE ...``, ``-m MODULE ...`` or ``-c CODE ...``, with one output, with stdout and
        stderr apart (``outputs=2``), or with those of this process (0).
        """
        self.returncode: int | None = None
        files = [tempfile.NamedTemporaryFile("a", suffix=".out") for _ in range(outputs)]
        handles = [file.fileno() for file in files] or [1, 2]
        for name, file in zip(("stdout", "stderr"), files, strict=False):
            setattr(self, name, open(file.name))
        request = [list(arguments), dict(environment), os.getcwd(), start_new_session]
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(SOCKET[0])
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(request).encode())
            file.flush()
            handles = [file.fileno(), handles[0], handles[-1]]
            socket.send_fds(self._server, [b"."], handles)
            self._said = self._server.makefile("r")
            self.pid = int(self._said.readline())
        for file in files:
            file.close()

    def poll(self) -> int | None:
        """Its status, below 0 for a signal, once it has ended."""
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)
            self.returncode = int(self._said.readline())
            self._said.close()
            self._server.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        self.wait(timeout)
        found = []
        for name in ("stdout", "stderr"):
            file = vars(self).get(name)
            found.append(file and file.read())
            file and file.close()
        return tuple(found)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def meet() -> None:
    """Makes the folder in which this process and those it starts find one server."""
    folder = tempfile.TemporaryDirectory(prefix="ldm-forked-")
    os.environ[HOME] = folder.name
    os.mkfifo(os.path.join(folder.name, "alive"))
    atexit.register(folder.cleanup)


def join() -> None:
    """The server, once there is one, ends no sooner than this process."""
    if not ALIVE:
        ALIVE.append(os.open(os.path.join(os.environ[HOME], "alive"), os.O_RDWR))


def server(environment: Mapping[str, str]) -> None:
    """Starts it in ``environment``, unless it runs. It ends with the last that has joined."""
    if SOCKET:
        return
    join()
    name = os.path.join(os.environ[HOME], "socket")
    with open(os.path.join(os.environ[HOME], "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(name):
            _started(name, environment)
    SOCKET.append(name)


def _started(name: str, environment: Mapping[str, str]) -> None:
    with open(os.path.join(os.environ[HOME], "alive")) as alive:
        process = subprocess.Popen(
            [sys.executable, __file__, name], env=environment, stdin=alive, stdout=subprocess.PIPE
        )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"

    def end() -> None:
        os.close(ALIVE.pop())
        process.wait()
        process.stdout.close()

    atexit.register(end)


# -- the server --


def served(listening: socket.socket) -> list[str]:
    """Forks until stdin ends. Returns in the forks, with the arguments of each."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by the handle that tells the end
    while True:
        for ready in select.select([0, listening, *running], [], [])[0]:
            if ready == 0:
                sys.exit()
            elif ready is listening:
                client, _ = listening.accept()
                _, handles, *_ = socket.recv_fds(client, 1, 3)
                child = os.fork()
                if not child:
                    for other in (listening, *(socket for _, socket in running.values())):
                        other.close()
                    for handle in running:
                        os.close(handle)
                    return begun(client, *handles)
                for handle in handles:
                    os.close(handle)
                running[os.pidfd_open(child)] = child, client
            else:
                child, client = running.pop(ready)
                os.close(ready)
                _, status = os.waitpid(child, 0)
                with client:
                    client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def begun(client: socket.socket, request: int, out: int, err: int) -> list[str]:
    """Makes the fork what was asked for; returns its arguments."""
    with open(request) as file:
        file.seek(0)
        arguments, environment, folder, session = json.load(file)
    if session:
        os.setsid()
    for handle, to in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(handle, to)
        os.close(handle)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with client:
        client.sendall(b"%d\n" % os.getpid())
    return arguments


def started_by_torchrun(_, line: Sequence[str], environment: Mapping[str, str]) -> Forked:
    """``SubprocessHandler._popen`` of a ``line`` that is ``[python, -u, FILE, ...]``."""
    return Forked(line[2:], environment, outputs=0, start_new_session=True)


def main() -> None:
    import contextlib
    import gc
    import importlib

    import pyarrow
    from torch.distributed.elastic.multiprocessing import subprocess_handler
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from ldm.config.loader import validate
    from ldm.config.schema import TrainConfig
    from ldm.errors import ConfigError

    SOCKET.append(sys.argv[1])
    for name in IMPORTED:
        importlib.import_module(name)
    pyarrow.array(["a"])  # which imports pandas, where that is installed
    with contextlib.suppress(ConfigError):
        validate(TrainConfig, {})  # which makes what validates
    get_checkpoint_conversion_mapping("")  # compiles 900 patterns, before the first text encoder
    subprocess_handler.SubprocessHandler._popen = started_by_torchrun
    os.fsync = lambda descriptor: None  # as in the tests' own process
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(SOCKET[0])
    listening.listen()
    print("ready", flush=True)
    kind, *rest = arguments = served(listening)
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
