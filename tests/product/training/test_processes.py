"""A run of two processes that a fault or a signal meets on one of them: both end at one step."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from launched import ENVIRONMENT, TRAIN, digests, finish, launch, losses, steps, wait_for
from ldm.storage import checkpoint
from runs import tree

OWN_TRACEBACK = 'train.py", line'  # torchrun always shows one of its own
SETTINGS = dict(duration="40 steps", checkpoints={"every": "30 steps", "keep": 2})


@pytest.fixture(autouse=True)
def _kept_cache(kept_cache, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(kept_cache))


def config(tmp_path: Path, name: str, **changes) -> Path:
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path / name, **(SETTINGS | changes))))
    return file


def test_a_signal_to_one_of_two_processes(tmp_path):
    """Both stop at the step that it came in, also where nothing is read from the device before the
    next line of metrics, as on GPUs.
    """
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    few = dict(duration="8 steps", log_every=4)
    finish(launch(TRAIN, "--config", config(tmp_path, "whole", **few), processes=2))
    file, run = config(tmp_path, "left", **few), tmp_path / "left"
    process = launch(script, "--config", file, processes=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1  # torchrun's own status
    assert output.count("stopped: ") == 1 and "error: " not in output, output
    assert OWN_TRACEBACK not in output
    (left,) = checkpoint.folders(run / "checkpoints")
    assert checkpoint.problem(left) is None and left.name == checkpoint.name_of(6 * 16)
    assert f"all 96 images seen so far are in {left}" in output
    assert len(losses(run)) == 1
    assert f"going on from {left}" in finish(launch(TRAIN, "--config", file, processes=2))
    last = "checkpoints/images-000000000128"
    assert digests(run / last) == digests(tmp_path / "whole" / last)
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 2


SIGNALLED = """
import os, signal
from ldm.engine.trainer import Trainer
from runs import program

real = Trainer._gradient

def gradient(trainer, *rest):
    trainer.prompt = False
    if trainer.seen == 5 * 16 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return real(trainer, *rest)

Trainer._gradient = gradient
program("train").main()
"""


def test_the_launcher_and_its_processes_get_the_signal(tmp_path):
    """As from a terminal, or from Slurm: torchrun hands on what each process already has."""
    file, run = config(tmp_path, "left", workers=1, cache_latents=False), tmp_path / "left"
    process = launch(TRAIN, "--config", file, processes=2, start_new_session=True)
    wait_for(lambda: steps(run) >= 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert output.count("stopped: SIGTERM came; all ") == 1 and "error: " not in output, output
    (left,) = checkpoint.folders(run / "checkpoints")
    assert checkpoint.problem(left) is None and f"are in {left}: run the same" in output


def test_a_loss_that_is_no_number_on_one_of_two_processes(tmp_path):
    """Skipped by both, or told by one."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED)
    skip = {"action": "skip", "at_most": 1}
    file = config(tmp_path, "run", duration="6 steps", nonfinite=skip)
    process = launch(script, "--config", file, processes=2)
    output, _ = process.communicate(timeout=300)
    assert output.count("error: ") == 1 and "stopped: " not in output, output
    # Position 44 is the second process's share of the step; the first one tells.
    assert "the loss of step 5 (images 64 to 79) is nan" in output and "position 76" in output
    assert "; 1 steps were skipped before it" in output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and '"skipped_steps": 1' in lines[2] and '"position": 44' in lines[2]


POISONED = """
from ldm.encoding.dataset import ImageDraws
from runs import program

real = ImageDraws.__getitems__

def batch(self, positions):
    found = real(self, positions)
    found["noise"][[position in (44, 76) for position in positions]] = float("nan")
    return found

ImageDraws.__getitems__ = batch
program("train").main()
"""


def test_a_full_disk_of_two_processes(tmp_path):
    script = tmp_path / "full.py"
    script.write_text(FULL)
    file, root = config(tmp_path, "run"), tmp_path / "run" / "checkpoints"
    process = launch(script, "--config", file, "checkpoints.every=2 steps", processes=2)
    output, _ = process.communicate(timeout=300)
    assert output.count("error: ") == 1 and OWN_TRACEBACK not in output, output
    assert "error: checkpoint images-000000000064 cannot be written" in output
    assert f"goes on from {root}/images-000000000032" in output
    assert [p.name for p in root.iterdir()] == ["images-000000000032"]


FULL = """
import errno
from ldm.engine import state
from runs import program

real = state.write

def write(folder, found, counters):
    real(folder, found, counters)
    if counters["images"] == 64:
        raise OSError(errno.ENOSPC, "No space left on device")

state.write = write
program("train").main()
"""


def test_a_process_that_is_killed_leaves_no_traceback_of_another(tmp_path):
    script = tmp_path / "named.py"
    script.write_text(NAMED)
    file, run = config(tmp_path, "run"), tmp_path / "run"
    process = launch(script, "--config", file, processes=2)
    wait_for(lambda: steps(run) >= 4, process)
    killed = int((tmp_path / "1").read_text())
    os.kill(killed, signal.SIGKILL)
    start = time.monotonic()
    output, _ = process.communicate(timeout=300)
    assert time.monotonic() - start < 60
    assert f"error: rank 1 (process {killed} on {os.uname().nodename}) is gone without" in output
    assert output.count("error: ") == 1
    assert OWN_TRACEBACK not in output


NAMED = """
import os
from pathlib import Path
from runs import program

Path(__file__).with_name(os.environ["RANK"]).write_text(str(os.getpid()))
program("train").main()
"""


def test_gradients_of_two_processes_lie_where_they_are_summed(tmp_path):
    """To the bits that they have where each process holds them twice; in two micro-batches."""
    script = tmp_path / "views.py"
    script.write_text(VIEWS)
    finish(launch(script, processes=2))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    (mine, shared), (plain, apart) = found[0]
    assert mine == plain and shared == [True] * 3 and apart == [False] * 3


VIEWS = """
import json, os
from contextlib import nullcontext
from pathlib import Path
import torch
from accelerate import Accelerator
from torch import nn
from ldm.tasks.program import connect

def trained(accelerator):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    weights, shared = list(layers.parameters()), []
    optimizer = torch.optim.AdamW(weights, 1e-2)
    model, stepper = accelerator.prepare(layers, optimizer)
    draws = torch.Generator().manual_seed(accelerator.process_index)
    for _ in range(3):
        for last in (False, True):
            with nullcontext() if last else accelerator.no_sync(model):
                accelerator.backward(model(torch.randn(2, 2, 4, 4, generator=draws)).square().sum())
        shared.append(len({p.grad.untyped_storage().data_ptr() for p in weights}) == 1)
        nn.utils.clip_grad_norm_(weights, 1.0)
        stepper.step()
        stepper.zero_grad()
    return [w.flatten().tolist() for w in weights], shared

found = [trained(connect()), trained(Accelerator(cpu=True))]
Path(__file__).with_name(os.environ["RANK"] + ".json").write_text(json.dumps(found))
"""
