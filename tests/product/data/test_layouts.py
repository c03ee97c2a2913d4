"""The same pictures in every layout are the same data; and what is wrong with one has a name."""

import csv
import gzip
import io
import json
import logging
import os
import pickle
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.config.sources import layouts
from ldm.data import files, index, table, tar
from ldm.data.audit.check import Expected, check
from ldm.data.buckets import Buckets
from ldm.data.collection import Collection
from ldm.data.detect import Detected
from ldm.data.detect import detect as among
from ldm.data.files import braces, find
from ldm.data.folder import FolderData
from ldm.data.hub import DatasetsData
from ldm.data.images import ImageTransform
from ldm.data.index import Indexed
from ldm.data.table import TableData
from ldm.data.tar import TarData
from ldm.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")

FRACTION = 0.3


def detect(path: str) -> Detected:
    return among(path, layouts())


def encoded(seed: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


# Name, bytes, caption; PNG and JPEG in turn.
PICTURES = [
    (f"{n:02d}.{'png' if n % 2 else 'jpg'}", encoded(n, "PNG" if n % 2 else "JPEG"), caption)
    for n, caption in enumerate(["a café, by night", 'a "b"', *(f"picture {n}" for n in range(10))])
]
ROWS = [{"image": {"bytes": data, "path": name}, "text": text} for name, data, text in PICTURES]


def bare(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, data, _ in PICTURES:
        (folder / name).write_bytes(data)


def sidecars(folder: Path) -> None:
    bare(folder)
    for name, _, text in PICTURES:
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")


def jsonl(folder: Path) -> None:
    bare(folder)
    lines = [json.dumps({"file_name": name, "text": text}) for name, _, text in PICTURES]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def table_csv(folder: Path) -> None:
    bare(folder)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), *((n, t) for n, _, t in PICTURES)])


def metadata_parquet(folder: Path) -> None:
    bare(folder)
    columns = {"file_name": [n for n, _, _ in PICTURES], "text": [t for _, _, t in PICTURES]}
    pq.write_table(pa.table(columns), folder / "metadata.parquet")


def packed(file: Path, members: Iterable[tuple[str, bytes | str]], **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as opened:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return file


def members_of(pictures: Iterable[tuple[str, bytes, str]]) -> list[tuple[str, bytes | str]]:
    return [
        member
        for name, data, text in pictures
        for member in ((name, data), (f"{name.split('.')[0]}.txt", text))
    ]


def tars(folder: Path) -> None:
    for shard in range(2):
        packed(folder / f"{shard}.tar", members_of(PICTURES[6 * shard : 6 * shard + 6]))


def tars_json(folder: Path) -> None:
    """Unsorted: all pictures in front of all captions."""
    texts = [(f"a/{n.split('.')[0]}.json", json.dumps({"caption": t})) for n, _, t in PICTURES]
    packed(folder / "0.tar", [*((f"./a/{n}", d) for n, d, _ in PICTURES), *texts])


def parquet(folder: Path) -> None:
    folder.mkdir()
    for part in range(2):
        rows = pa.Table.from_pylist(ROWS[6 * part : 6 * part + 6])
        pq.write_table(rows, folder / f"{part}.parquet", row_group_size=4)


def parquet_binary(folder: Path) -> None:
    folder.mkdir()
    columns = {"image": [d for _, d, _ in PICTURES], "text": [[t] for _, _, t in PICTURES]}
    pq.write_table(pa.table(columns), folder / "a.parquet")


def parquet_paths(folder: Path) -> None:
    bare(folder / "files")
    rows = [{"image": {"bytes": None, "path": f"files/{n}"}, "text": t} for n, _, t in PICTURES]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "a.parquet")


def saved(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(ROWS, features=features).save_to_disk(str(folder))


def saved_splits(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS).cast_column("image", datasets.Image())
    splits = {"train": data, "test": data.select([0])}
    datasets.DatasetDict(splits).save_to_disk(str(folder))


KINDS: dict[str, type[Indexed]] = {
    "folder": FolderData,
    "webdataset": TarData,
    "parquet": TableData,
    "datasets": DatasetsData,
}
LAYOUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "sidecars": ("folder", sidecars),
    "metadata.jsonl": ("folder", jsonl),
    "metadata.csv": ("folder", table_csv),
    "metadata.parquet": ("folder", metadata_parquet),
    "two tars": ("webdataset", tars),
    "a tar with JSON, unsorted": ("webdataset", tars_json),
    "parquet": ("parquet", parquet),
    "parquet, plain bytes": ("parquet", parquet_binary),
    "parquet, paths": ("parquet", parquet_paths),
    "datasets": ("datasets", saved),
    "datasets with splits": ("datasets", saved_splits),
}


