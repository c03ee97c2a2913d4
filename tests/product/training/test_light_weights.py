"""Weights held in bfloat16 and rounded at random, and steps taken in the backward pass."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launched import digests, logged
from ldm.config.loader import validate
from ldm.config.optimizer import Optimizer
from ldm.config.schema import TrainConfig
from ldm.engine import pieces
from ldm.engine.optimizer import optimizer_of, set_rate
from ldm.engine.optimizer_state import kept, kind_of, size
from ldm.engine.pieces import InPieces
from ldm.engine.rounding import draws, rounded
from ldm.errors import ConfigError
from ldm.models.half_storage import halve
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import fitting, text_to_image
from ldm.tasks.estimate import Step, trace
from runs import train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")

CPU = torch.device("cpu")
LIGHT = {"weights": "bfloat16", "precision": "bfloat16", "ema": None}
BACKWARD = {"in_backward": True, "clip_norm": None}


def config(tmp_path, **changes) -> TrainConfig:
    return validate(TrainConfig, tree(tmp_path / "run", **changes))


# -- the rounding --


@pytest.mark.parametrize("value", [1.001, -0.7777, 3e-39, -123456.7, 1 + 2**-9, 1.9999999])
def test_the_mean_of_what_is_rounded_is_the_number(value):
    x, n = torch.full((100_000,), value), 100_000
    found = rounded(x, draws(0, "w", 0, CPU)).double()
    low, high = found.min(), found.max()
    exact = float(x[0].double())
    assert low <= exact <= high and set(found.tolist()) == {float(low), float(high)}
    spacing = float(high - low)
    assert spacing <= 2**-7 * abs(exact) or abs(exact) < 1e-38
    share = (exact - float(low)) / spacing  # of those that are rounded up
    assert abs(float(found.mean()) - exact) < 4 * spacing * (share * (1 - share) / n) ** 0.5


def test_what_bfloat16_has_stays():
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    others = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, -3.3895e38])
    others = others.bfloat16().float()
    for x in (exact, others, exact.view(100, 100).t()):
        assert torch.equal(rounded(x, draws(0, "w", 0, CPU)).float(), x)
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert rounded(nan.repeat(100), draws(0, "w", 0, CPU)).isnan().all()


def test_draws_are_those_of_seed_name_and_image():
    x = torch.rand(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    one = rounded(x, draws(1, "w", 16, CPU))
    assert torch.equal(rounded(x, draws(1, "w", 16, CPU)), one)
    for other in ((2, "w", 16), (1, "v", 16), (1, "w", 32)):
        assert not torch.equal(rounded(x, draws(*other, CPU)), one), other
    # However a kernel lies in memory.
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(rounded(last, draws(1, "w", 16, CPU)), one)


# -- the step --


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """A kernel and a matrix of ``dtype``, and a vector, each with a gradient."""
    generator, shapes = (
        torch.Generator().manual_seed(0),
        {"c": (8, 4, 3, 3), "l": (8, 6), "b": (8,)},
    )
    found = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    for name, p in found.items():
        p.data = p.data.bfloat16().to(torch.float32 if name == "b" else dtype)
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
    return found


def test_steps_that_are_less_than_a_spacing_count():
    p, q = (nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2))
    mine = optimizer_of({"p": p}, Optimizer(weight_decay=0.0))
    plain = torch.optim.AdamW([q], weight_decay=0.0)
    plain.param_groups[0]["factor"], plain.param_groups[0]["part"] = 1.0, ""
    for step in range(100):  # by 1e-4 each, where bfloat16 has 1 and 1 - 2^-8
        for weight, optimizer in ((p, mine), (q, plain)):
            weight.grad = torch.ones_like(weight)
            set_rate(optimizer, 1e-4, step)
            optimizer.step()
    assert (q == 1).all()
    moved = 1 - p.detach().float()
    # 100 draws of a step of 2^-8 or none, of 1,000 weights.
    deviation = (100 * 1e-4 * 2**-8 / 1000) ** 0.5
    assert abs(float(moved.mean()) - 0.01) < 4 * deviation
    assert mine.state[p]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_pieces_step_as_the_whole(monkeypatch, kind):
    """In float32 to the bit, also in the backward pass; in bfloat16 to its neighbours."""
    monkeypatch.setattr(pieces, "_PIECE", 60)
    settings = Optimizer(kind=kind)
    ways = {"whole": weights(), "pieces": weights(), "halves": weights(torch.bfloat16)}
    made = {name: optimizer_of(mine, settings) for name, mine in ways.items()}
    assert type(made["halves"]) is InPieces and type(made["whole"]) is not InPieces
    made["pieces"] = InPieces(made["pieces"], ways["pieces"], 0)
    assert {kind_of(optimizer) for optimizer in made.values()} == {kind}
    assert len(made["halves"]._pieces) == 2 if kind != "muon" else 1 < len(made["halves"]._pieces)
    for _ in range(2):
        for optimizer in made.values():
            set_rate(optimizer, 1e-2)
            optimizer.step()
    for name, expected in ways["whole"].items():
        whole = made["whole"].state[expected]
        for way in ("pieces", "halves"):
            mine = ways[way][name]
            state = made[way].state[mine]
            assert state.keys() == whole.keys()
            assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in whole.items()}
            if way == "pieces":
                assert torch.equal(mine, expected)
                assert all(torch.equal(state[key], value) for key, value in whole.items())
            elif name != "b":
                assert mine.dtype == torch.bfloat16
                torch.testing.assert_close(mine.float(), expected, rtol=2**-6, atol=1e-3)
        assert {p for group in made["halves"].param_groups for p in group["params"]} == {
            *ways["halves"].values()
        }


def test_gradients_are_clipped_in_float32():
    mine, plain = weights(torch.bfloat16), weights()
    optimizer = optimizer_of(mine, Optimizer(kind="adafactor", lr=1.0))
    norm = torch.nn.utils.clip_grad_norm_(plain.values(), 0.5)
    assert isinstance(optimizer, InPieces)
    torch.testing.assert_close(optimizer.clip(0.5), norm)
    seen = {}
    optimizer.inner.step = lambda: seen.update(  # type: ignore[method-assign]
        {p.shape: p.grad for g in optimizer.inner.param_groups for p in g["params"]}
    )
    optimizer.inner.state.update({p: {} for p in mine.values()})
    optimizer.step()
    for p in plain.values():
        torch.testing.assert_close(seen[p.shape], p.grad, rtol=1e-6, atol=0)
    assert optimizer.clip(None) > 0 and optimizer._factor is None


def test_in_the_backward_pass_one_gradient_is_there_at_once():
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    mine = dict(layers.named_parameters())
    optimizer = optimizer_of(mine, Optimizer(**BACKWARD))
    before, there = [p.detach().clone() for p in mine.values()], []
    for p in mine.values():
        p.register_post_accumulate_grad_hook(
            lambda _: there.append(sum(q.grad is not None for q in mine.values()))
        )
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(layers(x).square().sum(), [*mine.values()])
    layers(x).square().sum().backward()
    assert there == [0] * 4  # each has stepped, and its gradient is gone
    assert all(not torch.equal(p, b) for p, b in zip(mine.values(), before, strict=True))
    optimizer.step()  # of nothing that is left
    assert isinstance(optimizer, InPieces)
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in expected]))
    torch.testing.assert_close(optimizer.clip(None), norm)


# -- runs --


def test_a_run_of_bfloat16_weights_goes_on_to_the_same_bits(tmp_path):
    """Of a U-Net and a text encoder, its batch in two parts; what is saved is float32."""
    settings = LIGHT | {
        "train": ["unet", "text_encoder"], "duration": "2 steps", "batch_size": 4,
        "micro_batch_size": 2,
        "optimizer": {"kind": "adafactor", "lr": 1e-3},
        "checkpoints": {"every": "1 step", "keep": 9},
        "validation": {"every": "2 steps", "images": 2, "levels": 1},
    }  # fmt: skip
    final = train(tmp_path / "whole", **settings)
    begun, last = (f"checkpoints/images-{n:012d}" for n in (4, 8))
    shutil.copytree(tmp_path / "whole" / begun, tmp_path / "halves" / begun)
    train(tmp_path / "halves", **settings)
    whole = digests(tmp_path / "whole" / last, at_least=4)
    assert digests(tmp_path / "halves" / last, at_least=4) == whole
    first, raw = (
        load_file(tmp_path / "whole" / folder / "training" / "raw.safetensors")
        for folder in (begun, last)
    )
    halved = {name for name, value in raw.items() if value.dtype == torch.bfloat16}
    assert {name.partition(".")[0] for name in halved} == {"unet", "text_encoder"}
    numbers = sum(value.numel() for value in raw.values())
    assert sum(raw[name].numel() for name in halved) > 0.6 * numbers  # embeddings are not
    moved = [float((raw[n] != first[n]).float().mean()) for n in halved if raw[n].numel() > 500]
    assert min(moved) > 0.01
    for part in ("unet", "text_encoder"):
        (file,) = (final / part).glob("*.safetensors")
        saved = load_file(file)
        assert {value.dtype for value in saved.values()} == {torch.float32}
        assert all(saved[n.removeprefix("unet.")].equal(raw[n].float())
                   for n in halved if n.startswith(f"{part}.") and part == "unet")  # fmt: skip
    assert LatentDiffusionPipeline.from_pretrained(final).unet.dtype == torch.float32
    moments = load_file(tmp_path / "whole" / last / "training" / "optimizer.safetensors")
    assert {v.dtype for v in moments.values()} == {torch.float32}
    held = [v.nbytes for key, v in moments.items() if not key.endswith("/step")]
    assert size("adafactor", raw) == sum(held)
    assert all(f"{n}/{k}" in moments for n, w in raw.items() for k in kept("adafactor", n, w))
    # Another start in float32 takes what is there.
    told = settings | {"weights": "float32", "resume": {"allow": ["weights", "precision"]}}
    train(tmp_path / "halves", **told | {"duration": "3 steps", "precision": "float32"})
    assert len(logged(tmp_path / "halves", "loss")) == 2


def test_a_run_that_steps_in_the_backward_pass_is_the_same_run(tmp_path):
    found = {}
    for name, settings in (("after", {"clip_norm": None}), ("within", BACKWARD)):
        told = {"optimizer": settings, "duration": "2 steps", "batch_size": 4}
        train(tmp_path / name, **told, gradient_checkpointing=name == "within")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["gradient_norm"] for line in lines]
    assert found["within"] == pytest.approx(found["after"], rel=1e-6)
    one, other = (digests(tmp_path / name / "final", at_least=3) for name in found)
    assert one == other


class Alone:
    """A task of one network and its mean square."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.network = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))

    def example(self, n: int) -> dict[str, torch.Tensor]:
        return {"x": torch.empty(n, 64)}

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": self.network(batch["x"]).square().mean()}


