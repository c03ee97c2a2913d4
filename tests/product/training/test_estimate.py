"""What --dry-run says that a run will cost, against counting by hand and against a run."""

import re
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.config.loader import load, validate
from ldm.config.schema import TrainConfig
from ldm.tasks import costs
from ldm.tasks.costs import Rates, measure, most, seconds, size
from ldm.tasks.denoising import DenoisingTask
from ldm.tasks.estimate import Cost, Step, _Live, held, trace
from ldm.tasks.gpus import known
from ldm.tasks.text_to_image import step
from runs import ROOT, train, tree

TOWER = {
    "vocab_size": 600, "max_length": 16, "hidden_size": 32, "intermediate_size": 64,
    "layers": 2, "heads": 2,
}  # fmt: skip


def config(run: Path, **changes) -> TrainConfig:
    return validate(TrainConfig, tree(run, **changes))


class Alone:
    """A task of one network and its mean square."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        self.network, self.shape = network, shape

    def example(self, n: int) -> dict[str, Tensor]:
        return {"x": torch.empty(n, *self.shape)}

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.network(batch["x"]).square().mean()}


def alone(network: nn.Module, *shape: int, config: TrainConfig, micro: int = 8, parts: int = 1):
    task = Alone(network, shape)
    return trace(config, Step({"net": network}, task, ("net",)), micro, parts)


def test_a_convolution_and_a_product_by_hand(tmp_path):
    with torch.device("meta"):
        convolution, product = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 32)
    cost = alone(convolution, 3, 10, 10, config=config(tmp_path))
    once = 2 * 8 * 100 * 8 * 27  # 2 x images x pixels x outputs x inputs of each
    assert (cost.convolution, cost.product) == (2 * once, 0)  # forward, gradient of the weight
    weights = 4 * (8 * 27 + 8)
    assert (cost.learning, cost.frozen, cost.average) == (weights, 0, weights)
    assert (cost.moments, cost.checkpoint) == (2 * weights, 4 * weights)
    pictures, out = 4 * 8 * 3 * 100, 4 * 8 * 8 * 100
    # At its peak: pictures, output, the gradient of its square, and what that is made from.
    assert pictures + 2 * out <= cost.working <= pictures + 5 * out + 2 * weights
    cost = alone(product, 16, config=config(tmp_path, ema=None))
    assert (cost.convolution, cost.product, cost.average) == (0, 2 * 2 * 8 * 16 * 32, 0)
    assert cost.memory == cost.learning * 3 + cost.working


def test_asking_a_tensor_for_its_device_moves_no_bytes():
    with FakeTensorMode(), _Live(set()) as live:
        x = torch.empty(1000)
        made = live.traffic
        y = torch.ops.aten.add.Tensor(x, x)
        assert live.traffic - made == 3 * 4000
        for _ in range(5):
            torch.ops.prim.device.default(y)
        assert live.traffic - made == 3 * 4000


def test_all_but_matrix_work_moves_float32_and_every_operation_takes_a_moment():
    with FakeTensorMode(), _Live(set()) as live:
        x = torch.empty(10, 10, dtype=torch.bfloat16)
        made, begun = live.traffic, live.operations
        torch.ops.aten.mm(x, x)
        torch.ops.aten.t(x)
        assert live.traffic == made and live.operations == begun + 2
        torch.ops.aten.mul.Tensor(x, x)
        assert live.traffic - made == 3 * 400 and live.operations == begun + 3
    zeros = dict.fromkeys([field.name for field in fields(Cost)], 0)
    cost = Cost(**zeros | dict(convolution=6, product=8, traffic=100, operations=10**6))
    assert seconds(cost, Rates(2.0, 4.0, 22.0, "")) == pytest.approx(3 + 2 + 10 + 10)


def test_a_gpu_is_known_by_its_name_and_cannot_exceed_its_data_sheet():
    assert known("NVIDIA GeForce RTX-4090") is known("rtx4090") and known("a100 80gb").memory == 80
    with pytest.raises(ValueError, match="'A101' is none of T4, A10, .*: give --memory"):
        known("A101")
    zeros = dict.fromkeys([field.name for field in fields(Cost)], 0)
    cost = Cost(**zeros | dict(convolution=10**12, product=3 * 10**12))
    told = {
        (name, asked): most(asked, cost, 8, known(name))[1]
        for name in ("T4", "A100")
        for asked in ("auto", "bfloat16", "float16", "tf32", "float32")
    }
    assert told == {  # 8 images of 0.5 TFLOP each
        ("T4", "auto"): "16.2 images/s",
        ("T4", "bfloat16"): "16.2 images/s",
        ("T4", "float16"): "130 images/s",
        ("T4", "tf32"): "16.2 images/s",
        ("T4", "float32"): "16.2 images/s",
        ("A100", "auto"): "624 images/s",
        ("A100", "bfloat16"): "624 images/s",
        ("A100", "float16"): "624 images/s",
        ("A100", "tf32"): "312 images/s",
        ("A100", "float32"): "39 images/s",
    }


def test_accumulation_repeats_the_work_and_keeps_the_gradients(tmp_path):
    def deep():
        with torch.device("meta"):
            return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))

    one, two, six = (alone(deep(), 64, config=config(tmp_path), parts=n) for n in (1, 2, 6))
    apart = held(config(tmp_path), Step({"net": deep()}, Alone(deep(), (64,)), ("net",))).traffic
    # Each of 12 parameters has a gradient of before to meet: two read, one written.
    added = 2 * (one.traffic - apart + 3 * one.learning)
    assert two.traffic - apart == added and two.operations == 2 * one.operations
    assert six.traffic - apart == 3 * added
    assert (two.product, six.product) == (2 * one.product, 6 * one.product)
    assert six.working == two.working > one.working  # the second begins with gradients
    assert two.working - one.working <= one.learning
    assert alone(deep(), 64, config=config(tmp_path), micro=800).working > 50 * one.working / 100


@pytest.mark.slow  # test_light_weights and test_frozen_dtype trace it too
def test_half_precision_keeps_less(tmp_path):
    def working(precision: str) -> int:
        settings = config(tmp_path, precision=precision, batch_size=64)
        return trace(settings, step(settings), 64, 1).working

    assert 0.4 < working("bfloat16") / working("float32") < 0.9


def test_frozen_networks_cost_what_is_not_cached(tmp_path):
    flops = {}
    for latents, text in ((True, True), (True, False), (False, True)):
        settings = config(tmp_path, cache_latents=latents, cache_text=text)
        cost = trace(settings, step(settings), 4, 1)
        flops[latents, text] = cost.convolution, cost.product
    assert flops[False, True][0] > flops[True, True][0]
    assert flops[True, False][1] > flops[True, True][1]
    assert flops[True, False][0] == flops[True, True][0]  # a text encoder has no convolutions
    learns = config(tmp_path, train=["unet", "text_encoder"])
    assert trace(learns, step(learns), 4, 1).product > flops[True, False][1]  # and backwards


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_latents": False, "cache_text": False},
        {"family": "sdxl", "text": [TOWER, TOWER | {"projection": 8}], "text_dropout": [0.3, 0.3]},
        {"vae": "pixels", "text": None, "condition": {"classes": ["red", "blue"]}},
    ],
    ids=["cached", "straight", "two towers", "classes"],
)
def test_what_is_traced_has_the_shapes_of_a_batch(tmp_path, monkeypatch, own_cache, changes):
    """Or the cost would be that of something else."""
    seen, forward = [], DenoisingTask.forward
    monkeypatch.setattr(
        DenoisingTask, "forward", lambda task, batch: (seen.append(batch), forward(task, batch))[1]
    )
    if "condition" in changes:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for n in range(40):
            Image.new("RGB", (16, 16), (6 * n, 0, 0)).save(folder / f"{n}.png")
            (folder / f"{n}.txt").write_text(("red", "blue")[n % 2])
        changes = changes | {"data": {"path": str(folder)}}
    changes = {"duration": "1 step", "batch_size": 4} | changes
    train(tmp_path / "run", **changes)
    settings = config(tmp_path / "other", **changes)
    task = step(settings).task
    with torch.device("meta"):
        example = task.example(4)

    def shapes(batch):
        return {name: (tuple(x.shape), x.dtype) for name, x in batch.items()}

    assert shapes(example) == shapes(seen[0])


def test_what_learns_is_what_the_config_says(tmp_path):
    def cost(how=lambda *step: trace(*step, 64, 1), **changes):
        settings = config(tmp_path, batch_size=64, **changes)
        return how(settings, step(settings))

    deep = {"block_out_channels": [16, 32]}  # or checkpoints would be most of what is kept
    whole = cost(train=["unet", "text_encoder"], unet=deep)
    word = {"token": "<x>", "initializer": "a", "vectors": 3}
    assert cost(held, textual_inversion=word).learning == 3 * 32 * 4
    part = cost(held, train=["unet.*attn2*"], unet=deep)
    assert 0 < part.learning < whole.learning
    assert part.frozen + part.learning == whole.frozen + whole.learning
    less = cost(train=["unet", "text_encoder"], unet=deep, gradient_checkpointing=True)
    assert less.learning == whole.learning and less.working < 0.7 * whole.working
    # The forward pass is done twice.
    assert less.product > whole.product and less.convolution > whole.convolution


@pytest.mark.parametrize(("lora", "header"), [(None, 0.2), ({"rank": 2}, 0.6)])
def test_checkpoints_and_cache_are_as_large_as_told(tmp_path, monkeypatch, lora, header):
    """But for the headers of their files, a large part of small ones."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    # Of 600 tokens the captions of shapes leave fewer: as many as there are.
    changes = dict(lora=lora, text={"vocab_size": 514}, duration="1 step")
    train(tmp_path / "run", **changes)
    settings = config(tmp_path / "run", **changes)
    made = step(settings)
    cost = held(settings, made)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 1 - header < cost.checkpoint / weights(folder) <= 1
    from ldm.tasks.program import collect

    collection = collect(settings)
    pictures, captions = made.cached
    entries = 2 * len(collection.train), len(collection.captions())  # 2: flips
    told = pictures * entries[0] + captions * entries[1]
    assert 0.75 < told / weights(tmp_path / "cache") <= 1


def weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_rates_are_known_within_a_second():
    begin = time.perf_counter()
    rates = measure("float32")
    assert time.perf_counter() - begin < 5  # on a machine that is busy
    assert min(rates.convolution, rates.product, rates.elementwise) > 1e6


def test_time_follows_the_work(tmp_path):
    settings = config(tmp_path)
    rates = measure("float32")
    few, many = (trace(settings, step(settings), 16, parts) for parts in (1, 8))
    # Each part adds its gradient to that of those before.
    assert 6 < seconds(many, rates) / seconds(few, rates) < 8.5


LINES = re.compile(r"^ *(memory|disk|arithmetic|speed|time): ", re.MULTILINE)


@pytest.mark.parametrize("there", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_printed(tmp_path, monkeypatch, capsys, there):
    import sys

    import yaml

    from ldm.engine.signals import REQUESTS
    from runs import program

    settings = tree(tmp_path / "run")
    if not there:
        settings["data"] = {"path": str(tmp_path / "none")}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(costs, "_PROBE", 0.01)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    memory = ["--gpu", "a100"] if there else ["--memory", "1TB"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file), "--dry-run", *memory])
    try:
        program("train").main()
    finally:
        REQUESTS.rest()
    printed = capsys.readouterr().out
    every = ["memory", "disk", "arithmetic", "speed", "time"]
    assert LINES.findall(printed) == (every if there else every[:-1])
    assert "nan" not in printed and "inf" not in printed
    assert ("of 1 TB" in printed) is not there and "with: " in printed
    assert ("it fits" in printed and "of 40 GB" in printed and "at most: " in printed) is there


@pytest.mark.slow
def test_stable_diffusion_1():
    """U-Net 803 GFLOP forward and three times that with its gradient, VAE 1,117, CLIP 13."""
    begin = time.perf_counter()
    file = ROOT / "configs" / "stable_diffusion_1.yaml"
    whole = ["batch_size=8", "micro_batch_size=8", "precision=float32"]
    settings = load(TrainConfig, file, whole)
    cost = trace(settings, step(settings), 8, 1)
    image = (cost.convolution + cost.product) / 8e9
    assert abs(image / (3 * 803 + 1117 + 13) - 1) < 0.03
    assert cost.learning == 4 * 859_520_964
    assert time.perf_counter() - begin < 60


def test_sizes():
    assert [size(n) for n in (0, 999, 1000, 1_500_000, 27.3e9, 2e12)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "1.5 MB",
        "27.3 GB",
        "2 TB",
    ]
