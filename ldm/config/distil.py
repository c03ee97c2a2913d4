"""The ``distil`` of a run's YAML: what a student learns of a teacher (``ldm.diffusion.distil``)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ldm.config.learning import CONTROLNET
from ldm.config.loader import config_class

Scale = Annotated[float, Field(ge=1, lt=1000)]
Levels = Annotated[int, Field(gt=0, le=10_000)]
Solver = Literal["ddim", "heun"]


@config_class
class Distil:
    """A teacher, and how it is asked.

    Args:
        teacher: folder of a pipeline, or of a run, with the noise, the autoencoder and the text
            encoders of this one; None: ``model`` as it is before the run.
        guidance: scale at which the teacher is guided, 1 being none; or two, between which one is
            drawn for each image. A teacher that is told its scale is told it.
        embedding: width of an embedding by which the student's U-Net is told that scale too; it
            begins as zeros, so that the student begins as ``model``. None: it has what its folder
            says, mostly none.
    """

    teacher: str | None = None
    guidance: Scale | tuple[Scale, Scale] = 1.0
    embedding: Annotated[int, Field(ge=4, le=2**14)] | None = None

    def __post_init__(self) -> None:
        low, high = self.scales
        if low > high:
            raise ValueError(f"guidance: [{low}, {high}] is no range: the least comes first")

    @property
    def scales(self) -> tuple[float, float]:
        """Least and greatest scale."""
        given = self.guidance
        return given if isinstance(given, tuple) else (given, given)

    @property
    def middle(self) -> float:
        """The scale at which the student is measured and drawn where nothing else is asked for."""
        return sum(self.scales) / 2

    @property
    def guided(self) -> bool:
        """Whether the teacher is guided at all."""
        return self.scales != (1.0, 1.0)

    @property
    def taught(self) -> bool:
        """Whether a teacher is asked."""
        return True

    @property
    def drawing(self) -> dict[str, Any]:
        """How the student is drawn, by arguments of ``SamplingDefaults``, beside its guidance."""
        return {}


@config_class
class GuidanceDistil(Distil):
    """The student says in one evaluation what the guided teacher says in two (Meng et al. 2023,
    stage one).
    """

    kind: Literal["guidance"] = "guidance"


@config_class
class ProgressiveDistil(Distil):
    """A step of the student is two DDIM steps of the teacher (Salimans & Ho 2022, algorithm 2).

    Args:
        steps: of the student, half as many as the teacher takes.
    """

    kind: Literal["progressive"] = "progressive"
    steps: Levels

    @property
    def drawing(self) -> dict[str, Any]:
        """In these steps."""
        return {"num_inference_steps": self.steps, "sampler": "ddim"}


@config_class
class ConsistencyDistil(Distil):
    """All points of one way of the teacher's ODE lead the student to the same end (Song et al.
    2023; in latent space Luo et al. 2023).

    Args:
        steps: levels that are trained on, from each of which the teacher goes to the next: skips
            of 20 of 1,000 timesteps are 50.
        solver: of the teacher's step: ``ddim``, or ``heun``, of second order and twice as dear;
            ``pair`` asks no teacher: the two points are one picture with the same noise
            (consistency training).
        target: who says the end from the nearer point: the ``student`` as it is, or its
            ``average``, that of ``ema``; no gradient flows there.
        huber: c of the pseudo-Huber distance sqrt(d^2 + c^2) - c; None: d^2.
    """

    kind: Literal["consistency"] = "consistency"
    steps: Annotated[int, Field(gt=1, le=10_000)] = 50
    solver: Solver | Literal["pair"] = "ddim"
    target: Literal["student", "average"] = "student"
    huber: Annotated[float, Field(gt=0)] | None = 0.001

    @property
    def taught(self) -> bool:
        """Whether a teacher is asked."""
        return self.solver != "pair"

    @property
    def drawing(self) -> dict[str, Any]:
        """In a few steps, each of which ends in a picture."""
        return {"num_inference_steps": min(4, self.steps), "sampler": "lcm"}


@config_class
class ReflowDistil(Distil):
    """A rectified flow learns straight ways from noise to what the teacher makes of that noise (Liu
    et al. 2023, algorithm 1): the pictures of the data lend their captions alone.

    Args:
        steps: of the teacher from noise to a picture.
        solver: of each: ``ddim`` (Euler's on a rectified flow), or ``heun``.
    """

    kind: Literal["reflow"] = "reflow"
    steps: Levels = 20
    solver: Solver = "ddim"


AnyDistil = Annotated[
    GuidanceDistil | ProgressiveDistil | ConsistencyDistil | ReflowDistil,
    Field(discriminator="kind"),
]


def refuse(config: Any) -> None:
    """``ValueError`` for keys of a run, a ``TrainConfig``, that contradict its ``distil``."""
    distil, objective = config.distil, config.objective
    if distil is None:
        return
    if config.textual_inversion or any(p.startswith("text_encoder") for p in config.learns):
        raise ValueError(
            "distil: the teacher reads what the text encoders say, so they stay as they are: leave"
            " them out of train, and leave out textual_inversion"
        )
    if CONTROLNET in config.learns:
        raise ValueError("distil: train names a ControlNet, which is another run: leave it out")
    if config.lora and distil.embedding:
        raise ValueError(
            "distil.embedding: the file of a LoRA has no place for it: leave it out, or lora"
        )
    if config.model is None and distil.teacher is None and distil.taught:
        raise ValueError("distil: there is no teacher: give distil.teacher, or model")
    if not distil.taught and (distil.teacher or distil.guided):
        raise ValueError("distil.solver: pair asks no teacher: leave out teacher and guidance")
    if isinstance(distil, (ConsistencyDistil, ProgressiveDistil)) and objective.times:
        raise ValueError("objective.times: distil.steps are drawn evenly: leave it out")
    if isinstance(distil, ConsistencyDistil):
        if distil.target == "average" and config.ema is None:
            raise ValueError("distil.target: there is no average without ema")
        if objective.weighting:
            raise ValueError("objective.weighting: the ends of ways all weigh 1: leave it out")
    if objective.learned_variance:
        raise ValueError("objective.learned_variance: a student has none: leave it out")
