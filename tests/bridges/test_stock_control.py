"""Networks beside the U-Net, told a picture: ours are stock's."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from PIL import Image
from typer.testing import CliRunner

import tiny
import tiny_control
import tiny_sd3
import tiny_sdxl
from ldm.cli import app
from ldm.pipeline import LatentDiffusionPipeline
from stock import apart, generators, picture, quiet, scheduled

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*prompts:FutureWarning"),
]
PROMPTS = ["a red apple", "two dogs"]
KINDS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler]
NONE = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def sd() -> dict[str, Any]:
    parts = tiny.components()
    return parts | {"controlnet": tiny_control.controlnet(parts["unet"])}


def ours(parts: dict[str, Any]) -> Any:
    return quiet(LatentDiffusionPipeline(**parts))


CALLS: list[dict[str, Any]] = [
    {},
    {"controlnet_conditioning_scale": 0.7, "control_guidance_start": 0.2},
    {"guess_mode": True, "control_guidance_end": 0.7},
    {"guidance_scale": 1.0, "guess_mode": True},
]


@pytest.mark.parametrize(("kind", "call"), list(zip(KINDS, CALLS, strict=True)))
def test_a_controlnet_is_stocks(sd, kind, call):
    """The size is the hint's, cut as in stock."""
    parts = scheduled(sd, kind)
    theirs = quiet(StableDiffusionControlNetPipeline(**parts, **NONE))
    hint = picture(21, 17)
    asked = dict(prompt=PROMPTS, num_inference_steps=5, output_type="np") | call
    mine = ours(parts)
    found = mine(**asked, control_image=hint, generator=generators()).images
    assert found.shape == (2, 16, 20, 3)
    assert apart(found, theirs(**asked, image=hint, generator=generators()).images) <= CLOSE
    plain = ours(parts | {"controlnet": None})(
        prompt=PROMPTS, num_inference_steps=5, output_type="np", height=16, width=20,
        generator=generators(), guidance_scale=call.get("guidance_scale"),
    ).images  # fmt: skip
    assert apart(found, plain) > 0.02


def test_several_hints_and_nets_are_stocks(sd):
    """A hint a prompt; two ControlNets with strengths of their own; none of one that is 0."""
    parts, hints = scheduled(sd, EulerDiscreteScheduler), [picture(seed=1), picture(seed=2)]
    asked = dict(prompt=PROMPTS, num_inference_steps=3, output_type="np", num_images_per_prompt=2)
    theirs = quiet(StableDiffusionControlNetPipeline(**parts, **NONE))
    mine = ours(parts)
    found = mine(**asked, control_image=hints, generator=generators(4)).images
    assert apart(found, theirs(**asked, image=hints, generator=generators(4)).images) <= CLOSE
    alone = mine(
        PROMPTS[1], num_inference_steps=3, output_type="np", control_image=hints[1],
        generator=generators(4)[3],
    ).images  # fmt: skip
    assert np.abs(found[3] - alone[0]).max() <= CLOSE
    parts = parts | {"controlnet": [sd["controlnet"], tiny_control.controlnet(sd["unet"], 1)]}
    theirs = quiet(StableDiffusionControlNetPipeline(**parts, **NONE))
    mine = ours(parts)
    told = asked | dict(controlnet_conditioning_scale=[0.5, 0.8], control_guidance_end=[1.0, 0.7])
    stocks = theirs(**told, image=hints, generator=generators(4)).images
    both = mine(**told, control_image=hints, generator=generators(4)).images
    assert apart(both, stocks) <= CLOSE
    told["controlnet_conditioning_scale"] = [1.0, 0.0]
    first = mine(**told, control_image=hints, generator=generators(4)).images
    one = [hints[0]]
    plain = ours(scheduled(sd, EulerDiscreteScheduler))
    assert np.array_equal(first, plain(**asked, control_image=one, generator=generators(4)).images)


