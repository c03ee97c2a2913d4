"""Steps, guidance and sampler where nobody says any: what the model's folder states."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

import tiny
from ldm.cli import app
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.families.build import build
from ldm.formats.png import read_parameters
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling.defaults import KEY, SamplingDefaults, stated
from runs import ROOT, train, tree

STATED = {"num_inference_steps": 3, "guidance_scale": 2.5, "sampler": "euler"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model that states how it is drawn."""
    pipe = tiny.pipeline()
    pipe.register_to_config(sampling=STATED)
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_states_how_it_is_drawn_and_stock_opens_it_without_a_word(folder, caplog):
    assert json.loads((folder / "model_index.json").read_text())[KEY] == STATED
    with caplog.at_level(logging.WARNING):
        StableDiffusionPipeline.from_pretrained(folder)
    assert "sampling" not in caplog.text
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.sampling_defaults == SamplingDefaults(**STATED)
    told = pipe("red", num_inference_steps=3, guidance_scale=2.5, seed=0, output_type="np").images
    assert np.array_equal(pipe("red", seed=0, output_type="np").images, told)
    other = pipe("red", guidance_scale=7.5, seed=0, output_type="np").images
    assert not np.array_equal(other, told)


def test_who_opens_a_folder_may_state_another_way(folder):
    mine = {"num_inference_steps": 7, "sampler": "heun"}
    for given, found in ((mine, mine), (None, {})):
        pipe = LatentDiffusionPipeline.from_pretrained(folder, sampling=given)
        assert pipe.config.sampling == found


def test_a_folder_that_states_nothing_is_drawn_as_stock_draws(tmp_path):
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path)
    assert KEY not in json.loads((tmp_path / "model_index.json").read_text())
    assert pipe.sampling_defaults == SamplingDefaults(30, 7.5, "dpm++")
    steps = []
    pipe.set_progress_bar_config(disable=True)
    pipe("red", seed=0, callback_on_step_end=lambda p, i, t, k: steps.append(p.guidance_scale))
    assert steps == [7.5] * 50


def test_the_command_line_draws_as_the_folder_states(folder, tmp_path):
    for more, told in (([], (3, 2.5, "euler")), (["--steps", "2"], (2, 2.5, "euler"))):
        out = tmp_path / "a.png"
        result = CliRunner().invoke(
            app, ["sample", "red", "--model", str(folder), *more, "--out", str(out)]
        )
        assert result.exit_code == 0, result.output
        found = read_parameters(out)
        assert (found.steps, found.guidance, found.sampler) == told


def test_a_run_states_what_it_drew_with_and_what_its_model_stated(own_cache, tmp_path, folder):
    short = dict(duration="1 steps", batch_size=4, checkpoints={"every": "9 steps"})
    once = {"every": "1 steps", "images": 0, "captions": 1, "steps": 2}
    final = train(tmp_path / "run", **short, validation=once | {"guidance": 1.5})
    index = json.loads((final / "model_index.json").read_text())
    assert index[KEY] == {"num_inference_steps": 2, "guidance_scale": 1.5}
    parts = dict(model=str(folder), vae=None, text=None, unet=None)
    final = train(tmp_path / "tuned", **short, **parts, validation=once)
    index = json.loads((final / "model_index.json").read_text())
    assert index[KEY] == STATED | {"num_inference_steps": 2}


def test_validation_and_score_draw_each_in_their_own_way(folder):
    own = dict(model=str(folder), vae=None, text=None, unet=None, score={"steps": 7})
    config = validate(TrainConfig, tree(folder, **own, validation={"guidance": 1.5, "captions": 1}))
    model = build(config, [], meta=True)
    assert model.drawn_with(config.validation) == SamplingDefaults(3, 1.5, "euler")
    assert model.drawn_with(config.score) == SamplingDefaults(7, 2.5, "euler")
    assert model.sampling == {**STATED, "num_inference_steps": 7, "guidance_scale": 1.5}


def test_a_sampler_that_another_process_has_no_use_for_is_not_taken_over(folder):
    file = folder / "model_index.json"
    told = STATED | {"sampler": "dpm++"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {KEY: told}))
    own = dict(model=str(folder), vae=None, text=None, unet=None, score={})
    for process, named in (("discrete", "dpm++"), ("rectified_flow", "ode-heun")):
        target = {"target": "velocity"} if process == "rectified_flow" else {}
        changed = tree(folder, **own, process={"kind": process}, objective=target)
        config = validate(TrainConfig, changed)
        model = build(config, [], meta=True)
        assert model.drawn_with(config.score) == SamplingDefaults(3, 2.5, named)
        assert ("sampler" in model.sampling) == (process == "discrete")


@pytest.mark.parametrize(
    "told",
    [[], "fast", {"steps": 3}, {"num_inference_steps": 10**12}, {"num_inference_steps": True},
     {"guidance_scale": float("nan")}, {"sampler": 3}, {"sampler": "quick"}],
)  # fmt: skip
def test_what_is_nothing_to_draw_with_is_told_with_its_file(folder, told):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {KEY: told}))
    with pytest.raises(
        ValueError, match=r"model_index\.json: (_sampling states nothing|unknown sam)"
    ):
        LatentDiffusionPipeline.from_pretrained(folder)


def test_the_model_that_ships_states_the_guidance_it_is_measured_with():
    index = json.loads((ROOT / "assets" / "ldm-small" / "model_index.json").read_text())
    assert stated(index) == {"num_inference_steps": 30, "guidance_scale": 3.0, "sampler": "ddim"}
