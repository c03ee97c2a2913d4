"""``torchrun -m ldm.cli``: the command line in several processes."""

from ldm.cli import app

app()
