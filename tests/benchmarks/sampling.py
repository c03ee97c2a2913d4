"""Our pipeline against stock diffusers, in CPU seconds of one thread.

    python tests/benchmarks/sampling.py [--model assets/ldm-small] [--rounds 5] [--pictures 1 8]

What a step of each costs beside its network: the U-Net of both is one that costs nothing, and the
difference of a long and a short call is divided by the evaluations between. With ``--pictures``
instead whole calls, of so many pictures of 30 steps. The two take turns, so that a machine that
is busy is busy for both, and the ratio is the median of those of the turns.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
)

from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling.samplers import SAMPLERS

ROOT = Path(__file__).parents[2]
STOCK = {
    None: None,  # the folder's own
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "ode-heun": HeunDiscreteScheduler,  # its nearest kin: two evaluations a step
}
EACH = {"ode-heun": 2}  # evaluations of a step
SHORT, LONG = 10, 60


def measured(call: Callable[..., object], *told: object) -> float:
    """CPU seconds of a call."""
    begin = time.process_time()
    call(*told)
    return time.process_time() - begin


def free(pipe) -> None:
    """Puts a function that costs nothing in the place of the U-Net."""

    def forward(sample, timestep=None, encoder_hidden_states=None, **told):
        y = sample if told.get("return_dict", True) else (sample,)
        return SimpleNamespace(sample=y) if told.get("return_dict", True) else y

    pipe.unet.forward = forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "ldm-small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, nargs="*", default=())
    parser.add_argument("--compile", action="store_true", help="ours: pipe.compile() before")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of both"
    )
    parser.add_argument("--profile", nargs="*", default=(), help="samplers; own: the folder's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ours = LatentDiffusionPipeline.from_pretrained(arguments.model)
    stock = StableDiffusionPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    schedulers = {}
    for name, kind in STOCK.items():
        pins = SAMPLERS[name].pins if name in SAMPLERS else {}
        schedulers[name] = kind.from_config(stock.scheduler.config, **pins) if kind else None
    schedulers[None] = stock.scheduler
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        pipe.to(getattr(torch, arguments.dtype))

    def call(pipe, name: str | None, batch: int, steps: int, output: str = "latent"):
        told = {"sampler": name} if pipe is ours and name else {}
        if pipe is stock:
            pipe.scheduler = schedulers[name]
        prompts = ["a red apple, twemoji style"] * batch
        return pipe(prompts, num_inference_steps=steps, guidance_scale=5.0, output_type=output,
                    generator=torch.Generator().manual_seed(0), **told)  # fmt: skip

    if not arguments.pictures:
        for pipe in (ours, stock):
            free(pipe)
        print(
            "sampler: CPU microseconds an evaluation beside the network, ours and stock's; a call"
        )
    for name in () if arguments.pictures else STOCK:
        for batch in (1, 8):
            taken = []
            for number in range(arguments.rounds + 1):
                row = []
                for pipe in (ours, stock):
                    short, long = (measured(call, pipe, name, batch, n) for n in (SHORT, LONG))
                    each = EACH.get(name, 1) * (LONG - SHORT)
                    row += [(long - short) / each * 1e6, short * 1e3]
                if number:  # the first warms up
                    taken.append(row)
            mine, fixed, theirs, other = (median(column) for column in zip(*taken, strict=True))
            ratio = median(row[0] / row[2] for row in taken)
            print(
                f"{name or 'own':>9} x {batch}: {mine:6.0f} {theirs:6.0f}, ratio {ratio:.2f};"
                f" a call of {SHORT} steps {fixed:.1f} and {other:.1f} ms",
                flush=True,
            )
    for name in arguments.profile:
        for pipe in (ours, stock):
            profile = cProfile.Profile(time.process_time)
            profile.runcall(call, pipe, None if name == "own" else name, 8, 200)
            print(name, type(pipe).__name__)
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    if arguments.compile:
        print(f"{ours.compile()} blocks are compiled as they are first called", flush=True)
        for batch in arguments.pictures:
            call(ours, None, batch, 2)
    for batch in arguments.pictures:
        ratios, seconds = [], []
        for _ in range(arguments.rounds):
            row = [measured(call, pipe, None, batch, 30, "pt") for pipe in (ours, stock)]
            ratios.append(row[1] / row[0])
            seconds.append(row)
        mine, theirs = (median(column) for column in zip(*seconds, strict=True))
        print(
            f"{batch} pictures of 30 steps: {mine:.2f} and {theirs:.2f} CPU s, {median(ratios):.2f}"
            f" times as fast ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
