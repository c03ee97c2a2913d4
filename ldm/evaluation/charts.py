"""Charts of a sweep: figures against what was swept, and the Frechet distance against the CLIP
score as in Saharia et al. 2022, figure 4. Drawn by matplotlib (``pip install 'ldm[evaluate]'``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.evaluation.distances import Figure
from ldm.evaluation.retrieval import Proportion

Figures = Mapping[str, Figure | Proportion]

_BESIDE = {", ceiling": "--", " ceiling": "--", " shuffled": ":", " other style": "-."}


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def lines(name: str, values: Sequence[Any], columns: Sequence[Figures], file: Path) -> None:
    """Every share (a number in [0, 1]) against ``values`` of ``name``, with its 95 % interval; what
    stands beside it (ceiling, floor, other style) in its colour, broken.

    Args:
        name: what was swept; steps are drawn on a logarithmic axis.
        values: one a column, names or numbers.
        columns: figures, the same keys in each.
        file: a PNG.
    """
    page, axes = _page()
    import matplotlib

    colours: dict[str, int] = {}
    shares = [key for key, figure in columns[0].items() if isinstance(figure, Proportion)]
    for key in shares:
        figures = [column[key] for column in columns]
        below = [max(0.0, f.value - f.low) * 100 for f in figures]
        above = [max(0.0, f.high - f.value) * 100 for f in figures]
        middle = [f.value * 100 for f in figures]
        word = next((word for word in _BESIDE if word in key), "")
        style, base = _BESIDE.get(word, "-"), key.replace(word, "")
        # The dark ones of tab20 first: each stands beside its light one.
        colour = colours.setdefault(base, (2 * len(colours) + len(colours) // 10) % 20)
        axes.errorbar(
            values, middle, [below, above], label=key, capsize=2, marker="o", ms=3,
            linestyle=style, color=matplotlib.color_sequences["tab20"][colour],
        )  # fmt: skip
    if name == "steps":
        axes.set_xscale("log")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
    axes.set(xlabel=name, ylabel="%")
    axes.legend(fontsize=7, handlelength=4, loc="center left", bbox_to_anchor=(1, 0.5))
    page.savefig(file, dpi=120, bbox_inches="tight")


def trade_off(name: str, values: Sequence[Any], columns: Sequence[Figures], file: Path) -> None:
    """The first Frechet distance against the CLIP score, a point for each of ``values``."""
    page, axes = _page()
    distance = next(key for key in columns[0] if key.startswith("frechet,"))
    x, y = ([column[key] for column in columns] for key in ("clip score", distance))
    axes.errorbar(
        [f.value for f in x],
        [f.value for f in y],
        [[f.value - f.low for f in y], [f.high - f.value for f in y]],
        [[f.value - f.low for f in x], [f.high - f.value for f in x]],
        marker="o", ms=3, capsize=2,
    )  # fmt: skip
    for value, along, up in zip(values, x, y, strict=True):
        axes.annotate(
            str(value), (along.value, up.value), (4, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="CLIP score", ylabel=distance, title=f"by {name}")
    page.savefig(file, dpi=120, bbox_inches="tight")


def _page() -> tuple[Any, Any]:
    import matplotlib.figure  # no pyplot: that keeps state of its own

    page = matplotlib.figure.Figure(figsize=(6, 4))
    axes = page.subplots()
    axes.grid(alpha=0.3)
    return page, axes
