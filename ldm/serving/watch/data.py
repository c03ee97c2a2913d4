"""A data set for people who look at it: what a check finds, its pictures and its captions."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
from PIL import Image

from ldm.config.sources import SOURCES, layout
from ldm.data.audit.check import Expected, check
from ldm.data.audit.together import Together
from ldm.data.buckets import Buckets
from ldm.data.folder import FolderData, walk
from ldm.data.metadata import spoken
from ldm.errors import DataError
from ldm.serving.pictures import flat
from ldm.serving.shelf import NoSuch
from ldm.serving.watch.captions import Captions
from ldm.serving.watch.errors import Conflict
from ldm.serving.watch.pathless import all_pathless, pathless
from ldm.storage.lock import holder

log = logging.getLogger(__name__)

_SIDE = 192  # of a thumbnail
_THUMBNAILS = 2000  # that are kept in memory
_REPORTS = 8  # sizes of which a report is kept
_WAIT = 0.5  # seconds for a check; a longer one is asked for again
_WORDS = 60
_COARSE, _FINE = 64, 8  # steps of buckets, of large and of small pictures


class _View:
    """The data in one state of their files.

    Args:
        path: of them.
        kind: the layout.
        state: what tells this one from others.
    """

    def __init__(self, path: Path, kind: str, state: Any) -> None:
        self.state = state
        self.source: Any = SOURCES[kind](path=str(path))
        self.together = Together(path.resolve().name, kind, [self.source])

    @cached_property
    def columns(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Keys and captions of all pictures."""
        return self._read[:2]

    @cached_property
    def places(self) -> dict[str, tuple[int, str]]:
        """Number and digest of each picture by its key."""
        keys, _, digests = self._read
        every = (digest.hex() for mine in digests for digest in mine)
        return {key: (n, digest) for n, (key, digest) in enumerate(zip(keys, every, strict=True))}

    @cached_property
    def _read(self) -> tuple[list[str], list[tuple[str, ...]], list[list[bytes]]]:
        return self.together.columns() if self.together.sources else ([], [], [])


