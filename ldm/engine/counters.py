"""``training/run.json`` of a checkpoint: all of the state of a run that is no tensor."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from torch import OutOfMemoryError, Tensor
from typing_extensions import TypedDict

from ldm.errors import CheckpointError, ConfigError
from ldm.storage.json import JsonError, parse_json, read_json

log = logging.getLogger(__name__)

FILE = "run.json"
_UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError,
)  # fmt: skip
_Count = Annotated[int, Field(ge=0, lt=2**53)]


class Optimizer(TypedDict):
    """Its kind, and what it has found of all parameters together."""

    kind: str
    found: dict[str, float]


class Counters(TypedDict):
    """What is in the file, and maybe more; what need not be there came after the first runs."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    images: _Count
    window: dict[str, float]
    identity: dict[str, Any]
    skipped: NotRequired[_Count]
    changes: NotRequired[list[dict[str, Any]]]
    memory: NotRequired[list[list[float]] | None]
    average: NotRequired[Annotated[list[int | None], Field(min_length=2, max_length=2)] | None]
    stateless: NotRequired[list[str]]  # parameters that the optimiser has not met yet
    optimizer: NotRequired[Optimizer]


def write(folder: Path, counters: Mapping[str, Any], without: list[str]) -> None:
    """Writes the file into ``folder``; ``without``: parameters that have no optimiser state."""
    (folder / FILE).write_text(json.dumps({**counters, "stateless": without}))


def read(folder: Path) -> dict[str, Any]:
    """What ``write`` kept in ``folder``; ``CheckpointError`` where that is something else."""
    try:
        return read_json(folder / FILE, Counters)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / FILE} is missing: there is no going on from it") from None
    except JsonError as error:
        raise CheckpointError(f"{error}; it is not the state of a run") from None


def told(folder: Path, key: str, text: Any) -> Any:
    """The value that ``text`` says of ``key`` in the identity that ``folder`` keeps."""
    try:
        return parse_json(text if isinstance(text, str) else b"")
    except JsonError as error:
        where = f"{folder / FILE} cannot be read: identity.{key}"
        raise CheckpointError(f"{where} is {error}; it is not the state of a run") from None


def check_moments(
    moments: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    counted: Set[str],
    known: Mapping[str, Any],
    at: Path,
) -> None:
    """``CheckpointError`` where the state of an optimiser is not all that a run needs to go on.

    Args:
        moments: as they were read, ``NAME/KEY``.
        weights: the parameters by name.
        counted: of which the optimiser counts the steps.
        known: the counters beside them; those of an old checkpoint do not say which parameters had
            no state.
        at: the file of the moments.
    """
    without = known.get("stateless")
    there = {key.rpartition("/")[0] for key in moments}
    lacking = [name for name in weights if name not in there]
    lost = sorted(set(lacking) - set(without or ()))
    told = f"it lacks the optimiser's state of {len(lost)} parameters, the first is {lost[:1]}"
    if lost and without is not None:
        raise CheckpointError(f"{at} is not whole: {told}")
    if lost and len(lost) < len(weights):
        log.warning("%s: %s, which begins anew", at, told)
    for name in (weights.keys() - lacking) & counted:
        step = moments.get(f"{name}/step")
        if step is None or step.numel() != 1:
            raise CheckpointError(f"{at} is not whole: {name}/step is no number of steps")


def check_shapes(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path | str
) -> None:
    """``CheckpointError`` naming the first tensor of ``folder`` that does not fit the model."""
    for name, value in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder} holds another model: it lacks {name}")
        if found[name].shape != value.shape:
            raise CheckpointError(
                f"{folder} holds another model: {name} is {tuple(found[name].shape)} there and"
                f" {tuple(value.shape)} in this config; use its config or another run folder"
            )


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Makes one line of whatever a library says of a checkpoint that it cannot read."""
    try:
        yield
    except (CheckpointError, ConfigError, OutOfMemoryError):
        raise
    except _UNREADABLE as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder} cannot be read: {line}") from None