def content(source: Indexed) -> list[tuple[str, tuple[str, ...], bool]]:
    examples = source.examples
    return [
        (source.digest(n), example.captions, example.held_out) for n, example in enumerate(examples)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_data(layout: str, tmp_path: Path) -> None:
    sidecars(tmp_path / "reference")
    reference = FolderData(path=str(tmp_path / "reference"), held_out_fraction=FRACTION)
    kind, make = LAYOUTS[layout]
    make(tmp_path / "data")
    source = KINDS[kind](path=str(tmp_path / "data"), held_out_fraction=FRACTION)
    assert source.problems == []
    assert content(source) == content(reference)
    assert 0 < sum(source.held_out) < 12
    assert source.sizes.tolist() == [[7, 9]] * 12
    for n in (0, 11):
        assert np.array_equal(np.asarray(source.load(n)), np.asarray(reference.load(n)))
    # Another process gets the config, and where the index is that it maps as well.
    sent = pickle.dumps(source)
    assert len(sent) < 1500
    assert content(pickle.loads(sent)) == content(reference)
    assert pickle.loads(sent).load(5).size == (7, 9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_detected(layout: str, tmp_path: Path) -> None:
    kind, make = LAYOUTS[layout]
    make(tmp_path / "data")
    if layout == "parquet, paths":
        with pytest.raises(DataError, match="several layouts.*folder .*12 pictures.*parquet"):
            detect(str(tmp_path / "data"))
        assert detect(str(tmp_path / "data" / "a.parquet")).kind == kind
        return
    found = detect(str(tmp_path / "data"))
    assert found.kind == kind
    assert found.reason


def test_what_detection_says(tmp_path: Path) -> None:
    tars(tmp_path / "a")
    assert detect(str(tmp_path / "a")) == ("webdataset", "2 tars, the first is 0.tar")
    assert detect(str(tmp_path / "a/{0..1}.tar")).kind == "webdataset"
    (tmp_path / "a/0.parquet").write_bytes(b"")  # img2dataset writes one beside each tar
    assert detect(str(tmp_path / "a")).kind == "webdataset"
    (tmp_path / "a/other.parquet").write_bytes(b"")
    with pytest.raises(DataError) as error:
        detect(str(tmp_path / "a"))
    assert str(error.value) == (
        f"{tmp_path / 'a'}: several layouts, set data.kind to one: "
        "webdataset (2 tars, the first is 0.tar) and "
        "parquet (1 parquet files, the first is other.parquet)"
    )
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="no pictures, tars or parquet files in this folder"):
        detect(str(tmp_path / "b"))
    with pytest.raises(DataError, match="does not exist.*set data.kind to datasets"):
        detect("someone/pictures")
    (tmp_path / "b/c.zip").write_bytes(b"")
    with pytest.raises(DataError, match="c.zip: this file is no .tar, .parquet or .toml;"):
        detect(str(tmp_path / "b/c.zip"))


def test_folders_named_by_repeats_are_those_of_sd_scripts(tmp_path: Path) -> None:
    def found(*names: str) -> Detected:
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
        return detect(str(root))

    told = "all pictures are in folders named by repeats: 2_cat, 10_dog"
    names = ("10_dog/a.png", "2_cat/b.JPG", "10_dog/a.txt", "notes.txt")
    assert found(*names) == ("sd_scripts", told)
    assert found("1_sks dog/a.heic")[0] == "sd_scripts"
    for others in (
        ["10_dog/a.png", "b.png"],
        ["10_dog/a.png", "cats/b.png"],
        ["10_dog/a.png", "2_cat/deep/b.png"],
        ["10_dog/a.png", "metadata.jsonl"],
        ["10_dog/a.png", "10_dog/metadata.csv"],
        ["2024_dogs/a.png"],  # a year
        ["01_dog/a.png", "02_cat/b.png"],  # numbers of classes
        ["10_/a.png"],
    ):
        assert found(*others)[0] == "folder", others


def test_braces_that_spell_out_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST", 1000)
    for many in ("{0..999999999}", "{0..99}" * 4, "{a,b}" * 30, "{1..123456789012345678}"):
        with pytest.raises(DataError, match="spell out more than 1,000 files: name their folder"):
            braces(f"train-{many}.tar")
    assert braces("{x}" * 1300) == ["x" * 1300]  # however deep
    assert braces(f"{{1..{'9' * 5000}}}.tar") == [f"1..{'9' * 5000}.tar"]
    assert len(braces("{0..999}.tar")) == 1000


def test_patterns(tmp_path: Path) -> None:
    assert braces("{a,b}-{08..10}") == [f"{x}-{n}" for x in "ab" for n in ("08", "09", "10")]
    for name in ("x/0.tar", "x/1.tar", "x/10.tar", "x/2.tar", "y/0.tar", "y/.hidden.tar"):
        packed(tmp_path / name, [])

    def found(pattern: str) -> tuple[str, list[str]]:
        root, files = find(f"{tmp_path}/{pattern}", ".tar")
        return str(root.relative_to(tmp_path)), [f.relative_to(root).as_posix() for f in files]

    assert found("x") == ("x", ["0.tar", "1.tar", "2.tar", "10.tar"])
    assert found("x/0.tar") == ("x", ["0.tar"])
    assert found("x/{0..2}.tar") == ("x", ["0.tar", "1.tar", "2.tar"])
    assert found("{x,y}/0*.tar") == (".", ["x/0.tar", "y/0.tar"])
    assert found("*/?.tar")[1] == ["x/0.tar", "x/1.tar", "x/2.tar", "y/0.tar"]
    for pattern, words in {
        "x/{0..5}.tar": "3 of 6 files do not exist, the first is .*x/3.tar",
        "z/*.tar": "no file matches",
        "z": "does not exist",
        "x/{3..1}.tar": "the range {3..1} ends before it begins",
    }.items():
        with pytest.raises(DataError, match=words):
            found(pattern)
    with pytest.raises(DataError, match="only files of this machine"):
        find("https://example.com/{0..9}.tar", ".tar")
    assert [e.key for e in keyed(tmp_path)] == ["x/0.tar/a", "y/0.tar/a"]


def keyed(folder: Path):
    for name in ("x/0.tar", "y/0.tar"):
        packed(folder / name, [("a.png", encoded(1)), ("a.txt", "a")])
    return TarData(path=str(folder / "{x,y}" / "0.tar")).examples


# --- tars


def tar_source(tmp_path: Path, *members: tuple[str, bytes | str], **options: object) -> TarData:
    packed(tmp_path / "a.tar", members)
    return TarData(path=str(tmp_path / "a.tar"), **options)


def reasons(source: Indexed) -> list[tuple[str, str]]:
    return [(p.key, p.reason.partition(";")[0]) for p in source.problems]


GOOD = [("good.png", encoded(0)), ("good.txt", "good")]
BAD_MEMBERS: dict[str, tuple[list[tuple[str, bytes | str]], list[tuple[str, str]]]] = {
    "without caption": ([("b.png", b"")], [("b", "pictures without a caption")]),
    "without picture": ([("b.txt", "b")], [("b", "samples without a picture")]),
    "neither": ([("b.npy", b"")], [("b", "samples without a picture")]),
    "two pictures": (
        [("b.png", b""), ("b.jpg", b""), ("b.txt", "b")],
        [("b", "samples with several pictures")],
    ),
    "two captions": (
        [("b.png", b""), ("b.txt", "b"), ("b.caption", "c")],
        [("b", "pictures with several caption members")],
    ),
    "twice": (
        [("b.txt", "b"), ("b.png", encoded(1)), ("c.cls", "3"), ("b.png", b""), ("b.txt", "c")],
        [("b", "keys that stand twice in a tar"), ("c", "samples without a picture")],
    ),
    "not UTF-8": (
        [("b.png", b""), ("b.txt", b"caf\xe9")],
        [("b", "captions that are not UTF-8")],
    ),
    "blank": (
        [("b.png", b""), ("b.txt", " \n")],
        [("b", "pictures whose caption is empty or no text")],
    ),
    "endless caption": (
        [("b.png", b""), ("b.txt", "b" * (2**20 + 1))],
        [("b", "captions of more than 1048576 bytes")],
    ),
    "JSON without caption": (
        [("b.png", b""), ("b.json", '{"url": "x"}'), ("c.png", b""), ("c.json", "[1]")],
        [(k, "pictures whose .json has no 'caption' or 'text'") for k in "bc"],
    ),
    "JSON without text": (
        [("b.png", b""), ("b.json", '{"caption": null}')],
        [("b", "pictures whose caption is empty or no text")],
    ),
    "broken JSON": (
        [("b.png", b""), ("b.json", "{"), ("c.png", b""), ("c.json", "[" * 100_000)],
        [(k, "captions in a .json that is not valid JSON") for k in "bc"],
    ),
    "JPEG XL": (
        [("b.jxl", b""), ("b.txt", "b")],
        [("b", "pictures in a format that is not read (JPEG XL)")],
    ),
    "dots": (
        [("b.1.png", b""), ("b.1.txt", "1"), ("b.2.png", b""), ("b.2.txt", "2")],
        [(f"b.{n}.png", "pictures with a dot in their name, where a key ends") for n in (1, 2)],
    ),
    "leaves": (
        [("../b.png", b""), ("c/../../b.txt", "b"), (f"{os.sep}b.png", b"")],
        [
            (name, "members with an absolute name or a .. in it")
            for name in ("../b.png", "c/../../b.txt", f"{os.sep}b.png")
        ],
    ),
    "odd name": ([("b\udce9.png", b"")], [("b\ufffd.png", "members whose name is not UTF-8")]),
    "broken picture": (
        [("b.png", b""), ("b.txt", "b")],
        [("b", "pictures that cannot be read (the file is empty)")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members_are_named(name: str, tmp_path: Path) -> None:
    members, problems = BAD_MEMBERS[name]
    source = tar_source(tmp_path, *GOOD, *members)
    assert reasons(source) == [(f"a.tar/{key}", reason) for key, reason in problems]
    assert "a.tar/good" in [e.key for e in source.examples]
    assert len(source.examples) == (2 if name == "twice" else 1)
    assert all("; " in p.reason for p in source.problems)
    errors = [f for f in check(source, "webdataset", Expected(64, Buckets())).findings
              if f.severity == "error"]  # fmt: skip
    assert {key for finding in errors for key in finding.keys} == {p.key for p in source.problems}
    with pytest.raises(DataError, match=re.escape(errors[0].what)):
        Collection(tar_source(tmp_path, *members), ImageTransform())
    assert source.where("a.tar/b") == str(tmp_path / "a.tar/b")


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_links_that_are_not_followed_have_names(kind: str, tmp_path: Path) -> None:
    make, suffix = {"webdataset": (tars, ".tar"), "parquet": (parquet, ".parquet")}[kind]
    make(tmp_path / "data")
    make(tmp_path / "other")
    (tmp_path / "plain").mkdir()
    whole = content(KINDS[kind](path=str(tmp_path / "data")))
    data = tmp_path / "data"
    (data / "sub").mkdir()
    (data / "sub" / "more").symlink_to(tmp_path / "other")
    (data / f"gone{suffix}").symlink_to(tmp_path / "nothing")
    (data / "nothing of it").symlink_to(tmp_path / "plain")
    (data / "round").symlink_to(data)
    (data / f"copy{suffix}").symlink_to(sorted((tmp_path / "other").rglob(f"*{suffix}"))[0])
    source = KINDS[kind](path=str(data))
    problems = {problem.key: problem.reason for problem in source.problems}
    assert set(problems) == {"sub/more/", f"gone{suffix}"}
    assert "not followed; copy them" in problems["sub/more/"]
    assert problems[f"gone{suffix}"] == "links to nothing; remove them"
    assert len(source.examples) > len(whole)  # a link to a file is followed
    with pytest.raises(DataError, match="links to folders|links to nothing"):
        Collection(source, ImageTransform())
    assert pickle.loads(pickle.dumps(source)).problems == source.problems


def test_keys_of_members_are_compared_in_one_normal_form(tmp_path: Path) -> None:
    """As a Mac packs them: some names in form D, some in form C."""
    (c, d), (cc, dd) = (
        [unicodedata.normalize(form, name) for form in ("NFC", "NFD")] for name in ("é", "ö")
    )
    source = tar_source(
        tmp_path,
        *[(f"{d}.png", encoded(1)), (f"{c}.txt", "first"), (f"{cc}.txt", "later")],
        *[("a.png", encoded(2)), ("a.txt", "a"), (f"{dd}.png", encoded(3)), ("ü.png", b"")],
        *[(unicodedata.normalize("NFD", "ü.jpg"), b""), ("ü.txt", "two")],
    )
    found = {e.key: e.captions for e in source.examples}
    assert found == {f"a.tar/{d}": ("first",), "a.tar/a": ("a",), f"a.tar/{cc}": ("later",)}
    assert reasons(source) == [("a.tar/ü", "samples with several pictures")]


def test_a_parquet_file_with_other_columns_leaves_the_others(tmp_path: Path) -> None:
    parquet(tmp_path / "data")
    pq.write_table(pa.table({"image": [encoded(1)], "words": ["x"]}), tmp_path / "data/2.parquet")
    source = TableData(path=str(tmp_path / "data"))
    assert len(source.examples) == 12
    (problem,) = source.problems
    assert problem.key == "2.parquet"
    assert problem.reason == (
        "parquet files without the columns (no column 'text' among ['image', 'words'], set"
        " data.image_column or data.caption_column); or move them away"
    )


def test_shards_of_a_source(tmp_path: Path) -> None:
    tars(tmp_path / "tars")
    source = TarData(path=str(tmp_path / "tars"))
    files = [key.split("/")[0] for key in (e.key for e in source.examples)]
    assert [files.index(f) for f in files] == [
        source.shards.tolist().index(n) for n in source.shards.tolist()
    ]
    assert len(set(source.shards.tolist())) == len(set(files)) > 1
    (tmp_path / "tables").mkdir()
    for n in range(2):
        table = pa.Table.from_pylist(ROWS)
        pq.write_table(table, tmp_path / "tables" / f"{n}.parquet", row_group_size=5)
    groups = TableData(path=str(tmp_path / "tables")).shards
    assert groups.tolist() == [0] * 5 + [1] * 5 + [2] * 2 + [3] * 5 + [4] * 5 + [5] * 2
    sidecars(tmp_path / "folder")
    assert FolderData(path=str(tmp_path / "folder")).shards is None


def test_links_devices_and_sparse_members_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = kind, "../secret"
            opened.addfile(member)
        member = tarfile.TarInfo("3.png")  # a map that puts 4 bytes at 10**12
        member.pax_headers = {"GNU.sparse.size": str(10**12), "GNU.sparse.map": "0,4"}
        member.size = 4
        opened.addfile(member, io.BytesIO(b"data"))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        opened.addfile(folder)
        for name, data in GOOD:
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data if isinstance(data, bytes) else data.encode()))
    source = TarData(path=str(tmp_path))
    wrong = "members that are links, devices or sparse files"
    assert reasons(source) == [(f"a.tar/{n}.png", wrong) for n in range(4)]
    assert [e.key for e in source.examples] == ["a.tar/folder/good"]


def test_companions_are_told_once_and_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = [(f"b.{suffix}", pickle.dumps("x")) for suffix in ("pkl", "pyd", "mask.png", "cls")]
    for shard in "01":
        packed(tmp_path / f"{shard}.tar", [("b.png", encoded(1)), ("b.txt", "b"), *others])
    source = TarData(path=str(tmp_path))
    with caplog.at_level(logging.INFO, "ldm.data.tar"):
        assert [e.captions for e in source.examples] == [("b",), ("b",)]
        assert source.problems == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: members beside the pictures that are not read: 2 .pkl, 2 .pyd, 2 .cls, 2 .png"
    ]


def test_captions_of_json(tmp_path: Path) -> None:
    table = {"caption": ["one", "two"], "text": "three", "own": "four"}
    members = [("a.png", encoded(1)), ("a.json", json.dumps(table)), ("a.txt", "five")]
    assert tar_source(tmp_path, *members).examples[0].captions == ("five",)
    assert tar_source(tmp_path, *members[:2]).examples[0].captions == ("one", "two")
    own = tar_source(tmp_path, *members, caption_column="own")
    assert own.examples[0].captions == ("four",)
    assert len(tar_source(tmp_path, members[0], members[2], caption_column="own").problems) == 1


def test_cut_tars_keep_what_is_whole(tmp_path: Path) -> None:
    tars(tmp_path)
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as opened:
        found = opened.getmembers()
    damaged = ("0.tar", "tars that are cut off or damaged")
    half = ("0.tar/02", "samples that the end of the tar cuts off")
    cut = {
        # inside the third picture, inside the third caption's header, at a member's end, no end
        found[4].offset_data + 10: (2, [damaged, half]),
        found[5].offset + 100: (2, [damaged, ("0.tar/02", "pictures without a caption")]),
        found[4].offset: (2, [damaged]),
        found[-1].offset_data + 512: (6, [damaged]),
        found[-1].offset_data + 1024: (6, []),
        0: (0, [damaged]),
    }  # fmt: skip
    for length, (good, problems) in cut.items():
        (tmp_path / "0.tar").write_bytes(whole[:length])
        source = TarData(path=str(tmp_path))
        assert len(source.examples) == good + 6, length
        assert reasons(source) == problems, length
    # A header in the middle that is no header; two tars in one.
    broken = bytearray(whole)
    broken[found[4].offset : found[4].offset + 512] = b"x" * 512
    (tmp_path / "0.tar").write_bytes(broken)
    assert (len(TarData(path=str(tmp_path)).examples), reasons(TarData(path=str(tmp_path)))) == (
        8,
        [damaged],
    )
    (tmp_path / "0.tar").write_bytes(whole + whole)
    assert reasons(TarData(path=str(tmp_path))) == [
        ("0.tar", "tars with more members behind their end")
    ]


def test_a_negative_size_ends_the_walk(tmp_path: Path) -> None:
    packed(tmp_path / "a.tar", [*GOOD, ("b.png", b"")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as opened:
        start = opened.getmembers()[-1].offset
    data[start + 124 : start + 136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
    data[start + 148 : start + 156] = b" " * 8
    checksum = sum(data[start : start + 512])
    data[start + 148 : start + 156] = b"%06o\0 " % checksum
    (tmp_path / "a.tar").write_bytes(data)
    source = TarData(path=str(tmp_path))
    assert len(source.examples) == 1
    assert reasons(source) == [("a.tar", "tars that are cut off or damaged")]


def test_compressed_tars(tmp_path: Path) -> None:
    packed(tmp_path / "a.tar", GOOD)
    (tmp_path / "b.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(DataError, match=r"b.tar: this tar is compressed \(gzip\), decompress it"):
        len(TarData(path=str(tmp_path)).examples)
    (tmp_path / "b.tar").rename(tmp_path / "b.tar.gz")
    for path in (tmp_path, tmp_path / "b.tar.gz"):
        with pytest.raises(DataError, match="b.tar.gz: a compressed tar has no random access"):
            len(TarData(path=str(path)).examples)


class Counted(io.FileIO):
    """Counts what is read, by file name."""

    read_from: dict[str, list[tuple[int, int]]] = {}

    def read(self, size: int | None = -1) -> bytes:
        place, data = self.tell(), super().read(size)
        self.read_from.setdefault(Path(self.name).name, []).append((place, len(data)))
        return data


def counted(file: Path, mode: str, buffering: int = -1) -> io.IOBase:
    return Counted(file, mode)


def test_a_picture_is_one_read_of_its_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars(tmp_path)
    source = TarData(path=str(tmp_path))
    assert len(source.examples) == 12
    monkeypatch.setattr(tar, "open", counted, raising=False)
    monkeypatch.setattr(Counted, "read_from", {})
    again = TarData(path=str(tmp_path))  # the index is there: nothing is read to open
    assert (len(again.examples), Counted.read_from) == (12, {})
    for n in (7, 3, 11, 3):
        again.load(n)
    with tarfile.open(tmp_path / "0.tar") as opened:
        place = opened.getmember("03.png").offset_data
    sizes = [len(data) for _, data, _ in PICTURES]
    assert Counted.read_from["0.tar"] == [(place, sizes[3])] * 2
    assert [length for _, length in Counted.read_from["1.tar"]] == [sizes[7], sizes[11]]


def test_a_new_shard_indexes_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(index, "look", lambda data, look=index.look: seen.append(1) or look(data))
    for kind, make, suffix in (("webdataset", tars, "tar"), ("parquet", parquet, "parquet")):
        make(tmp_path / kind)

        def opened(kind: str = kind) -> int:
            seen.clear()
            assert len(KINDS[kind](path=str(tmp_path / kind)).examples) in (6, 12)
            return len(seen)

        later, aside = tmp_path / kind / f"1.{suffix}", tmp_path / "aside"
        later.rename(aside)
        assert (opened(), opened()) == (6, 0)
        aside.rename(later)
        assert (opened(), opened()) == (6, 0)
        os.utime(later, ns=(1, 1))
        assert (opened(), opened()) == (6, 0)


def test_a_tar_that_shrinks_behind_our_back(tmp_path: Path) -> None:
    tars(tmp_path)
    source = TarData(path=str(tmp_path))
    assert len(source.examples) == 12
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(DataError) as error:
        source.load(0)
    assert str(error.value) == (
        f"{tmp_path}/0.tar/00: the picture cannot be read (the tar ends before the picture does)"
    )


# --- tables


def table_source(tmp_path: Path, rows: list[dict[str, object]], **options: object) -> TableData:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("text", pa.string())])
    rows_of = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(rows_of, tmp_path / "a.parquet", row_group_size=3)
    return TableData(path=str(tmp_path / "a.parquet"), **options)


def test_bad_rows_of_a_table_are_named_and_none_is_lost(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(encoded(1))
    (tmp_path / "in/inside.png").write_bytes(encoded(2))
    data = encoded(3)
    rows = [
        ({"bytes": data}, "good", ""),
        (None, "a", "pictures that cannot be read (the row has none)"),
        ({"bytes": None, "path": None}, "a", "pictures that cannot be read (the row has none)"),
        ({"bytes": b""}, "a", "pictures that cannot be read (the file is empty)"),
        ({"path": "inside.png"}, "good", ""),
        ({"path": "../out.png"}, "a", "pictures that cannot be read (its path leads out of"),
        ({"path": str(tmp_path / "out.png")}, "a", "pictures that cannot be read (its path leads"),
        ({"path": "lost.png"}, "a", "pictures that cannot be read (No such file or directory)"),
        ({"path": "C:\\p\\a.png"}, "a", "pictures that cannot be read (its path is one of Windows"),
        ({"bytes": data[:60]}, "a", "pictures that cannot be read ("),
        ({"bytes": data}, None, "rows whose caption is empty or no text; caption or remove them"),
        ({"bytes": data}, " ", "rows whose caption is empty or no text; caption or remove them"),
        ({"bytes": data}, "good", ""),
    ]
    source = table_source(tmp_path / "in", [{"image": i, "text": t} for i, t, _ in rows])
    bad = {f"a.parquet:{n}": reason for n, (_, _, reason) in enumerate(rows, 1) if reason}
    assert {p.key for p in source.problems} == bad.keys()
    for problem in source.problems:
        assert problem.reason.startswith(bad[problem.key])
        assert "; " in problem.reason and "\n" not in problem.reason
    assert len(source.examples) + len(source.problems) == len(rows)
    assert [e.key for e in source.examples] == ["a.parquet:1", "a.parquet:5", "a.parquet:13"]
    assert source.load(1).size == (7, 9)


def test_a_picture_beside_a_table_is_part_of_its_state(tmp_path: Path) -> None:
    parquet_paths(tmp_path / "data")
    before = TableData(path=str(tmp_path / "data")).digest(3)
    (tmp_path / "data/files/03.png").write_bytes(encoded(99))
    assert TableData(path=str(tmp_path / "data")).digest(3) != before


def test_damaged_parquet_files(tmp_path: Path) -> None:
    parquet(tmp_path / "data")
    whole = (tmp_path / "data/0.parquet").read_bytes()
    (tmp_path / "data/0.parquet").write_bytes(whole[:-9])
    source = TableData(path=str(tmp_path / "data"))
    assert (len(source.examples), len(source.problems)) == (6, 1)
    assert reasons(source) == [("0.parquet", "parquet files that are cut off or damaged")]
    # Holes in the data: the footer counts the rows, and every one comes out, good or bad.
    about = pq.ParquetFile(io.BytesIO(whole)).metadata
    columns = {about.row_group(0).column(n).path_in_schema: n for n in range(3)}
    for column, bad in (("image.bytes", 4), ("text", 4)):
        place = about.row_group(0).column(columns[column])
        start = place.dictionary_page_offset or place.data_page_offset
        holed = bytearray(whole)
        holed[start : start + place.total_compressed_size] = b"\xff" * place.total_compressed_size
        (tmp_path / "data/0.parquet").write_bytes(holed)
        source = TableData(path=str(tmp_path / "data"))
        assert (len(source.examples), len(source.problems)) == (12 - bad, bad), column
    (tmp_path / "data/0.parquet").write_bytes(b"")
    assert len(TableData(path=str(tmp_path / "data")).problems) == 1


def test_unusable_tables_are_one_line(tmp_path: Path) -> None:
    source = table_source(tmp_path, [{"image": {"bytes": encoded(1)}, "text": "a"}])
    for options, words in (
        ({"image_column": "picture"}, "no column 'picture' among ['image', 'text'], set"),
        ({"caption_column": "caption"}, "no column 'caption' among"),
        ({"image_column": "text"}, "column 'text' holds string, not the bytes of pictures; set"),
    ):
        with pytest.raises(DataError) as error:
            len(TableData(path=source.path, **options).examples)
        assert str(error.value).startswith(f"{tmp_path / 'a.parquet'}: {words}")
        assert "\n" not in str(error.value)


def test_row_groups_are_read_once_in_order_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": {"bytes": encoded(n)}, "text": f"{n}"} for n in range(12)]
    source = table_source(tmp_path, rows)
    monkeypatch.setattr(table, "_groups", table._Groups(2**20))
    reads: list[tuple[int, list[str]]] = []

    class Opened(pq.ParquetFile):
        def read_row_group(self, group: int, columns: list[str], **options: object) -> pa.Table:
            reads.append((group, columns))
            return super().read_row_group(group, columns, **options)

    monkeypatch.setattr(pq, "ParquetFile", Opened)
    assert len(source.examples) == 12
    images = [read for read in reads if read[1] == ["image"]]
    assert sorted(images) == [(g, ["image"]) for g in range(4)]
    reads.clear()
    monkeypatch.setattr(table, "_groups", table._Groups(1))  # the last one is kept whatever
    for n in (0, 2, 1, 3, 0):
        source.load(n)
    assert reads == [(0, ["image"]), (1, ["image"]), (0, ["image"])]


# --- datasets


def test_datasets_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    saved_splits(tmp_path / "splits")
    splits = str(tmp_path / "splits")
    for options, words in (
        ({"path": splits, "split": "val"}, "no split 'val' among ['train', 'test'], set"),
        ({"path": splits, "image_column": "png"}, "no column 'png' among ['image'"),
        ({"path": splits, "image_column": "text"}, "column 'text' holds Value("),
        ({"path": "nobody-at-all/nothing"}, "HF_HUB_OFFLINE is set, so it must be in the cache"),
        ({"path": str(tmp_path / "none")}, "none"),
    ):
        with pytest.raises(DataError) as error:
            len(DatasetsData(**options).examples)
        assert str(error.value).startswith(f"{options['path']}: ")
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    assert len(DatasetsData(path=str(tmp_path / "splits"), split="test").examples) == 1


def test_the_package_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'ldm\[data\]'"):
        len(DatasetsData(path="x").examples)


@pytest.mark.skipif(os.name == "nt", reason="one name there")
def test_paths_of_a_table_in_another_normal_form(tmp_path: Path) -> None:
    c, d = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    (tmp_path / d).mkdir()
    (tmp_path / d / f"{d}.png").write_bytes(encoded(1))
    rows = [{"image": {"bytes": None, "path": f"{c}/{c}.png"}, "text": "a"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    source = TableData(path=str(tmp_path / "a.parquet"))
    assert len(source.examples) == 1 and not source.problems
    (part,) = TableData(path=str(tmp_path / "a.parquet")).parts
    assert [Path(name).name for name, *_ in part.files] == ["a.parquet", f"{d}.png"]


def test_bad_rows_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": {"bytes": encoded(1), "path": None}, "text": ["a", "b"]},
        {"image": {"bytes": b"no picture", "path": None}, "text": ["a"]},
        {"image": {"bytes": encoded(2), "path": None}, "text": []},
        {"image": {"bytes": None, "path": str(tmp_path / "secret.png")}, "text": ["a"]},
    ]
    (tmp_path / "secret.png").write_bytes(encoded(3))
    # Not cast to Image: saving would read the file in.
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    info = json.loads((tmp_path / "data/dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    source = DatasetsData(path=str(tmp_path / "data"))
    assert [e.captions for e in source.examples] == [("a", "b")]
    assert [p.key for p in source.problems] == ["train[1]", "train[2]", "train[3]"]
    assert "leads out of the folder" in source.problems[2].reason
