"""Optimisers besides AdamW: what each keeps is counted, saved by name, given back to the bit."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launched import digests
from ldm.config.loader import validate
from ldm.config.optimizer import Optimizer, require
from ldm.config.schema import TrainConfig
from ldm.engine import state
from ldm.engine.optimizer import optimizer_of, set_rate
from ldm.engine.optimizer_state import kept, size
from ldm.errors import CheckpointError, ConfigError
from ldm.tasks.estimate import held
from ldm.tasks.text_to_image import step
from runs import train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")

HERE = {"adafactor": "torch", "muon": "torch", "lion": "lion_pytorch", "prodigy": "prodigyopt"}
SETTINGS = {"train": ["unet.mid*"], "ema": None, "checkpoints": {"every": "1 step", "keep": 9}}


@pytest.mark.parametrize("kind", HERE)
def test_a_run_that_goes_on_ends_in_the_same_bits(tmp_path, kind):
    pytest.importorskip(HERE[kind])
    settings = SETTINGS | {"optimizer": {"kind": kind, "warmup": "1 step"}, "duration": "4 steps"}
    train(tmp_path / "whole", **settings)
    begun = "checkpoints/images-000000000032"
    shutil.copytree(tmp_path / "whole" / begun, tmp_path / "halves" / begun)
    train(tmp_path / "halves", **settings)
    last = "checkpoints/images-000000000064"
    whole = digests(tmp_path / "whole" / last, at_least=3)
    assert digests(tmp_path / "halves" / last, at_least=3) == whole
    first, moments = (
        load_file(
            tmp_path / "whole" / f"checkpoints/images-{n:012d}/training/optimizer.safetensors"
        )
        for n in (16, 64)
    )
    assert any(not torch.equal(first[key], moments[key]) for key in first)
    raw = load_file(tmp_path / "whole" / last / "training" / "raw.safetensors")
    expected = {
        f"{name}/{key}": (value.shape, value.dtype)
        for name, weight in raw.items()
        for key, value in kept(kind, name, weight).items()
    }
    found = {key: (value.shape, value.dtype) for key, value in moments.items()}
    small = [key for key in found if key.endswith("/p0") and found[key][0] == ()]
    assert found == expected | {key: (torch.Size(), torch.float32) for key in small}
    if not small:
        held = [v.nbytes for key, v in moments.items() if not key.endswith("/step")]
        assert size(kind, raw) == sum(held)


def test_a_dry_run_counts_what_is_kept(tmp_path):
    config = validate(TrainConfig, tree(tmp_path, **SETTINGS, optimizer={"kind": "muon"}))
    made = step(config)
    assert held(config, made).moments == size("muon", made.task.trained())
    assert size("lion", made.task.trained()) < size("muon", made.task.trained())


def weights() -> dict[str, nn.Parameter]:
    """A kernel, a matrix, a vector, and a new word, each with a gradient."""
    shapes = {"unet.conv": (8, 4, 3, 3), "unet.linear": (8, 6), "unet.bias": (8,),
              "text_encoder.token_embedding.rows": (2, 6)}  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    found = {n: nn.Parameter(torch.randn(*shape, generator=draws)) for n, shape in shapes.items()}
    for weight in found.values():
        weight.grad = torch.randn(weight.shape, generator=draws)
    return found


def steps(kind: str, **settings) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    """By how much a step of rate 0.5 moves each weight, and the optimiser."""
    mine = weights()
    before = {name: value.detach().clone() for name, value in mine.items()}
    optimizer = optimizer_of(mine, Optimizer(kind=kind, weight_decay=0.0, **settings))
    set_rate(optimizer, 0.5)
    optimizer.step()
    assert all(mine[name].shape == value.shape == mine[name].grad.shape
               for name, value in before.items())  # fmt: skip
    return {name: before[name] - mine[name].detach() for name in mine}, optimizer


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    moved, _ = steps("muon")
    plain, _ = steps("adamw")
    for name in ("unet.bias", "text_encoder.token_embedding.rows"):
        assert torch.equal(moved[name], plain[name]), name
    for name, columns in (("unet.conv", 36), ("unet.linear", 6)):
        # 0.2 sqrt(longer side) times a matrix whose singular values are about 1.
        values = torch.linalg.svdvals(moved[name].reshape(8, -1)) / (
            0.5 * 0.2 * max(8, columns) ** 0.5
        )
        assert 0.6 < values.min() <= values.max() < 1.3, name


def test_adafactor_sees_a_kernel_as_a_matrix():
    moved, optimizer = steps("adafactor")
    mine = weights()
    flat = {
        n: nn.Parameter(p.detach().clone().reshape(len(p), -1))
        for n, p in mine.items()
        if p.ndim > 1
    }
    for name, weight in flat.items():
        weight.grad = mine[name].grad.reshape(len(weight), -1)
    theirs = torch.optim.Adafactor(flat.values(), lr=0.5)
    theirs.step()
    for name, weight in flat.items():
        before = mine[name].detach()
        assert torch.equal(before - weight.detach().view_as(before), moved[name])
    (conv,) = [s for p, s in optimizer.state.items() if p.ndim == 4]
    assert (conv["row_var"].shape, conv["col_var"].shape) == ((8, 1), (1, 36))


def test_what_is_kept_of_a_large_model():
    with torch.device("meta"):
        many = {"unet.a": torch.empty(1280, 1280, 3, 3), "unet.b": torch.empty(1280)}
    numbers = sum(value.numel() for value in many.values())
    found = {
        k: size(k, many) / numbers for k in ("adamw", "prodigy", "lion", "adamw8bit", "adafactor")
    }
    assert found["adamw"] == 8 and found["prodigy"] == 16 and found["lion"] == 4
    assert found["adamw8bit"] == pytest.approx(2 + 2 * 4 / 256, rel=1e-3)
    assert found["adafactor"] < 0.01


def test_a_package_that_is_missing_is_named(monkeypatch, command, tmp_path):
    monkeypatch.setattr("ldm.config.optimizer.find_spec", lambda name: None)
    for kind, package in (("adamw8bit", "bitsandbytes"), ("lion", "lion-pytorch")):
        with pytest.raises(
            ConfigError, match=rf"^optimizer\.kind: {kind} needs {package}, .* pip "
        ):
            require(Optimizer(kind=kind))
    status, told = command(tree(tmp_path / "run", optimizer={"kind": "prodigy", "lr": None}))
    assert status == 2 and "optimizer.kind: prodigy needs prodigyopt" in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "adafactor", "betas": [0.9, 0.9]}, "optimizer.betas: adafactor has none"),
        ({"kind": "lion", "eps": 1e-3}, "optimizer.eps: lion has none"),
        ({"kind": "prodigy", "text_encoder_lr": 1e-3}, "prodigy finds one learning rate for all"),
    ],
)
def test_settings_that_a_kind_has_not(tmp_path, settings, told):
    plain = tree(tmp_path) | {"optimizer": settings, "train": ["unet", "text_encoder"]}
    with pytest.raises(ConfigError, match=told):
        validate(TrainConfig, plain)


def test_each_kind_has_its_usual_settings():
    assert (Optimizer().lr, Optimizer().betas, Optimizer().eps) == (1e-4, (0.9, 0.999), 1e-8)
    assert Optimizer(kind="prodigy").lr == 1.0
    adafactor = Optimizer(kind="adafactor")
    assert (adafactor.lr, adafactor.betas, adafactor.eps) == (1e-2, None, None)


def test_another_kind_begins_anew(tmp_path, caplog):
    _, optimizer = steps("adamw")
    mine = weights()
    counters = {
        "images": 8,
        "window": {},
        "identity": {},
        "optimizer": {"kind": "lion", "found": {}},
    }
    state.write(tmp_path / "training", state.collect(mine, mine, optimizer), counters)
    with caplog.at_level(logging.WARNING):
        state.read(tmp_path / "training", mine, optimizer_of(mine, Optimizer()))
    assert "begins anew: it was lion and is now adamw" in caplog.text


def test_a_table_that_all_share_is_written_for_each(tmp_path):
    """As those of bitsandbytes are; safetensors refuses memory that two names have."""
    mine, table = weights(), torch.arange(256.0)
    optimizer = torch.optim.SGD(mine.values())
    for weight in mine.values():
        optimizer.state[weight] = {"qmap1": table}
    counters = {"images": 8, "window": {}, "identity": {}}
    state.write(tmp_path / "training", state.collect(mine, mine, optimizer), counters)
    found = load_file(tmp_path / "training" / "optimizer.safetensors")
    assert len(found) == 4 and all(torch.equal(value, table) for value in found.values())


def test_what_is_kept_as_numbers_comes_back_as_numbers(tmp_path):
    """As bitsandbytes and prodigy keep their counts, and what prodigy has found."""

    class Prodigy(torch.optim.SGD):
        """Keeps what the real one does."""

    mine = weights()
    groups = [{"params": [*mine.values()], "d": 0.1 + 0.2, "k": 3}]
    one, two = (Prodigy([dict(groups[0])], lr=1.0) for _ in range(2))
    for name, weight in mine.items():
        keys = kept("prodigy", name, weight)
        one.state[weight] = {key: torch.full(value.shape, 0.5) for key, value in keys.items()}
        one.state[weight]["step"] = 7
    one.state[mine["unet.bias"]]["p0"] = torch.tensor(0.0)
    from ldm.engine.optimizer_state import told

    counters = {"images": 8, "window": {}, "identity": {}, "optimizer": told(one)}
    state.write(tmp_path / "training", state.collect(mine, mine, one), counters)
    two.param_groups[0].update(d=1e-6, k=0)
    state.read(tmp_path / "training", mine, two)
    for weight in mine.values():
        assert type(two.state[weight]["step"]) is int and two.state[weight]["step"] == 7
        assert two.state[weight]["p0"].shape == one.state[weight]["p0"].shape
        assert torch.equal(two.state[weight]["s"], one.state[weight]["s"])
    assert (two.param_groups[0]["d"], two.param_groups[0]["k"]) == (0.1 + 0.2, 3)
    del one.state[mine["unet.bias"]]["exp_avg_sq"]
    counters["stateless"] = []
    state.write(tmp_path / "other", state.collect(mine, mine, one), counters)
    with pytest.raises(CheckpointError, match="it lacks unet.bias/exp_avg_sq"):
        state.read(tmp_path / "other", mine, two)
