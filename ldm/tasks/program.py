"""What the programs in training/ share: the processes, the data, the dry run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Generic, TypeVar

import torch
import transformers
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from ldm.config.loader import images, plain
from ldm.config.schema import RunConfig
from ldm.data.buckets import table
from ldm.data.collection import Collection
from ldm.engine import shards
from ldm.engine.batch import split_batch
from ldm.engine.memory import memory_of
from ldm.engine.precision import MIXED, compute_in, device_at_hand, named, settled
from ldm.engine.shutdown import WAIT
from ldm.engine.streaming import streamed
from ldm.engine.watch import WATCH
from ldm.errors import ConfigError, DataError
from ldm.families.build import parameters
from ldm.progress import main_process
from ldm.storage.cache_root import cache_root
from ldm.storage.disk import writing
from ldm.tasks import fitting
from ldm.tasks.command import Command, one_line
from ldm.tasks.costs import lines, most
from ldm.tasks.estimate import Step, trace

log = logging.getLogger(__name__)

C = TypeVar("C", bound=RunConfig)


def _launched_on_one_thread() -> bool:
    """Whether ``accelerate launch`` set OMP_NUM_THREADS to 1, its default for one process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1


def collect(config: RunConfig, accelerator: Accelerator | None = None) -> Collection:
    """The pictures of ``config``; which are left out, and why, goes into the run folder later.

    One process of each machine looks at them first, and the others find its index.
    """
    stream = streamed(config, accelerator.num_processes if accelerator else 1)
    if stream:
        return stream
    first = accelerator.local_main_process_first() if accelerator else nullcontext()
    with first, writing("the index of the data", cache_root(), "the same command begins again"):
        return Collection(config.data, config.images, config.on_bad_sample)


