"""The ``optimizer`` of a run's YAML."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field

from ldm.config.loader import Duration, config_class
from ldm.data.ranges import Share
from ldm.errors import ConfigError

Decay = Annotated[float, Field(ge=0, lt=1)]
Kind = Literal["adamw", "adamw8bit", "adafactor", "muon", "lion", "prodigy"]

_ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
_USUAL: dict[str, dict[str, Any]] = {
    "adamw": _ADAM,
    "adamw8bit": _ADAM,
    "adafactor": {"lr": 1e-2},
    "muon": _ADAM,
    "lion": {"lr": 3e-5, "betas": (0.9, 0.99)},
    "prodigy": _ADAM | {"lr": 1.0},
}
"""What is set where nothing is given; a setting that is not here is none of the kind's."""
PIECEWISE = ("adamw", "adafactor", "muon", "lion")
"""Kinds that step each weight on its own, and keep float32 of it."""
_PACKAGES = {
    "adamw8bit": ("bitsandbytes", "bitsandbytes"),
    "lion": ("lion_pytorch", "lion-pytorch"),
    "prodigy": ("prodigyopt", "prodigyopt"),
}
"""The module of a kind that torch does not have, and what pip calls it."""


@config_class
class Optimizer:
    """What makes steps of gradients, and its learning rate, a function of images seen.

    Args:
        kind: ``adamw`` (Loshchilov & Hutter 2019); ``adamw8bit``, its moments in 8 bits
            (bitsandbytes, Dettmers et al. 2022); ``adafactor``, which keeps of a matrix the sums of
            its rows and columns (Shazeer & Stern 2018); ``muon``, which makes the momentum of a
            matrix orthogonal (Jordan et al. 2024), with ``adamw`` for all that is none; ``lion``
            (Chen et al. 2023); ``prodigy``, which finds its learning rate (Mishchenko & Defazio
            2023).
        lr: peak learning rate. None: 1e-4; of ``adafactor`` 1e-2, a share of the size of each
            weight; of ``lion`` 3e-5; of ``prodigy`` 1, a factor on what it finds.
        betas: decay of the moments; None: 0.9 and 0.999, of ``lion`` 0.9 and 0.99. ``adafactor``
            has none.
        eps: added to the root of the second moment; None: 1e-8. ``adafactor`` and ``lion`` have
            none.
        weight_decay: decoupled decay (Loshchilov & Hutter 2019); not on vectors (norms and biases).
        clip_norm: largest norm of the gradient of the global batch; None: any.
        in_backward: step each weight in the backward pass, as soon as its gradient is there, and
            let that go: no memory for gradients. For one process that takes its batch at once, with
            ``adamw``, ``adafactor``, ``muon`` or ``lion`` and without ``clip_norm``.
        warmup: linear from 0.
        schedule: what follows until the end of the run.
        cooldown: the schedule falls over this much at the end of the run, and the rate is constant
            before (Hagele et al. 2024): a run can be made longer from where it began to fall. None:
            it falls all the way.
        final: last learning rate as a fraction of ``lr``.
    """

    kind: Kind = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = None
    betas: tuple[Decay, Decay] | None = None
    eps: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    in_backward: bool = False
    warmup: Duration = "0 steps"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final: Share = 0.0
    cooldown: Duration | None = None

    def __post_init__(self) -> None:
        usual = _USUAL[self.kind]
        for key in ("lr", "betas", "eps"):
            if getattr(self, key) is None:  # as runs have recorded them ever since
                object.__setattr__(self, key, usual.get(key))
            elif key not in usual:
                raise ValueError(f"optimizer.{key}: {self.kind} has none: leave it out")
        if self.cooldown is not None and self.schedule == "constant":
            raise ValueError(
                "optimizer.cooldown: a constant schedule does not fall: set optimizer.schedule to"
                " linear or cosine, or leave this out"
            )
        if self.in_backward and self.kind not in PIECEWISE:
            raise ValueError(f"optimizer.in_backward: {_no_pieces(self.kind)}, or leave this out")
        if self.in_backward and self.clip_norm is not None:
            raise ValueError(
                "optimizer.in_backward: the norm of the gradient is known too late to clip by it:"
                " set optimizer.clip_norm to null, or leave this out"
            )

    def factors(self) -> dict[str, float]:
        """What multiplies ``lr`` in parts that have a learning rate of their own."""
        return {}


@config_class
class TextToImageOptimizer(Optimizer):
    """The same for the network that predicts and for text encoders.

    Args:
        text_encoder_lr: peak learning rate of all text encoders, on the same schedule; None:
            ``lr``.
    """

    text_encoder_lr: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "prodigy" and self.text_encoder_lr is not None:
            raise ValueError(
                "optimizer.text_encoder_lr: prodigy finds one learning rate for all: leave it out"
            )

    def factors(self) -> dict[str, float]:
        """What multiplies ``lr`` in parts that have a learning rate of their own."""
        own = self.text_encoder_lr
        return {} if own is None else {"text_encoder": own / (self.lr or 1.0)}


def _no_pieces(kind: str) -> str:
    why = "looks at all weights together" if kind == "prodigy" else "keeps no float32"
    return f"{kind} {why}: set optimizer.kind to {', '.join(PIECEWISE[:-1])} or {PIECEWISE[-1]}"


def refuse_halves(settings: Optimizer, *, averages: bool, small: str | None) -> None:
    """``ValueError`` where weights cannot learn that are held in bfloat16.

    Args:
        settings: the optimiser.
        averages: whether the run keeps some.
        small: key of what learns in place of weights, if something does.
    """
    if small:
        raise ValueError(
            f"weights: bfloat16 is for whole weights, and what {small} adds to them is small: leave"
            " it out (frozen: bfloat16 holds the model itself in half the memory)"
        )
    if settings.kind not in PIECEWISE:
        raise ValueError(f"weights: bfloat16: {_no_pieces(settings.kind)}, or leave this out")
    if averages:
        raise ValueError(
            "weights: bfloat16 has no average beside it, which takes float32: set ema to null, or"
            " leave this out"
        )


def require(settings: Optimizer) -> None:
    """``ConfigError`` where the package of the kind is not installed."""
    module, package = _PACKAGES.get(settings.kind, ("", ""))
    if module and find_spec(module) is None:
        raise ConfigError(
            f"optimizer.kind: {settings.kind} needs {package}, which is not installed: pip install"
            f" {package} (or ldm[optimizers]), or set another kind"
        )
