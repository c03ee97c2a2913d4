"""A tokenizer of one's own in CLIP's format: byte-level byte-pair encoding of lower-cased text.

    ids:  256 bytes | 256 bytes with ``</w>`` (end of a word) | merges | start | end of text

(Sennrich et al. 2016; Radford et al. 2021). All 512 byte tokens are always there, seen in training
or not, so that no character is ever dropped. The end of text has the largest id, which is also
where text towers with an old config look for it.
"""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from ldm.models.lengths import shortened

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
TURN = threading.Lock()
"""Held while a tokenizer reads: what it pads and cuts to is its state, which every reading sets."""
_WRONG = "it was decoded in another encoding than its own"


@dataclass(frozen=True)
class TokenizerShape:
    """The lengths and ids of a tokenizer that has no words, for a text encoder of which only the
    shape is known.

    Args:
        model_max_length: tokens of every text.
        eos_token_id: what ends a text.
        pad_token_id: what fills it up.
        added_tokens_encoder: none.
    """

    model_max_length: int
    eos_token_id: int
    pad_token_id: int
    added_tokens_encoder: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, text_encoder: Any, length: int) -> TokenizerShape:
        """The one of ``text_encoder``, a network of transformers, at ``length`` tokens."""
        end = text_encoder.config.eos_token_id
        return cls(length, end, end)

    def __len__(self) -> int:
        return 0


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """The tokenizer of ``texts``, the same for the same texts in any order.

    Args:
        texts: what the merges are counted in; a pair has to occur twice to become a token.
        vocab_size: at most this many tokens, 512 bytes and two specials included; fewer if the
            texts do not have so many pairs, so size embeddings by ``len(tokenizer)``.
        max_length: tokens a text is cut and padded to, the two specials included (CLIP: 77).

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes, or ``max_length`` none for a single
            word.
    """
    # Sorted as byte-level alphabets are, so the ids do not depend on the texts.
    letters = sorted(ByteLevel.alphabet())
    characters = letters + [letter + WORD_END for letter in letters]
    if vocab_size < len(characters) + 2:
        raise ValueError(
            f"vocab_size={vocab_size}: {len(characters)} bytes and two specials need more"
        )
    if max_length < 3:
        raise ValueError(f"max_length={max_length}: a word and two specials need 3")
    plain = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer, tokenizer.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        # Declared up front, they keep their ids: the plain way adds only the word ends that it
        # meets, in an order that depends on hashing, and that order breaks ties between merges.
        special_tokens=characters,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator((shortened(text, max_length) for text in texts), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(model["vocab"])
    for special in (START, END):
        vocab[special] = len(vocab)
    return CLIPTokenizer(
        vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=max_length
    )


def folded(text: str) -> str:
    """``text`` as CLIP's tokenizer compares it: two words that differ in case are one."""
    return unicodedata.normalize("NFC", text).lower()


def unreadable(text: str) -> str | None:
    """What of ``text`` no tokenizer can read, if there is anything."""
    wrong = re.search("[\ud800-\udfff]", text)
    return wrong and f"holds half a character, the lone surrogate {wrong[0]!r}: {_WRONG}"


def settings_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """All that decides which ids a text becomes, and no more: two tokenizers of the same settings
    are the same.
    """
    ends = tokenizer.pad_token_id, tokenizer.model_max_length
    with TURN:
        _forget_last_call(tokenizer)
        return f"{tokenizer.backend_tokenizer.to_str()} {ends}"


def _forget_last_call(tokenizer: PreTrainedTokenizerFast) -> None:
    """What the last call padded and cut to is no part of the tokenizer, but would be written."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Writes ``tokenizer.json`` and, of CLIP's for older readers, ``vocab.json`` and
    ``merges.txt``.
    """
    folder = Path(folder)
    with TURN:
        _forget_last_call(tokenizer)
        tokenizer.save_pretrained(folder)
        if isinstance(tokenizer, CLIPTokenizer):
            tokenizer.backend_tokenizer.model.save(str(folder))
