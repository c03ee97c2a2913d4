"""``ldm data check``: every kind of bad input is named, nothing is lost, fixes can be undone."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from bad_data import BAD, COPIES, ODD, cut, encoded, photo, put, rows
from ldm.cli import app
from ldm.data.audit.check import Expected, check
from ldm.data.audit.perceptual_hash import DISTANCE, distance, groups, look_of
from ldm.data.audit.quarantine import quarantine, undo
from ldm.data.audit.report import Report
from ldm.data.buckets import Buckets
from ldm.data.collection import Collection
from ldm.data.folder import FolderData
from ldm.data.images import ImageTransform
from ldm.demo.shapes import ShapesData
from ldm.errors import DataError
from ldm.models.tokenizer import save_tokenizer, train_tokenizer
from runs import tree as run_tree

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(sys.platform != "linux", reason="pipes, links and names in Latin-1"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
]
GOOD = "good.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good picture."""
    put(tmp_path / "data", GOOD, photo(0), "a caption of its own")
    return tmp_path / "data"


def report(folder: Path, **options: object) -> Report:
    data = FolderData(path=str(folder), **{"held_out_fraction": 0.0, **options})
    return check(data, "folder", Expected(80, Buckets(64, 2)))


def found(report: Report) -> dict[str, list[str]]:
    return {finding.kind: sorted(finding.keys) for finding in report.findings}


@pytest.mark.parametrize("name", [*BAD, *ODD])
def test_each_kind_is_named_exactly(name: str, folder: Path) -> None:
    make, kind, keys, detail = {**BAD, **ODD}[name]
    make(folder)
    result = report(folder)
    assert found(result) == {kind: keys}
    (finding,) = result.findings
    assert (finding.severity == "error") == (name in BAD) == (result.status(strict=False) == 2)
    assert detail in next(iter(finding.details.values()), "")
    assert finding.what and finding.cure
    assert json.loads(json.dumps(result.json()))["findings"][0]["keys"] == list(finding.keys)


@pytest.mark.parametrize("name", [*BAD, *ODD])
def test_a_run_says_of_each_kind_what_the_check_says(name: str, folder: Path) -> None:
    """An error ends a run, by its name; skipped, it is what the check named; a warning trains."""
    make, kind, keys, _ = {**BAD, **ODD}[name]
    make(folder)
    result = report(folder)
    errors = [finding for finding in result.findings if finding.severity == "error"]
    data, transform = FolderData(path=str(folder), held_out_fraction=0), ImageTransform(80)
    if errors:
        (finding,) = errors
        with pytest.raises(DataError) as error:
            Collection(data, transform)
        assert f"{folder}: {len(finding.keys)} {finding.what}" in str(error.value)
        assert finding.cure in str(error.value)
    run = Collection(data, transform, "skip" if errors else "error")
    assert sorted(p.key for _, p in run.skipped) == (keys if errors else [])
    assert len(run.train) == result.train >= 1


@pytest.mark.parametrize(("size", "refused"), [((50, 90), True), ((70, 90), False)])
def test_what_is_too_small_for_the_buckets_of_a_run(
    size: tuple[int, int], refused: bool, folder: Path
) -> None:
    put(folder, "x.png", photo(5, *size))
    data = FolderData(path=str(folder), held_out_fraction=0)
    for upscale in (False, True):
        buckets = Buckets(64, 2, upscale)
        found = check(data, "folder", Expected(80, buckets, refused=True)).findings
        kinds = {finding.kind: finding.severity for finding in found}
        if refused and not upscale:
            assert kinds == {"smaller-than-a-step": "error"}
            with pytest.raises(DataError, match="1 pictures smaller than a step of the buckets: x"):
                Collection(data, ImageTransform(80, buckets=buckets))
        else:
            assert kinds == {"small": "warning"}
            assert len(Collection(data, ImageTransform(80, buckets=buckets)).train) == 2


@pytest.mark.parametrize(
    "text",
    ["a <cat-toy> on a table", "\U0001f34e", "AT&T", "R&D; a lab", "3", "<3", "none of it", "nanny",
     "\u732b", "a < b > c", "<sks>"],
)  # fmt: skip
def test_captions_that_say_something(text: str, folder: Path) -> None:
    put(folder, "x.png", photo(5), text)
    assert found(report(folder)) == {}


