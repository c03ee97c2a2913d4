"""What befalls a run: signals, a full disk, losses that are no numbers. Each time it ends in one
line, nothing is half-written, and the same command goes on to the same bits.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from launched import ENVIRONMENT, launch
from ldm.encoding.dataset import ImageDraws
from ldm.encoding.encoder import Encoder
from ldm.engine import state
from ldm.engine.signals import STOPPED
from ldm.engine.trainer import Trainer
from ldm.storage import checkpoint, tensor_cache
from ldm.tasks.denoising import DenoisingTask
from programs import told
from runs import ROOT, program, train, tree

SETTINGS = dict(
    duration="6 steps",
    data={"count": 24},
    validation={"every": "2 steps", "images": 4, "levels": 2, "prompts": ["a circle"], "steps": 2},
    checkpoints={"every": "3 steps", "keep": 2},
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing befell."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_CACHE", str(root / "cache"))
        train(root / "run", **SETTINGS)
    return root / "run"


def lines(run: Path) -> list[dict]:
    """``metrics.jsonl`` without what depends on the machine's speed."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in found]


def digests(run: Path) -> dict[str, str]:
    folder = checkpoint.folders(run / "checkpoints")[-1]
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) >= 5  # three networks, raw weights, optimiser
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def same_end(run: Path, whole: Path) -> None:
    assert digests(run) == digests(whole)
    assert lines(run) == lines(whole)
    for folder in ("final", "checkpoints/images-000000000096"):
        assert checkpoint.problem(run / folder) is None
    # Nothing half-named.
    assert not [p for p in run.rglob("*") if p.name.startswith(".")]
    pictures = sorted(p.name for p in (whole / "samples").iterdir())
    assert sorted(p.name for p in (run / "samples").iterdir()) == pictures


def on_call(monkeypatch, owner, name: str, number: int, action) -> None:
    """``action()`` before the ``number``-th call of ``owner.name``."""
    real, calls = getattr(owner, name), []

    def call(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, call)


# -- signals --


@pytest.mark.parametrize(
    ("owner", "name", "number", "by", "left_at"),
    [
        pytest.param(  # in a step, as the one after the next
            *(DenoisingTask, "forward", 4, signal.SIGTERM, 64), marks=pytest.mark.slow
        ),
        pytest.param(  # which test_processes sends as well
            *(DenoisingTask, "forward", 2, signal.SIGUSR1, 32), marks=pytest.mark.slow
        ),
        (DenoisingTask, "forward", 6, signal.SIGINT, 96),  # the last step
        (DenoisingTask, "validate", 1, signal.SIGTERM, 48),
        (state, "write", 1, signal.SIGINT, 64),  # of step 3, beside step 4
        pytest.param(  # in a cache, as the next
            *(Encoder, "encode_pictures", 1, signal.SIGTERM, None), marks=pytest.mark.slow
        ),
        (tensor_cache, "write_tensors", 2, signal.SIGINT, None),
        (DenoisingTask, "finish", 1, signal.SIGTERM, 96),
    ],
)
def test_a_signal_loses_nothing(
    command, monkeypatch, tmp_path, whole, owner, name, number, by, left_at
):
    run, sent = tmp_path / "run", threading.Event()

    def send() -> None:
        os.kill(os.getpid(), by)
        sent.set()

    with monkeypatch.context() as patch:
        on_call(patch, owner, name, number, send)
        if owner is state:  # in a thread of its own, which may begin late
            on_call(patch, DenoisingTask, "forward", 4, lambda: sent.wait(60))
        status, output = command(tree(run, **SETTINGS))
    assert status == STOPPED == 75 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("stopped: ")]
    assert line.startswith(f"stopped: {by.name} came")
    assert line.endswith("run the same command again to go on")
    left = checkpoint.folders(run / "checkpoints")
    assert [checkpoint.problem(folder) for folder in left] == [None] * len(left)
    if left_at is None:
        assert left == []
    else:
        assert left[-1].name == checkpoint.name_of(left_at)
    assert not list((tmp_path / "cache").rglob(".*"))
    assert command(tree(run, **SETTINGS))[0] == 0
    same_end(run, whole)