def copies() -> DistributedDataParallelKwargs:
    """How processes that hold whole copies sum gradients: where these lie, so that no second copy
    of them is held. (A static graph would save a search for unused parameters, which is not made.)
    """
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def connect(mixed_precision: str = "no", *, sharded: bool = False) -> Accelerator:
    """The processes that were started.

    Args:
        mixed_precision: in accelerate's words.
        sharded: whether the parameters may be in shards (FSDP).

    Raises:
        ConfigError: the launcher asks for what a run cannot be (DeepSpeed), or started processes
            that do not see each other.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(  # before accelerate asks for a package of that name
            "the launcher asks for DeepSpeed, which is not supported: use one process per device"
            " (DDP), or FSDP"
        )
    accelerator = Accelerator(
        # Without it accelerate leaves processes on CPUs unconnected, and takes a Mac's MPS,
        # which has no float64.
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=1,  # follows from the batch, not from the launcher
        # The others wait while the main process fills a cache or draws.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT), copies()],
    )
    if shards.asked_for():
        if not sharded:
            raise ConfigError("the launcher asks for FSDP: only training/train.py has it")
        shards.settle(accelerator)
    known = [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU]
    known += [DistributedType.FSDP] if sharded else []
    if accelerator.distributed_type not in known:
        raise ConfigError(
            f"the launcher asks for {accelerator.distributed_type.value}, which is not"
            " supported: use one process per device (DDP), or FSDP"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started but each sees {accelerator.num_processes}:"
            " launch with torchrun or accelerate launch --multi_gpu"
        )
    if accelerator.device.type == "cpu" and started == 1 and _launched_on_one_thread():
        torch.set_num_threads(os.cpu_count() or 1)
    WATCH.start(accelerator.process_index, accelerator.num_processes)
    return accelerator


def run(
    command: Command[C],
    train: Callable[[C, Accelerator], Path],
    step: Callable[[C], Step],
    *,
    sharded: bool = False,
) -> None:
    """Does what a command line asks for.

    Args:
        command: what was asked for.
        train: trains, and returns the folder of the result.
        step: of a dry run, what a step computes.
        sharded: whether the parameters may be in shards (FSDP).
    """
    program = Program(command)
    if command.dry_run:
        program.report(step, command)
    else:
        accelerator = program.accelerator(sharded=sharded)
        train(program.config, accelerator)
        # Ends the process groups, which NCCL warns of otherwise.
        accelerator.end_training()


class Program(Generic[C]):
    """What a program does with its command line.

    Args:
        command: what was asked for.
    """

    def __init__(self, command: Command[C]) -> None:
        transformers.utils.logging.disable_progress_bar()  # one would cross the run's own
        # Nothing is left to the machine from here on.
        self.config, self.told, slow = settled(command.config, device_at_hand())
        for warning in slow if main_process() else ():
            log.warning(warning)

    def accelerator(self, *, sharded: bool = False) -> Accelerator:
        """The processes and the precision of the run.

        Args:
            sharded: whether the parameters may be in shards (FSDP).

        Raises:
            ConfigError: the launcher asks for what a run cannot be (DeepSpeed), or started
                processes that do not see each other, or whose precision differs.
        """
        try:
            accelerator = connect(MIXED[self.config.precision], sharded=sharded)
        finally:
            # torch puts a hook in front that collects what ours prints and shows it when ours
            # returns: it does not, and the line would be lost.
            sys.excepthook = one_line
        compute_in(self.config.precision)
        split_batch(self.config, accelerator.num_processes)
        number = torch.tensor([list(MIXED).index(self.config.precision)], device=accelerator.device)
        if len(accelerator.gather(number).unique()) > 1:
            raise ConfigError("precision: auto is not the same on all machines of the run: set it")
        several = "es" * (accelerator.num_processes > 1)
        accelerator.print(
            f"on {named(accelerator.device)}, {accelerator.num_processes} process{several};",
            ", ".join(f"{key} {value}" for key, value in self.told.items()),
        )
        return accelerator

    def report(self, make: Callable[[C], Step], command: Command[C]) -> None:
        """Prints the resolved config, parameter counts, the lengths in images, what it costs, and
        what other settings would.

        Data that is not there yet does not keep the rest from being told.

        Args:
            make: makes what a step computes.
            command: names bytes that it has to fit into, or a GPU; neither: those of the GPU at
                hand, and where it fits into them what takes long to count is not told.
        """
        config, step = self.config, make(self.config)
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        for key, value in self.told.items():
            print(f"{key:>12}: {value}")
        for name, network in step.networks.items():
            print(f"{name:>12}: {parameters(network):>15,} parameters")
        data = self._lengths()
        if _launched_on_one_thread():  # as ``accelerator`` does for the run
            torch.set_num_threads(os.cpu_count() or 1)
        share, micro = split_batch(config, 1)
        cost = trace(config, step, micro, share // micro)
        told = [*lines(config, step, cost, (share, micro), data)]
        if command.gpu is not None:
            told.append(most(command.config.precision, cost, share, command.gpu))
        memory, there = command.memory, memory_of(device_at_hand())
        if memory is None and there is not None and cost.memory > there:
            memory = there
        for name, value, counted in (*told, *fitting.lines(config, step, make, cost, memory)):
            print(f"{name:>12}: {value:>15}  {counted}")

    def _lengths(self) -> tuple[int, int, int] | None:
        """Prints the lengths; returns pictures, entries in a cache, captions, if they are there."""
        config = self.config
        try:
            collection = collect(config)
        except DataError as error:
            print(f"{'pictures':>12}: cannot be counted, {error}")
            return None
        if collection.epoch is None:
            total = images(config.duration, config.batch_size, None)
            print(f"{'pictures':>12}: unknown, a stream is not counted")
            print(f"{'run':>12}: {total:>15,} images, {total // config.batch_size:,} steps")
            return None
        if config.images.buckets:
            print(table(collection.train.shapes))
        epoch, held_out = len(collection.train), len(collection.held_out)
        total = images(config.duration, config.batch_size, epoch)
        print(f"{'pictures':>12}: {epoch:>15,} to train on, {held_out:,} held out")
        print(f"{'epoch':>12}: {epoch:>15,} images, {epoch / config.batch_size:,.1f} steps")
        print(
            f"{'run':>12}: {total:>15,} images, {total // config.batch_size:,} steps,"
            f" {total / epoch:,.1f} epochs"
        )
        return epoch, epoch * len(config.images.views), len(collection.captions())
