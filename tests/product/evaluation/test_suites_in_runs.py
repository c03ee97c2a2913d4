"""Suites as a validation: the figures of ``ldm evaluate``, in a run that they do not change."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from launched import digests
from ldm.cli import app
from ldm.demo.digits import NAMES
from ldm.errors import ConfigError
from runs import train

pytestmark = pytest.mark.usefixtures("own_cache")

HOW = {"every": "2 steps", "images": 0, "steps": 2, "guidance": 2.0, "seed": 5}
SETTINGS = dict(duration="4 steps", batch_size=8, checkpoints={"every": "9 steps"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 captioned pictures."""
    (tmp_path / "pictures").mkdir()
    for n in range(12):
        Image.new("RGB", (20, 16), (20 * n, 240 - 20 * n, 90)).save(
            tmp_path / "pictures" / f"{n}.png"
        )
        (tmp_path / "pictures" / f"{n}.txt").write_text(f"colour {n}")
    return tmp_path / "pictures"


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_figures_are_those_of_evaluate_and_the_run_is_what_it_was(tmp_path, folder):
    settings = SETTINGS | {"data": {"kind": "folder", "path": str(folder), "held_out_fraction": 0}}
    asked = {"suites": {"shapes-new": 9, "quality": 9}, "spaces": ["pixels:8"]}
    train(tmp_path / "plain", **settings)
    train(tmp_path / "measured", **settings, validation={**HOW, **asked})
    final = tmp_path / "measured" / "final"
    assert digests(final, at_least=3) == digests(tmp_path / "plain" / "final", at_least=3)

    out = tmp_path / "out"
    arguments = ["evaluate", final, "--suite", "shapes-new", "--suite", "quality", "--count"]
    arguments += [9, "--steps", 2, "--guidance", 2, "--seed", 5, "--batch", 8]
    arguments += ["--space", "pixels:8", "--data", folder, "--out", out]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    shapes, quality = json.loads((out / "figures.json").read_text())["measured"]
    lines = [line for line in lines_of(tmp_path / "measured") if "shapes-new/everything" in line]
    assert [line["images"] for line in lines] == [16, 32]
    assert (len(shapes["figures"]), len(quality["figures"])) == (11, 5)
    for suite, found in (("shapes-new", shapes), ("quality", quality)):
        for name, figure in found["figures"].items():
            for ending, key in (("", "value"), ("/low", "low"), ("/high", "high"), ("/n", "n")):
                logged = lines[1][f"{suite}/{name}{ending}"]
                assert logged == pytest.approx(figure[key], rel=1e-6, abs=1e-9), (suite, name)
    assert lines[0]["quality/kid, pixels:8"] != lines[1]["quality/kid, pixels:8"]  # it has learnt
    table = (tmp_path / "measured" / "samples" / "images-000000000032.md").read_text()
    (row,) = [line for line in table.splitlines() if "| shapes-new | everything | 9 |" in line]
    assert "%" in row


def test_quality_is_about_the_pictures_of_the_run(tmp_path):
    """A model of pixels that has learnt nothing draws noise: it is near to noise."""
    found = {}
    for name in ("red", "noise"):
        pictures = tmp_path / name
        pictures.mkdir()
        draw = torch.Generator().manual_seed(0)
        for n in range(10):
            if name == "red":
                picture = Image.new("RGB", (16, 16), (255, 0, n))
            else:
                levels = torch.randint(0, 256, (16, 16, 3), generator=draw, dtype=torch.uint8)
                picture = Image.fromarray(levels.numpy())
            picture.save(pictures / f"{n}.png")
            (pictures / f"{n}.txt").write_text(f"a {n}")
        settings = SETTINGS | {"data": {"kind": "folder", "path": str(pictures)}, "vae": "pixels"}
        settings |= {"duration": "1 steps", "validation": {**HOW, "suites": {"quality": 8}}}
        train(tmp_path / f"run-{name}", **settings)
        found[name] = lines_of(tmp_path / f"run-{name}")[-1]["quality/kid, pixels:16"]
    assert found["red"] > 3 * abs(found["noise"])


