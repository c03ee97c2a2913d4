"""A data set that is streamed: the same pictures by position on any number of processes, gone on
from notes, and what cannot be done with one told in a line. Parquet files of this machine take the
same way through ``datasets`` as those of the Hub.
"""

import io
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from launched import digests, losses
from ldm.data.hub import DatasetsData, Streaming
from ldm.data.images import ImageTransform
from ldm.data.order import positions
from ldm.data.remote import Remote
from ldm.data.stream import StreamCollection
from ldm.data.table import TableData
from ldm.errors import DataError
from ldm.models.tokenizer import train_tokenizer
from programs import told
from runs import train, tree

pytest.importorskip("datasets")

LENGTHS = [11, 9, 14, 7, 10, 12, 8, 13]


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, lengths: list[int], bad: dict[int, dict] | None = None) -> Path:
    """Parquet files of ``lengths`` rows, numbered through; ``bad`` replaces cells of rows."""
    folder.mkdir(exist_ok=True)
    number = 0
    for file, length in enumerate(lengths):
        rows = []
        for n in range(number, number + length):
            row = {"image": {"bytes": png(n), "path": f"{n}.png"}, "text": f"picture {n}"}
            rows.append(row | (bad or {}).get(n, {}))
        number += length
        name = f"train-{file:05d}-of-{len(lengths):05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=5)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("stream") / "data", LENGTHS)


def collection(folder: Path, run: Path, bad="error", batch=8, held_out=0, seed=0, **options):
    options = {"streaming": Streaming(lanes=4, shuffle=24), "held_out_fraction": 0.0} | options
    data = DatasetsData(path=str(folder), **options)
    transform = ImageTransform(size=16)
    return StreamCollection(
        data, transform, bad, batch=batch, seed=seed, run=run, held_out=held_out
    )


def drawn(found: StreamCollection, wanted) -> list[str]:
    plan = found.plan(found.batch, found.seed)
    texts = [plan[n].example.captions[0] for n in wanted]
    for lane in plan.lanes.values():
        lane._pool.shutdown()  # what is read ahead is noted as well
    return texts


