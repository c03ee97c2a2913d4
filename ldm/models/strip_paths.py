"""Where a network was read from is nobody's business but the machine's."""

from __future__ import annotations

import json
from pathlib import Path


def strip_paths(folder: str | Path) -> None:
    """Takes out of every JSON below ``folder`` the path that diffusers notes on reading a model.

    It names a folder of the machine that wrote it, and no reader needs it.
    """
    for file in Path(folder).rglob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
