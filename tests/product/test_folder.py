"""A folder of captioned pictures: accepted layouts, and one clear line for everything else."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.folder import FolderData
from ldm.data.source import DataError


def picture(path: Path, colour: str = "red", **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path, **options)


def sidecar(folder: Path, name: str, text: str = "a red thing") -> None:
    picture(folder / name)
    (folder / name).with_suffix(".txt").write_text(text)


def rows(folder: Path, *lines: object, name: str = "metadata.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text)


def captions(folder: Path, **options: object) -> dict[str, tuple[str, ...]]:
    return {e.key: e.captions for e in FolderData(path=str(folder), **options).examples}


def test_metadata_rows(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.jpg", "c.webp"):
        picture(tmp_path / name)
    rows(
        tmp_path,
        {"file_name": "a.png", "text": " one\n caption "},
        {"file_name": "./sub/b.jpg", "text": ["first", "second"]},
        "",
        {"file_name": "c.webp", "text": "a line\u2028inside", "other": 3},
        {"file_name": "c.webp", "text": "again"},
    )
    assert captions(tmp_path) == {
        "a.png": ("one caption",),
        "c.webp": ("a line inside", "again"),
        "sub/b.jpg": ("first", "second"),
    }


def test_metadata_in_subfolders_and_other_columns(tmp_path: Path) -> None:
    picture(tmp_path / "cats/1.png")
    picture(tmp_path / "dogs/1.png")
    rows(tmp_path / "cats", {"image": "1.png", "caption": "a cat"})
    rows(tmp_path / "dogs", {"image": "../dogs/1.png", "caption": "a dog"})
    found = captions(tmp_path, image_column="image", caption_column="caption")
    assert found == {"cats/1.png": ("a cat",), "dogs/1.png": ("a dog",)}


def test_csv(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    rows(
        tmp_path,
        ",file_name,text",
        '0,a.png,"red, and\nround"',
        "1,b.png,blue",
        name="metadata.csv",
    )
    assert captions(tmp_path) == {"a.png": ("red, and round",), "b.png": ("blue",)}


def test_sidecars(tmp_path: Path) -> None:
    for name in ("a.png", "B.JPG", "c.d.png", "sub/e.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfan apple\r\n")
    (tmp_path / "B.caption").write_text("two\nlines")
    (tmp_path / "c.d.png.txt").write_text("an égg", encoding="utf-8")
    (tmp_path / "sub/e.txt").write_text("e")
    (tmp_path / "README.txt").write_text("about these pictures")
    (tmp_path / ".hidden.png").write_text("")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/x.png").write_text("")
    assert captions(tmp_path) == {
        "a.png": ("an apple",),
        "B.JPG": ("two lines",),
        "c.d.png": ("an égg",),
        "sub/e.jpg": ("e",),
    }


def test_rows_and_sidecars_together(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows(tmp_path, {"file_name": "a.png", "text": "a row"})
    sidecar(tmp_path, "b.png", "a text file")
    (tmp_path / "notes.txt").write_text("not a caption")
    assert captions(tmp_path) == {"a.png": ("a row",), "b.png": ("a text file",)}


def test_natural_order(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "1.png", "a/3.png", "img10b.png", "img9b.png", "01.png"):
        sidecar(tmp_path, name)
    assert [e.key for e in FolderData(path=str(tmp_path)).examples] == [
        "01.png", "1.png", "2.png", "10.png", "a/3.png", "img9b.png", "img10b.png",
    ]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    sidecar(tmp_path / "elsewhere", "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    assert list(captions(tmp_path / "data")) == ["link/a.png"]


def nothing(folder: Path) -> None:
    pass


def no_captions(folder: Path) -> None:
    picture(folder / "a.png")
    picture(folder / "b.png")


def without_caption(folder: Path) -> None:
    sidecar(folder, "a.png")
    for name in ("b.png", "c.png", "d.png", "e.png"):
        picture(folder / name)


def without_row(folder: Path) -> None:
    picture(folder / "a.png")
    picture(folder / "b.png")
    rows(folder, {"file_name": "a.png", "text": "a"})


def lost_row(folder: Path) -> None:
    picture(folder / "a.png")
    rows(folder, {"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"})


def lost_sidecar(folder: Path) -> None:
    sidecar(folder, "a.png")
    (folder / "b.txt").write_text("b")


def one_row(row: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        picture(folder / "a.png")
        picture(folder.parent / "outside.png")
        rows(folder, {"file_name": "a.png", "text": "a"}, row)

    return make


def blank_sidecar(folder: Path) -> None:
    sidecar(folder, "a.png", " \n")


def two_sidecars(folder: Path) -> None:
    sidecar(folder, "a.png")
    (folder / "a.caption").write_text("another")


def row_and_sidecar(folder: Path) -> None:
    sidecar(folder, "a.png")
    rows(folder, {"file_name": "a.png", "text": "a"})


def not_utf8(folder: Path) -> None:
    picture(folder / "a.png")
    (folder / "a.txt").write_bytes(b"caf\xe9")


def empty_file(folder: Path) -> None:
    sidecar(folder, "a.png")
    (folder / "b.png").write_bytes(b"")
    (folder / "b.txt").write_text("b")


def unreadable_format(folder: Path) -> None:
    sidecar(folder, "a.png")
    (folder / "b.HEIC").write_bytes(b"...")


def parquet(folder: Path) -> None:
    picture(folder / "a.png")
    (folder / "metadata.parquet").write_bytes(b"PAR1")


def ragged_csv(folder: Path) -> None:
    picture(folder / "a.png")
    rows(folder, "file_name,text", "a.png,red, and round", name="metadata.csv")


def odd_name(folder: Path) -> None:
    sidecar(folder, "a.png")
    picture(folder / "b\nc.png")


OUT = "rows that point out of the folder: metadata.jsonl:2"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "folder without pictures": (nothing, "no picture in this folder or below it"),
    "folder without captions": (no_captions, "2 pictures but no captions, write them as metadata"),
    "without caption": (without_caption, "4 pictures without a caption: b.png, c.png, d.png, ...;"),
    "picture without row": (without_row, "1 pictures without a caption: b.png;"),
    "row without picture": (lost_row, "1 rows without a picture: metadata.jsonl:2 b.png;"),
    "sidecar without picture": (lost_sidecar, "1 caption files without a picture: b.txt;"),
    "parent path": (one_row({"file_name": "../outside.png", "text": "x"}), OUT),
    "hidden parent path": (one_row({"file_name": "b/../../outside.png", "text": "x"}), OUT),
    "absolute path": (one_row({"file_name": "/etc/passwd", "text": "x"}), OUT),
    "null caption": (one_row({"file_name": "a.png", "text": None}), "caption is empty or no text"),
    "blank caption": (one_row({"file_name": "a.png", "text": " "}), "metadata.jsonl:2 a.png"),
    "no captions": (one_row({"file_name": "a.png", "text": []}), "metadata.jsonl:2 a.png"),
    "blank in list": (one_row({"file_name": "a.png", "text": ["x", ""]}), "jsonl:2 a.png"),
    "number": (one_row({"file_name": "a.png", "text": 3}), "empty or no text"),
    "no caption column": (one_row({"file_name": "a.png", "caption": "x"}), "no column 'text'"),
    "no file column": (one_row({"file": "a.png", "text": "x"}), "no column 'file_name'"),
    "no file name": (one_row({"file_name": None, "text": "x"}), "no file name: None"),
    "broken JSON": (one_row('{"file_name": "a.png", "te'), "metadata.jsonl:2: not valid JSON"),
    "JSON list": (one_row([1]), "metadata.jsonl:2: not an object"),
    "blank sidecar": (blank_sidecar, "1 empty caption files: a.txt;"),
    "two sidecars": (two_sidecars, "several caption files: a.txt and a.caption;"),
    "row and sidecar": (row_and_sidecar, "metadata row and also a text file: a.png;"),
    "not UTF-8": (not_utf8, "a.txt: byte 3 is not UTF-8"),
    "empty picture": (empty_file, "1 empty picture files: b.png;"),
    "HEIC": (unreadable_format, "format that is not read: b.HEIC; convert them"),
    "parquet": (parquet, "metadata.parquet: not read, write it as metadata.jsonl"),
    "ragged CSV": (ragged_csv, "metadata.csv:2: more columns than the header"),
    "odd name": (odd_name, "1 pictures without a caption: b?c.png;"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_clear_line(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(DataError) as error:
        len(FolderData(path=str(root)).examples)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert message.startswith(str(root))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this folder does not exist, check data.path"):
        len(FolderData(path=str(tmp_path / "none")).examples)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="this is a file"):
        len(FolderData(path=str(tmp_path / "file")).examples)


def noise(path: Path, **options: object) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif"])
@pytest.mark.parametrize("kept", [0.02, 0.6])
def test_truncated_picture_is_named(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    noise(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    (tmp_path / "a.txt").write_text("noise")
    data = FolderData(path=str(tmp_path))
    assert len(data.examples) == 1
    with pytest.raises(DataError) as error:
        data.load(0)
    assert str(error.value).startswith(f"{path}: the picture cannot be read (")
    assert "\n" not in str(error.value)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar(tmp_path, "a.png")
    data = FolderData(path=str(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 47)  # Pillow warns here, and refuses above 94
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError, match="8x6 pixels"):
        data.load(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match="a.png: the picture cannot be read"):
        data.load(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48)
    assert data.load(0).size == (8, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int, tmp_path: Path) -> None:
    """Red at the top left and blue at the bottom right, however the file stores them."""
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 8, 8))
    upright.paste("blue", (16, 8, 24, 16))
    turn = Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("x")
    loaded = FolderData(path=str(tmp_path)).load(0)
    assert np.array_equal(np.asarray(loaded), np.asarray(upright))


def test_split_is_by_content(tmp_path: Path) -> None:
    for index in range(400):
        Image.new("RGB", (2, 2), (index % 200, 7, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    data = FolderData(path=str(tmp_path), held_out_fraction=0.25)
    held = [e.held_out for e in data.examples]
    assert held[:200] == held[200:]  # copies stay together
    assert 0.18 < np.mean(held) < 0.32
    assert data.digest(3) == data.digest(203) != data.digest(4)
    wider = FolderData(path=str(tmp_path), held_out_fraction=0.5).examples
    assert all(w.held_out for w, h in zip(wider, held, strict=True) if h)
    assert not any(e.held_out for e in FolderData(path=str(tmp_path), held_out_fraction=0).examples)


def test_digest_follows_the_file(tmp_path: Path) -> None:
    sidecar(tmp_path, "a.png")
    data = FolderData(path=str(tmp_path))
    before = data.digest(0)
    assert before == FolderData(path=str(tmp_path)).digest(0)
    picture(tmp_path / "a.png", "blue")
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert data.digest(0) != before