def test_any_number_of_processes_meets_the_same_pictures(folder, tmp_path):
    whole = drawn(collection(folder, tmp_path / "one"), range(160))
    for world in (2, 4, 8):
        found = {}
        for rank in range(world):
            mine = collection(folder, tmp_path / f"of {world}")
            wanted = positions(0, batch=8, micro=8 // world, rank=rank, world=world, stop=160)
            wanted = [n for part in wanted for n in part]
            found |= dict(zip(wanted, drawn(mine, wanted), strict=True))
        assert [found[n] for n in range(160)] == whole
    assert drawn(collection(folder, tmp_path / "other", seed=1), range(160)) != whole


@pytest.mark.parametrize("world", [2, 4])
def test_a_process_reads_files_of_its_own(folder, tmp_path, world):
    files = []
    for rank in range(world):
        mine = collection(folder, tmp_path)
        read = files_read(mine)
        plan = mine.plan(8, 0)
        for n in range(rank * 8 // world, (rank + 1) * 8 // world):
            assert plan[n]
        assert len(plan.lanes) == 4 // world
        for lane in plan.lanes.values():
            lane._pool.shutdown()  # twelve rows are read of each lane, of two files at most
        files.append(set(read))
    assert sum(map(len, files)) == len(set.union(*files)) <= 8


def files_read(found: StreamCollection) -> list[int]:
    """Files in the order in which they are opened, as it grows."""
    read, plain = [], found.files.read

    def noting(file: int, row: int = 0):
        read.append(file)
        return plain(file, row)

    found.files.read = noting
    return read


def test_every_picture_once_a_pass_and_shuffled(folder, tmp_path):
    """Of one lane: all pictures in each pass. Of several: none is missed, counts nearly equal."""
    one = drawn(collection(folder, tmp_path / "a", streaming=Streaming(1, 7)), range(84 * 3))
    assert sum(LENGTHS) == 84
    for start in (0, 84, 168):
        assert set(one[start : start + 84]) == {f"picture {n}" for n in range(84)}
    assert one[:84] != one[84:168]
    numbers = [int(text.split()[1]) for text in one[:7]]
    assert numbers != sorted(numbers)
    counts = Counter(drawn(collection(folder, tmp_path / "b"), range(84 * 5)))
    assert len(counts) == 84 and max(counts.values()) - min(counts.values()) <= 2


def test_a_run_goes_on_from_the_notes(folder, tmp_path, monkeypatch):
    whole = drawn(collection(folder, tmp_path / "whole"), range(400))
    first = collection(folder, tmp_path / "run")
    assert drawn(first, range(240)) == whole[:240]
    later = collection(folder, tmp_path / "run")
    rows = []
    plain = Remote._examined
    monkeypatch.setattr(Remote, "_examined", lambda *of: rows.append(of[1]) or plain(*of))
    plan = later.plan(8, 0)
    assert [plan[n].example.captions[0] for n in range(240, 248)] == whole[240:248]
    for lane in plan.lanes.values():
        lane._pool.shutdown()
    # Four lanes, each its block of six and the one ahead: not the sixty that came before.
    assert 40 <= len(rows) <= 4 * 2 * 6
    # Without the notes it is the same, from the start again.
    lost = collection(folder, tmp_path / "lost")
    assert drawn(lost, range(240, 248)) == whole[240:248]
    assert drawn(later, (399, 0, 200)) == [whole[399], whole[0], whole[200]]


def test_notes_that_a_kill_cut_off(folder, tmp_path):
    found = collection(folder, tmp_path / "run")
    whole = drawn(found, range(96))
    (notes,) = {file.parent for file in (tmp_path / "run").rglob("lane-*.jsonl")}
    for file in notes.iterdir():
        file.write_text(file.read_text()[:-9])
    assert drawn(collection(folder, tmp_path / "run"), range(96)) == whole
    for file in notes.iterdir():
        last = json.loads(file.read_text().splitlines()[-1])
        assert set(last) == {"block", "mark", "skipped"}


def test_other_files_have_other_notes(folder, tmp_path):
    assert collection(folder, tmp_path).notes == collection(folder, tmp_path).notes
    longer = write(tmp_path / "longer", [*LENGTHS, 3])
    others = [collection(longer, tmp_path), collection(folder, tmp_path, seed=1)]
    others += [collection(folder, tmp_path, held_out_fraction=0.1)]
    assert len({found.notes for found in [collection(folder, tmp_path), *others]}) == 4
    assert others[0].summary() != collection(folder, tmp_path).summary()


def test_held_out_as_in_every_layout(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    table = TableData(path=str(folder), held_out_fraction=0.2)
    expected = {e.captions[0] for e in table.examples if e.held_out}
    assert 8 < len(expected) < 30
    found = collection(folder, tmp_path / "run", held_out_fraction=0.2, held_out=1000)
    assert {item.caption(None) for item in found.held_out} == expected
    digests = {table.digest(n) for n, e in enumerate(table.examples) if e.held_out}
    assert {item.digest() for item in found.held_out} == digests
    few = collection(folder, tmp_path / "run", held_out_fraction=0.2, held_out=3)
    assert len(few.held_out) == 3 and few.prompt() in expected
    trained = set(drawn(few, range(320)))
    assert not trained & expected and len(trained) == 84 - len(expected)


BAD = {
    5: {"text": "  "},
    20: {"image": {"bytes": b"no picture", "path": "20.png"}},
    41: {"image": {"bytes": None, "path": "elsewhere.png"}},
    60: {"image": None},
}


def test_bad_samples_are_named_or_skipped(tmp_path):
    folder = write(tmp_path / "data", LENGTHS, BAD)
    strict = collection(folder, tmp_path / "strict")
    with pytest.raises(
        DataError, match=r"data: 1 .*: train/\d:\d+; .*or set on_bad_sample to skip"
    ):
        drawn(strict, range(160))
    found = collection(folder, tmp_path / "skip", "skip")
    assert set(drawn(found, range(320))) == {f"picture {n}" for n in range(84) if n not in BAD}
    reasons = {problem.key: problem.reason for _, problem in found.skipped}
    assert set(reasons) == {"train/0:6", "train/2:1", "train/4:1", "train/5:10"}
    assert "caption is empty" in reasons["train/0:6"]
    assert "cannot be read" in reasons["train/2:1"]
    assert "do not hold the bytes" in reasons["train/4:1"]
    # Another process, and one that comes later, tell the same, each once.
    again = collection(folder, tmp_path / "skip", "skip")
    drawn(again, range(480))
    assert again.skipped == found.skipped and len(again.skipped) == 4


def test_nothing_left(tmp_path):
    everything = {n: {"text": ""} for n in range(6)}
    folder = write(tmp_path / "data", [3, 3], everything)
    with pytest.raises(DataError, match="data: no picture is left to train on"):
        drawn(collection(folder, tmp_path / "run", "skip"), [0])


def test_a_damaged_file(tmp_path):
    folder = write(tmp_path / "data", LENGTHS)
    victim = sorted(folder.iterdir())[3]
    data = bytearray(victim.read_bytes())
    data[200:2500] = bytes(2300)
    victim.write_bytes(bytes(data))
    with pytest.raises(DataError, match="files with a damaged part"):
        drawn(collection(folder, tmp_path / "strict"), range(160))
    found = collection(folder, tmp_path / "skip", "skip")
    seen = set(drawn(found, range(320)))
    whole = {f"picture {n}" for n in range(84)}
    assert {f"picture {n}" for n in range(84) if not 34 <= n < 41} <= seen < whole
    assert [problem.key for _, problem in found.skipped] == ["train/3"]


def test_it_can_be_sent_to_another_process(folder, tmp_path):
    plan = collection(folder, tmp_path).plan(8, 0)
    expected = [plan[n].example.captions[0] for n in range(40)]
    sent = pickle.dumps(plan)
    assert len(sent) < 20_000
    assert [pickle.loads(sent)[n].example.captions[0] for n in range(40)] == expected


# -- whole runs --


@pytest.fixture
def words(tmp_path) -> str:
    train_tokenizer([], 514, 16).save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def settings(folder: Path, words: str, **data) -> dict:
    said = {"path": str(folder), "kind": "datasets", "streaming": {"lanes": 4, "shuffle": 32}}
    return {
        "data": said | data,
        "text": {"tokenizer": words},
        "log_every": 1,
        "validation": {"every": "3 steps", "images": 4, "levels": 2},
    }


def test_a_run_and_going_on(folder, tmp_path, words, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    common = settings(folder, words)
    checkpoints = {"checkpoints": {"every": "3 steps", "keep": 9}}
    train(tmp_path / "whole", **common, **checkpoints)
    # The second half in a process that reads for it.
    train(tmp_path / "run", **common, **checkpoints, duration="3 steps")
    train(tmp_path / "run", **common, **checkpoints, workers=1)
    assert (
        losses(tmp_path / "run") == losses(tmp_path / "whole")
        and len(losses(tmp_path / "run")) == 6
    )
    last = "checkpoints/images-000000000096"
    assert digests(tmp_path / "run" / last) == digests(tmp_path / "whole" / last)
    assert not (tmp_path / "cache" / "latents").exists()


def test_what_a_run_says(command, folder, tmp_path, words, caplog):
    bad = write(tmp_path / "data", LENGTHS, BAD)
    config = tree(tmp_path / "run", **settings(bad, words), on_bad_sample="skip")
    config["duration"] = "12 steps"
    with caplog.at_level("INFO", "ldm"):
        status, output = command(config)
    assert status == 0, output
    assert "outside the promise of exact resume" in caplog.text
    assert "both encoders run at every step" in caplog.text
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all("reason" in json.loads(line) for line in lines)
    longer = write(tmp_path / "data", [*LENGTHS, 4], BAD)
    config["duration"] = "14 steps"
    status, output = command(config | {"data": settings(longer, words)["data"]})
    assert "data.content: the pictures or captions changed" in output and status == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("duration=2 epochs", "'2 epochs' cannot be told in images"),
        ("ema.half_life=1 epochs", "'1 epochs' cannot be told in images"),
        ("images.buckets.step=8", "leave out images.buckets"),
        ("order.window=4", "leave out order.window"),
        ("score={}", "leave out score"),
        ("workers=2", "set workers to 0 or 1"),
        ("text.tokenizer=null", "give text.tokenizer"),
        ("data.split=other", "other"),
        ("data.split='train[:10%]'", "Bad split"),
        ("data.caption_column=words", "no column 'words'"),
        ("data.streaming.lanes=0", "at least 1"),
        ("data.path=not/there", "not/there"),
    ],
)
def test_what_cannot_be_streamed(command, folder, tmp_path, words, change, message):
    config = tree(tmp_path / "run", **settings(folder, words))
    assert message in told(*command(config, change))


def test_mixed_with_another_source_and_other_programs(command, folder, tmp_path, words):
    config = tree(tmp_path / "run", **settings(folder, words))
    several = [config["data"], {"kind": "shapes", "count": 9, "size": 16}]
    assert "mixed with no other source" in told(*command(config | {"data": several}))
    autoencoder = {key: config[key] for key in ("run", "data", "images", "vae", "duration")}
    refused = told(*command(autoencoder, name="train_autoencoder"))
    assert "only the text-to-image model is trained on a stream" in refused
    saved = tmp_path / "saved"
    import datasets

    datasets.Dataset.from_dict({"image": [b""], "text": ["a"]}).save_to_disk(str(saved))
    refused = told(*command(config, f"data.path={saved}"))
    assert "save_to_disk wrote it" in refused
    with pytest.raises(DataError, match="leave out data.streaming"):
        len(DatasetsData(path=str(folder), streaming=True).examples)


def test_dry_run_counts_nothing(command, folder, tmp_path, words, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: shown.append(" ".join(map(str, text))))
    config = tree(tmp_path / "run", **settings(folder, words))
    assert command(config, "--dry-run")[0] == 0
    assert "    pictures: unknown, a stream is not counted" in shown
    assert any("96 images, 6 steps" in line for line in shown)
    assert not (tmp_path / "run").exists()
