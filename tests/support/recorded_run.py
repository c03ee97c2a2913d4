"""A training program that also writes down what every process consumed: ``CONFIG.yaml
RECORD_FOLDER``."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.storage import checkpoint
from ldm.storage.tensor_cache import TensorCache
from ldm.tasks import text_to_image
from ldm.tasks.denoising import DenoisingTask

RECORD: list[dict[str, torch.Tensor]] = []


class Recorded(DenoisingTask):
    """Keeps position, time and noise of every micro-batch, the positions also of a killed run."""

    def forward(self, batch):
        kept = ("position", "u", "noise", "posterior")
        RECORD.append({name: batch[name].clone() for name in kept})
        with Path(sys.argv[2], f"positions-{os.environ.get('RANK', 0)}.txt").open("a") as file:
            file.write(" ".join(map(str, batch["position"].tolist())) + "\n")
        return super().forward(batch)


def announced(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which writes a line before and after: what it does, and the name of a folder it
    makes. (Disks are slow here, so that a kill can come in between.)
    """

    def call(*arguments: Any, **named: Any) -> Any:
        target = arguments[0]
        name = f" {target.name}" if isinstance(target, Path) else ""
        file = Path(sys.argv[2], f"moments-{os.environ.get('RANK', 0)}.txt")
        with file.open("a") as stream:
            print(f"begins {what}{name}", file=stream, flush=True)
            found = function(*arguments, **named)
            print(f"ends {what}{name}", file=stream, flush=True)
        return found

    return call


if __name__ == "__main__":
    write_folder = checkpoint.write_folder
    checkpoint.write_folder = announced(
        "writing", lambda folder, write: write_folder(folder, lambda at: (write(at), sleep(0.1)))
    )
    build = TensorCache.build
    TensorCache.build = announced(
        "caching", lambda *a, **named: (build(*a, **named), sleep(0.1))[0]
    )
    torch.set_num_threads(1)
    config = validate(TrainConfig, yaml.safe_load(Path(sys.argv[1]).read_text()))
    accelerator = Accelerator(cpu=True)
    text_to_image.DenoisingTask = Recorded
    text_to_image.train(config, accelerator)
    torch.save(RECORD, Path(sys.argv[2]) / f"{accelerator.process_index}.pt")