def test_a_second_signal_ends_at_once():
    script = """
import os, signal, sys, time
from ldm.engine import signals
with signals.REQUESTS.kept():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)  # what a launcher hands on in the same moment
    assert signals.REQUESTS.by == "SIGTERM"
    signals.ECHO = 0
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "still here\n"), done.stderr


def test_what_was_ignored_from_the_start_stays_ignored():
    script = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, or "&" in a script
from ldm.engine.signals import REQUESTS
with REQUESTS.kept():
    os.kill(os.getpid(), signal.SIGINT)
    assert REQUESTS.by is None and signal.getsignal(signal.SIGTERM) == REQUESTS._caught
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_help_tells_the_status(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the program sets it
    with pytest.raises(SystemExit):
        program("train").main()
    assert f"{STOPPED}  SIGTERM, SIGINT (Ctrl-C) or SIGUSR1" in capsys.readouterr().out


# -- a full disk --


@pytest.fixture
def full(monkeypatch):
    """``full(owner, name, number, size)``: from the number-th call of ``owner.name`` to its end no
    file of the process can grow beyond ``size`` bytes.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def arrange(owner, name: str, number: int, size: int) -> None:
        real, calls = getattr(owner, name), []

        def call(*arguments, **named):
            calls.append(1)
            if len(calls) != number:
                return real(*arguments, **named)
            for thread in threading.enumerate():
                if thread.name == "checkpoint" and thread is not threading.current_thread():
                    thread.join()  # which is none of the files that there is no room for
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            try:
                return real(*arguments, **named)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        monkeypatch.setattr(owner, name, call)

    yield arrange
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sizes() -> list[int]:
    # Too little for any file, for a config, for the manifest, for the tokenizer's and for weights.
    return [0, 1_000, 4_000, 20_000, 200_000]


@pytest.mark.parametrize(
    "size",  # slow is what lies between what is asked anyway
    [pytest.param(n, marks=[pytest.mark.slow] if n in sizes()[1:-1:2] else []) for n in sizes()],
)
def test_a_checkpoint_for_which_there_is_no_room(command, full, tmp_path, whole, size):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for later in ("final", "checkpoints/images-000000000096"):
        shutil.rmtree(run / later)
    full(checkpoint, "write_folder", 1, size)
    message = told(*command(tree(run, **SETTINGS)))
    root = run / "checkpoints"
    assert message.startswith(
        f"checkpoint images-000000000096 cannot be written in {root}: File too large ("
    )
    assert "GiB free there); the run ends, and what was there before is whole" in message
    assert message.endswith(
        f"make room, and the same command goes on from {root}/images-000000000048"
    )
    assert [p.name for p in root.iterdir()] == ["images-000000000048"]
    assert checkpoint.problem(root / "images-000000000048") is None
    assert not (run / "final").exists()
    if size in (0, sizes()[-1]):  # what it goes on from is the same for all
        assert command(tree(run, **SETTINGS))[0] == 0
        same_end(run, whole)


@pytest.mark.parametrize(
    ("name", "number", "what", "after"),
    [
        ("_start", 1, "the record of the run", 0),
        # Where it began is asked of the record, and this line of another step.
        pytest.param("_write", 1, "a line of metrics.jsonl", 0, marks=pytest.mark.slow),
        ("_write", 5, "a line of metrics.jsonl", 48),  # two lines each from steps 2 and 4
        ("_validate", 2, "the sample pictures", 48),
        ("_final", 1, "the result", 96),
    ],
)
def test_other_files_for_which_there_is_no_room(
    command, full, tmp_path, whole, name, number, what, after
):
    run = tmp_path / "run"
    full(Trainer, name, number, 10)
    message = told(*command(tree(run, **SETTINGS)))
    assert message.startswith(f"{what} cannot be written in {run}")
    assert "File too large" in message or "No space left on device" in message
    there = f"from {run}/checkpoints/{checkpoint.name_of(after)}"
    assert message.endswith(there if after else "from its start, as it has no checkpoint yet")
    assert not [p for p in run.rglob("*") if p.name.startswith(".")]
    if (run / "metrics.jsonl").exists():
        lines(run)  # whole ones
    assert command(tree(run, **SETTINGS))[0] == 0
    same_end(run, whole)


