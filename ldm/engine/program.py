"""What the programs in training/ share: the command line, one-line errors, the dry run."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import nullcontext
from types import TracebackType
from typing import Generic, TypeVar

import torch
import transformers
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs

from ldm.data.buckets import table
from ldm.data.collection import Collection
from ldm.data.source import DataError, cache_root
from ldm.engine import shards
from ldm.engine.batch import split_batch
from ldm.engine.checkpoint import CheckpointError
from ldm.engine.config import ConfigError, images, load, plain
from ldm.engine.disk import writing
from ldm.engine.ending import WAIT
from ldm.engine.estimate import Step, lines
from ldm.engine.fault import RunError, ToldElsewhere
from ldm.engine.interrupt import REQUESTS, STOPPED, Interrupted
from ldm.engine.parts import parameters
from ldm.engine.precision import MIXED, device_at_hand, named, settled
from ldm.engine.schema import RunConfig
from ldm.engine.state import OtherRunError
from ldm.engine.streaming import streamed
from ldm.engine.trackers import require
from ldm.models.attention import BackendError
from ldm.progress import listen, main_process

log = logging.getLogger(__name__)

C = TypeVar("C", bound=RunConfig)
USER_ERRORS = (ConfigError, DataError, CheckpointError, RunError, BackendError)


ENDS = f"""exit status:
  0   the run is over
  2   a mistake or a fault, which one line on stderr names
  {STOPPED}  SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 asked the run to stop: it has finished its step and
      saved a checkpoint, from which the same command goes on; a second signal ends it at once

torchrun and accelerate launch make 1 of every status but 0. torchrun hands SIGTERM and SIGINT on
(SIGUSR1 with --signals-to-handle=SIGTERM,SIGINT,SIGUSR1) and kills what is not over 30 seconds
later; accelerate launch does not hand them on to a single process: start one with python.
"""


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tells a user's mistake, or a signal, in one line; a traceback is for bugs."""
    line, status = None, 2
    if isinstance(error, Interrupted):
        line, status = f"stopped: {error}" if str(error) else "", STOPPED
    elif isinstance(error, ToldElsewhere):
        line = ""
    elif isinstance(error, OtherRunError):
        line = f"error: {error}"  # one line for each key
    elif isinstance(error, USER_ERRORS):
        # What a DataLoader's worker raised comes with its traceback in the text.
        line = (str(error).strip().splitlines() or [""])[-1]
        line = "error: " + line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
    elif _left_alone(error):
        line = "error: another process of the run has ended, and what it said before tells why"
    if line is None:
        sys.__excepthook__(kind, error, trace)
        return
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _left_alone(error: BaseException) -> bool:
    """Whether a collective failed because a process that takes part in it is gone."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return (
        isinstance(error, RuntimeError)
        and torch.distributed.is_initialized()
        and any(text in str(error) for text in gone)
    )


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
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
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
    return accelerator


class Program(Generic[C]):
    """The command line ``--config FILE [--dry-run] a.b=c ...``.

    Args:
        schema: class of the config.
        description: shown by ``--help``.
    """

    def __init__(self, schema: type[C], description: str | None) -> None:
        sys.excepthook = _one_line
        transformers.utils.logging.disable_progress_bar()  # one would cross the run's own
        listen()
        parser = argparse.ArgumentParser(
            description=description,
            epilog=ENDS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--config", required=True, help="YAML file of the run")
        parser.add_argument("--dry-run", action="store_true", help="show what would run, and stop")
        parser.add_argument(
            "overrides", nargs="*", metavar="a.b=c", help="change keys of the config"
        )
        arguments = parser.parse_args()
        REQUESTS.listen()
        config = load(schema, arguments.config, arguments.overrides)
        require(config.trackers)
        # Nothing is left to the machine from here on.
        self.config, self.told, slow = settled(config, device_at_hand())
        for warning in slow if main_process() else ():
            log.warning(warning)
        self.dry_run: bool = arguments.dry_run

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
            sys.excepthook = _one_line
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

    def report(self, step: Step) -> None:
        """Prints the resolved config, parameter counts, the lengths in images, and what it costs.

        Data that is not there yet does not keep the rest from being told.
        """
        config = self.config
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        for key, value in self.told.items():
            print(f"{key:>12}: {value}")
        for name, network in step.networks.items():
            print(f"{name:>12}: {parameters(network):>15,} parameters")
        data = self._lengths()
        if _launched_on_one_thread():  # as ``accelerator`` does for the run
            torch.set_num_threads(os.cpu_count() or 1)
        for name, value, counted in lines(config, step, split_batch(config, 1), data):
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
        return epoch, epoch * config.images.variants, len(collection.captions())
