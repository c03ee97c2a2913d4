"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Folder for what can be made again: ``$LDM_CACHE``, else ``~/.cache/ldm``."""
    return Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm")