def test_a_cache_for_which_there_is_no_room(command, full, tmp_path, whole):
    run = tmp_path / "run"
    full(tensor_cache, "write_tensors", 1, 100)
    message = told(*command(tree(run, **SETTINGS)))
    assert message.startswith(f"the cache cannot be written in {tmp_path / 'cache'}: File too")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert command(tree(run, **SETTINGS))[0] == 0
    same_end(run, whole)


def test_a_disk_that_is_really_full(command, monkeypatch, tmp_path, whole):
    """A file system of its own that ends in the second checkpoint; then there is room."""
    root = tmp_path / "disk"
    root.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(root)]).returncode:
        pytest.skip("mounting is not allowed here")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree(root / "run", **SETTINGS)))
    one = sum(
        f.stat().st_size
        for f in (whole / "checkpoints" / "images-000000000048").rglob("*")
        if f.is_file()
    )
    (tmp_path / "program.py").write_text(MOUNTED)
    arguments = ("--config", tmp_path / "c.yaml", root, str(int(1.6 * one)), tmp_path / "left")
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(tmp_path / "cache"))
    process = launch(tmp_path / "program.py", *arguments)
    output, _ = process.communicate(timeout=300)
    message = told(process.returncode, output)
    assert "No space left on device (" in message and "iB free there)" in message
    assert message.endswith(f"goes on from {root}/run/checkpoints/images-000000000048")
    left = tmp_path / "left" / "checkpoints"
    assert [p.name for p in left.iterdir()] == ["images-000000000048"]
    assert checkpoint.problem(left / "images-000000000048") is None
    shutil.copytree(tmp_path / "left", root / "run")
    status, output = command(tree(root / "run", **SETTINGS))
    assert status == 0 and "error: " not in output, output
    same_end(root / "run", whole)


