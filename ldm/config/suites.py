"""The suites by which is measured what a model draws: what each needs, and where it stands.

Told without torch, so that a config and a command line can be read before it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ldm.lazy import named

if TYPE_CHECKING:
    from ldm.evaluation.runner import Evaluator, References
    from ldm.evaluation.suites import Draw, Report

Need = Literal["text", "spaces", "judge", "pictures", "lists", "noise"]


@dataclass(frozen=True)
class Suite:
    """A row of the table.

    Args:
        about: what is asked, for ``--help``.
        run: ``MODULE:FUNCTION`` that measures: (evaluator, draw, count) -> report.
        count: captions, if nobody says how many; 0: all that there are.
        needs: ``text``: a model that reads it. ``spaces`` of features, ``judge``: a CLIP, if there
            is one. ``pictures`` to compare with. ``lists`` of prompts, ``noise``: what a saved
            folder says of it, neither of which there is in a run.
        classes: ``MODULE:NAMES`` of all classes that it asks of a model that knows classes.
        prepare: ``MODULE:FUNCTION`` that makes what it needs, so that what is wrong with it is told
            before anything is drawn: (references, count) -> None.
    """

    about: str
    run: str
    count: int
    needs: frozenset[Need]
    classes: str | None = None
    prepare: str | None = None

    @property
    def in_runs(self) -> bool:
        """Whether a run's validations can measure it."""
        return not self.needs & {"lists", "noise"}

    def names(self) -> tuple[str, ...]:
        """The classes that it asks of a model that knows classes."""
        return named(self.classes) if self.classes else ()

    def prepared(self, truth: References, count: int | None = None) -> None:
        """Makes what it needs."""
        if self.prepare:
            named(self.prepare)(truth, count or self.count)

    def measured(self, evaluator: Evaluator, draw: Draw, count: int | None = None) -> Report:
        """The figures; ``count`` captions instead of its own number."""
        return named(self.run)(evaluator, draw, count or self.count)


def _needs(*needs: Need) -> frozenset[Need]:
    return frozenset(needs)


_EMOJI, _DIGITS, _RUNNER = "ldm.demo.emoji_suites", "ldm.demo.digit_suites", "ldm.evaluation.runner"
SUITES: dict[str, Suite] = {
    "shapes": Suite(
        "scenes whose colours, shapes, places and numbers a checker reads back from the picture",
        "ldm.demo.shape_suites:known",
        1000,
        _needs("text"),
    ),
    "shapes-new": Suite(
        "the same for (colour, shape) pairs that no model is trained on",
        "ldm.demo.shape_suites:unseen",
        1000,
        _needs("text"),
    ),
    "emoji": Suite(
        "is the nearest of all emoji the one that was asked for",
        f"{_EMOJI}:known",
        500,
        _needs("text", "spaces"),
        prepare=f"{_EMOJI}:prepare",
    ),
    "emoji-new": Suite(
        "the same, each on the coloured background that it is never trained on with",
        f"{_EMOJI}:new",
        200,
        _needs("text", "spaces"),
        prepare=f"{_EMOJI}:prepare_new",
    ),
    "transfer": Suite(
        "emoji in the one of their two styles that they are held out in: is it that style, is it"
        " that concept",
        f"{_EMOJI}:transferred",
        0,
        _needs("text", "spaces"),
        prepare=f"{_EMOJI}:prepare_transfer",
    ),
    "quality": Suite(
        "Frechet and kernel distance to the pictures of --data, precision and recall, CLIP score",
        f"{_RUNNER}:quality",
        2000,
        _needs("text", "spaces", "judge", "pictures"),
        prepare=f"{_RUNNER}:prepare_quality",
    ),
    "prompts": Suite(
        "lists by what is hard about them, for people to look at",
        f"{_RUNNER}:prompts",
        0,
        _needs("text", "spaces", "judge", "lists"),
        prepare=f"{_RUNNER}:prepare_prompts",
    ),
    "loss": Suite(
        "of held-out emoji, by noise level",
        f"{_EMOJI}:loss",
        256,
        _needs("text", "noise"),
    ),
    "digits": Suite(
        "of configs/papers: distance to true digits, and whether each is the one asked for",
        f"{_DIGITS}:drawn",
        500,
        _needs(),
        classes="ldm.demo.digits:NAMES",
        prepare=f"{_DIGITS}:prepare",
    ),
    "likelihood": Suite(
        "bits/dim of held-out digits",
        f"{_DIGITS}:likelihood",
        64,
        _needs("noise"),
        classes="ldm.demo.digits:NAMES",
        prepare=f"{_DIGITS}:prepare",
    ),
}


def that_need(*needs: Need) -> set[str]:
    """The suites that need one of these."""
    return {name for name, suite in SUITES.items() if suite.needs & set(needs)}


def without_text() -> list[str]:
    """The suites of models that read no text, those of configs/papers."""
    return [name for name, suite in SUITES.items() if "text" not in suite.needs]