def test_sdxl_and_edits_are_stocks(sd):
    parts = tiny_sdxl.components(published=False)
    parts["controlnet"] = tiny_control.controlnet(parts["unet"])
    asked: dict[str, Any] = dict(prompt=PROMPTS, num_inference_steps=4, output_type="np")
    for kind in KINDS[:3]:
        made = scheduled(parts, kind)
        theirs = quiet(StableDiffusionXLControlNetPipeline(**made, add_watermarker=False))
        told = asked | {"guess_mode": kind is DDIMScheduler, "guidance_scale": 4.0}
        found = ours(made)(**told, control_image=picture(), generator=generators()).images
        assert apart(found, theirs(**told, image=picture(), generator=generators()).images) <= CLOSE
    theirs = quiet(StableDiffusionControlNetImg2ImgPipeline(**sd, **NONE))
    told = asked | dict(image=picture(seed=3), control_image=picture(), strength=0.6)
    told["controlnet_conditioning_scale"] = 1.0
    found = [pipe(**told, generator=generators()).images for pipe in (ours(sd), theirs)]
    assert apart(*found) <= CLOSE


def test_folders_go_both_ways(sd, tmp_path):
    sd["controlnet"].save_pretrained(tmp_path / "net")
    ours(sd | {"controlnet": None}).save_pretrained(tmp_path / "base")
    mine = quiet(
        LatentDiffusionPipeline.from_pretrained(tmp_path / "base", controlnet=str(tmp_path / "net"))
    )
    asked: dict[str, Any] = dict(prompt="a", num_inference_steps=2, output_type="np")
    drawn = mine(**asked, control_image=picture(), generator=generators(1)).images
    mine.save_pretrained(tmp_path / "whole")
    theirs = quiet(StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "whole"))
    assert apart(drawn, theirs(**asked, image=picture(), generator=generators(1)).images) <= CLOSE
    again = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "whole"))
    assert isinstance(again.controlnet, ControlNetModel)
    same = again(**asked, control_image=picture(), generator=generators(1)).images
    assert apart(same, drawn) <= 1e-6
    for wrong, message in (
        (tmp_path / "none", "no such folder of a ControlNet"),
        (tmp_path / "base" / "unet", "holds no ControlNetModel, but UNet2D"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            LatentDiffusionPipeline.from_pretrained(tmp_path / "base", controlnet=wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "control_image is missing"),
        ({"control_image": "a.png"}, "control_image must be a PIL image"),
        ({"control_image": [picture()] * 3}, "control_image: 3 pictures for 1 prompts"),
        ({"controlnet_conditioning_scale": "much"}, "controlnet_conditioning_scale must be a fin"),
        ({"controlnet_conditioning_scale": [1.0, 1.0]}, "has 2 numbers for 1 networks"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "must be less than"),
        ({"guess_mode": 1}, "guess_mode must be True or False"),
    ],
)
def test_what_does_not_go_is_one_line(sd, wrong, message):
    asked = {"control_image": picture()} | wrong if wrong else {}
    with pytest.raises(ValueError, match=message) as caught:
        ours(sd)("a", num_inference_steps=2, **asked)
    assert "\n" not in str(caught.value)


def test_who_has_none_says_so(sd):
    with pytest.raises(ValueError, match="control_image is told a ControlNet, and this pipeline"):
        ours(sd | {"controlnet": None})("a", control_image=picture())
    other = LatentDiffusionPipeline(**tiny_sd3.components(), unet=None)
    with pytest.raises(ValueError, match="control_image is no argument of a model of the family"):
        quiet(other)("a", num_inference_steps=1, control_image=picture())


def test_the_command_follows_a_picture(sd, tmp_path):
    ours(sd | {"controlnet": None}).save_pretrained(tmp_path / "base")
    sd["controlnet"].save_pretrained(tmp_path / "net")
    picture().save(tmp_path / "hint.png")
    out = tmp_path / "out.png"

    def run(*options: Any) -> Any:
        given = ["sample", "a", "--model", tmp_path / "base", "--steps", 2, "--guidance", 3]
        return CliRunner().invoke(app, [*map(str, given), "--out", str(out), *map(str, options)])

    both = ("--control", tmp_path / "hint.png", "--controlnet", tmp_path / "net")
    result = run(*both, "--argument", "controlnet_conditioning_scale=0.5")
    assert result.exit_code == 0, result.output
    asked: dict[str, Any] = dict(num_inference_steps=2, guidance_scale=3.0, seed=0, sampler="dpm++")
    drawn = ours(sd)("a", **asked, control_image=picture(), controlnet_conditioning_scale=0.5)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(drawn.images[0]))
    copy = ("--from", out, "--out", tmp_path / "again.png")
    assert "pass --control and --controlnet" in run(*copy).stderr
    given = ["sample", *copy, "--model", tmp_path / "base", *both]
    assert CliRunner().invoke(app, [*map(str, given)]).exit_code == 0
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()
    assert "--control is given 1 times for 0 --controlnet" in run(*both[:2]).stderr
    assert "none.png: there is no such file" in run("--control", "none.png", *both[2:]).stderr


