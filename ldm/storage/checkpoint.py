"""Checkpoints that are whole or are not there.

A checkpoint is a folder that opens as a pipeline (or autoencoder, or CLIP), with the state of the
run beside it in ``training/``. It is written into a hidden staging folder, every file is flushed to
disk, a manifest with the SHA-256 of each is written last, and one rename gives it its name; only
then are older ones removed. ``newest`` is therefore the newest complete one; a broken one is named
and passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from typing_extensions import TypedDict

from ldm.storage.folders import STAGING, flush_all, take_place
from ldm.storage.json import JsonError, read_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX = "images-"


class Manifest(TypedDict):
    """What is in ``MANIFEST``: the hash of every file of a folder."""

    sha256: dict[str, str]


def sha256(file: Path) -> str:
    """Hex SHA-256 of the bytes of ``file``."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def name_of(images: int) -> str:
    """Folder name of the checkpoint after ``images`` images; names sort by age."""
    return f"{_PREFIX}{images:012d}"


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes ``folder`` in one step from what ``write(staging)`` puts into a staging folder.

    If ``write`` fails (a full disk), nothing named is touched and the staging folder is removed.
    """
    if folder.is_symlink():
        folder = folder.resolve()  # what it points to is replaced, not the link
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f"{STAGING}{folder.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        write(staging)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        listed = {str(path.relative_to(staging)): sha256(path) for path in files}
        (staging / MANIFEST).write_text(json.dumps({"sha256": listed}, indent=1))
        flush_all(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    take_place(staging, folder)


def problem(folder: Path, below: str = "") -> str | None:
    """What is wrong with a checkpoint, or None: every listed file (whose name begins with
    ``below``) must be there, bit for bit.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "it has no manifest"
    try:
        listed = read_json(manifest, Manifest)["sha256"]
    except (OSError, JsonError):
        return "its manifest cannot be read"
    if not listed:
        return "its manifest lists no file"
    for name, digest in listed.items():
        if not name.startswith(below):
            continue
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def folders(root: Path) -> list[Path]:
    """Checkpoint folders under ``root``, oldest first, whole or not."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint under ``root``; broken ones are named in the log."""
    for folder in reversed(folders(root)):
        wrong = problem(folder)
        if wrong is None:
            return folder
        log.warning("checkpoint %s is passed over: %s", folder, wrong)
    return None


def rotate(root: Path, keep: int, images: int) -> None:
    """Removes all but the newest ``keep`` checkpoints of a run that has just saved at ``images``,
    and what a killed run left in staging.

    What lies ahead of the run was found broken when it started, and must not count as newest.
    """
    every = folders(root)
    passed = [folder for folder in every if folder.name <= name_of(images)]
    for folder in [*passed[:-keep], *every[len(passed) :]]:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():  # in use elsewhere: no reason to end a run that has just been saved
            log.warning("checkpoint %s cannot be removed", folder)
    for staging in root.glob(f"{STAGING}*"):
        shutil.rmtree(staging, ignore_errors=True)
