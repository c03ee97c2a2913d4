"""Servers in processes of their own, a balancer before them, and clients that ask for pictures.

Nothing here imports torch: a benchmark's clients are not to compute beside its servers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "serve" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")


class Answer(NamedTuple):
    """What a server says.

    Args:
        status: of HTTP; 0: the connection was lost.
        headers: by their names in lower case.
        body: bytes.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ask(url: str, body: Any = None, *, method: str | None = None, **headers: str) -> Answer:
    """The answer of ``url``, whatever it is; ``body`` as JSON, or bytes as they are."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    told.setdefault("Content-Type", "application/json")
    request = urllib.request.Request(url, body, told, method=method)
    try:
        with urllib.request.urlopen(request, timeout=3600) as answer:
            found = {name.lower(): value for name, value in answer.headers.items()}
            return Answer(answer.status, found, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            found = {name.lower(): value for name, value in error.headers.items()}
            return Answer(error.code, found, error.read())
    except (OSError, ValueError) as error:
        return Answer(0, {}, str(error).encode())


def drawn(url: str, request: dict[str, Any], client: str = "one") -> bytes | None:
    """The file of the one picture that ``request`` asks for, by the native API on one connection;
    None: there is none.
    """
    answer = ask(f"{url}/api/jobs", request, Accept="text/event-stream", X_Client=client)
    if answer.status != 202 and answer.status != 200:
        print(f"{answer.status}: {answer.body[:200]!r}", file=sys.stderr)
        return None
    lines = [line for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    job = json.loads(lines[-1].removeprefix("data: "))
    if job.get("state") != "done":
        print(f"{job.get('state')}: {job.get('error')}", file=sys.stderr)
        return None
    return ask(url + job["pictures"][0]["url"]).body


def started(line: Sequence[str], threads: int = 1) -> Any:
    """A process that computes with so many threads, its output to be read."""
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, *line]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=os.environ | own)


class Server:
    """``ldm serve`` in a process.

    Args:
        model: that draws.
        out: its folder of pictures.
        options: of the command, beside.
        port: its own; None: one that is free.
        start: starts the process.
    """

    def __init__(
        self,
        model: Path | str,
        out: Path,
        *options: Any,
        port: int | None = None,
        start: Callable[[Sequence[str]], Any] = started,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        line = ["serve", "--model", model, "--out", out, "--port", self.port, *options]
        self.process = start(["-m", "ldm.cli", *map(str, line)])

    def ready(self) -> str:
        """The line that it says so by."""
        line = self.process.stdout.readline().strip()
        assert line.startswith("ready: "), f"the server has not started: {line}"
        return line

    def cpu(self) -> float:
        """Seconds of it so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MB of it that are in memory now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Ends it; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(300)


class Balancer:
    """HAProxy before two servers, by the file that ships but for its ports.

    Args:
        folder: for its file.
        ports: of the servers.
    """

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        text = CONFIG.read_text().partition("\nglobal")[2]
        front = free_port()
        for shipped, here in zip((7860, 7861, 7862), (front, *ports), strict=True):
            assert text.count(f"127.0.0.1:{shipped}") == 1
            text = text.replace(f"127.0.0.1:{shipped}", f"127.0.0.1:{here}")
        file = folder / "haproxy.cfg"
        file.write_text("global" + text)
        self.url = f"http://127.0.0.1:{front}"
        line = [str(HAPROXY), "-f", str(file)]
        self.process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        self.wait()

    def wait(self) -> None:
        """Until a server is behind it."""
        end = time.monotonic() + 60
        while ask(f"{self.url}/healthz").status != 200:
            assert time.monotonic() < end, "there is no server behind the balancer"
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(60)
