"""What is told before torch, diffusers and transformers are imported; names that wait for it."""

import json
import subprocess
import sys

import pytest

import ldm
from ldm import diffusion, sampling
from ldm.cli.main import COMMANDS, Commands
from ldm.pipeline import LatentDiffusionPipeline
from runs import ROOT

SCRIPT = """
import contextlib, io, json, os, runpy, sys

def loaded():
    heavy = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "scipy")
    return [name for name in heavy if name in sys.modules]

import ldm
alone = [name for name in ("numpy", "pydantic", "yaml") if name in sys.modules] + loaded()

def leave(status):
    raise SystemExit(status)

os._exit = leave
told = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    sys.argv = arguments
    os.environ.pop("GOMP_SPINCOUNT", None)
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        except Exception:
            try:
                sys.excepthook(*sys.exc_info())
            except SystemExit as end:
                status = end.code
    arrays = [name for name in ("numpy", "PIL") if name in sys.modules]
    told.append([status, out.getvalue(), loaded(), os.environ.get("GOMP_SPINCOUNT"), arrays])
print(json.dumps([alone, told]))
"""
LDM = ROOT / "ldm" / "cli" / "__main__.py"
FINETUNE = ["--config", ROOT / "configs" / "finetune.yaml", "data.path=x"]
SMALL = f"model={ROOT / 'assets' / 'ldm-small'}"
CLIP, CLASSIFIER = ROOT / "configs" / "clip.yaml", ROOT / "configs" / "classifier.yaml"
SAID = {
    ("train", *FINETUNE, "batchsize=3"): "unknown key 'batchsize'; did you mean 'batch_size'?",
    ("train", *FINETUNE, "optimizer.lr=fast"): "key 'optimizer.lr' is 'fast': input should be",
    ("train", *FINETUNE, "objective.times={kind: mode, scale: 9}"): "scale must lie in",
    ("train", *FINETUNE, "validation.sampler=dmp++"): "did you mean 'dpm++'?",
    ("train", *FINETUNE, "batch_size"): "'batch_size' is no override: write key=value",
    ("train", *FINETUNE, "--dry-run", "batchsize=4"): "unknown key 'batchsize'",
    ("train", "--config", "none.yaml"): "config file none.yaml does not exist",
    ("train", *FINETUNE, "model=none"): "model: none is no pipeline folder (it has no model_index",
    ("train", *FINETUNE, SMALL): "x: this folder does not exist, check data.path",
    ("train_autoencoder", *FINETUNE): "unknown key 'model'",
    ("train_clip", "--config", CLIP, "clip.patch=7"): "size=64 is no multiple of patch=7",
    ("train_classifier", "--config", CLASSIFIER, "labels.a=("): "'(' is no regular expression",
    (LDM, "data", "cache", *FINETUNE, "--out", "x", "batchsize=3"): "unknown key 'batchsize'",
}
HELP = {
    (LDM, "--help"): "Latent text-to-image diffusion",
    (LDM, "serve", "--help"): "Serves a page and APIs",
    ("train", "--help"): "exit status:",
}


def test_a_mistake_is_told_before_torch_is_imported():
    """About a second of CPU time, which was twelve; what takes the time is that it is not there."""
    every = HELP | SAID
    commands = [
        [str(ROOT / "training" / f"{name}.py") if isinstance(name, str) else str(name)]
        + [str(part) for part in rest]
        for name, *rest in every
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    alone, told = json.loads(done.stdout)
    assert alone == []
    assert [arrays for *_, arrays in told[:2]] == [[], []]  # nor those, for what ldm says
    for (command, words), told_of in zip(every.items(), told, strict=True):
        status, output, loaded, spins, _ = told_of
        assert words in output, (command, output)
        assert loaded == [], command
        assert spins == "1000" or command == (LDM, "--help")  # for torch to read when it comes
        assert status == (0 if command in HELP else 2), output
        assert command in HELP or output.count("error: ") == 1


def test_a_command_waits_for_its_own_file_alone():
    commands = Commands()
    assert commands["serve"].name == "serve" and [*commands.made] == ["serve"]
    assert [command.name for command in commands.values()] == [*COMMANDS]
    assert {"check", "cache"} <= {*commands["data"].commands}
    assert commands["evaluate"].help.startswith("Measures what the model in DIR draws")


@pytest.mark.parametrize("package", [ldm, diffusion, sampling], ids=lambda p: p.__name__)
def test_every_name_at_the_door_is_there(package):
    assert set(dir(package)) == set(package.__all__)
    found = {name: getattr(package, name) for name in package.__all__}
    assert all(value is not None for value in found.values())
    assert found == {name: vars(package)[name] for name in found}  # and now without a search
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'x'"):
        package.x  # noqa: B018


def test_the_front_door():
    assert ldm.LatentDiffusionPipeline is LatentDiffusionPipeline
    assert ldm.Objective is diffusion.Objective and ldm.sampler is sampling.sampler
