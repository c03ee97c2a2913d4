"""A training program that also writes down what every process consumed: ``CONFIG.yaml
RECORD_FOLDER``."""

import os
import sys
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from ldm.engine.config import validate
from ldm.engine.schema import TrainConfig
from ldm.engine.text_to_image import TextToImageTask
from runs import program

RECORD: list[dict[str, torch.Tensor]] = []


class Recorded(TextToImageTask):
    """Keeps position, time and noise of every micro-batch, the positions also of a killed run."""

    def forward(self, batch):
        kept = ("position", "u", "noise", "posterior")
        RECORD.append({name: batch[name].clone() for name in kept})
        with Path(sys.argv[2], f"positions-{os.environ.get('RANK', 0)}.txt").open("a") as file:
            file.write(" ".join(map(str, batch["position"].tolist())) + "\n")
        return super().forward(batch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = validate(TrainConfig, yaml.safe_load(Path(sys.argv[1]).read_text()))
    accelerator = Accelerator(cpu=True)
    module = program("train")
    module.TextToImageTask = Recorded
    module.train(config, accelerator)
    torch.save(RECORD, Path(sys.argv[2]) / f"{accelerator.process_index}.pt")
