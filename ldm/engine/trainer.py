"""The loop of every training program.

A run is a pure function of its config and its data. Its only counter is ``images``, how many have
been seen: the order, the draws, the learning rate and the averages follow from it, so that to go on
from a checkpoint is to start the same loop at another number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.config.loader import images
from ldm.config.provenance import SKIPPED, check_folder, write_record, write_skipped
from ldm.config.schema import Resume, RunConfig
from ldm.data.collection import Collection
from ldm.data.order import positions
from ldm.engine import memory, nonfinite, optimizer_state, pieces, shards, signals, state
from ldm.engine.batch import split_batch
from ldm.engine.counters import check_shapes, readable
from ldm.engine.ema import Average, averages
from ldm.engine.gradient import Gradient
from ldm.engine.metrics import Metrics
from ldm.engine.nonfinite import Step
from ldm.engine.optimizer import learning_rate, optimizer_of, set_rate
from ldm.engine.saving import Saver
from ldm.engine.scaling import LossScale
from ldm.engine.shutdown import Coordinator
from ldm.engine.task import Draws, Task, evaluating
from ldm.engine.trackers import Trackers
from ldm.engine.transfer import transferred
from ldm.engine.window import Window
from ldm.engine.workers import loader, reading
from ldm.errors import CheckpointError, RunError, ToldElsewhere
from ldm.evaluation.sheets import sheet_name
from ldm.progress import Progress
from ldm.storage import checkpoint, disk


class Trainer:
    """Runs ``task`` over ``draws`` as ``config`` says.

    As soon as it is made it goes on from the newest complete checkpoint of the run, if there is
    one: whatever does not fit is known before anything expensive begins.

    Args:
        config: the run.
        task: an ``nn.Module`` that is a ``Task``.
        draws: map-style; item ``n`` is the n-th image of the run with all its draws.
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
        draws: Draws,
        collection: Collection,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.task, self.draws = config, task, draws
        self.epoch, self.collection = collection.epoch, collection
        self.identity = state.identity(config, collection, task.origin)
        self.accelerator = accelerator
        self.batch = config.batch_size
        self.share, self.micro = split_batch(config, accelerator.num_processes)
        self.total = images(config.duration, self.batch, self.epoch)
        self.optimizer = optimizer_of(task.trained(), config.optimizer, config.seed)
        parts, world = self.share // self.micro, accelerator.num_processes
        pieces.prepare(config, self.optimizer, world, parts, sharded=accelerator.is_fsdp2)
        self.model, self.stepper = shards.prepare(accelerator, task, self.optimizer)  # type: ignore
        self.weights = task.trained()
        self.ema = task.average = averages(config, self.weights, collection)
        self.scale = LossScale(accelerator.scaler, self.optimizer)
        known = self.weights, self.optimizer, self.scale, task.memory
        self.gradient = Gradient(config, accelerator, self.model, *known, parts=parts)
        # Reading a number every step makes the host wait for a GPU, and costs a CPU nothing.
        self.prompt = accelerator.device.type == "cpu" or config.nonfinite.action == "skip"
        self.prompt |= self.scale.scaler is not None
        self.seen, self.skipped = 0, 0  # images, steps
        self.window = Window(self.batch, accelerator)
        self.changes: list[dict[str, Any]] = []  # keys that resume.allow let change
        self.run = Path(config.run)
        check_folder(self.run)
        self.coordinator = Coordinator(accelerator, self.run)
        self.saver = Saver(self.coordinator, self.run / "checkpoints", config.checkpoints.keep)
        self.metrics = Metrics(self.run / "metrics.jsonl")
        self._resume()
        self.trackers = Trackers(config, accelerator, self.seen)

    # -- the loop --

    def fit(self) -> Path:
        """Trains to the end and returns ``RUN/final``, which ``task.finish`` wrote.

        Raises:
            Interrupted: a signal asked for it, and a checkpoint is written.
            RunError: a loss is not a number, or the disk takes no more.
        """
        full = memory.told(self.accelerator.device, self.micro)
        with signals.REQUESTS.kept(), self.trackers, self.saver, full:
            self._fit()
            final = self._final()
            if signals.REQUESTS.by:  # while that was written
                self.coordinator.stop(f"training was over, and its result is in {final}")
        return final

    def _fit(self) -> None:
        config = self.config
        self.coordinator.on_main("the record of the run", self.run, self._start)
        every_checkpoint = images(config.checkpoints.every, self.batch, self.epoch)
        validation = config.validation
        every_validation = images(validation.every, self.batch, self.epoch) if validation else 0
        warmup, cooldown = (
            length and images(length, self.batch, self.epoch)
            for length in (config.optimizer.warmup, config.optimizer.cooldown)
        )
        self.model.train()
        clock, since = time.perf_counter(), self.seen
        with (
            reading(self._loader()) as read,
            Progress("training", "images", self.total, done=self.seen) as progress,
        ):
            micro_batches = transferred(read, self.accelerator.device)
            while self.seen < self.total:
                rate = learning_rate(config.optimizer, self.seen, warmup, self.total, cooldown)
                rates = set_rate(self.optimizer, rate, self.seen)
                step = self._gradient(micro_batches)
                self.task.memory.update(self.accelerator)
                number = self.seen // self.batch + 1
                end = self.seen + self.batch >= self.total
                due = number % config.log_every == 0 or end
                wrong = self.prompt and not step.finite()
                self.saver.check()
                stopping, wrong = self.coordinator.sync(wrong=wrong)
                if wrong:
                    self._skip(step)
                else:
                    self.stepper.step()
                    self.window.pending.append(step)
                self.gradient.clear()
                self.seen += self.batch
                if self.ema and not wrong:
                    self.ema.update(self.batch, self.seen)
                if due:
                    speed = (self.seen - since) / (time.perf_counter() - clock)
                    progress.note = self._log(rates, speed)
                    clock, since = time.perf_counter(), self.seen
                progress.advance(self.batch)
                if stopping:  # first of all: there may be little time
                    self._save()
                if validation and self.coordinator.due(self.seen % every_validation == 0 or end):
                    self._validate()
                    clock, since = time.perf_counter(), self.seen
                if not stopping and (self.seen % every_checkpoint == 0 or end):
                    stopping = self._save(later=not end)
                if stopping:
                    if self.ema and self.ema.chosen_at == self.seen:
                        self._save()  # once more, with the choice
                    self.coordinator.stop(
                        f"all {self.seen} images seen so far are in {self.coordinator.saved}"
                    )

    def _gradient(self, micro_batches: Iterator[Any]) -> Step:
        """The gradient of the next global batch, clipped."""
        return self.gradient(micro_batches, self.seen)

    def _loader(self) -> DataLoader[Any]:
        sampler = positions(
            self.seen,
            batch=self.batch,
            micro=self.micro,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            stop=self.total,
        )
        return loader(self.draws, sampler, self.config.workers, self.accelerator.device)

    # -- a step that is no step --

    def _skip(self, step: Step) -> None:
        """Counts a step that is not applied. But where its gradient was only scaled too much for
        float16, one too many, or the first, ends the run.
        """
        if self.scale.overflowed(step, self.coordinator):
            self._write(self.seen + self.batch, overflow=self.scale.told())
            return
        found = self._evidence(step)
        settings = self.config.nonfinite
        if settings.action == "stop" or self.skipped == settings.at_most:
            self._fail(found)
        self.skipped += 1
        told = {name: found[name] for name in ("loss", "gradient_norm")}
        told |= {"worst": nonfinite.worst(found, 3), "skipped_steps": self.skipped}
        self._write(found["images"][1] + 1, skipped=told)

    def _evidence(self, step: Step) -> dict[str, Any]:
        def key(position: int) -> str:
            return self.draws.item(position).example.key

        return nonfinite.evidence(step, self.batch, key, self.accelerator)

    def _fail(self, found: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            raise ToldElsewhere()
        file = self.run / "fault.json"
        with disk.writing(file.name, self.run, self.coordinator.then()):
            disk.write_text(file, json.dumps(found, indent=1, ensure_ascii=False))
        skipped = f"{self.skipped} steps were skipped before it; " if self.skipped else ""
        raise RunError(
            f"{nonfinite.told(found)}; {skipped}lower optimizer.lr, or look at these pictures (all"
            f" are in {file}); the last checkpoint is from before"
        )

    # -- what is written --

    def _start(self) -> None:
        write_record(self.run, self.config, self.changes)
        write_skipped(self.run, self.collection.skipped)
        self.metrics.cut(self.seen)

    def _gather(self) -> None:
        wrong = self.window.gather()
        if wrong:
            self._fail(self._evidence(wrong))

    def _log(self, rates: dict[str, float], speed: float) -> str:
        """Writes the means since the last line; returns what the progress bar shows of them."""
        self._gather()
        means = self.window.means()
        if not means:
            return "every step was skipped"
        self._write(
            self.seen,
            **means,
            **rates,
            **self.scale.told(),
            images_per_second=round(speed, 2),
        )
        return f"loss {means['loss']:.4f}"

    def _write(self, seen: int, **values: Any) -> None:
        def write() -> None:
            self.metrics.write(images=seen, step=seen // self.batch, **values)
            self.trackers.log(seen, values)

        self.coordinator.on_main("a line of metrics.jsonl", self.run, write)

    @contextmanager
    def _whole(self) -> Iterator[Mapping[str, Tensor]]:
        """The average in front, and on the main process in one piece: to be saved. All processes
        enter it; the weights as they are in training are handed out.
        """
        module: Any = self.task
        average = self.ema.model.in_front() if self.ema else nullcontext(self.weights)
        with average as raw:
            with shards.written(module, here=self.accelerator.is_main_process):
                yield raw

    def _validate(self) -> None:
        folder, measured = self.run / "samples", {}
        what = "the sample pictures"
        self.coordinator.on_main(what, folder, lambda: folder.mkdir(parents=True, exist_ok=True))
        # Pictures are written by one process once all have measured.
        with self.coordinator.kept(what, folder):
            told: dict[str, float] = {}
            if self.ema:
                told = self.ema.choose(self.seen, lambda a: self._measure(a)["held_out_loss"])
            measured = self._measure(self.ema and self.ema.model, folder) | told
            self.trackers.show(sheet_name(folder, self.seen), self.seen)
        if measured and self.accelerator.is_main_process:
            self._write(self.seen, **measured)
            shown = [f"{k} {v:.4g}" for k, v in measured.items() if "/" not in k]
            told = "  ".join(shown or [f"measured, see {self.metrics.file}"])
            print(f"{self.seen:>10} images: {told}", flush=True)

    def _measure(self, average: Average | None, folder: Path | None = None) -> dict[str, float]:
        module: Any = self.task
        front = average.in_front() if average else nullcontext()
        with front, shards.gathered(module, self.accelerator), evaluating(module):
            return self.task.validate(self.accelerator, folder, self.seen)

    def _save(self, *, later: bool = False) -> bool:
        """Writes a checkpoint, or lets it be written ``later``, beside the steps, from copies;
        returns whether any process was asked to stop meanwhile.
        """
        self._gather()
        self.saver.wait()
        writes, others = self.accelerator.is_main_process, self.ema.others if self.ema else {}
        later &= writes and not self.accelerator.is_fsdp2
        counters = self._counters()
        with self._whole() as raw:
            snapshot = self.task.snapshot() if later else None
            copies, known = snapshot is not None, (self.weights, raw, self.optimizer, others)
            found = state.collect(*known, here=writes, copies=copies)

            def fill(folder: Path) -> None:
                (snapshot or self.task.save)(folder)
                state.write(folder / "training", found, counters)

            (self.saver.write_later if snapshot else self.saver.write)(self.seen, fill)
        return self.coordinator.sync()[0]  # the others wait here until it is written

    def _counters(self) -> dict[str, Any]:
        return {
            "images": self.seen,
            "window": dict(self.window.sums),
            "skipped": self.skipped,
            "changes": self.changes,
            "memory": self.task.memory.state(),
            "identity": self.identity,
            "average": self.ema and self.ema.choice,
            "scale": self.scale.state(),
            "attention": getattr(self.config, "attention", None),
            "optimizer": optimizer_state.told(self.optimizer),
        }

    def _final(self) -> Path:
        final, left_out = self.run / "final", self.collection.skipped

        def write() -> None:
            write_skipped(self.run, left_out)  # of a stream all are known only now
            checkpoint.write_folder(final, self.task.finish)

        with self._whole():
            self.coordinator.on_main("the result", self.run, write)
        self.coordinator.sync()
        if left_out:
            told = f"{len(left_out)} pictures or rows were left out"
            self.accelerator.print(f"{told}: {self.run / SKIPPED}")
        return final

    # -- going on --

    def _resume(self) -> None:
        root = self.run / "checkpoints"
        never, folders = self.config.resume == "never", checkpoint.folders(root)
        if never and folders:
            told = f"{root} already has checkpoints: set resume to auto to go on, or choose"
            raise CheckpointError(f"{told} another run")
        folder = None if never else checkpoint.newest(root)
        if folder is not None:
            with readable(folder):
                self._load(folder)
            self.accelerator.print(f"going on from {folder}")
        elif folders:
            raise CheckpointError(
                f"{root}: none of its checkpoints is whole; remove it to start the run anew"
            )
        state.same_everywhere(root, self.seen, self.identity, self.accelerator)

    def _load(self, folder: Path) -> None:
        resume, there = self.config.resume, folder / "training"
        allowed = resume.allow if isinstance(resume, Resume) else ()
        changes = state.changes(there, self.config, self.identity, allowed, self.epoch)
        counters = state.read(there, self.weights, self.optimizer)
        if self.ema:
            averaged, half_lives = self.task.read(folder), self.ema.members
            check_shapes(averaged, self.weights, folder)
            others = state.averages(there, half_lives, self.weights)
            self.ema.load(counters.get("average"), averaged, others)
        self.seen, self.window.sums = counters["images"], counters["window"]
        if self.seen % self.batch:
            raise CheckpointError(
                f"{folder} lies after {self.seen} images, which are no whole batches of batch_size"
                f" {self.batch}: choose one that divides them"
            )
        self.skipped, self.coordinator.saved = counters.get("skipped", 0), folder
        self.task.memory.load(counters.get("memory"))
        self.scale.load(counters.get("scale"))
        told = [{"images": self.seen, **change} for change in changes]
        self.changes = counters.get("changes", []) + told
