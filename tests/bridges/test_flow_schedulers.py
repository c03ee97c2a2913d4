"""Flow matching schedulers: our steps are stock's, at their own levels; the shift by size."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from ldm.config.loader import plain, validate
from ldm.config.noise import RectifiedFlowSettings
from ldm.config.schema import TrainConfig
from ldm.diffusion import (
    Condition,
    DiscreteVP,
    Level,
    Prediction,
    RectifiedFlow,
    process_of,
    scheduler_config,
    stratified,
    target_of,
)
from ldm.diffusion.shift import SizeShift
from ldm.diffusion.times import LogitNormal
from ldm.errors import ConfigError
from ldm.families.noise import process_and_objective
from ldm.sampling import FLOW_SAMPLERS, SchedulerSampler, default_sampler, own_sampler, sampler
from ldm.sampling.names import canonical
from runs import tree

SHIFT = SizeShift(0.5, 1.15, 256, 4096)
X = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
COND = Condition(pooled=torch.zeros(3, 0))
DYNAMIC = {"use_dynamic_shifting": True}
CASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "euler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "heun": (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    "dynamic": (FlowMatchEulerDiscreteScheduler, DYNAMIC),
    "karras": (FlowMatchEulerDiscreteScheduler, {"shift": 2.0, "use_karras_sigmas": True}),
}


def net(x: Tensor, timestep: Tensor) -> Tensor:
    """Something that listens to both."""
    return (x * (1 + timestep / 1000)).sin() + timestep / 500


def predict(x: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
    assert float(level.sigma) == pytest.approx(float(timestep) / 1000, rel=1e-6)
    assert float(level.alpha + level.sigma) == 1
    return Prediction(x, level, net(x, timestep), "velocity")


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_stock(name: str) -> None:
    kind, settings = CASES[name]
    scheduler = kind(**settings)
    which = own_sampler(scheduler)
    assert isinstance(which, SchedulerSampler)
    told = {"mu": SHIFT.mu(1200)} if name == "dynamic" else {}
    scheduler.set_timesteps(7, **told)
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, return_dict=False)[0]
    mine = which.seen_at(1200)(predict, X, COND, steps=7)
    assert torch.equal(mine, x) and float((x - X).abs().max()) > 0.1
    named = {"karras": None, "heun": "flow-heun"}.get(name, "flow-euler")
    if named:
        assert default_sampler(kind(**settings).config) == named
        again = sampler(named, kind(**settings).config).seen_at(1200)
        assert torch.equal(again(predict, X, COND, steps=7), x)
        assert again.evaluations(7) == (13 if name == "heun" else 7)


def test_sigmas_of_ones_own_and_what_is_refused() -> None:
    which = own_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(which, SchedulerSampler)
    scheduler = which.start(0, sigmas=[1.0, 0.5])
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 750])
    with pytest.raises(ValueError, match=r"timesteps must lie in 0\.\.1000"):
        which.start(0, timesteps=[1001, 10])
    with pytest.raises(ValueError, match="flow-euler' runs the process 'rectified_flow', not 'dis"):
        sampler("flow-euler", scheduler_config(DiscreteVP(), "eps"))
    flow = scheduler_config(RectifiedFlow(SHIFT), "velocity")
    with pytest.raises(ValueError, match="knows no shift by the size of a picture: use flow-euler"):
        sampler("flow-heun", flow)
    with pytest.raises(ValueError, match="use one of flow-euler, flow-heun, ddim"):
        sampler("dpm++", flow)
    with pytest.raises(ValueError, match="time_shift_type 'linear' is not supported"):
        process_of(FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type="linear").config)
    assert canonical("FlowMatchEulerDiscreteScheduler") == "flow-euler"
    # A flow that a stock StableDiffusionPipeline runs is drawn as before.
    assert default_sampler(scheduler_config(RectifiedFlow(3.0), "velocity")) == "ode-heun"


@pytest.mark.parametrize("shift", [3.0, SHIFT])
def test_the_shift_is_stated_as_stock_states_it(shift: Any) -> None:
    process = RectifiedFlow(shift)
    config = scheduler_config(process, "velocity", flow="FlowMatchEulerDiscreteScheduler")
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    assert process_of(theirs.config) == process_of(config) == process
    assert target_of(theirs.config) == "velocity"
    for row in FLOW_SAMPLERS.values():  # also as its class in Python says it
        if not isinstance(shift, SizeShift):
            assert process_of(row.scheduler(shift=shift).config) == process
    assert {k: theirs.config[k] for k in config if k != "_class_name"} == {
        k: v for k, v in config.items() if k != "_class_name"
    }


def test_the_shift_at_a_size_is_a_shift_of_the_process() -> None:
    process, seen = RectifiedFlow(SHIFT), RectifiedFlow(SHIFT).seen_at(1024)
    assert seen == RectifiedFlow(math.exp(0.5 + 0.65 * 768 / 3840))
    assert process.seen_at(256) == RectifiedFlow(math.exp(0.5))
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(process.time(u), process.seen_at(256).time(u))
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    scheduler.set_timesteps(9, mu=SHIFT.mu(1024))
    ends = torch.linspace(1, 1e-3, 9, dtype=torch.float64)
    assert torch.allclose(seen.time(ends), scheduler.sigmas[:-1].double(), atol=1e-7)
    walked = sampler("ode-euler", scheduler_config(process, "velocity")).seen_at(1024)
    assert walked.process == seen
    assert RectifiedFlow(2.0).seen_at(1024) == RectifiedFlow(2.0)
    assert DiscreteVP().seen_at(1024) == DiscreteVP()


def test_the_shift_of_a_config(tmp_path: Any) -> None:
    asked = {"base": 0.5, "max": 1.15, "from": 256, "to": 4096}
    told = tree(tmp_path, process={"kind": "rectified_flow", "shift": asked},
                objective={"target": "velocity"})  # fmt: skip
    config = validate(TrainConfig, told)
    assert process_and_objective(config)[0] == RectifiedFlow(SHIFT)
    assert plain(config)["process"]["shift"] == asked
    assert validate(TrainConfig, plain(config)) == config
    assert isinstance(config.process, RectifiedFlowSettings)
    for wrong, message in (
        ({"from": 4096, "to": 256}, r"shift: from \(4096\) must be less than to \(256\)"),
        ({"form": 256}, "unknown key 'process.shift.form'; did you mean 'process.shift.from'"),
        ({"base": 100}, "process.shift.base"),
    ):
        told["process"] = {"kind": "rectified_flow", "shift": {**asked, **wrong}}
        with pytest.raises(ConfigError, match=message):
            process_and_objective(validate(TrainConfig, told))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_the_density_of_the_paper(shift: float) -> None:
    """100,000 of a run's times against eq. 19 of Esser et al. 2024, shifted by eq. 23."""
    mean, std, batch = 0.3, 1.2, 1000
    u = torch.cat([torch.as_tensor(stratified(0, "time", n, batch)) for n in range(100)])
    t, _ = LogitNormal(mean, std)(u, RectifiedFlow(shift))
    edges = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    logit = (x / (1 - x)).log()
    density = (-((logit - mean) ** 2) / (2 * std**2)).exp() / (std * math.sqrt(2 * math.pi))
    mass = density / (x * (1 - x)) * edges.diff()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    cdf = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    places = shift * edges / (1 + (shift - 1) * edges)
    ordered = t.sort().values
    counted = torch.searchsorted(ordered, places) / len(t)
    apart = float((counted - cdf).abs().max())
    print(f"shift {shift}: KS {apart:.5f}")
    assert apart < 0.005
    wrong = torch.searchsorted(ordered, 2 * places / (1 + places)) / len(t)
    assert float((wrong - cdf).abs().max()) > 0.1
