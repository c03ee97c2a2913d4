"""Runs that distil: each kind trains, goes on in the same bits, cached or not, and is drawn."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from launched import ENVIRONMENT, TRAIN, finish, launch, losses
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.errors import CheckpointError, ConfigError
from ldm.families.build import build
from ldm.formats import lora
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import text_to_image
from ldm.tasks.estimate import trace
from runs import train, tree

FOLDER = {"vae": None, "text": None, "unet": None}
PIXELS = {"vae": "pixels", "condition": "none", "text": None, "images": {"size": 8, "flip": False}}
FLOW = {"process": {"kind": "rectified_flow"}, "objective": {"target": "velocity"}}
EDM = {
    **PIXELS,
    "process": {"kind": "ve", "sigma_min": 0.002, "sigma_max": 80},
    "objective": {"target": "edm"},
}
BASES: dict[str, dict[str, Any]] = {
    "latents": {"objective": {"target": "v"}},
    "flow": FLOW,
    "edm": EDM,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "guidance": ("latents", {"distil": {"kind": "guidance", "guidance": [1, 4], "embedding": 8}}),
    "progressive": (
        "latents",
        {
            "distil": {"kind": "progressive", "steps": 4, "guidance": 2},
            "objective": {"weighting": "truncated_snr"},
        },
    ),
    "lcd": (
        "latents",
        {
            "distil": {
                "kind": "consistency", "guidance": [2, 4], "embedding": 8, "target": "average",
            }
        },
    ),
    "lcm_lora": (
        "latents", {"distil": {"kind": "consistency", "guidance": 3}, "lora": {"rank": 2}},
    ),
    "cd": ("edm", {**PIXELS, "distil": {"kind": "consistency", "steps": 18, "solver": "heun"}}),
    "ct": ("edm", {**PIXELS, "distil": {"kind": "consistency", "steps": 18, "solver": "pair"}}),
    "reflow": ("flow", {"distil": {"kind": "reflow", "steps": 3, "guidance": 2}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("bases")
        patch.setenv("LDM_CACHE", str(root / "cache"))
        return {n: train(root / n, duration="1 steps", **asked) for n, asked in BASES.items()}


def settings(bases: dict[str, Path], kind: str, **changes: Any) -> dict[str, Any]:
    base, asked = KINDS[kind]
    usual = {"duration": "3 steps", "checkpoints": {"every": "1 steps", "keep": 9}}
    usual |= {"optimizer": {"lr": 1e-3}, "batch_size": 8}
    return {"model": str(bases[base]), **FOLDER, **usual, **asked, **changes}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(folder)} {name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def config_of(run: Path, **changes: Any) -> TrainConfig:
    return validate(TrainConfig, tree(run, **changes))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    "kind",  # slow is what says the least that others do not
    [pytest.param(k, marks=[pytest.mark.slow] * (k in ("guidance", "ct"))) for k in KINDS],
)
def test_it_goes_on_in_the_same_bits_cached_or_not(bases, tmp_path, kind) -> None:
    asked = settings(bases, kind)
    before = tensors(bases[KINDS[kind][0]])
    final = train(tmp_path / "whole", **asked)
    name = "checkpoints/images-000000000008"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "again" / name)
    again = train(tmp_path / "again", **asked, cache_latents=False, cache_text=False)
    one, other = tensors(final), tensors(again)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert len(losses(tmp_path / "whole")) == 3 and min(losses(tmp_path / "whole")) > 0
    # The teacher stays.
    after = tensors(bases[KINDS[kind][0]])
    assert all(torch.equal(before[key], after[key]) for key in before)

    if kind == "lcm_lora":
        assert [f.name for f in final.glob("*.safetensors")] == [lora.FILE]
        return
    changed = {n for n in before if n in one and not torch.equal(one[n], before[n])}
    assert changed and all(n.startswith("unet/") for n in changed)
    pipe = LatentDiffusionPipeline.from_pretrained(final)
    pipe.set_progress_bar_config(disable=True)
    how, embedded = pipe.sampling_defaults, pipe.unet.config.get("time_cond_proj_dim")
    assert (embedded == 8) == (kind in ("guidance", "lcd"))
    if kind == "lcd":
        assert type(pipe.scheduler).__name__ == "LCMScheduler"
    expected = {
        "guidance": (30, 2.5, "dpm++"), "progressive": (4, 1.0, "ddim"), "lcd": (4, 3.0, "lcm"),
        "cd": (4, 1.0, "lcm"), "ct": (4, 1.0, "lcm"), "reflow": (30, 1.0, "ode-heun"),
    }[kind]  # fmt: skip
    assert (how.num_inference_steps, how.guidance_scale, how.sampler) == expected
    if kind in ("lcd", "cd"):
        prompts = ["a red circle", "a blue star"] if kind == "lcd" else ["", ""]
        call = {"num_inference_steps": 2, "sampler": "lcm", "output_type": "pt"}
        both = pipe(prompts, seed=3, **call).images
        alone = pipe(prompts[1], seed=4, **call).images
        assert float((both[1] - alone[0]).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", [pytest.param("lcd", marks=pytest.mark.slow), "lcm_lora"])
def test_two_processes_learn_the_same(bases, tmp_path, own_cache, monkeypatch, kind) -> None:
    """Adapters that go off and on, and averaged weights in front, under DDP as without."""
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(own_cache))
    asked = settings(bases, kind)
    one = train(tmp_path / "one", **asked)
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path / "two", **asked)))
    finish(launch(TRAIN, "--config", file, processes=2))
    alone, together = tensors(one), tensors(tmp_path / "two" / "final")
    assert alone.keys() == together.keys()
    # Adam makes whole steps of gradients that are rounding: of a few weights alone.
    assert max(float((alone[k] - together[k]).square().mean().sqrt()) for k in alone) < 1e-5
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def test_a_student_that_hears_begins_as_its_teacher(bases, tmp_path) -> None:
    asked = settings(bases, "lcd")
    model = build(config_of(tmp_path, **asked), [])
    teacher = model.teacher
    assert teacher and teacher.network is not model.network
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([30.0, 700.0])
    cond = model.conditioner.encode(["a red circle", ""])
    scales = {"guidance": torch.tensor([1.0, 7.5], dtype=torch.float64)}
    level = model.process.at(t)
    with torch.no_grad():
        plain = teacher.predict(x, level, t, cond).y
        told = model.denoiser(x, t, type(cond)(cond.tokens, cond.mask, cond.pooled, scales))
    assert torch.equal(plain, told)
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not bool(model.network.time_embedding.cond_proj.weight.any())
    odd = {"kind": "consistency", "steps": 30}
    with pytest.raises(ConfigError, match="distil.steps 30: it must divide 1000"):
        build(config_of(tmp_path, **settings(bases, "lcd", distil=odd)), [])


def test_the_teacher_is_part_of_the_run_and_of_its_cost(bases, tmp_path, own_cache) -> None:
    asked = settings(bases, "progressive", duration="1 steps")
    train(tmp_path / "run", **asked)
    # A second student learns of the first: the next link of a chain, by the folder of the run.
    chained = {**asked["distil"], "steps": 2, "guidance": 1, "teacher": str(tmp_path / "run")}
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path / "run", **{**asked, "distil": chained})
    told = str(caught.value)
    assert "distil.teacher: the weights (or config) that the folder holds changed" in told
    assert "distil.steps was 4 and is now 2" in told
    chain = {**asked, "model": str(tmp_path / "run" / "final"), "distil": chained}
    final = train(tmp_path / "next", **chain)
    how = LatentDiffusionPipeline.from_pretrained(final).sampling_defaults
    assert (how.num_inference_steps, how.sampler) == (2, "ddim")
    # Another teacher elsewhere, which is as large as the student.
    costs = {}
    for name, distil in (("alone", None), ("taught", chained)):
        config = config_of(tmp_path / name, **{**asked, "distil": distil})
        step = text_to_image.step(config)
        assert ("teacher" in step.networks) == (name == "taught")
        costs[name] = trace(config, step, 8, 1)
    alone, taught = costs["alone"], costs["taught"]
    assert taught.frozen - alone.frozen == alone.learning and taught.learning == alone.learning
    assert taught.checkpoint == alone.checkpoint
    # Forward and backward are three passes, and the teacher is asked twice.
    assert taught.convolution / alone.convolution == pytest.approx(5 / 3, abs=0.12)


REFUSED = [
    (
        {"model": None, "vae": "pixels"},
        "distil: there is no teacher: give distil.teacher, or model",
    ),
    ({"train": ["unet", "text_encoder"]}, "distil: the teacher reads what the text encoders say"),
    ({"lora": {"rank": 2}}, "distil.embedding: the file of a LoRA has no place for it"),
    ({"ema": None}, "distil.target: there is no average without ema"),
    ({"objective": {"weighting": "min_snr"}}, "objective.weighting: the ends of ways all weigh 1"),
    ({"objective": {"times": "logit_normal"}}, "objective.times: distil.steps are drawn evenly"),
    ({"distil": {"kind": "consistency", "guidance": [5, 3]}}, r"distil: guidance: \[5.0, 3.0\]"),
    ({"distil": {"kind": "consistency", "solver": "pair", "guidance": 2}}, "pair asks no teacher"),
    ({"distil": {"kind": "progressive"}}, "key 'distil.steps' is required"),
]


@pytest.mark.parametrize("changes, line", REFUSED, ids=[line[:30] for _, line in REFUSED])
def test_what_contradicts_it_is_refused(bases, tmp_path, changes, line) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        config_of(tmp_path, **settings(bases, "lcd", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "teacher, line",
    [
        ("flow", "it knows other noise"),
        ("edm", "it is of the family pixels, not sd"),
        ("nowhere", "scheduler_config.json is missing"),
    ],
)
def test_a_teacher_of_something_else_is_refused(bases, tmp_path, teacher, line) -> None:
    folder = str(bases.get(teacher, tmp_path / "nowhere"))
    distil = {"kind": "guidance", "teacher": folder}
    with pytest.raises(ConfigError, match=f"^distil.teacher {folder}: .*{line}") as caught:
        build(config_of(tmp_path, **settings(bases, "lcd", distil=distil)), [])
    assert "\n" not in str(caught.value)
