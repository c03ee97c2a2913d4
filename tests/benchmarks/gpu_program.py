"""Runs a training script as it is, and ends it after so many of its optimiser's steps.

    python gpu_program.py OUT WARM LAST BATCH WATCH SCRIPT [ARGUMENT ...]

OUT gets what was found, JSON: speed between the steps WARM and LAST, for which the device was
waited, and memory; where WATCH is 1 also how often and where the host waits for the device.
"""

import collections
import json
import os
import runpy
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer


def main() -> None:
    """The command line."""
    out, warm, last, batch, watched, *program = sys.argv[1:]
    measured(Path(out), int(warm), int(last), int(batch), watched == "1")
    sys.argv = program
    sys.path[0] = str(Path(program[0]).parent)
    runpy.run_path(program[0], run_name="__main__")


def measured(out: Path, warm: int, last: int, batch: int, watched: bool) -> None:
    """Counts the steps of the program that follows, and ends it after ``last`` of them."""
    cuda, began = torch.cuda.is_available(), float(os.environ["BENCHMARK_BEGAN"])
    steps, at, waits = 0, dict[int, float](), collections.Counter[str]()

    def show(message: Any, category: Any, filename: str, line: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            waits[f"{filename.rpartition('site-packages/')[2]}:{line}"] += 1

    step = AcceleratedOptimizer.step  # once a step, of however many optimisers or pieces

    def counted(optimizer: Any, *arguments: Any) -> None:
        nonlocal steps
        step(optimizer, *arguments)
        steps += 1
        if steps in (1, warm, last):
            if cuda:
                torch.cuda.synchronize()
            at[steps] = time.time()
        if steps == warm and watched and cuda:
            warnings.showwarning = show
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if steps == last:
            spent, count = at[last] - at[warm], last - warm
            found: dict[str, Any] = {
                "images_s": count * batch / spent,
                "ms_step": 1e3 * spent / count,
                "first_step_s": at[1] - began,
            }
            if cuda:
                found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
                found["reserved_GB"] = torch.cuda.max_memory_reserved() / 1e9
            if watched:
                found["waits_a_step"] = sum(waits.values()) / count
                found["waits"] = waits.most_common(12)
            out.write_text(json.dumps(found))
            os._exit(0)

    AcceleratedOptimizer.step = counted


if __name__ == "__main__":
    main()
