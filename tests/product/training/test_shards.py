"""FSDP: two processes with half of the model each train what one process trains."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import DistributedType
from PIL import Image
from safetensors.torch import load_file

from forked import Forked
from launched import ENVIRONMENT, finish, launch, logged, losses
from ldm.engine import shards
from ldm.errors import ConfigError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage import checkpoint
from ldm.tasks.program import connect
from programs import told
from runs import ROOT, train, tree

# Sums over two halves are rounded in another order. Measured: 3e-8 (losses), 2e-7 (norms).
CURVE = dict(rel=1e-6, abs=0)
SETTINGS = dict(
    # Two micro-batches of each process, and a norm that is above what gradients are clipped to.
    micro_batch_size=4,
    optimizer={"lr": 1e-4, "clip_norm": 0.5},
    train=["unet", "text_encoder"],
    checkpoints={"every": "1 steps", "keep": 9},
    validation={
        "every": "1 steps", "images": 3, "levels": 2, "steps": 2,
        "prompts": ["a red circle", "two", "three", "four", "five"],
    },
)  # fmt: skip
TEXT = {"vocab_size": 600, "max_length": 16, "hidden_size": 16, "intermediate_size": 32,
        "layers": 1, "heads": 2, "projection": 16}  # fmt: skip
# Asked of the run that is whole, and of the other once it is in shards for the second time.
SUITES = SETTINGS | {"validation": {**SETTINGS["validation"], "suites": {"quality": 8}}}
LORA = dict(
    lora={"rank": 4, "dora": True}, duration="2 steps", precision="bfloat16",
    checkpoints={"every": "2 steps"}, validation=None,
    score={"captions": 6, "steps": 2, "shown": 2},
)  # fmt: skip

SD3 = dict(
    family="sd3", unet=None, vae={"latent_channels": 16, "quant_conv": False},
    text=[TEXT, TEXT | {"activation": "gelu"}, None],
    transformer={"layers": 2, "heads": 2, "head_dim": 8, "positions": 8},
    process={"kind": "rectified_flow"}, objective={"target": "velocity"},
    optimizer={"lr": 1e-3}, duration="3 steps", micro_batch_size=4,
)  # fmt: skip

SCRIPT = """
import json, os, sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ldm.engine import shards
from ldm.config.loader import validate
from ldm.engine.shutdown import Coordinator
from ldm.engine.nonfinite import Step
from ldm.engine.precision import MIXED
from ldm.engine.scaling import LossScale
from ldm.config.schema import TrainConfig
from ldm.engine.trainer import Trainer
from ldm.tasks import text_to_image
from runs import accelerator, program

torch.set_num_threads(1)
held, units, real = [], [], Trainer._final

def share(tensors):
    tensors = list(tensors)
    mine = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)
    return mine / sum(t.numel() for t in tensors)

def final(trainer):
    states = trainer.optimizer.state.values()
    moments = [state[kind] for state in states for kind in ("exp_avg", "exp_avg_sq")]
    mean = trainer.ema.model.mean
    held.append([share(trainer.weights.values()), share(mean.values()), share(moments)])
    names = {type(m).__name__ for m in trainer.task.modules() if isinstance(m, FSDPModule)}
    units.append(sorted(names))
    return real(trainer)

def overflow(processes):
    layer = torch.nn.Linear(4, 4)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scale = LossScale(scaler, torch.optim.AdamW(layer.parameters(), fused=True))
    scaler.scale(layer(torch.ones(2, 4)).sum()).backward()
    if os.environ["RANK"] == "1":
        layer.weight.grad.to_local().fill_(float("inf"))
    scale.unscale()
    step = Step(0)
    step.sums["loss"] = torch.ones(())
    return [scale.overflowed(step, Coordinator(processes, root / "overflow")), scaler.get_scale()]

