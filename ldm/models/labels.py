"""Caption -> label of a class: what a U-Net without cross-attention is told, if anything.

    label = k where the caption says names[k],   K = len(names) where it is ""

The embedding of label K is the null condition of classifier-free guidance (Ho & Salimans 2022,
section 3.2); the embedding is added to that of the timestep (Dhariwal & Nichol 2021, section 3.1).
A model without classes is one whose label is always K: unconditional.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from ldm.diffusion import Condition
from ldm.models.conditioner import TextConditioner

_SHOWN = 200  # characters of a caption in a message


class LabelConditioner:
    """A ``Conditioner`` without text: ``Condition.extra["label"]``, int64 ``b``.

    Args:
        names: of the classes, all different; a caption says one of them as whole words, in any
            case. Of names within names ("apple", "red apple") the longer one counts. None at all is
            an unconditional model, which no caption reaches.
    """

    zeros, mutes = False, False

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._number = {name.lower(): k for k, name in enumerate(names)}
        if len(self._number) < len(self.names):
            raise ValueError(f"classes {', '.join(self.names)}: some are alike")
        longest = sorted(map(re.escape, self._number), key=len, reverse=True)
        self._said = re.compile(rf"(?<!\w)(?:{'|'.join(longest)})(?!\w)")

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Labels ``b 1``; ``ValueError`` for a caption that says no class, or several."""
        return torch.tensor([[self._label(text)] for text in texts], dtype=torch.int64)

    def _label(self, text: str) -> int:
        if not text or not self.names:
            return len(self.names)
        said = set(self._said.findall(text.lower()))
        if len(said) != 1:
            which = f"both {' and '.join(sorted(said))}" if said else "none"
            few = ", ".join(self.names[:10]) + ", ..." * (len(self.names) > 10)
            raise ValueError(f"{text[:_SHOWN]!r} says {which} of the classes {few}")
        return self._number[said.pop()]

    def encode_ids(self, ids: Int64[Tensor, "b 1"]) -> Condition:
        """The condition of labels, where they are."""
        return Condition(extra={"label": ids[:, 0]})

    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of captions or names, on the CPU."""
        return self.encode_ids(self.tokenize(texts))

    @property
    def towers(self) -> Mapping[str, TextConditioner]:
        """There is none."""
        return {}

    def join(self, said: Sequence[Condition]) -> Condition:
        """``ValueError``: no tower says anything."""
        raise ValueError("a model without text has no text towers")

    def mapped(self, change: Callable[[TextConditioner], TextConditioner]) -> LabelConditioner:
        """Itself: there is no tower to change."""
        return self
