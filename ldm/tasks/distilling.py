"""The objective of a student: that of the config, with what a teacher says for its target."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol

from torch import Tensor
from torch.func import functional_call

from ldm.config.distil import (
    AnyDistil,
    ConsistencyDistil,
    GuidanceDistil,
    ProgressiveDistil,
    ReflowDistil,
)
from ldm.diffusion import Condition, Level, Objective, Prediction
from ldm.diffusion.distil import (
    ConsistencyDistillation,
    GuidanceDistillation,
    ProgressiveDistillation,
    Reflow,
)
from ldm.encoding.encoder import Encoder
from ldm.engine.ema import Averages
from ldm.families.model import FamilyDenoiser, Model
from ldm.guidance import ToldScale

_KINDS: dict[type, Any] = {
    GuidanceDistil: GuidanceDistillation,
    ProgressiveDistil: ProgressiveDistillation,
    ConsistencyDistil: ConsistencyDistillation,
    ReflowDistil: Reflow,
}


class Student(Protocol):
    """What an objective asks of a task while it trains."""

    model: Model
    encoder: Encoder
    denoiser: FamilyDenoiser
    average: Averages | None


def of_a_teacher(distil: AnyDistil, objective: Objective, student: Student) -> Any:
    """``objective`` with the target that ``distil`` asks for."""
    kind = _KINDS[type(distil)]
    own = {f.name: getattr(objective, f.name) for f in fields(objective)}
    taken = {f.name for f in fields(kind)} - own.keys() - {"teacher", "average"}
    asked = {name: getattr(distil, name) for name in taken}
    if isinstance(distil, ConsistencyDistil) and distil.target == "average":
        asked["average"] = _Average(student)
    return kind(**own, **asked, teacher=_Guided(distil, student))


class _Guided:
    """The teacher as ``distil`` guides it: not at all, or by what it is told itself, or by the
    distance from what it says of nothing.
    """

    def __init__(self, distil: AnyDistil, student: Student) -> None:
        self.distil, self.student = distil, student

    def __call__(self, x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        """What it says."""
        teacher = self.student.model.teacher
        assert teacher is not None
        predict = teacher.predict
        if self.distil.guided and not teacher.heard:
            predict = ToldScale()(predict, self.student.encoder.null(cond))
        return predict(x_t, level, timestep, cond)


class _Average:
    """The student's network with its averaged weights; before there are any, as it is."""

    def __init__(self, student: Student) -> None:
        self.student = student

    def __call__(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """What it says."""
        student, asked = self.student, (x_t, timestep, cond)
        if student.average is None:
            return student.denoiser(*asked)
        start = f"{student.model.family.network}."
        means = {
            f"network.{name.removeprefix(start)}": mean
            for name, mean in student.average.model.mean.items()
        }
        return functional_call(student.denoiser, means, asked)
