"""Every number of every config has two ends; what lies beyond is told when the config is read."""

import json
from typing import Any

import pytest

from ldm.config.json_schema import CONFIGS, text
from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.tasks.command import costly

REQUIRED = ("run=r", "duration=3 steps", "data={kind: shapes}")
LIMITS = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
# Whose class looks at them together, or in words of its own: each is asked below.
OWN_WORDS = {
    "Buckets.step": ("images.buckets.step=0", "images.buckets.step=100000"),
    "DigitsData.digits": ("data={kind: digits, digits: [10]}",),
    "EmojiData.size": ("data={kind: emoji, size: 0}", "data={kind: emoji, size: 99999}"),
    "ImageTransform.size": ("images.size=0", "images.size=2147483648"),
    "ImageTransform.background": ("images.background=[0, 0, 256]", "images.background=[0, 0, -1]"),
    "ImageTransform.random_shift": ("images.random_shift=-1", "images.random_shift=64"),
    "InverseVariance.cells": (
        "objective.times={kind: inverse_variance, cells: 0}",
        "objective.times={kind: inverse_variance, cells: 1000000000000}",
    ),
    "LossSecondMoment.cells": ("objective.times={kind: loss_second_moment, cells: 100000000}",),
    "LossSecondMoment.history": ("objective.times={kind: loss_second_moment, history: 0}",),
    "ShapesData.size": ("data.size=7", "data.size=99999"),
    "ShapesData.width": ("data.width=7", "data.width=99999"),
}


def integers(part: Any) -> list[dict[str, Any]]:
    """The schemas of whole numbers in a schema."""
    found = [part] if isinstance(part, dict) and part.get("type") == "integer" else []
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return found + [number for each in inner for number in integers(each)]


def test_every_whole_number_has_two_ends():
    without: set[str] = set()
    for name, config in CONFIGS.items():
        schema = json.loads(text(config))
        for cls, described in {**schema["$defs"], name: schema}.items():
            for key, part in described.get("properties", {}).items():
                ends = [
                    all(set(end) & number.keys() for end in LIMITS) for number in integers(part)
                ]
                without |= set() if all(ends) else {f"{cls}.{key}"}
    sizes = {name for name in without if name.startswith("ClipSize.")}
    assert len(sizes) == 9 and without - sizes == OWN_WORDS.keys()
    for override in ("clip.size=0", "clip.projection=1000000", "clip.text_layers=100000"):
        with pytest.raises(ConfigError, match="must lie in 1..65536"):
            load(CONFIGS["clip"], None, [*REQUIRED, override])


@pytest.mark.parametrize("override", [o for several in OWN_WORDS.values() for o in several])
def test_what_a_class_looks_at_itself(override):
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, None, [*REQUIRED, override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "key 'seed' is -1: input should be greater than or equal to 0"),
        ("seed=4294967296", "key 'seed' is 4294967296: input should be less than 4294967296"),
        ("data.seed=-1", "key 'data.seed' is -1"),
        ("validation.seed=-1", "key 'validation.seed' is -1"),
        ("validation.seed=4294967296", "key 'validation.seed' is 4294967296"),
        (
            "validation={seed: 4294967294, prompts: [a, b, c]}",
            "validation: seed: 4294967294 + 3 pictures goes beyond 2^32 - 1",
        ),
        (
            "validation={seed: 4294967290, suites: {shapes: 8}}",
            "validation: seed: 4294967290 + 8 pictures goes beyond 2^32 - 1",
        ),
        ("score.seed=4294967295", "score: seed: 4294967295 + 256 pictures goes beyond 2^32 - 1"),
        ("data={path: x, held_out_fraction: -0.1}", "key 'data.held_out_fraction' is -0.1"),
        ("data={kind: parquet, path: x, held_out_fraction: 1.1}", "key 'data.held_out_fraction'"),
        ("data={kind: digits, hold_out: -1}", "key 'data.hold_out' is -1"),
        ("data={path: x, weight: -1}", "key 'data.weight' is -1"),
        ("images.size=2147483648", "key 'images.size' is 2147483648: input should be less than"),
        ("images.buckets.max_aspect=1e9", "is no ratio of long to short side, from 1 to 1000"),
        ("batch_size=1099511627776", "key 'batch_size' is 1099511627776"),
        ("workers=5000", "key 'workers' is 5000: input should be less than or equal to 1024"),
        ("validation.images=100000000", "key 'validation.images' is 100000000"),
        ("validation.levels=1000000", "key 'validation.levels' is 1000000"),
        ("unet.block_out_channels=[1073741824]", "key 'unet.block_out_channels.0' is 1073741824"),
        ("process.num_train_timesteps=1000000000000", "key 'process.num_train_timesteps'"),
        ("process={kind: ve, sigma_min: 3, sigma_max: 2}", "sigma_min 3.0 must be less than"),
        ("duration=99999999999999999999 steps", "duration: longer than can be counted"),
    ],
)
def test_beyond_an_end(override, message):
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, None, [*REQUIRED, override])
    assert str(caught.value).startswith("command line: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_last_seeds_are_seeds():
    last = "validation={seed: 4294967295, prompts: [a]}"
    config = load(TrainConfig, None, [*REQUIRED, "seed=4294967295", last])
    assert config.seed == config.validation.seed == 2**32 - 1


def test_what_costs_much_is_said(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)

    def said(*overrides: str) -> list[str]:
        return list(costly(load(TrainConfig, None, [*REQUIRED, *overrides])))

    assert said() == said("workers=32", "validation.images=10000", "score.captions=512") == []
    assert said("workers=1000") == [
        "workers: 1000 processes read for every process of the run, on a machine of 8 processors:"
        " each takes memory of its own, and they are not faster than 8"
    ]
    (line,) = said("validation.images=1000000")
    assert "up to 1,000,000 held-out pictures at 10 levels" in line and "10,000,000 in all" in line
    (line,) = said("validation={prompts: [a, b], count: 50000}")
    assert (
        "100,000 pictures are drawn at every validation (5k steps), which takes 3,000,000" in line
    )
    (line,) = said("score.captions=100000")
    assert "100,000 pictures of every source are drawn at the end, which takes 3,000,000" in line
    assert list(costly(load(TrainConfig, None, [*REQUIRED, "validation=null"]))) == []
