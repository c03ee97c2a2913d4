"""Ours against diffusers' script and its stock pipeline on one GPU, in one call of ten minutes.

    python tests/benchmarks/gpu.py --out results --peer train_text_to_image.py
    python tests/benchmarks/gpu.py --out results --tiny     # does it run? small shapes, on a CPU

``--peer`` is ``examples/text_to_image/train_text_to_image.py`` of diffusers, which is run as it is;
``--peer-lora`` the one beside it. No network is needed: the model is a folder of the shapes of
Stable Diffusion 1.5 from random init, the pictures are made here. Parts run in the order of their
worth; what one finds is appended to ``OUT/results.jsonl`` at once, and one for which there is no
time left says so there. Programs of ours and of the peer are measured in the same way: by the
optimiser's steps, from outside (``gpu_program.py``), the device waited for at both ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

BEGAN = time.monotonic()
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


class Benchmark:
    """The parts, and what they share.

    Args:
        asked: the command line.
    """

    def __init__(self, asked: argparse.Namespace) -> None:
        self.tiny, self.seconds = asked.tiny, asked.seconds
        self.peer, self.peer_lora = asked.peer, asked.peer_lora
        self.out, self.work = Path(asked.out).absolute(), Path(asked.out).absolute() / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.model, self.images = self.work / "model", self.work / "images"
        self.side = 32 if self.tiny else 512

    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - BEGAN)

    def say(self, name: str, **found: Any) -> None:
        """Appends a line of results."""
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in found.items()}
        line = json.dumps({"part": name, "at_s": round(time.monotonic() - BEGAN), **rounded})
        with open(self.out / "results.jsonl", "a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def part(self, name: str, needs: float, run: Callable[[], None]) -> None:
        """Runs one part, if it may be over in time; its error is a result, and the next goes on."""
        if self.left() < (1 if self.tiny else needs):
            return self.say(name, left_out=f"{self.left():.0f} s are left, it may take {needs:.0f}")
        try:
            run()
        except Exception as error:
            self.say(name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")

    def environment(self) -> dict[str, str]:
        """Of the programs."""
        ours = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        ours |= {"LDM_CACHE": str(self.work / "cache"), "HF_DATASETS_CACHE": str(self.work / "hf")}
        ours |= {"ACCELERATE_USE_CPU": "true"} if self.tiny else {}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, **ours, "PYTHONPATH": path, "BENCHMARK_BEGAN": str(time.time())}

    def program(
        self, name: str, line: list[str], batch: int, steps: tuple[int, int], watch: bool = False
    ) -> None:
        """Measures one program between two of its steps."""
        result, log = self.work / f"{name}.json", self.out / f"{name}.log"
        result.unlink(missing_ok=True)
        told = [str(result), *map(str, steps), str(batch), str(int(watch))]
        command = [sys.executable, str(HERE / "gpu_program.py"), *told, *line]
        with log.open("w") as stream:
            try:
                subprocess.run(
                    command,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=max(self.left(), 1),
                    env=self.environment(),
                )
            except subprocess.TimeoutExpired:
                return self.say(name, error="no time was left")
        if not result.exists():
            last = [*log.read_text().strip().splitlines(), "nothing was printed"]
            return self.say(name, error=last[-2 if len(last) > 1 else 0][-400:])
        self.say(name, batch=batch, **json.loads(result.read_text()))

    # -- what is measured with --

    def ceilings(self) -> None:
        """What the card does at best."""
        from gpu_step import ceilings

        self.say("ceilings", **ceilings())

    def folder(self) -> None:
        """A pipeline folder of the shapes of Stable Diffusion 1.5, and captioned pictures."""
        from gpu_folder import pictures, pipeline

        count = 16 if self.tiny else 512
        pictures(self.images, count, self.side)
        parameters = pipeline(self.model, self.side, tiny=self.tiny)
        self.say("folder", unet_parameters=parameters, pictures=count)

    # -- training --

    def config(self, name: str, batch: int, **changes: Any) -> str:
        """A file; a run as the peer's is, with ``changes``."""

        settings = {
            "run": str(self.work / name),
            "model": str(self.model),
            "data": {"path": str(self.images), "held_out_fraction": 0.0},
            "images": {"size": self.side},
            "text_dropout": 0.0,
            "batch_size": batch,
            "duration": "10M images",
            "optimizer": {"lr": 1e-5},
            "ema": None,
            "validation": None,
            "checkpoints": {"every": "10M images"},
            "precision": "float32" if self.tiny else "bfloat16",
            **changes,
        }
        return self.written(name, settings)

    def written(self, name: str, settings: dict[str, Any]) -> str:
        """The file of a config."""
        import yaml

        file = self.work / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return str(file)

    def ours(
        self,
        name: str,
        batch: int,
        steps: tuple[int, int] = (10, 50),
        watch: bool = False,
        **changes: Any,
    ) -> None:
        """``training/train.py`` by its config."""
        batch, steps = (2, (2, 4)) if self.tiny else (batch, steps)
        program = str(ROOT / "training" / "train.py")
        line = [program, "--config", self.config(name, batch, **changes)]
        self.program(name, line, batch, steps, watch)

    def theirs(
        self,
        name: str,
        batch: int,
        flags: str,
        steps: tuple[int, int] = (10, 50),
        script: str | None = None,
    ) -> None:
        """The peer's script."""
        script = script or self.peer
        if script is None:
            return self.say(name, left_out="no script was named")
        batch, steps, flags = (2, (2, 4), "") if self.tiny else (batch, steps, flags)
        line = f"{script} --pretrained_model_name_or_path {self.model} --train_data_dir"
        line += f" {self.images} --caption_column text --resolution {self.side} --center_crop"
        line += f" --train_batch_size {batch} --max_train_steps 1000000 --learning_rate 1e-5"
        line += f" --lr_warmup_steps 0 --output_dir {self.work / name} --seed 1"
        line += f" --checkpointing_steps 1000000 --lr_scheduler constant {flags}"
        self.program(name, line.split(), batch, steps)

    def trained(self, name: str, **changes: Any) -> list[float]:
        """The losses of a run that goes to its end."""
        file = self.config(name, 2, log_every=1, **changes)
        command = [sys.executable, str(ROOT / "training" / "train.py"), "--config", file]
        done = subprocess.run(
            command,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=max(self.left(), 1),
        )
        if done.returncode:
            last = [*done.stderr.strip().splitlines(), ""][-2:]
            raise RuntimeError(" ".join(last)[-400:])
        lines = (self.work / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def resume(self) -> None:
        """Whether four steps are two and two: losses, and weights at the end."""
        from safetensors.torch import load_file

        found = {}
        for name, turns in (("whole", (4,)), ("halves", (2, 4))):
            for duration in turns:
                told = {"duration": f"{duration} steps"}
                told["checkpoints"] = {"every": "2 steps", "keep": 2}
                losses = self.trained(f"resume-{name}", **told)
            (weights,) = (self.work / f"resume-{name}" / "final" / "unet").glob("*.safetensors")
            found[name] = losses, load_file(weights)
        (losses, whole), (again, halves) = found["whole"], found["halves"]
        apart = max(float((whole[n] - halves[n]).abs().max()) for n in whole)
        self.say("resume", losses_equal=losses == again, weights_apart=apart, losses=losses)

    def graphs(self) -> None:
        """Whether steps that are recorded have the losses of those that are not, with dropout."""
        if self.tiny:
            return self.say("graphs", left_out="there is no GPU")
        told = {"duration": "8 steps", "dropout": 0.1}
        plain, mine = (
            self.trained(f"graphs-{way}", cuda_graphs=way, **told) for way in (False, True)
        )
        apart = max(abs(a - b) for a, b in zip(plain, mine, strict=True))
        self.say("graphs", losses_equal=plain == mine, losses_apart=apart, losses=mine)

    def small(self) -> None:
        """The config of the model that ships, by itself, with steps that are recorded: on shapes
        alone, and with latents and text encoder of its own folder, since nothing is fetched.
        """
        import yaml

        settings = yaml.safe_load((ROOT / "configs" / "ldm_small.yaml").read_text())
        shipped, shapes = str(ROOT / "assets" / "ldm-small"), settings["data"][-1]
        settings |= {
            "run": str(self.work / "small"),
            "data": shapes,
            "vae": f"{shipped}/vae",
            "text": shipped,
            "duration": "10M images",
            "ema": None,
            "validation": None,
            "checkpoints": {"every": "10M images"},
            "cuda_graphs": not self.tiny,
        }
        if self.tiny:
            settings |= {"data": {**shapes, "count": 64}, "batch_size": 8, "precision": "float32"}
        program = str(ROOT / "training" / "train.py")
        line = [program, "--config", self.written("small", settings)]
        self.program("small", line, settings["batch_size"], (2, 4) if self.tiny else (100, 400))

    def variants(self) -> None:
        """A step of the U-Net, one change after another."""
        from gpu_step import CHANGES, variant

        for batch in (2,) if self.tiny else (8, 32):
            for name, how in CHANGES.items():
                compiles = bool(how.get("blocks"))
                if self.left() < (120 if compiles else 30) or (self.tiny and compiles):
                    self.say(f"variant: {name}", batch=batch, left_out="no time was left")
                    continue
                steps, cells = 4 if self.tiny else 13, self.side // 8
                found = variant(self.model / "unet", batch, cells, steps, how)
                self.say(f"variant: {name}", batch=batch, **found)

    # -- drawing --

    def sampling(self) -> None:
        """Our pipeline and the stock one on the same folder."""
        import torch
        from diffusers import StableDiffusionPipeline

        from ldm.pipeline import LatentDiffusionPipeline

        cuda = torch.cuda.is_available()
        wait = torch.cuda.synchronize if cuda else lambda: None
        steps, counts = (2, (1,)) if self.tiny else (30, (1, 8))
        dtype = torch.bfloat16 if cuda else torch.float32
        alone = {"safety_checker": None, "feature_extractor": None}
        pipes = [
            StableDiffusionPipeline.from_pretrained(self.model, dtype=dtype, **alone),
            LatentDiffusionPipeline.from_pretrained(self.model, dtype=dtype),
        ]
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
            pipe.to("cuda" if cuda else "cpu")
        stock, mine = pipes
        ways = [("stock", stock, {}), ("ours", mine, {})]
        ways += [(f"ours, {name}", mine, {"sampler": name}) for name in ("ddim", "dpm++")]
        for count in counts:
            for name, pipe, more in ways:
                if self.left() < 15:
                    return self.say(f"sampling: {name}", left_out="no time was left")
                call = {"num_inference_steps": steps, "output_type": "pt", **more}
                spent = []
                for _ in range(2 if self.tiny else 4):
                    begin = time.perf_counter()
                    pipe(["a picture of red cats"] * count, **call)
                    wait()
                    spent.append(time.perf_counter() - begin)
                found = {"seconds": median(spent[1:]), "images_s": count / median(spent[1:])}
                self.say(f"sampling: {name}", pictures=count, steps=steps, **found)

    def parts(self) -> dict[str, tuple[float, Callable[[], None]]]:
        """By name: the seconds that one may take, and the part."""
        mixed = "--mixed_precision bf16 --dataloader_num_workers 8"
        lora = {
            "lora": {"rank": 8},
            "frozen": "float32" if self.tiny else "bfloat16",
            "optimizer": {"lr": 1e-4},
        }
        light = {"optimizer": {"kind": "adafactor"}, "gradient_checkpointing": True}
        half = {**light, "weights": "float32" if self.tiny else "bfloat16"}
        backward = {"kind": "adafactor", "in_backward": True, "clip_norm": None}
        graphs = {"cuda_graphs": not self.tiny, "ema": None}
        short = (5, 20)
        return {
            "ceilings": (10, self.ceilings),
            "folder": (60, self.folder),
            "ours-8": (60, lambda: self.ours("ours-8", 8)),
            "peer-8": (60, lambda: self.theirs("peer-8", 8, mixed)),
            "ours-32": (60, lambda: self.ours("ours-32", 32, short)),
            "peer-32": (60, lambda: self.theirs("peer-32", 32, mixed, short)),
            "ours-8-compiled": (
                150,
                lambda: self.ours("ours-8-compiled", 8, compile="off" if self.tiny else "blocks"),
            ),
            "ours-waits": (40, lambda: self.ours("ours-waits", 8, (5, 10), watch=True)),
            "ours-lora": (40, lambda: self.ours("ours-lora", 8, (5, 30), **lora)),
            "peer-lora": (
                50,
                lambda: (
                    self.theirs("peer-lora", 8, f"{mixed} --rank 8", short, self.peer_lora)
                    if self.peer_lora
                    else self.say("peer-lora", left_out="no script was named")
                ),
            ),
            "ours-light": (40, lambda: self.ours("ours-light", 1, short, **light)),
            "ours-half": (40, lambda: self.ours("ours-half", 1, short, **half)),
            "ours-half-backward": (
                40,
                lambda: self.ours(
                    "ours-half-backward", 1, short, **{**half, "optimizer": backward}
                ),
            ),
            "ours-8-graphs": (60, lambda: self.ours("ours-8-graphs", 8, **graphs)),
            "small": (60, self.small),
            "graphs": (60, self.graphs),
            "sampling": (60, self.sampling),
            "resume": (60, self.resume),
            "variants": (60, self.variants),
        }


def main() -> None:
    """Runs all parts, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, help="folder of results.jsonl and logs")
    parser.add_argument("--peer", help="diffusers' train_text_to_image.py")
    parser.add_argument("--peer-lora", help="diffusers' train_text_to_image_lora.py")
    parser.add_argument("--seconds", type=float, default=570, help="after which nothing begins")
    parser.add_argument("--only", nargs="+", default=[], help="parts")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    asked = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(HERE)]
    benchmark = Benchmark(asked)
    parts = benchmark.parts()
    if unknown := set(asked.only) - parts.keys():
        parser.error(f"no parts: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    for name, (needs, run) in parts.items():
        if not asked.only or name in asked.only:
            benchmark.part(name, needs, run)
    benchmark.say("over", parts=asked.only or list(parts))


if __name__ == "__main__":
    main()