def test_all_kinds_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    root = tmp_path / "data"
    expected: dict[str, set[str]] = {}
    good = 0
    for number, (make, kind, keys, _) in enumerate(BAD.values()):
        below = root / f"{number}"
        put(below, GOOD, photo(1000 + number))
        make(below)
        good += 1 + (below / "row.png").exists()
        expected.setdefault(kind, set()).update(f"{number}/{key}" for key in keys)
    result = report(root)
    errors = {f.kind: set(f.keys) for f in result.findings if f.severity == "error"}
    assert errors == expected
    assert len(BAD) >= 40 and len(BAD) + len(ODD) >= 70
    assert result.train == good == len(BAD) + 21
    # Whatever looks like a picture was counted as good, or was named.
    named = set().union(*errors.values())
    usable = {example.key for example in FolderData(path=str(root)).examples}
    there = {
        os.fsencode(file.relative_to(root)).decode(errors="backslashreplace")
        for file in root.rglob("*")
        if not file.name.endswith((".txt", ".caption", ".jsonl", ".csv", ".parquet"))
        and not (file.is_dir() and not file.is_symlink())
    }
    assert usable | (named & there) == there and not usable & named
    assert len(usable) == good


UNUSABLE = {
    "no folder": (lambda folder: None, "this folder does not exist"),
    "a file": (lambda folder: folder.write_text(""), "this is a file"),
    "no picture": (lambda folder: folder.mkdir(), "no picture in this folder"),
    "no caption": (lambda folder: put(folder, GOOD, photo(0), None), "1 pictures but no captions"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_read_as_a_whole(name: str, tmp_path: Path) -> None:
    make, message = UNUSABLE[name]
    make(tmp_path / "data")
    status, content = run(tmp_path / "data")
    assert status == 2
    (finding,) = content["findings"]
    assert finding["kind"] == "unusable"
    assert message in finding["details"][str(tmp_path / "data")]


def run(folder: Path | str, *options: str) -> tuple[int, dict]:
    """Exit status and JSON of the command, which prints nothing else."""
    result = CliRunner().invoke(app, ["data", "check", str(folder), "--json", "-", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def test_exit_status(folder: Path) -> None:
    settings = ("--size", "80", "--held-out", "0")
    assert run(folder, *settings, "--strict")[0] == 0
    put(folder, "grey.png", photo(1).convert("L"))
    assert run(folder, *settings, "--strict")[0] == 0  # a note
    put(folder, "blank.png", Image.new("RGB", (90, 90)))
    assert run(folder, *settings)[0] == 0
    assert run(folder, *settings, "--strict")[0] == 1
    put(folder, "empty.png", b"")
    status, content = run(folder, *settings)
    assert status == 2
    assert content["version"] == 1
    assert content["counts"] == {"error": 1, "warning": 1, "note": 1}
    assert content["pictures"] == {"usable": 3, "train": 3, "held_out": 0}
    assert sum(aspect["pictures"] for aspect in content["aspects"]) == 3
    assert sum(bucket["pictures"] for bucket in content["buckets"]) == 3


@pytest.mark.parametrize(
    "options",
    [
        ("--fix", "convert"),
        ("--out", "x"),
        ("--also", "small"),
        ("--fix", "quarantine", "--also", "grey"),
        ("--fix", "everything"),
        ("--size", "16"),
        ("--size", "0"),
        ("--step", "0"),
        ("--held-out", "2"),
        ("--tokenizer", "nowhere"),
    ],
)
def test_calls_that_make_no_sense_are_one_line(options: tuple[str, ...], folder: Path) -> None:
    result = CliRunner().invoke(app, ["data", "check", str(folder), *options])
    assert result.exit_code == 2
    assert "rror" in result.stderr and "Traceback" not in result.stderr


def test_the_terminal(folder: Path) -> None:
    for n in range(5):
        put(folder, f"\x1b[31m{n}.png", b"")
    put(folder, "1.png", photo(1))
    put(folder, "2.png", photo(1))
    result = CliRunner().invoke(app, ["data", "check", str(folder), "--size", "80"])
    assert result.exit_code == 2
    for line in (
        "error   5 pictures that cannot be read  [pictures-that-cannot-be-read]",
        "         ?[31m0.png (the file is empty)",
        "         and 2 more",
        "warning 2 pictures whose files are the same  [exact-duplicates]",
        "         1.png = 2.png",
        "     10:9 to 3:2         3 ########################################",
        "       64x64    1.00         3",
        "not checked: the length of the captions: no --tokenizer is given",
        "1 kinds of errors, 1 kinds of warnings, 0 kinds of notes",
    ):
        assert line in result.stdout.splitlines()
    assert "\x1b" not in result.stdout


def test_captions_longer_than_the_text_encoder_sees(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["a caption of its own"] * 2, 600, 8), tmp_path / "tokenizer")
    put(folder, "x.png", photo(1), "a b c d e f g h")
    put(folder, "y.png", photo(2), "a b c d e f")
    status, content = run(folder, "--size", "80", "--tokenizer", str(tmp_path / "tokenizer"))
    (finding,) = content["findings"]
    assert finding["kind"] == "long-captions" and finding["keys"] == ["x.png"]
    assert finding["details"] == {"x.png": "2 tokens are cut"}
    assert (status, content["unchecked"], content["settings"]["tokens"]) == (0, [], 8)


def test_a_caption_of_megabytes_is_counted_as_it_is_read(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["a caption of its own"] * 2, 600, 8), tmp_path / "tokenizer")
    put(folder, "x.png", photo(1), "a caption of its own " * 100_000)
    sheet = tmp_path / "sheet.png"
    words = ("--tokenizer", str(tmp_path / "tokenizer"), "--sheet", str(sheet))
    status, content = run(folder, "--size", "80", *words)
    (finding,) = content["findings"]
    assert (status, finding["kind"], finding["keys"]) == (0, "long-captions", ["x.png"])
    told = "at least 482 tokens are cut: it has 2,099,999 characters"
    assert finding["details"] == {"x.png": told}
    assert sheet.exists()


def test_all_held_out_is_nothing_to_train_on(folder: Path) -> None:
    result = report(folder, held_out_fraction=1.0)
    assert found(result) == {"nothing-to-train-on": [str(folder)]}
    assert result.status(strict=False) == 2
    with pytest.raises(DataError, match="none of 1 pictures is left to train on"):
        Collection(FolderData(path=str(folder), held_out_fraction=1.0), ImageTransform(80))


# --- all that a run reads


def subset(folder: Path, name: str, more: str = "") -> str:
    put(folder / name, GOOD, photo(sum(name.encode())), None)
    (folder / name / "good.caption").write_text(f"what {name} shows")
    return f"[[datasets.subsets]]\nimage_dir = '{folder / name}'\n{more}\n"


def test_a_dataset_config_is_checked_as_a_whole(tmp_path: Path) -> None:
    root = tmp_path / "data"
    text = "[[datasets]]\n" + subset(root, "dogs", "num_repeats = 3") + subset(root, "cats")
    put(root / "cats", "bad.png", b"", None)
    (root / "cats/bad.caption").write_text("broken")
    put(root / "cats", "same.png", photo(sum(b"dogs")), None)
    (root / "cats/same.caption").write_text("what dogs shows")
    (root / "set.toml").write_text(text)
    settings = ("--size", "80", "--held-out", "0")
    status, content = run(root / "set.toml", *settings)
    kinds = {f["kind"]: f["keys"] for f in content["findings"]}
    assert (status, content["source"]) == (
        2, {"name": str(root / "set.toml"), "kind": "sd_scripts"},
    )  # fmt: skip
    assert content["pictures"] == {"usable": 3, "train": 3, "held_out": 0}
    assert kinds == {
        "pictures-that-cannot-be-read": ["cats/bad.png"],
        "exact-duplicates": ["dogs/good.png", "cats/same.png"],  # across the subsets
        "dominant-caption": ["dogs/good.png", "cats/same.png"],
    }
    assert [(s["name"], s["train"], s["weight"]) for s in content["sources"]] == [
        (str(root / "dogs"), 1, 3), (str(root / "cats"), 2, 2),
    ]  # fmt: skip
    # A subset that cannot be read at all leaves the others.
    (root / "empty").mkdir()
    (root / "set.toml").write_text(f"{text}[[datasets.subsets]]\nimage_dir = '{root / 'empty'}'")
    status, content = run(root / "set.toml", *settings)
    found = {f["kind"]: f for f in content["findings"]}
    assert found.keys() == kinds.keys() | {"unusable"}
    assert found["unusable"]["keys"] == [str(root / "empty")]
    assert "no picture in this folder" in found["unusable"]["details"][str(root / "empty")]
    shown = CliRunner().invoke(app, ["data", "check", str(root / "set.toml"), *settings]).stdout
    assert f"  {root / 'dogs'} (sd_scripts): 1 to train on and 0 held out" in shown.splitlines()


def test_folders_named_by_repeats_are_checked(tmp_path: Path) -> None:
    put(tmp_path / "10_sks dog", "a.png", photo(1), None)
    put(tmp_path / "2_cat", "b.png", photo(2), None)
    status, content = run(tmp_path, "--size", "80", "--held-out", "0")
    assert (status, content["source"]["kind"], content["findings"]) == (0, "sd_scripts", [])
    assert [s["weight"] for s in content["sources"]] == [2, 10]
    status, content = run(tmp_path / "nothing.toml")
    assert (status, [f["kind"] for f in content["findings"]]) == (2, ["unusable"])
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--caption-column", "x"])
    assert result.exit_code == 2
    assert "--caption-column is nothing that sd_scripts has" in result.stderr


def described(folder: Path, **changes: object) -> Path:
    """The config of a run on a folder, a tar, a table and drawn pictures."""
    put(folder / "pictures", GOOD, photo(1), "the same in two sources")
    put(folder / "pictures", "small.png", photo(2, 40, 90), "less than a step")
    with tarfile.open(folder / "a.tar", "w") as opened:
        for name, data in (
            ("x.png", encoded(photo(1), "PNG")),
            ("x.txt", b"a tar's"),
            ("y.txt", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    columns = {"image": [encoded(photo(3), "PNG")], "text": ["a word of a table and many more"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "b.parquet")
    data = [{"path": str(folder / name), "held_out_fraction": 0}
            for name in ("pictures", "a.tar", "b.parquet")]  # fmt: skip
    data.append({"kind": "shapes", "count": 9, "size": 16})
    config = run_tree(folder / "run", data=data, images={"size": 128, "buckets": {"step": 64}})
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config | changes))
    return file


def test_all_that_a_run_reads(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["the same in two sources"] * 2, 600, 8), tmp_path / "words")
    file = described(tmp_path)
    status, content = run("images.buckets.step=16", "--config", str(file))
    kinds = {f["kind"]: f["keys"] for f in content["findings"]}
    assert (status, content["source"]) == (2, {"name": str(file), "kind": "several"})
    assert [s["kind"] for s in content["sources"]] == [
        "folder", "webdataset", "parquet", "shapes",
    ]  # fmt: skip
    assert kinds["samples-without-a-picture"] == [f"{tmp_path}/a.tar/a.tar/y"]
    assert kinds["exact-duplicates"] == [
        f"{tmp_path}/pictures/good.png", f"{tmp_path}/a.tar/a.tar/x",
    ]  # fmt: skip
    assert "smaller-than-a-step" not in kinds
    assert content["settings"] == {"size": 128, "step": 16, "max_aspect": 2.0, "tokens": None}
    # What such a run is refused for is an error; which tokenizer it has is found.
    status, content = run(f"text.tokenizer={tmp_path}/words", "--config", str(file))
    found = {f["kind"]: f for f in content["findings"]}
    small = found["smaller-than-a-step"]
    assert small["severity"] == "error" and f"{tmp_path}/pictures/small.png" in small["keys"]
    assert found["long-captions"]["keys"] and content["settings"]["tokens"] == 8
    _, content = run("on_bad_sample=skip", "--config", str(file))
    assert {f["kind"]: f["severity"] for f in content["findings"]}[
        "smaller-than-a-step"
    ] == "warning"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "{run}", "--size", "64"],
            "--size is what the config says: change it with a.b",
        ),
        (["--config", "{run}", "batch_sise=3"], "did you mean 'batch_size'?"),
        (["--config", "{run}", "--fix", "undo"], "--fix undo goes with a PATH"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        ([], "0 paths are given: name one, or the config of a run"),
        (["a", "b"], "2 paths are given"),
    ],
)
def test_calls_about_a_run_that_make_no_sense(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    file = described(tmp_path)
    given = [part.replace("{run}", str(file)) for part in arguments]
    result = CliRunner().invoke(app, ["data", "check", *given])
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True)


