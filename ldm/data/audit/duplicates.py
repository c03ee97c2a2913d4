"""Pictures that are there twice: the same bytes, the same pixels, or nearly; and across the split.

    same bytes  <  same pixels  <  alike (ldm.data.audit.perceptual_hash)

Every picture is named once, in the first of these that holds; blank pictures, which are all alike,
are compared by their pixels only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from ldm.data.audit.perceptual_hash import distance, groups
from ldm.data.audit.report import Finding

_REMOVE = "they are trained on more often than others: keep one of each"


def check_copies(
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    held_out: np.ndarray,
    digests: Sequence[bytes],
    traits: pa.Table,
) -> Iterator[Finding]:
    """Copies, and copies of held-out pictures that are trained on.

    Args:
        keys: of the pictures.
        captions: of each picture.
        held_out: whether each is held out, ``n``.
        digests: of their files.
        traits: of each picture, the table of ``ldm.data.audit.properties``.
    """
    bytewise = _first(digests)
    pixelwise = _first(traits["pixels"].to_pylist())
    bits = traits["bits"].to_numpy()
    lookalike = _alike(pixelwise, bits, traits)
    everyone = np.arange(len(keys))
    exact = _groups(bytewise, everyone)
    if exact:
        yield _finding("exact-duplicates", "pictures whose files are the same", exact, keys)
    # One of each file from here on, then one of each picture: copies of copies are named already.
    files = everyone[bytewise == everyone]
    same = _groups(pixelwise, files)
    if same:
        what = "pictures whose pixels are the same in different files"
        yield _finding("pixel-duplicates", what, same, keys)
    near = _groups(lookalike, everyone[pixelwise == everyone])
    if near:
        what = "pictures that are nearly the same"
        yield _finding("near-duplicates", what, near, keys)
    yield from _leaks(keys, captions, held_out, pixelwise, lookalike, bits)


def _first(values: Sequence[bytes]) -> np.ndarray:
    """Place of the first equal value, for every value."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(value, i) for i, value in enumerate(values)], np.int64)


def _alike(pixelwise: np.ndarray, bits: np.ndarray, traits: pa.Table) -> np.ndarray:
    """Place of the first picture of each one's group of similar ones."""
    blank = traits["blank"].to_numpy().astype(bool)
    ours = np.flatnonzero((pixelwise == np.arange(len(pixelwise))) & ~blank)
    thumbs = b"".join(traits["thumb"].take(ours).to_pylist())
    first = np.arange(len(pixelwise))
    first[ours] = ours[groups(bits[ours], np.frombuffer(thumbs, np.uint8).reshape(-1, 192))]
    return first[pixelwise]


def _groups(first: np.ndarray, among: np.ndarray) -> list[list[int]]:
    """Groups of two and more of ``among``, in order."""
    order = among[np.argsort(first[among], kind="stable")]
    edges = np.flatnonzero(np.diff(first[order])) + 1
    return [part.tolist() for part in np.split(order, edges) if len(part) > 1]


def _finding(kind: str, what: str, found: list[list[int]], keys: Sequence[str]) -> Finding:
    named = [[keys[i] for i in group] for group in found]
    return Finding(kind, "warning", what, _REMOVE, [k for g in named for k in g], groups=named)


def _leaks(
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    held_out: np.ndarray,
    pixelwise: np.ndarray,
    lookalike: np.ndarray,
    bits: np.ndarray,
) -> Iterator[Finding]:
    """Held-out pictures of which training sees a copy; details name the nearest one."""
    found: dict[str, dict[str, str]] = {"leaked-copies": {}, "leaked-near-duplicates": {}}
    for group in _groups(lookalike, np.arange(len(keys))):
        members = np.array(group)
        trained = members[~held_out[members]]
        if not len(trained):
            continue
        for i in members[held_out[members]].tolist():
            apart = distance(bits[trained], bits[i]).astype(int)
            apart[pixelwise[trained] == pixelwise[i]] = -1
            partner = int(trained[apart.argmin()])
            equal = pixelwise[partner] == pixelwise[i]
            caption = ", same caption" if set(captions[i]) & set(captions[partner]) else ""
            kind = "leaked-copies" if equal else "leaked-near-duplicates"
            found[kind][keys[i]] = f"{keys[partner]}{caption}"
    whats = {
        "leaked-copies": "held-out pictures that are also trained on",
        "leaked-near-duplicates": "held-out pictures that are nearly trained on",
    }
    for kind, details in found.items():
        if details:
            cure = "the held-out loss comes out too low: keep one of the two"
            yield Finding(kind, "warning", whats[kind], cure, list(details), details)