# Also told where the file system is mounted, its bytes, and where to copy the run that is left.
MOUNTED = """
import ctypes, os, shutil, subprocess, sys
from pathlib import Path
from runs import program

*sys.argv, root, size, left = sys.argv
ids = {"uid": os.getuid(), "gid": os.getgid()}
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS: mounts that no other process sees
    raise OSError(ctypes.get_errno(), "unshare")
Path("/proc/self/setgroups").write_text("deny")
for kind, number in ids.items():
    Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", root], check=True)
if not (child := os.fork()):
    program("train").main()
    sys.exit()
_, status = os.waitpid(child, 0)
shutil.copytree(f"{root}/run", left)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_an_error_that_is_not_the_disks_keeps_its_traceback(command, monkeypatch, tmp_path):
    def broken(*_):
        raise OSError(2, "No such file or directory")

    monkeypatch.setattr(state, "write", broken)
    status, output = command(tree(tmp_path / "run", **SETTINGS))
    assert status == 1 and "Traceback" in output
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# -- losses that are no numbers --


@pytest.fixture
def poisoned(monkeypatch):
    """``poisoned({position: value})``: the noise of that image of the run is ``value``."""
    real = ImageDraws.__getitems__

    def arrange(values: dict[int, float]) -> None:
        def batch(self, positions):
            found = real(self, positions)
            for row, position in enumerate(positions):
                if position in values:
                    found["noise"][row] = values[position]
            return found

        monkeypatch.setattr(ImageDraws, "__getitems__", batch)

    return arrange


def plain_run(run: Path, **changes) -> dict:
    settings = dict(duration="8 steps", checkpoints={"every": "1 step", "keep": 9})
    return tree(run, **(settings | changes))


@pytest.mark.parametrize("every", ["step", "log"])
def test_a_step_that_is_not_finite_is_named(command, monkeypatch, poisoned, tmp_path, every):
    """At once on a CPU; where reading it would stop a GPU, when the losses are read anyway."""
    run = tmp_path / "run"
    if every == "log":
        late = property(lambda self: False, lambda self, value: None)
        monkeypatch.setattr(Trainer, "prompt", late, raising=False)
    poisoned({37: float("nan"), 41: float("inf")})
    config = plain_run(run, micro_batch_size=4, log_every=8, checkpoints={"every": "2 steps"})
    message = told(*command(config))
    found = json.loads((run / "fault.json").read_text())
    by_position = {sample["position"]: sample for sample in found["samples"]}
    assert list(by_position) == list(range(32, 48))
    nan, inf = by_position.pop(37), by_position.pop(41)
    third = max(by_position.values(), key=lambda sample: sample["loss"])
    assert message == (
        "the loss of step 3 (images 32 to 47) is nan and its gradient norm nan; worst of its 16"
        f' images: position 37 "{nan["key"]}" at u = {nan["u"]:.4f} has loss nan;'
        f' position 41 "{inf["key"]}" at u = {inf["u"]:.4f} has loss nan;'
        f' position {third["position"]} "{third["key"]}" at u = {third["u"]:.4f} has loss'
        f" {third['loss']:.4g}; lower optimizer.lr, or look at these pictures (all are in"
        f" {run}/fault.json); the last checkpoint is from before"
    )
    assert (found["step"], found["images"]) == (3, [32, 47])
    assert (found["loss"], found["gradient_norm"]) == ("nan", "nan")
    assert [p.name for p in checkpoint.folders(run / "checkpoints")] == [checkpoint.name_of(32)]


def raw(run: Path, images: int) -> dict[str, str]:
    folder = run / "checkpoints" / checkpoint.name_of(images)
    files = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_a_skipped_step_leaves_everything_as_it_was(command, poisoned, tmp_path):
    run = tmp_path / "run"
    poisoned({5: float("nan"), 37: float("nan"), 70: float("nan")})
    skip = {"action": "skip", "at_most": 3}
    status, output = command(plain_run(run, nonfinite=skip))
    assert status == 0, output
    assert raw(run, 32) == raw(run, 48) and raw(run, 64) == raw(run, 80)
    assert raw(run, 48) != raw(run, 64)
    skipped = {line["images"]: line["skipped"] for line in lines(run) if "skipped" in line}
    assert [(at, told["skipped_steps"]) for at, told in skipped.items()] == [
        (16, 1),
        (48, 2),
        (80, 3),
    ]
    assert skipped[48]["worst"][0]["position"] == 37 and skipped[48]["worst"][0]["loss"] == "nan"
    assert set(skipped[48]["worst"][0]) == {"position", "key", "u", "loss"}
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    means = [line["images"] for line in lines(run) if "loss" in line]
    assert means == [32, 64, 96, 112, 128]
    # Going on from anywhere, before the first step and inside the skipping too, changes nothing.
    for images in (16, 48):
        again = tmp_path / f"again-{images}"
        shutil.copytree(run, again)
        for folder in checkpoint.folders(again / "checkpoints"):
            if folder.name > checkpoint.name_of(images):
                shutil.rmtree(folder)
        assert command(plain_run(again, nonfinite=skip))[0] == 0
        assert raw(again, 128) == raw(run, 128)
        assert lines(again) == lines(run)


def test_one_skipped_step_too_many(command, poisoned, tmp_path):
    run = tmp_path / "run"
    poisoned({5: float("nan"), 37: float("nan"), 70: float("nan")})
    stop = plain_run(run)
    assert told(*command(stop)).startswith("the loss of step 1 (images 0 to 15) is nan")
    config = plain_run(run, nonfinite={"action": "skip", "at_most": 2})
    for _ in range(2):  # what was skipped is counted over the whole run, not since it was started
        message = told(*command(config))
        assert message.startswith("the loss of step 5 (images 64 to 79) is nan")
        assert "; 2 steps were skipped before it; lower optimizer.lr" in message
        assert checkpoint.folders(run / "checkpoints")[-1].name == checkpoint.name_of(64)


def test_every_program_names_its_pictures(command, monkeypatch, tmp_path):
    from ldm.tasks.autoencoder import PictureDraws

    config = plain_run(tmp_path / "run", ema=None)
    config = {key: value for key, value in config.items() if key not in ("text", "unet")}
    real = PictureDraws.__getitem__

    def item(self, position):
        found = real(self, position)
        return found if position != 20 else {**found, "pixels": found["pixels"] * float("nan")}

    monkeypatch.setattr(PictureDraws, "__getitem__", item)
    message = told(*command(config, name="train_autoencoder"))
    sample = json.loads((tmp_path / "run" / "fault.json").read_text())["samples"][4]
    assert sample == {"position": 20, "key": sample["key"], "u": None, "loss": "nan"}
    assert f'position 20 "{sample["key"]}" has loss nan' in message