def test_a_second_check_opens_no_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(6):
        put(folder, f"{n}.png", photo(n))
    first = report(folder).json()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pytest.fail("a picture was opened"))
        assert report(folder).json() == first
    put(folder, "new.png", photo(20))
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    assert report(folder).train == 8
    assert len(opened) == 2  # by the index; for what the check asks


def test_near_duplicates_recall_and_precision() -> None:
    """Eleven kinds of copies of 100 pictures, among them all: 1,200 pictures."""
    base = [photo(n, 120, 90) for n in range(100)]
    looks = [look_of(image) for image in base]
    owner = list(range(100))
    for make in COPIES.values():
        looks += [look_of(make(image)) for image in base]
        owner += range(100)
    bits = np.array([look.bits for look in looks], np.uint64)
    thumbs = np.stack([np.frombuffer(look.thumb, np.uint8) for look in looks])
    group = groups(bits, thumbs)
    recall = {
        name: float((group[100 * n : 100 * n + 100] == np.arange(100)).mean())
        for n, name in enumerate(COPIES, 1)
    }
    assert min(recall.values()) >= 0.97, recall
    assert np.mean(list(recall.values())) >= 0.99
    same = group[:, None] == group[None]
    true = np.equal.outer(owner, owner)
    np.fill_diagonal(same, False)
    assert (same & true).sum() / same.sum() == 1


