"""Imagen trained: a base and its super-resolution, from random init and from folders; what is told
of the picture itself is the same cached or not, killed or not, in one process or two.
"""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from launched import ENVIRONMENT, TRAIN, digests, finish, launch, logged, losses, steps, wait_for
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.diffusion import DiscreteVP, normal
from ldm.encoding.dataset import ImageDraws
from ldm.encoding.encoder import Encoder
from ldm.errors import ConfigError
from ldm.families.build import build, parameters
from ldm.families.imagen import Imagen
from ldm.models.aside import Aside, LowResolution
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import text_to_image
from runs import accelerator, train, tree

T5 = {"kind": "t5", "vocab_size": 600, "max_length": 77, "hidden_size": 16,
      "intermediate_size": 32, "layers": 1, "heads": 2, "head_dim": 8}  # fmt: skip
UNET = {"block_out_channels": [8, 32], "layers_per_block": [0, 1], "attention_head_dim": 8,
        "norm_num_groups": 4}  # fmt: skip
LOW = {"kind": "low_resolution", "factor": 4}
CALL: dict[str, Any] = dict(num_inference_steps=2, guidance_scale=2.0)


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "family": "imagen", "text": T5, "vae": "pixels", "unet": UNET, "aside": LOW,
        "process": {"schedule": "cosine"},
        "objective": {"target": "eps", "learned_variance": True},
        "optimizer": {"lr": 1e-2}, "duration": "2 steps", **changes,
    }  # fmt: skip


def made(**changes: Any) -> Any:
    return build(validate(TrainConfig, tree(Path("run"), **settings(**changes))), [], meta=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_super_resolution_trains_and_stock_opens_the_folder(tmp_path):
    validation = {"every": "2 steps", "images": 2, "levels": 2, "steps": 2, "captions": 2}
    final = train(tmp_path / "whole", **settings(), validation=validation)
    train(tmp_path / "bare", **settings(), validation=validation, cache_text=False)
    assert losses(tmp_path / "bare") == losses(tmp_path / "whole")
    held_out = logged(tmp_path / "whole", "held_out_loss")
    assert held_out == logged(tmp_path / "bare", "held_out_loss") and held_out[0] > 0
    assert len(list((tmp_path / "whole" / "samples").glob("*.png"))) == 1
    low = torch.rand(1, 3, 4, 4, generator=generator(1)) * 2 - 1
    theirs = IFSuperResolutionPipeline.from_pretrained(final)
    theirs.set_progress_bar_config(disable=True)
    noise = theirs.image_noising_scheduler.config
    assert (noise.beta_schedule, noise.num_train_timesteps) == ("squaredcos_cap_v2", 1000)
    assert theirs.scheduler.config.thresholding and theirs.scheduler.config.clip_sample
    mine = LatentDiffusionPipeline.from_pretrained(final)
    drawn = theirs("a ring", image=low, generator=generator(), output_type="pt", **CALL).images
    again = mine("a ring", image=low, generator=generator(), output_type="latent", **CALL).images
    assert drawn.shape == (1, 3, 16, 16) and (again - drawn).abs().max() <= 1e-6
    more = settings(model=str(final), text=None, unet=None, vae=None, family=None, aside=None,
                    process={}, objective={}, duration="1 steps")  # fmt: skip
    train(tmp_path / "more", **more)
    for part in ("scheduler", "image_noising_scheduler"):
        kept = [tmp_path / run / "final" / part / "scheduler_config.json"
                for run in ("whole", "more")]  # fmt: skip
        assert kept[0].read_text() == kept[1].read_text()


def test_a_dry_run_asks_no_mask_for_its_values():
    step = text_to_image.step(validate(TrainConfig, tree(Path("run"), **settings(aside=None))))
    assert step.networks["text_encoder"].device.type == "meta"


def test_a_base_trains(tmp_path):
    final = train(tmp_path / "base", **settings(aside=None, duration="1 steps"))
    theirs = IFPipeline.from_pretrained(final)
    theirs.set_progress_bar_config(disable=True)
    mine = LatentDiffusionPipeline.from_pretrained(final)
    drawn = theirs("a ring", generator=generator(), output_type="pt", **CALL).images
    again = mine("a ring", generator=generator(), output_type="latent", **CALL).images
    assert (again - drawn).abs().max() <= 1e-6
    told = settings(model=str(final), text=None, unet=None, vae=None, family=None)
    with pytest.raises(ConfigError, match="aside: the U-Net of .* enlarges no picture"):
        build(validate(TrainConfig, tree(Path("run"), **told)), [], meta=True)


@dataclass(frozen=True)
class Learned(LowResolution):
    """The smaller picture through a network, so that there is something to cache."""

    network: nn.Module = field(  # type: ignore[assignment]
        default_factory=lambda: _filter(), compare=False
    )

    def made(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"low": self.network(super().made(pixels)["low"]).detach()}


def _filter() -> nn.Module:
    network = nn.Conv2d(3, 3, 3, padding=1)
    for number, parameter in enumerate(network.parameters()):
        parameter.data = normal(0, "filter", number, tuple(parameter.shape)) / 5
    return network


def pictures(folder: Path) -> None:
    """24 captioned pictures of three shapes."""
    folder.mkdir()
    drawn = np.random.default_rng(0)
    for n in range(24):
        width, height = [(32, 16), (16, 32), (24, 24)][n % 3]
        pixels = drawn.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")


def test_caches_buckets_flips_and_interruptions_change_no_bit(tmp_path, own_cache, monkeypatch):
    arithmetic = Imagen.aside

    def aside(family: Imagen, config: TrainConfig, model: Any) -> Aside:
        plain = arithmetic(family, config, model)
        assert plain is not None
        return Learned(plain.factor, plain.process, plain.levels)

    monkeypatch.setattr(Imagen, "aside", aside)
    pictures(tmp_path / "pictures")
    told = settings(data={"path": str(tmp_path / "pictures")}, duration="3 steps", batch_size=6,
                    images={"size": 24, "flip": True, "buckets": {"step": 8}})  # fmt: skip
    train(tmp_path / "whole", **told)
    held = [path.parent for path in own_cache.glob("asides/*/*.safetensors")]
    assert len({*held}) == 3  # a space for every bucket
    train(tmp_path / "parts", **told | {"duration": "2 steps"}, cache_latents=False, workers=1)
    train(tmp_path / "parts", **told, cache_latents=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    both = [digests(tmp_path / name / "final", at_least=1) for name in ("parts", "whole")]
    assert both[0] == both[1]


# Kills and processes are asked of SDXL, and of this family what goes on in one.
@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits_and_two_processes_in_the_same_numbers(
    tmp_path, own_cache, monkeypatch
):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(own_cache))
    told = settings(duration="6 steps", batch_size=8, checkpoints={"every": "2 steps", "keep": 2})
    files = {}
    for name in ("killed", "two"):
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(tree(tmp_path / name, **told)))
    process = launch(TRAIN, "--config", files["killed"])
    wait_for(lambda: steps(tmp_path / "killed") >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    train(tmp_path / "killed", **told)
    train(tmp_path / "whole", **told)
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "killed") == whole and len(whole) == 6
    both = [digests(tmp_path / name / "final", at_least=1) for name in ("killed", "whole")]
    assert both[0] == both[1]
    finish(launch(TRAIN, "--config", files["two"], processes=2))
    assert losses(tmp_path / "two") == pytest.approx(whole, rel=1e-5)


