"""New words in a text encoder, of which nothing but their embeddings learns.

    v* = argmin_v  E |eps - eps_theta(z_t, t, c_theta(y))|^2,   v the rows of the new tokens in c

(Gal et al. 2022, eq. 2). A word of k vectors is k tokens, ``<cat>``, ``<cat>_1``, ..., as diffusers
spells them; a text names the first, in any case, and ``ldm.models.conditioner`` writes out the
others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.models.tokenizer import folded

TextTower = CLIPTextModel | CLIPTextModelWithProjection
"""A text encoder; of a model that has two each learns rows of its own for the same word."""


def spelt(token: str, vectors: int) -> list[str]:
    """The tokens that stand for a word."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


class Embedding(nn.Module):
    """A token embedding with further rows, which alone learn.

    Args:
        known: the embedding of the tokens that there are, kept as it is.
        first: id of the first new token; rows of ``known`` from there on are not used.
        rows: what the new rows start from, ``k d``.
    """

    def __init__(self, known: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.known, self.first = known, first
        self.rows = nn.Parameter(rows.clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``b l d`` of ``ids``, ``b l``."""
        new = ids >= self.first
        known = self.known(ids.masked_fill(new, 0))
        return torch.where(
            new[..., None], embedding((ids - self.first).clamp(min=0), self.rows), known
        )


def add_rows(text_encoder: TextTower, rows: Tensor, first: int | None = None) -> None:
    """Gives ``text_encoder`` embeddings ``k d`` that learn, for ids from ``first`` on (by default
    behind all that it has).
    """
    known = text_encoder.get_input_embeddings()
    first = known.num_embeddings if first is None else first
    text_encoder.set_input_embeddings(Embedding(known, first, rows))
    text_encoder.config.vocab_size = first + len(rows)


def add_word(
    tokenizer: CLIPTokenizer,
    text_encoder: TextTower,
    token: str,
    initializer: str,
    vectors: int,
) -> None:
    """Teaches both a word of ``vectors`` tokens; its rows alone learn from then on.

    The initializer's tokens are dealt out over the vectors in order; where a vector gets several it
    starts from their mean, and where there are too few tokens neighbours start from the same one.

    Raises:
        ValueError: the tokenizer has the word already, be it in another case, or cannot read the
            initializer, or no text has room for so many vectors.
    """
    if vectors > (room := tokenizer.model_max_length - 2):  # start and end of text
        raise ValueError(f"vectors: {vectors} are too many, a text has room for {room}")
    known_words = {folded(name) for name in tokenizer.get_vocab()}
    taken = [name for name in spelt(token, vectors) if folded(name) in known_words]
    if taken:
        raise ValueError(f"token: the tokenizer has {taken[0]!r} already: choose another word")
    ids = tokenizer(initializer, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"initializer: {initializer!r} holds no word")
    known, first = text_encoder.get_input_embeddings(), len(tokenizer)
    shares = [(i * len(ids) // vectors, (i + 1) * len(ids) // vectors) for i in range(vectors)]
    rows = [known.weight[ids[start : max(end, start + 1)]].mean(0) for start, end in shares]
    tokenizer.add_tokens(spelt(token, vectors))
    if len(tokenizer) != first + vectors:
        raise ValueError(f"token: the tokenizer does not tell {token!r} from other words")
    add_rows(text_encoder, torch.stack(rows).detach(), first)


def rows(text_encoder: TextTower) -> dict[str, nn.Parameter]:
    """The rows that ``add_word`` made, by their name in the text encoder."""
    return {
        f"{name}.rows": module.rows
        for name, module in text_encoder.named_modules()
        if isinstance(module, Embedding)
    }
