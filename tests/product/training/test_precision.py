"""What a run computes in where its config leaves that to the machine."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.engine import precision, state
from ldm.engine.precision import has_bfloat16, named, settled
from ldm.errors import ConfigError
from ldm.models import tf32
from ldm.models.codec import VaeCodec
from ldm.storage import checkpoint
from programs import told
from runs import forget, program, train, tree

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def resolved(run: Path, device: torch.device = CPU, **changes):
    return settled(validate(TrainConfig, tree(run, **changes)), device)


@pytest.mark.parametrize(
    ("device", "able", "found", "why"),
    [
        (CPU, True, ("bfloat16", "plain"), "bfloat16 (auto)"),
        (CPU, False, ("float32", "sdpa"), "float32 (auto: this CPU has no bfloat16 in hardware)"),
        (GPU, True, ("bfloat16", "sdpa"), "bfloat16 (auto)"),
        (GPU, False, ("float32", "sdpa"), "float32 (auto: this GPU has no bfloat16 in hardware)"),
    ],
)
def test_auto_is_what_the_device_does_itself(tmp_path, monkeypatch, device, able, found, why):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: able)
    here = resolved(tmp_path, device, precision="auto")
    assert (here.config.precision, here.config.attention) == found
    assert here.told == {"precision": why, "attention": f"{found[1]} (auto)"} and here.slow == []
    config = tree(tmp_path)
    del config["precision"]
    assert settled(validate(TrainConfig, config), device) == here  # the default
    # What is named is used, and so is known to be.
    for name in ("float32", "bfloat16"):
        there = resolved(tmp_path, device, precision=name, attention="plain")
        assert (there.config.precision, there.config.attention) == (name, "plain")
        assert there.told == {"precision": name, "attention": "plain"}


@pytest.mark.parametrize(
    ("known", "onednn", "able"),
    [
        ({"architecture": "x86_64", "avx2": True}, False, False),
        # From AVX-512 on oneDNN says that it can, and emulates.
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}, True, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True, True),
        ({"architecture": "aarch64"}, True, True),
        ({"architecture": "aarch64"}, False, False),
    ],
)
def test_cpus_with_bfloat16(monkeypatch, known, onednn, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert has_bfloat16(CPU) == able
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_bfloat16(CPU)


def test_gpus_that_emulate_it_have_none(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda **named: asked.append(named) or False
    )
    assert not has_bfloat16(GPU) and asked == [{"including_emulation": False}]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert named(GPU) == "Tesla T4"
    assert named(CPU).startswith("CPU (") and "thread" in named(CPU)


def test_slow_ones_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    (warning,) = resolved(tmp_path, precision="bfloat16").slow
    assert warning == (
        "precision: this CPU has no bfloat16 in hardware: a step takes some 12.4 times as long as"
        " in float32; leave precision out, or set it to float32"
    )
    assert "in hardware" in resolved(tmp_path, GPU, precision="bfloat16").slow[0]
    for changes in ({"precision": "auto"}, {"precision": "float32"}):
        assert resolved(tmp_path, **changes).slow == []
    assert resolved(tmp_path, GPU, precision="float16").slow == []
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    assert resolved(tmp_path, precision="bfloat16").slow == []
    (warning,) = resolved(tmp_path, precision="bfloat16", attention="sdpa").slow
    assert warning.startswith("attention: the backward pass of sdpa")


def test_float16_needs_a_gpu(command, tmp_path):
    message = told(*command(tree(tmp_path / "run", precision="float16")))
    assert message == (
        "precision: float16 needs a CUDA GPU, and this CPU only emulates it: leave precision out,"
        " or set it to float32"
    )
    assert not (tmp_path / "run").exists()
    here = resolved(tmp_path, GPU, precision="float16").config
    assert (here.precision, here.attention) == ("float16", "sdpa")


# -- a run that goes on --


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps, in float32 as it says."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("trained")
        patch.setenv("LDM_CACHE", str(root / "cache"))
        every = {"every": "1 step", "keep": 2}
        train(root / "run", duration="2 steps", checkpoints=every, attention="plain")
    return root / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def changed(run: Path, precision: str) -> None:
    """Every checkpoint of ``run`` as one of a run that computed in something else."""
    for folder in checkpoint.folders(run / "checkpoints"):
        file = folder / "training" / "run.json"
        kept = json.loads(file.read_text())
        identity = kept["identity"] | {"precision": json.dumps(precision)}
        file.write_text(json.dumps(kept | {"identity": identity}))


def test_it_goes_on_in_what_it_began_in(run, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)  # on another machine
    here = resolved(run, precision="auto")
    assert (here.config.precision, here.config.attention) == ("float32", "plain")
    assert here.told == {
        "precision": "float32 (auto: the run began in it)",
        "attention": "plain (auto: the run began with it)",
    }
    # Of the newest one that can be read; an earlier program did not write the attention.
    newest = checkpoint.folders(run / "checkpoints")[-1] / "training" / "run.json"
    kept = json.loads(newest.read_text())
    del kept["attention"]
    newest.write_text(json.dumps(kept))
    assert resolved(run, precision="auto").told["attention"] == "sdpa (auto)"
    newest.write_text("{")
    assert state.begun(run) == {"precision": "float32", "attention": "plain"}
    for content in ("[]", '{"identity": []}', '{"identity": {"precision": "bfloat16"}}'):
        for folder in checkpoint.folders(run / "checkpoints"):
            (folder / "training" / "run.json").write_text(content)
        assert state.begun(run) == {}
    assert resolved(run, precision="auto").config.precision == "bfloat16"
    for name in ("nothing there", "n" * 5000, "a\0b"):
        assert state.begun(run / name) == {}


def test_the_command_goes_on_and_refuses_another(command, run, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    config = tree(run, duration="3 steps", precision="auto", attention="auto")
    status, output = command(config)
    assert status == 0, output
    assert yaml.safe_load((run / "config.yaml").read_text())["precision"] == "float32"
    _, line = told(*command(config, "precision=bfloat16"), lines=2).splitlines()
    assert line == '  precision was "float32" and is now "bfloat16"'


def test_a_run_in_what_this_machine_does_not_have(run, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    changed(run, "bfloat16")
    (warning,) = resolved(run, precision="auto").slow
    way_out = "to leave it set precision to float32 and name precision in resume.allow"
    assert warning.endswith(f"12.4 times as long as in float32; {way_out}")
    changed(run, "float16")
    with pytest.raises(ConfigError, match=f"precision: float16 needs a CUDA GPU.*: {way_out}$"):
        resolved(run, precision="auto")


# -- what the first lines say --


def test_the_first_lines(tmp_path, monkeypatch, capsys, caplog, own_cache):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    file = tmp_path / "config.yaml"
    config = tree(tmp_path / "run", duration="1 step", precision="bfloat16", batch_size=2)
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file)])
    forget()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    program("train").main()
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"on {named(CPU)}, 1 process; precision bfloat16, attention plain (auto)"
    assert second.startswith("U-Net of ")
    assert sum("12.4 times" in r.message for r in caplog.records) == 1
    counters = checkpoint.newest(tmp_path / "run" / "checkpoints") / "training" / "run.json"
    kept = json.loads(counters.read_text())
    assert (kept["identity"]["precision"], kept["attention"]) == ('"bfloat16"', "plain")


def test_machines_that_decide_otherwise(tmp_path, monkeypatch):
    """Of a run on several machines, of which one has bfloat16."""
    from ldm.tasks import program as shared

    here = SimpleNamespace(
        device=CPU,
        num_processes=2,
        gather=lambda number: torch.cat([number, number + 1]),
    )
    monkeypatch.setattr(shared, "connect", lambda *_, **__: here)
    mine = SimpleNamespace(config=resolved(tmp_path, precision="float32").config, told={})
    with pytest.raises(ConfigError, match="precision: auto is not the same on all machines"):
        shared.Program.accelerator(mine)  # type: ignore[arg-type]


# -- float32 on GPUs --


@pytest.fixture
def flags():
    """PyTorch's two, as they are now."""

    def now() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = now()
    yield now
    tf32.allow(*before)


