"""What ``ldm data check --config`` looks at: all that a run reads, as the run reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm.cli.tokens import tokens_of
from ldm.config.json_schema import CONFIGS
from ldm.config.loader import load
from ldm.config.schema import RunConfig
from ldm.data.audit.check import Expected
from ldm.data.audit.together import Together
from ldm.data.buckets import Buckets
from ldm.data.hub import DatasetsData
from ldm.errors import ConfigError


def of_run(file: Path, overrides: Sequence[str], words: Path | None) -> tuple[Together, Expected]:
    """The data of a run, and what it is to be trained on.

    Args:
        file: config of any of the programs in training/.
        overrides: of its keys, ``a.b=c``.
        words: folder of a tokenizer; None: the one that the config names, if it is there.

    Raises:
        ConfigError: the config cannot be used.
    """
    run = _config(file, overrides)
    data = run.data if isinstance(run.data, tuple) else (run.data,)
    listed = [replace(d, streaming=False) if isinstance(d, DatasetsData) else d for d in data]
    name, kind = str(file), "several"
    if len(listed) == 1:
        name, kind = getattr(listed[0], "name", name), listed[0].kind
    words = words or _tokenizer(run)
    count, limit = tokens_of(words) if words else (None, 0)
    # Without buckets every picture becomes a square.
    buckets = run.images.buckets or Buckets(run.images.size, 1.0, upscale=True)
    refused = run.on_bad_sample == "error"
    expected = Expected(run.images.size, buckets, count, limit, refused)
    return Together(name, kind, listed), expected


def _config(file: Path, overrides: Sequence[str]) -> RunConfig:
    """Of the program that fits, or else the error of the one that its first line names."""
    errors = []
    for schema in CONFIGS.values():
        try:
            return load(schema, file, overrides)
        except ConfigError as error:
            errors.append(error)
    first = ""
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as opened:
            first = opened.readline()
    named = [number for number, name in enumerate(CONFIGS) if f"/{name}.json" in first]
    raise errors[named[0] if named else 0]


def _tokenizer(run: RunConfig) -> Path | None:
    """The tokenizer folder that a run names, if any is there already."""
    text, model = (getattr(run, name, None) for name in ("text", "model"))
    if getattr(run, "condition", None) not in (None, "text"):
        return None
    folder = getattr(text, "tokenizer", None)
    if folder is None and (text is None or isinstance(text, str)):
        root = text or model
        folder = root and Path(root) / "tokenizer"
    return Path(folder) if folder and Path(folder).is_dir() else None
