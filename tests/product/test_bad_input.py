"""What a user gets wrong is told in one line on stderr, ``error: ...``, with exit status 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from ldm.engine import checkpoint, state
from ldm.engine.checkpoint import CheckpointError
from ldm.engine.config import validate
from ldm.engine.parts import process_and_objective
from ldm.engine.schema import TrainConfig
from runs import ROOT, accelerator, program, train, tree


class Exit(BaseException):
    """Where the program ends the process."""


def told(status: int, output: str) -> str:
    """The message of a refused run."""
    assert status == 2, output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and output.rstrip().endswith(lines[0]), output
    return lines[0].removeprefix("error: ")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a training program in this process as its command line would: exit status, stderr."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the program sets it

    process, end = os.getpid(), os._exit

    def leave(status: int) -> None:
        if os.getpid() != process:  # a forked DataLoader worker, which must end for good
            end(status)
        raise Exit(status)

    def run(config: dict, *overrides: str, name: str = "train") -> tuple[int, str]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        arguments = [f"{name}.py", "--config", str(file), *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        accelerator()  # forgets the precision of the last one
        capsys.readouterr()
        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "_exit", leave)
            try:
                program(name).main()
            except Exception:
                status = 1
                try:
                    sys.excepthook(*sys.exc_info())
                except Exit as left:
                    status = left.args[0]
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(8):
        Image.new("RGB", (20, 20), (30 * n, 0, 0)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    return folder


def in_process(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LDM_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, str(ROOT / "training" / "train.py"), *map(str, arguments)],
        env=environment | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )


# -- the config --


def test_unknown_key(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tree(tmp_path / "run")))
    done = in_process("--config", config, "optimizer.lrr=1e-3", cache=tmp_path)
    assert done.stderr == (
        f"error: {config}: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?\n"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "run").exists()


def test_missing_config_file(command, tmp_path, monkeypatch):
    status, output = command(tree(tmp_path / "run"), "--config", str(tmp_path / "none.yaml"))
    assert told(status, output) == f"config file {tmp_path / 'none.yaml'} does not exist"


@pytest.mark.parametrize(
    "batch, micro, message",
    [(16, 5, "micro_batch_size 5 does not divide the 16 images of each process (batch_size 16")],
)
def test_batch_that_does_not_divide(command, tmp_path, batch, micro, message):
    config = tree(tmp_path / "run", batch_size=batch, micro_batch_size=micro)
    assert told(*command(config)).startswith(message)


def test_batch_that_does_not_divide_over_processes():
    from ldm.engine.config import ConfigError
    from ldm.engine.trainer import split_batch

    config = SimpleNamespace(batch_size=16, micro_batch_size=None)
    with pytest.raises(ConfigError, match="^batch_size 16 does not divide over 3 processes$"):
        split_batch(config, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_eps_with_zero_terminal_snr(command, tmp_path, dry):
    config = tree(tmp_path / "run", process={"zero_terminal_snr": True})
    message = told(*command(config, *dry))
    assert message.startswith("target 'eps' says nothing about x0 where alpha = 0")
    assert "use target 'v'" in message
    assert not (tmp_path / "run").exists()


def test_target_that_no_scheduler_can_express(command, tmp_path):
    config = tree(tmp_path / "run", objective={"target": "score"})
    message = told(*command(config))
    assert message.startswith("diffusers' schedulers cannot express target 'score'")


def test_xformers_on_a_cpu(command, tmp_path):
    message = told(*command(tree(tmp_path / "run", attention="xformers")))
    assert message == ("attention xformers needs a CUDA device, this is cpu: set attention to sdpa")
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "part, change, wrong",
    [
        ("unet", {"block_out_channels": [20, 30]}, "20"),  # 8 groups
        ("vae", {"block_out_channels": [10, 14]}, "10"),  # 4 groups
        ("text", {"hidden_size": 33}, "33"),  # 2 heads
    ],
)
def test_widths_that_no_network_can_have(command, tmp_path, part, change, wrong):
    for dry in ((), ("--dry-run",)):
        message = told(*command(tree(tmp_path / "run", **{part: change}), *dry))
        assert message.startswith(f"{part}: ") and wrong in message


def test_tokenizer_that_is_too_long_for_its_text_encoder(command, tmp_path):
    from ldm.models.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    save_tokenizer(train_tokenizer(["a red circle"], 600, 24), folder)
    message = told(*command(tree(tmp_path / "run", text={"tokenizer": str(folder)})))
    assert message == (
        "text: the tokenizer pads to 24 tokens but the text encoder has 16 positions:"
        " set model_max_length"
    )


def test_picture_size_that_the_autoencoder_cannot_halve(command, tmp_path):
    message = told(*command(tree(tmp_path / "run", images={"size": 17})))
    assert message == "images.size 17 is no multiple of 2, the pixels of a latent"


def test_a_loss_that_is_not_finite(command, tmp_path):
    config = tree(tmp_path / "run", optimizer={"lr": 1e30, "clip_norm": 1e30}, duration="40 steps")
    message = told(*command(config))
    assert re.match(r"the loss is (nan|inf) within the \d+ images before image \d+", message)
    assert "lower optimizer.lr" in message
    assert not (tmp_path / "run" / "final").exists()


# -- the data --


def test_missing_data_folder(command, tmp_path):
    config = {**tree(tmp_path / "run"), "data": {"path": str(tmp_path / "none")}}
    message = told(*command(config))
    assert message == f"{tmp_path / 'none'}: this folder does not exist, check data.path"


def test_a_folder_without_captions(command, tmp_path, pictures):
    for file in pictures.glob("*.txt"):
        file.unlink()
    message = told(*command({**tree(tmp_path / "run"), "data": {"path": str(pictures)}}))
    assert message.startswith(f"{pictures}: 8 pictures but no captions, write them as")


def test_a_truncated_picture(tmp_path, pictures):
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    broken = pictures / "3.png"
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:3000])
    config = tmp_path / "c.yaml"
    data = {"path": str(pictures), "held_out_fraction": 0}
    config.write_text(yaml.safe_dump({**tree(tmp_path / "run"), "data": data}))
    done = in_process("--config", config, cache=tmp_path / "cache")
    message = told(done.returncode, done.stderr)
    assert message.startswith(f"{broken}: the picture cannot be read (")
    assert message.endswith("repair or remove it")


def test_a_truncated_picture_in_a_reading_process(command, tmp_path, pictures):
    # DataLoader wraps what a worker raises into a text of many lines.
    (pictures / "3.png").write_bytes((pictures / "3.png").read_bytes()[:40])
    config = tree(tmp_path / "run", workers=1, cache_latents=False, duration="2 steps")
    config["data"] = {"path": str(pictures), "held_out_fraction": 0}
    message = told(*command(config))
    assert message.startswith(f"{pictures / '3.png'}: the picture cannot be read (")


# -- folders of models --


def test_model_folder_that_is_missing_or_none(command, tmp_path):
    for model in (tmp_path / "none", tmp_path):
        for key in ("vae", "text", "unet"):
            config = tree(tmp_path / "run", model=str(model))
            config[key] = None
            message = told(*command(config))
            assert message.startswith(f"model: {model} is no pipeline folder (it has no")
            assert message.endswith("model_index.json)")


def test_a_part_that_is_described_nowhere(command, tmp_path):
    config = tree(tmp_path / "run")
    del config["vae"]
    assert told(*command(config)) == ("vae is not described: give vae, or model, a pipeline folder")


def test_folder_without_an_autoencoder(command, tmp_path):
    message = told(*command({**tree(tmp_path / "run"), "vae": str(tmp_path)}))
    assert message == f"vae: {tmp_path} is no folder of a AutoencoderKL (it has no config.json)"


def test_weights_that_cannot_be_read(command, tmp_path):
    from ldm.engine.parts import make_vae
    from ldm.engine.schema import VaeShape

    shape = VaeShape(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
    folder = tmp_path / "vae"
    make_vae(shape, 0).save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    message = told(*command({**tree(tmp_path / "run"), "vae": str(folder)}))
    assert message.startswith(f"vae: the weights in {folder} cannot be read: ")


# -- checkpoints --


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 3 steps with a checkpoint after each; copied by the tests that change it."""
    root = tmp_path_factory.mktemp("trained")
    before = os.environ.get("LDM_CACHE")
    os.environ["LDM_CACHE"] = str(root / "cache")
    train(root / "run", duration="3 steps", checkpoints={"every": "1 step", "keep": 3})
    os.environ.pop("LDM_CACHE") if before is None else os.environ.update(LDM_CACHE=before)
    return root / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "run"))


