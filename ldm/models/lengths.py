"""How much of a text a tokenizer is given: time and memory go by all of it, whatever it keeps."""

from __future__ import annotations

import re

_CHARACTERS = 256  # for a token; the longest of CLIP's is one of 32 bytes
_SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # what tokenizers take for white space


def most(length: int) -> int:
    """Characters that can have a part in the first ``length`` tokens of a text, and far more."""
    return _CHARACTERS * length


def shortened(text: str, length: int) -> str:
    """``text`` for a tokenizer that keeps ``length`` tokens: as it is, or its first ``most``
    characters, white space as one, where it is longer. The tokens that are kept are the same.
    """
    wanted = taken = most(length)
    if len(text) <= wanted:
        return text
    while len(found := _SPACE.sub(" ", text[:taken])) < wanted and taken < len(text):
        taken *= 8
    return found[:wanted]