class Data:
    """One data set; any thread may ask.

    Args:
        path: a folder, or whatever else ``data.path`` of a run can be.
        busy: names of living runs that read a path.
    """

    def __init__(self, path: Path, busy: Callable[[Path], Sequence[str]] = lambda path: ()) -> None:
        self.path, self._busy = path, busy
        self.name = path.resolve().name
        self._editing, self._checking, self._looking = Lock(), Lock(), Lock()
        self._last: _View | None = None
        self._thread: Thread | None = None
        self._reports: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._thumbnails: dict[str, bytes] = {}

    # -- to look --

    def told(self, size: int) -> dict[str, Any]:
        """What a check of training at ``size`` finds: ``report`` (the JSON of ``ldm data check``),
        null until there is one, and ``checking``, whether a newer one is on its way.

        Raises:
            ValueError: it cannot be read, or not be trained at this size.
        """
        _expected(size)
        view = self._view()
        known = self._reports.get(size)
        if known is None or known[0] != view.state:
            with self._checking:  # one check at a time; whoever asks meanwhile asks again
                if self._thread is None or not self._thread.is_alive():
                    self._thread = Thread(target=self._check, args=(view, size), daemon=True)
                    self._thread.start()
            self._thread.join(_WAIT)
            known = self._reports.get(size)
        edits = isinstance(view.source, FolderData)
        return {
            "name": self.name,
            "report": None if known is None else known[1],
            "checking": known is None or known[0] != view.state,
            "busy": list(self._busy(self.path)),
            "editable": edits,
            "undo": len({entry["edit"] for entry in _captions(view).log()}) if edits else 0,
        }

    def rows(self, search: str, start: int, count: int) -> dict[str, Any]:
        """Pictures whose caption or name has ``search`` in it, whatever the case, in order.

        Args:
            search: "" for all.
            start: of those, the number of the first.
            count: at most so many.
        """
        view = self._view()
        keys, captions = view.columns
        wanted = search.casefold()
        found = [
            n
            for n, (key, texts) in enumerate(zip(keys, captions, strict=True))
            if not wanted or any(wanted in text.casefold() for text in (key, *texts))
        ]
        shown = found[start : start + count]
        sizes = view.together.sizes if shown else []
        held_out = view.together.held_out if shown else []
        return {
            "found": len(found),
            "rows": [
                {
                    "key": keys[n],
                    "captions": list(captions[n]),
                    "width": int(sizes[n][0]),
                    "height": int(sizes[n][1]),
                    "held_out": bool(held_out[n]),
                }
                for n in shown
            ],
        }

    def counts(self) -> dict[str, Any]:
        """How many pictures and captions there are, how long these are, and which words they use
        most.
        """
        keys, captions = self._view().columns
        every = [text for texts in captions for text in texts]
        words = Counter(word for text in every for word in set(_words(text)))
        lengths = np.array([len(text.split()) for text in every] or [0])
        return {
            "pictures": len(keys),
            "captions": len(every),
            "distinct": len(set(every)),
            "words": {
                "least": int(lengths.min()),
                "median": float(np.median(lengths)),
                "most": int(lengths.max()),
            },
            "common": [{"word": word, "captions": n} for word, n in words.most_common(_WORDS)],
        }

    def thumbnail(self, key: str) -> bytes:
        """A small JPEG of a picture, also of one that a folder has and no caption; ``NoSuch`` if
        there is none that can be read.
        """
        digest, read = _picture(self._view(), key)
        if digest not in self._thumbnails:
            try:
                image = read()
            except (DataError, OSError, ValueError):
                raise NoSuch("there is no such picture") from None
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=85)
            while len(self._thumbnails) >= _THUMBNAILS:
                self._thumbnails.pop(next(iter(self._thumbnails)), None)
            self._thumbnails[digest] = file.getvalue()
        return self._thumbnails[digest]

    # -- to change --

    def edit(self, key: str, captions: Sequence[str], was: Sequence[str]) -> None:
        """Gives a picture other captions, where they stand.

        Args:
            key: of the picture.
            captions: new ones.
            was: what they are taken to be.

        Raises:
            NoSuch: there is no such picture.
            Conflict: they are others by now, or a living run reads the data.
            ValueError: see ``Captions.edit``.
        """
        with self._editing:
            view = self._free()
            if key not in view.places:
                raise NoSuch("there is no such picture")
            if view.columns[1][view.places[key][0]] != tuple(was):
                raise Conflict("the caption has been changed since you saw it: look again")
            _captions(view).edit({key: captions})

    def replace(self, search: str, put: str) -> int:
        """Puts ``put`` for ``search`` (by its case) in all captions; how many pictures change.

        Raises: as ``edit``.
        """
        with self._editing:
            view = self._free()
            keys, captions = view.columns
            changes = {
                key: [spoken(text.replace(search, put)) for text in texts]
                for key, texts in zip(keys, captions, strict=True)
                if any(search in text for text in texts)
            }
            _captions(view).edit(changes)
            return len(changes)

    def undo(self) -> list[str]:
        """Takes the last edit back; keys of its pictures. Raises ``Conflict``."""
        with self._editing:
            return _captions(self._free()).undo()

    # -- what there is now --

    def _free(self) -> _View:
        """The data, which nobody reads or writes."""
        if busy := self._busy(self.path):
            raise Conflict(f"the run {busy[0]} reads these data: stop it first")
        if holder(self.path) is not None:
            raise Conflict("a program writes into this folder: wait until it has ended")
        return self._view()

    def _view(self) -> _View:
        with self._looking:
            try:
                kind = layout(str(self.path)).kind
                files = walk(self.path, False)[0] if self.path.is_dir() else _stat(self.path)
                if self._last is None or self._last.state != (kind, files):
                    self._last = _View(self.path, kind, (kind, files))
            except (DataError, OSError) as error:
                raise ValueError(pathless(str(error))) from None
            return self._last

    def _check(self, view: _View, size: int) -> None:
        together = view.together
        try:
            report = check(together, together.kind, _expected(size)).json()
        except (ValueError, OSError) as error:
            log.warning("%s cannot be checked: %s", self.path, error)
            report = {"error": " ".join(str(error).split())}
        self._reports.pop(size, None)
        self._reports[size] = view.state, all_pathless(report)
        while len(self._reports) > _REPORTS:
            del self._reports[next(iter(self._reports))]


def data_sets(paths: Sequence[Path], busy: Callable[[Path], Sequence[str]]) -> dict[str, Data]:
    """Data sets by name. Raises ``ValueError`` where two have one name."""
    found: dict[str, Data] = {}
    for path in paths:
        data = Data(path, busy)
        if found.setdefault(data.name, data) is not data:
            raise ValueError(f"two data sets are called {data.name!r}")
    return found


def _picture(view: _View, key: str) -> tuple[str, Callable[[], Image.Image]]:
    """What tells a picture from others, and how it is read."""
    if key in view.places:
        number, digest = view.places[key]
        return digest, lambda: view.together.load(number).convert("RGB")
    if isinstance(view.source, FolderData) and key in view.state[1]:  # it has no caption
        file, changed = view.source.root / key, view.state[1][key]
        return f"{key} {changed}", lambda: flat(file.read_bytes(), "picture")
    raise NoSuch("there is no such picture")


def _captions(view: _View) -> Captions:
    if not isinstance(view.source, FolderData):
        raise Conflict("captions are changed in folders of pictures alone")
    return Captions(view.source)


def _expected(size: int) -> Expected:
    step = _COARSE if size >= 4 * _COARSE else _FINE
    expected = Expected(size, Buckets(step, 2.0))
    expected.buckets.shapes(size)
    return expected


def _words(text: str) -> list[str]:
    found = (word.strip(".,;:!?()[]{}\"'").casefold() for word in text.split())
    return [word for word in found if word]


def _stat(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns
