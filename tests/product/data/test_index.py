"""The index between processes and states of the data: nothing is copied or looked at twice."""

import os
import pickle
import tracemalloc
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ldm.data import index, tar
from ldm.data.folder import FolderData
from ldm.data.hub import DatasetsData
from ldm.data.index import Indexed, Part, _Known
from ldm.data.picture import Facts
from ldm.data.rows import SCHEMA, Mapped, Row, Rows
from ldm.data.tar import TarData
from ldm.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")

SHARDS, EACH = 4, 25_000


@pytest.fixture
def many(tmp_path) -> TarData:
    """A source of 100,000 rows whose index nobody had to make."""
    tables, parts = [], []
    for shard in range(SHARDS):
        numbers = np.arange(EACH)
        columns = {
            "key": [f"{shard}.tar/{n:08d}" for n in numbers],
            "captions": [[f"thing {n}, in the style of {n % 97}"] for n in numbers],
            "a": numbers,
            "b": numbers * 0 + 9,
            "c": numbers * 0,
            "digest": [bytes(28) + int(n).to_bytes(4, "big") for n in numbers],
            "width": numbers % 3 + 64,
            "height": numbers * 0 + 48,
            "problem": [""] * EACH,
        }
        file = tmp_path / f"{shard}.arrow"
        with pa.ipc.new_file(str(file), SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))
        tables.append(Mapped.open(file))
        read = partial(tar._read, tmp_path / f"{shard}.tar")
        parts.append(Part(str(tmp_path / f"{shard}.tar"), "", (), tuple, read))
    source = TarData(path=str(tmp_path))
    vars(source).update(examples=Rows(tables, 0.05), parts=parts)
    assert len(source.examples) == SHARDS * EACH
    return source


def test_a_source_of_many_rows_is_sent_as_where_it_is(many, monkeypatch):
    many.held_out, many.sizes  # noqa: B018  what a run has asked for
    sent = pickle.dumps(many)
    assert len(sent) < 20_000  # a bit a row for what is held out, and some paths

    def never(*_):
        raise AssertionError("looked for again")

    monkeypatch.setattr(index, "index", never)
    monkeypatch.setattr("ldm.data.files.find", never)
    tracemalloc.start()
    came = pickle.loads(sent)
    assert len(came.examples) == SHARDS * EACH
    for n in (0, EACH, 77_777, SHARDS * EACH - 1):
        assert came.examples[n] == many.examples[n]
        assert came.digest(n) == many.digest(n)
        assert came.examples.place(n) == many.examples.place(n)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4e6
    assert np.array_equal(came.held_out, many.held_out) and 0 < many.held_out.sum()
    assert np.array_equal(came.sizes, many.sizes)


def test_a_source_that_was_not_asked_yet_is_its_config(tmp_path):
    source = TarData(path=str(tmp_path / "not there"))
    assert pickle.loads(pickle.dumps(source)) == source
    assert len(pickle.dumps(source)) < 1000


@pytest.mark.parametrize("kind", ["folder", "datasets"])
def test_another_process_reads_the_same_pictures(pictures, tmp_path, monkeypatch, kind):
    source: Indexed = FolderData(path=str(pictures), held_out_fraction=0)
    if kind == "datasets":
        datasets = pytest.importorskip("datasets")
        rows = [{"image": str(f), "text": f.stem} for f in sorted(pictures.glob("*.png"))]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.save_to_disk(str(tmp_path / "saved"))
        source = DatasetsData(path=str(tmp_path / "saved"), held_out_fraction=0)
    expected = [(e.key, e.captions, (20, 20)) for e in source.examples]
    sent = pickle.dumps(source)
    monkeypatch.setattr(index, "index", None)  # it is not made, nor looked for
    came = pickle.loads(sent)
    found = [(e.key, e.captions, came.load(n).size) for n, e in enumerate(came.examples)]
    assert found == expected and len(expected) == 8


def test_an_index_that_is_gone(pictures, tmp_path):
    source = FolderData(path=str(pictures))
    assert len(source.examples) == 8
    sent = pickle.dumps(source)
    for file in (tmp_path / "cache" / "index").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="the index of the data was replaced while the run started"):
        pickle.loads(sent)


# -- what an older index knows --


def test_only_what_changed_is_looked_at_again(pictures, monkeypatch):
    assert len(FolderData(path=str(pictures)).examples) == 8
    looked = []
    plain = index.look
    monkeypatch.setattr(index, "look", lambda data: looked.append(data) or plain(data))
    Image.new("RGB", (30, 10)).save(pictures / "3.png")
    os.utime(pictures / "3.png", ns=(1, 1))
    (pictures / "5.txt").write_text("another caption")
    source = FolderData(path=str(pictures))
    assert len(source.examples) == 8 and len(looked) == 1
    assert source.sizes.tolist() == [[30, 10] if n == 3 else [20, 20] for n in range(8)]
    assert source.examples[5].captions == ("another caption",)


def known(rows) -> _Known:
    columns = [dict(zip(SCHEMA.names, row, strict=True)) for row in rows]
    return _Known(pa.Table.from_pylist(columns, schema=SCHEMA))


def test_facts_by_key_and_place(monkeypatch):
    rows = [(f"{n}.png", ["a"], n, 2, 0, bytes([n]) * 32, n, 9, "") for n in range(200)]
    rows.append(("bad.png", ["a"], 1, 2, 0, bytes(32), 0, 0, "is broken; repair it"))
    for collide in (False, True):
        if collide:  # equal hashes are told apart by what they are hashes of
            monkeypatch.setattr(index, "_hash", lambda key, place: len(key))
        found = known(rows)
        for n in (0, 7, 199):
            assert found.facts(Row(f"{n}.png", (), (n, 2, 0))) == Facts(bytes([n]) * 32, n, 9, "")
            assert found.facts(Row(f"{n}.png", (), (n, 3, 0))) is None
        assert found.facts(Row("bad.png", (), (1, 2, 0))) is None
        assert found.facts(Row("other.png", (), (1, 2, 0))) is None


def test_an_older_index_costs_little_memory():
    rows = [(f"{n:06d}.png", ["a"], n, 2, 0, bytes(32), 8, 9, "") for n in range(20_000)]
    names = SCHEMA.names
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    table = pa.Table.from_batches(
        [pa.RecordBatch.from_pydict({n: c[at : at + 512] for n, c in columns.items()}, SCHEMA)
         for at in range(0, len(rows), 512)]
    )  # fmt: skip
    tracemalloc.start()
    found = _Known(table)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 40 * len(rows)  # a dict of Python objects took more than 500 bytes a row
    assert found.facts(Row("013141.png", (), (13141, 2, 0))) == Facts(bytes(32), 8, 9, "")
