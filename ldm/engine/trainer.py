"""The loop of every training program.

A run is a pure function of its config and its data. Its only counter is ``images``, how many have
been seen: the order, the draws, the learning rate and the averages follow from it, so that to go on
from a checkpoint is to start the same loop at another number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.data.collection import Collection
from ldm.data.order import positions
from ldm.diffusion import stream
from ldm.engine import checkpoint, state
from ldm.engine.checkpoint import CheckpointError
from ldm.engine.config import ConfigError, images
from ldm.engine.ema import Average, decay
from ldm.engine.metrics import Metrics
from ldm.engine.record import SKIPPED, write_record, write_skipped
from ldm.engine.schema import AdamW, RunConfig


class RunError(RuntimeError):
    """The run cannot go on; the message is one line."""


class Task(Protocol):
    """What a program trains: a module that turns a micro-batch into losses, and its folder
    format.
    """

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by stable names."""
        ...

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per-sample tensors of shape ``b``; ``loss`` is what is minimised, the others are
        logged.
        """
        ...

    def validate(self, accelerator: Accelerator, folder: Path, images: int) -> dict[str, float]:
        """Measures on held-out data with the weights as they are; pictures go into ``folder``."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the weights as they are, with everything needed to use them, into ``folder``."""
        ...

    def finish(self, folder: Path) -> None:
        """Writes what the run is for into ``folder``, at its end: ``save``, or more."""
        ...

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        """The trained parameters of a folder that ``save`` wrote."""
        ...


def learning_rate(config: AdamW, seen: int, warmup: int, total: int) -> float:
    """Learning rate of the batch that starts at image ``seen``, for lengths in images."""
    if seen < warmup:
        return config.lr * (seen + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    done = (seen - warmup) / max(total - warmup, 1)
    falling = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final + (1 - config.final) * falling)


