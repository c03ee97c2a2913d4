"""What does not fit into a device is refused before it begins, with the settings that would."""

import argparse
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.engine import memory
from ldm.errors import ConfigError, RunError
from ldm.tasks import fitting
from ldm.tasks.command import _bytes
from ldm.tasks.estimate import Step
from runs import tree

GPU = torch.device("cuda")
SIDE = 1000  # of a matrix of 4 MB


@pytest.fixture
def card(monkeypatch):
    """Lets the GPU have so many megabytes."""
    monkeypatch.setattr(memory, "named", lambda device: "NVIDIA X")

    def of(megabytes: float) -> None:
        monkeypatch.setattr(memory, "memory_of", lambda device: round(1e6 * megabytes))

    return of


def config(tmp_path, **changes) -> TrainConfig:
    return validate(TrainConfig, tree(tmp_path / "run", **changes))


def weights() -> dict[str, nn.Parameter]:
    return {"unet.w": nn.Parameter(torch.empty(SIDE, SIDE, device="meta"))}


@pytest.mark.parametrize(
    ("megabytes", "told"),
    [
        (20.1, None),  # weights 4, gradient 4, average 4, moments 8
        (19.9, "set ema.device=cpu ema.every=10;"),
        (15.9, "set ema.device=cpu ema.every=10 optimizer.kind=adamw8bit;"),  # 8 and 2.1
        (10.0, "set ema.device=cpu ema.every=10 optimizer.kind=adafactor;"),  # 8 and nearly 0
        (7.0, "train a LoRA (lora.rank=8), or in shards (FSDP);"),
    ],
)
def test_a_run_that_cannot_fit_is_refused(tmp_path, card, megabytes, told):
    card(megabytes)
    if told is None:
        return memory.refuse(config(tmp_path), weights(), {}, GPU)
    with pytest.raises(ConfigError) as refused:
        memory.refuse(config(tmp_path), weights(), {}, GPU)
    assert told in str(refused.value) and "NVIDIA X has" in str(refused.value)


def test_what_is_frozen_counts(tmp_path, card):
    card(20.1)
    frozen = {"vae.w": torch.empty(SIDE, SIDE, dtype=torch.bfloat16, device="meta")}
    with pytest.raises(ConfigError, match="average of this run are 0.0 GB"):
        memory.refuse(config(tmp_path), weights(), frozen, GPU)
    assert memory.held(config(tmp_path), weights(), 2_000_000) == 22_000_000
    lion = config(tmp_path, optimizer={"kind": "lion", "lr": 1e-4}, ema=None)
    assert memory.held(lion, weights(), 0) == 12_000_000


def test_a_cpu_is_not_asked(tmp_path):
    huge = {"unet.w": nn.Parameter(torch.empty(10**7, 10**7, device="meta"))}
    memory.refuse(config(tmp_path), huge, {}, torch.device("cpu"))


def test_a_full_device_is_told_in_one_line(card):
    line = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n a total capacity"
    with pytest.raises(RunError) as ended, memory.told(GPU, 8):
        raise torch.OutOfMemoryError(line)
    told = str(ended.value)
    assert told.startswith("the memory of NVIDIA X is full (CUDA out of memory): set micro_batch_")
    assert "\n" not in told and "below 8" in told
    with pytest.raises(KeyError), memory.told(GPU, 8):
        raise KeyError("something else")


class Task:
    """A square of one product."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def example(self, n: int) -> dict[str, Tensor]:
        return {"x": torch.empty(n, SIDE)}

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.network(batch["x"]).square().mean()}


def step(asked: TrainConfig) -> Step:
    """Of a network of which a LoRA is a hundredth, in a step of which ten images are a matrix."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(SIDE, SIDE // 100), nn.Linear(SIDE // 100, SIDE))
        if not asked.adds:
            network.append(nn.Linear(SIDE, SIDE))
    return Step({"unet": network}, Task(network), ("unet",))


def test_a_dry_run_tells_what_each_setting_saves(tmp_path):
    asked = config(tmp_path, batch_size=16)
    made = step(asked)
    cost = fitting.cost_of(asked, made)

    def lines(limit: float | None) -> list[tuple[str, str, str]]:
        return [*fitting.lines(asked, made, step, cost, limit and round(limit))]

    few = lines(None)  # of which none is traced
    assert [text for *_, text in few] == [
        "ema.device=cpu ema.every=10", "optimizer.kind=adamw8bit", "optimizer.kind=adafactor",
    ]  # fmt: skip
    saved = [
        cost.memory - fitting.with_state(cost, change(asked), made).memory
        for _, change, traced in fitting.choices(asked)
        if not traced
    ]
    assert saved[0] == cost.average == cost.learning
    assert 0.7 < saved[1] / cost.moments < 0.75 and saved[2] / cost.moments > 0.95
    every = lines(1e9)
    assert every[-1][0] == "it fits" and [line for line in every if line in few] == few
    assert {"gradient_checkpointing=true", "micro_batch_size=1", "lora.rank=8"} < {
        text for *_, text in every
    }
    # Parts of a batch save nothing here, where their gradients are more than what they keep.
    assert lines(0.85 * cost.memory)[-1][2].endswith("B: ema.device=cpu ema.every=10")
    name, _, text = lines(0.05 * cost.memory)[-1]
    assert name == "would fit"
    assert text.endswith("B: ema.device=cpu ema.every=10 optimizer.kind=adafactor lora.rank=8")
    assert lines(1000)[-1][0] == "does not fit"
    assert cost == replace(cost, host=0)


def test_sizes_as_people_write_them():
    assert [_bytes(text) for text in ("24GB", "24 GiB", "1.5TB", "800MiB")] == [
        24_000_000_000, 24 * 1024**3, 1_500_000_000_000, 800 * 1024**2,
    ]  # fmt: skip
    with pytest.raises(argparse.ArgumentTypeError, match="'24' is no size: write 24GB"):
        _bytes("24")
