"""A tokenizer of one's own in T5's format: pieces of words with their scores (Kudo 2018).

    ids:  <pad> | </s> | <unk> | letters | pieces

A text is read in as few pieces as there can be, of those that were merged first: what a word is
made of are the merges of byte-pair encoding (Sennrich et al. 2016), which unlike the likelihoods of
the unigram model do not depend on the order in which numbers are added.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, models, trainers
from transformers import T5Tokenizer

from ldm.models.lengths import shortened

SPECIALS = ("<pad>", "</s>", "<unk>")
_SPACE = "▁"


def train_unigram(texts: Iterable[str], vocab_size: int, max_length: int) -> T5Tokenizer:
    """The tokenizer of ``texts``, the same for the same texts in any order.

    Args:
        texts: what the pieces are counted in; a pair has to occur twice to become one.
        vocab_size: at most this many tokens; fewer if the texts do not have so many pairs, so size
            embeddings by ``len(tokenizer)``. Letters that find no room are unknown, the rarest
            first; those of printable ASCII always do.
        max_length: tokens a text is cut and padded to, the end included.

    Raises:
        ValueError: ``vocab_size`` has no room for the letters, or ``max_length`` none for a word.
    """
    ascii_letters = set(string.digits + string.ascii_letters + string.punctuation)
    if vocab_size < len(ascii_letters) + 1 + len(SPECIALS):
        raise ValueError(
            f"vocab_size={vocab_size}: the printable ASCII letters and three specials need"
            f" {len(ascii_letters) + 1 + len(SPECIALS)}"
        )
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a word and its end need 2")
    short = sorted(shortened(text, max_length) for text in texts)
    counted = Counter(letter for text in short for letter in "".join(text.split()))
    room = vocab_size - len(SPECIALS) - 1 - len(ascii_letters)
    others = sorted(set(counted) - ascii_letters, key=lambda letter: (-counted[letter], letter))
    letters = sorted(ascii_letters | {*others[:room]} | {_SPACE})
    plain = T5Tokenizer(extra_ids=0).backend_tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS[2], fuse_unk=True))
    tokenizer.pre_tokenizer = plain.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        # Declared up front, they keep their ids, whose order breaks ties between merges.
        special_tokens=[*SPECIALS, *letters],
        limit_alphabet=0,
        show_progress=False,
    )
    tokenizer.train_from_iterator(short, trainer)
    found = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    first = len(SPECIALS) + len(letters)
    pieces = [(name, 0.0) for name in SPECIALS]
    pieces += [(name, -2.0) for name in letters]
    # Fewer pieces always win: a sum of scores differs by less than 1 within a count.
    rest = [name for name, number in found if number >= first]
    pieces += [(name, -1.0 - rank / 2**24) for rank, name in enumerate(rest)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)