def test_what_is_drawn_for_a_picture_is_its_own():
    aside = LowResolution(4, DiscreteVP("cosine"))
    assert isinstance(aside, Aside)
    one, same, other = (aside.drawn(3, n, (16, 8)) for n in (5, 5, 6))
    assert one["noise"].shape == (3, 8, 16) and torch.equal(one["noise"], same["noise"])
    assert not torch.equal(one["noise"], other["noise"]) and one["level"] == same["level"]
    assert not torch.equal(one["noise"], normal(3, "noise", 5, (3, 8, 16)))
    levels = torch.stack([aside.drawn(0, n, (4, 4))["level"] for n in range(400)]).double()
    assert 0 <= levels.min() and levels.max() <= 999 and abs(levels.mean() - 499.5) < 50
    for ends, found in (((0.0, 0.0), {0}), ((1.0, 1.0), {999})):
        fixed = LowResolution(4, DiscreteVP("cosine"), ends)
        assert {int(fixed.drawn(0, n, (4, 4))["level"]) for n in range(9)} == found
    # A flipped picture's is flipped, a flat one's flat, and values stay in bounds.
    pixels = torch.rand(2, 3, 8, 16, generator=generator()) * 2 - 1
    low = aside.made(pixels)["low"]
    assert low.shape == (2, 3, 2, 4) and low.abs().max() <= 1
    assert torch.allclose(aside.made(pixels.flip(-1))["low"], low.flip(-1), atol=1e-6)
    assert torch.allclose(aside.made(torch.full((1, 3, 8, 8), 0.5))["low"], torch.tensor(0.5))
    # alpha up + sigma noise, at the level that the network is told.
    drawn = {name: value[None].repeat(2, *[1] * value.ndim) for name, value in one.items()}
    told = aside.told({"low": low}, drawn)
    alpha = aside.process.table.alpha[int(one["level"])]
    large = nn.functional.interpolate(low, (8, 16), mode="bilinear", align_corners=True)
    mixed = alpha * large.double() + (1 - alpha**2).sqrt() * drawn["noise"].double()
    assert torch.allclose(told["low"].double(), mixed, atol=1e-6)
    assert torch.equal(told["low_timestep"], one["level"].expand(2))


