"""Pictures of every mode and shape arrive as the square RGB tensor that they should."""

from collections import Counter
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.images import PLAIN, ImageTransform, View, coordinates, flatten, to_pixels
from ldm.diffusion import stream
from ldm.errors import DataError


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def draw(index: int = 0) -> np.random.Generator:
    return stream(0, "transform", index)


def pixel(image: Image.Image, **options: object) -> tuple[int, ...]:
    tensor = ImageTransform(size=1, **options)(image)
    return tuple(tensor[:, 0, 0].tolist())


def palette(transparency: int | bytes | None) -> Image.Image:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def sixteen(value: int) -> Image.Image:
    return Image.fromarray(np.full((1, 1), value, np.uint16))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.new("L", (1, 1), 7), (7, 7, 7)),
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (palette(None), (10, 20, 30)),
        (palette(1), (0, 0, 255)),
        (palette(b"\xff\x80"), (5, 10, 142)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), (0, 0, 255)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 128)), (128, 0, 127)),
        (Image.new("LA", (1, 1), (100, 51)), (20, 20, 224)),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (1, 1), (128, 128, 128)), (128, 128, 128)),
        (sixteen(0), (0, 0, 0)),
        (sixteen(65535), (255, 255, 255)),
        (sixteen(257 * 100), (100, 100, 100)),
        (Image.new("I", (1, 1), 257 * 50), (50, 50, 50)),
    ],
)
def test_modes_on_a_blue_background(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert pixel(image, background=(0, 0, 255)) == expected


def test_a_colour_that_means_transparent() -> None:
    image = Image.new("RGB", (1, 1), (1, 2, 3))
    image.info["transparency"] = (1, 2, 3)
    assert pixel(image, background=(9, 8, 7)) == (9, 8, 7)


def test_a_mode_that_cannot_be_rgb_is_named() -> None:
    with pytest.raises(DataError, match="mode LAB"):
        flatten(Image.new("LAB", (1, 1)), (0, 0, 0))


def test_soft_edges_keep_the_colour_when_scaled() -> None:
    """Transparent pixels are black below; none of that black may reach the edge."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 3, 8))
    assert (ImageTransform(size=4)(image) == 255).all()


def test_no_resampling_when_the_size_fits() -> None:
    image = noise(32, 32)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    result = ImageTransform(size=32)(image)
    assert torch.equal(result, expected)
    assert result.dtype == torch.uint8 and result.is_contiguous()
    wide = noise(38, 32)
    middle = torch.from_numpy(np.array(wide)).permute(2, 0, 1)[:, :, 3:35]
    assert torch.equal(ImageTransform(size=32)(wide), middle)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (3, 50), (200, 1), (7, 7)])
def test_covers_and_cuts_the_middle(width: int, height: int) -> None:
    """A linear ramp stays linear, and its middle stays in the middle."""
    ramp = np.tile(np.linspace(0, 255, width, dtype=np.float32), (height, 1))
    image = Image.fromarray(ramp.round().astype(np.uint8)).convert("RGB")
    result = ImageTransform(size=16)(image)
    assert result.shape == (3, 16, 16)
    side = min(width, height)
    if width > height:
        assert abs(result.float().mean() - 127.5) < 1.5
        assert result.float().max() - result.float().min() <= 255 * side / width + 2


def test_thin_strips_stay_small() -> None:
    """Scaled before it is cut, this would be a picture of 1.9 gigapixels."""
    assert ImageTransform(size=64)(Image.new("L", (30000, 1), 9)).unique().tolist() == [9]


def test_random_crop_takes_every_place() -> None:
    image = noise(6, 4)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    crops = [whole[:, :, x : x + 4] for x in range(3)]
    transform = ImageTransform(size=4, crop="random")
    counts = [0, 0, 0]
    for index in range(300):
        result = transform(image, transform.view(draw(index)))
        counts[next(i for i, crop in enumerate(crops) if torch.equal(result, crop))] += 1
    assert min(counts) > 70
    assert torch.equal(transform(image), crops[1])


def test_flip_is_one_of_two_variants() -> None:
    image, transform = noise(9, 8), ImageTransform(size=8, flip=True)
    straight, mirrored = transform(image), transform(image, View(mirrored=True))
    assert torch.equal(straight.flip(-1), mirrored)
    assert torch.equal(transform(image), straight)
    flips = 0
    for index in range(400):
        result = transform(image, transform.view(draw(index)))
        flips += torch.equal(result, mirrored)
        assert torch.equal(result, mirrored) != torch.equal(result, straight)
    assert 160 < flips < 240


def test_which_transforms_a_cache_may_keep() -> None:
    for transform, deterministic, views in (
        (ImageTransform(), True, 1),
        (ImageTransform(flip=True), True, 2),
        (ImageTransform(crop="random"), False, 1),
        (ImageTransform(crop="random", crops=5), True, 5),
        (ImageTransform(crop="random", crops=5, flip=True), True, 10),
        (ImageTransform(random_background=0.1), False, 1),
        (ImageTransform(random_shift=1), False, 1),
    ):
        assert (transform.deterministic, len(transform.views)) == (deterministic, views)


@pytest.mark.parametrize("flip", [False, True])
def test_counted_crops_are_evenly_spaced_and_equally_often(flip: bool) -> None:
    transform = ImageTransform(size=8, crop="random", crops=5, flip=flip)
    counts = Counter(transform.view(draw(index)) for index in range(2000))
    assert set(counts) == set(transform.views) and PLAIN in counts
    assert {view.place for view in counts} == {0.0, 0.25, 0.5, 0.75, 1.0}
    expected = 2000 / len(counts)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 25
    lefts = [coordinates((16, 8), view, (8, 8))[3] for view in transform.views]
    assert sorted(set(lefts)) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("told", "crop", "crops"),
    [
        ("only crop: random", "center", 5),
        ("an odd number from 3", "random", 4),
        ("an odd", "random", 1),
    ],
)
def test_counted_crops_that_are_none(
    told: str, crop: Literal["center", "random"], crops: int
) -> None:
    with pytest.raises(ValueError, match=f"crops={crops}: {told}"):
        ImageTransform(crop=crop, crops=crops)


def test_random_background_is_for_transparent_pictures() -> None:
    transform = ImageTransform(size=4, random_background=0.5)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    colours = {
        tuple(transform(clear, transform.view(draw(i)))[:, 0, 0].tolist()) for i in range(200)
    }
    assert 80 < len(colours) < 120 and (255, 255, 255) in colours
    assert (transform(clear) == 255).all()
    opaque = noise(4, 4)
    assert torch.equal(transform(opaque, transform.view(draw(1))), ImageTransform(size=4)(opaque))


def test_shift_fills_with_the_background() -> None:
    transform = ImageTransform(size=8, random_shift=2, background=(1, 2, 3))
    image = noise(8, 8)
    whole = np.array(image).transpose(2, 0, 1)
    padded = np.empty((3, 12, 12), np.uint8)
    padded[:] = np.array([1, 2, 3])[:, None, None]
    padded[:, 2:10, 2:10] = whole
    places = {(y, x): padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
    seen = set()
    for index in range(300):
        result = transform(image, transform.view(draw(index))).numpy()
        seen.add(next(place for place, part in places.items() if np.array_equal(part, result)))
    assert len(seen) == 25


def test_settings_do_not_move_each_others_draws() -> None:
    image = noise(12, 8)
    for index in range(20):
        one = ImageTransform(size=8, crop="random")
        other = replace(one, flip=True)
        plain = one(image, one.view(draw(index)))
        flipped = other(image, other.view(draw(index)))
        assert torch.equal(flipped, plain) or torch.equal(flipped, plain.flip(-1))


def test_to_pixels() -> None:
    pixels = to_pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.tensor([-1.0, -0.6, 1.0]))
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(((to_pixels(every) + 1) * 127.5).round().to(torch.uint8), every)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"size": 0}, "size=0"),
        ({"random_background": 1.5}, "random_background=1.5"),
        ({"random_shift": 64}, "random_shift=64"),
        ({"background": (0, 0, 256)}, "background="),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ImageTransform(**options)