def test_a_dry_run_counts_what_is_not_there(tmp_path):
    told = {"precision": "bfloat16", "ema": None}
    backward = {"optimizer": {"lr": 1e-4} | BACKWARD}
    ways = [("float32", {}, 1), ("halves", LIGHT, 1), ("parts", LIGHT, 2),
            ("backward", LIGHT | backward, 1)]  # fmt: skip
    cost, gradient, one = {}, {}, 64 * 64  # numbers of a layer, of which the first stays float32
    for name, changes, parts in ways:
        asked, task = config(tmp_path, **told | changes), Alone()
        if "weights" in changes:
            halve(task.network)
        gradient[name] = pieces.gradient(asked, task.network.parameters(), parts)
        cost[name] = trace(asked, Step({"net": task.network}, task, ("net",)), 2, parts)
    assert {name: x.learning for name, x in cost.items()} == {
        "float32": 24 * one, "halves": 14 * one, "parts": 14 * one, "backward": 14 * one,
    }  # fmt: skip
    copies = 12 * one  # of a piece: all five layers together, or each
    assert gradient == {"float32": 24 * one, "halves": 14 * one + 5 * copies,
                        "parts": 24 * one + 5 * copies, "backward": 4 * one + copies}  # fmt: skip
    assert cost["halves"].checkpoint == (24 + 14) * one + cost["halves"].moments
    assert cost["halves"].working == gradient["halves"]  # more than this backward pass has
    assert cost["backward"].working < 20 * one < 24 * one < cost["float32"].working
    asked = config(tmp_path, **told)
    assert [x for x, *_ in fitting.choices(asked)][-1] == (
        "weights=bfloat16 ema=null optimizer.kind=adafactor"
    )
    asked = config(tmp_path, **LIGHT | {"train": ["unet"]})
    found = {text: change(asked) for text, change, _ in fitting.choices(asked)}
    assert found["lora.rank=8 weights=float32"].weights == "float32" and len(found) == 4
    asked = config(tmp_path, **told | backward)
    kinds = [text for text, *_ in fitting.choices(asked) if text.startswith("optimizer")]
    assert kinds == ["optimizer.kind=adafactor"]  # of what steps in pieces
    first = text_to_image.step(config(tmp_path, **LIGHT))
    light = {name for name, p in first.task.trained().items() if p.dtype == torch.bfloat16}
    assert "unet.mid_block.resnets.0.conv1.weight" in light and "unet.conv_in.weight" not in light