def test_float32_is_exact_and_what_others_leave_of_it_is_not(flags):
    for name, rounds in (("float32", False), ("tf32", True), ("bfloat16", True), ("float16", True)):
        precision.compute_in(name)
        assert flags() == (rounds, rounds), name
    seen = []

    @tf32.exact("cpu")
    def encode() -> None:
        seen.append((flags(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.autocast("cpu", torch.bfloat16):
        encode()
        assert torch.is_autocast_enabled("cpu") and flags() == (True, True)
    assert seen == [((False, False), False, False)]
    # What computes on a CPU is not asked.
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_a_run_in_tf32_is_one_of_float32(tmp_path, command, monkeypatch, flags):
    asked = resolved(tmp_path, GPU, precision="tf32").config
    assert asked.precision == "tf32" and precision.MIXED["tf32"] == "no"
    assert precision.DTYPES["tf32"] == torch.float32
    encoded = []
    real = VaeCodec.encode
    monkeypatch.setattr(VaeCodec, "encode", lambda *a: (encoded.append(flags()), real(*a))[1])
    few = {"duration": "1 step", "batch_size": 2, "precision": "tf32", "train": ["unet.mid*"]}
    status, output = command(tree(tmp_path / "run", **few))
    assert status == 0, output
    assert {*encoded} == {(False, False)} and flags() == (True, True)
