"""The memory that training takes, traced without a GPU: a table of models by settings.

    python tests/benchmarks/memory.py [--models SD1.5 SDXL SD3.5-medium Flux.1-dev] [--held]

One picture at a time at the size of the model, its latents and texts cached, traced as ``--dry-run
--memory`` does (``ldm.tasks.estimate``): weights, gradient, average, what the optimiser keeps, and
what a step holds at most. Weights are float32 unless a row says otherwise; "bfloat16" is autocast
over them. The settings of a row are set together. A GPU holds its context beside it, and what its
allocator has cut and not used.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.engine import pieces
from ldm.tasks.costs import size
from ldm.tasks.estimate import Cost, Step, held
from ldm.tasks.fitting import cost_of, with_state
from ldm.tasks.text_to_image import step

ROOT = Path(__file__).parents[2]
MODELS = {
    "SD1.5": "stable_diffusion_1",
    "SDXL": "sdxl",
    "SD3.5-medium": "sd35_medium",
    "Flux.1-dev": "flux_dev",
}
FIXED = ["batch_size=1", "micro_batch_size=1", "validation=null", "text_dropout=0",
         "images.crop=center", "cache_latents=true", "cache_text=true"]  # fmt: skip
BFLOAT16 = ["precision=bfloat16"]
# Of what learns, all that compute alike: what they keep, and the settings for it.
FULL: dict[str, dict[str, list[str]]] = {
    "float32": {"adamw, average": []},
    "bfloat16": {
        "adamw, average": [],
        "adamw, average on the host": ["ema.device=cpu"],
        "adamw": ["ema=null"],
        "adamw8bit": ["ema=null", "optimizer.kind=adamw8bit"],
        "adafactor": ["ema=null", "optimizer.kind=adafactor"],
    },
}
_LORA = ["ema=null", "lora.rank=16"]
_HALF = ["ema=null", "weights=bfloat16", "optimizer.kind=adafactor"]
# Each a step of its own.
ALONE = {
    "all, weights in bfloat16, adafactor": [*BFLOAT16, *_HALF],
    "the same, in the backward pass": [
        *BFLOAT16, *_HALF, "optimizer.in_backward=true", "optimizer.clip_norm=null",
    ],
    "LoRA, float32": [*_LORA, "precision=float32"],
    "LoRA, bfloat16": [*_LORA, *BFLOAT16],
    "LoRA, bfloat16, frozen bfloat16": [*_LORA, *BFLOAT16, "frozen=bfloat16"],
    "LoRA, bfloat16, frozen int8": [*_LORA, *BFLOAT16, "frozen=int8"],
    "LoRA, bfloat16, frozen nf4": [*_LORA, *BFLOAT16, "frozen=nf4"],
}  # fmt: skip


def made_of(file: Path, *changes: str) -> tuple[TrainConfig, Step]:
    """A config with ``changes``, and what a step of it computes on a GPU."""
    config = replace(load(TrainConfig, file, [*FIXED, *changes]), attention="sdpa")
    made = step(config)
    # On a GPU what says nothing new leaves the device, also where a run saves it.
    return config, replace(made, unread=tuple(made.task.encoder.unread))  # type: ignore[attr-defined]


def rows(file: Path, *, traced: bool) -> Iterator[tuple[str, list[int]]]:
    """Of a model what learns and how; bytes held between steps, the same with the gradient, and if
    steps are ``traced`` all of them, without and with gradient checkpointing.
    """
    ways = [f"gradient_checkpointing={value}" for value in ("false", "true")] if traced else [""]

    def told(config: TrainConfig, made: Step, costs: list[Cost]) -> list[int]:
        least = costs[0].memory - costs[0].working
        whole = least + pieces.gradient(config, made.task.trained().values())
        return [least, whole, *(cost.memory for cost in costs if traced)]

    def costs_of(*changes: str) -> tuple[TrainConfig, Step, list[Cost]]:
        both = [made_of(file, *changes, *filter(None, [way])) for way in ways]
        return *both[0], [cost_of(*each) if traced else held(*each) for each in both]

    for precision, kinds in FULL.items() if traced else [("bfloat16", FULL["bfloat16"])]:
        _, made, found = costs_of(f"precision={precision}")
        for kept, changes in kinds.items():
            asked = load(TrainConfig, file, [*FIXED, *changes])
            costs = [with_state(c, asked, made) for c in found]
            yield f"all, {precision}, {kept}", told(asked, made, costs)
    for name, changes in ALONE.items():
        yield name, told(*costs_of(*changes))


def main() -> None:
    """Prints the table as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--held", action="store_true", help="no steps are traced: in seconds")
    parser.add_argument("--out", type=Path, help="Markdown file")
    asked = parser.parse_args()
    names = ["model", "what learns", "held between steps", "with its gradient"]
    names += [] if asked.held else ["a step", "a step with `gradient_checkpointing`"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    print("\n".join(lines), flush=True)
    for model in asked.models:
        begin = time.process_time()
        file = ROOT / "configs" / f"{MODELS[model]}.yaml"
        for name, found in rows(file, traced=not asked.held):
            lines.append(f"| {' | '.join([model, name, *map(size, found)])} |")
            print(lines[-1], flush=True)
            if asked.out:
                asked.out.write_text("\n".join(lines) + "\n")
        print(f"({model}: {time.process_time() - begin:.0f} CPU s)", flush=True)


if __name__ == "__main__":
    main()