def test_the_command_draws_with_adapters(sd, tmp_path):
    parts = {name: part for name, part in sd.items() if name != "controlnet"}
    adapter = tiny_control.adapter(sd["unet"])
    quiet(ours(parts)).save_pretrained(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "net")
    file = Path(tiny_control.ip_adapter(sd["unet"], tmp_path / "ip")) / "models" / "ip.safetensors"
    for seed in (1, 2):
        picture(seed=seed).save(tmp_path / f"{seed}.png")
    out, base = tmp_path / "out.png", ("--model", tmp_path / "base")

    def run(*options: Any) -> Any:
        return CliRunner().invoke(app, ["sample", *map(str, options)])

    hint = ("--t2i-adapter", tmp_path / "net", "--hint", tmp_path / "1.png")
    told = ("--ip-adapter", tmp_path / "ip", "--ip-image", tmp_path / "2.png")
    small = ("a", "--steps", 2, "--guidance", 3, *base, "--out", out)
    result = run(*small, *hint, *told, "--ip-scale", 0.5)
    assert result.exit_code == 0, result.output
    mine = ours(copy.deepcopy(parts) | {"adapter": adapter})
    mine.load_ip_adapter(str(file))
    mine.set_ip_adapter_scale(0.5)
    asked = dict(adapter_image=picture(seed=1), ip_adapter_image=picture(seed=2))
    drawn = mine("a", num_inference_steps=2, guidance_scale=3.0, seed=0, sampler="dpm++", **asked)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(drawn.images[0]))
    again = ("--from", out, "--out", tmp_path / "again.png", *base)
    lacks = "pass --hint and --t2i-adapter and --ip-image and --ip-adapter"
    assert lacks in run(*again).stderr
    assert run(*again, *hint, *told).exit_code == 0
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()
    pickled, lost = tmp_path / "ip.bin", tmp_path / "lost.safetensors"
    pickled.touch()
    lost.write_bytes(file.read_bytes())
    broken = tmp_path / "ip" / "models" / "other.safetensors"
    broken.write_bytes(b"no tensors")
    for options, message in (
        (hint[:2], "--hint is given 0 times for 1 --t2i-adapter: a picture for each"),
        ((*told[:2], *hint[2:]), "--hint is given 1 times for 0 --t2i-adapter"),
        ((*hint[2:], "--t2i-adapter", "gone"), "--t2i-adapter gone: there is no such file or"),
        (told[2:], "--ip-image is given 1 times for 0 --ip-adapter"),
        ((*told[:3], tmp_path / "none.png"), "none.png: there is no such file"),
        (("--ip-scale", 1), "--ip-scale is given 1 times for 0 --ip-adapter: once, or for each"),
        ((*told, "--ip-scale", "nan"), "--ip-scale must be a finite number, not nan"),
        ((*told[2:], "--ip-adapter", tmp_path / "x"), "x: there is no such file or folder"),
        ((*told[2:], "--ip-adapter", pickled), "an IP-Adapter is read from .safetensors"),
        ((*told[2:], "--ip-adapter", lost), "lost.safetensors: there is no image_encoder beside"),
        (told, "name one file of an IP-Adapter; there are models/ip.safetensors, models/other"),
        ((*told[2:], "--ip-adapter", broken), "cannot be read as an IP-Adapter: "),
        (("--t2i-adapter", tmp_path / "base" / "unet", *hint[2:]), "unet holds no T2IAdapter, but"),
    ):
        result = run(*small, *options)
        line = result.stderr.strip().splitlines()[-1]
        assert result.exit_code == 2 and line.startswith("error: ") and message in line, line


