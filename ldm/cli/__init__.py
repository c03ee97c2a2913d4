"""The command line: ``ldm sample``, ``ldm data``, ``ldm evaluate``, ..."""

from ldm.cli.main import app

__all__ = ["app"]
