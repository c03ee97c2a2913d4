"""How far off the estimates of ``--dry-run`` are on this machine's CPU.

    python tests/benchmarks/estimate.py CONFIG.yaml [a.b=c ...]

Runs a few steps of a config of training/train.py and prints estimated and measured images/s and
memory (growth of the peak resident set since nothing but modules was loaded). All is timed in CPU
seconds of one thread, rates and steps alike, so that a machine that is busy does not matter.
"""

import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.engine.batch import split_batch
from ldm.engine.precision import MIXED, settled
from ldm.engine.trainer import Trainer
from ldm.tasks import costs, estimate, text_to_image

STEPS = 10


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    file, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    time.perf_counter = time.process_time
    ends = []
    log = Trainer._log

    def logged(self: Trainer, *arguments: float) -> str:
        ends.append(time.process_time())
        return log(self, *arguments)

    Trainer._log = logged  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run={folder}/run", f"duration={STEPS} steps", "log_every=1", "score=null"]
        fixed += ["validation=null", f"checkpoints.every={STEPS} steps"]
        asked = load(TrainConfig, file, [*overrides, *fixed])
        config = settled(asked, torch.device("cpu")).config
        accelerator = Accelerator(cpu=True, mixed_precision=MIXED[config.precision])
        rates = costs.measure(config.precision)
        before = resident()
        text_to_image.train(config, accelerator)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    share, micro = split_batch(config, 1)
    step = text_to_image.step(config)
    cost = estimate.trace(config, step, micro, share // micro)
    measured = statistics.median(b - a for a, b in zip(ends[2:], ends[3:], strict=False))
    told = costs.seconds(cost, rates)
    print(rates)
    print(f"images/s: {share / told:.3g} estimated, {share / measured:.3g} measured,", end=" ")
    print(f"ratio {measured / told:.2f}")
    print(f"memory: {costs.size(cost.memory)} estimated,", end=" ")
    print(f"{costs.size(grown)} measured, ratio {cost.memory / grown:.2f}")


if __name__ == "__main__":
    main()
