"""The training programs as a user starts them, and what they say of a mistake."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from forked import Forked, server
from launched import ENVIRONMENT, TRAIN
from ldm.engine.signals import REQUESTS, Interrupted
from ldm.tasks import costs
from runs import forget, program


class Exit(BaseException):
    """Where the program ends the process."""


def told(status: int, output: str, *, lines: int = 1) -> str:
    """The message of a refused run, of that many lines."""
    assert status == 2, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    message = output.rstrip().partition("error: ")[2]
    assert len(message.splitlines()) == lines, output
    return message


def own_process(
    *arguments: str | Path, cache: Path, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    line = [str(TRAIN), *map(str, arguments)]
    environment = ENVIRONMENT | {"LDM_CACHE": str(cache)}
    if fresh:
        return subprocess.run(
            [sys.executable, *line], env=environment, capture_output=True, text=True, timeout=300
        )
    server(ENVIRONMENT)
    process = Forked(line, environment, outputs=2)
    out, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(line, process.returncode, out, error)


def in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs a training program in this process as its command line would: exit status, stderr."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the program sets it
    monkeypatch.setattr(costs, "_PROBE", 0.01)  # how fast the machine is, test_estimate asks

    process, end = os.getpid(), os._exit

    def leave(status: int) -> None:
        if os.getpid() != process:  # a forked DataLoader worker, which must end for good
            end(status)
        raise Exit(status)

    def run(config: dict, *overrides: str, name: str = "train") -> tuple[int, str]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        arguments = [f"{name}.py", "--config", str(file), *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        forget()
        capsys.readouterr()
        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "_exit", leave)
            try:
                program(name).main()
            except (Exception, Interrupted):
                status = 1
                try:
                    sys.excepthook(*sys.exc_info())
                except Exit as left:
                    status = left.args[0]
            finally:
                REQUESTS.rest()
        return status, capsys.readouterr().err

    return run
