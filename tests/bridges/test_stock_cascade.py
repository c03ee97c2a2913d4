"""A cascade draws what the stock pipelines of its stages draw by hand, in Python and on the command
line.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline
from PIL import Image
from typer.testing import CliRunner

import tiny_imagen
from ldm import Cascade, LatentDiffusionPipeline
from ldm.cli import app
from stock import quiet

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
# Of a table whose first level is no 20,000th of the signal, so that rounding stays what it is.
LINEAR = {"beta_schedule": "linear", "beta_end": 0.004}
CALL: dict[str, Any] = {"guidance": [4.0, 2.0], "steps": 3, "noise_level": 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    found = []
    for enlarges in (False, True):
        parts = tiny_imagen.components(enlarges=enlarges, seed=int(enlarges), **LINEAR)
        found.append(tmp_path_factory.mktemp("cascade") / str(enlarges))
        quiet(LatentDiffusionPipeline(**parts, vae=None)).save_pretrained(found[-1])
    return found


@pytest.fixture(scope="module")
def cascade(folders) -> Cascade:
    return quiet(Cascade.from_pretrained(*folders))


@pytest.fixture(scope="module")
def by_hand(folders) -> list[torch.Tensor]:
    """Two pictures of seeds 5 and 6, of both stages, by stock."""
    base = quiet(IFPipeline.from_pretrained(folders[0]))
    large = quiet(IFSuperResolutionPipeline.from_pretrained(folders[1]))
    draws = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    told: dict[str, Any] = {"generator": draws, "output_type": "pt", "num_inference_steps": 3}
    prompts = ["two dogs", "a red apple"]
    low = base(prompts, guidance_scale=4.0, **told).images
    whole = large(prompts, image=low, noise_level=40, guidance_scale=2.0, **told).images
    return [low, whole]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def test_the_stages_are_stock_s_by_hand(cascade, by_hand):
    prompts = ["two dogs", "a red apple"]
    found = cascade(prompts, seed=5, output_type="latent", intermediate=True, **CALL)
    assert by_hand[1].shape == (2, 3, 16, 16) and by_hand[1].std() > 0.1
    assert apart(found.images, by_hand[1]) <= 1e-5 and apart(found.stages[0], by_hand[0]) <= 1e-5
    # A picture of its own seeds, alone or in company.
    alone = cascade(prompts[1], seed=6, output_type="latent", **CALL)
    assert apart(alone.images, found.images[1:]) <= 1e-4 and alone.stages == []
    several = cascade("two dogs", seed=5, num_images_per_prompt=2, batch_size=1, intermediate=True,
                      **CALL)  # fmt: skip
    assert [image.size for image in several.images] == [(16, 16)] * 2
    assert [[image.size for image in stage] for stage in several.stages] == [
        [(8, 8)] * 2, [(16, 16)] * 2
    ]  # fmt: skip
    first = ((found.images[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255).round()
    assert np.abs(np.asarray(several.images[0]).astype(int) - first).max() <= 1
    wide = cascade("two dogs", seed=5, height=8, width=16, output_type="pt", **CALL)
    assert wide.images.shape == (1, 3, 16, 32)


def test_the_command_line_draws_the_same(folders, by_hand, tmp_path):
    out = tmp_path / "drawn"
    line = ["sample", "two dogs", "a red apple", "--model", folders[0], "--then", folders[1],
            "--guidance", 4, "--then-guidance", 2, "--noise-level", 40, "--steps", 3, "--seed", 5,
            "--sampler", "model", "--out", out, "--stages"]  # fmt: skip
    found = CliRunner().invoke(app, [str(part) for part in line])
    assert found.exit_code == 0, found.output
    files = sorted(file.name for file in out.glob("*.png"))
    assert files == ["0000-stage1.png", "0000.png", "0001-stage1.png", "0001.png"]
    for stage, suffix in zip(by_hand, ("-stage1", ""), strict=True):
        for n in range(2):
            true = ((stage[n].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255).round()
            drawn = np.asarray(Image.open(out / f"000{n}{suffix}.png").convert("RGB")).astype(int)
            assert np.abs(drawn - true).max() <= 1


def test_evaluate_measures_what_the_last_draws(folders, by_hand, tmp_path, monkeypatch):
    seen = list[Any]()
    monkeypatch.setattr("ldm.evaluation.report.show", lambda *told: seen.append(told[2]))
    (tmp_path / "two.txt").write_text("two dogs\na red apple\n")
    line = ["evaluate", folders[0], "--then", folders[1], "--suite", "prompts", "--steps", 3,
            "--guidance", 4, "--then-guidance", 2, "--sampler", "model", "--seed", 5, "--batch", 2,
            "--prompts", tmp_path, "--out", tmp_path]  # fmt: skip

    def measured(*more: str) -> list[Any]:
        found = CliRunner().invoke(app, [*map(str, line), *more])
        assert found.exit_code == 0, found.output
        return [(report.drawn, report.spent) for report in seen.pop()]

    (low, spent), (forty, _) = measured("--sweep", "noise-level=3,40")
    assert apart(forty, by_hand[1].clamp(-1, 1)) <= 1e-5 and apart(low, forty) > 0.01
    assert spent.evaluations == 2 * 2 * 3 * 2  # pictures, guided, in three steps, by both
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["model"] == "False > True"
    assert [told["drawing"]["noise_level"] for told in record["measured"]] == [3, 40]
    swept = measured("--noise-level", "40", "--sweep", "threshold=none,static,dynamic")
    bare, static, dynamic = (drawn for drawn, _ in swept)
    assert apart(static, bare) > 0.01 and apart(dynamic, bare) > 0.01
    plain = measured("--noise-level", "40", "--threshold", "dynamic")
    assert torch.equal(plain[0][0], dynamic)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise-level", "3"], "--noise-level is of --then, of which there is none"),
        (["--stages"], "--stages are those of --then"),
        (["--then", "LARGE", "--guidance-interval", "0,1"], "--guidance-interval is of one model"),
        (["--then", "LARGE", "--variation-seed", "1"], "--variation-seed is of one model"),
        (["--then", "LARGE", "--noise-level", "3", "--noise-level", "4"], "is given 2 times for 1"),
        (["--then", "BASE"], "stage 2 of the cascade enlarges no picture"),
        (["--then", "LARGE", "--noise-level", "1000"], "noise_level must be a whole number in 0"),
    ],
)
def test_what_is_refused_on_the_command_line(folders, tmp_path, options, message):
    named = {"BASE": str(folders[0]), "LARGE": str(folders[1])}
    line = ["sample", "two dogs", "--model", str(folders[0]), "--out", str(tmp_path / "x.png")]
    line += [named.get(option, option) for option in options] + ["--steps", "1"]
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 2 and message in " ".join(found.output.split())


def test_what_is_refused_in_python(cascade):
    with pytest.raises(ValueError, match="a cascade needs one stage at least"):
        Cascade([])
    with pytest.raises(ValueError, match="stage 1 of the cascade enlarges a picture, and there is"):
        Cascade(cascade.stages[1:])
    with pytest.raises(ValueError, match="guidance: 3 values for 2 stages: give one, or each"):
        cascade("two dogs", guidance=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="image: a cascade draws from noise: leave it out"):
        cascade("two dogs", image=torch.zeros(1, 3, 8, 8))
