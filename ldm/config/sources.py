"""The kinds of data that a config can ask for, told by ``kind``, or else by what the path is."""

from __future__ import annotations

import logging
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from ldm.config.loader import config_class
from ldm.data import detect
from ldm.data.cached import CachedData
from ldm.data.folder import FolderData
from ldm.data.hub import DatasetsData
from ldm.data.place import AtPath
from ldm.data.sd_scripts import SdScriptsData
from ldm.data.source import Drawn
from ldm.data.table import TableData
from ldm.data.tar import TarData
from ldm.demo.digits import DigitsData
from ldm.demo.emoji import EmojiData
from ldm.demo.shapes import ShapesData

log = logging.getLogger(__name__)

AnyData = (
    FolderData
    | TarData
    | TableData
    | DatasetsData
    | SdScriptsData
    | CachedData
    | EmojiData
    | ShapesData
    | DigitsData
)
SOURCES: dict[str, type[Any]] = {cls.kind: cls for cls in get_args(AnyData)}
"""The table of all of them, by kind."""


def drawn() -> dict[str, type[Drawn]]:
    """Those that need no path: their pictures come with the code, or with a package."""
    return {kind: cls for kind, cls in SOURCES.items() if issubclass(cls, Drawn)}


def layouts() -> dict[str, type[AtPath]]:
    """Those that lie at a path."""
    return {kind: cls for kind, cls in SOURCES.items() if issubclass(cls, AtPath)}


def layout(path: str) -> detect.Detected:
    """The layout that ``path`` is, a folder where nothing else is known.

    Raises:
        AmbiguousError: there are several layouts in it.
        DataError: no file system can have such a path.
    """
    return detect.layout(path, layouts())


def _with_kind(value: Any) -> Any:
    """A data config with the ``kind`` that its path looks like, where none is given."""
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("path"), str):
        return {"kind": "folder", **value}
    detect.check_path(value["path"])
    if "kind" in value:
        return value
    found = layout(value["path"])
    if found.kind != "folder":
        log.info("data: %s is read as %s, since %s", value["path"], found.kind, found.reason)
    return {**value, "kind": found.kind}


DataConfig = Annotated[AnyData, Field(discriminator="kind"), BeforeValidator(_with_kind)]


@config_class
class OneSource:
    """A source alone, as a command line tells it.

    Args:
        data: the source.
    """

    data: DataConfig
