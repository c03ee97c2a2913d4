"""The kinds of data that a config can ask for, told by ``kind``, or else by what the path is."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag

from ldm.data.cached import CachedData
from ldm.data.detect import check_path, layout
from ldm.data.folder import FolderData
from ldm.data.hub import DatasetsData
from ldm.data.sd_scripts import SdScriptsData
from ldm.data.table import TableData
from ldm.data.tar import TarData
from ldm.demo.digits import DigitsData
from ldm.demo.emoji import EmojiData
from ldm.demo.shapes import ShapesData

log = logging.getLogger(__name__)


def _kind(value: Any) -> str:
    """``kind`` of a data config; a folder where none is given."""
    if isinstance(value, dict):
        return value.get("kind", "folder")
    return getattr(value, "kind", "folder")


def _with_kind(value: Any) -> Any:
    """A data config with the ``kind`` that its path looks like, where none is given."""
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        return value
    check_path(value["path"])
    if "kind" in value:
        return value
    found = layout(value["path"])
    if found.kind != "folder":
        log.info("data: %s is read as %s, since %s", value["path"], found.kind, found.reason)
    return {**value, "kind": found.kind}


DataConfig = Annotated[
    Annotated[FolderData, Tag("folder")]
    | Annotated[TarData, Tag("webdataset")]
    | Annotated[TableData, Tag("parquet")]
    | Annotated[DatasetsData, Tag("datasets")]
    | Annotated[SdScriptsData, Tag("sd_scripts")]
    | Annotated[CachedData, Tag("cached")]
    | Annotated[EmojiData, Tag("emoji")]
    | Annotated[ShapesData, Tag("shapes")]
    | Annotated[DigitsData, Tag("digits")],
    Discriminator(_kind),
    BeforeValidator(_with_kind),
]
