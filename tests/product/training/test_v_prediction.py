"""A v-prediction run with zero terminal SNR says so in its folder, and stock draws alike."""

import json

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ldm.pipeline import LatentDiffusionPipeline
from runs import train


def test_exported_folder_says_v_prediction_and_stock_draws_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    final = train(
        tmp_path / "run",
        duration="30 steps",
        optimizer={"lr": 2e-3},
        objective={"target": "v", "weighting": "min_snr"},
        process={"zero_terminal_snr": True},
    )
    saved = json.loads((final / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    assert saved["rescale_betas_zero_snr"] is True
    assert saved["timestep_spacing"] == "trailing"

    ours = LatentDiffusionPipeline.from_pretrained(final)
    stock = StableDiffusionPipeline.from_pretrained(final)
    assert isinstance(stock.scheduler, DDIMScheduler)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            ["a large red circle", "three small blue stars"],
            num_inference_steps=20,
            guidance_scale=7.5,
            latents=latents.clone(),
            output_type="np",
        ).images
        pictures.append(torch.from_numpy(drawn))
    assert (pictures[0] - pictures[1]).abs().max() <= 1e-4
    assert pictures[0].std() > 0.01  # pictures, not a constant
