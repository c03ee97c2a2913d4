"""What a model draws for fixed captions, measured.

    suite(draw, ...) -> Report:   captions -> pictures -> figures with 95 % intervals

Every suite has captions of its own, the same for every model, and tells its ceiling and its floor
where those are not plain. Nothing in a suite was trained on what it measures, but a space of
features may have been (``ldm.evaluation.features``). ``ldm.config.suites`` is the table of all;
those of pictures that come with the code stand beside these (``ldm.demo``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ldm.evaluation.distances import (
    Figure,
    Moments,
    frechet,
    frechet_limit,
    jackknife,
    kid,
    mean,
    precision_recall,
)
from ldm.evaluation.features import Judge, Space
from ldm.evaluation.retrieval import Proportion

Draw = Callable[[Sequence[str]], Tensor]
"""Captions to pictures ``n 3 h w`` in [-1, 1], picture n from the n-th seed."""


@dataclass
class Spent:
    """What drawing has cost so far.

    Args:
        pictures: that were drawn.
        evaluations: pictures that passed through the network; two of one with guidance.
        seconds: of the whole: texts, network and decoder.
    """

    pictures: int = 0
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def each(self) -> dict[str, float]:
        """Of one picture, by name; nothing where none was drawn."""
        count = self.pictures
        milliseconds = 1000 * self.seconds / count if count else 0.0
        evaluations = self.evaluations / count if count else 0.0
        found = {"evaluations": evaluations, "milliseconds": milliseconds}
        return found if count else {}


@dataclass
class Report:
    """Figures by name, and what was drawn.

    Args:
        figures: with their intervals and sample sizes.
        captions: of the pictures.
        drawn: ``n 3 h w`` in [-1, 1]; None where nothing is.
        all_shown: whether a sheet shows all pictures; else some.
        spent: what drawing them has cost, where it was counted.
    """

    figures: dict[str, Figure | Proportion]
    captions: list[str]
    drawn: Tensor | None
    all_shown: bool = False
    spent: Spent = field(default_factory=Spent)


def prompts(
    draw: Draw,
    lists: Mapping[str, Sequence[str]],
    judge: Judge | None = None,
) -> Report:
    """Pictures of ``lists`` of prompts, for people to look at; with ``judge`` the mean CLIP score
    of each.
    """
    texts = [text for several in lists.values() for text in several]
    drawn, figures, start = draw(texts), {}, 0
    for name, several in lists.items():
        if judge is not None:
            mine = drawn[start : start + len(several)]
            figures[f"clip score, {name}"] = mean(judge(several, mine))
        start += len(several)
    return Report(figures, texts, drawn, all_shown=True)


def quality(
    draw: Draw,
    texts: Sequence[str],
    truth: Callable[[Space], Tensor],
    spaces: Sequence[Space],
    judge: Judge | None = None,
) -> Report:
    """How near what is drawn for ``texts`` lies to true pictures, of which ``truth`` knows the
    features ``m d``, as sets.

    ``frechet`` is biased upwards at a finite number of pictures, which stands beside it;
    ``frechet limit`` and ``kid`` are not. ``clip score`` is the mean of what ``judge`` gives.
    """
    true = [truth(space) for space in spaces]  # what is wrong with them is told before the drawing
    drawn = draw(texts)
    figures: dict[str, Figure | Proportion] = {}
    if judge is not None:
        figures["clip score"] = mean(judge(texts, drawn))
    for space, known in zip(spaces, true, strict=True):
        found = nearness(space(drawn), known)
        figures |= {f"{key}, {space.name}": figure for key, figure in found.items()}
    return Report(figures, list(texts), drawn)


def nearness(x: Tensor, y: Tensor) -> dict[str, Figure | Proportion]:
    """Of drawn features ``n d`` to true ones ``m d``: Frechet distance, its limit, KID, precision
    and recall.
    """
    moments, found = Moments.of(y), precision_recall(x, y)
    return {
        "frechet": jackknife(x, lambda v: frechet(v, moments)),
        "frechet limit": jackknife(x, lambda v: frechet_limit(v, moments)),
        "kid": kid(x, y),
        "precision": Proportion.of(round(found.precision * len(x)), len(x)),
        "recall": Proportion.of(round(found.recall * len(y)), len(y)),
    }
