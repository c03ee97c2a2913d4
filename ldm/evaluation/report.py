"""What suites have measured, as files, tables, sheets and lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.data.images import to_image
from ldm.data.items import evenly_spaced
from ldm.evaluation import charts, sheets
from ldm.evaluation.distances import Figure
from ldm.evaluation.retrieval import Proportion
from ldm.evaluation.suites import Report
from ldm.sampling import SamplingDefaults
from ldm.storage.disk import write_text

_SHOWN = 32


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Args:
        steps: of the sampler.
        guidance: scale.
        sampler: named sampler.
        seed: picture i is drawn from seed + i.
        batch: pictures at a time, which changes none of them.
        threshold: how x0 is kept within bounds (``Threshold.stated``); None: as the folder says.
        noise_level: at which models behind are told what came before; None: as they say.
    """

    steps: int
    guidance: float
    sampler: str
    seed: int
    batch: int
    threshold: str | None = None
    noise_level: int | None = None

    @classmethod
    def of(
        cls, how: SamplingDefaults, seed: int, batch: int, threshold: str | None = None
    ) -> Drawing:
        """As ``how`` says, with a sampler that it names."""
        assert how.sampler is not None
        told = how.num_inference_steps, how.guidance_scale, how.sampler
        return cls(*told, seed, batch, threshold)


def write(
    out: Path, models: Sequence[Path], loras: Sequence[tuple[Path, float]], data: str | None,
    reports: Mapping[str, Sequence[Report]], drawings: Sequence[Drawing], swept: str,
    environment: Mapping[str, Any],
) -> None:  # fmt: skip
    """``figures.json`` and ``table.md`` of all suites so far, of ``models`` in a row with ``loras``
    at their weights, ``data`` compared with, and ``environment`` measured in.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "model": " > ".join(model.resolve().name for model in models),
        "lora": {path.resolve().name: weight for path, weight in loras},
        "data": data,
        "environment": environment,
        "measured": [
            {
                "suite": suite,
                "drawing": asdict(drawing),
                "figures": {k: v._asdict() for k, v in report.figures.items()},
                "spent": asdict(report.spent),
            }
            for suite, several in reports.items()
            for drawing, report in zip(drawings, several, strict=True)
        ],
    }
    write_text(out / "figures.json", json.dumps(record, indent=1))
    write_text(out / "table.md", markdown(reports, drawings, swept))


def show(
    out: Path, suite: str, several: Sequence[Report], drawings: Sequence[Drawing], swept: str
) -> None:
    """A sheet of ``suite``, and of a sweep its charts."""
    drawn = [report.drawn for report in several if report.drawn is not None]
    if drawn:
        every = range(len(drawn[0]))
        shown = list(every) if several[0].all_shown else evenly_spaced(every, _SHOWN)
        cells = [[to_image(x[n]) for x in drawn] for n in shown]
        captions = [several[0].captions[n] for n in shown]
        columns = 8 if len(several) == 1 else max(1, 15 // len(several))
        page = sheets.sheet(cells, captions, columns=columns)
        sheets.save(page, out / f"{suite}.png")
    figures = [report.figures for report in several]
    if swept and any(isinstance(figure, Proportion) for figure in figures[0].values()):
        values = [getattr(drawing, swept) for drawing in drawings]
        charts.lines(swept, values, figures, out / f"{suite}-{swept}.png")
        if "clip score" in figures[0]:
            charts.trade_off(swept, values, figures, out / f"{suite}-frechet-clip.png")


def flat(reports: Mapping[str, Report]) -> dict[str, float]:
    """Every figure of suites as ``SUITE/FIGURE``, with ``/low`` and ``/high``, its 95 % interval,
    and ``/n``, its sample size.
    """
    return {
        f"{suite}/{name}{ending}": value
        for suite, report in reports.items()
        for name, figure in report.figures.items()
        for ending, value in zip(("", "/low", "/high", "/n"), figure, strict=True)
    }


def rows(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """Name, sample size, and the value of every drawing with its interval, of each figure; and
    what a picture has cost.
    """
    figures = [
        (key, str(figure.n), *(_short(report.figures[key]) for report in reports))
        for key, figure in reports[0].figures.items()
    ]
    costs = [
        (f"{key} a picture", str(first.pictures), *(f"{r.spent.each[key]:.4g}" for r in reports))
        for first in [reports[0].spent]
        for key in first.each
    ]
    return figures + costs


def heads(drawings: Sequence[Drawing], swept: str) -> list[str]:
    """Those of ``rows``."""
    columns = [f"{swept} {getattr(d, swept)}" if swept else "measured" for d in drawings]
    return ["figure", "n", *columns]


def _short(figure: Figure | Proportion) -> str:
    if isinstance(figure, Proportion):
        value, low, high = (f"{100 * share:.1f}" for share in figure[:3])
        return f"{value} % [{low}, {high}]"
    return f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"


def markdown(
    reports: Mapping[str, Sequence[Report]], drawings: Sequence[Drawing], swept: str
) -> str:
    """One table: a line a figure, a column a drawing, 95 % intervals in brackets."""
    top = ["suite", *heads(drawings, swept)]
    lines = [" | ".join(top), "|".join("---" for _ in top)]
    lines += [
        " | ".join((suite, *row)) for suite, several in reports.items() for row in rows(several)
    ]
    return "".join(f"| {line} |\n" for line in lines)
