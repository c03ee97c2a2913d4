"""Which parameters learn, at which rate, in which memory; all else stays bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.encoding.encoder import Encoder
from ldm.engine.trainer import Trainer
from ldm.errors import ConfigError
from ldm.families.build import build
from ldm.models.conditioner import TextConditioner
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks.denoising import DenoisingTask
from ldm.tasks.estimate import held
from ldm.tasks.text_to_image import step
from programs import told
from runs import accelerator, train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")

BOTH = ["unet", "text_encoder"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base") / "model")


def settings(base: Path, **changes: Any) -> dict[str, Any]:
    parts = {"model": str(base), "vae": None, "text": None, "unet": None}
    return {**parts, "optimizer": {"lr": 1e-3}, "duration": "3 steps", **changes}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{part}.{name.removeprefix('text_model.')}": value
        for part in ("unet", "text_encoder", "vae")
        for file in (folder / part).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize(
    "asked, learns",
    [
        pytest.param(  # what is asked of two patterns
            *(["unet.*attn2*"], lambda n: n.startswith("unet") and "attn2" in n),
            marks=pytest.mark.slow,
        ),
        (
            ["unet.*attn2.to_[kv].weight", "text_encoder.encoder.layers.1.*"],
            lambda n: ("attn2.to_k." in n or "attn2.to_v." in n) or "coder.layers.1." in n,
        ),
        pytest.param(  # as of a pattern of it
            *(["text_encoder"], lambda n: n.startswith("text_encoder")), marks=pytest.mark.slow
        ),
    ],
    ids=["pattern", "two patterns", "part"],
)
def test_chosen_parameters_learn_and_no_other(base, tmp_path, monkeypatch, asked, learns):
    before = tensors(base)
    run = tmp_path / "run"
    final = train(run, **settings(base, train=asked))
    after = tensors(final)
    assert after.keys() == before.keys() and len(after) > 100
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    chosen = {name for name in after if learns(name)}
    # A norm's bias in front of a softmax, or a bias of keys, may have no gradient at all.
    assert moved <= chosen and len(moved) > 0.8 * len(chosen) > 0
    raw = load_file(run / "checkpoints" / "images-000000000048" / "training" / "raw.safetensors")
    assert raw.keys() == chosen
    # Stopped in the middle and gone on with, to the same bits.
    again, log = tmp_path / "again", Trainer._log

    def breaks(self: Any, *arguments: Any) -> None:
        log(self, *arguments)
        if self.seen == 2 * 16:
            raise KeyboardInterrupt

    changes = settings(base, train=asked, checkpoints={"every": "1 step", "keep": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(again, **changes)
    gone_on = tensors(train(again, **changes))
    assert all(torch.equal(gone_on[name], after[name]) for name in after)
    assert LatentDiffusionPipeline.from_pretrained(again / "final").unet.config.sample_size == 8


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"train": ["unet.*atn2*"]},
            "train: 'unet.*atn2*' fits none of the 208 parameters of the unet; did you mean 'attn2'"
            " for 'atn2'?",
        ),
        (
            {"train": ["unet", "text_encoder.layers"]},
            "train: 'text_encoder.layers' fits none of the 36 parameters of the text_encoder;"
            " names look like text_encoder.embeddings.token_embedding.weight (a pattern spans dots",
        ),
        ({"train": ["vae"]}, "train.0: 'vae' is no part: write unet or text_encoder, or "),
        ({"train": ["unet."]}, "train.0: 'unet.' is no part: write unet or text_encoder, or "),
        (
            {"train": ["unet.*attn2*"], "lora": {}},
            "train: 'unet.*attn2*' chooses parameters, and with lora adapters learn: name the part,"
            " and choose its modules with lora.targets (lora.text_targets)",
        ),
        (
            {"optimizer": {"text_encoder_lr": 1e-5}},
            "optimizer.text_encoder_lr: the text encoder does not learn: add it to train, or leave"
            " this out",
        ),
    ],
)
def test_bad_config(command, base, tmp_path, change, message):
    for dry in ((), ("--dry-run",)):
        assert message in told(*command(tree(tmp_path / "run", **settings(base, **change)), *dry))


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_the_text_encoder_learns_at_its_own_rate(base, tmp_path, command, lora):
    run = tmp_path / "run"
    optimizer = {"lr": 1e-3, "text_encoder_lr": 1e-6, "warmup": "2 steps", "schedule": "linear"}
    optimizer["weight_decay"] = 0.0
    asked = settings(base, train=BOTH, lora=lora, optimizer=optimizer, ema=None)
    train(run, **asked)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-3 / 33, 1e-3 * 17 / 33, 1e-3])
    for line in lines:
        assert line["learning_rate/text_encoder"] == pytest.approx(1e-3 * line["learning_rate"])
    # AdamW's first steps are as long as the learning rate, whatever the gradient.
    folder = run / "checkpoints" / "images-000000000048" / "training"
    now, parts = load_file(folder / "raw.safetensors"), build_parts(asked)
    start = parts.trained()
    for part, rate in (("unet", sum(rates)), ("text_encoder", 1e-3 * sum(rates))):
        steps = [(now[n] - start[n]).abs().max() for n in now if n.startswith(part)]
        assert 0.5 * rate < max(steps) < 1.5 * rate
    # Another rate is another run.
    asked["optimizer"] = {**optimizer, "text_encoder_lr": 1e-5}
    message = told(
        *command(
            tree(
                run,
                **asked,
            )
        ),
        lines=2,
    )
    assert message.endswith("optimizer.text_encoder_lr was 1e-06 and is now 1e-05")


def build_parts(changes: dict[str, Any]) -> DenoisingTask:
    """The task of a run that has not begun."""
    config = validate(TrainConfig, tree(Path("run"), **changes))
    model = build(config, [])
    encoder = Encoder(config, model.codec, model.conditioner, accelerator())
    return DenoisingTask(config, model, [], encoder)


def gradients(changes: dict[str, Any], seed: int = 7) -> tuple[dict[str, Tensor], int]:
    """Gradients of one batch with dropout in both networks, and bytes kept for them."""
    task = build_parts(changes)
    for module in task.model.networks["unet"].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    for layer in task.model.networks["text_encoder"].encoder.layers:
        layer.self_attn.dropout = 0.2
    for name, parameter in task.trained().items():
        if "lora_B" in name:  # else A has no gradient
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    task.train()
    draw = torch.Generator().manual_seed(1)
    batch = {
        "mean": torch.randn(4, *tiny.LATENT, generator=draw),
        "logvar": torch.zeros(4, *tiny.LATENT),
        "posterior": torch.randn(4, *tiny.LATENT, generator=draw),
        "noise": torch.randn(4, *tiny.LATENT, generator=draw),
        "u": torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64),
        "text_encoder.ids": task.encoder.conditioner.tokenize(["a cat", "", "dogs", "x"]),
        "coordinates": torch.zeros(4, 6),
    }
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if not isinstance(value, torch.nn.Parameter):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = task(batch)["loss"].sum()
    loss.backward()
    return {name: p.grad for name, p in task.trained().items()}, sum(kept.values())


@pytest.mark.parametrize("lora", [None, {"rank": 2, "dora": True}], ids=["full", "lora"])
def test_gradient_checkpointing_changes_memory_alone(base, lora):
    changes = settings(base, train=BOTH, lora=lora)
    plain, all_of_it = gradients(changes)
    found, part_of_it = gradients({**changes, "gradient_checkpointing": True})
    assert plain.keys() == found.keys() and {name.split(".")[0] for name in found} == set(BOTH)
    largest = max(value.abs().max() for value in plain.values())
    assert largest > 1e-3
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    assert part_of_it < 0.25 * all_of_it
    found, half_of_it = gradients({**changes, "gradient_checkpointing": 2})
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    assert 1.5 * part_of_it < half_of_it < 0.75 * all_of_it
    other, _ = gradients(changes, seed=8)  # another dropout
    assert sum(not torch.equal(other[name], plain[name]) for name in plain) > 0.9 * len(plain)


def test_dropout_is_of_the_training_and_not_of_the_model(base, tmp_path, command):
    torch.manual_seed(3)
    task = build_parts(settings(base, dropout=0.25))
    x, t = torch.randn(8, *tiny.LATENT), torch.full((8,), 500.0)
    tokens = torch.randn(8, 4, task.model.networks["unet"].config.cross_attention_dim)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [task.model.networks["unet"](x, t, tokens).sample for _ in range(2)]

    left_out = []

    def watch(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        left_out.append(((output == 0) & (inputs[0] != 0)).double().mean().item())

    task.model.networks["unet"].down_blocks[0].resnets[0].dropout.register_forward_hook(watch)
    task.train()
    task.model.networks["unet"].train()
    one, other = outputs()
    assert not torch.equal(one, other)
    assert sum(left_out) / 2 == pytest.approx(0.25, abs=0.03)
    task.model.networks["unet"].eval()
    one, other = outputs()
    assert torch.equal(one, other) and left_out[2:] == [0, 0]
    final = train(tmp_path / "run", **settings(base, dropout=0.25))
    of_base = json.loads((base / "unet" / "config.json").read_text())
    assert json.loads((final / "unet" / "config.json").read_text()) == of_base
    code, text = command(tree(tmp_path / "other", **settings(base, dropout=1.0)))
    assert code and "dropout" in text and "less than 1" in text


def test_checkpointing_may_change_from_one_start_to_the_next(base, tmp_path, command):
    asked = settings(base, duration="1 step")
    train(tmp_path / "run", **asked)
    asked |= {"duration": "2 steps", "gradient_checkpointing": True}
    assert command(tree(tmp_path / "run", **asked))[0] == 0


def test_fine_tuning_keeps_the_latent_scaling_and_weights_by_min_snr(base, tmp_path):
    asked = settings(base, duration="1 step", objective={"weighting": "min_snr", "gamma": 2.0})
    final = train(tmp_path / "run", **asked)
    assert json.loads((final / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    task = build_parts(asked)
    z = task.encoder.latent(
        {"mean": torch.ones(1, 4, 8, 8), "logvar": torch.zeros(1, 4, 8, 8)}
        | {"posterior": torch.full((1, 4, 8, 8), 2.0)}
    )
    assert torch.allclose(z, torch.full_like(z, 3 * 0.18215))
    # eps has weight snr on |x0 - x0_hat|^2 where its own loss has 1: min(snr, gamma) / snr.
    u = torch.tensor([0.01, 0.2, 0.9], dtype=torch.float64)
    zeros = torch.zeros(3, 4, 8, 8)
    terms = task.objective(
        task.process,
        lambda x, t, cond: zeros,
        zeros,
        TextConditioner(
            task.model.tokenizers["tokenizer"], task.model.networks["text_encoder"]
        ).encode(["", "", ""]),
        u=u,
        eps=torch.ones(3, 4, 8, 8),
    )
    snr = terms.level.snr
    assert snr[0] > 2 > snr[2]
    assert torch.allclose(terms.loss.double(), snr.clamp(max=2) / snr * terms.mse.double())


def test_a_pattern_may_be_wrong_before_there_is_data():
    with pytest.raises(ConfigError, match="did you mean 'unet'"):
        validate(TrainConfig, tree(Path("run"), train=["unte.*"]))


@pytest.mark.parametrize(
    "change, numbers",
    [
        # The middle is wider.
        ({"train": ["unet.*attn2.to_v.weight"]}, 64 * 32 + 3 * 32 * 32),
        pytest.param(  # which test_estimate counts as well
            {"textual_inversion": {"token": "<x>", "initializer": "a", "vectors": 3}},
            3 * tiny.WIDTH,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pattern", "word"],
)
def test_estimates_count_what_learns(base, tmp_path, command, change, numbers):
    config = validate(TrainConfig, tree(tmp_path / "run", **settings(base, **change)))
    assert held(config, step(config)).learning == 4 * numbers
    status, output = command(tree(tmp_path / "run", **settings(base, **change)), "--dry-run")
    assert status == 0, output
