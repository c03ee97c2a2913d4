"""LoRAs added up, into one and into a model, and the LoRA between two models."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from ldm.cli.main import app
from ldm.cli.options import weighted
from ldm.formats import lora
from ldm.formats.lora_arithmetic import extracted, halved, merged
from ldm.models.lora import Update

LINEAR, CONV = "mid_block.attentions.0.proj_in", "conv_out"
SHAPES = {LINEAR: (64, 64, 1, 1), CONV: (4, 32, 3, 3)}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def update(name: str, rank: int, alpha: float, seed: int) -> Update:
    draws = torch.Generator().manual_seed(seed)
    out, *inside = SHAPES[name]
    down = torch.randn(rank, *inside, generator=draws)
    return Update(down, torch.randn(out, rank, 1, 1, generator=draws), alpha)


def change(one: Update) -> torch.Tensor:
    return one.alpha / one.rank * one.up.flatten(1) @ one.down.flatten(1)


@pytest.fixture(scope="module")
def two() -> list[lora.Lora]:
    return [
        {"unet": {LINEAR: update(LINEAR, 2, 1.0, 0), CONV: update(CONV, 3, 3.0, 1)}},
        {"unet": {LINEAR: update(LINEAR, 4, 8.0, 2)}},
    ]


def test_half_precision_rounds_and_loses_no_number(two):
    part = halved(two[0])["unet"][CONV]
    assert part.alpha == 3.0 and torch.equal(part.down, two[0]["unet"][CONV].down.half())
    large = Update(torch.full((1, 2), 1e5), torch.ones(2, 1), 1.0)
    with pytest.raises(ValueError, match="unet.conv_in holds numbers that float16 does not"):
        halved({"unet": {"conv_in": large}})


def test_a_sum_of_loras_is_one_lora(two):
    whole, error = merged([(two[0], 0.8), (two[1], -0.5)])
    assert error == 0 and whole["unet"][LINEAR].rank == 6 and whole["unet"][CONV].rank == 3
    exact = 0.8 * change(two[0]["unet"][LINEAR]) - 0.5 * change(two[1]["unet"][LINEAR])
    assert (change(whole["unet"][LINEAR]) - exact).norm() < 1e-6 * exact.norm()
    # Of a smaller rank it is the nearest one, by the singular values that are left out.
    less, error = merged([(two[0], 0.8), (two[1], -0.5)], rank=3)
    singular = torch.linalg.svdvals(exact.double())
    other = 0.8 * change(two[0]["unet"][CONV])
    total = exact.double().square().sum() + other.double().square().sum()
    assert error == pytest.approx(float((singular[3:].square().sum() / total).sqrt()), rel=1e-5)
    away = (change(less["unet"][LINEAR]) - exact).norm()
    assert float(away) == pytest.approx(float(singular[3:].norm()), rel=1e-4)
    magnitude = torch.ones(1, 64, 1, 1)
    shaped = two[1]["unet"][LINEAR]
    dora = {"unet": {LINEAR: Update(shaped.down, shaped.up, 1.0, magnitude)}}
    with pytest.raises(ValueError, match=r"proj_in has DoRA's magnitudes, which do not add up"):
        merged([(two[0], 1.0), (dora, 1.0)])
    wrong = {"unet": {LINEAR: update(CONV, 2, 1.0, 0)}}
    with pytest.raises(ValueError, match=r"\(64, 64, 1, 1\) and \(4, 32, 3, 3\): the LoRAs are of"):
        merged([(two[0], 1.0), (wrong, 1.0)])


def test_into_a_model_and_out_of_it(two, tmp_path):
    folder = tiny.folder(tmp_path / "base")
    for number, one in enumerate(two):
        lora.write(one, tmp_path / f"{number}.safetensors")
    first, second = (str(tmp_path / f"{number}.safetensors") for number in range(2))
    words = ["--lora", f"{first}:0.8", "--lora", f"{second}:-0.5"]

    def ldm(*asked: object) -> str:
        run = CliRunner().invoke(app, [*map(str, asked)])
        assert run.exit_code == 0, run.stderr
        return run.stdout

    one = tmp_path / "one.safetensors"
    assert "2 modules, relative error 0\n" in ldm("merge", one, *words)
    assert "\n" in ldm("merge", tmp_path / "tuned", *words, "--model", folder)
    before, after = (load_file(f / "unet" / WEIGHTS) for f in (folder, tmp_path / "tuned"))
    exact = {name: change(found) for name, found in lora.read(one)["unet"].items()}
    for key, value in after.items():
        expected = exact.get(key.removesuffix(".weight"))
        moved = value - before[key]
        if expected is None:
            assert not moved.any(), key
        else:
            assert (moved.flatten(1) - expected).norm() < 1e-5 * expected.norm()
    found, error = extracted(folder, tmp_path / "tuned", 6)
    assert error < 1e-6 and found["unet"].keys() == exact.keys()
    for name, expected in exact.items():
        assert (change(found["unet"][name]) - expected).norm() < 1e-5 * expected.norm()
    out = tmp_path / "out.safetensors"
    text = ldm("extract", out, "--base", folder, "--tuned", tmp_path / "tuned", "--rank", 2)
    error = float(text.split("relative error ")[1])
    kept = lora.read(out)["unet"]
    parts = [(change(kept[name]) - expected).square().sum() for name, expected in exact.items()]
    total = sum(float(expected.square().sum()) for expected in exact.values())
    assert error == pytest.approx((float(sum(parts)) / total) ** 0.5, rel=0.01) and error > 0.1
    same = Path(shutil.copytree(folder, tmp_path / "same"))
    with pytest.raises(ValueError, match="no layer of .+same differs from that of .+base"):
        extracted(folder, same, 2)
    save_file(before | {"conv_out.weight": torch.ones(4, 32, 1, 1)}, same / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match=r"conv_out.weight is .+: the two are of different shapes"):
        extracted(folder, same, 2)
    run = CliRunner().invoke(app, ["merge", str(one), *words])
    assert run.exit_code == 2 and "one.safetensors is there already" in run.stderr


def test_a_path_with_a_weight(tmp_path):
    (tmp_path / "a:2").touch()
    assert weighted("a.safetensors:0.8") == (Path("a.safetensors"), 0.8)
    assert weighted("c:/x.safetensors") == (Path("c:/x.safetensors"), 1.0)
    assert weighted(f"{tmp_path}/a:2") == (tmp_path / "a:2", 1.0)
