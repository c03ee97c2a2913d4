"""The fields of ``process`` and ``objective`` in a run's YAML.

Each of these mirrors a class of ``ldm.diffusion``, which it names, tells the bounds of its numbers,
and leaves out what the model that is fine-tuned states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from ldm.config.loader import config_class
from ldm.diffusion import Edm, Schedule, TargetName, WeightingName, times
from ldm.diffusion.shift import SizeShift

if TYPE_CHECKING:
    from ldm.diffusion import Weighting

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Steps = Annotated[int, Field(gt=0, le=10**6)]
Tokens = Annotated[int, Field(gt=0, le=2**24)]
PositiveNumber = Annotated[float, Field(gt=0)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


def _named(value: Any) -> Any:
    """``name`` as ``{kind: name}``."""
    return {"kind": value} if isinstance(value, str) else value


def _process_kind(value: Any) -> str:
    given = value.get("kind") if isinstance(value, dict) else value.kind
    return given or "discrete"


@config_class
class ProcessSettings:
    """The fields of ``DiscreteVP``; None leaves one to the model that is fine-tuned. With no field
    given the process is that of the model, whatever its kind.
    """

    mirrors: ClassVar[str] = "ldm.diffusion.process:DiscreteVP"

    kind: Literal["discrete"] | None = None
    schedule: Schedule | None = None
    beta_start: OpenFraction | None = None
    beta_end: OpenFraction | None = None
    num_train_timesteps: Steps | None = None
    zero_terminal_snr: bool | None = None


@config_class
class VpSettings:
    """The fields of ``ContinuousVP``."""

    mirrors: ClassVar[str] = "ldm.diffusion.process:ContinuousVP"

    kind: Literal["vp"] = "vp"
    beta_min: PositiveNumber | None = None
    beta_max: PositiveNumber | None = None
    num_train_timesteps: Steps | None = None


@config_class
class CosineSettings:
    """The fields of ``Cosine``."""

    mirrors: ClassVar[str] = "ldm.diffusion.process:Cosine"

    kind: Literal["cosine"] = "cosine"
    num_train_timesteps: Steps | None = None


@config_class
class VeSettings:
    """The fields of ``VarianceExploding``."""

    mirrors: ClassVar[str] = "ldm.diffusion.process:VarianceExploding"

    kind: Literal["ve"] = "ve"
    sigma_min: PositiveNumber | None = None
    sigma_max: PositiveNumber | None = None
    num_train_timesteps: Steps | None = None

    def __post_init__(self) -> None:
        low, high = self.sigma_min, self.sigma_max
        if low is not None and high is not None and low >= high:
            raise ValueError(f"sigma_min {low} must be less than sigma_max {high}")


@config_class
class SizeShiftSettings:
    """A shift that goes by the size of a picture: the exponential of a line over its tokens.

    Args:
        base: logarithm of the shift at ``from`` tokens.
        max: logarithm of the shift at ``to`` tokens.
        from: tokens of a small picture.
        to: tokens of a large one.
    """

    base: Annotated[float, Field(ge=-20, le=20)]
    max: Annotated[float, Field(ge=-20, le=20)]
    from_: Annotated[Tokens, Field(alias="from")]
    to: Tokens

    def made(self) -> SizeShift:
        """The shift."""
        return SizeShift(self.base, self.max, self.from_, self.to)


@config_class
class RectifiedFlowSettings:
    """The fields of ``RectifiedFlow``."""

    mirrors: ClassVar[str] = "ldm.diffusion.process:RectifiedFlow"

    kind: Literal["rectified_flow"] = "rectified_flow"
    shift: PositiveNumber | SizeShiftSettings | None = None
    num_train_timesteps: Steps | None = None


ProcessConfig = Annotated[
    Annotated[ProcessSettings, Tag("discrete")]
    | Annotated[VpSettings, Tag("vp")]
    | Annotated[CosineSettings, Tag("cosine")]
    | Annotated[VeSettings, Tag("ve")]
    | Annotated[RectifiedFlowSettings, Tag("rectified_flow")],
    Discriminator(_process_kind),
]
_Times = Annotated[
    times.Uniform
    | times.InverseVariance
    | times.LossSecondMoment
    | times.LogitNormal
    | times.LogNormal
    | times.Mode,
    Field(discriminator="kind"),
]
_TimesName = Literal[
    "uniform", "inverse_variance", "loss_second_moment", "logit_normal", "log_normal", "mode"
]
TimesConfig = Annotated[_Times, BeforeValidator(_named, json_schema_input_type=_TimesName | _Times)]
TargetConfig = Annotated[
    TargetName | Edm,
    BeforeValidator(
        lambda value: {"kind": "edm"} if value == "edm" else value,
        json_schema_input_type=TargetName | Literal["edm"] | Edm,
    ),
]


@config_class
class WeightingSettings:
    """The fields of ``Weighting``."""

    mirrors: ClassVar[str] = "ldm.diffusion.objective:Weighting"

    kind: WeightingName
    gamma: PositiveNumber | None = None
    k: PositiveNumber = 1.0
    space: TargetConfig | None = None

    def made(self) -> Weighting:
        """The weighting."""
        from ldm.diffusion import Weighting

        return Weighting(self.kind, self.gamma, self.k, self.space)


@config_class
class ObjectiveSettings:
    """The fields of ``Objective``; None leaves one to the model, or to its default."""

    mirrors: ClassVar[str] = "ldm.diffusion.objective:Objective"

    target: TargetConfig | None = None
    weighting: WeightingName | WeightingSettings | None = None
    gamma: PositiveNumber | None = None
    times: TimesConfig | None = None
    learned_variance: bool | None = None
    bound_weight: PositiveNumber | None = None
    bins: Annotated[int, Field(ge=2, lt=2**31)] | None = None
