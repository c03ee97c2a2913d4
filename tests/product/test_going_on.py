"""Which run a folder may go on with, and what becomes of checkpoints that are not whole."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from ldm.engine import checkpoint, state
from ldm.engine.checkpoint import CheckpointError
from programs import own_process, told
from runs import train, tree


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
    done = own_process("--config", config, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert f"WARNING: checkpoint {folder} is passed over: it has no manifest" in done.stderr
    assert f"going on from {run}/checkpoints/images-000000000032" in done.stdout
