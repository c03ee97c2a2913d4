"""A folder of captioned pictures: accepted layouts, and one clear line for everything else."""

import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ldm.data.collection import Collection
from ldm.data.folder import FolderData
from ldm.data.images import ImageTransform
from ldm.data.names import Names, Root
from ldm.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")
posix = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


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
    (tmp_path / "B.caption").write_text("\n \u200b\na first line\nand another\n")
    (tmp_path / "c.d.png.txt").write_text("an égg", encoding="utf-8")
    (tmp_path / "sub/e.txt").write_text("e")
    (tmp_path / "README.txt").write_text("about these pictures")
    (tmp_path / ".hidden.png").write_text("")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/x.png").write_text("")
    assert captions(tmp_path) == {
        "a.png": ("an apple",),
        "B.JPG": ("a first line",),
        "c.d.png": ("an égg",),
        "sub/e.jpg": ("e",),
    }


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("first", ("a red cat",)),
        ("each", ("a red cat", "ein rotes Tier")),
        ("joined", ("a red cat ein rotes Tier",)),
    ],
)
def test_lines_of_a_sidecar(lines: str, found: tuple[str, ...], tmp_path: Path, caplog) -> None:
    sidecar(tmp_path, "a.png", "a red\tcat \r\n\r\n ein rotes Tier\n")
    sidecar(tmp_path, "b.png", " one\u2028line \n")
    assert captions(tmp_path, lines=lines) == {"a.png": found, "b.png": ("one line",)}
    told = [r.getMessage() for r in caplog.records]
    wrong = "of 1 caption files with several lines the first is used; data.lines=each"
    assert [wrong in line for line in told] == ([True] if lines == "first" else [])


def test_two_tables_that_say_the_same_do_not_double_captions(tmp_path: Path, caplog) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    rows(tmp_path, "file_name,text", "a.png,one", "b.png,two", name="metadata.csv")
    one, two = {"file_name": "b.png", "text": "two"}, {"file_name": "c.png", "text": "three"}
    rows(tmp_path, {"file_name": "a.png", "text": ["one", "more"]}, one, two, two)
    assert captions(tmp_path) == {
        "a.png": ("one", "more"),
        "b.png": ("two",),
        "c.png": ("three", "three"),  # within one table a repetition is meant
    }
    assert "metadata.jsonl: captions of 1 pictures stand in another table as well" in caplog.text


