"""The pieces of a run: its learning rate, average, checkpoints, optimiser and random init."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.config.loader import validate
from ldm.config.schema import Optimizer, RunConfig, TrainConfig, VaeShape
from ldm.data.collection import Collection
from ldm.data.images import ImageTransform
from ldm.demo.shapes import ShapesData
from ldm.engine import state
from ldm.engine.batch import split_batch
from ldm.engine.ema import Average, decay
from ldm.engine.optimizer import learning_rate
from ldm.engine.sampler_state import Memory
from ldm.engine.trainer import Trainer
from ldm.families.build import build
from ldm.families.networks import initialised
from ldm.families.vae import make_vae
from ldm.storage import checkpoint
from runs import accelerator, train, tree

# -- learning rate --

TOTAL, WARMUP, BATCH = 100_000, 2_000, 50


def rates(config: Optimizer) -> list[float]:
    """Learning rate of every batch of a run."""
    return [learning_rate(config, seen, WARMUP, TOTAL) for seen in range(0, TOTAL, BATCH)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    config = Optimizer(lr=2e-3, schedule="cosine", final=0.1)
    for seen in range(0, WARMUP, BATCH):
        expected = 2e-3 * (seen + 1) / (WARMUP + 1)
        assert learning_rate(config, seen, WARMUP, TOTAL) == pytest.approx(expected, rel=1e-12)
    assert 0 < learning_rate(config, 0, WARMUP, TOTAL) < 2e-6
    assert learning_rate(config, WARMUP, WARMUP, TOTAL) == 2e-3
    assert learning_rate(config, 0, 0, TOTAL) == 2e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedules_fall_from_the_peak_to_the_end(schedule, final):
    config = Optimizer(lr=2e-3, schedule=schedule, final=final)
    middle, end = WARMUP + (TOTAL - WARMUP) // 2, TOTAL
    at = {seen: learning_rate(config, seen, WARMUP, TOTAL) for seen in (WARMUP, middle, end)}
    assert at[WARMUP] == 2e-3
    assert at[middle] == pytest.approx(2e-3 * (1 + final) / 2, rel=1e-12)
    assert at[end] == pytest.approx(2e-3 * final, abs=1e-18)
    falling = rates(config)[WARMUP // BATCH :]
    assert all(a > b for a, b in zip(falling, falling[1:], strict=False))


def test_a_cooldown_falls_at_the_end_alone():
    config = Optimizer(lr=2e-3, schedule="linear", final=0.1, cooldown="10k images")
    found = {
        seen: learning_rate(config, seen, WARMUP, TOTAL, 10_000)
        for seen in (0, WARMUP, 90_000, 95_000, TOTAL)
    }
    assert found[0] == 2e-3 / (WARMUP + 1) and found[WARMUP] == found[90_000] == 2e-3
    assert found[95_000] == pytest.approx(2e-3 * 0.55) and found[TOTAL] == pytest.approx(2e-4)
    # Of a run that is shorter than that, all but the warmup.
    plain = Optimizer(lr=2e-3, schedule="linear", final=0.1)
    assert learning_rate(config, 5_000, WARMUP, 9_000, 10_000) == learning_rate(
        plain, 5_000, WARMUP, 9_000
    )
    with pytest.raises(ValueError, match=r"optimizer\.cooldown: a constant schedule"):
        Optimizer(cooldown="10k images")


def test_a_quarter_of_the_way_tells_linear_from_cosine():
    quarter = WARMUP + (TOTAL - WARMUP) // 4
    found = {
        schedule: learning_rate(Optimizer(lr=1.0, schedule=schedule), quarter, WARMUP, TOTAL)
        for schedule in ("constant", "linear", "cosine")
    }
    assert found["constant"] == 1.0
    assert found["linear"] == pytest.approx(0.75, rel=1e-12)
    assert found["cosine"] == pytest.approx((1 + math.cos(math.pi / 4)) / 2, rel=1e-12)


# -- average --


@pytest.mark.parametrize("batch", [1, 10, 250])
def test_an_old_value_weighs_half_after_the_half_life(batch):
    weight = torch.ones(1, dtype=torch.float64)
    average = Average({"w": weight})
    weight.zero_()  # from now on: what is left of the average is the weight of the old value
    for seen in range(batch, 1001, batch):
        average.update(decay(batch, seen, half_life=1000, ramp=0))
        expected = 0.5 ** (seen / 1000)
        assert float(average.mean["w"]) == pytest.approx(expected, rel=1e-12)
    assert float(average.mean["w"]) == pytest.approx(0.5, rel=1e-12)


def test_ramp_limits_the_half_life_to_a_share_of_what_was_seen():
    assert decay(10, 100, half_life=1000, ramp=0.05) == 0.5 ** (10 / 5)
    assert decay(10, 20_000, half_life=1000, ramp=0.05) == 0.5 ** (10 / 1000)
    assert decay(10, 100_000, half_life=1000, ramp=0.05) == 0.5 ** (10 / 1000)
    # On the ramp the random init is forgotten by a power law, whatever the half-life: after n
    # batches it weighs 0.5 ** (H_n / ramp), H_n the n-th harmonic number.
    left = math.prod(decay(10, 10 * n, half_life=1e9, ramp=0.05) for n in range(1, 101))
    harmonic = sum(1 / n for n in range(1, 101))
    assert left == pytest.approx(0.5 ** (harmonic / 0.05), rel=1e-9) and left < 1e-31
    assert decay(10, 100, half_life=0, ramp=0) == 0


def test_update_is_the_mean_it_says():
    torch.manual_seed(1)
    weights = {"a": torch.randn(4, 3), "b": torch.randn(2)}
    average = Average(weights)
    expected = {name: value.double() for name, value in weights.items()}
    for factor in (0.9, 0.5, 0.0, 0.99):
        for name, value in weights.items():
            value.add_(torch.randn_like(value))
            expected[name] = factor * expected[name] + (1 - factor) * value.double()
        average.update(factor)
        for name in weights:
            torch.testing.assert_close(average.mean[name].double(), expected[name])
    assert not torch.equal(average.mean["a"], weights["a"])


def bits(weights) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in weights.items()}


def test_in_front_brings_the_weights_back_bit_for_bit():
    torch.manual_seed(1)
    layer = nn.Linear(5, 3)
    weights = dict(layer.named_parameters())
    with torch.no_grad():
        layer.bias[0], layer.bias[1] = -0.0, 1e-42  # what arithmetic would not bring back
    average = Average(weights)
    with torch.no_grad():
        average.mean["weight"].add_(1)
    before, mean = bits(weights), bits(average.mean)
    with average.in_front():
        assert bits(weights) == mean
        with torch.no_grad():
            layer.weight.zero_()  # even if somebody writes into them meanwhile
    assert bits(weights) == before
    with pytest.raises(KeyboardInterrupt), average.in_front():
        raise KeyboardInterrupt
    assert bits(weights) == before
    assert bits(average.mean) == mean
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


# -- checkpoints --


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(text: str):
    def into(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_bytes(text.encode() * 100)
        (folder / "index.json").write_text(json.dumps(text))

    return into


def test_a_folder_is_written_whole_with_its_hashes(tmp_path):
    folder = tmp_path / "deep" / checkpoint.name_of(32)
    checkpoint.write_folder(folder, write("a"))
    assert folder.name == "images-000000000032"
    assert checkpoint.problem(folder) is None
    listed = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert listed == {
        "unet/weights": hashlib.sha256(b"a" * 100).hexdigest(),
        "index.json": hashlib.sha256(b'"a"').hexdigest(),
    }
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    folder = tmp_path / "final"
    checkpoint.write_folder(folder, write("a"))
    before = content(folder)

    def fails(staging: Path) -> None:
        write("b")(staging)
        raise error

    with pytest.raises(type(error)):
        checkpoint.write_folder(folder, fails)
    assert content(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    with pytest.raises(type(error)):
        checkpoint.write_folder(tmp_path / "other", fails)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_second_write_replaces_all_of_the_first(tmp_path):
    folder = tmp_path / "final"
    checkpoint.write_folder(folder, write("a"))
    checkpoint.write_folder(folder, lambda staging: (staging / "only").write_text("x") and None)
    assert set(content(folder)) == {"only", "manifest.json"}


def test_any_flipped_byte_is_found(tmp_path):
    folder = tmp_path / "a"
    checkpoint.write_folder(folder, write("a"))
    for file in ("unet/weights", "index.json", "manifest.json"):
        data = (folder / file).read_bytes()
        for place in range(len(data)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            (folder / file).write_bytes(flipped)
            assert checkpoint.problem(folder) is not None, (file, place)
        (folder / file).write_bytes(data)
    assert checkpoint.problem(folder) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 3}', '{"sha256": [1]}', "{"])
def test_a_manifest_that_is_none(tmp_path, text):
    folder = tmp_path / "a"
    checkpoint.write_folder(folder, write("a"))
    (folder / "manifest.json").write_text(text)
    assert checkpoint.problem(folder) == "its manifest cannot be read"


def test_problems_are_named(tmp_path):
    folder = tmp_path / "a"
    checkpoint.write_folder(folder, write("a"))
    (folder / "unet" / "weights").write_bytes(b"a" * 99)
    assert checkpoint.problem(folder) == (
        "unet/weights is not what was written (its SHA-256 differs)"
    )
    (folder / "unet" / "weights").unlink()
    assert checkpoint.problem(folder) == "unet/weights is missing"
    (folder / "manifest.json").unlink()
    assert checkpoint.problem(folder) == "it has no manifest"


def numbers(root: Path) -> list[int]:
    return [int(folder.name.removeprefix("images-")) for folder in checkpoint.folders(root)]


def save(root: Path, *images: int) -> None:
    for number in images:
        checkpoint.write_folder(root / checkpoint.name_of(number), write(str(number)))


@pytest.mark.parametrize("keep, left", [(1, [1000]), (3, [90, 200, 1000]), (9, [8, 90, 200, 1000])])
def test_rotate_keeps_the_newest(tmp_path, keep, left):
    save(tmp_path, 8, 1000, 90, 200)
    (tmp_path / ".staging-images-7").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoint.rotate(tmp_path, keep, images=1000)
    assert numbers(tmp_path) == left
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("images-")} == {"notes"}
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == checkpoint.name_of(1000)


def test_rotate_keeps_whole_ones_before_a_broken_one_ahead(tmp_path):
    # A run that found checkpoint 300 broken went on from 200 and has now reached 250.
    save(tmp_path, 200, 300)
    (tmp_path / checkpoint.name_of(300) / "index.json").unlink()
    save(tmp_path, 250)
    checkpoint.rotate(tmp_path, 1, images=250)
    assert numbers(tmp_path) == [250]


def test_newest_passes_over_broken_ones_and_says_so(tmp_path, caplog):
    save(tmp_path, 8, 16, 24)
    (tmp_path / checkpoint.name_of(24) / "manifest.json").unlink()
    (tmp_path / checkpoint.name_of(16) / "unet" / "weights").write_bytes(b"16" * 99)
    assert checkpoint.newest(tmp_path) == tmp_path / checkpoint.name_of(8)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "images-000000000024 is passed over: it has no manifest" in told[0]
    assert "images-000000000016 is passed over: unet/weights is not what was written" in told[1]
    assert checkpoint.newest(tmp_path / "none") is None


# -- optimiser and batch --


def test_weight_decay_only_on_matrices(tmp_path):
    class Task(nn.Module):
        origin: dict[str, str] = {}
        memory = Memory()

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(3, 3))

        def trained(self):
            return dict(self.named_parameters())

    task = Task()
    config = RunConfig(
        run=str(tmp_path),
        data=(),
        duration="1 step",
        optimizer=Optimizer(lr=0.5, weight_decay=0.25),
    )
    collection = Collection(ShapesData(count=2), ImageTransform())
    trainer = Trainer(config, task, [], collection, accelerator())
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    for name, parameter in task.named_parameters():
        matrix = name in ("net.0.weight", "net.2.weight")
        assert matrix == (parameter.ndim >= 2)
        # AdamW without gradient: w - lr * decay * w, and nothing for vectors.
        expected = before[name] * (1 - 0.5 * 0.25 if matrix else 1)
        assert torch.equal(parameter, expected), name
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 6


@pytest.mark.parametrize("kernel", ["fused", "capturable", "neither"])
def test_state_is_read_to_where_the_optimiser_wants_it(tmp_path, kernel):
    """As ``torch.optim.AdamW`` makes it. The meta device stands for a GPU: on one a fused kernel
    reads the count of steps, and refuses one on the CPU (pytorch#104767).
    """
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    state.write(tmp_path / "training", state.collect({"w": weight}, {"w": weight}, optimizer), {
        "images": 8, "window": {}, "identity": {},
    })  # fmt: skip
    there = nn.Parameter(torch.empty(3, 2, device="meta"))
    going_on = torch.optim.AdamW([{"params": [there], "weight_decay": 0.0}])
    if kernel != "neither":
        going_on.param_groups[0][kernel] = True
    state.read(tmp_path / "training", {"w": there}, going_on)
    found = {name: value.device.type for name, value in going_on.state[there].items()}
    step = "cpu" if kernel == "neither" else "meta"
    assert found == {"exp_avg": "meta", "exp_avg_sq": "meta", "step": step}
    here = nn.Parameter(torch.zeros(3, 2))
    fused = torch.optim.AdamW([here], fused=True)
    state.read(tmp_path / "training", {"w": here}, fused)
    assert float(fused.state[here]["step"]) == 1 and fused.state[here]["step"].device.type == "cpu"
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(fused.state[here][name], optimizer.state[weight][name])


@pytest.mark.parametrize(
    "batch, micro, world, expected",
    [(64, None, 1, (64, 64)), (64, 8, 1, (64, 8)), (64, 8, 4, (16, 8)), (64, 32, 4, (16, 16))],
)
def test_split_batch(batch, micro, world, expected):
    config = RunConfig(
        run="r", data=(), duration="1 step", batch_size=batch, micro_batch_size=micro
    )
    assert split_batch(config, world) == expected


def test_micro_batches_add_up_to_the_gradient_of_the_batch(tmp_path, monkeypatch):
    # The norm, not only the loss: AdamW would hide a gradient that is too long everywhere.
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    found = {}
    for micro in (None, 4):
        run = tmp_path / str(micro)
        train(run, duration="3 steps", micro_batch_size=micro)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[micro] = [[line["loss"], line["gradient_norm"]] for line in lines]
    whole, parts = torch.tensor(found[None]), torch.tensor(found[4])
    assert whole.shape == (3, 2) and (whole > 0).all()
    assert ((parts - whole) / whole).abs().max() < 1e-5


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_what_a_task_returns_is_logged_as_means(tmp_path, monkeypatch, weighting):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    found = {}
    for every in (1, 2):
        run = tmp_path / str(every)
        train(run, duration="4 steps", log_every=every, objective={"weighting": weighting})
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        # Their own mean in float32 would be off by a rounding that is larger than the bound.
        pairs = [[line["loss"], line["mse"]] for line in lines]
        found[every] = torch.tensor(pairs, dtype=torch.float64)
    assert (found[2] - found[1].reshape(2, 2, 2).mean(1)).abs().max() < 1e-7
    same = found[1][:, 0] == found[1][:, 1]
    assert same.all() if weighting == "uniform" else not same.any()


# -- random init --


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return ["a red circle", "a blue square"]


def build_with(captions, **changes):
    return build(validate(TrainConfig, tree(Path("r"), **changes)), captions)


def weights(module: nn.Module) -> dict[str, bytes]:
    return bits(module.state_dict())


def test_every_part_has_its_own_seed(captions):
    base = build_with(captions)
    parts = ("vae", "text_encoder", "unet")
    others = {
        "vae": build_with(captions, vae={"block_out_channels": [16, 16]}),
        "text_encoder": build_with(captions, text={"layers": 2}),
        "unet": build_with(captions, unet={"block_out_channels": [32, 32]}),
    }
    for changed, other in others.items():
        for part in parts:
            same = weights(base.networks[part]) == weights(other.networks[part])
            assert same == (part != changed), (changed, part)
    seeded = build_with(captions, seed=4)
    for part in parts:
        assert weights(base.networks[part]) != weights(seeded.networks[part])
    again = build_with(captions)
    for part in parts:
        assert weights(base.networks[part]) == weights(again.networks[part])


def test_building_neither_reads_nor_moves_the_global_generator(captions):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = build_with(captions)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    torch.rand(7)
    second = build_with(captions)
    for part in ("vae", "text_encoder", "unet"):
        assert weights(first.networks[part]) == weights(second.networks[part])


def test_components_and_seeds_draw_different_numbers():
    drawn = []
    for seed, component in ((1, "unet"), (1, "vae"), (2, "unet"), (1, "unet")):
        with initialised(seed, component):
            drawn.append(torch.randn(4).tolist())
    assert drawn[0] == drawn[3]
    assert len({tuple(numbers) for numbers in drawn}) == 3


def test_initialised_gives_the_generator_back_on_errors():
    state = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError), initialised(1, "x"):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.random.get_rng_state(), state)


def test_meta_parts_have_the_shapes_of_the_real_ones(captions):
    shape = VaeShape(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
    real, meta = make_vae(shape, 0), make_vae(shape, 0, meta=True)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    expected = {name: p.shape for name, p in real.named_parameters()}
    assert {name: p.shape for name, p in meta.named_parameters()} == expected
