"""Runs small enough for a test: a whole text-to-image training in about a second of compute."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.engine.precision import MIXED
from ldm.tasks import text_to_image

ROOT = Path(__file__).parents[2]


def program(name: str) -> ModuleType:
    """``training/NAME.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(run: Path, **changes: Any) -> dict[str, Any]:
    """A config as plain values; a dict among ``changes`` is merged into the part it names, unless
    it is data of another kind.
    """
    plain: dict[str, Any] = {
        "run": str(run),
        "seed": 3,
        "data": {"kind": "shapes", "count": 60, "size": 16},
        "images": {"size": 16, "flip": True},
        "vae": {
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "mid_attention": False,
        },
        "text": {
            "vocab_size": 600,
            "max_length": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "layers": 1,
            "heads": 2,
        },
        "unet": {
            "block_out_channels": [16],  # whose middle reads the caption; tiny.py has two levels
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        "batch_size": 16,
        "duration": "6 steps",
        "optimizer": {"lr": 1e-4},
        "ema": {"half_life": "64 images"},
        "precision": "float32",  # on every machine: in auto the numbers depend on it
        "log_every": 1,
        "validation": None,
        "checkpoints": {"every": "100 steps", "keep": 2},
    }
    for key, value in changes.items():
        before = plain.get(key)
        both = isinstance(value, dict) and isinstance(before, dict) and "path" not in value
        if both and value.get("kind") in (None, before.get("kind")):
            plain[key] = {**before, **value}
        else:
            plain[key] = value
    return plain


def forget() -> None:
    """Lets the next Accelerator have another precision: its state is global."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def accelerator(**arguments: Any) -> Accelerator:
    """A fresh Accelerator."""
    forget()
    return Accelerator(cpu=True, **arguments)


def train(run: Path, **changes: Any) -> Path:
    """Trains in this process; returns the final pipeline folder."""
    config = validate(TrainConfig, tree(run, **changes))
    return text_to_image.train(config, accelerator(mixed_precision=MIXED[config.precision]))
