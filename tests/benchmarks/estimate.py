"""How far off the estimates of ``--dry-run`` are on this machine.

    python tests/benchmarks/estimate.py CONFIG.yaml [a.b=c ...]

Runs a few steps of a config of training/train.py in a process of its own and prints estimated and
measured images/s and memory (growth of the peak resident set since nothing but modules was loaded).
"""

import json
import resource
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.engine.config import load
from ldm.engine.estimate import measure, seconds, size, trace
from ldm.engine.parts import build
from ldm.engine.schema import TrainConfig
from ldm.engine.steps import text_to_image
from ldm.engine.trainer import split_batch
from runs import program

STEPS = 10


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    file, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run={folder}/run", f"duration={STEPS} steps", "log_every=1", "score=null"]
        fixed += ["validation=null", f"checkpoints.every={STEPS} steps"]
        config = load(TrainConfig, file, [*overrides, *fixed])
        bfloat16 = config.precision == "bfloat16"
        module = program("train")
        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bfloat16 else "no")
        earlier = measure(config.precision)  # on a machine that is busy its rates vary
        before = resident()
        module.train(config, accelerator)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        later = measure(config.precision)
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").open()]
    speed = statistics.median(line["images_per_second"] for line in lines[2:])
    share, micro = split_batch(config, 1)
    cost = trace(config, text_to_image(config, build(config, [], meta=True)), micro, share // micro)
    told = 2 * share / (seconds(cost, earlier) + seconds(cost, later))
    print(f"{torch.get_num_threads()} threads; before and after:")
    print(earlier, later, sep="\n")
    for name, value in vars(cost).items():
        print(f"  {name}: {value:,}")
    print(f"images/s: {told:.3g} estimated, {speed:.3g} measured, ratio {told / speed:.2f}")
    print(f"memory: {size(cost.memory)} estimated, {size(grown)} measured,", end=" ")
    print(f"ratio {cost.memory / grown:.2f}")


if __name__ == "__main__":
    main()