def test_pairs_are_those_of_comparing_all() -> None:
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 2**63, 400, dtype=np.uint64)
    for n in range(200):  # up to 14 flipped bits
        flips = draw.choice(64, n % 15, replace=False)
        bits[200 + n] = bits[n] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0)
        )
    one = draw.integers(0, 256, (1, 192), dtype=np.uint8)
    group = groups(bits, np.repeat(one, 400, axis=0))
    near = distance(bits[:, None], bits[None]) <= DISTANCE
    expected = np.array([np.flatnonzero(row)[0] for row in near])
    assert (group == expected).all()
    assert (group[200:] == np.arange(200)).sum() == 135


def test_drawings_of_other_colours_are_no_copies() -> None:
    looks = [look_of(ShapesData(count=200).load(i).convert("RGB")) for i in range(200)]
    heart = Image.new("RGB", (64, 64), "white")
    for colour in ("red", "blue", "green"):
        heart.paste(colour, (20, 12, 44, 50))
        looks.append(look_of(heart))
    bits = np.array([look.bits for look in looks], np.uint64)
    thumbs = np.stack([np.frombuffer(look.thumb, np.uint8) for look in looks])
    assert (groups(bits, thumbs) == np.arange(203)).all()


def test_leaks_into_the_held_out_pictures(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for n in range(40):
        put(root, f"a{n}.png", photo(n, 90, 90), f"picture {n}")
        put(root, f"b{n}.bmp", photo(n, 90, 90))
        put(root, f"c{n}.png", cut(photo(n, 90, 90), 0.03, 0, 0, 0), f"picture {n}")
    result = report(root, held_out_fraction=0.3)
    held = {e.key for e in FolderData(path=str(root), held_out_fraction=0.3).examples if e.held_out}
    assert 20 < len(held) < 50
    copies, near = set(), set()
    for n in range(40):
        a, b, c = f"a{n}.png", f"b{n}.bmp", f"c{n}.png"
        copies |= {x for x, y in ((a, b), (b, a)) if x in held and y not in held}
        near |= {x for x in (a, b) if x in held and c not in held and {a, b} <= held}
        near |= {c} if c in held and not {a, b} <= held else set()
    leaks = {f.kind: f for f in result.findings if f.kind.startswith("leaked")}
    assert set(leaks["leaked-copies"].keys) == copies
    assert set(leaks["leaked-near-duplicates"].keys) == near
    same = [d for d in leaks["leaked-near-duplicates"].details.values() if "same caption" in d]
    assert same and all(d.startswith(("a", "c")) for d in same)


def tree(root: Path) -> dict[str, bytes | str | None]:
    return {
        str(file.relative_to(root)): os.readlink(file) if file.is_symlink()
        else file.read_bytes() if file.is_file() else None
        for file in root.rglob("*")
    }  # fmt: skip


def corpus(root: Path) -> None:
    """Offenders of every kind that can be moved, and captions that two pictures share."""
    put(root, GOOD, photo(0))
    put(root, "sub/bad.png", b"")
    put(root, "sub/raw.nef", b"")
    put(root, "sub/one.png", photo(1), None)
    put(root, "sub/one.jpg", b"", None)
    (root / "sub/one.txt").write_text("two pictures share this one")
    put(root, "bare.png", photo(2), None)
    (root / "alone.caption").write_text("no picture")
    (root / "link.png").symlink_to("nowhere")
    rows(root / "rows", {"file_name": "broken.png", "text": "x"}, {"file_name": "no", "text": "x"})
    put(root / "rows", "broken.png", b"...", None)
    (root / "table").mkdir()
    text = (
        '\ufefffile_name,text\r\nrow.png,"two\r\nlines"\r\nno.png,"a ""b""\r\nc"\r\nrow.png,x\r\n'
    )
    put(root, "table/row.png", photo(3), None)
    (root / "table/metadata.csv").write_text(text, encoding="utf-8", newline="")


def test_quarantine_and_back(tmp_path: Path) -> None:
    root = tmp_path / "data"
    corpus(root)
    before = tree(root)
    status, content = run(root, "--fix", "quarantine")
    assert (status, content["fix"]["left"]) == (0, {})
    moved = {
        "sub/bad.png", "sub/bad.png.txt", "sub/raw.nef", "sub/raw.nef.txt", "sub/one.jpg",
        "bare.png", "alone.caption", "link.png", "rows/broken.png",
    }  # fmt: skip
    tables = {"rows/metadata.jsonl", "table/metadata.csv"}
    assert set(content["fix"]["done"]) == moved | tables
    after = tree(root)
    assert {key for key in before if key not in after} == moved
    for key in moved | tables:
        assert after[f".quarantine/1/{key}"] == before[key]
    assert after["table/metadata.csv"].decode() == (
        '\ufefffile_name,text\r\nrow.png,"two\r\nlines"\r\nrow.png,x\r\n'
    )
    status, content = run(root, "--size", "80")
    assert (status, content["pictures"]["usable"]) == (0, 4)
    # What goes bad later goes beside the first, and all of it comes back.
    put(root, "sub/bad.png", b"again")
    run(root, "--fix", "quarantine")
    assert (root / ".quarantine/2/sub/bad.png").read_bytes() == b"again"
    assert not (root / "sub/bad.png").exists()
    status, content = run(root, "--fix", "undo")
    assert status == 2  # two pictures of one name: the newer has the place
    assert list(content["fix"]["left"]) == ["sub/bad.png.txt", "sub/bad.png"]
    assert (root / ".quarantine/1/sub/bad.png").read_bytes() == b""
    (root / "sub/bad.png").unlink()
    (root / "sub/bad.png.txt").unlink()
    assert run(root, "--fix", "undo")[0] == 0
    assert tree(root) == before


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_lines_of_a_table_end_where_reading_has_them_end(tmp_path: Path, end: str) -> None:
    root = tmp_path / "data"
    for name in ("a.png", "b.png", "c.png"):
        put(root, name, photo(ord(name[0])), None)
    lines = [f'{{"file_name": "{name}.png", "text": "is {name}"}}' for name in "axbyc"]
    lines[2] = lines[2].replace("is b", "is\u2028b")
    (root / "metadata.jsonl").write_text(end.join(lines), encoding="utf-8", newline="")
    assert run(root, "--fix", "quarantine")[0] == 0
    kept = (root / "metadata.jsonl").read_bytes().decode()
    assert kept == end.join([lines[0], lines[2], lines[4]])


@pytest.mark.parametrize(("descriptor", "expected"), [("stdout", 141), ("stderr", 0)])
def test_a_reader_that_is_gone(folder: Path, descriptor: str, expected: int) -> None:
    """``ldm data check DIR | tee log``, and Ctrl-C ends tee first: that is no finding. Into a pipe
    goes no progress but a line every half minute, and who reads the report may not read that.
    """
    from ldm.cli import app

    number = {"stdout": 1, "stderr": 2}[descriptor]
    for more in ([], ["--json", "-"]) if descriptor == "stdout" else ([],):
        reading, writing = os.pipe()
        os.close(reading)
        child = os.fork()
        if not child:  # a process of its own would first have to import everything
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for other in (1, 2):
                os.dup2(writing if other == number else nowhere, other)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
            os.environ["LDM_CACHE"] += f"-{os.getpid()}"
            try:
                app(["data", "check", str(folder), *more])
            except SystemExit as end:
                os._exit(int(end.code or 0))
            os._exit(99)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == expected


def test_an_edited_table_is_not_written_over(tmp_path: Path) -> None:
    root = tmp_path / "data"
    corpus(root)
    run(root, "--fix", "quarantine")
    table = root / "rows/metadata.jsonl"
    table.write_text('{"file_name": "row.png", "text": "mine"}\n')
    status, content = run(root, "--fix", "undo")
    assert (status, list(content["fix"]["left"])) == (2, ["rows/metadata.jsonl"])
    assert "mine" in table.read_text()


class Interrupted(BaseException):
    """As a key or a power cut would."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("steps", range(9))
def test_an_interruption_can_be_undone(
    steps: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    corpus(root)
    before = tree(root)
    data = FolderData(path=str(root))
    offenders = {problem.key: problem.reason for problem in data.problems}
    left = [steps]

    def stopping(move):
        def stopped(self: Path, target: Path) -> None:
            left[0] -= 1
            if left[0] < 0 and not after:
                raise Interrupted
            move(self, target)
            if left[0] < 0:
                raise Interrupted

        return stopped

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopping(Path.rename))
        patch.setattr(Path, "replace", stopping(Path.replace))
        with pytest.raises(Interrupted):
            quarantine(data, offenders)
    with (root / ".quarantine/log.jsonl").open("a") as log:
        log.write('{"from": "good.png", "to": ".quar')  # a line that was being written
    left[0] = max(0, steps - 1)
    with monkeypatch.context() as patch:  # the way back is interrupted too
        patch.setattr(Path, "replace", stopping(Path.replace))
        try:
            undo(root)
        except Interrupted:
            undo_again = True
        else:
            undo_again = False
    if undo_again:
        undo(root)
    assert tree(root) == before


def test_a_log_that_points_out_of_the_folder_is_refused(folder: Path) -> None:
    for name in ("../out.png", "/out.png", "sub/../../out.png"):
        (folder / ".quarantine").mkdir(exist_ok=True)
        (folder / ".quarantine/x").write_text("")
        entry = {"from": name, "to": ".quarantine/x", "why": ""}
        (folder / ".quarantine/log.jsonl").write_text(json.dumps(entry) + "\n")
        with pytest.raises(DataError, match="log.jsonl:1: points out of the folder"):
            undo(folder)
    (folder / ".quarantine/log.jsonl").unlink()
    with pytest.raises(DataError, match="there is no log"):
        undo(folder)


def test_copies_can_be_put_aside_and_one_of_each_stays(folder: Path) -> None:
    for n, name in enumerate("abc"):
        put(folder, f"{name}.png", photo(5), f"number {n}")
    put(folder, "d.bmp", photo(5))
    put(folder, "e.png", cut(photo(5), 0.02, 0, 0, 0))
    kinds = ["exact-duplicates", "pixel-duplicates", "near-duplicates"]
    also = [option for kind in kinds for option in ("--also", kind)]
    status, content = run(folder, "--size", "64", "--fix", "quarantine", *also)
    assert status == 0 and len(content["fix"]["done"]) == 8
    assert [e.key for e in FolderData(path=str(folder)).examples] == ["a.png", GOOD]


def test_a_copy_as_plain_pngs(folder: Path, tmp_path: Path) -> None:
    put(folder, "sub/x.jpg", encoded(photo(1).convert("CMYK"), "JPEG"))
    put(folder, "bad.png", b"")
    exif = Image.Exif()
    exif[0x0112] = 6
    put(folder, "turned.png", encoded(photo(2), "PNG", exif=exif))
    before = tree(folder)
    out = tmp_path / "plain"
    status, _ = run(folder, "--fix", "convert", "--out", str(out))
    assert status == 0 and tree(folder) == before
    copy, data = FolderData(path=str(out)), FolderData(path=str(folder))
    assert not copy.problems
    assert {e.key: e.captions for e in copy.examples} == {
        GOOD: ("a caption of its own",),
        "sub/x.jpg.png": ("what x shows in words",),
        "turned.png": ("what turned shows in words",),
    }
    keys = [e.key for e in data.examples]
    for i, example in enumerate(copy.examples):
        image = copy.load(i)
        assert (image.mode, dict(image.getexif())) == ("RGB", {})
        original = data.load(keys.index(example.key.replace("jpg.png", "jpg"))).convert("RGB")
        assert np.array_equal(np.asarray(image), np.asarray(original))
    result = CliRunner().invoke(
        app, ["data", "check", str(folder), "--fix", "convert", "--out", str(out)]
    )
    assert result.exit_code == 2 and "is there already" in result.stderr


def test_a_copy_of_several_sources_says_which_are_not_in_it(tmp_path: Path) -> None:
    root = tmp_path / "data"
    text = "[[datasets]]\n" + subset(root, "dogs") + subset(root, "cats")
    (root / "set.toml").write_text(text)
    fix = ("--size", "80", "--fix", "convert", "--out")
    status, content = run(root / "set.toml", *fix, str(tmp_path / "whole"))
    assert (status, content["fix"]["left"]) == (0, {})
    (root / "empty").mkdir()
    (root / "set.toml").write_text(f"{text}[[datasets.subsets]]\nimage_dir = '{root / 'empty'}'")
    status, content = run(root / "set.toml", *fix, str(tmp_path / "rest"))
    assert (status, list(content["fix"]["left"])) == (2, [str(root / "empty")])
    for name in ("whole", "rest"):
        copied = {e.key: e.captions for e in FolderData(path=str(tmp_path / name)).examples}
        assert copied == {
            "cats/good.png": ("what cats shows",), "dogs/good.png": ("what dogs shows",),
        }  # fmt: skip
    (root / "none.toml").write_text("nonsense")
    status, content = run(root / "none.toml", *fix, str(tmp_path / "none"))
    assert (status, content["fix"]["done"]) == (2, []) and not (tmp_path / "none").exists()


@pytest.mark.parametrize("others", [False, True])
def test_quarantine_of_folders_named_by_repeats(
    others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "img/10_dog", "a.png", photo(1), None)
    put(tmp_path / "img/10_dog", "bad.png", b"", "broken")
    if others:
        put(tmp_path / "img/2_cat", "b.png", photo(2), None)
    before = tree(tmp_path / "img")
    monkeypatch.chdir(tmp_path)
    for path in (Path("img"), tmp_path / "img"):
        status, content = run(path, "--size", "80", "--fix", "quarantine")
        assert (status, content["fix"]["left"]) == (0, {})
        moved = sorted(content["fix"]["done"])
        assert moved[0] == "10_dog/bad.png" and (tmp_path / "img/10_dog/a.png").exists()
        assert not (tmp_path / "img/10_dog/bad.png").exists()
        assert run(path, "--fix", "undo")[0] == 0
        assert tree(tmp_path / "img") == before


def test_the_sheet(folder: Path, tmp_path: Path) -> None:
    for n in range(12):
        put(folder, f"{n}.png", photo(n, 60 + 10 * n, 90))
    put(folder, "bad.png", b"")
    run(folder, "--sheet", str(tmp_path / "sheets/sheet.png"))
    page = Image.open(tmp_path / "sheets/sheet.png")
    assert page.width == 8 * 136
    assert page.height == 2 * (128 + 30) + 8 + 158 + 8


def test_strips_are_in_a_bucket_or_named(folder: Path, tmp_path: Path) -> None:
    for width, height in ((240, 60), (60, 240), (600, 80), (30000, 1), (1, 3000)):
        put(folder, f"{width}x{height}.png", photo(width + height).resize((width, height)))
    sheet = tmp_path / "sheet.png"
    options = ["--size", "80", "--sheet", str(sheet), "--fix", "quarantine", "--also", "small"]
    result = CliRunner().invoke(app, ["data", "check", str(folder), *options])
    assert result.exit_code == 0 and sheet.is_file()
    for line in (
        "5 pictures longer than 2 : 1",
        "4 pictures smaller than 64 pixels along a side, a step of the buckets",
        "       64x64    1.00         2",
        "   too small                 4",
    ):
        assert line in result.stdout
    with pytest.raises(DataError, match="4 pictures smaller than a step of the buckets: 1x3000"):
        transform = ImageTransform(80, buckets=Buckets(64))
        Collection(FolderData(path=str(folder)), transform)


def test_pictures_that_are_drawn() -> None:
    data = ShapesData(count=60)
    result = check(data, "shapes", Expected(64, Buckets(64)))
    assert result.train + result.held_out == 60
    assert {finding.severity for finding in result.findings} <= {"warning", "note"}
    assert result.buckets == [((64, 64), 60)]
