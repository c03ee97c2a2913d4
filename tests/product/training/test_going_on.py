"""Which run a folder may go on with, and what becomes of checkpoints that are not whole."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import tiny
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.engine import state
from ldm.engine.nonfinite import Step
from ldm.engine.window import Window
from ldm.errors import CheckpointError
from ldm.formats.lora import FILE
from ldm.storage import checkpoint
from programs import own_process, told
from runs import accelerator, train, tree

CONTENT = "data.content: the pictures or captions changed"


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
def run(trained, tmp_path, command, kept_cache) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def going_on(run: Path, **changes) -> dict:
    settings = dict(duration="4 steps", checkpoints={"every": "1 step", "keep": 3})
    return tree(run, **(settings | changes))


@pytest.mark.parametrize(
    ("changes", "told_of"),
    [
        (
            {"unet": {"block_out_channels": [16, 32]}},
            ["unet.block_out_channels was [16] and is now [16, 32]"],
        ),
        ({"batch_size": 8}, ["batch_size was 16 and is now 8"]),
        ({"data": {"seed": 1}}, [CONTENT, "data.seed was 0 and is now 1"]),
        (
            {"optimizer": {"lr": 5e-4, "final": 0.1}, "objective": {"target": "v"}},
            [
                'objective.target was null and is now "v"',
                "optimizer.final was 0.0 and is now 0.1",
                "optimizer.lr was 0.0001 and is now 0.0005",
            ],
        ),
        (
            {"ema": None},
            [
                "ema.every was 1 and is now not there",
                "ema.half_life was",
                "ema.ramp was 0.05 and is now not there",
            ],
        ),
    ],
)
def test_a_run_folder_holds_one_run(command, run, changes, told_of):
    before = (run / "environment.json").read_text()
    message, *lines = told(*command(going_on(run, **changes)), lines=1 + len(told_of)).splitlines()
    number = "1 key differs" if len(told_of) == 1 else f"{len(told_of)} keys differ"
    assert message == (
        f"{run} holds a run of another config, {number}: choose another run folder, go back, or"
        " name in resume.allow what may change"
    )
    for line, expected in zip(lines, told_of, strict=True):
        assert line.startswith(f"  {expected}")
    assert (run / "environment.json").read_text() == before


def test_what_is_allowed_may_change_and_is_recorded(command, run):
    changed = going_on(run, optimizer={"lr": 5e-4, "final": 0.1}, text_dropout=0.2)
    # All that differs has to be named, and only what is not is told.
    lines = told(*command(changed, "resume.allow=[optimizer]"), lines=2).splitlines()
    assert lines[1] == "  text_dropout was 0.1 and is now 0.2"
    allow = "resume.allow=[optimizer, text_dropout]"
    for _ in range(2):  # once more from its own checkpoint, where nothing differs any longer
        status, output = command(changed, allow, "duration=5 steps")
        assert status == 0, output
        recorded = json.loads((run / "environment.json").read_text())["changes"]
        assert recorded == [
            {"images": 48, "key": "optimizer.final", "was": 0.0, "now": 0.1},
            {"images": 48, "key": "optimizer.lr", "was": 0.0001, "now": 0.0005},
            {"images": 48, "key": "text_dropout", "was": 0.1, "now": 0.2},
        ]
    rates = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in rates] == [1e-4, 1e-4, 1e-4, 5e-4, 5e-4]
    assert command(changed, "duration=6 steps")[0] == 0  # it is the same run from now on


def test_another_batch_size_has_to_divide_what_was_seen(command, run):
    config = going_on(run, batch_size=12, duration="96 images")
    assert command(config, "resume.allow=[batch_size]")[0] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [16, 32, 48, 60, 72, 84, 96]
    config = going_on(run, batch_size=36, duration="144 images")
    message = told(*command(config, "resume.allow=[batch_size]"))
    assert message.startswith(f"{run}/checkpoints/images-000000000096 lies after 96 images, which")
    assert message.endswith("are no whole batches of batch_size 36: choose one that divides them")


def test_allowing_what_is_no_key(command, run):
    message = told(*command(going_on(run), "resume.allow=[optimizer.lrr]"))
    assert message == (
        "resume.allow: 'optimizer.lrr' is no key that a run is held to;"
        " did you mean 'optimizer.lr'?"
    )
    message = told(*command(going_on(run), "resume=sometimes"))
    assert message.endswith("key 'resume' is 'sometimes': input should be 'auto' or 'never'")


def test_a_duration_is_held_to_once_the_rate_falls_towards_the_end(command, tmp_path):
    """Before that a longer run has the same past, and after that only by name."""
    falling = {"lr": 1e-4, "schedule": "linear", "cooldown": "2 steps"}
    config = tree(
        tmp_path / "run", duration="4 steps", optimizer=falling,
        checkpoints={"every": "1 step", "keep": 9},
    )  # fmt: skip
    assert command(config)[0] == 0
    line = told(*command(config, "duration=6 steps"), lines=2).splitlines()[1]
    assert line.startswith("  duration was 64 and is now 96 images, towards the end of which")
    assert "optimizer.cooldown" in line
    for folder in checkpoint.folders(tmp_path / "run" / "checkpoints"):
        if folder.name > checkpoint.name_of(3 * 16):  # the rate of the third step is not lower yet
            shutil.rmtree(folder)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert command(config, "duration=80 images")[0] == 0  # another way to say 5 steps

    def rates(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["learning_rate"] for line in lines]

    assert rates("run") == [1e-4, 1e-4, 1e-4, 1e-4, 5e-5]
    config["run"] = str(tmp_path / "other")
    assert command(config)[0] == 0
    assert command(config, "duration=6 steps", "resume.allow=[duration, workers]")[0] == 0
    assert rates("other") == [1e-4, 1e-4, 1e-4, 5e-5, 1e-4, 5e-5]
    recorded = json.loads((tmp_path / "other" / "environment.json").read_text())["changes"]
    assert recorded == [{"images": 64, "key": "duration", "was": 64, "now": 96}]


def test_processes_and_micro_batch_are_free(command, run):
    assert command(going_on(run, micro_batch_size=4))[0] == 0


def test_pictures_that_changed_are_noticed(command, pictures, tmp_path):
    settings = dict(data={"kind": "folder", "path": str(pictures)}, batch_size=4)
    settings["data"]["held_out_fraction"] = 0.0
    config = tree(tmp_path / "run", **settings, duration="1 step")
    config["data"] = settings["data"]
    assert command(config)[0] == 0
    (pictures / "3.txt").write_text("another caption")
    config["duration"] = "2 steps"
    assert told(*command(config), lines=2).endswith(f"\n  {CONTENT}")
    status, output = command(config, "resume.allow=[data]")
    assert status == 0, output
    (change,) = json.loads((tmp_path / "run" / "environment.json").read_text())["changes"]
    assert change["key"] == "data.content" and change["was"] != change["now"]


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


# -- what a run is a function of, beside its config --


def copied(model: Path, to: Path, part: str | None = None) -> Path:
    """A pipeline folder again, with one bit of one weight of ``part`` another."""
    shutil.copytree(model, to)
    if part is not None:
        (file,) = (to / part).glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    return to


# Of a LoRA it is asked as well what its base was.
@pytest.mark.parametrize(
    "lora", [pytest.param(None, marks=pytest.mark.slow), {"rank": 2}], ids=["full", "lora"]
)
def test_other_weights_under_the_same_config_are_noticed(command, tmp_path, lora):
    model = tiny.folder(tmp_path / "model")
    parts = {"vae": None, "text": None, "unet": None, "lora": lora}
    settings = {**parts, "model": str(model), "duration": "1 step"}
    assert command(tree(tmp_path / "run", **settings))[0] == 0
    settings["duration"] = "2 steps"
    for part, key in (("unet", "unet"), ("text_encoder", "text"), ("vae", "vae")):
        other = copied(model, tmp_path / part, part)
        message = told(
            *command(tree(tmp_path / "run", **settings | {"model": str(other)})), lines=2
        )
        assert message.endswith(
            f"\n  model.{key}: the weights (or config) that the folder holds changed"
        )
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.01}))
    changed = tree(tmp_path / "run", **settings | {"model": str(other)})
    message = told(*command(changed), lines=3)
    assert "\n  model.scheduler.beta_end was 0.012 and is now 0.01\n" in message
    assert command(changed, "resume.allow=[model]")[0] == 0
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["changes"]
    assert [change["key"] for change in recorded] == ["model.scheduler.beta_end", "model.vae"]
    # A folder may move, and come back.
    moved = copied(other, tmp_path / "moved")
    settings |= {"model": str(moved), "duration": "3 steps"}
    assert command(tree(tmp_path / "run", **settings))[0] == 0
    if lora:
        with safe_open(tmp_path / "run" / "final" / FILE, framework="pt") as opened:
            base = json.loads(opened.metadata()["base"])
        assert base.keys() == {"model.unet", "model.text", "model.vae", "model.scheduler"}


def differing(run: Path, **changes) -> list[str]:
    """Keys of today's config that differ from what ``run.json`` of ``run`` says."""
    folder = run / "training"
    config = validate(TrainConfig, tree(Path("run"), **changes))
    today = state.identity(config, Pictures(), {})
    try:
        return [change["key"] for change in state.changes(folder, config, today, ())]
    except state.OtherRunError as error:
        return [line.split()[0] for line in str(error).splitlines()[1:]]