def test_a_row_without_a_caption_leaves_the_others(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "sub/c.png", "other/d.png"):
        picture(tmp_path / name)
    rows(tmp_path, {"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "label": 3})
    rows(tmp_path / "sub", "file_name,words", "c.png,red", name="metadata.csv")
    (tmp_path / "other/metadata.parquet").write_bytes(b"PAR1")
    data = FolderData(path=str(tmp_path), held_out_fraction=0)
    with pytest.raises(DataError, match=r"no column 'text' \(but file_name, label\): metadata.js"):
        Collection(data, ImageTransform())
    collection = Collection(data, ImageTransform(), "skip")
    assert [item.example.key for item in collection.train] == ["a.png"]
    lacking = {p.key: p.reason for _, p in collection.skipped if "no column" in p.reason}
    assert list(lacking) == ["metadata.jsonl:2 b.png", "sub/metadata.csv:2 c.png"]
    assert all(r.endswith("write it, or set data.caption_column") for r in lacking.values())
    named = {p.key for _, p in collection.skipped} - lacking.keys()
    assert named == {"b.png", "sub/c.png", "other/d.png", "other/metadata.parquet"}


NFC, NFD = (unicodedata.normalize(form, "ünï/café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("disk", "written"), [(NFD, NFC), (NFC, NFD)])
def test_names_are_compared_in_one_normal_form(disk: str, written: str, tmp_path: Path) -> None:
    """A Mac stores ``é`` as two characters, a table that was made elsewhere has one."""
    for number in range(3):
        picture(tmp_path / f"{disk}{number}.png")
    rows(tmp_path, {"file_name": f"{written}0.png", "text": "of the table"})
    folder, name = (tmp_path / disk).parent, Path(written).name
    (folder / f"{name}1.txt").write_text("of the text file")
    (folder / f"{name}2.png.caption").write_text("whole name")
    assert captions(tmp_path) == {
        f"{disk}0.png": ("of the table",),
        f"{disk}1.png": ("of the text file",),
        f"{disk}2.png": ("whole name",),
    }


def test_rows_of_formats_that_are_not_read_are_not_to_blame(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in (f"{NFD}.psd", "b.psd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"8BPS")
    (tmp_path / f"{NFC}.txt").parent.mkdir(exist_ok=True)
    names = ("a.png", f"{NFC}.psd", "b.psd", "c.psd")
    rows(tmp_path, *({"file_name": name, "text": "x"} for name in names))
    assert captions(tmp_path) == {"a.png": ("x",)}
    assert {p.key: p.reason[:33] for p in FolderData(path=str(tmp_path)).problems} == {
        f"{NFD}.psd": "pictures in a format that is not ",
        "b.psd": "pictures in a format that is not ",
        "metadata.jsonl:4 c.psd": "rows without a picture; add it or",
    }
    (tmp_path / "metadata.jsonl").unlink()
    sidecar(tmp_path, "a.png")
    (tmp_path / NFD).parent.joinpath(f"{Path(NFC).name}.txt").write_text("x")
    problems = FolderData(path=str(tmp_path)).problems
    assert {p.key for p in problems} == {f"{NFD}.psd", "b.psd"}


def test_links_are_followed_only_for_names_that_are_not_found(tmp_path: Path, monkeypatch) -> None:
    for number in range(9):
        picture(tmp_path / f"{number}.png")
    root = Root(tmp_path, Names({f"{number}.png" for number in range(9)}))
    asked = []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: asked.append(path) or real(path))
    for number in range(9):
        assert root.find("", f"{number}.png") == (f"{number}.png", "")
    assert asked == []
    assert root.find("", "9.png")[1].startswith("without a picture") and len(asked) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems hold one of the two")
def test_names_that_differ_in_normal_form_only_are_said(tmp_path: Path) -> None:
    a, b = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    for name in (a, b, "c.png", "ü.png"):
        sidecar(tmp_path, name)
    Path(tmp_path / unicodedata.normalize("NFD", "ü.txt")).write_text("another")
    data = FolderData(path=str(tmp_path))
    assert [e.key for e in data.examples] == ["c.png"]
    reasons = {p.key: p.reason for p in data.problems}
    assert reasons.keys() == {a, b, "ü.png"}
    assert "differ only in how accents are stored (Unicode normal form)" in reasons[b]
    assert reasons["ü.png"].startswith("pictures with several caption files")


@posix
def test_whole_paths_into_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    names = [f"{n}.png" for n in range(6)]
    for name in (*names, "sub/6.png"):
        picture(root / name)
    (tmp_path / "link").symlink_to(root)
    (root / "below").symlink_to(root / "sub")
    picture(tmp_path / "out.png")
    (root / "7.png").symlink_to(tmp_path / "out.png")
    paths = [
        str(root / "0.png"), str(tmp_path / "link/1.png"), "../data/2.png", f"{root}/x/../3.png",
        str(tmp_path / "link/../data/4.png"), f"{root}//./5.png", "below/6.png",
        str(tmp_path / "out.png"), "../out.png", str(root / "7.png"), f"{root}/sub/../../out.png",
        str(tmp_path), str(root), f"{root}/a\0b.png",
    ]  # fmt: skip
    rows(root, *({"file_name": path, "text": f"{n}"} for n, path in enumerate(paths)))
    data = FolderData(path=str(root))
    key = [e.key for e in data.examples if "/" in e.key]  # of the two names the walk meets one
    assert key == ["below/6.png"]
    found = {e.key: e.captions for e in data.examples}
    assert found == {**{name: (f"{n}",) for n, name in enumerate(names)}, key[0]: ("6",)}
    reasons = {p.key.split(" ")[0]: p.reason.partition(";")[0] for p in data.problems}
    assert reasons.pop("7.png") == "links that lead out of the folder"
    out, lost = "rows that point out of the folder", "rows without a picture"
    assert list(reasons.items()) == [
        ("metadata.jsonl:8", out), ("metadata.jsonl:9", out), ("metadata.jsonl:10", lost),
        ("metadata.jsonl:11", out), ("metadata.jsonl:12", out), ("metadata.jsonl:13", out),
        ("metadata.jsonl:14", out),
    ]  # fmt: skip


@posix
def test_paths_of_windows_are_said(tmp_path: Path) -> None:
    picture(tmp_path / "sub/a.png")
    picture(tmp_path / r"b\c.png")  # a name like any other here
    paths = ["C:\\pics\\sub\\a.png", "c:/pics/a.png", r"sub\a.png", r"\\server\a.png", r"b\c.png"]
    rows(tmp_path, *({"file_name": path, "text": "x"} for path in [*paths, "sub/a.png"]))
    data = FolderData(path=str(tmp_path))
    assert sorted(e.key for e in data.examples) == [r"b\c.png", "sub/a.png"]
    wrong = "rows with a path of Windows; write the path from the table's folder, with /"
    assert [(p.key, p.reason) for p in data.problems] == [
        (f"metadata.jsonl:{n} {path}", wrong) for n, path in enumerate(paths[:4], 1)
    ]


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


@posix
def test_links_are_followed_where_that_is_asked_for_and_circles_are_not(tmp_path: Path) -> None:
    sidecar(tmp_path / "elsewhere", "a.png")
    sidecar(tmp_path / "data/b", "b.png")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/inside").symlink_to(tmp_path / "data/b")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    assert list(captions(tmp_path / "data", links=True)) == ["b/b.png", "link/a.png"]
    assert list(captions(tmp_path / "data")) == ["b/b.png"]
    with pytest.raises(DataError, match="1 links that lead out of the folder: link; copy the"):
        Collection(FolderData(path=str(tmp_path / "data")), ImageTransform())


@posix
def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    sidecar(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")  # reading it would wait for ever
    (tmp_path / "c.png").symlink_to(tmp_path / "c.png")
    data = FolderData(path=str(tmp_path))
    assert [e.key for e in data.examples] == ["a.png"]
    assert [(p.key, p.reason) for p in data.problems] == [
        ("b.png", "neither files nor folders; remove them"),
        ("c.png", "links to nothing; remove them"),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    sidecar(tmp_path, "a.png")
    picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))
    data = FolderData(path=str(tmp_path))
    assert [e.key for e in data.examples] == ["a.png"]
    wrong = "files whose name is not UTF-8; rename them"
    assert list(data.problems) == [("caf\\xe9.png", wrong)]


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
    (folder / "b.JXL").write_bytes(b"...")


def broken_parquet(folder: Path) -> None:
    picture(folder / "a.png")
    (folder / "metadata.parquet").write_bytes(b"PAR1")


def broken_csv(folder: Path) -> None:
    picture(folder / "a.png")
    rows(folder, "file_name,text", 'a.png,"red', name="metadata.csv")


def ragged_csv(folder: Path) -> None:
    picture(folder / "a.png")
    rows(folder, "file_name,text", "a.png,red, and round", name="metadata.csv")


def latin_table(folder: Path) -> None:
    picture(folder / "a.png")
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')


def odd_name(folder: Path) -> None:
    sidecar(folder, "a.png")
    picture(folder / "b\nc.png")


OUT = "1 rows that point out of the folder: metadata.jsonl:2"
NO_TEXT = "1 rows whose caption is empty or no text: metadata.jsonl:2 a.png; caption or remove"
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
    "null caption": (one_row({"file_name": "a.png", "text": None}), NO_TEXT),
    "invisible caption": (one_row({"file_name": "a.png", "text": "\u200b \ufeff"}), NO_TEXT),
    "blank caption": (one_row({"file_name": "a.png", "text": " "}), NO_TEXT),
    "no captions": (one_row({"file_name": "a.png", "text": []}), NO_TEXT),
    "blank in list": (one_row({"file_name": "a.png", "text": ["x", ""]}), NO_TEXT),
    "number": (one_row({"file_name": "a.png", "text": 3}), NO_TEXT),
    "no caption column": (one_row({"file_name": "a.png", "caption": "x"}), "no column 'text'"),
    "no file column": (one_row({"file": "a.png", "text": "x"}), "no column 'file_name'"),
    "empty row": (one_row({}), "no column 'file_name' (but nothing): metadata.jsonl:2; write it,"),
    "no file name": (one_row({"file_name": None, "text": "x"}), "no file name in 'file_name': met"),
    "broken JSON": (one_row('{"file_name": "a.png", "te'), "1 lines that are not valid JSON ("),
    "JSON list": (one_row([1]), "1 lines that are no JSON object: metadata.jsonl:2; write one"),
    "half a character": (one_row('{"file_name": "a.png", "text": "\\ud83d"}'), NO_TEXT),
    "half a name": (one_row('{"file_name": "\\ud83d.png", "text": "x"}'), "no file name in"),
    "deep JSON": (one_row("[" * 100_000), "1 lines that are not valid JSON (too deep): metadata"),
    "blank sidecar": (blank_sidecar, "1 pictures with an empty caption file: a.png; write it"),
    "two sidecars": (two_sidecars, "with several caption files (a.txt and a.caption): a.png; keep"),
    "row and sidecar": (row_and_sidecar, "a metadata row and also a text file: a.png; keep one"),
    "not UTF-8": (not_utf8, "unreadable (byte 3 is not UTF-8, save the file as UTF-8): a.png;"),
    "empty picture": (empty_file, "1 pictures that cannot be read (the file is empty): b.png;"),
    "JPEG XL": (unreadable_format, "is not read (JPEG XL): b.JXL; save them as PNG"),
    "broken parquet": (broken_parquet, "1 tables that cannot be read (not a readable parquet file"),
    "broken CSV": (broken_csv, "is not valid CSV (unexpected end of data)): metadata.csv; repair"),
    "table in Latin-1": (latin_table, "tables that cannot be read (byte 35 is not UTF-8, save the"),
    "ragged CSV": (ragged_csv, "1 lines with more columns than the header: metadata.csv:2; put"),
    "odd name": (odd_name, "1 pictures without a caption: b?c.png;"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_clear_line(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(DataError) as error:
        Collection(FolderData(path=str(root)), ImageTransform())
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert message.startswith(str(root))


def test_parquet(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    table = {"file_name": ["a.png", "b.png"], "text": [["one", "two"], ["three"]]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "metadata.parquet")
    assert captions(tmp_path) == {"a.png": ("one", "two"), "b.png": ("three",)}


def test_bad_pictures_are_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    for n in range(3):
        sidecar(tmp_path, f"{n}.png")
    (tmp_path / "1.png").write_bytes(b"")
    picture(tmp_path / "3.png")
    collection = Collection(
        FolderData(path=str(tmp_path), held_out_fraction=0), ImageTransform(), "skip"
    )
    assert [item.example.key for item in collection.train] == ["0.png", "2.png"]
    assert [problem.key for _, problem in collection.skipped] == ["1.png", "3.png"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this folder does not exist, check data.path"):
        len(FolderData(path=str(tmp_path / "none")).examples)
    with pytest.raises(DataError, match="check data.path .a path of Windows: write where it is"):
        len(FolderData(path=r"C:\Users\me\pictures").examples)
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
    (problem,) = FolderData(path=str(tmp_path)).problems
    assert problem.key == path.name
    assert problem.reason.startswith("pictures that cannot be read (")
    assert problem.reason.endswith("); repair or remove them")
    assert "\n" not in problem.reason and "0x" not in problem.reason


def test_a_picture_that_breaks_after_it_was_indexed_is_named(tmp_path: Path) -> None:
    sidecar(tmp_path, "a.png")
    data = FolderData(path=str(tmp_path))
    assert data.load(0).size == (8, 6)
    path = tmp_path / "a.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError) as error:
        data.load(0)
    assert str(error.value).startswith(f"{path}: the picture cannot be read (")
    path.unlink()
    with pytest.raises(DataError, match="a.png: the picture cannot be read .No such file"):
        data.load(0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit, bad", [(20, 1), (47, 1), (48, 0)])  # Pillow refuses above twice it
def test_bombs_are_refused(
    limit: int, bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar(tmp_path, "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    data = FolderData(path=str(tmp_path))
    assert (len(data.problems), len(data.examples)) == (bad, 1 - bad)
    assert all("pixels" in problem.reason for problem in data.problems)


def test_a_mode_that_no_transform_takes_is_a_problem(tmp_path: Path) -> None:
    Image.new("LAB", (8, 6)).save(tmp_path / "a.tif")
    (tmp_path / "a.txt").write_text("a")
    (problem,) = FolderData(path=str(tmp_path)).problems
    assert "mode LAB" in problem.reason


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
    assert FolderData(path=str(tmp_path)).digest(0) != before