def going_on(run: Path, **changes) -> dict:
    settings = dict(duration="4 steps", checkpoints={"every": "1 step", "keep": 3})
    return tree(run, **(settings | changes))


@pytest.mark.parametrize(
    ("changes", "told_of"),
    [
        (
            {"unet": {"block_out_channels": [16, 48]}},
            "unet.block_out_channels was [16, 32] and is now [16, 48]",
        ),
        ({"batch_size": 8}, "batch_size was 16 and is now 8"),
        ({"optimizer": {"lr": 5e-4}}, "optimizer.lr was 0.0001 and is now 0.0005"),
        ({"data": {"seed": 1}}, "data.seed was 0 and is now 1"),
        ({"objective": {"target": "v"}}, 'objective.target was null and is now "v"'),
    ],
)
def test_a_run_folder_holds_one_run(command, run, changes, told_of):
    message = told(*command(going_on(run, **changes)))
    assert message.startswith(f"{run} holds a run of another config, {told_of}: choose another")


def test_pictures_that_changed_are_noticed(command, pictures, tmp_path):
    settings = dict(data={"kind": "folder", "path": str(pictures)}, batch_size=4)
    settings["data"]["held_out_fraction"] = 0.0
    config = tree(tmp_path / "run", **settings, duration="1 step")
    config["data"] = settings["data"]
    assert command(config)[0] == 0
    (pictures / "3.txt").write_text("another caption")
    message = told(*command({**config, "duration": "2 steps"}))
    assert "holds a run of another config, pictures and captions changed" in message


