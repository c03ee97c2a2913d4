"""Suites of captions against artists of known skill, and the command that runs them."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from typer.testing import CliRunner

import tiny
from exact import EXACT, Mixture
from ldm.cli import app
from ldm.data.images import ImageTransform, to_pixels
from ldm.demo import digit_suites
from ldm.demo.digits import NAMES, DigitsData
from ldm.demo.scene import captions, render
from ldm.demo.shape_suites import prompt_accuracy, readable, scenes
from ldm.diffusion import Condition, DiscreteVP, Objective
from ldm.errors import FeatureError
from ldm.evaluation import charts
from ldm.evaluation.distances import Figure
from ldm.evaluation.features import space
from ldm.evaluation.heldout import held_out_bits, held_out_loss
from ldm.evaluation.retrieval import Proportion
from ldm.formats import lora
from ldm.models.lora import attach, collect
from loras import shake

WHOLE = ImageTransform(size=64)


def test_every_attribute_of_a_scene_is_counted_where_it_belongs() -> None:
    asked = scenes(40, held_out=True)
    assert all(scene.held_out for scene in asked) and len(asked) == 40
    by_caption = {captions(scene)[0]: scene for scene in asked}

    def draw(texts, change=lambda scene: scene):
        drawn = [render(change(by_caption[text]), 64) for text in texts]
        return torch.stack([to_pixels(WHOLE(picture)) for picture in drawn])

    truth = prompt_accuracy(draw, asked)
    assert {key: figure.value for key, figure in truth.figures.items()} == dict.fromkeys(
        truth.figures, 1.0
    )
    two, one = (sum(getattr(s, k) is not None for s in asked) for k in ("relation", "position"))
    sizes = {key: figure.n for key, figure in truth.figures.items()}
    assert sizes["relation"] == sizes["binding (two things)"] == two
    assert (sizes["position"], sizes["count (alike)"], sizes["everything"]) == (
        one,
        40 - one - two,
        40,
    )

    def all_circles(scene):
        return replace(scene, things=tuple(replace(t, shape="circle") for t in scene.things))

    found = prompt_accuracy(lambda texts: draw(texts, all_circles), asked).figures
    things = [thing for scene in asked for thing in scene.things]
    circles = sum(thing.shape == "circle" for thing in things) / len(things)
    assert found["shape"].value == pytest.approx(circles)
    assert found["attributes"].value == pytest.approx((2 + circles) / 3)
    assert (found["colour"].value, found["size"].value, found["relation"].value) == (1, 1, 1)


def test_the_ceiling_of_shapes_is_what_the_autoencoder_leaves() -> None:
    asked = scenes(20, held_out=False)

    assert readable(asked, WHOLE, lambda x: x).value == 1
    half = torch.arange(20) < 10
    found = readable(asked, WHOLE, lambda x: torch.where(half[:, None, None, None], x, 0))
    assert (found.value, found.n) == (0.5, 20)


def test_digits_against_who_copies_them_and_who_draws_another() -> None:
    pytest.importorskip("sklearn")
    source = DigitsData()
    labels = torch.tensor([NAMES.index(e.captions[0].split()[-1]) for e in source.examples])
    pixels = torch.stack([to_pixels(ImageTransform(size=16)(source.load(n))) for n in range(900)])
    trained = digit_suites.Labelled(pixels[:800], labels[:800])
    held_out = digit_suites.Labelled(pixels[800:900], labels[800:900])
    known = [int((labels[:800] == k % 10).nonzero()[k // 10]) for k in range(100)]

    def found(chosen, asked):
        texts = [""] * len(chosen)
        return digit_suites.digits(
            lambda _: pixels[chosen], texts, asked, trained, held_out
        ).figures

    copied = found(known, torch.arange(100) % 10)
    assert copied["class"].value == 1 and copied["precision"].value == 1
    assert copied["class, held-out"].value > 0.9
    ones = found(known[1::10] * 10, torch.arange(100) % 10)
    assert ones["class"].value == 0.1
    assert ones["kid"].low > copied["kid"].high and ones["recall"].value < copied["recall"].value
    assert "class" not in found(known, None)


def test_a_model_that_reads_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {f"{way}_block_types": (f"{way.title()}Block2D",) * 2 for way in ("down", "up")}
    unet = UNet2DModel(8, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    refused = run(tmp_path / "model", "--suite", "shapes", "--out", tmp_path)
    assert refused.exit_code == 2 and "this model reads no text" in refused.stderr
    pytest.importorskip("sklearn")
    drawn = run(tmp_path / "model", "--suite", "digits", "--count", 12, "--steps", 1,
                "--out", tmp_path / "out")  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    (measured,) = json.loads((tmp_path / "out" / "figures.json").read_text())["measured"]
    assert "class" not in measured["figures"] and measured["figures"]["kid"]["n"] == 12
    monkeypatch.setattr(digit_suites, "held_out_bits", partial(held_out_bits, steps=4))
    told = run(tmp_path / "model", "--suite", "likelihood", "--count", 8, "--out", tmp_path / "out")
    assert told.exit_code == 0, told.output
    (measured,) = json.loads((tmp_path / "out" / "figures.json").read_text())["measured"]
    assert measured["figures"]["bits/dim, held-out"]["n"] == 8


@pytest.mark.parametrize(
    "spec, words",
    [
        ("pixel", "is no space of features: write pixels"),
        ("clip", "is no space of features"),
        ("pixels:0", "the side must be a number"),
        ("clip:/nowhere", "there is no /nowhere/text_encoder"),
        ("folder:/nowhere", "it has no config.json"),
        ("inception:/nowhere", "inception"),
    ],
)
def test_spaces_that_are_none(spec: str, words: str) -> None:
    with pytest.raises(FeatureError, match=words):
        space(spec)


def test_averaged_pixels_keep_the_distance_of_flat_pictures() -> None:
    x, y = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    far = [float((space(s)(x) - space(s)(y)).norm()) for s in ("pixels", "pixels:8")]
    assert far[0] == pytest.approx(far[1]) == pytest.approx((3 * 32 * 32) ** 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("evaluate") / "tiny-model")


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command_writes_figures_a_table_and_sheets(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        model, "--suite", "shapes", "--suite", "shapes-new", "--count", 8, "--sweep", "steps=1,2",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((out / "figures.json").read_text())
    assert [(m["suite"], m["drawing"]["steps"]) for m in record["measured"]] == [
        ("shapes", 1), ("shapes", 2), ("shapes-new", 1), ("shapes-new", 2),
    ]  # fmt: skip
    everything = record["measured"][0]["figures"]["everything"]
    assert everything["n"] == 8 and everything["low"] <= everything["value"] <= everything["high"]
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "| suite | figure | n | steps 1 | steps 2 |"
    assert sum(line.startswith("| shapes | everything | 8 | ") for line in lines) == 1
    # Two evaluations a step with guidance, and the time of all of it.
    assert "| shapes | evaluations a picture | 8 | 2 | 4 |" in lines
    assert sum(line.startswith("| shapes | milliseconds a picture | 8 | ") for line in lines) == 1
    spent = record["measured"][1]["spent"]
    assert (spent["pictures"], spent["evaluations"]) == (8, 32) and spent["seconds"] > 0
    assert sorted(f.name for f in out.glob("*.png")) == [
        "shapes-new-steps.png", "shapes-new.png", "shapes-steps.png", "shapes.png",
    ]  # fmt: skip
    again = tmp_path / "again"
    run(model, "--suite", "shapes", "--count", 8, "--steps", 2, "--batch", 3, "--out", again)
    repeated = json.loads((again / "figures.json").read_text())["measured"][0]
    assert repeated["figures"] == record["measured"][1]["figures"]


def test_loss_by_noise_level_of_a_perfect_network() -> None:
    process, exact = DiscreteVP(), EXACT["gaussian"].predictor("eps")

    def eps_hat(x_t, timestep, cond):
        return exact(x_t, process.at(timestep), timestep, cond).y

    z = EXACT["gaussian"].sample(4000, seed=0).float()
    cond = Condition(torch.zeros(len(z), 1, 1))
    found, whole = (
        held_out_loss(Objective(), process, eps_hat, z, cond, levels=4, batch=batch)
        for batch in (999, 4000)
    )
    assert list(found) == ["loss", *(f"loss at {t}" for t in ("0.12", "0.38", "0.62", "0.88"))]
    for t in (0.125, 0.375, 0.625, 0.875):
        level = process.level(process.time(torch.tensor(t)))
        signal, noise = 1.44 * float(level.alpha) ** 2, float(level.sigma) ** 2
        figure = found[f"loss at {t:.2f}"]
        assert figure.low < signal / (signal + noise) < figure.high and figure.n == 4000
        assert figure.value == pytest.approx(whole[f"loss at {t:.2f}"].value, rel=1e-6)
        assert figure.high - figure.low < 0.1


def test_bits_per_dimension_of_noise() -> None:
    """Of N(0, s^2) by the exact network: its entropy, whatever the batch."""
    std = 0.3
    moments = ([1.0], [[0.0] * 12], [(std**2 * torch.eye(12)).tolist()])
    exact = Mixture(*(torch.tensor(part, dtype=torch.float64) for part in moments))

    def predict(x_t, level, timestep, cond):
        found = exact.predictor("eps")(x_t.flatten(1), level, timestep, cond)
        return replace(found, x_t=x_t, y=found.y.reshape(x_t.shape))

    x = std * torch.randn(300, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    # Rounded to the values of 8 bits, as pixels are.
    x = ((x + 1) * 127.5).round().double() / 127.5 - 1
    cond = Condition(torch.zeros(300, 1, 1))
    found = [held_out_bits(predict, DiscreteVP(), x, cond, steps=30, batch=b) for b in (300, 128)]
    entropy = math.log(std * math.sqrt(2 * math.pi * math.e)) / math.log(2)
    expected = entropy + math.log2(255 / 2)
    assert found[0].low < expected < found[0].high and found[0].high - found[0].low < 0.08
    assert found[1].value == pytest.approx(found[0].value, rel=1e-9)


def test_the_command_draws_lists_and_measures_loss(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "two.txt").write_text("a red circle\na dog\n\n")
    (lists / "one.txt").write_text("a cat\n")
    out = tmp_path / "out"
    arguments = ("--suite", "prompts", "--suite", "loss", "--count", 8, "--steps", 1)
    result = run(model, *arguments, "--prompts", lists, "--out", out)
    assert result.exit_code == 0, result.output
    drawn, loss = json.loads((out / "figures.json").read_text())["measured"]
    assert drawn["figures"] == {}  # this model has no picture tower to judge by
    assert len(loss["figures"]) == 11 and loss["figures"]["loss at 0.05"]["n"] == 8
    assert [file.name for file in out.glob("*.png")] == ["prompts.png"]
    refused = run(model, "--suite", "prompts", "--prompts", tmp_path, "--out", out)
    assert refused.exit_code == 2 and "there is no .txt of prompts" in refused.stderr


def test_the_command_measures_with_a_lora(model: Path, tmp_path: Path) -> None:
    adapted = tiny.unet()
    attach(adapted, ["to_q", "to_v"], rank=2, alpha=2.0, dora=False)
    shake(adapted)
    lora.write({"unet": collect(adapted)}, tmp_path / "a.safetensors")
    losses = []
    for weight in (None, 0, 0.5):
        given = () if weight is None else ("--lora", f"{tmp_path / 'a.safetensors'}:{weight}")
        out = tmp_path / f"{weight}"
        result = run(model, "--suite", "loss", "--count", 8, *given, "--out", out)
        assert result.exit_code == 0, result.output
        record = json.loads((out / "figures.json").read_text())
        assert record["lora"] == ({} if weight is None else {"a.safetensors": weight})
        losses.append(record["measured"][0]["figures"]["loss"]["value"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) != losses[2]


def test_charts_have_a_point_for_every_value(tmp_path: Path, monkeypatch) -> None:
    matplotlib = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(
        matplotlib.Figure, "savefig", lambda page, file, **_: drawn.append(page.axes[0])
    )
    columns = [
        {
            "top-1": Proportion.of(hits, 10),
            "top-1, ceiling": Proportion.of(10, 10),
            "top-1 shuffled": Proportion.of(1, 10),
            "top-5": Proportion.of(10, 10),
            "clip score": Figure(hits, hits - 1, hits + 1, 10),
            "frechet, pixels": Figure(20 - hits, 10, 20, 10),
        }
        for hits in (3, 7, 9)
    ]
    charts.lines("steps", [4, 8, 50], columns, tmp_path / "a.png")
    charts.trade_off("guidance", [1, 3, 7.5], columns, tmp_path / "b.png")
    lines, curve = drawn
    line, *others = [
        c for c in lines.get_lines() if len(c.get_xdata()) == 3 and c.get_marker() == "o"
    ]
    assert [c.get_linestyle() for c in (line, *others)] == ["-", "--", ":", "-"]
    assert [c.get_color() == line.get_color() for c in others] == [True, True, False]
    assert list(line.get_xdata()) == [4, 8, 50] and list(line.get_ydata()) == [30, 70, 90]
    (line,) = [c for c in curve.get_lines() if c.get_marker() == "o"]
    assert list(line.get_xdata()) == [3, 7, 9] and list(line.get_ydata()) == [17, 13, 11]
    assert [text.get_text() for text in curve.texts] == ["1", "3", "7.5"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--sweep", "step=4"), "write steps=4,8,16,50 or guidance=1,2,3,5"),
        (("--sweep", "steps=4,x"), "the values must be numbers"),
        (("--sweep", "threshold=no"), "the values must be none, static, dynamic"),
        (("--sweep", "noise-level=1"), "noise-level is of --then, of which there is none"),
        (("--threshold", "static"), "latents have no bounds"),
        (("--suite", "loss", "--then", "MODEL"), "--suite loss measures one network"),
        (("--count", "2"), "--count must be at least 8"),
        (("--lora", "/nowhere:0.5"), "--lora /nowhere: there is no such file or folder"),
        (("--space", "clip:/nowhere"), "there is no /nowhere/text_encoder"),
        (("--suite", "shapes", "--count", "8", "--sampler", "dimm"), "did you mean 'ddim'"),
        (("--suite", "quality", "--data", "nowhere"), "nowhere"),
        (
            ("--suite", "quality", "--data", "{kind: emojis}"),
            "'data.kind' is 'emojis': known kinds",
        ),
        (
            ("--suite", "quality"),
            "--suite quality compares with captioned pictures: add --data FOLD",
        ),
        (
            ("--suite", "shapes", "--data", "emoji"),
            "what quality compares with: add --suite quality",
        ),
    ],
)
def test_mistakes_are_one_line(model: Path, tmp_path: Path, arguments, words: str) -> None:
    named = {"MODEL": model}
    result = run(model, *(named.get(a, a) for a in arguments), "--out", tmp_path / "out")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and words in line
    assert run(tmp_path, "--out", tmp_path / "out").exit_code == 2
