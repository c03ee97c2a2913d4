"""Runs in processes of their own, to be killed, and what they leave."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

from forked import Forked, server
from ldm.storage.lock import lock
from runs import ROOT

RECORDED = ROOT / "tests" / "support" / "recorded_run.py"
TRAIN = ROOT / "training" / "train.py"
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
}


def logged(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def losses(run: Path) -> list[float]:
    return logged(run, "loss")


def steps(run: Path) -> int:
    """Lines of the metrics so far."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def digests(folder: Path, *, at_least: int = 5) -> dict[str, str]:
    """Of every tensor and header: in a checkpoint three networks, raw weights, optimiser. Not of
    the files, since safetensors writes what a header holds in any order.
    """
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) >= at_least
    found = {}
    for file in files:
        digest = hashlib.sha256()
        with safe_open(file, "pt") as opened:
            digest.update(repr(sorted((opened.metadata() or {}).items())).encode())
            for name in sorted(opened.keys()):
                value = opened.get_tensor(name)
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        found[str(file.relative_to(folder))] = digest.hexdigest()
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(
    *command: str | Path, processes: int = 1, fresh: bool = False, **settings
) -> Forked | subprocess.Popen:
    """A program, under ``torchrun`` where it is to be several processes; ``fresh`` from nothing, as
    a user starts it, with hashes of its own and its name in the list of processes.
    """
    line = [str(part) for part in command]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        line = [*torchrun, "--master_port", str(free_port()), *line]
    if not fresh and hasattr(os, "pidfd_open"):  # on Linux
        server(ENVIRONMENT)
        return Forked(line, ENVIRONMENT, **settings)
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) | settings
    return subprocess.Popen([sys.executable, *line], env=ENVIRONMENT, text=True, **settings)


def start(config: dict, record: Path, **settings) -> Forked | subprocess.Popen:
    """A run that writes down into ``record`` what it consumes."""
    record.mkdir(parents=True, exist_ok=True)
    file = record / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return launch(RECORDED, file, record, **settings)


def finish(process: Forked | subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(happened, process: Forked | subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Another process has the lock of ``folder``; its id."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        kept = lock(folder)
        os.write(writer, str(kept.sure).encode())
        signal.pause()
    try:
        assert os.read(reader, 9) == b"True"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
