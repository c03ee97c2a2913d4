"""Pictures that a call sets out from: what is kept of them to the byte, and what is refused."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image
from typer.testing import CliRunner

import tiny
from ldm.cli.main import app
from ldm.editing.masks import cells, feathered, filled, outpainted
from ldm.editing.passes import (
    between_pictures,
    between_prompts,
    between_seeds,
    enlarged,
    save_gif,
)
from ldm.editing.pictures import masks, resized
from ldm.formats.png import read_parameters

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
CALL: dict[str, Any] = {"num_inference_steps": 4, "seed": 7}


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), "u1"))


def mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    left, top, right, bottom = box
    array = np.zeros((height, width), np.uint8)
    array[top:bottom, left:right] = 255
    return Image.fromarray(array)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


def counted(pipe: Any, **asked: Any) -> tuple[Any, int]:
    calls = []
    made = pipe("a", callback_on_step_end=lambda *told: calls.append(told[1]) or {}, **asked)
    return made.images, len(calls)


def test_strength_goes_from_the_reconstruction_to_text_alone(pipe):
    image = picture()
    asked = CALL | {"output_type": "pt"}
    plain, many = counted(pipe, **asked)
    found, evaluations = counted(pipe, **asked, image=image, strength=1.0)
    assert many == evaluations == 4 and torch.equal(found, plain)
    found, evaluations = counted(pipe, **asked, image=image, strength=0)
    pixels = torch.from_numpy(np.array(image)).movedim(2, 0)[None] / 127.5 - 1
    generator = torch.Generator().manual_seed(7)
    z = pipe.vae.encode(pixels).latent_dist.sample(generator)
    rebuilt = (pipe.vae.decode(z).sample.detach() / 2 + 0.5).clamp(0, 1)
    assert evaluations == 0 and float((found - rebuilt).abs().max()) < 1e-5
    for strength, steps in ((0.5, 2), (None, 3)):
        found, evaluations = counted(pipe, **asked, image=image, strength=strength)
        assert evaluations == steps
        assert 0.01 < float((found - rebuilt).abs().mean()) and not torch.equal(found, plain)


def test_pndm_begins_with_its_doubled_step(pipe):
    config = pipe.scheduler.config
    pndm = PNDMScheduler.from_config(config, skip_prk_steps=True, steps_offset=1)
    seen: list[int] = []
    told = dict(image=picture(), strength=0.5, num_inference_steps=6, seed=1)
    other = type(pipe)(**{**pipe.components, "scheduler": pndm})
    other.set_progress_bar_config(disable=True)
    other("a", **told, callback_on_step_end=lambda p, i, t, k: seen.append(int(t)) or {})
    assert len(seen) == 4 and seen[0] > seen[1] == seen[2] > seen[3]


def test_pictures_do_not_depend_on_the_batch(pipe):
    asked = dict(num_inference_steps=4, output_type="pt", image=[picture(), picture(seed=1)])
    asked |= dict(mask_image=mask(16, 16, (4, 4, 12, 12)), strength=0.7, num_images_per_prompt=2)
    whole = pipe(["a", "b"], seed=3, **asked).images
    parts = pipe(["a", "b"], seed=3, batch_size=3, **asked).images
    assert len(whole) == 4 and float((whole - parts).abs().max()) < 1e-5
    alone = pipe("b", seed=6, **asked | dict(image=picture(seed=1), num_images_per_prompt=1)).images
    assert float((whole[3] - alone[0]).abs().max()) < 1e-5


@pytest.mark.parametrize("size", [(16, 16), (21, 19), (5, 33)])
def test_what_is_not_drawn_stays_to_the_byte(pipe, size):
    image, box = picture(*size), (2, 6, 5, 12)
    hole, feather = mask(*size, box), 2
    asked = CALL | {"image": image, "mask_image": hole}
    given = np.asarray(image)
    for strength in (1.0, 0.5):
        made = np.asarray(pipe("a", **asked, feather=feather, strength=strength).images[0])
        assert made.shape == given.shape
        rows, columns = np.indices(given.shape[:2])
        across = np.maximum(np.maximum(box[0] - columns, columns - (box[2] - 1)), 0)
        down = np.maximum(np.maximum(box[1] - rows, rows - (box[3] - 1)), 0)
        outside = np.hypot(across, down) > feather
        assert np.array_equal(made[outside], given[outside])
        inside = (made != given)[box[1] : box[3], box[0] : box[2]]
        assert inside.any(-1).all()
    black = Image.new("L", size)
    assert np.array_equal(np.asarray(pipe("a", **asked | {"mask_image": black}).images[0]), given)


def test_what_is_in_a_hole_changes_nothing(pipe):
    """An encoder sees into a hole from outside: it is filled by what is around it. Of less than all
    steps the hole is what is drawn from.
    """
    hole, gray = mask(16, 16, (4, 4, 12, 12)), Image.new("RGB", (16, 16), "gray")
    others = [Image.composite(one, picture(), hole) for one in (gray, picture(seed=5))]
    asked = CALL | {"mask_image": hole, "output_type": "pt"}
    for strength, same in ((None, True), (0.5, False)):
        made = [pipe("a", **asked, image=one, strength=strength).images for one in others]
        assert torch.equal(*made) == same
    pixels = torch.arange(6.0).reshape(1, 1, 1, 6)
    drawn = torch.tensor([0.0, 1, 1, 1, 1, 0]).reshape(1, 1, 1, 6)
    assert filled(pixels, drawn)[0, 0, 0].tolist() == [0, 0, 0, 5, 5, 5]
    assert torch.equal(filled(pixels, 1 + 0 * drawn), pixels)


def test_a_white_mask_is_text_alone(pipe):
    white = Image.new("1", (16, 16), 1)
    for sampler in (None, "euler", "dpm++"):
        asked = CALL | {"output_type": "pt", "sampler": sampler}
        plain = pipe("a", **asked).images
        assert torch.equal(pipe("a", **asked, image=picture(), mask_image=white).images, plain)


def test_a_variation_goes_from_one_seed_to_the_other(pipe):
    asked = dict(num_inference_steps=3, output_type="pt", sampler="euler-a")
    shares = [0.0, 0.2, 0.8, 1.0]
    told = dict(num_images_per_prompt=4, seed=[7] * 4, batch_size=3)
    made = pipe("a", **asked, **told, variation=([30] * 4, shares)).images
    ends = [pipe("a", **asked, seed=seed).images[0] for seed in (7, 30)]
    # A batch of its own changes the order of sums, not the draws.
    assert float((made[0] - ends[0]).abs().max()) < 1e-5
    assert float((made[3] - ends[1]).abs().max()) < 1e-5
    assert torch.equal(pipe("a", **asked, seed=7, variation=(30, 1)).images[0], ends[1])
    far = [float((one - ends[0]).abs().mean()) for one in made]
    assert 0 < far[1] < far[2]
    pair = pipe("a", **asked, seed=7, variation=(29, 0.2), num_images_per_prompt=2).images
    alone = pipe("a", **asked, seed=8, variation=(30, 0.2)).images[0]
    assert float((pair[1] - alone).abs().max()) < 1e-5


def test_masks_of_all_kinds_are_one():
    hole = mask(16, 16, (4, 4, 12, 12))
    array = np.asarray(hole)
    unit = array / np.float32(255)
    kinds = [hole, hole.convert("RGB"), array, unit[..., None], torch.from_numpy(unit), [hole]]
    kinds += [torch.from_numpy(array.copy())[None], torch.from_numpy(unit)[None, None]]
    made = [resized(masks("mask_image", one), 16, 16) for one in kinds]
    assert made[0].shape == (1, 1, 16, 16) and made[0].sum() == 64
    assert all(torch.equal(made[0], one) for one in made[1:])


def test_cells_and_feathers():
    drawn = torch.zeros(1, 1, 4, 8)
    drawn[..., 1, 3] = 1
    assert cells(drawn, 2)[0, 0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    row = feathered(drawn, 3)[0, 0, 1]
    assert torch.allclose(row, torch.tensor([0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]))
    assert torch.equal(feathered(drawn, 0), drawn)
    assert torch.equal(feathered(torch.zeros_like(drawn), 3), torch.zeros_like(drawn))


def test_outpainting(pipe):
    image = picture(10, 12)
    canvas, hole = outpainted(image, left=3, bottom=6)
    assert canvas.size == hole.size == (13, 18)
    made = pipe("a", **CALL, image=canvas, mask_image=hole, feather=0).images[0]
    assert made.size == (13, 18) and np.array_equal(np.asarray(made)[:12, 3:], np.asarray(image))
    for wrong in ({}, {"top": -1}):
        with pytest.raises(ValueError, match="pixels"):
            outpainted(image, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask_image": picture()}, "mask_image needs an image"),
        ({"strength": 0.5}, "strength needs an image"),
        ({"image": picture(), "feather": 2}, "feather is that of a mask_image"),
        ({"image": "a.png"}, "image must be a PIL image"),
        ({"image": []}, "image must be a PIL image"),
        ({"image": picture(), "strength": 1.5}, r"strength must lie in \[0, 1\], not 1.5"),
        ({"image": picture(), "strength": "half"}, "strength must be a finite number"),
        ({"image": picture(), "strength": 0.1}, "of 4 steps is less than one step"),
        ({"image": picture(1, 1)}, "1 x 1 pixels are too few"),
        ({"image": np.zeros((4, 4))}, "image must be h w 3, or n of them"),
        ({"image": torch.zeros(3, 4, 4) + 9}, r"image must hold bytes or numbers in \[0, 1\]"),
        ({"image": torch.full((3, 4, 4), torch.nan)}, "image must hold bytes"),
        ({"image": [picture()] * 3}, "3 pictures for 1 prompts of 1 pictures each"),
        ({"image": picture(), "mask_image": [picture()] * 2}, "2 pictures for 1 prompts"),
        ({"image": [picture()] * 2, "mask_image": [picture()] * 3}, "3 masks for 2 pictures"),
        ({"image": picture(), "height": 15}, "height must be a multiple of 2"),
        ({"image": torch.zeros(1, 4, 8, 8), "mask_image": picture()}, "image are latents"),
        ({"image": picture(), "denoising_end": 0.5}, "denoising_end: a picture is edited"),
        ({"image": picture(), "denoising_start": 0.5}, "image and denoising_start belong together"),
        ({"image": picture(), "mask_image": picture(), "feather": -1}, "feather must be 0"),
        ({"variation": 5}, r"variation must be \(seed, strength\)"),
        ({"variation": (5, 1.5)}, r"a strength must lie in \[0, 1\], not 1.5"),
        ({"variation": (None, 0.5)}, r"variation must be \(seed, strength\)"),
        ({"variation": (5, [0.1, 0.2])}, "variation: 2 strengths for 1 images"),
        ({"variation": ([5, 6], 0.1)}, "2 seeds for 1 images"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_one_line(pipe, wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipe("a", **CALL | wrong)
    assert "\n" not in str(caught.value)


def stop(pipe: Any, *told: Any) -> dict[str, Any]:
    pipe._interrupt = True
    return {}


def test_small_things_in_large_pictures(pipe):
    """What is around the mask is drawn at the model's size; nothing else is touched."""
    photos, holes = [picture(100, 70, seed) for seed in (1, 2)], []
    for corner in (50, 20):
        holes.append(mask(100, 70, (corner, 30, corner + 20, 44)))
    asked = dict(num_inference_steps=2, seed=[7, 9])
    call = asked | dict(image=photos, mask_image=holes, padding_mask_crop=6)
    made = pipe(["a", "two dogs"], **call, feather=0).images
    part = photos[1].crop((14, 21, 46, 53)).resize((16, 16), Image.Resampling.LANCZOS)
    hole = holes[1].crop((14, 21, 46, 53)).resize((16, 16), Image.Resampling.LANCZOS)
    drawn = pipe("two dogs", num_inference_steps=2, seed=9, image=part, mask_image=hole).images[0]
    drawn = np.asarray(drawn.resize((32, 32), Image.Resampling.LANCZOS))
    found, before = np.asarray(made[1]).astype(int), np.asarray(photos[1])
    assert np.array_equal(found[30:44, 20:40], drawn[9:23, 6:26])
    found[30:44, 20:40] = before[30:44, 20:40]
    assert np.array_equal(found, before) and made[0].size == (100, 70)
    soft = np.asarray(pipe(["a", "two dogs"], **call).images[1])  # a cell of 2 is 4 pixels there
    apart = (soft != before).any(-1)
    assert apart[26:48, 16:44].sum() > 14 * 20 + 100 and apart[26:48, 16:44].sum() == apart.sum()
    none = pipe("a", seed=7, num_inference_steps=1, image=photos[0], padding_mask_crop=6,
                mask_image=Image.new("L", (100, 70)))  # fmt: skip
    assert np.array_equal(none.images[0], photos[0])
    for wrong, message in (
        ({"image": None}, "padding_mask_crop needs image: a PIL image"),
        ({"mask_image": None}, "padding_mask_crop needs mask_image"),
        ({"mask_image": picture()}, "16 x 16 pixels and its picture 100 x 70"),
        ({"mask_image": [holes[0]] * 3}, "3 masks for 2 pictures"),
        ({"output_type": "pt"}, "leave out output_type"),
        ({"padding_mask_crop": -1}, "padding_mask_crop must be 0 pixels or more, not -1"),
        ({"feather": -1}, "feather must be 0"),
        ({"enlarge": 2, "image": None, "mask_image": None}, "leave out padding_mask_crop"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            pipe(["a", "two dogs"], **call | wrong)
        assert "\n" not in str(caught.value)


def test_passes(pipe, tmp_path):
    asked = dict(num_inference_steps=2, seed=3)
    small = pipe("a", **asked, output_type="latent").images
    large = enlarged(pipe, "a", scale=1.5, strength=0.5, **asked, output_type="pt").images
    latents = torch.nn.functional.interpolate(small, (12, 12), mode="bilinear")
    told = asked | {"image": latents, "strength": 0.5, "output_type": "pt"}
    assert large.shape == (1, 3, 24, 24) and torch.equal(large, pipe("a", **told).images)
    assert torch.equal(large, pipe("a", **asked, output_type="pt", enlarge=(1.5, 0.5)).images)
    assert pipe("a", **asked, enlarge=(2, 0.6, "pixel"), return_dict=False)[0][0].size == (32, 32)
    stopped = pipe("a", **asked, enlarge=1.5, output_type="pt", callback_on_step_end=stop).images
    assert stopped.shape == (1, 3, 24, 24)
    for wrong, message in (
        ({"enlarge": 1}, r"enlarge must be a scale, or like \(2, 0.6, 'latent'\): more than 1"),
        ({"enlarge": (2, 0.5, "x")}, "latent or pixel, not"),
        ({"enlarge": 2, "image": picture()}, "enlarge draws anew, and to the end: leave out image"),
        ({"enlarge": 2, "strength": 0.5}, r"that of the second pass: enlarge=\(2, 0.6\)"),
        ({"enlarge": 2, "scale": 3}, "scale"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a", **asked, **wrong)
    row = between_seeds(pipe, "a", (3, 9), 3, num_inference_steps=2).images
    ends = [pipe("a", num_inference_steps=2, seed=seed).images[0] for seed in (3, 9)]
    for made, end in zip((row[0], row[2]), ends, strict=True):
        assert np.abs(np.asarray(made).astype(int) - np.asarray(end)).max() <= 1
    save_gif(row, tmp_path / "row.gif")
    with Image.open(tmp_path / "row.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (16, 16)
    pair = picture(), picture(seed=1)
    row = between_pictures(pipe, "a", pair, 3, strength=0.0, num_inference_steps=2).images
    one = pipe("a", image=pair[1], strength=0.0, seed=0, num_inference_steps=2).images[0]
    assert np.abs(np.asarray(row[2]).astype(int) - np.asarray(one)).max() <= 1
    told = dict(num_inference_steps=2, seeds=(3, 9), output_type="pt")
    row = between_prompts(pipe, ("a", "two dogs"), 3, **told).images
    for made, text, seed in ((row[0], "a", 3), (row[2], "two dogs", 9)):
        end = pipe(text, num_inference_steps=2, seed=seed, output_type="pt").images[0]
        assert float((made - end).abs().max()) < 1e-5
    assert float((row[0] - row[1]).abs().mean()) > 1e-3 < float((row[2] - row[1]).abs().mean())
    again = between_prompts(pipe, ("a", "two dogs"), 3, batch_size=2, **told).images
    assert float((row - again).abs().max()) < 1e-5
    for wrong in (
        lambda: enlarged(pipe, "a", scale=1.0),
        lambda: between_seeds(pipe, "a", (1, 2), 1),
    ):
        with pytest.raises(ValueError, match="more than 1|2 pictures at least"):
            wrong()


def test_the_command_edits_and_says_so(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    image, hole = picture(19, 21), mask(19, 21, (4, 4, 12, 12))
    image.save(tmp_path / "a.png")
    hole.save(tmp_path / "m.png")

    def run(*options: Any) -> Any:
        given = ["sample", "a", "--model", tmp_path / "model", "--steps", 4, "--guidance", 3]
        return CliRunner().invoke(app, [*map(str, given), "--out", str(out), *map(str, options)])

    out = tmp_path / "out.png"
    edited = ("--image", tmp_path / "a.png", "--mask", tmp_path / "m.png", "--feather", 1)
    result = run(*edited, "--strength", 0.5, "--variation-seed", 9, "--seed", 5)
    assert result.exit_code == 0, result.output
    made = pipe("a", num_inference_steps=4, guidance_scale=3.0, seed=5, variation=(9, 0.1),
                image=image, mask_image=hole, strength=0.5, feather=1, sampler="dpm++")  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(made.images[0]))
    text = Image.open(out).text["parameters"]
    assert "Seed: 5, Size: 19x21, Model: model, Denoising strength: 0.5, Variation seed: 9," in text
    assert text.endswith("Variation seed strength: 0.1")
    told = read_parameters(out)
    assert told is not None
    assert (told.strength, told.variation_seed, told.variation_strength) == (0.5, 9, 0.1)
    assert run("--image", tmp_path / "a.png", "--outpaint", "0,0,7,0").exit_code == 0
    assert Image.open(out).size == (26, 21)
    big = picture(100, 70)
    big.save(tmp_path / "a.png")
    mask(100, 70, (40, 30, 60, 44)).save(tmp_path / "m.png")
    result = run(*edited[:4], "--steps", 1, "--guidance", 1)
    assert (
        "a.png has 100 x 70 pixels and is drawn whole by a model of 16 x 16: that is slow, and"
        " things are drawn small and many times; --mask-crop 32 draws what is around the mask"
        " alone, and --size 20x12 makes it smaller first"
    ) in result.stderr
    result = run(*edited[:4], "--mask-crop", 6, "--size", "24x24")
    assert result.exit_code == 0 and not result.stderr, result.output
    told = dict(num_inference_steps=4, guidance_scale=3.0, sampler="dpm++", seed=0)
    told |= dict(height=24, width=24, padding_mask_crop=6)
    made = pipe("a", image=big, mask_image=Image.open(tmp_path / "m.png"), **told).images[0]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(made))
    again = ["sample", "--from", out, "--model", tmp_path / "model", *edited[:4]]
    again += ["--out", tmp_path / "copy.png"]
    assert CliRunner().invoke(app, list(map(str, again))).exit_code == 0
    assert (tmp_path / "copy.png").read_bytes() == out.read_bytes()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for options, message in (
        (("--mask", tmp_path / "m.png"), "--mask needs --image"),
        (("--image", tmp_path / "none.png"), "none.png: there is no such file"),
        (("--image", tmp_path / "bad.png"), "bad.png"),
        ((*edited, "--strength", 2), "--strength must lie in 0..1, not 2.0"),
        ((*edited, "--outpaint", "1,1,1,1"), "leave out --mask"),
        ((*edited[:2], "--outpaint", "1,1"), "--outpaint must look like"),
        ((*edited[:2], "--feather", 1), "--feather is that of a --mask"),
        ((*edited[:2], "--mask-crop", 1), "--mask-crop is that of a --mask"),
        ((*edited, "--mask-crop", -1), "--mask-crop must be 0 pixels or more, not -1"),
        (("--variation-seed", -1), "--variation-seed must lie in"),
        ((*edited, "--strength", 0.1), "less than one step"),
    ):
        result = run(*options)
        lines = result.stderr.strip().splitlines()
        assert result.exit_code == 2 and message in lines[-1], (options, result.output)
        assert sum(line.startswith("error:") for line in lines) == 1


def ran(folder: Any, command: str, *options: Any) -> Any:
    given = [command, "a", *options, "--model", folder / "model", "--steps", 2]
    return CliRunner().invoke(app, list(map(str, given)))


def test_the_command_draws_between(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    run = partial(ran, tmp_path)
    for seed in range(2):
        picture(seed=seed).save(tmp_path / f"{seed}.png")

    result = run("between", "two dogs", "--frames", 3, "--out", tmp_path / "x.gif")
    assert result.exit_code == 0, result.output
    assert "%|" not in result.stderr  # neither of what loads nor of its steps
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (16, 16)
    ends = ("--image", tmp_path / "0.png", "--to-image", tmp_path / "1.png")
    assert run("between", *ends, "--frames", 2, "--out", tmp_path / "row").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "row").iterdir()) == ["0000.png", "0001.png"]
    told = dict(num_inference_steps=2, guidance_scale=7.5, sampler="dpm++", batch_size=8)
    made = between_pictures(pipe, "a", (picture(), picture(seed=1)), 2, **told).images
    assert np.array_equal(np.asarray(Image.open(tmp_path / "row" / "0001.png")), made[1])
    for options, message in (
        ((), "the last is the first"),
        (ends[:2], "belong together"),
        ((*ends, "--to-seed", 3), "one PROMPT and one --seed"),
        (("b", "--frames", 1), "--frames must lie in 2..10000, not 1"),
        (("--to-seed", 1, "--size", "wide"), "--size must look like"),
    ):
        result = run("between", *options, "--out", tmp_path / "y.gif")
        assert result.exit_code == 2 and message in result.stderr, (options, result.output)


def test_the_command_draws_twice(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    run = partial(ran, tmp_path)
    picture().save(tmp_path / "0.png")
    out, copy = tmp_path / "out.png", tmp_path / "copy.png"
    hires = ("--enlarge", "1.5,0.5,pixel", "--seed", 3)
    assert run("sample", *hires, "--out", out).exit_code == 0
    asked = dict(num_inference_steps=2, guidance_scale=7.5, sampler="dpm++", seed=3)
    large = enlarged(pipe, "a", scale=1.5, strength=0.5, by="pixel", **asked).images[0]
    assert large.size == (24, 24) and np.array_equal(np.asarray(Image.open(out)), large)
    assert "Size: 24x24" in Image.open(out).text["parameters"]
    again = ["sample", "--from", out, "--model", tmp_path / "model", "--out", copy]
    assert CliRunner().invoke(app, list(map(str, again))).exit_code == 0
    assert copy.read_bytes() == out.read_bytes()
    for options, message in (
        (("--enlarge", 1), "--enlarge must look like 2,0.6,latent: more than 1"),
        (("--enlarge", "2,0.5,x"), "latent or pixel, not '2,0.5,x'"),
        (("--enlarge", 2, "--image", tmp_path / "0.png"), "--enlarge draws anew"),
    ):
        result = run("sample", *options, "--out", out)
        assert result.exit_code == 2 and message in result.stderr, (options, result.output)
