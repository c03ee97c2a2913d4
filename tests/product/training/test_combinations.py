"""Every kind with every other: process x target x weighting x times x variance x codec x condition.

What a folder can say trains two steps and draws two; what is illegal is refused at load, for the
reason that is the case.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from ldm.config.loader import validate
from ldm.config.noise import ObjectiveSettings
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.diffusion import Edm, VariancePreserving, predictor
from ldm.encoding.dataset import ImageDraws
from ldm.encoding.encoder import Encoder
from ldm.engine.optimizer import optimizer_of
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.families.noise import process_and_objective
from ldm.tasks.denoising import DenoisingTask
from runs import accelerator, tree

PROCESSES = {
    "discrete": {},
    "zero": {"zero_terminal_snr": True},
    "vp": {"kind": "vp"},
    "cosine": {"kind": "cosine"},
    "ve": {"kind": "ve", "sigma_max": 10},
    "flow": {"kind": "rectified_flow", "shift": 2},
}
TARGETS = ("eps", "x0", "v", "score", "velocity", "edm")
WEIGHTINGS = ("uniform", "sigma2", "min_snr", "soft_min_snr", "p2", "elbo")
TIMES = ("uniform", "inverse_variance", "loss_second_moment", "logit_normal", "log_normal", "mode")
CODECS = {"latents": {}, "pixels": {"vae": "pixels"}}
CLASSES = {"classes": ["small", "large"]}
CONDITIONS = {
    "text": {},
    "classes": {"condition": CLASSES, "text": None},
    "nothing": {"condition": "none", "text": None},
}
# By their processes, what a scheduler of diffusers has words for.
SAID = {"ve": ("score", "edm"), "flow": ("velocity",)}


def reason(process: str, target: str, learned: bool) -> str | None:
    """Why a combination is illegal, told from the equations; None: it is not."""
    if process in ("zero", "cosine", "flow") and target in ("eps", "score"):
        return "says nothing about x0 where alpha = 0"
    if learned and process in SAID:
        return "a learned variance belongs to ancestral sampling of a variance preserving process"
    if target not in SAID.get(process, ("eps", "x0", "v")):
        return "diffusers' schedulers cannot express target"
    return None


def config(process: str, target: str, **changes) -> TrainConfig:
    objective = {"target": target, **changes.pop("objective", {})}
    settings = {"process": PROCESSES[process], "objective": objective, **changes}
    return validate(TrainConfig, tree(Path("run"), **settings))


def test_the_illegal_are_refused_with_the_reason():
    found = {}
    of = {process: config(process, "x0") for process in PROCESSES}
    every = itertools.product(PROCESSES, TARGETS, WEIGHTINGS, (False, True))
    for process, target, weighting, learned in every:
        objective = ObjectiveSettings(
            target=Edm() if target == "edm" else target,
            weighting=weighting,
            learned_variance=learned,
        )
        expected = reason(process, target, learned)
        try:
            process_and_objective(replace(of[process], objective=objective))
            told = None
        except ConfigError as error:
            told = str(error)
        if not (told is None if expected is None else told and expected in told):
            found[process, target, weighting, learned] = told
    assert found == {}


def chosen() -> list[tuple]:
    """Every legal process and target with a third of all codecs and conditions; the other kinds
    take turns.
    """
    pairs = [pair for pair in itertools.product(PROCESSES, TARGETS) if not reason(*pair, False)]
    both = list(itertools.product(CODECS, CONDITIONS))
    rows = [(*pair, *one) for i, pair in enumerate(pairs) for one in both[i % 3 :: 3]]
    return [
        (*row, WEIGHTINGS[n % 6], TIMES[(n + n // 6) % 6], n % 2 == 1 and row[0] not in SAID)
        for n, row in enumerate(rows)
    ]


def test_the_choice_meets_everything():
    rows = chosen()
    assert len(rows) == 26 and len({row[:2] for row in rows}) == 13
    for kinds, place in ((WEIGHTINGS, 4), (TIMES, 5)):
        assert {row[place] for row in rows} == set(kinds)
    for process in PROCESSES:
        met = [row[2:4] for row in rows if row[0] == process]
        assert {codec for codec, _ in met} == set(CODECS)
    assert {row[2:4] for row in rows} == set(itertools.product(CODECS, CONDITIONS))
    assert {row[6] for row in rows} == {True, False}


def settings(codec: str, condition: str) -> dict:
    return {
        **CODECS[codec],
        **CONDITIONS[condition],
        "data": {"count": 12, "hold_out": False},
        "images": {"size": 8},
        "unet": {"block_out_channels": [8], "norm_num_groups": 4},
        "batch_size": 4,
        "text_dropout": 0.5,
        "cache_latents": False,
        "cache_text": False,
    }


@pytest.fixture(scope="module")
def collection():
    made = config("discrete", "eps", **settings("latents", "text"))
    found = Collection(made.data, made.images)
    found.retell(["a small thing", "a large thing"])
    return found


@pytest.mark.parametrize("row", chosen(), ids=lambda row: "-".join(map(str, row)))
def test_the_legal_train_and_draw(row, collection):
    process, target, codec, condition, weighting, times, learned = row
    objective = {"weighting": weighting, "times": times, "learned_variance": learned}
    run = config(process, target, objective=objective, **settings(codec, condition))
    model = build(run, collection.captions())
    encoder = Encoder(run, model.codec, model.conditioner, accelerator())
    task = DenoisingTask(run, model, collection.held_out, encoder)
    draws = ImageDraws(run, collection, encoder)
    optimizer = optimizer_of(task.trained(), run.optimizer)
    before = {name: value.detach().clone() for name, value in task.trained().items()}
    for step in range(2):
        batch = default_collate([draws[4 * step + n] for n in range(4)])
        terms = task(batch)
        assert terms["loss"].shape == (4,) and bool(terms["loss"].isfinite().all())
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
    assert all(bool(value.isfinite().all()) for value in task.trained().values())
    moved = [name for name, value in task.trained().items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.8 * len(before)
    drawn = draw(task, "" if condition == "nothing" else "a small thing")
    assert drawn.shape == (2, 3, 8, 8) and bool(drawn.isfinite().all()) and drawn.std() > 0


@torch.no_grad()
def draw(task: DenoisingTask, prompt: str) -> torch.Tensor:
    """Two pictures in two steps, ``2 3 8 8``."""
    model, process = task.model, task.process
    if isinstance(process, VariancePreserving):
        pipe = task.pipeline()
        pipe.set_progress_bar_config(disable=True)
        call = dict(num_inference_steps=2, output_type="pt", num_images_per_prompt=2)
        return pipe(prompt, guidance_scale=2.0, seed=0, **call).images
    # Euler's method in x / alpha against sigma / alpha, from near the noise.
    predict = predictor(model.denoiser, task.objective.target)
    cond, codec = model.conditioner.encode([prompt] * 2), model.codec
    shape = (2, codec.channels, 8 // codec.factor, 8 // codec.factor)
    x = process.prior_std() * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for t, s in ((0.99, 0.5), (0.5, 0.01)):
        here, there = (process.level(torch.tensor(time)) for time in (t, s))
        told = predict(x, here, process.timestep(torch.tensor(t)), cond)
        x = (there.alpha * told.x0 + there.sigma * told.eps).float()
    return codec.decode(x)