Trainer._final = final
root = Path(sys.argv[1])
for sharded, plain in json.loads((root / "jobs.json").read_text()):
    config = validate(TrainConfig, plain)
    processes = accelerator(mixed_precision=MIXED[config.precision])
    if sharded:
        shards.settle(processes)
        # As accelerate has one for float16 on GPUs; a power of two, which changes no number.
        processes.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    text_to_image.train(config, processes)
overflowed = overflow(processes)
accelerator()  # forgets all that
sys.argv = ["train.py", "--config", str(root / "config.yaml")]
program("train").main()
(root / (os.environ["RANK"] + ".json")).write_text(json.dumps(held))
(root / ("units-" + os.environ["RANK"] + ".json")).write_text(json.dumps(units))
(root / ("overflow-" + os.environ["RANK"] + ".json")).write_text(json.dumps(overflowed))
"""


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> Path:
    """``alone``: 5 steps by one process. ``moved``: one by one process, one by two with copies, two
    by two with shards (started anew between them), the last by one process. ``sd3`` and ``lora``,
    with ``--slow``: with shards.
    """
    slow = request.config.getoption("--slow")
    root = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "LDM_CACHE", str(root / "cache"))
        patch.setenv("LDM_CACHE", str(root / "cache"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        train(root / "alone", **SUITES, duration="5 steps")
        if slow:
            train(root / "lora-alone", **(SETTINGS | LORA))
            train(root / "sd3-alone", **SD3)
        train(root / "moved", **SETTINGS, duration="1 steps")
        jobs = [
            (False, tree(root / "moved", **SETTINGS, duration="2 steps")),
            (True, tree(root / "moved", **SETTINGS, duration="3 steps")),
        ]
        if slow:
            jobs.append((True, tree(root / "sd3", **SD3, gradient_checkpointing=True)))
            jobs.append((True, tree(root / "lora", **(SETTINGS | LORA))))
        (root / "jobs.json").write_text(json.dumps(jobs))
        config = tree(root / "moved", **SUITES, duration="4 steps")
        (root / "config.yaml").write_text(yaml.safe_dump(config))
        (root / "script.py").write_text(SCRIPT)
        finish(as_a_user_starts_it(root, root / "script.py", root))
        train(root / "moved", **SUITES, duration="5 steps")
        torch.set_num_threads(threads)
    return root


def as_a_user_starts_it(root: Path, *command: Path) -> Forked | subprocess.Popen:
    """With the file of configs/accelerate, but on two CPUs."""
    settings = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp.yaml").read_text())
    (root / "fsdp.yaml").write_text(
        yaml.safe_dump(settings | {"use_cpu": True, "num_processes": 2, "main_process_port": 0})
    )
    launcher = ["-m", "accelerate.commands.launch", "--config_file", root / "fsdp.yaml"]
    return launch(*launcher, *command)


def test_an_overflow_in_one_shard_is_one_in_all(runs):
    found = [json.loads((runs / f"overflow-{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[True, 512.0]] * 2


def test_sharded_steps_had_a_scale(runs):
    lines = [
        json.loads(line) for line in (runs / "moved" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line.get("loss_scale") for line in lines if "loss" in line][2:3] == [1024.0]


def test_each_process_holds_its_part(runs):
    by_rank = [json.loads((runs / f"{rank}.json").read_text()) for rank in (0, 1)]
    for copies, *in_shards in by_rank:
        assert copies == [1, 1, 1]
        for full in in_shards:
            assert len(full) == 3 and all(0.45 < share < 0.55 for share in full)  # of whole rows
    for one, other in zip(*(held[1:] for held in by_rank), strict=True):
        assert [a + b for a, b in zip(one, other, strict=True)] == pytest.approx([1, 1, 1])


def test_the_curve_is_that_of_one_process(runs):
    for key in ("loss", "gradient_norm", "held_out_loss"):
        moved, alone = logged(runs / "moved", key), logged(runs / "alone", key)
        assert len(alone) == 5
        assert moved == pytest.approx(alone, **CURVE)
    assert min(logged(runs / "alone", "gradient_norm")) > 1  # clipped at every step


def test_checkpoints_are_the_same_with_and_without(runs):
    for steps in (3, 5):  # the first of them written from shards
        name = f"checkpoints/{checkpoint.name_of(steps * 16)}"
        alone, moved = runs / "alone" / name, runs / "moved" / name
        assert checkpoint.problem(moved) is None and files(alone) == files(moved)
        for file in (f for f in files(alone) if f.suffix == ".safetensors"):
            expected, found = load_file(alone / file), load_file(moved / file)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def files(folder: Path) -> list[Path]:
    return sorted(file.relative_to(folder) for file in folder.rglob("*"))


def test_pictures_are_the_same_with_and_without(runs):
    for number in (64, 80):
        name = f"samples/images-{number:012d}.png"
        alone, moved = (np.asarray(Image.open(runs / r / name), int) for r in ("alone", "moved"))
        assert alone.std() > 10 and abs(alone - moved).max() <= 1  # the curve's rounding


def test_what_is_drawn_measures_the_same_with_and_without(runs):
    for key in ("frechet", "kid", "recall"):
        moved, alone = (logged(runs / r, f"quality/{key}, pixels:16") for r in ("moved", "alone"))
        assert len(alone) == 5 and moved == pytest.approx(alone[3:], rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_a_lora_in_shards(runs):
    """Under bfloat16, which rounds sums in another order to other numbers."""
    shards, alone = runs / "lora", runs / "lora-alone"
    assert losses(shards) == pytest.approx(losses(alone), rel=1e-3)
    assert files(shards / "final") == files(alone / "final")
    pipe, stock = (LatentDiffusionPipeline.from_pretrained(run / "base") for run in (shards, alone))
    for part in ("unet", "text_encoder", "vae"):
        found, expected = (getattr(one, part).state_dict() for one in (pipe, stock))
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    pipe.load_lora_weights(shards / "final")
    assert (shards / "score.json").is_file()


def test_networks_are_gathered_block_by_block(runs):
    for rank in (0, 1):
        units = json.loads((runs / f"units-{rank}.json").read_text())
        assert units[0] == [] and "FSDPBasicTransformerBlock" in units[1]


@pytest.mark.slow
def test_a_transformer_in_shards(runs):
    """Each of whose blocks also computes anew in the backward pass what it does not keep."""
    for rank in (0, 1):
        units = json.loads((runs / f"units-{rank}.json").read_text())
        assert "FSDPJointTransformerBlock" in units[2]
    for key in ("loss", "gradient_norm"):
        shards, alone = logged(runs / "sd3", key), logged(runs / "sd3-alone", key)
        assert len(alone) == 3 and shards == pytest.approx(alone, rel=2e-6, abs=0)
    file = "transformer/diffusion_pytorch_model.safetensors"
    one, other = (load_file(runs / run / "final" / file) for run in ("sd3", "sd3-alone"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "the launcher asks for FSDP 1: set fsdp_version to 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported: set it to false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing is not supp"),
    ],
)
def test_what_shards_cannot_be(monkeypatch, settings, message):
    for name, value in ({"FSDP_VERSION": "2"} | settings).items():
        monkeypatch.setenv(name, value)
    state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ConfigError, match=message):
        shards.settle(SimpleNamespace(state=state))  # type: ignore[arg-type]


def test_launchers_that_ask_for_what_is_not_there(command, tmp_path, monkeypatch):
    config = tree(tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert told(*command(config)) == "the launcher asks for FSDP, which takes several processes"
    clip = yaml.safe_load((ROOT / "configs" / "clip.yaml").read_text())
    message = told(*command(clip | {"run": str(tmp_path / "clip")}, name="train_clip"))
    assert message == "the launcher asks for FSDP: only training/train.py has it"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="the launcher asks for DeepSpeed, which is not support"):
        connect(sharded=True)
