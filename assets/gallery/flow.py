"""Draws ``flow.png``: noise on its way to two moons, by the lines of README as they stand there.

    python assets/gallery/flow.py

assets/notebooks/parts.ipynb has their equations, tests/product/pipeline/test_notebooks.py what they
reach.
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image

README = Path(__file__).parents[2] / "README.md"


def main() -> None:
    """Writes the picture beside this file."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec(next(block for block in blocks if "moons" in block), {})
    plt.gcf().set_size_inches(7, 7)
    plt.gca().set_aspect("equal")
    plt.axis("off")
    file = Path(__file__).with_suffix(".png")
    plt.savefig(file, bbox_inches="tight", pad_inches=0)
    Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)


if __name__ == "__main__":
    main()
