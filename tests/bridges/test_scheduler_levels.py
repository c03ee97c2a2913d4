"""The network is told the level that the scheduler steps with; what does not fit is refused."""

import functools
import inspect
import logging
import types
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ldm.diffusion import Condition, DiscreteVP, Level, Prediction, scheduler_config
from ldm.sampling import (
    CONSISTENCY_SAMPLERS,
    FLOW_SAMPLERS,
    PROCESS_SAMPLERS,
    SAMPLERS,
    SchedulerSampler,
    bridge,
    own_sampler,
    sampler,
)
from ldm.sampling.names import NAMES, canonical
from turns import turns

STOCK = {
    "DDIM": (DDIMScheduler, {"steps_offset": 1, "clip_sample": False}),
    "DDPM": (DDPMScheduler, {"clip_sample": False}),
    "PNDM": (PNDMScheduler, {"steps_offset": 1, "skip_prk_steps": True}),
    "PNDM with Runge-Kutta": (PNDMScheduler, {"steps_offset": 1}),
    "DPM++": (DPMSolverMultistepScheduler, {}),
    "DPM++ Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler Karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "Euler a": (EulerAncestralDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "KDPM2": (KDPM2DiscreteScheduler, {}),
}
# diffusers 0.42 under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
COND = Condition(torch.zeros(2, 1, 1))
# Whose timesteps are rounded from levels.
SPACED = ("dpm++", "heun", "dpm2", "unipc")
DROP_ZERO = ("heun", "dpm2", "pndm")
X0 = torch.tensor([[0.3, -1.2], [0.8, 0.1]])


def one(name: str) -> SchedulerSampler:
    """Of ``STOCK``, or the named sampler: KDPM2 takes most of a second to build."""
    config = scheduler_config(DiscreteVP(), "eps")
    if name in STOCK:
        kind, pins = STOCK[name]
        return SchedulerSampler(kind, {**config, **pins})
    return sampler(name, config)


@pytest.mark.parametrize(("name", "steps"), turns([*STOCK, *SAMPLERS], [7, 20]))
def test_level_is_the_schedulers(name: str, steps: int) -> None:
    # Data that are one point: x_t - alpha x0 = sigma eps with one eps all along if, and only if,
    # every step and every level agree. A deterministic sampler then returns x0 + (residual) eps.
    which = one(name)
    seen: list[tuple[float, Level]] = []

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        seen.append((float(timestep), level))
        wide = level.like(x_t)
        return Prediction(x_t, level, (x_t - wide.alpha * X0) / wide.sigma, "eps")

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, generator=draw)
    found = which(predict, x, COND, steps=steps, generators=draw)
    assert len(seen) == which.evaluations(steps)
    residual = (
        0.2 if name.lower().startswith("pndm") else 0.01
    )  # PNDM stops at the table's first level
    assert float((found - X0).abs().max()) < residual
    for timestep, level in seen:
        alpha, sigma = float(level.alpha), float(level.sigma)
        assert level.alpha.dtype == torch.float64
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-7)
        if "Karras" in name or name in SPACED or "KDPM2" in name or timestep % 1:
            continue
        table = which.process.at(torch.tensor([int(timestep)]))
        assert alpha == pytest.approx(float(table.alpha), rel=2e-6)
        assert sigma == pytest.approx(float(table.sigma), rel=5e-5)  # float32 at alpha -> 1


def test_rounded_timesteps_are_not_levels() -> None:
    # Why the level never comes from the timestep: up to 4 % in sigma.
    config = {**scheduler_config(DiscreteVP(), "eps"), "use_karras_sigmas": True}
    which = SchedulerSampler(DPMSolverMultistepScheduler, config)
    worst = 0.0

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        nonlocal worst
        table = which.process.at(timestep.reshape(1))
        worst = max(worst, abs(float(level.sigma / table.sigma[0]) - 1))
        return Prediction(x_t, level, torch.zeros_like(x_t), "eps")

    which(predict, X0, COND, steps=20)
    assert 0.01 < worst < 0.05


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "DPM++", "Euler", "Heun"])
def test_the_timestep_is_passed_on_as_it_is(name: str) -> None:
    which = one(name)
    seen: list[Tensor] = []

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        seen.append(timestep)
        return Prediction(x_t, level, torch.zeros_like(x_t), "eps")

    which(predict, X0, COND, steps=10)
    expected = which.start(10).timesteps
    assert torch.equal(torch.stack(seen), expected) and seen[0].dtype == expected.dtype
    assert seen[0].ndim == 0


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in DROP_ZERO])
def test_zero_terminal_snr_starts_at_the_last_timestep(name: str) -> None:
    which = sampler(name, scheduler_config(DiscreteVP(zero_terminal_snr=True), "v"))
    scheduler = which.start(20)
    assert float(scheduler.timesteps[0]) == 999
    level = which.level(scheduler, scheduler.timesteps[0])
    assert float(level.alpha) <= 2**-12