# -- what they exclude --


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (LIGHT | {"ema": {}}, "weights: bfloat16 has no average"),
        (LIGHT | {"lora": {"rank": 2}}, "what lora adds to them is small"),
        (LIGHT | {"optimizer": {"kind": "adamw8bit"}}, "bfloat16: adamw8bit keeps no float32"),
        ({"optimizer": {"in_backward": True}}, "optimizer.clip_norm to null"),
        ({"optimizer": BACKWARD | {"kind": "prodigy", "lr": None}}, "prodigy looks at all weights"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, settings, told):
    with pytest.raises(ConfigError, match=told) as caught:
        config(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_what_a_run_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="^weights: bfloat16: in precision float32 every"):
        text_to_image.step(config(tmp_path, **LIGHT | {"precision": "float32"}))
    wrong = [
        (BACKWARD, {}, {"world": 2}, "optimizer.in_backward: 2 processes would step"),
        (BACKWARD, {}, {"parts": 2}, "each of 2 micro-batches would be a step"),
        (BACKWARD, {"nonfinite": {"action": "skip"}}, {}, "set nonfinite.action to stop"),
        (BACKWARD, {"precision": "float16"}, {}, "losses of float16 are scaled"),
        (BACKWARD, {}, {"sharded": True}, "in_backward: not supported in shards"),
        ({}, {}, {"world": 2, "parts": 2}, "micro-batches would be summed in three digits"),
        ({}, {}, {"sharded": True}, "weights: bfloat16 is not supported in shards"),
    ]
    for settings, changes, how, told in wrong:
        asked = config(tmp_path, optimizer=settings, **changes)
        optimizer = optimizer_of(weights(torch.bfloat16), asked.optimizer)
        with pytest.raises(ConfigError, match=told):
            pieces.prepare(asked, optimizer, **{"world": 1, "parts": 1} | how)
    plain = SimpleNamespace()
    pieces.prepare(config(tmp_path), plain, 2, 2, sharded=True)  # type: ignore[arg-type]
