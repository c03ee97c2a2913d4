"""Several averages in one run: each is what a run of its own would keep, and loss chooses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from launched import digests
from ldm.engine.ema import Average, Averages
from ldm.errors import CheckpointError, ConfigError
from runs import train

pytestmark = pytest.mark.usefixtures("kept_cache")

HALF_LIVES = ("1000 images", "64 images", "16 images")
SETTINGS = dict(
    duration="4 steps",
    optimizer={"lr": 3e-3},
    validation={"every": "2 steps", "images": 2, "levels": 3},
    data={"kind": "shapes", "count": 60, "size": 16},
)


def losses_of(run) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "held_out_loss" in line]


def test_each_is_that_of_a_run_of_its_own_and_the_best_is_the_model(tmp_path):
    train(tmp_path / "several", ema={"half_life": HALF_LIVES, "ramp": 0}, **SETTINGS)
    several = losses_of(tmp_path / "several")
    assert [line["images"] for line in several] == [32, 64]
    for half_life in HALF_LIVES:
        train(tmp_path / half_life, ema={"half_life": half_life, "ramp": 0}, **SETTINGS)
        number = half_life.split()[0]
        # Half-lives are whole batches, of 16 images.
        key = f"held_out_loss/ema_{1008 if number == '1000' else number}"
        alone = [line["held_out_loss"] for line in losses_of(tmp_path / half_life)]
        assert [line[key] for line in several] == alone
    for line in several:
        told = {k.removeprefix("held_out_loss/ema_"): v for k, v in line.items() if "/ema_" in k}
        assert len(told) == 3 and len(set(told.values())) == 3
        assert float(min(told, key=told.__getitem__)) == line["ema_half_life"]
    best = {"16": "16 images", "64": "64 images", "1008": "1000 images"}
    best = best[f"{several[-1]['ema_half_life']:.0f}"]
    assert best != HALF_LIVES[0]  # which is the model before any is measured
    several, alone = (tmp_path / run / "final" for run in ("several", best))
    assert digests(several, at_least=3) == digests(alone, at_least=3)


def test_a_run_that_goes_on_keeps_all_of_them(tmp_path):
    settings = SETTINGS | {"ema": {"half_life": HALF_LIVES, "ramp": 0}}
    train(tmp_path / "whole", **settings)
    train(tmp_path / "halves", **settings | {"duration": "3 steps"})
    train(tmp_path / "halves", **settings)
    last = "checkpoints/images-000000000064"
    for folder in ("final", last):
        whole = digests(tmp_path / "whole" / folder, at_least=3)
        assert digests(tmp_path / "halves" / folder, at_least=3) == whole
    assert sum("average-" in name for name in digests(tmp_path / "whole" / last)) == 2
    assert losses_of(tmp_path / "halves")[-1] == losses_of(tmp_path / "whole")[-1]


def test_several_need_held_out_pictures(tmp_path):
    with pytest.raises(ConfigError, match=r"ema\.half_life: held-out loss chooses among several"):
        train(tmp_path / "run", **SETTINGS | {"ema": {"half_life": HALF_LIVES}, "validation": None})


def test_what_chooses_is_part_of_the_run(tmp_path):
    settings = SETTINGS | {"ema": {"half_life": ["16 images", "64 images"]}, "duration": "2 steps"}
    train(tmp_path / "run", **settings)
    settings["validation"] = {**SETTINGS["validation"], "levels": 4}
    with pytest.raises(CheckpointError, match=r"ema\.chosen_by\.levels was 3 and is now 4"):
        train(tmp_path / "run", **settings | {"duration": "4 steps"})


def test_a_half_life_of_zero_can_be_chosen_and_kept():
    weights = {"w": torch.ones(1)}

    def fresh() -> Averages:
        return Averages({64: Average(weights), 0: Average(weights)}, ramp=0)

    averages = fresh()
    told = averages.choose(128, lambda a: 1.0 if a is averages.members[64] else 0.5)
    assert told == {"ema_half_life": 0, "held_out_loss/ema_64": 1, "held_out_loss/ema_0": 0.5}
    again = fresh()
    again.load(json.loads(json.dumps(averages.choice)), {"w": torch.zeros(1)}, {})
    assert (again.chosen, again.chosen_at) == (0, 128) and again.model is again.members[0]


def test_every_few_steps_is_the_decay_of_all_of_them():
    """Of weights that rest in between the average is the same; of a line it lags as it must."""
    weights = {"w": torch.zeros(1, dtype=torch.float64)}
    one, three = (
        Averages({96: Average(weights, device)}, 0.5, every)
        for device, every in ((None, 1), ("cpu", 3))
    )
    batch = 16
    for step in range(1, 13):
        if step % 3 == 1:
            weights["w"].fill_(float(step))
        for averages in (one, three):
            averages.update(batch, step * batch)
        if step % 3 == 0:
            means = [averages.model.mean["w"].item() for averages in (one, three)]
            assert means[0] == pytest.approx(means[1], rel=1e-12)
        else:
            assert three.model.mean["w"].item() != one.model.mean["w"].item()
    # From rest at 0 to 1 and on: 1 - mean is the product of all decays, 2^(-images / half-life).
    weights, far = {"w": torch.zeros(1, dtype=torch.float64)}, 160
    slow = Averages({far: Average(weights)}, 0, 5)
    weights["w"].fill_(1.0)
    for step in range(1, 11):
        slow.update(batch, step * batch)
    assert 1 - slow.model.mean["w"].item() == pytest.approx(0.5 ** (10 * batch / far), rel=1e-12)


def test_an_average_on_the_host_is_the_same_and_goes_on(tmp_path):
    settings = {"duration": "5 steps", "checkpoints": {"every": "1 step", "keep": 9}}
    here, host = ({"half_life": "64 images", "every": 2, "device": d} for d in (None, "cpu"))
    train(tmp_path / "here", **settings, ema=here)
    train(tmp_path / "host", **settings, ema=host)
    whole = digests(tmp_path / "here" / "final", at_least=3)
    assert digests(tmp_path / "host" / "final", at_least=3) == whole
    begun = "checkpoints/images-000000000048"  # between two updates
    shutil.copytree(tmp_path / "host" / begun, tmp_path / "halves" / begun)
    train(tmp_path / "halves", **settings, ema=host)
    assert digests(tmp_path / "halves" / "final", at_least=3) == whole
    raw, front = (
        load_file(tmp_path / "host" / f"checkpoints/images-{n:012d}" / file)
        for n, file in ((64, "unet/diffusion_pytorch_model.safetensors"),
                        (80, "unet/diffusion_pytorch_model.safetensors"))
    )  # fmt: skip
    assert all(torch.equal(raw[name], front[name]) for name in raw)  # step 5 made no average
