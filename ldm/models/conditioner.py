"""Text -> Condition: CLIP and T5 text towers read exactly as stock pipelines read them.

    tokens = LayerNorm(tower(ids)), or a hidden state, padding included
    pooled = tokens[first end of text], or its projection

(Rombach et al. 2022, section 3.3; Radford et al. 2021, section 2.4). The unconditional branch of
classifier-free guidance is the encoding of the empty text (Ho & Salimans 2022, section 3.2).
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import CLIPTextConfig, PreTrainedTokenizerFast

from ldm.diffusion import Condition
from ldm.models.lengths import most, shortened
from ldm.models.said import said
from ldm.models.tokenizer import TURN, TokenizerShape, unreadable

log = logging.getLogger(__name__)

_NAMED = 3  # texts that are too long, in the life of a conditioner
_SHOWN = 200  # characters of what is cut
_unnamed: ContextVar[bool] = ContextVar("unnamed", default=False)
_OLD_EOS = 2  # where a config says so, the tower pools at the largest id of a text


@runtime_checkable
class Conditioner(Protocol):
    """Text -> Condition, in two halves: ids are what a data loader hands over."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Int64 ids ``b l`` on the CPU; ``ValueError`` for a text that says nothing to it."""
        ...

    def encode_ids(self, ids: Int64[Tensor, "b l"]) -> Condition:
        """The condition of ids."""
        ...

    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of texts."""
        ...

    mutes: bool
    """Whether a tower that is not told a text which others are told says zeros (``silent``); else
    it is told the empty one."""

    zeros: bool
    """Whether the condition of no text, the other branch of classifier-free guidance, is zeros
    (``silent``), and not what is said to the empty one."""

    @property
    def towers(self) -> Mapping[str, TextConditioner]:
        """The text towers, by the folders of their networks; what each says may be cached."""
        ...

    def join(self, said: Sequence[Condition]) -> Condition:
        """One condition of what all towers say."""
        ...

    def mapped(self, change: Callable[[TextConditioner], TextConditioner]) -> Conditioner:
        """The same of changed towers."""
        ...


@contextmanager
def unnamed() -> Iterator[None]:
    """Inside, texts that are too long are cut without a word: they are told of elsewhere."""
    before = _unnamed.set(True)
    try:
        yield
    finally:
        _unnamed.reset(before)


class TextConditioner:
    """A ``Conditioner`` made of a tokenizer and a text tower, both used as they are.

    Args:
        tokenizer: its ``model_max_length`` is the length of every condition; of its shape alone
            there are conditions of ids, and none of texts.
        text_encoder: a ``CLIPTextModel`` or a ``T5EncoderModel``, also compiled; gradients flow
            through it unless it is frozen or called under ``no_grad``.
        name: folder of the network.
        layer: the hidden state that is read as it is, -2 the one before the last; None: what the
            tower ends in.
        pooled: name of the output that is one vector a text; None: there is none.
        length: of every condition at most.
        masked: whether the tower is given the mask of padding, also where its config does not say.
        lower: whether texts are read in small letters, without white space at their ends.

    Raises:
        ValueError: the two do not belong together (length, vocabulary or end-of-text id).
    """

    zeros, mutes = False, False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | TokenizerShape,
        text_encoder: Any,
        name: str = "text_encoder",
        layer: int | None = None,
        pooled: str | None = "pooler_output",
        length: int | None = None,
        *,
        masked: bool = False,
        lower: bool = False,
    ) -> None:
        config, most = text_encoder.config, tokenizer.model_max_length
        self.length = most if length is None else min(length, most)
        """Tokens of every condition, the specials and padding included."""
        # A T5 has relative positions, of any number.
        positions = getattr(config, "max_position_embeddings", self.length)
        if self.length > positions:
            raise ValueError(
                f"the tokenizer pads to {self.length} tokens but the text encoder "
                f"has {positions} positions: set model_max_length"
            )
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens but the text encoder embeds "
                f"{config.vocab_size}: they are not of the same model"
            )
        if config.eos_token_id not in (_OLD_EOS, tokenizer.eos_token_id):
            raise ValueError(
                f"the tokenizer ends texts with id {tokenizer.eos_token_id} but the text encoder "
                f"pools at eos_token_id={config.eos_token_id}: they are not of the same model"
            )
        self.tokenizer: Any = tokenizer
        self.text_encoder = text_encoder
        self.name, self.layer, self.pooled, self.skip = name, layer, pooled, 0
        self.lower = lower
        self._marks = tuple(n for n, is_so in (("masked", masked), ("lower", lower)) if is_so)
        # Stock Stable Diffusion hands the mask to the tower only where its config says so.
        self.masked = masked or getattr(config, "use_attention_mask", False)
        self._reported: set[str] = set()
        # Words of several vectors (textual inversion): what follows their first token, by its id.
        self._further: dict[int, str] = {}
        added = tokenizer.added_tokens_encoder
        for token in added:
            further = itertools.takewhile(
                added.__contains__, (f"{token}_{number}" for number in itertools.count(1))
            )
            if rest := list(further):
                self._further[added[token]] = "".join(f" {more}" for more in rest)

    @property
    def printed(self) -> tuple[str, tuple[Any, ...]]:
        """All that the ids of a text depend on, and how they are read, with a repr that tells
        it.
        """
        backend = self.tokenizer.backend_tokenizer
        with TURN:
            backend.no_truncation()  # of the last call, no part of the tokenizer
            backend.no_padding()
            return backend.to_str(), (self.tokenizer.pad_token_id, self.length, *self._marks)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Int64 ids ``b l`` on the CPU, cut and padded to ``length``; a word of textual inversion
        stands for all of its tokens.

        Case says nothing: CLIP's tokenizer lower-cases texts, new words among them, and what it
        takes for a word is that word here. A text that is too long is reported once in the life of
        this object, with the words that were cut; of many the first are, and ``unnamed`` none.
        """
        given = texts
        texts = self._written_out([shortened(text, self.length) for text in given])
        # Overflowing tokens come back as further rows: one pass finds the ids and what was cut.
        rows = self._read(
            texts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        ids: list[list[int]] = []
        for row, sample in enumerate(rows["overflow_to_sample_mapping"]):
            if sample == len(ids):
                ids.append(rows["input_ids"][row])
            elif self.worth_a_word(given[sample]):
                begins = rows["input_ids"][row][0] == self.tokenizer.bos_token_id
                first_cut = rows["offset_mapping"][row][int(begins)][0]
                unread = max(0, len(given[sample]) - most(self.length))
                self._report(texts[sample], first_cut, unread)
        return torch.tensor(ids, dtype=torch.int64).reshape(len(ids), self.length)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is before it is cut, the two specials included; a text of very
        many characters is counted as far as it is read.
        """
        short = [shortened(text, self.length) for text in texts]
        return [len(ids) for ids in self.read(short, specials=True)]

    def read(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
        """Ids of texts as long as they are, with or without the two specials; a word of textual
        inversion stands for all of its tokens.
        """
        written = self._written_out(texts)
        if not written:
            return []
        return self._read(written, add_special_tokens=specials, verbose=False)["input_ids"]

    def further(self, token: int) -> int:
        """How many tokens belong behind ``token``, the first of a word of textual inversion."""
        return len(self._further.get(token, "").split())

    @property
    def columns(self) -> int:
        """Numbers that the ids of a text are."""
        return self.length

    def _read(self, texts: list[str], **how: Any) -> Any:
        """What the tokenizer makes of ``texts``: of one thread at a time."""
        with TURN:
            return self.tokenizer(texts, **how)

    def _written_out(self, texts: Sequence[str]) -> list[str]:
        """Behind every word of several vectors its further tokens; ``<cat>_1`` alone is that token
        alone.
        """
        for text in texts:
            if wrong := unreadable(text):
                raise ValueError(f"the text {text[:100]!r} {wrong}")
        if self.lower:
            texts = [text.lower().strip() for text in texts]
        if not self._further or not texts:
            return list(texts)
        read = self._read(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        found = []
        for text, ids, places in zip(texts, read.input_ids, read.offset_mapping, strict=True):
            for token, (_, end) in reversed([*zip(ids, places, strict=True)]):
                if further := self._further.get(token):
                    text = text[:end] + further + text[end:]
            found.append(text)
        return found

    def worth_a_word(self, text: str) -> bool:
        """Whether the end that is cut off is to be told."""
        if _unnamed.get() or text in self._reported or len(self._reported) > _NAMED:
            return False
        self._reported.add(text)
        if len(self._reported) > _NAMED:
            log.warning(
                "further texts that are too long are not named; `ldm data check --tokenizer` lists"
                " those of a data set"
            )
        return len(self._reported) <= _NAMED

    def _report(self, text: str, first_cut: int, unread: int) -> None:
        """Tells what is cut, and ``unread`` characters behind it."""
        start = first_cut
        while start > 0 and not text[start - 1].isspace():
            start -= 1  # a word that lost its end is lost
        if not text[:start].strip():
            start = first_cut
        cut = text[start:]
        count = len(cut) + unread
        log.warning(
            "a text is longer than %d tokens, this part of it is not seen: %r%s",
            self.length,
            cut[:_SHOWN],
            f" ... ({count:,} characters)" if count > _SHOWN else "",
        )

    def encode(self, texts: Sequence[str]) -> Condition:
        """Condition of ``texts`` on the text encoder's device: tokens ``b l d``, mask ``b l``,
        pooled ``b d``.
        """
        return self.encode_ids(self.tokenize(texts))

    def encode_ids(self, ids: Int64[Tensor, "b l"]) -> Condition:
        """Condition of ``ids``, ``b l`` as ``tokenize`` returns them; differentiable in the text
        encoder.
        """
        ids = ids.to(self.text_encoder.device)
        mask = self._real(ids)
        told = self.text_encoder, ids, mask, self.layer, self.pooled
        return said(*told, masked=self.masked, skip=self.skip)

    def skipping(self, layers: int) -> TextConditioner:
        """The same, read so many layers further from the end (``clip_skip`` of diffusers); a T5 is
        read as it was.

        Raises:
            ValueError: there are no such layers.
        """
        config = self.text_encoder.config
        if not issubclass(type(config), CLIPTextConfig):
            return self
        most = config.num_hidden_layers + 1 + (-1 if self.layer is None else self.layer)
        if not 0 <= layers <= most:
            raise ValueError(
                f"clip_skip must lie in 0..{most}, as {self.name} has layers, not {layers}"
            )
        skipping = copy.copy(self)
        skipping.skip = layers
        return skipping

    @property
    def towers(self) -> Mapping[str, TextConditioner]:
        """The one tower."""
        return {self.name: self}

    def mapped(self, change: Callable[[TextConditioner], TextConditioner]) -> Conditioner:
        """The changed tower."""
        return change(self)

    def join(self, said: Sequence[Condition]) -> Condition:
        """What this one says."""
        (only,) = said
        return only

    def _real(self, ids: Tensor) -> Tensor:
        """Bool ``b l``: true up to the end-of-text token, which may also be what pads."""
        padding = ids == self.tokenizer.pad_token_id
        trailing = padding.flip(1).cumprod(1).flip(1).bool()
        if self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            first = trailing & (trailing.cumsum(1) == 1)
            return ~trailing | first
        return ~trailing

    def null(self, n: int) -> Condition:
        """``n`` times the encoding of the empty text."""
        return self.encode([""]).map(lambda x: x.expand(n, *x.shape[1:]))


class Towers:
    """A ``Conditioner`` of several text towers.

    Args:
        towers: in the order of their ids, which lie side by side in one tensor.
        join: one condition of what all say.
        zeros: whether the null condition is zeros, and not what they say to the empty text.
        mutes: see ``Conditioner``.
    """

    def __init__(
        self,
        towers: Sequence[TextConditioner],
        join: Callable[[Sequence[Condition]], Condition],
        *,
        zeros: bool = False,
        mutes: bool = False,
    ) -> None:
        self._towers, self._join = {tower.name: tower for tower in towers}, join
        self.zeros, self.mutes = zeros, mutes

    @property
    def towers(self) -> Mapping[str, TextConditioner]:
        """By the folders of their networks, in order."""
        return self._towers

    def join(self, said: Sequence[Condition]) -> Condition:
        """One condition of what all towers say."""
        return self._join(said)

    def mapped(self, change: Callable[[TextConditioner], TextConditioner]) -> Conditioner:
        """The same of changed towers."""
        changed = [change(tower) for tower in self._towers.values()]
        return Towers(changed, self._join, zeros=self.zeros, mutes=self.mutes)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Int64 ids ``b l`` on the CPU, those of all towers side by side."""
        if not self._towers:
            raise ValueError("without a text encoder pass prompt_embeds and negative_prompt_embeds")
        return torch.cat([tower.tokenize(texts) for tower in self._towers.values()], 1)

    def encode_ids(self, ids: Int64[Tensor, "b l"]) -> Condition:
        """The condition of ``ids`` as ``tokenize`` returns them."""
        towers = [*self._towers.values()]
        parts = ids.split([tower.columns for tower in towers], 1)
        return self.join([t.encode_ids(mine) for t, mine in zip(towers, parts, strict=True)])

    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of ``texts``."""
        return self.encode_ids(self.tokenize(texts))


def silent(cond: Condition) -> Condition:
    """``cond`` with zeros for tokens and pooled vector."""
    said = (cond.tokens, cond.pooled)
    tokens, pooled = (None if x is None else torch.zeros_like(x) for x in said)
    return replace(cond, tokens=tokens, pooled=pooled)