def test_zero_terminal_snr_forces_trailing() -> None:
    config = scheduler_config(DiscreteVP(zero_terminal_snr=True), "v")
    for kind in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        which = SchedulerSampler(kind, {**config, "timestep_spacing": "leading"})
        assert float(which.start(10).timesteps[0]) == 999


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, PNDMScheduler, KDPM2DiscreteScheduler])
def test_a_scheduler_that_drops_zero_terminal_snr_is_refused(kind: type) -> None:
    good = DDIMScheduler.from_config(scheduler_config(DiscreteVP(zero_terminal_snr=True), "v"))
    silent = kind.from_config(good.config)  # no word from diffusers
    assert "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters
    with pytest.raises(ValueError, match=f"{kind.__name__} .*rescale_betas_zero_snr"):
        SchedulerSampler(kind, silent.config)


@pytest.mark.parametrize("name", ["heun", "dpm2"])
def test_so_are_the_names_that_stand_for_it(name: str) -> None:
    with pytest.raises(ValueError, match="does not honour rescale_betas_zero_snr of the scheduler"):
        sampler(name, scheduler_config(DiscreteVP(zero_terminal_snr=True), "v"))


def test_eps_with_zero_terminal_snr_is_refused() -> None:
    config = scheduler_config(DiscreteVP(zero_terminal_snr=True), "eps")
    for name in set(SAMPLERS) - set(DROP_ZERO):
        with pytest.raises(ValueError, match="zero_terminal_snr"):
            sampler(name, config)
    # Also where only the network speaks eps.
    which = sampler("ddim", {**config, "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        which(lambda x, level, t, c: Prediction(x, level, x, "eps"), X0, COND, steps=5)


def test_other_refusals_name_the_key() -> None:
    config = scheduler_config(DiscreteVP(), "eps")
    refusals = {
        "use_flow_sigmas": {"use_flow_sigmas": True},
        "prediction_type 'flow_prediction'": {"prediction_type": "flow_prediction"},
        "trained_betas has 10 entries": {"trained_betas": [0.1] * 10},
    }
    for words, wrong in refusals.items():
        with pytest.raises(ValueError, match=words):
            SchedulerSampler(DPMSolverMultistepScheduler, {**config, **wrong})
    with pytest.raises(ValueError, match="alphas_cumprod"):
        SchedulerSampler(EDMEulerScheduler, config)


def test_a_different_table_is_refused() -> None:
    class Other(DDIMScheduler):
        def __init__(self, num_train_timesteps: int = 1000, beta_schedule: str = "linear") -> None:
            super().__init__(num_train_timesteps, beta_schedule=beta_schedule)

    with pytest.raises(ValueError, match="beta_start and beta_end"):
        SchedulerSampler(Other, scheduler_config(DiscreteVP(), "eps"))


def test_step_counts() -> None:
    which = sampler("ddim", scheduler_config(DiscreteVP(), "eps"))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="1..1000"):
            which.start(steps)
    # diffusers: 62 timesteps, the last of them -1.
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1
    with pytest.raises(ValueError, match="61 steps"):
        which.start(61)
    for steps in range(1, 61):
        assert len(which.start(steps).timesteps) == steps


def test_lu_spacing_runs_where_the_first_timesteps_round_to_one() -> None:
    # Stock begins at the second sigma there and ends in an IndexError.
    which = sampler("dpm++", scheduler_config(DiscreteVP(zero_terminal_snr=True), "v"))
    times = which.start(50).timesteps
    assert int(times[0]) == int(times[1]) == 999

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        return Prediction(x_t, level, X0.expand_as(x_t), "x0")

    assert float((which(predict, X0, COND, steps=50) - X0).abs().max()) < 1e-5


def test_a_scheduler_is_built_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    # KDPM2 takes 0.25 s of a CPU to build; a copy of it is made in 1 ms.
    built: list[str] = []
    inner = KDPM2DiscreteScheduler.__init__

    def counted(self: Any, *arguments: Any, **named: Any) -> None:
        built.append(type(self).__name__)
        inner(self, *arguments, **named)

    config = scheduler_config(DiscreteVP(num_train_timesteps=50), "eps")
    monkeypatch.setattr(KDPM2DiscreteScheduler, "__init__", functools.wraps(inner)(counted))
    own = own_sampler(KDPM2DiscreteScheduler.from_config(config))
    assert len(built) == 1  # by from_config
    named = sampler("dpm2", config)
    for which in (own, named):
        assert which.evaluations(5) == 9
        which(lambda x, level, t, c: Prediction(x, level, x, "eps"), X0, COND, steps=5)
    assert len(built) == 2
    assert sampler("dpm2", config).evaluations(5) == 9 and len(built) == 2
    longer = scheduler_config(DiscreteVP(num_train_timesteps=60), "eps")
    assert sampler("dpm2", longer).evaluations(5) == 9 and len(built) == 3


def test_what_was_changed_in_a_scheduler_is_kept_or_refused() -> None:
    config = scheduler_config(DiscreteVP(), "eps")

    def steps(scheduler: Any) -> Tensor:
        return own_sampler(scheduler)(
            lambda x, level, t, c: Prediction(x, level, x / 2, "eps"), X0, COND, steps=5
        )

    plain = steps(EulerDiscreteScheduler.from_config(config))

    def halved(self: Any, *arguments: Any, **named: Any) -> None:
        EulerDiscreteScheduler.set_timesteps(self, *arguments, **named)
        self.sigmas = self.sigmas / self.by

    first = type("Halved", (EulerDiscreteScheduler,), {"set_timesteps": halved}).from_config(config)
    second = EulerDiscreteScheduler.from_config(config)
    second.set_timesteps = types.MethodType(halved, second)  # type: ignore[method-assign]
    first.by = second.by = 2.0  # no config says so
    assert float((steps(first) - plain).abs().max()) > 0.1
    assert torch.equal(steps(first), steps(second))
    assert len(second.sigmas) == 1001  # only the copy ran
    ddim = DDIMScheduler.from_config(config)
    ddim.final_alpha_cumprod = torch.tensor(0.5)
    assert not torch.equal(steps(ddim), steps(DDIMScheduler.from_config(config)))
    inner = ddim.step
    ddim.step = lambda *arguments, **named: inner(*arguments, **named)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="step of this DDIMScheduler was replaced by a function"):
        own_sampler(ddim)
    changed = EulerDiscreteScheduler.from_config(config)
    changed.alphas_cumprod = changed.alphas_cumprod**2
    with pytest.raises(ValueError, match="alphas_cumprod of this EulerDiscreteScheduler is not"):
        own_sampler(changed)


