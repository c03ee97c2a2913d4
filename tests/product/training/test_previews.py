"""Sheets of captions of a run's own data: each beside its true picture, and changing nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launched import digests
from runs import train

pytestmark = pytest.mark.usefixtures("kept_cache")

SETTINGS = dict(duration="2 steps", batch_size=8, checkpoints={"every": "9 steps"})
HOW = {"every": "2 steps", "images": 0, "steps": 1, "guidance": 1.0}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, object]:
    """Twelve pictures, each of one colour; some of them are held out."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(12):
        Image.new("RGB", (20, 16), (20 * n, 240 - 20 * n, 90)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"colour {n}")
    return {"kind": "folder", "path": str(folder), "held_out_fraction": 0.4}


def colours(sheet: Image.Image) -> list[tuple[int, ...]]:
    """Of the true picture in each of four groups, which are 2 x (16 + 16) + 8 pixels wide."""
    pixels = np.asarray(sheet)
    return [tuple(pixels[16, 72 * n + 48].tolist()) for n in range(4)]


def test_captions_of_the_data_are_drawn_beside_their_pictures(tmp_path, data):
    train(tmp_path / "plain", **SETTINGS, data=data, validation=HOW)
    assert list((tmp_path / "plain" / "samples").iterdir()) == []
    train(tmp_path / "shown", **SETTINGS, data=data, validation=HOW | {"captions": 4})
    final = tmp_path / "shown" / "final"
    assert digests(final, at_least=3) == digests(tmp_path / "plain" / "final", at_least=3)

    (file,) = (tmp_path / "shown" / "samples").glob("*.png")
    sheet = Image.open(file)
    assert sheet.size == (4 * (2 * 32 + 8), 32 + 30)
    known = {(20 * n, 240 - 20 * n, 90) for n in range(12)}
    assert len(set(colours(sheet)) & known) == 4

    both = HOW | {"captions": 4, "prompts": ["one", "two"]}
    train(tmp_path / "both", **SETTINGS, data=data, validation=both)
    page = Image.open(tmp_path / "both" / "samples" / file.name)
    assert page.size == (8 * 40, 62 + 62)
    below = page.crop((0, 62, sheet.width, 124))
    assert np.array_equal(np.asarray(below), np.asarray(sheet))
