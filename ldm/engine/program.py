"""What the programs in training/ share: the command line, one-line errors, the dry run."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Generic, TypeVar

import transformers
import yaml
from accelerate import Accelerator
from torch import nn

from ldm.data.collection import Collection
from ldm.data.source import DataError
from ldm.engine.checkpoint import CheckpointError
from ldm.engine.config import ConfigError, images, load, plain
from ldm.engine.parts import parameters
from ldm.engine.schema import RunConfig
from ldm.engine.trainer import RunError, split_batch
from ldm.models.attention import BackendError

C = TypeVar("C", bound=RunConfig)
USER_ERRORS = (ConfigError, DataError, CheckpointError, RunError, BackendError)


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tells a user's mistake in one line; a traceback is for bugs."""
    if isinstance(error, USER_ERRORS):
        # What a DataLoader's worker raised comes with its traceback in the text.
        line = (str(error).strip().splitlines() or [""])[-1]
        line = line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        print(f"error: {line}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


class Program(Generic[C]):
    """The command line ``--config FILE [--dry-run] a.b=c ...``.

    Args:
        schema: class of the config.
        description: shown by ``--help``.
    """

    def __init__(self, schema: type[C], description: str | None) -> None:
        sys.excepthook = _one_line
        transformers.utils.logging.disable_progress_bar()  # one would cross the run's own
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--config", required=True, help="YAML file of the run")
        parser.add_argument("--dry-run", action="store_true", help="show what would run, and stop")
        parser.add_argument(
            "overrides", nargs="*", metavar="a.b=c", help="change keys of the config"
        )
        arguments = parser.parse_args()
        self.config: C = load(schema, arguments.config, arguments.overrides)
        self.dry_run: bool = arguments.dry_run

    def accelerator(self) -> Accelerator:
        """The processes and the precision of the run."""
        accelerator = Accelerator(
            mixed_precision="bf16" if self.config.precision == "bfloat16" else "no"
        )
        split_batch(self.config, accelerator.num_processes)
        return accelerator

    def report(self, networks: Mapping[str, nn.Module]) -> None:
        """Prints the resolved config, parameter counts, and the lengths in images.

        Data that is not there yet does not keep the rest from being told.
        """
        config = self.config
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        for name, network in networks.items():
            print(f"{name:>12}: {parameters(network):>15,} parameters")
        try:
            collection = Collection(config.data)
        except DataError as error:
            print(f"{'pictures':>12}: cannot be counted, {error}")
            return
        epoch, held_out = len(collection.train), len(collection.held_out)
        total = images(config.duration, config.batch_size, epoch)
        print(f"{'pictures':>12}: {epoch:>15,} to train on, {held_out:,} held out")
        print(f"{'epoch':>12}: {epoch:>15,} images, {epoch / config.batch_size:,.1f} steps")
        print(
            f"{'run':>12}: {total:>15,} images, {total // config.batch_size:,} steps,"
            f" {total / epoch:,.1f} epochs"
        )
