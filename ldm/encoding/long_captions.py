"""Captions of which the text encoder does not see the end, told once at the start of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ldm.data.audit.texts import excess, told_cut
from ldm.data.index import Captioned
from ldm.data.rows import Rows
from ldm.data.source import Source, printable
from ldm.models.conditioner import Conditioner
from ldm.progress import track
from ldm.storage import checkpoint
from ldm.storage.disk import write_text

log = logging.getLogger(__name__)

FILE = "long_captions.jsonl"
_CHUNK = 8192  # rows


def tell(folder: Path, sources: Sequence[Source], conditioner: Conditioner) -> None:
    """One line about all captions of ``sources`` that are too long for the text tower of
    ``conditioner`` that sees least of them, and
    ``long_captions.jsonl`` in ``folder`` with a line for each picture; nothing where there is none,
    and where a run goes on.
    """
    if checkpoint.folders(folder / "checkpoints"):
        return
    tower = min(conditioner.towers.values(), key=lambda tower: tower.length)
    lines: list[str] = []
    pictures, worst = 0, (0, "", "")
    for source in sources:
        what = f"measuring the captions of {source.name}"
        rows = iter(track(_captions(source), what, "captions", total=len(source.examples)))
        while some := list(islice(rows, _CHUNK)):
            pictures += len(some)
            keys, captions = zip(*some, strict=True)
            found = excess(keys, captions, tower.counts, tower.length)
            for key, (tokens, text) in found.items():
                entry = {"source": source.name, "key": key, "tokens_cut": tokens, "caption": text}
                lines.append(json.dumps(entry) + "\n")
                worst = max(worst, (tokens, key, text), key=lambda one: one[0])
    if not lines:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, "".join(lines))
    tokens, key, text = worst
    log.warning(
        "%d of %d pictures have a caption longer than the %d tokens that the text encoder sees; of"
        " the worst, %s, %s; all are in %s",
        len(lines), pictures, tower.length, printable(key),
        told_cut(tokens, text, tower.length), folder / FILE,
    )  # fmt: skip


def _captions(source: Source) -> Iterator[tuple[str, Sequence[str]]]:
    """Key and captions of every picture, as the files have them where they vary endlessly."""
    examples = source.examples
    plain = isinstance(source, Captioned) and not source.grammar
    if plain and isinstance(examples, Rows):
        yield from ((key, captions) for key, captions, _ in examples.scan())
        return
    for index in range(len(examples)):
        example = examples[index]
        known = source.captions(index)
        yield example.key, example.captions if known is None else known