def test_another_spacing_at_zero_terminal_snr_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bridge._warn_of_spacing.cache_clear()
    config = scheduler_config(DiscreteVP(zero_terminal_snr=True), "v")
    with caplog.at_level(logging.WARNING):
        told = 0
        for spacing in ("trailing", "leading", "leading"):
            given = EulerDiscreteScheduler.from_config(config, timestep_spacing=spacing)
            which = own_sampler(given)
            listed = which.start(0, timesteps=[999, 500, 9])  # as they are: nothing is spaced
            assert listed.config.timestep_spacing == spacing
            assert len(caplog.records) == told
            assert float(which.start(10).timesteps[0]) == 999
            told = int(spacing == "leading")
            assert given.config.timestep_spacing == spacing
            assert len(caplog.records) == told
    assert '"trailing" is used instead' in caplog.text


def test_values_set_after_construction_reach_the_sampler() -> None:
    scheduler = DDIMScheduler(**scheduler_config(DiscreteVP(), "eps"))
    assert scheduler.config.clip_sample and "clip_sample" in scheduler.config["_use_default_values"]
    scheduler.register_to_config(clip_sample=False)
    assert not SchedulerSampler(DDIMScheduler, scheduler.config).start(5).config.clip_sample


def test_callback_sees_and_replaces() -> None:
    which = sampler("ddim", scheduler_config(DiscreteVP(), "eps"))
    seen: list[tuple[int, int]] = []

    def callback(index: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
        seen.append((index, int(timestep)))
        return torch.full_like(latent, 7.0) if index == 4 else None

    def predict(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
        return Prediction(x_t, level, torch.zeros_like(x_t), "eps")

    found = which(predict, X0, COND, steps=5, callback=callback)
    assert seen == [(0, 999), (1, 799), (2, 599), (3, 399), (4, 199)]
    assert bool((found == 7).all())


THERE_ARE = (
    "There are ddim, ddpm, dpm++, euler, euler-a, heun, dpm2, unipc, pndm, flow-euler, flow-heun,"
    " lcm, tcd, ode-euler, ode-heun, ode-adaptive, sde, ancestral, langevin, pc"
)
# As A1111, ComfyUI, k-diffusion, CompVis and diffusers write them.
OTHERS = {
    "ddim": ["DDIM", "ddim ", "DDIMScheduler"],
    "ddpm": ["DDPM", "DDPMScheduler"],
    "dpm++": ["DPM++", "dpmpp", "dpm++2m", "dpm++ 2m", "DPM++ 2M", "dpmpp_2m", "dpmpp-2m",
              "k_dpmpp_2m", "DPMSolver++", "DPMSolverMultistepScheduler"],
    "euler": ["Euler", "k_euler", "EulerDiscreteScheduler"],
    "euler-a": ["Euler a", "euler_a", "euler_ancestral", "eulera", "k_euler_a", "k_euler_ancestral",
                "EulerAncestralDiscreteScheduler"],
    "heun": ["Heun", "k_heun", "HeunDiscreteScheduler"],
    "dpm2": ["DPM2", "dpm_2", "k_dpm_2", "KDPM2DiscreteScheduler"],
    "unipc": ["UniPC", "uni_pc_bh2", "UniPCMultistepScheduler"],
    "pndm": ["PLMS", "plms", "PNDMScheduler"],
    "ode-heun": ["ode_heun", "ODE Heun"],
}  # fmt: skip


def test_names_of_others() -> None:
    every = (*SAMPLERS, *FLOW_SAMPLERS, *CONSISTENCY_SAMPLERS, *PROCESS_SAMPLERS)
    assert every == NAMES
    assert {name: canonical(name) for name in NAMES} == dict(zip(NAMES, NAMES, strict=True))
    for name, aliases in OTHERS.items():
        assert {alias: canonical(alias) for alias in aliases} == dict.fromkeys(aliases, name)
    for name, scheduler in ((row.scheduler.__name__, row) for row in SAMPLERS.values()):
        if not name.startswith("_"):  # a class of diffusers is known by its own name
            assert SAMPLERS[canonical(name)] is scheduler
    config = scheduler_config(DiscreteVP(), "eps")
    plain, alias = sampler("dpm++", config), sampler("DPM++ 2M", config)
    assert isinstance(plain, SchedulerSampler) and isinstance(alias, SchedulerSampler)
    assert (plain.scheduler, plain.config) == (alias.scheduler, alias.config)


@pytest.mark.parametrize(
    ("name", "near"),
    [("eularr", "euler"), ("dmp++", "dpm++"), ("DPM++ 2M SDE", "dpm++"), ("dpmpp_2m_sde", "dpm++"),
     ("dpm++ sde", "dpm++"), ("uni_pc", "unipc"), ("pdnm", "pndm")],
)  # fmt: skip
def test_unknown_name(name: str, near: str) -> None:
    """Also of a sampler like one that is here, but of another order or with a noise of its own."""
    with pytest.raises(ValueError) as caught:
        sampler(name, scheduler_config(DiscreteVP(), "eps"))
    assert str(caught.value) == f"unknown sampler {name!r}: did you mean {near!r}? {THERE_ARE}"


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "dpmpp_2m_karras", "Euler a Karras"])
def test_karras_levels_are_another_sampler(name: str) -> None:
    with pytest.raises(ValueError, match="no named sampler steps through Karras' noise levels"):
        canonical(name)