class Trainer:
    """Runs ``task`` over ``dataset`` as ``config`` says.

    As soon as it is made it goes on from the newest complete checkpoint of the run, if there is
    one: whatever does not fit is known before anything expensive begins.

    Args:
        config: the run.
        task: an ``nn.Module`` that is a ``Task``.
        dataset: map-style; item ``n`` is the n-th image of the run with all its draws.
        collection: its training pictures are an epoch.
        accelerator: the processes and the precision.

    Raises:
        CheckpointError: the run folder's checkpoints cannot be gone on from.
        ConfigError: the batch does not divide.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        dataset: Dataset[Any],
        collection: Collection,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.task, self.dataset = config, task, dataset
        self.epoch = epoch = len(collection.train)
        self.skipped = collection.skipped
        self.identity = state.identity(config, collection)
        self.accelerator = accelerator
        self.batch = config.batch_size
        self.share, self.micro = split_batch(config, accelerator.num_processes)
        self.total = images(config.duration, self.batch, epoch)
        self.weights = task.trained()
        self.ema = Average(self.weights) if config.ema else None
        flat = [p for p in self.weights.values() if p.ndim < 2]
        deep = [p for p in self.weights.values() if p.ndim >= 2]
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [{"params": deep}, {"params": flat, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.seen = 0
        self.window: dict[str, float] = {}  # sums since the last line of the metrics, and images
        # This process's sums, a step each, not yet in the window.
        self.pending: list[dict[str, Tensor]] = []
        self.run = Path(config.run)
        self.metrics = Metrics(self.run / "metrics.jsonl")
        self._resume()

    # -- the loop --

    def fit(self) -> Path:
        """Trains to the end and returns ``RUN/final``, which ``task.finish`` wrote."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            write_record(self.run, config)
            write_skipped(self.run, self.skipped)
            self.metrics.cut(self.seen)
        # The optimiser stays where it is: AdamW counts its steps on the CPU.
        model, optimizer = accelerator.prepare(
            self.task, self.optimizer, device_placement=[True, False]
        )
        micro_batches = self._loader()
        accumulate = self.share // self.micro
        every_checkpoint = images(config.checkpoints.every, self.batch, self.epoch)
        validation = config.validation
        every_validation = images(validation.every, self.batch, self.epoch) if validation else 0
        warmup = images(config.optimizer.warmup, self.batch, self.epoch)
        model.train()
        clock, since = time.perf_counter(), self.seen
        with self._progress() as progress:
            bar = progress.add_task("training", total=self.total, completed=self.seen, note="")
            while self.seen < self.total:
                rate = learning_rate(config.optimizer, self.seen, warmup, self.total)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                sums: dict[str, Tensor] = {}
                for part in range(accumulate):
                    batch = next(micro_batches)
                    # For dropout, whether a module or a function: what the images meet depends on
                    # the first one's number.
                    first = int(batch["position"][0])
                    torch.manual_seed(int(stream(config.seed, "network", first).integers(2**63)))
                    batch = {name: value.to(accelerator.device) for name, value in batch.items()}
                    last = part == accumulate - 1
                    with nullcontext() if last else accelerator.no_sync(model):
                        terms = model(batch)
                        # DDP averages over ranks: a share's mean becomes the global batch's.
                        accelerator.backward(terms["loss"].sum() / self.share)
                    for name, term in terms.items():
                        sums[name] = sums.get(name, 0.0) + term.detach().double().sum()
                norm = accelerator.clip_grad_norm_(
                    self.weights.values(), config.optimizer.clip_norm
                )
                optimizer.step()
                optimizer.zero_grad()
                self.seen += self.batch
                if self.ema and config.ema:
                    half_life = images(config.ema.half_life, self.batch, self.epoch)
                    self.ema.update(decay(self.batch, self.seen, half_life, config.ema.ramp))
                self.pending.append(sums)
                progress.advance(bar, self.batch)
                step, end = self.seen // self.batch, self.seen >= self.total
                if step % config.log_every == 0 or end:
                    speed = (self.seen - since) / (time.perf_counter() - clock)
                    self._log(float(norm), rate, speed)
                    progress.update(bar, note=f"loss {self.last_loss:.4f}  {speed:.0f} images/s")
                    clock, since = time.perf_counter(), self.seen
                if validation and (self.seen % every_validation == 0 or end):
                    self._validate(progress)
                    clock, since = time.perf_counter(), self.seen
                if self.seen % every_checkpoint == 0 or end:
                    self._save()
        return self._final()

    def _loader(self):
        sampler = positions(
            self.seen,
            batch=self.batch,
            micro=self.micro,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            stop=self.total,
        )
        return iter(
            DataLoader(self.dataset, batch_sampler=sampler, num_workers=self.config.workers)  # type: ignore[arg-type]
        )

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not self.accelerator.is_main_process,
        )

    # -- what is written --

    def _gather(self) -> None:
        """Moves pending losses into the window: one collective for many steps, and no host sync in
        between. Step by step, so that the sum does not depend on when it is taken.
        """
        if self.pending:
            names = list(self.pending[0])
            rows = torch.stack([torch.stack([*sums.values()]) for sums in self.pending])
            for row in self.accelerator.reduce(rows, "sum").tolist():
                for name, value in (*zip(names, row, strict=True), ("images", self.batch)):
                    self.window[name] = self.window.get(name, 0.0) + value
            self.pending = []
        if not math.isfinite(self.window.get("loss", 0.0)):
            raise RunError(
                f"the loss is {self.window['loss']} within the {self.window['images']:.0f} images"
                f" before image {self.seen}: lower optimizer.lr, or look at these pictures;"
                " the last checkpoint is from before"
            )

    def _log(self, norm: float, rate: float, speed: float) -> None:
        self._gather()
        count = self.window.pop("images")
        means = {name: total / count for name, total in self.window.items()}
        self.last_loss, self.window = means["loss"], {}
        self._write(
            **means,
            gradient_norm=norm,
            learning_rate=rate,
            images_per_second=round(speed, 2),
        )

    def _write(self, **values: Any) -> None:
        if self.accelerator.is_main_process:
            self.metrics.write(images=self.seen, step=self.seen // self.batch, **values)

    def _averaged(self):
        return self.ema.in_front() if self.ema else nullcontext()

    def _validate(self, progress: Progress) -> None:
        folder = self.run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with self._averaged(), _evaluating(self.task):  # type: ignore[arg-type]
            measured = self.task.validate(self.accelerator, folder, self.seen)
        if measured:
            self._write(**measured)
            told = "  ".join(f"{k} {v:.4g}" for k, v in measured.items() if "/" not in k)
            progress.console.print(f"{self.seen:>10} images: {told}")

    def _save(self) -> None:
        self._gather()
        if self.accelerator.is_main_process:
            root = self.run / "checkpoints"
            checkpoint.write_folder(root / checkpoint.name_of(self.seen), self._write_state)
            checkpoint.rotate(root, self.config.checkpoints.keep, self.seen)
        self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path) -> None:
        with self._averaged():
            self.task.save(folder)
        counters = {"images": self.seen, "window": self.window, "identity": self.identity}
        state.write(folder / "training", self.weights, self.optimizer, counters)

    def _final(self) -> Path:
        final = self.run / "final"
        if self.accelerator.is_main_process:
            with self._averaged():
                checkpoint.write_folder(final, self.task.finish)
        self.accelerator.wait_for_everyone()
        if self.skipped:
            self.accelerator.print(
                f"{len(self.skipped)} pictures or rows were left out: {self.run / SKIPPED}"
            )
        return final

    # -- going on --

    def _resume(self) -> None:
        root = self.run / "checkpoints"
        if self.config.resume == "never":
            if checkpoint.folders(root):
                raise CheckpointError(
                    f"{root} already has checkpoints: set resume to auto to go on, or choose"
                    " another run"
                )
            folder = None
        else:
            folder = checkpoint.newest(root)
        if folder is not None:
            self._load(folder)
            self.accelerator.print(f"going on from {folder}")
        elif checkpoint.folders(root):
            raise CheckpointError(
                f"{root}: none of its checkpoints is whole; remove it to start the run anew"
            )
        everywhere = self.accelerator.gather(
            torch.tensor([self.seen], device=self.accelerator.device)
        )
        if len(everywhere.unique()) > 1:
            raise CheckpointError(
                f"the processes find different checkpoints in {root} (after {everywhere.tolist()}"
                " images): the run folder must be shared by all machines"
            )

    def _load(self, folder: Path) -> None:
        state.check_identity(folder / "training", self.identity)
        counters = state.read(folder / "training", self.weights, self.optimizer)
        if self.ema:
            averaged = self.task.read(folder)
            state.check_shapes(averaged, self.weights, folder)
            self.ema.load(averaged)
        self.seen, self.window = counters["images"], counters["window"]


class _evaluating:
    """Evaluation mode, and back to training mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train()


def split_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """Images per process and per micro-batch; ``ConfigError`` where they do not divide."""
    if config.batch_size % world:
        raise ConfigError(f"batch_size {config.batch_size} does not divide over {world} processes")
    share = config.batch_size // world
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        raise ConfigError(
            f"micro_batch_size {micro} does not divide the {share} images of each process"
            f" (batch_size {config.batch_size} over {world})"
        )
    return share, micro
