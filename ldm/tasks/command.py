"""The command line of the programs in training/, which a mistake in a config ends before torch,
diffusers and transformers are imported; and what becomes of an error: one line, or a traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from ldm.config.costly import costly
from ldm.config.loader import load
from ldm.config.optimizer import require as require_optimizer
from ldm.config.provenance import check_folder
from ldm.config.schema import RunConfig
from ldm.data.folder import FolderData
from ldm.engine.signals import REQUESTS, STOPPED, Interrupted
from ldm.engine.trackers import require
from ldm.engine.watch import WATCH, leave_note
from ldm.errors import ConfigError, DataError, UserError
from ldm.formats.at_hand import autoencoder_of, folder_of
from ldm.progress import listen, main_process
from ldm.tasks.gpus import Gpu, known
from ldm.threads import wait_asleep

C = TypeVar("C", bound=RunConfig)
log = logging.getLogger(__name__)

ENDS = f"""exit status:
  0   the run is over
  2   a mistake or a fault, which one line on stderr names
  {STOPPED}  SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 asked the run to stop: it has finished its step and
      saved a checkpoint, from which the same command goes on; a second signal ends it at once

torchrun and accelerate launch make 1 of every status but 0. torchrun hands SIGTERM and SIGINT on
(SIGUSR1 with --signals-to-handle=SIGTERM,SIGINT,SIGUSR1) and kills what is not over 30 seconds
later; accelerate launch does not hand them on to a single process, which notices when it is gone,
and stops as on SIGTERM.

Of several processes, one that has not answered for 5 minutes, or that holds up a step for half an
hour, ends the run in a line that names it; so does a data worker that hangs. LDM_TIMEOUT sets the
half hour in seconds (and the 5 minutes where it is less).
"""


class Command(Generic[C]):
    """The command line ``--config FILE [--dry-run] a.b=c ...``.

    Args:
        schema: class of the config.
        description: shown by ``--help``.
    """

    def __init__(self, schema: type[C], description: str | None) -> None:
        wait_asleep()
        sys.excepthook = one_line
        listen()
        parser = argparse.ArgumentParser(
            description=description,
            epilog=ENDS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--config", required=True, help="YAML file of the run")
        parser.add_argument("--dry-run", action="store_true", help="show what would run, and stop")
        parser.add_argument(
            "--memory",
            type=_bytes,
            metavar="24GB",
            help="of a GPU: a dry run tells whether it fits, and with which settings it would",
        )
        parser.add_argument(
            "--gpu",
            type=_gpu,
            metavar="NAME",
            help="the same by its name (RTX 4090, A100, ...), and how fast it can be at most",
        )
        parser.add_argument(
            "overrides", nargs="*", metavar="a.b=c", help="change keys of the config"
        )
        arguments = parser.parse_intermixed_args()  # keys before and after options
        for option in ("memory", "gpu"):
            if getattr(arguments, option) and not arguments.dry_run:
                parser.error(f"--{option} goes with --dry-run")
        REQUESTS.listen()
        self.config: C = _at_hand(load(schema, arguments.config, arguments.overrides))
        check_folder(Path(self.config.run))
        require(self.config.trackers)
        if not arguments.dry_run:
            require_optimizer(self.config.optimizer)
        for line in costly(self.config) if main_process() else ():
            log.warning(line)
        self.dry_run: bool = arguments.dry_run
        self.gpu: Gpu | None = arguments.gpu
        named = self.gpu and self.gpu.memory * 10**9
        self.memory: int | None = arguments.memory or named
        _refuse_missing(self.config, data=not self.dry_run)


def _bytes(text: str) -> int:
    """``24GB`` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(MB|GB|TB|MiB|GiB|TiB)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 24GB")
    base = 1024 if "i" in found[2] else 1000
    return round(float(found[1]) * base ** (2 + "MGT".index(found[2][0])))


def _gpu(text: str) -> Gpu:
    try:
        return known(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_hand(config: C) -> C:
    """``config`` whose model and autoencoder are folders of this machine; its record then says
    which commit of the Hub the model was.
    """
    model = _folder("model", getattr(config, "model", None), folder_of)
    vae = getattr(config, "vae", None)
    if isinstance(vae, str) and Path(vae).is_file():
        beside = None if model is None else Path(model)
        vae = _folder("vae", vae, lambda file: autoencoder_of(Path(file), beside))
    found = {"model": model, "vae": vae}
    changed = {key: new for key, new in found.items() if new != getattr(config, key, None)}
    return replace(config, **changed) if changed else config  # type: ignore[type-var]


def _folder(key: str, named: str | None, find: Callable[[str], Path]) -> str | None:
    """What ``find`` makes of a path that a config has under ``key``; ``ConfigError`` where it
    cannot.
    """
    if named is None:
        return None
    try:
        folder = find(named)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{key}: {line}") from None
    return named if folder == Path(named) else str(folder)


def _refuse_missing(config: RunConfig, *, data: bool) -> None:
    """Says which folder is not there, in the words of those who would read it seconds later.

    Args:
        config: the run.
        data: whether its pictures have to be there already.
    """
    model = getattr(config, "model", None)
    if model is not None and not Path(model).exists():
        raise ConfigError(f"model: {model} is no pipeline folder (it has no model_index.json)")
    for source in config.data if isinstance(config.data, tuple) else (config.data,):
        if data and isinstance(source, FolderData) and not source.root.exists():
            raise DataError(f"{source.root}: this folder does not exist, check data.path")


def one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tells a user's mistake, or a signal, in one line; a traceback is for bugs."""
    REQUESTS.at_once = False  # the launcher sends signals as soon as another process is gone
    line, status = None, 2
    if isinstance(error, Interrupted):
        line, status = f"stopped: {error}" if str(error) else "", STOPPED
    elif isinstance(error, UserError):
        line = str(error).strip()
        if line and not error.several:
            # What a DataLoader's worker raised comes with its traceback in the text.
            line = line.splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        line = line and f"error: {line}"
    elif _left_alone(error):
        line = (told := WATCH.lost()) and f"error: {told}"
    if line is None:
        sys.__excepthook__(kind, error, trace)
        WATCH.leave("failed")
        return
    if line:
        print(line, file=sys.stderr)
        leave_note(line.partition(": ")[2])
    WATCH.leave("failed")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _left_alone(error: BaseException) -> bool:
    """Whether a collective failed because a process that takes part in it is gone."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    torch = sys.modules.get("torch")
    return (
        isinstance(error, RuntimeError)
        and torch is not None
        and torch.distributed.is_initialized()
        and any(text in str(error) for text in gone)
    )
