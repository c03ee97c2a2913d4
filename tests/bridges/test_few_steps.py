"""Samplers of few steps against stock: ``lcm`` and ``tcd``, by folders and by LoRA files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)
from torch import Tensor, nn

import tiny
from ldm.diffusion import Cosine, RectifiedFlow, VarianceExploding, scheduler_config
from ldm.families.unet import guidance_embedding, hears_guidance
from ldm.formats import lora
from ldm.models.lora import attach, collect
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling import CONSISTENCY_SAMPLERS, Consistency, default_sampler, own_sampler, sampler

PROMPTS = ["a red heart", "a slice of pizza"]
WIDTH = 32


def embedded(folder: Path, target: str) -> Path:
    """A pipeline folder whose U-Net is told its guidance, and makes much of it."""
    pipe = tiny.pipeline(target)
    hears_guidance(pipe.unet, WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight, std=0.5)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder)
    return folder


def opened(kind: Any, folder: Path) -> Any:
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


def drawn(pipe: Any, **asked: Any) -> Tensor:
    call = {"prompt": PROMPTS, "num_inference_steps": 4, "output_type": "latent", **asked}
    return pipe(**call).images


@pytest.fixture(scope="module", params=["eps", "v"])
def folder(request, tmp_path_factory) -> Path:
    return embedded(tmp_path_factory.mktemp("lcm") / request.param, request.param)


def test_latents_are_those_of_the_stock_pipeline(folder) -> None:
    ours, stock = (
        opened(kind, folder) for kind in (LatentDiffusionPipeline, LatentConsistencyModelPipeline)
    )
    found = {}
    for scale in (1.0, 7.3):
        for steps in (1, 4):
            asked = {"guidance_scale": scale, "num_inference_steps": steps}
            mine, theirs = (drawn(p, generator=generators(), **asked) for p in (ours, stock))
            named = drawn(ours, generator=generators(), sampler="lcm", **asked)
            assert float((mine - theirs).abs().max()) <= 1e-6 and torch.equal(mine, named)
            found[scale, steps] = mine
    assert float((found[1.0, 4] - found[7.3, 4]).abs().max()) > 0.01  # it hears
    assert type(opened(DiffusionPipeline, folder)) is StableDiffusionPipeline  # which draws it too
    assert default_sampler(ours.scheduler.config) == "lcm"
    with pytest.raises(ValueError, match="negative_prompt: this network is told its guidance"):
        drawn(ours, negative_prompt="blue")


def test_the_embedding_of_a_scale_is_that_of_stock() -> None:
    pipe = LatentConsistencyModelPipeline
    for width in (8, 33):
        scales = torch.tensor([1.0, 7.3, 15.25], dtype=torch.float64)
        mine = guidance_embedding(scales, width)
        theirs = pipe.get_guidance_scale_embedding(
            None,  # type: ignore[arg-type]
            torch.stack([torch.tensor(s - 1) for s in scales.tolist()]),
            embedding_dim=width,
        )
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scheduler, eta", [(LCMScheduler, 0.0), (TCDScheduler, 0.3)])
def test_a_lora_of_few_steps_draws_in_stock(tmp_path, scheduler, eta) -> None:
    base = tiny.folder(tmp_path / "base", "v")
    unet = tiny.pipeline("v").unet
    with torch.random.fork_rng():
        torch.manual_seed(2)
        attach(unet, ["to_q", "conv1", "time_emb_proj"], rank=2, alpha=2.0, dora=False)
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    lora.write({"unet": collect(unet)}, tmp_path / "lora")
    pair = [opened(kind, base) for kind in (LatentDiffusionPipeline, StableDiffusionPipeline)]
    pair[1].scheduler = scheduler.from_config(pair[1].scheduler.config)
    name = {LCMScheduler: "lcm", TCDScheduler: "tcd"}[scheduler]
    asked = {"guidance_scale": 1.0, "eta": eta, "output_type": "np"}
    plain = drawn(pair[0], generator=generators(), sampler=name, **asked)
    for pipe in pair:
        pipe.load_lora_weights(tmp_path / "lora")
    mine = drawn(pair[0], generator=generators(), sampler=name, **asked)
    theirs = drawn(pair[1], generator=generators(), **asked)
    assert abs(mine - theirs).max() <= 1e-5 and abs(mine - plain).max() > 1e-3


@pytest.mark.parametrize("name", CONSISTENCY_SAMPLERS)
def test_a_picture_is_its_own_whatever_is_drawn_beside_it(name) -> None:
    pipe = tiny.pipeline("v")
    asked = {"sampler": name, "eta": 0.4, "guidance_scale": 3.0}
    both = drawn(pipe, seed=7, **asked)
    split = drawn(pipe, seed=7, batch_size=1, **asked)
    assert float((both - split).abs().max()) < 1e-4
    assert float((both[0] - both[1]).abs().max()) > 0.05
    config = {**pipe.scheduler.config, "original_inference_steps": 20}
    assert sampler(name, config).start(4).timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="cannot be larger|smaller than"):
        sampler(name, config).start(21)


def test_processes_without_a_scheduler_take_the_same_steps() -> None:
    asked: list[float] = []
    for process, target in ((VarianceExploding(), "score"), (RectifiedFlow(shift=3.0), "velocity")):
        found = sampler("lcm", scheduler_config(process, target))
        assert isinstance(found, Consistency)
        times = found.times(4, 1.0, None)
        assert torch.equal(times, process.time(torch.tensor([1.0, 0.75, 0.5, 0.25])))
        assert found.evaluations(4) == 4
        asked.append(float(times[1]))
    assert asked == [0.75, 0.9]
    assert own_sampler(LCMScheduler()).evaluations(4) == 4
    cosine = sampler("lcm", scheduler_config(Cosine(), "v"))
    assert cosine.start(2).timesteps.tolist() == [999, 499]
    with pytest.raises(ValueError, match="'tcd' runs variance preserving processes"):
        sampler("tcd", scheduler_config(RectifiedFlow(), "velocity"))
