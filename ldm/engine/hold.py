"""One program at a time in a folder that it writes into."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import Accelerator

from ldm.errors import ConfigError, RunError, ToldElsewhere
from ldm.storage.disk import writing
from ldm.storage.lock import InUseError, Lock, lock

log = logging.getLogger(__name__)


def hold(folder: Path, key: str, accelerator: Accelerator) -> Lock | None:
    """The lock of ``folder``, which the main process holds for all; None on the others. A
    collective. Who only reads the folder needs no lock.

    Args:
        folder: is made where it is not there.
        key: the setting that names it.
        accelerator: the processes.

    Raises:
        RunError: another program has the lock, or there is no writing there.
        ConfigError: there can be no such folder.
        ToldElsewhere: the same, on the other processes.
    """
    held, failure = None, None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with writing("the lock", folder, "start the same command again"):
                held = lock(folder)
        except InUseError as error:
            failure = RunError(
                f"{key}: {error}: wait until that has ended, end it, or choose another folder"
            )
        except RunError as error:
            failure = error
        except OSError as error:
            failure = ConfigError(f"{key}: {folder} cannot be made: {error.strerror}")
    failed = torch.tensor([failure is not None], dtype=torch.float64, device=accelerator.device)
    if bool(accelerator.gather(failed).any()):
        raise failure or ToldElsewhere()
    if held and not held.sure:
        log.warning("%s: its file system has no locks: let one program use it at a time", folder)
    return held
