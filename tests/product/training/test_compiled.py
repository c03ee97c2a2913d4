"""Blocks that are compiled in place change nothing but time: losses, names, files."""

import json

import pytest
import torch
from torch import nn

from launched import digests
from ldm.models import compiled
from runs import train

pytestmark = pytest.mark.usefixtures("kept_cache")


def losses(run) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + [
        line["held_out_loss"] for line in lines if "held_out_loss" in line
    ]


@pytest.mark.parametrize(
    "lora",
    [pytest.param(None, id="full"), pytest.param({"rank": 2}, id="lora", marks=pytest.mark.slow)],
)
def test_a_compiled_run_is_the_same_run(tmp_path, monkeypatch, traced, lora):
    stance = []
    real = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda s: (stance.append(s), real(s))[1])
    settings = {
        "duration": "2 steps", "lora": lora, "validation": {"images": 2, "levels": 2},
        "checkpoints": {"every": "1 step", "keep": 9}, "gradient_checkpointing": lora is not None,
    }  # fmt: skip
    for way in ("off", "blocks"):
        train(tmp_path / way / "run", **settings, compile=way)
        assert bool(traced) == bool(stance) == (way == "blocks")
    found = [tmp_path / way / "run" for way in ("off", "blocks")]
    assert losses(found[0]) == losses(found[1]) and len(losses(found[0])) == 3
    for folder in ("final", "checkpoints/images-000000000016"):  # written beside the second step
        one, other = (digests(run / folder, at_least=1) for run in found)
        assert one == other


def test_auto_compiles_long_runs_on_a_gpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiled.chosen("auto", gpu, compiled.WORTH, shapes=False)
    assert not compiled.chosen("auto", gpu, compiled.WORTH - 1, shapes=False)
    assert not compiled.chosen("auto", gpu, compiled.WORTH, shapes=True)
    assert not compiled.chosen("auto", cpu, 10**9, shapes=False)
    assert compiled.chosen("blocks", cpu, 1, shapes=True)
    assert not compiled.chosen("off", gpu, 10**9, shapes=False)


def test_kernels_lie_channels_last_where_the_optimiser_leaves_them():
    def last(kind: str) -> bool:
        network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(2, 2))
        compiled.channels_last(network, kind)
        return network[0].weight.is_contiguous(memory_format=torch.channels_last)

    assert [last(kind) for kind in ("adamw", "lion", "adafactor", "muon", "adamw8bit")] == [
        True, True, False, False, False,
    ]  # fmt: skip