class Pictures:
    epoch = None

    def summary(self) -> str:
        return "the same"


def test_a_key_that_a_run_is_older_than_has_its_default(tmp_path):
    config = validate(TrainConfig, tree(Path("run"), images={"buckets": {"step": 16}}, lora={}))
    whole = state.identity(config, Pictures(), {})
    assert whole["images.buckets.step"] == "16"

    def wrote(identity: dict[str, str]) -> None:
        folder = tmp_path / "training"
        folder.mkdir(exist_ok=True)
        kept = {"images": 0, "window": {}, "identity": identity}
        (folder / "run.json").write_text(json.dumps(kept))

    changes = {"images": {"buckets": {"step": 16}}, "lora": {}}
    new = ("textual_inversion", "optimizer.text_encoder_lr", "text_dropout", "optimizer.final")
    new += ("images.buckets.upscale", "data.seed", "lora.dora")
    wrote({key: text for key, text in whole.items() if key not in new})
    assert set(new) - whole.keys() == set()
    assert differing(tmp_path, **changes) == []
    assert differing(tmp_path, **changes, text_dropout=0.2) == ["text_dropout"]
    assert differing(tmp_path, **changes, optimizer={"final": 0.5}) == ["optimizer.final"]
    dora = changes | {"lora": {"dora": True}}
    assert differing(tmp_path, **dora) == ["lora.dora"]
    # Where the part was not there at all, its defaults were not either.
    wrote({k: v for k, v in whole.items() if not k.startswith("lora.")} | {"lora": "null"})
    added = ["lora.dora", "lora.rank", "lora.text_targets"]
    assert differing(tmp_path, **changes) == added  # and alpha and targets, which are null
    # Once the default targets were written out.
    wrote(whole | {"lora.targets": json.dumps(["to_q", "to_k", "to_v", "to_out.0"])})
    assert differing(tmp_path, **changes) == []
    targets = changes | {"lora": {"targets": ["to_q"]}}
    assert differing(tmp_path, **targets) == ["lora.targets"]
    # Once a part within a part was one text, and a folder its path.
    shape = {k: v for k, v in whole.items() if not k.startswith("images.buckets.")}
    shape["images.buckets"] = json.dumps({"step": 16})
    wrote(shape)
    assert differing(tmp_path, **changes) == []
    assert differing(tmp_path, lora={}, images={"buckets": {"step": 8}}) == ["images.buckets.step"]