def test_weights_of_another_shape_are_named(run):
    folder = run / "checkpoints" / "images-000000000048"
    with pytest.raises(CheckpointError, match=r"unet.conv_in.weight is \(16, 4, 3, 3\) there and"):
        state.check_shapes(
            {"unet.conv_in.weight": torch.zeros(16, 4, 3, 3)},
            {"unet.conv_in.weight": torch.zeros(16, 8, 3, 3)},
            folder,
        )


def test_a_sampler_that_is_none_is_refused_before_the_first_step(command, tmp_path):
    config = tree(tmp_path / "run", score={"sampler": "dpmpp"})
    assert told(*command(config)).startswith("score: unknown sampler 'dpmpp'")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_fine_tuned_model_says_is_kept_where_the_config_is_silent(trained, tmp_path):
    final = train(
        tmp_path / "v", objective={"target": "v"}, process={"schedule": "linear"}, duration="1 step"
    )
    config = tree(tmp_path / "tuned", model=str(final), objective={"weighting": "min_snr"})
    for part in ("vae", "text", "unet"):
        config.pop(part)
    config["process"] = {"beta_end": 0.01}
    process, objective = process_and_objective(validate(TrainConfig, config))
    assert (objective.target, objective.weighting) == ("v", "min_snr")
    assert (process.schedule, process.beta_start, process.beta_end) == ("linear", 0.00085, 0.01)


def test_resume_never_does_not_touch_a_run(command, run):
    before = (run / "metrics.jsonl").read_text()
    message = told(*command(going_on(run, resume="never")))
    assert message.startswith(f"{run}/checkpoints already has checkpoints: set resume to auto")
    assert (run / "metrics.jsonl").read_text() == before
    assert len(checkpoint.folders(run / "checkpoints")) == 3


def flip(folder: Path) -> str:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "unet/diffusion_pytorch_model.safetensors is not what was written"


def truncate(folder: Path) -> str:
    file = folder / "training" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "training/optimizer.safetensors is not what was written"


def unfinished(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "it has no manifest"


@pytest.mark.parametrize("damage", [flip, truncate, unfinished])
def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(
    command, trained, run, caplog, damage
):
    expected = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    folder = run / "checkpoints" / "images-000000000048"
    reason = damage(folder)
    status, output = command(going_on(run))
    assert status == 0, output
    warnings = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"checkpoint {folder} is passed over: {reason}")
    # Step 3 was done once more, with the loss it had; and its checkpoint is whole again.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [16, 32, 48, 64]
    assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in expected]
    assert [checkpoint.problem(f) for f in checkpoint.folders(run / "checkpoints")] == [None] * 3


def test_the_warning_reaches_the_terminal(tmp_path, run):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(going_on(run)))
    folder = run / "checkpoints" / "images-000000000048"
    unfinished(folder)
    done = in_process("--config", config, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert f"WARNING: checkpoint {folder} is passed over: it has no manifest" in done.stderr
    assert f"going on from {run}/checkpoints/images-000000000032" in done.stdout
