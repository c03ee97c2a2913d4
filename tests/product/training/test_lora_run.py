"""A run that trains adapters: the base stays, the result is a file, and going on is exact."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.engine.trainer import Trainer
from ldm.evaluation import sheets
from ldm.families.build import build
from ldm.formats import lora
from ldm.formats.png import read_parameters
from ldm.formats.recognised import metadata
from ldm.models.lora import named, weights
from ldm.pipeline import LatentDiffusionPipeline
from ldm.tasks import text_to_image
from ldm.tasks.lora_metadata import base_of
from programs import told
from runs import accelerator, train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")

BOTH = ["unet", "text_encoder"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("base")
        patch.setenv("LDM_CACHE", str(root / "cache"))
        return train(root / "run", duration="2 steps")


def settings(base: Path | None, **changes: Any) -> dict[str, Any]:
    """Changes to ``runs.tree`` for a LoRA on ``base``; alpha is not the rank."""
    parts = {} if base is None else {"model": str(base), "vae": None, "text": None, "unet": None}
    usual = {"lora": {"rank": 2, "alpha": 3.0}, "train": BOTH, "optimizer": {"lr": 1e-2}}
    return {**parts, **usual, **changes}


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {
        f"{file.relative_to(folder)} {name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    assert found
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def draw(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipe("a red circle", latents=latents, num_inference_steps=3, output_type="np").images


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_learn_and_the_base_does_not(base, tmp_path, monkeypatch, dora):
    seen: list[Any] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: (seen.append(self), fit(self))[1])
    before = tensors(base)
    asked = {"rank": 2, "alpha": 3.0, "dora": dora}
    final = train(tmp_path / "run", **settings(base, duration="4 steps", lora=asked))
    assert same(tensors(base), before)
    assert sorted(f.name for f in final.iterdir()) == ["manifest.json", lora.FILE]
    assert (final / lora.FILE).stat().st_size < 100_000

    (trainer,) = seen
    model = trainer.task.model
    for part, file in (
        ("unet", "unet/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text_encoder/model.safetensors"),
    ):
        network = model.networks[part]
        state = {n.replace(".base_layer", ""): v for n, v in network.state_dict().items()}
        for name, value in load_file(base / file).items():
            assert torch.equal(state[name.removeprefix("text_model.")], value), name
        learns = {n for n, p in network.named_parameters() if p.requires_grad}
        assert learns == weights(network).keys() and learns

    updates = lora.read(final)
    assert sorted(updates) == ["text_encoder", "unet"]
    for modules in updates.values():
        for name, update in modules.items():
            assert update.up.abs().max() > 0, name  # B starts at zero
            assert (update.rank, update.alpha) == (2, 3.0)
            assert (update.magnitude is not None) == dora
    # What is drawn: the average, in ours as in stock; the networks of the run hold the raw weights.
    pair = [
        kind.from_pretrained(base) for kind in (LatentDiffusionPipeline, StableDiffusionPipeline)
    ]
    plain = draw(pair[0])
    for pipe in pair:
        pipe.load_lora_weights(final)
    ours, theirs = (draw(pipe) for pipe in pair)
    back = trainer.task.resting.back(torch.device("cpu"), "this test")
    with trainer.ema.model.in_front(), back:
        there = draw(trainer.task.pipeline())
    assert np.array_equal(ours, there)
    assert np.abs(ours - theirs).max() <= 1e-6  # as for any folder: our scheduler's table is exact
    assert np.abs(ours - plain).max() > 1e-3


# Of DoRA it is asked of magnitudes as well.
@pytest.mark.parametrize(
    "dora", [pytest.param(False, marks=pytest.mark.slow), True], ids=["lora", "dora"]
)
def test_a_run_that_was_broken_off_ends_in_the_same_bits(base, tmp_path, monkeypatch, dora):
    asked = settings(
        base,
        duration="5 steps",
        checkpoints={"every": "2 steps", "keep": 9},
        lora={"rank": 2, "alpha": 3.0, "dora": dora},
    )
    train(tmp_path / "whole", **asked)
    log = Trainer._log

    def breaks(self: Any, *arguments: Any) -> None:
        log(self, *arguments)
        if self.seen == 3 * 16:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", **asked)
    found = [f.name for f in (tmp_path / "broken" / "checkpoints").iterdir()]
    assert found == ["images-000000000032"]
    train(tmp_path / "broken", **asked)
    one, other = (tmp_path / name for name in ("whole", "broken"))
    assert losses(one) == losses(other) and len(losses(one)) == 5
    for folder in ("checkpoints/images-000000000080", "final"):
        assert same(tensors(one / folder), tensors(other / folder))
    kept = tensors(one / "checkpoints" / "images-000000000080")
    assert all(value.dtype == torch.float32 for value in kept.values())
    raw = {name for name in kept if name.startswith("training/raw")}
    assert raw and all(".lora_" in name for name in raw)  # the base is in no checkpoint


def test_the_average_is_of_the_adapters(base, tmp_path):
    train(tmp_path / "run", **settings(base, duration="3 steps"))
    folder = tmp_path / "run" / "checkpoints" / "images-000000000048"
    raw = load_file(folder / "training" / "raw.safetensors")
    shown = {
        f"{part}.{name}": value
        for part, updates in lora.read(folder).items()
        for name, value in named(updates).items()
    }
    assert shown.keys() == raw.keys()
    for name, value in raw.items():
        if "lora_B" in name:  # from zero: the average lags behind
            assert 0 < (shown[name] - value).abs().max() < value.abs().max()


def test_bfloat16_autocast_leaves_adapters_in_float32(base, tmp_path):
    asked = settings(base, duration="2 steps", precision="bfloat16", ema=None)
    final = train(tmp_path / "run", **asked)
    assert {value.dtype for value in tensors(final).values()} == {torch.float32}
    assert all(u.up.abs().max() > 0 for part in lora.read(final).values() for u in part.values())


def test_init_is_its_own_draw_per_network_and_moves_nobodys(base):
    def made(seed: int, train: list[str]) -> dict[str, Tensor]:
        config = validate(TrainConfig, tree(Path("run"), **settings(base, seed=seed, train=train)))
        before = torch.get_rng_state()
        model = build(config, [])
        assert torch.equal(torch.get_rng_state(), before)
        return {f"{p} {n}": v for p in train for n, v in weights(model.networks[p]).items()}

    one, both, other = made(3, ["unet"]), made(3, BOTH), made(4, ["unet"])
    assert one and all(torch.equal(both[name], one[name]) for name in one)
    assert len(both) > len(one)
    moved = [name for name in one if "lora_A" in name and not torch.equal(one[name], other[name])]
    assert len(moved) == len([name for name in one if "lora_A" in name])
    assert len({one[name][0, :8].sum().item() for name in moved}) == len(moved)


def test_pictures_of_the_run_and_its_score_are_the_adapted_models(base, tmp_path, monkeypatch):
    prompts = ["a red circle", "a blue square"]
    config = validate(
        TrainConfig,
        tree(
            tmp_path / "run",
            **settings(
                base,
                duration="4 steps",
                validation={
                    "every": "4 steps",
                    "images": 0,
                    "prompts": prompts,
                    "steps": 3,
                    "guidance": 4.0,
                    "sampler": "ddim",
                },
                score={"captions": 4, "steps": 2, "shown": 2, "before": True},
            ),
        ),
    )
    scored, judge = [], text_to_image.score
    monkeypatch.setattr(
        text_to_image, "score", lambda pipes, *rest: (scored.append(pipes), judge(pipes, *rest))[1]
    )
    final = text_to_image.train(config, accelerator())
    pipe = scored[0]["drawn"]
    pipe.set_progress_bar_config(disable=True)

    def page() -> np.ndarray:
        drawn = pipe(
            prompts, num_inference_steps=3, guidance_scale=4.0, sampler="ddim", seed=0
        ).images
        return np.asarray(sheets.sheet([[image] for image in drawn], prompts, columns=8))

    shown = np.asarray(Image.open(tmp_path / "run" / "samples" / "images-000000000064.png"))
    assert pipe.get_list_adapters() and np.array_equal(page(), shown)
    assert not scored[0]["before"].get_list_adapters()
    pipe.unload_lora_weights()
    assert not np.array_equal(page(), shown)
    assert (tmp_path / "run" / "score.json").exists() and (final / lora.FILE).exists()


def printed(output: str) -> list[str]:
    """Arguments of the command that a run says draws with it."""
    (line,) = (line for line in output.splitlines() if line.startswith("  ") and " sample " in line)
    return shlex.split(line)[1:]


@pytest.mark.parametrize("described", [False, True], ids=["model", "described"])
def test_the_command_that_is_printed_draws(base, tmp_path, capsys, described):
    asked = settings(None if described else base, duration="3 steps")
    final = train(tmp_path / "run", **asked)
    arguments = printed(capsys.readouterr().out)
    model = arguments[arguments.index("--model") + 1]
    # Parts that are in no folder would be lost without one: the LoRA is nothing without its base.
    assert model == (f"{tmp_path}/run/base" if described else str(base))
    assert (tmp_path / "run" / "base").exists() == described
    found = []
    for name, more in (("a", []), ("b", ["--lora-scale", "0"])):
        out = tmp_path / f"{name}.png"
        run = CliRunner().invoke(app, [*arguments, "--steps", "2", "--out", str(out), *more])
        assert run.exit_code == 0, run.output
        found.append(np.asarray(Image.open(out)))
        assert read_parameters(out).lora == f"final {0 if more else 1}"
    assert not np.array_equal(*found)
    at = arguments.index("--lora")
    assert arguments[at + 1] == str(final)
    out = tmp_path / "c.png"
    bare = [*arguments[:at], *arguments[at + 2 :], "--steps", "2", "--out", str(out)]
    assert CliRunner().invoke(app, bare).exit_code == 0
    assert np.array_equal(found[1], np.asarray(Image.open(out)))


def test_a_base_whose_noise_is_another_is_written(base, tmp_path, capsys):
    train(
        tmp_path / "run",
        **settings(base, duration="1 step", train=["unet"], objective={"target": "v"}),
    )
    arguments = printed(capsys.readouterr().out)
    model = Path(arguments[arguments.index("--model") + 1])
    assert model == tmp_path / "run" / "base"
    said = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    assert said["prediction_type"] == "v_prediction"
    assert same(
        {k: v for k, v in tensors(model).items() if k.startswith("unet")},
        {k: v for k, v in tensors(base).items() if k.startswith("unet")},
    )


def test_convert_at_the_command_line(base, tmp_path):
    asked = {"rank": 2, "alpha": 3.0, "trigger": "sks shape"}
    final = train(tmp_path / "run", **settings(base, duration="2 steps", lora=asked))
    kohya, back = tmp_path / "k.safetensors", tmp_path / "back"
    for source, out, to in ((final, kohya, "kohya"), (kohya, back, "diffusers")):
        run = CliRunner().invoke(app, ["lora", str(source), str(out), "--to", to])
        assert run.exit_code == 0, run.output
        assert "modules of rank 2" in run.output
    assert same(tensors(back), tensors(final))
    # Half precision is half as large, and nothing but rounded.
    small = tmp_path / "half"
    run = CliRunner().invoke(app, ["lora", str(kohya), str(small), "--to", "diffusers", "--half"])
    assert run.exit_code == 0, run.output
    rounded = {key: value.half() for key, value in tensors(final).items()}
    assert same(tensors(small), rounded)
    # What others show goes with it, and nothing that names this machine.
    heads = [metadata(f) for f in (final / lora.FILE, kohya, back / lora.FILE)]
    shown = [{k: v for k, v in h.items() if k.startswith(("ss_", "modelspec."))} for h in heads]
    assert (
        shown[0]
        == shown[1]
        == shown[2]
        == {
            "ss_output_name": "run",
            "ss_network_dim": "2",
            "ss_network_alpha": "3",
            "ss_resolution": "(16, 16)",
            "ss_num_train_images": "57",
            "ss_total_batch_size": "16",
            "ss_max_train_steps": "2",
            "ss_learning_rate": "0.01",
            "ss_seed": "3",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "ldm/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": "run",
            "modelspec.resolution": "16x16",
            "modelspec.prediction_type": "epsilon",
            "modelspec.trigger_phrase": "sks shape",
        }
    )
    assert "lora_adapter_metadata" in heads[0] and str(tmp_path) not in str(heads)
    again = CliRunner().invoke(app, ["lora", str(final), str(kohya), "--to", "kohya"])
    assert again.exit_code == 2
    assert again.stderr == f"error: {kohya} is there already: remove it, or choose another name\n"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"cross_attention_dim": 768}, ("sd_v1", "stable-diffusion-v1")),
        ({"cross_attention_dim": 1024}, ("sd_v2", "stable-diffusion-v2-512")),
        (
            {"cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280)},
            ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        ),
        ({"cross_attention_dim": 768, "block_out_channels": [64]}, (None, "ldm")),
        (
            {"block_out_channels": None, "num_layers": 19, "num_single_layers": 38}
            | {"num_attention_heads": 24, "guidance_embeds": True},
            ("flux1", "flux-1-dev"),
        ),
    ],
)
def test_the_base_is_named_where_its_shape_is_known(config, expected):
    assert base_of({"block_out_channels": [320, 640, 1280, 1280], **config}) == expected


# -- what a user gets wrong --


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"alpha": -1}}, "lora.alpha"),
        ({"lora": {"rnk": 4}}, "unknown key 'lora.rnk'; did you mean 'lora.rank'?"),
        ({"lora": {"targets": ["to_x"]}}, "lora.targets: no module ends in 'to_x'; linear layers"),
        ({"lora": {"targets": []}}, "lora.targets"),
        (
            {"lora": {"text_targets": ["layer_norm1"]}, "train": BOTH},
            "lora.text_targets: 'layer_norm1' means encoder.layers.0.layer_norm1, a LayerNorm:",
        ),
    ],
)
def test_bad_config(command, tmp_path, change, message):
    for dry in ((), ("--dry-run",)):
        assert message in told(*command(tree(tmp_path / "run", **change), *dry))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_dry_run_needs_no_memory_for_adapters(command, tmp_path, base):
    asked = settings(base, lora={"dora": True})
    status, output = command(tree(tmp_path / "run", **asked), "--dry-run")
    assert status == 0, output


def test_another_lora_is_another_run(command, tmp_path, base):
    asked = settings(base, duration="1 step", train=["unet"])
    train(tmp_path / "run", **asked)
    changed = tree(tmp_path / "run", **{**asked, "lora": {"rank": 3, "alpha": 3.0}})
    assert "lora.rank was 2 and is now 3" in told(*command(changed), lines=2)
    full = tree(tmp_path / "run", **{**asked, "lora": None})
    message = told(*command(full), lines=5)
    assert "lora.alpha was 3.0 and is now not there" in message


def test_bad_files_at_the_command_line(base, tmp_path):
    foreign = base / "unet" / "diffusion_pytorch_model.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (tmp_path / "none", f"--lora {tmp_path / 'none'}: there is no such file or folder"),
        (empty, f"{empty} holds no {lora.FILE}"),
        (foreign, f"{foreign}: this is no LoRA of a U-Net, a transformer or CLIP: it holds "),
    ):
        run = CliRunner().invoke(app, ["sample", "x", "--model", str(base), "--lora", str(path)])
        assert (run.exit_code, run.stderr.count("\n")) == (2, 1)
        assert run.stderr.startswith(f"error: {message}")
        if path != tmp_path / "none":
            out = str(tmp_path / "out.safetensors")
            run = CliRunner().invoke(app, ["lora", str(path), out, "--to", "kohya"])
            assert (run.exit_code, run.stderr.count("\n")) == (2, 1)
            assert run.stderr.startswith(f"error: {message}")
