"""What a run folder says about where its numbers come from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ldm.config.loader import plain
from ldm.config.schema import RunConfig
from ldm.data.source import Problem
from ldm.errors import ConfigError
from ldm.storage.disk import write_text

SKIPPED = "skipped.jsonl"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "ldm")


def check_folder(run: Path) -> None:
    """``ConfigError`` where ``run`` cannot be the folder of a run for its name, or for what is
    there already.
    """
    try:
        os.stat(run / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, or with a zero
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"run: {str(run)[:80]!r} cannot be a folder: {reason}") from None
    for folder in (
        *reversed(run.parents),
        run,
        run / "checkpoints",
        run / "samples",
        run / "final",
    ):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"run: {folder} is a file where a folder has to be")
    for name in ("metrics.jsonl", "config.yaml", "environment.json", SKIPPED):
        if (run / name).is_dir():
            raise ConfigError(f"run: {run / name} is a folder where a file has to be")


def write_record(run: Path, config: RunConfig, changes: list[dict[str, Any]]) -> None:
    """``config.yaml`` (resolved) and ``environment.json`` (git revision, versions) in ``run``.

    Args:
        run: the folder.
        config: the run.
        changes: keys that ``resume.allow`` let change, each with the images seen by then.
    """
    run.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    write_text(run / "config.yaml", text)
    record = environment() | {"changes": changes}
    write_text(run / "environment.json", json.dumps(record, indent=1))


def environment() -> dict[str, Any]:
    """What numbers were made with: git revision, Python, machine, versions of packages."""
    return {
        "git": _revision(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions(PACKAGES),
    }


def write_skipped(run: Path, skipped: Sequence[tuple[str, Problem]]) -> None:
    """``skipped.jsonl`` in ``run``: a line for every picture or row that is left out, with why."""
    lines = [
        json.dumps({"source": source, "key": problem.key, "reason": problem.reason})
        for source, problem in skipped
    ]
    (run / SKIPPED).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of what is installed."""
    return {name: _version(name) for name in packages}


# Asked once: what a process has imported stays what it runs.
_version = cache(importlib.metadata.version)


@cache
def _revision() -> str | None:
    """Commit of the code, with ``+changes`` if the tree differs from it; None outside a
    checkout.
    """
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if status else "")