@pytest.mark.parametrize("several", [False, True])
def test_a_run_from_before_there_were_lines_joined_them(several, tmp_path):
    def data(lines: str) -> dict:
        one = {"path": "x", "lines": lines}
        return {"data": [one, {"kind": "shapes"}] if several else one}

    key = "data.0.lines" if several else "data.lines"
    first, joined = data("first"), data("joined")
    whole = state.identity(validate(TrainConfig, tree(Path("run"), **first)), Pictures(), {})
    kept = {name: text for name, text in whole.items() if name != key}
    assert len(kept) == len(whole) - 1

    def wrote(identity: dict[str, str]) -> None:
        folder = tmp_path / "training"
        folder.mkdir(exist_ok=True)
        found = {"images": 0, "window": {}, "identity": identity}
        (folder / "run.json").write_text(json.dumps(found))

    wrote(kept)  # texts of one line: the captions are what they were
    assert differing(tmp_path, **first) == differing(tmp_path, **joined) == []
    wrote(kept | {"data.content": '"of all lines"'})
    assert sorted(differing(tmp_path, **first)) == sorted(["data.content:", key])
    assert differing(tmp_path, **joined) == ["data.content:"]


def test_other_captions_do_not_make_another_tokenizer(command, pictures, tmp_path):
    data = {"kind": "folder", "path": str(pictures), "held_out_fraction": 0.0}
    base = tree(tmp_path / "run", batch_size=4, duration="1 step") | {"data": data}
    for lora in (None, {"rank": 2}):
        run = tmp_path / ("run" if lora is None else "lora")
        config = {**base, "run": str(run), "lora": lora}
        for n in range(8):
            (pictures / f"{n}.txt").write_text(f"picture {n}")
        assert command(config)[0] == 0
        kept = run / ("final" if lora is None else "base") / "tokenizer"
        before = (kept / "vocab.json").read_text()
        for n in range(8):
            (pictures / f"{n}.txt").write_text(f"zebra crossing zebra {n}")
        config["duration"] = "2 steps"
        status, output = command(config, "resume.allow=[data]")
        assert status == 0, output
        assert (kept / "vocab.json").read_text() == before and "zebra" not in before


def test_the_window_keeps_the_norm_of_its_last_step():
    first, second = Window(2, accelerator()), Window(2, accelerator())
    step = Step(0, norm=torch.tensor(0.75))
    step.sums["loss"] = torch.tensor(3.0, dtype=torch.float64)
    first.pending.append(step)
    assert first.gather() is None
    second.sums = json.loads(json.dumps(first.sums))  # through a checkpoint
    assert second.means() == {"loss": 1.5, "gradient_norm": 0.75} == first.means()
    assert second.means() == {}
