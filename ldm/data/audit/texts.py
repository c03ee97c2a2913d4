"""What is odd about captions: too long, broken, shared by many, or no captions at all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from ldm.data.audit.report import Finding
from ldm.data.picture import READABLE

Count = Callable[[Sequence[str]], list[int]]
"""How many tokens each text is, specials included."""

_CHUNK = 1024
# What is left of UTF-8 that somebody read as Latin 1, U+FFFD, and control characters.
_BROKEN = re.compile(r"[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\ufffd|[\x00-\x1f\x7f]")
_SHARE = 0.5


def check_captions(
    keys: Sequence[str], captions: Sequence[Sequence[str]], count: Count | None, limit: int
) -> Iterator[Finding]:
    """Everything about the captions as the files have them.

    Args:
        keys: of the pictures.
        captions: of each picture.
        count: of tokens, or None: lengths are not checked.
        limit: tokens that the text encoder sees.
    """
    yield from _shared(keys, captions)
    named = [
        key
        for key, texts in zip(keys, captions, strict=True)
        if any(_is_name(text, key) for text in texts)
    ]
    if named:
        cure = "write what the picture shows"
        yield Finding("file-names", "warning", "captions that are a file name", cure, named)
    broken = {
        key: found.group().encode("unicode_escape").decode()
        for key, texts in zip(keys, captions, strict=True)
        if (found := _BROKEN.search(" ".join(texts)))
    }
    if broken:
        yield Finding(
            "broken-characters",
            "warning",
            "captions with broken characters",
            "they were saved in one encoding and read in another: write them anew as UTF-8",
            list(broken),
            broken,
        )
    if count is not None:
        yield from _long(keys, captions, count, limit)


def _shared(keys: Sequence[str], captions: Sequence[Sequence[str]]) -> Iterator[Finding]:
    """Texts that several pictures have."""
    having: dict[str, list[str]] = defaultdict(list)
    for key, texts in zip(keys, captions, strict=True):
        for text in dict.fromkeys(texts):
            having[text].append(key)
    several = {text: found for text, found in having.items() if len(found) > 1}
    for text in [text for text, found in several.items() if len(found) > _SHARE * len(keys)]:
        found = several.pop(text)
        yield Finding(
            "dominant-caption",
            "warning",
            f"pictures of {len(keys)} with one and the same caption",
            "only what captions tell apart can be asked for: caption what differs",
            found,
            {found[0]: text},
        )
    if several:
        groups = list(several.values())
        yield Finding(
            "shared-captions",
            "note",
            "pictures whose caption others have too",
            "fine for classes and styles; else caption what differs",
            list(dict.fromkeys(key for group in groups for key in group)),
            {group[0]: text for text, group in several.items()},
            groups,
        )


def _is_name(text: str, key: str) -> bool:
    """Whether a caption is the name of a file; ``cat`` for ``cat.png`` is a word."""
    name = PurePosixPath(key).name.lower()
    low = text.lower()
    if " " not in low and low.endswith(READABLE):
        return True
    stem = name.rpartition(".")[0] or name
    return low == name or (low == stem and re.search(r"[\d_]", stem) is not None)


def _long(
    keys: Sequence[str], captions: Sequence[Sequence[str]], count: Count, limit: int
) -> Iterator[Finding]:
    """Captions of which the text encoder does not see the end."""
    texts = list(dict.fromkeys(text for texts in captions for text in texts))
    lengths: dict[str, int] = {}
    for start in range(0, len(texts), _CHUNK):
        part = texts[start : start + _CHUNK]
        lengths |= zip(part, count(part), strict=True)
    cut = {
        key: most - limit
        for key, texts in zip(keys, captions, strict=True)
        if (most := max(lengths[text] for text in texts)) > limit
    }
    if cut:
        yield Finding(
            "long-captions",
            "warning",
            f"captions longer than {limit} tokens ({sum(cut.values())} tokens are cut)",
            "what matters has to come first: shorten them",
            list(cut),
            {key: f"{tokens} tokens are cut" for key, tokens in cut.items()},
        )
