"""Loss scaling, which float16 needs. A scale is a power of two, so that a float32 network trained
with one computes what it does without: what goes wrong then is the scaling's.
"""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.engine.nonfinite import Step
from ldm.engine.scaling import LossScale
from ldm.errors import RunError
from ldm.storage import checkpoint
from ldm.tasks import text_to_image
from runs import accelerator, tree

LARGEST = 65504.0  # of float16


class Float16(torch.amp.GradScaler):
    """A scaler of gradients that overflow where those of float16 do."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad[weight.grad.abs() > LARGEST] = float("inf")
        super().unscale_(optimizer)


def scaler(scale: float, interval: int = 2000) -> torch.amp.GradScaler:
    return Float16("cpu", init_scale=scale, growth_interval=interval)


@pytest.fixture(autouse=True)
def _kept(kept_cache):
    pass


def scaled(run: Path, scaler: torch.amp.GradScaler | None, **changes) -> Path:
    """A run with ``scaler`` in the place where accelerate has one for float16 on a GPU."""
    settings = dict(duration="4 steps", checkpoints={"every": "1 step", "keep": 9}, ema=None)
    processes: Accelerator = accelerator()
    processes.scaler = scaler
    text_to_image.train(validate(TrainConfig, tree(run, **(settings | changes))), processes)
    return run


def going_on(run: Path, images: int, scaler: torch.amp.GradScaler) -> Path:
    """A copy of ``run`` that goes on from its checkpoint after ``images``."""
    again = run.with_name("again")
    shutil.copytree(run, again)
    for folder in checkpoint.folders(again / "checkpoints"):
        if folder.name > checkpoint.name_of(images):
            shutil.rmtree(folder)
    return scaled(again, scaler)


def raw(run: Path, images: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / checkpoint.name_of(images) / "training"
    tensors = load_file(folder / "raw.safetensors") | {
        f"optimizer {name}": value
        for name, value in load_file(folder / "optimizer.safetensors").items()
    }
    return {
        name: hashlib.sha256(value.numpy().tobytes()).digest() for name, value in tensors.items()
    }


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in found]


def test_a_scale_changes_nothing_but_itself(tmp_path):
    plain = scaled(tmp_path / "plain", None, checkpoints={"every": "4 steps"})
    run = scaled(tmp_path / "scaled", scaler(2.0**10, interval=3), micro_batch_size=16)
    assert raw(run, 64) == raw(plain, 64)
    found = lines(run)
    assert [line.pop("overflows") for line in found] == [0] * 4
    assert [line.pop("loss_scale") for line in found] == [2.0**n for n in (10, 10, 11, 11)]
    assert found == lines(plain)  # the norm is that of the gradient itself, and so clipped
    # Two of three steps before it is doubled lie behind the checkpoint.
    again = going_on(run, 32, scaler(1.0, interval=9))
    assert raw(again, 64) == raw(run, 64) and lines(again) == lines(run)


def test_an_overflow_is_a_step_less_and_goes_on_bit_for_bit(tmp_path):
    run = scaled(tmp_path / "run", scaler(2.0**20))
    found = lines(run)
    overflows = [line["overflow"] for line in found if "overflow" in line]
    assert overflows == [{"loss_scale": 2.0 ** (20 - n), "overflows": n} for n in (1, 2)]
    assert not any("skipped" in line for line in found)
    assert found[-1]["overflows"] == 2 and found[-1]["gradient_norm"] < 10
    assert raw(run, 16) == raw(run, 32) != raw(run, 48)  # nothing learnt, no moment, no count
    folder = run / "checkpoints" / checkpoint.name_of(16) / "training"
    kept = json.loads((folder / "run.json").read_text())["scale"]
    assert (kept["scale"], kept["overflows"]) == (2.0**19, 1)
    again = going_on(run, 16, scaler(1024.0))  # as it begins, which the checkpoint's state replaces
    assert raw(again, 64) == raw(run, 64) and lines(again) == found


def ends(wrong: bool) -> SimpleNamespace:
    return SimpleNamespace(sync=lambda wrong: (False, wrong))


def step_of(loss: float) -> Step:
    step = Step(0)
    step.sums["loss"] = torch.tensor(loss)
    return step


@pytest.mark.parametrize(
    ("scale", "loss", "to_blame"),
    [(2.0, 0.5, True), (1.0, 0.5, False), (2.0**16, float("nan"), False)],
)
def test_what_is_not_the_scales_fault(scale, loss, to_blame):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    found = LossScale(scaler(scale), optimizer)
    found.scaler.scale(weight.sum()).backward()
    weight.grad.fill_(float("inf"))
    found.unscale()
    assert found.overflowed(step_of(loss), ends(False)) == to_blame
    assert found.overflows == to_blame
    assert found.scaler.get_scale() == scale / 2  # in any case, and the next step may begin
    optimizer.zero_grad()
    found.scaler.scale(weight.sum()).backward()
    found.unscale()
    assert weight.grad.tolist() == [1, 1]


def test_without_float16_there_is_none(tmp_path):
    none = LossScale(None, torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
    none.unscale()
    assert not none.overflowed(step_of(0.5), ends(False))
    assert (none.state(), none.told()) == (None, {})
    none.load({"scale": 2.0})  # of a run that was let go on in another precision
    new = LossScale(scaler(8.0), none.optimizer)
    new.load(None)
    assert new.told() == {"loss_scale": 8.0, "overflows": 0}


def test_a_loss_that_is_no_number_is_a_fault(tmp_path, monkeypatch):
    from ldm.encoding.dataset import ImageDraws

    real = ImageDraws.__getitems__

    def batch(self, positions):
        found = real(self, positions)
        found["noise"][[position == 20 for position in positions]] = float("nan")
        return found

    monkeypatch.setattr(ImageDraws, "__getitems__", batch)
    with pytest.raises(RunError, match=r"the loss of step 2 \(images 16 to 31\) is nan"):
        scaled(tmp_path / "run", scaler(2.0**10))
    skip = {"action": "skip", "at_most": 1}
    run = scaled(tmp_path / "skipping", scaler(2.0**10), nonfinite=skip, duration="3 steps")
    (told,) = [line["skipped"] for line in lines(run) if "skipped" in line]
    assert told["skipped_steps"] == 1 and lines(run)[-1]["overflows"] == 0