def test_the_smaller_picture_is_that_of_the_view(own_cache):
    """Random crops, shifts and flips: what is told is made of the very pixels."""
    told = settings(images={"size": 16, "flip": True, "crop": "random", "random_shift": 3},
                    cache_text=False)  # fmt: skip
    config = validate(TrainConfig, tree(Path("run"), **told))
    model = build(config, ["a ring"])
    collection = Collection(config.data, config.images)
    parts = model.codec, model.conditioner, accelerator()
    encoder = Encoder(config, *parts, aside=model.aside)
    draws = ImageDraws(config, collection, encoder)
    rows = [draws[n] for n in range(8)]
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}
    extra = encoder.condition(batch).extra
    expected = model.aside.told(
        model.aside.made(batch["pixels"]),
        {"noise": batch["drawn:noise"], "level": batch["drawn:level"]},
    )
    assert torch.equal(extra["low"], expected["low"])
    assert len({row["drawn:level"].item() for row in rows}) > 4


def test_the_efficient_order_costs_less():
    """The same widths, convolved after going down: at most 0.4 of the arithmetic."""

    def cost(widths: tuple[int, ...], layers: tuple[int, ...]) -> tuple[int, int]:
        network = made(unet={"block_out_channels": list(widths), "layers_per_block": list(layers),
                             "attention": [False] * (len(widths) - 1) + [True],
                             "attention_head_dim": 32, "norm_num_groups": 32},
                       images={"size": 64}).network  # fmt: skip
        network.to_empty(device="cpu")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 6, 64, 64), torch.empty(1),
                    encoder_hidden_states=torch.empty(1, 77, 16),
                    class_labels=torch.empty(1))  # fmt: skip
        return parameters(network), counter.get_total_flops()

    plain, plain_flops = cost((32, 64, 128), (2, 2, 2))
    efficient, flops = cost((32, 32, 64, 128), (0, 2, 2, 2))
    assert flops <= 0.4 * plain_flops and abs(efficient / plain - 1) <= 0.02


WRONG = {
    "aside: a model of the family sd is told nothing of the picture itself": {
        "family": "sd", "text": {"hidden_size": 32, "heads": 2}, "objective": {}
    },
    "vae: models of the family imagen are of pixels": {"vae": {"norm_num_groups": 4}},
    "objective.learned_variance: networks of the family imagen predict a variance too": {
        "objective": {}
    },
    "text.max_length 40: stock reads 77 tokens of every text": {"text": T5 | {"max_length": 40}},
    "images.size 18 is no multiple of aside.factor 4": {"images": {"size": 18}},
    "aside.process: a variance preserving one, not 've'": {
        "aside": LOW | {"process": {"kind": "ve"}}
    },
    "validation.prompts: this model is also told something of the picture itself": {
        "validation": {"every": "2 steps", "prompts": ["a ring"]}
    },
    "text: text_encoder of the family imagen is another kind of text encoder": {
        "text": {"kind": "clip", "hidden_size": 32, "heads": 2}
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_told_in_one_line(message):
    with pytest.raises(ConfigError, match=message) as caught:
        made(**WRONG[message])
    assert "\n" not in str(caught.value)


def test_the_network_is_if_s():
    """As the published folders have it, in other widths."""
    network = made(unet=UNET | {"layers_per_block": 3}, aside=None).network
    with torch.device("meta"):
        stock = UNet2DConditionModel(
            sample_size=16, in_channels=3, out_channels=6, block_out_channels=(8, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            layers_per_block=3, act_fn="gelu", norm_num_groups=4, attention_head_dim=8,
            cross_attention_dim=32, encoder_hid_dim=16, addition_embed_type="text",
            addition_embed_type_num_heads=1, resnet_time_scale_shift="scale_shift",
            cross_attention_norm="group_norm",
        )  # fmt: skip
    assert {n: p.shape for n, p in network.state_dict().items()} == {
        n: p.shape for n, p in stock.state_dict().items()
    }
