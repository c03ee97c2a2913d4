"""What ``ldm sample`` is told of models that enlarge what came before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.failure import fail

if TYPE_CHECKING:
    from ldm.cascade import Cascade

Then = Annotated[
    list[Path] | None,
    typer.Option(help="A folder that enlarges what came before. May be repeated."),
]
ThenGuidance = Annotated[
    list[float] | None,
    typer.Option(help="Guidance of --then, in place of --guidance. Once, or once for each."),
]
NoiseLevel = Annotated[
    list[int] | None,
    typer.Option(help="Level at which --then is told what came before. Once, or for each."),
]
Stages = Annotated[
    bool, typer.Option("--stages", help="Also the pictures before each --then, -stage1, ...")
]


@dataclass(frozen=True)
class Behind:
    """Options of the models behind the first, each as it was given.

    Args:
        many: how many they are.
        scales: of guidance.
        levels: at which each is told what came before.
        stages: whether the pictures before each are written too.
    """

    many: int
    scales: Sequence[float]
    levels: Sequence[int]
    stages: bool

    def check(self, **alone: Any) -> None:
        """Ends the command for what is wrong before anything is loaded, ``alone`` among it:
        options of one model, None where they are not given.
        """
        for option, given in (("then-guidance", self.scales), ("noise-level", self.levels)):
            if given and not self.many:
                fail(f"--{option} is of --then, of which there is none")
            if len(given) > 1 and len(given) != self.many:
                fail(
                    f"--{option} is given {len(given)} times for {self.many} --then: once, or for"
                    " each"
                )
        if self.stages and not self.many:
            fail("--stages are those of --then, of which there is none")
        for name, value in alone.items():
            if value is not None and self.many:
                fail(f"--{name.replace('_', '-')} is of one model: leave it out, or --then")

    def each(self, given: Sequence[Any]) -> list[Any]:
        """One of each model, None where nothing is given."""
        return list(given) * self.many if len(given) == 1 else [*given] or [None] * self.many


@dataclass(frozen=True)
class Through:
    """Draws by several models what is asked of the first.

    Args:
        cascade: all of them.
        behind: what is asked of those behind it.
    """

    cascade: Cascade
    behind: Behind

    @property
    def stages(self) -> Sequence[Any]:
        """The pipelines, in order."""
        return self.cascade.stages

    def draw(
        self,
        call: Mapping[str, Any],
        *,
        steps: int | None,
        guidance: float | None,
        sampler: str | None,
    ) -> tuple[Any, list[Any]]:
        """The pictures, and those before each of the models, if they are written.

        Args:
            call: arguments of the call of the first model.
            steps: of all models; None: as many as each folder states.
            guidance: scale, the same; those behind may have one of their own.
            sampler: its name, the same.

        Raises:
            ValueError: one of them is wrong.
        """
        scales = [None, *self.behind.each(self.behind.scales)]
        own = [
            stage.sampling_defaults.but(
                num_inference_steps=steps,
                guidance_scale=guidance if scale is None else scale,
                sampler=sampler,
            )
            for stage, scale in zip(self.stages, scales, strict=True)
        ]
        found = self.cascade(
            guidance=[each.guidance_scale for each in own],
            steps=[each.num_inference_steps for each in own],
            sampler=[None if each.sampler == "model" else each.sampler for each in own],
            noise_level=self.behind.each(self.behind.levels),
            intermediate=self.behind.stages,
            **{name: value for name, value in call.items() if name not in _EACH},
        )
        return found.images, found.stages[:-1]


_EACH = {"num_inference_steps", "guidance_scale", "sampler"}
"""Arguments that a cascade takes for each model."""