def test_t2i_adapters_are_stocks(sd, tmp_path):
    parts = sd | {"controlnet": None, "adapter": tiny_control.adapter(sd["unet"])}
    asked: dict[str, Any] = dict(prompt=PROMPTS, num_inference_steps=3, output_type="np")
    hints = [picture(seed=1), picture(seed=2)]
    told = asked | dict(adapter_conditioning_scale=0.6)

    def stock(parts: dict[str, Any]) -> Any:
        kept = {name: part for name, part in parts.items() if name != "controlnet"}
        return quiet(StableDiffusionAdapterPipeline(**kept, **NONE))

    for kind in KINDS[:3]:
        made = scheduled(parts, kind)
        found = ours(made)(**told, adapter_image=hints, generator=generators()).images
        theirs = stock(made)(**told, image=hints, generator=generators()).images
        assert apart(found, theirs) <= CLOSE
    two = made | {"adapter": [parts["adapter"], tiny_control.adapter(sd["unet"], 1)]}
    told = asked | dict(adapter_conditioning_scale=[0.6, 0.3])
    each = [[one, one] for one in hints]  # of each adapter, a prompt each
    found = ours(two)(**told, adapter_image=hints, generator=generators()).images
    theirs = stock(two)(**told, image=each, generator=generators()).images
    assert apart(found, theirs) <= CLOSE
    parts["adapter"].save_pretrained(tmp_path / "adapter")
    ours(sd | {"controlnet": None}).save_pretrained(tmp_path / "base")
    mine = LatentDiffusionPipeline.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter_image is missing"):
        quiet(mine)("a")
    wide = T2IAdapter(3, [32, 64], num_res_blocks=1, downscale_factor=4)
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        ours(parts | {"adapter": wide})("a", adapter_image=picture(), height=18)
    xl = tiny_sdxl.components(published=False)
    xl["adapter"] = tiny_control.adapter(xl["unet"])
    told = asked | dict(adapter_conditioning_factor=0.7, guidance_scale=4.0, height=16, width=16)
    theirs = quiet(StableDiffusionXLAdapterPipeline(**xl))
    found = ours(xl)(**told, adapter_image=hints, generator=generators()).images
    assert apart(found, theirs(**told, image=hints, generator=generators()).images) <= CLOSE


def test_ip_adapters_are_stocks(sd, tmp_path):
    asked: dict[str, Any] = dict(prompt=PROMPTS, num_inference_steps=3, output_type="np")
    xl = tiny_sdxl.components(published=False)
    plain = sd | {"controlnet": None}
    for name, parts, stock, more in (
        ("sd", plain, StableDiffusionPipeline, NONE),
        ("xl", xl, StableDiffusionXLPipeline, {"add_watermarker": False}),
    ):
        folder = tiny_control.ip_adapter(parts["unet"], tmp_path / name)
        kept = {key: part for key, part in parts.items() if key != "controlnet"}
        file = dict(subfolder="models", weight_name="ip.safetensors")
        pipes = []
        for cls, own in ((LatentDiffusionPipeline, {}), (stock, more)):
            pipe = quiet(cls(**kept | {"unet": copy.deepcopy(parts["unet"])}, **own))
            pipe.load_ip_adapter(folder, **file)
            pipe.set_ip_adapter_scale(0.7)
            pipes.append(pipe)
        for kind in KINDS[:3]:
            for pipe in pipes:
                pipe.scheduler = kind.from_config(parts["scheduler"].config)
            told = asked | {"guidance_scale": 1.0 if kind is DDIMScheduler else 5.0}
            found = [
                pipe(**told, ip_adapter_image=picture(), generator=generators()).images
                for pipe in pipes
            ]
            assert apart(*found) <= CLOSE
        mine = pipes[0]
        embeds = mine.prepare_ip_adapter_image_embeds(picture(), None, "cpu", 1, True)
        again = mine(**told, ip_adapter_image_embeds=embeds, generator=generators()).images
        assert np.abs(found[0] - again).max() <= 1e-6
    for wrong, message in (
        ({}, "ip_adapter_image is missing: an IP-Adapter is loaded"),
        ({"ip_adapter_image": [picture()] * 2}, "ip_adapter_image has 2 entries for 1 IP-Adapters"),
        ({"ip_adapter_image": picture(), "ip_adapter_image_embeds": embeds}, "not both"),
        ({"ip_adapter_image_embeds": [embeds[0][1:]]}, "must be tensors 2 pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            mine("a", num_inference_steps=1, **wrong)
    with pytest.raises(ValueError, match="no place for an IP-Adapter"):
        mine.save_pretrained(tmp_path / "saved")
    mine.unload_ip_adapter()
    mine("a", num_inference_steps=1)
    other = LatentDiffusionPipeline(**tiny_sd3.components(), unet=None)
    with pytest.raises(ValueError, match="a model of the family sd3 takes no IP-Adapter"):
        other.load_ip_adapter(folder, **file)