def test_a_clip_judges_and_the_background_is_that_of_the_run(tmp_path, own_cache):
    for name, background in (("white", [255, 255, 255]), ("black", [0, 0, 0])):
        pictures = tmp_path / "pictures"
        pictures.mkdir(exist_ok=True)
        for n in range(10):
            picture = Image.new("RGBA", (16, 16))
            picture.paste("white", (0, 0, 8, 16))
            picture.save(pictures / f"{n}.png")
            (pictures / f"{n}.txt").write_text(f"a {n}")
        judge, _ = tiny.clip(tmp_path / "judge")
        settings = SETTINGS | {"data": {"kind": "folder", "path": str(pictures)}}
        spaces = ["pixels:4", f"clip:{judge}"]
        validation = {**HOW, "suites": {"quality": 8}, "spaces": spaces}
        images = {"size": 16, "flip": False, "background": background}
        train(tmp_path / name, **settings, validation=validation, images=images)
        scored = lines_of(tmp_path / name)[-1]
        assert scored["quality/clip score/n"] == 8 and 0 <= scored["quality/clip score"] <= 100
    white, black = (load_file(f)["features"] for f in own_cache.rglob("features/*.safetensors"))
    assert len(white) == len(black) == 10 and (white - black).abs().min() > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"suites": {"shape": 9}}, "input should be 'shapes', 'shapes-new'"),
        ({"suites": {"shapes": 3}}, r"key 'validation\.suites\.shapes' is 3: input should be"),
        ({"suites": {"loss": 9}}, "input should be 'shapes', 'shapes-new'"),
        (
            {"suites": {"quality": 9}, "spaces": ["pixel"]},
            r"validation\.suites: 'pixel' is no space",
        ),
        (
            {"suites": {"quality": 9}, "spaces": ["clip:nowhere"]},
            r"suites: 'clip:nowhere': there is",
        ),
        (
            {"suites": {"shapes": 9}, "sampler": "dmpp"},
            "unknown sampler 'dmpp'",
        ),
        ({"suites": {"emoji-new": 9}}, r"emoji-new: 9 captions, at least \d+"),
        ({"suites": {"quality": 8}, "data": 7}, "quality compares with 8 pictures at least: 7"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_run(tmp_path, changes, message):
    settings = {}
    if count := changes.pop("data", 0):
        settings["data"] = {"kind": "shapes", "count": count, "size": 16, "hold_out": False}
    with pytest.raises(ConfigError, match=message) as error:
        train(tmp_path / "run", **SETTINGS, **settings, validation={**HOW, **changes})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_models_that_read_no_captions(tmp_path):
    pytest.importorskip("sklearn")
    digits = {"data": {"kind": "digits"}, "vae": "pixels", "text": None}

    def run(condition, suites, where="run"):
        validation = {**HOW, "every": "4 steps", "suites": suites}
        settings = SETTINGS | digits | {"condition": condition, "validation": validation}
        train(tmp_path / where, **settings, images={"size": 16, "flip": False})

    with pytest.raises(ConfigError, match="shapes asks by captions, and this model reads labels"):
        run({"classes": list(NAMES)}, {"digits": 9, "shapes": 9})
    with pytest.raises(ConfigError, match="quality asks by captions, and this model reads nothing"):
        run("none", {"quality": 9})
    for condition in ("none", {"classes": list(NAMES)}):
        where = "none" if condition == "none" else "classes"
        run(condition, {"digits": 10}, where)
        (line,) = [n for n in lines_of(tmp_path / where) if "digits/kid" in n]
        assert line["digits/kid/n"] == 10 and ("digits/class" in line) == (where == "classes")


def test_what_is_measured_may_change_where_a_run_goes_on(tmp_path):
    train(tmp_path / "run", **SETTINGS | {"duration": "2 steps"}, validation=HOW)
    train(tmp_path / "run", **SETTINGS, validation={**HOW, "suites": {"shapes": 8}})
    lines = [line for line in lines_of(tmp_path / "run") if "shapes/everything" in line]
    assert [line["images"] for line in lines] == [32]
