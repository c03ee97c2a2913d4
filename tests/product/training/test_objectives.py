"""Processes, targets, times, weights and learned variance as a config names them: what fits trains,
says in its folder what it is, and opens in stock; what does not is refused with the reason.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from launched import ENVIRONMENT, TRAIN, finish, launch
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.diffusion import (
    ContinuousVP,
    DiscreteVP,
    Edm,
    RectifiedFlow,
    VarianceExploding,
    process_of,
    target_of,
)
from ldm.diffusion.times import LogitNormal
from ldm.errors import ConfigError
from ldm.families.noise import process_and_objective
from ldm.pipeline import LatentDiffusionPipeline
from programs import told
from runs import train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")

ADAPTIVE = {"kind": "loss_second_moment", "cells": 4, "history": 2}
COMBINATIONS = {
    "flow": {
        "process": {"kind": "rectified_flow", "shift": 3.0},
        "objective": {"target": "velocity", "times": "logit_normal"},
    },
    "edm": {
        "process": {"kind": "ve", "sigma_min": 0.002, "sigma_max": 80},
        "objective": {"target": {"kind": "edm", "sigma_data": 1.0}, "times": "log_normal"},
        "unet": {"time_embedding": "fourier"},
    },
    "ncsn": {
        "process": {"kind": "ve"},
        "objective": {"target": "score", "weighting": "sigma2", "times": "inverse_variance"},
    },
    "score sde": {
        "process": {"kind": "vp"},
        "objective": {"weighting": "elbo", "times": {"kind": "inverse_variance", "t_min": 1e-3}},
        "unet": {"time_embedding": "fourier", "fourier_scale": 8.0},
    },
    "cosine p2": {
        "process": {"kind": "cosine"},
        "objective": {"target": "v", "weighting": {"kind": "p2", "gamma": 0.5}, "times": "mode"},
    },
    "improved ddpm": {
        "process": {"schedule": "cosine"},
        "objective": {"learned_variance": True, "times": ADAPTIVE},
    },
    "x0 in eps space": {
        "process": {"schedule": "linear"},
        "objective": {"target": "x0", "weighting": {"kind": "uniform", "space": "eps"}},
    },
}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_legal_combinations_train_and_their_folders_say_so(name, tmp_path):
    settings = dict(COMBINATIONS[name], duration="2 steps", text_dropout=0.5)
    settings["validation"] = {
        **{"every": "2 steps", "images": 4, "levels": 2},
        **{"prompts": ["a red circle"], "steps": 2},  # of "ddim", which every process has
    }
    config = validate(TrainConfig, tree(tmp_path / "run", **settings))
    process, objective = process_and_objective(config)
    final = train(tmp_path / "run", **settings)
    logged = lines(tmp_path / "run")
    assert all(0 < line["loss"] < 1e6 for line in logged if "loss" in line)
    assert logged[-1]["held_out_loss"] > 0
    assert ("bound" in logged[0]) == objective.learned_variance
    saved = json.loads((final / "scheduler" / "scheduler_config.json").read_text())
    assert process_of(saved) == process and target_of(saved) == objective.target
    # A run that fine-tunes the folder goes on with both, where its config says nothing else.
    tuned = tree(tmp_path / "tuned", model=str(final))
    for part in ("vae", "text", "unet"):
        del tuned[part]
    again, kept = process_and_objective(validate(TrainConfig, tuned))
    assert again == process
    assert (kept.target, kept.learned_variance) == (objective.target, objective.learned_variance)
    ours = LatentDiffusionPipeline.from_pretrained(final)
    ours.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, seed=0, output_type="np")
    drawn = [ours("a red circle", sampler=one, **call).images for one in (None, "ode-euler", "pc")]
    assert all(np.isfinite(images).all() and images.std() > 0 for images in drawn)
    assert abs(drawn[1] - drawn[2]).max() > 1e-5
    if "unet" in settings:  # the frequencies are what random init drew, not learnt
        first, last = process.timestep(torch.tensor([0.0, 1.0])).tolist()
        turns = settings["unet"].get("fourier_scale", 16.0)
        frequencies = ours.unet.time_proj.weight * (last - first) / turns
        assert float(frequencies.std()) == pytest.approx(1, abs=0.35)
    if saved["_class_name"] != "ScoreSdeVeScheduler":  # has no step() in stock
        stock = StableDiffusionPipeline.from_pretrained(final)
        assert type(stock.scheduler).__name__ == saved["_class_name"]
        stock.set_progress_bar_config(disable=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = stock(["a large red circle"], num_inference_steps=3, output_type="np").images
        assert drawn.shape == (1, 16, 16, 3) and drawn.std() > 0


def test_a_learned_variance_is_drawn_with(tmp_path):
    final = train(tmp_path / "run", duration="2 steps", objective={"learned_variance": True})
    pipe = LatentDiffusionPipeline.from_pretrained(final)
    assert pipe.unet.config.out_channels == 2 * pipe.unet.config.in_channels
    stock = StableDiffusionPipeline.from_pretrained(final)
    for each in (pipe, stock):
        each.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=10, guidance_scale=1.0, output_type="latent")
    seeds = dict(generator=torch.Generator().manual_seed(0))
    drawn = pipe("a red circle", **call, **seeds).images
    seeds = dict(generator=torch.Generator().manual_seed(0))
    assert torch.allclose(drawn, stock("a red circle", **call, **seeds).images, atol=1e-5)
    # "ddpm" uses it too, at trailing timesteps: v = 1 draws other noise than v = -1; ddim none.
    found = {"ddpm": [], "ddim": []}
    for value in (1.0, -1.0):
        with torch.no_grad():
            pipe.unet.conv_out.weight[4:] = 0
            pipe.unet.conv_out.bias[4:] = value
        for name, drawn in found.items():
            drawn.append(pipe("a red circle", sampler=name, seed=0, **call).images)
    assert float((found["ddpm"][0] - found["ddpm"][1]).abs().max()) > 1e-3
    assert torch.equal(*found["ddim"])
    # Guidance mixes predictions, not variances.
    assert pipe("a red circle", sampler="ddpm", seed=0, num_inference_steps=2).images


REFUSED = {
    "target 'eps' says nothing about x0 where alpha = 0, which it is at t = 1 of process"
    " 'rectified_flow'": {"process": {"kind": "rectified_flow"}},
    "target 'eps' says nothing about x0 where alpha = 0, which zero_terminal_snr": {
        "process": {"zero_terminal_snr": True}
    },
    "diffusers' schedulers cannot express target 'eps' of process 've'": {
        "process": {"kind": "ve"}
    },
    "diffusers' schedulers cannot express target 'v' of process 'rectified_flow'": {
        "process": {"kind": "rectified_flow"},
        "objective": {"target": "v"},
    },
    "diffusers' schedulers cannot express target 'velocity' of process 'discrete'": {
        "objective": {"target": "velocity"}
    },
    "diffusers' schedulers cannot express target Edm(sigma_data=0.5, kind='edm') of process 'vp'": {
        "process": {"kind": "vp"},
        "objective": {"target": "edm"},
    },
    "a learned variance belongs to ancestral sampling of a variance preserving process, not to"
    " process 'rectified_flow'": {
        "process": {"kind": "rectified_flow"},
        "objective": {"target": "velocity", "learned_variance": True},
    },
    "process: sigma_min 3.0 must be less than sigma_max 2.0": {
        "process": {"kind": "ve", "sigma_min": 3, "sigma_max": 2},
        "objective": {"target": "score"},
    },
    "validation: sampler 'dpm++' runs variance preserving processes, not 'rectified_flow'": {
        "process": {"kind": "rectified_flow"},
        "objective": {"target": "velocity"},
        "validation": {"prompts": ["a red circle"], "sampler": "dpm++"},
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_illegal_combinations_are_refused_with_the_reason(command, tmp_path, reason):
    message = told(*command(tree(tmp_path / "run", **REFUSED[reason]), "--dry-run"))
    # What the config alone tells is told with its file.
    assert message.removeprefix(f"{tmp_path / 'config.yaml'}: ").startswith(reason)


@pytest.mark.parametrize(
    "override, message",
    [
        ("process={kind: cosin}", "key 'process.kind' is 'cosin': known kinds: 'discrete', 'vp'"),
        ("process.shift=3", "unknown key 'process.shift'; kind 'discrete' does not have it, kind"),
        ("process={kind: ve, shift: 3}", "unknown key 'process.shift'; kind 've' does not have"),
        ("process={kind: ve, sigma_max: 0}", "key 'process.sigma_max' is 0: input should be grea"),
        ("objective.times=normal", "key 'objective.times.kind' is 'normal': known kinds: 'unif"),
        ("objective.times={kind: mode, scale: 3}", "objective.times: scale must lie in -1..1.752"),
        (
            "objective.times={kind: uniform, low: 0.5, high: 0.2}",
            "objective.times: low must be less",
        ),
        (
            "objective.times={kind: uniform, low: -1}",
            "objective.times: low must be less than high,",
        ),
        ("objective.times={kind: mode, sale: 1}", "unknown key 'objective.times.sale'; did you me"),
        ("objective.target=epsilon", "key 'objective.target' is 'epsilon': input should be 'x0', "),
        ("objective.weighting={kind: p3}", "key 'objective.weighting.kind' is 'p3': input should"),
        ("unet.time_embedding=learned", "key 'unet.time_embedding' is 'learned': input should be"),
    ],
)
def test_mistakes_in_a_line(tmp_path, override, message):
    from ldm.config.loader import load

    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path / "run")))
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, file, [override])
    assert str(caught.value).removeprefix(f"{file}: ").startswith(message)


def test_kinds_and_defaults():
    def built(**changes):
        return process_and_objective(validate(TrainConfig, tree(Path("run"), **changes)))

    assert built()[0] == DiscreteVP() and built()[1].target == "eps"
    assert built(process={"kind": "discrete"})[0] == DiscreteVP()
    assert built(process={"kind": "vp", "beta_max": 15})[0] == ContinuousVP(beta_max=15)
    flow = {"process": {"kind": "rectified_flow"}, "objective": {"target": "velocity"}}
    assert built(**flow)[0] == RectifiedFlow()
    edm = {"process": {"kind": "ve"}, "objective": {"target": "edm"}}
    assert built(**edm)[0] == VarianceExploding() and built(**edm)[1].target == Edm(0.5)
    weighed = built(objective={"weighting": "min_snr", "gamma": 3})[1]
    again = built(objective={"weighting": {"kind": "min_snr", "gamma": 3}})[1]
    table = DiscreteVP().table
    assert torch.equal(weighed.weight(table), again.weight(table))


def test_a_share_of_the_times():
    def built(**times):
        config = tree(Path("run"), objective={"times": times})
        return process_and_objective(validate(TrainConfig, config))[1].times

    assert built(kind="logit_normal", high=0.2) == LogitNormal(high=0.2)
    message = "objective.times: LogitNormal draws next to no time between low 0.0 and high 0.01"
    with pytest.raises(ConfigError, match=message):
        built(kind="logit_normal", std=0.1, high=0.01)


# -- losses that choose times --


def test_the_memory_of_losses_goes_on_with_the_run(tmp_path):
    settings = dict(objective={"times": ADAPTIVE}, checkpoints={"every": "2 steps", "keep": 5})
    train(tmp_path / "whole", duration="4 steps", **settings)
    train(tmp_path / "left", duration="2 steps", **settings)
    train(tmp_path / "left", duration="4 steps", **settings)
    whole, left = ([x["loss"] for x in lines(tmp_path / n)] for n in ("whole", "left"))
    assert whole == left
    kept = [
        json.loads(
            (
                tmp_path / n / "checkpoints" / f"images-{16 * 4:012d}" / "training/run.json"
            ).read_text()
        )
        for n in ("whole", "left")
    ]
    assert kept[0]["memory"] == kept[1]["memory"]
    assert [len(cell) for cell in kept[0]["memory"]] == [2] * 4
    # Its importance weights are at work: the loss is no plain mean any more.
    plain = train(tmp_path / "plain", duration="4 steps")
    assert plain and [x["loss"] for x in lines(tmp_path / "plain")][:1] == whole[:1]
    assert [x["loss"] for x in lines(tmp_path / "plain")][2:] != whole[2:]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_memory_is_that_of_the_global_batch(tmp_path, monkeypatch, processes):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(tmp_path / "cache"))
    memories = {}
    for name, world, micro in (("one", 1, 16), ("parts", processes, 4)):
        file = tmp_path / f"{name}.yaml"
        settings = dict(objective={"times": ADAPTIVE}, micro_batch_size=micro, duration="4 steps")
        file.write_text(yaml.safe_dump(tree(tmp_path / name, **settings)))
        if world == 1:
            train(tmp_path / name, **settings)
        else:
            finish(launch(TRAIN, "--config", file, processes=world))
        last = tmp_path / name / "checkpoints" / f"images-{16 * 4:012d}"
        memories[name] = json.loads((last / "training" / "run.json").read_text())["memory"]
    for mine, theirs in zip(memories["parts"], memories["one"], strict=True):
        assert len(mine) == 2 and mine == pytest.approx(theirs, rel=1e-3)
