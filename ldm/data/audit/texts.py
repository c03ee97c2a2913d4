"""What is odd about captions: too long, broken, shared by many, or no captions at all."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from ldm.data.audit.report import Finding
from ldm.data.picture import READABLE
from ldm.models.lengths import most

Count = Callable[[Sequence[str]], list[int]]
"""How many tokens each text is, specials included."""

_CHUNK = 1024
# What is left of UTF-8 that somebody read as Latin 1, U+FFFD, and control characters.
_BROKEN = re.compile(r"[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\ufffd|[\x00-\x1f\x7f]")
_SHARE = 0.5
_SHOWN = 60  # characters of a caption in a detail
# Markup of web pages and web UIs. A word of textual inversion, ``<cat-toy>``, is none.
_TAGS = re.compile(
    r"</?(?:a|b|i|u|p|br|em|hr|li|ol|ul|td|tr|th|div|img|span|font|table|tbody|strong|small|sub|sup"
    r"|h[1-6]|center|html|head|body|script|style|code|pre|blockquote)(?:\s[^<>]*)?/?>"
    r"|<(?:lora|lyco|hypernet):[^<>]*>",
    re.IGNORECASE,
)
_ENTITIES = re.compile(r"&(?:#[0-9]+|#x[0-9a-f]+|[a-z][a-z0-9]*);", re.IGNORECASE)
# What programs write for "there is nothing".
_SAYING = {"Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "No", "So"}
_NOTHING = {"nan", "none", "null", "nil", "undefined", "n/a", "#n/a", "<na>"}


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
    yield from _empty(keys, captions)
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


def _empty(keys: Sequence[str], captions: Sequence[Sequence[str]]) -> Iterator[Finding]:
    """Captions that say nothing, and those in which markup stands beside words."""
    silent: dict[str, str] = {}
    marked: dict[str, str] = {}
    for key, texts in zip(keys, captions, strict=True):
        for text in texts:
            if not _says(text):
                silent.setdefault(key, text[:_SHOWN])
            elif _TAGS.search(text) or _entity(text):
                marked.setdefault(key, text[:_SHOWN])
    if silent:
        what = "captions that say nothing"
        cure = "write what the picture shows, or leave the picture out"
        yield Finding("says-nothing", "warning", what, cure, list(silent), silent)
    if marked:
        what = "captions with markup of web pages or of LoRAs"
        cure = "it is learnt as words: take it out"
        yield Finding("markup", "warning", what, cure, list(marked), marked)


def _says(text: str) -> bool:
    """Whether anything is left of a caption without markup, punctuation and words for nothing."""
    if text.strip().lower() in _NOTHING:
        return False
    if "<" in text or "&" in text:
        text = html.unescape(_TAGS.sub(" ", text))
    # A letter, a number, or a symbol of its own: an emoji says something.
    return any(unicodedata.category(c) in _SAYING for c in text)


def _entity(text: str) -> bool:
    return any(html.unescape(found[0]) != found[0] for found in _ENTITIES.finditer(text))


def _is_name(text: str, key: str) -> bool:
    """Whether a caption is the name of a file; ``cat`` for ``cat.png`` is a word."""
    name = PurePosixPath(key).name.lower()
    low = text.lower()
    if " " not in low and low.endswith(READABLE):
        return True
    stem = name.rpartition(".")[0] or name
    return low == name or (low == stem and re.search(r"[\d_]", stem) is not None)


def excess(
    keys: Sequence[str], captions: Sequence[Sequence[str]], count: Count, limit: int
) -> dict[str, tuple[int, str]]:
    """Pictures with a caption of which the text encoder does not see the end: how many tokens of
    the longest are cut, and that caption.
    """
    texts = list(dict.fromkeys(text for texts in captions for text in texts))
    lengths: dict[str, int] = {}
    for start in range(0, len(texts), _CHUNK):
        part = texts[start : start + _CHUNK]
        lengths |= zip(part, count(part), strict=True)
    found = {}
    for key, mine in zip(keys, captions, strict=True):
        tokens, text = max((lengths[text], text) for text in mine)
        if tokens > limit:
            found[key] = tokens - limit, text
    return found


def _long(
    keys: Sequence[str], captions: Sequence[Sequence[str]], count: Count, limit: int
) -> Iterator[Finding]:
    """Captions of which the text encoder does not see the end."""
    cut = excess(keys, captions, count, limit)
    total = sum(tokens for tokens, _ in cut.values())
    if cut:
        yield Finding(
            "long-captions",
            "warning",
            f"captions longer than {limit} tokens ({total} tokens are cut)",
            "what matters has to come first: shorten them",
            list(cut),
            {key: told_cut(tokens, text, limit) for key, (tokens, text) in cut.items()},
        )


def told_cut(tokens: int, text: str, limit: int) -> str:
    """How much of a caption is cut, in words."""
    told = f"{tokens} tokens are cut"
    unread = len(text) - most(limit)
    return told if unread <= 0 else f"at least {told}: it has {len(text):,} characters"
