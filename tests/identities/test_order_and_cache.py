"""Which picture comes when, and what is kept of it."""

import json
import os
import shutil
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.data import order
from ldm.data.images import ImageTransform
from ldm.data.order import Order, positions
from ldm.errors import DataError
from ldm.storage import shard
from ldm.storage.tensor_cache import TensorCache, fingerprint, key_of

# -- order --


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_use_counts_differ_by_at_most_one_at_any_moment(length):
    sequence, counts = Order(length, seed=5), Counter(dict.fromkeys(range(length), 0))
    for position in range(3 * length + length // 2):
        counts[sequence[position]] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(range(length))


def test_epochs_and_seeds_are_different_permutations():
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        return tuple(Order(50, seed)[50 * number + i] for i in range(50))

    drawn = {epoch(seed, number) for seed in range(3) for number in range(4)}
    assert len(drawn) == 12
    assert all(sorted(permutation) == list(range(50)) for permutation in drawn)


def test_any_position_costs_one_permutation():
    order._permutation.cache_clear()
    sequence = Order(1000, seed=1)
    far = [sequence[10**12 + i] for i in range(1000)]  # one epoch: 1000 divides 10**12
    assert order._permutation.cache_info().misses == 1
    assert sorted(far) == list(range(1000))
    again = Order(1000, seed=1)
    assert [again[10**12 + i] for i in (999, 0, 500)] == [far[999], far[0], far[500]]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2, None])
def test_positions_cover_every_image_once_in_order(world, micro):
    batch, start, stop = 12, 24, 96
    share = batch // world
    micro = micro or share
    ranks = [
        list(positions(start, batch=batch, micro=micro, rank=r, world=world, stop=stop))
        for r in range(world)
    ]
    steps, parts = (stop - start) // batch, share // micro
    for rank in ranks:
        assert len(rank) == steps * parts
        assert {len(part) for part in rank} == {micro}
    # Step by step, rank by rank, part by part: the images of the run, one after another.
    joined = [
        position
        for step in range(steps)
        for rank in ranks
        for part in rank[step * parts : (step + 1) * parts]
        for position in part
    ]
    assert joined == list(range(start, stop))


def test_positions_from_the_middle_are_those_of_the_whole_run():
    common = dict(batch=8, micro=2, rank=1, world=2, stop=80)
    whole = list(positions(0, **common))
    assert list(positions(40, **common)) == whole[len(whole) // 2 :]
    assert list(positions(80, **common)) == []


# -- cache --


def rows(indices) -> dict[str, torch.Tensor]:
    """Content that tells its index, in two dtypes."""
    values = torch.tensor([float(i) for i in indices])
    return {
        "mean": values[:, None, None] + torch.arange(6.0).reshape(2, 3) / 7,
        "mask": torch.tensor([[i % 2 == 0, True] for i in indices]),
    }


class Maker:
    """Counts what is asked for, and fails at the n-th call."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, indices):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.asked += indices
        return rows(indices)


def keys(count: int) -> list[bytes]:
    return [key_of("key", str(i)) for i in range(count)]


def same(cache: TensorCache, count: int) -> None:
    expected = rows(range(count))
    for i, key in enumerate(keys(count)):
        entry = cache[key]
        assert set(entry) == {"mean", "mask"}
        for name, value in entry.items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name][i]), (key, name)


def test_what_is_read_is_what_was_written(tmp_path):
    cache, maker = TensorCache(tmp_path, "a" * 64), Maker()
    made = cache.build(keys(10), maker, what="rows", batch=3, shard_rows=4)
    assert made == 10 and len(cache) == 10 and maker.asked == list(range(10))
    assert len(list(cache.folder.glob("*.safetensors"))) == 4  # of whole batches, at most 4 rows
    same(cache, 10)
    fresh = TensorCache(tmp_path, "a" * 64)
    assert len(fresh) == 10
    same(fresh, 10)
    assert keys(11)[10] not in fresh
    with pytest.raises(DataError, match="lacks the entry"):
        fresh[keys(11)[10]]


def test_a_row_is_read_and_not_its_shard(tmp_path, monkeypatch):
    cache = TensorCache(tmp_path, "a" * 64)
    cache.build(keys(300), Maker(), what="rows", shard_rows=300)
    read, preadv = [], os.preadv
    counted = lambda *a: read.append(preadv(*a)) or read[-1]  # noqa: E731
    monkeypatch.setattr(os, "preadv", counted)
    same(cache, 3)
    assert sum(read) == 3 * (2 * 3 * 4 + 2)  # of a row of float32 and one of bool


def test_a_build_that_was_stopped_goes_on(tmp_path):
    stopped = Maker(fail_at=3)  # inside the second shard of two batches each
    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path, "s").build(keys(10), stopped, what="rows", batch=2, shard_rows=4)
    cache, maker = TensorCache(tmp_path, "s"), Maker()
    assert len(cache) == 4
    assert cache.build(keys(10), maker, what="rows", batch=2, shard_rows=4) == 6
    assert maker.asked == [4, 5, 6, 7, 8, 9]
    same(cache, 10)
    assert cache.build(keys(10), Maker(fail_at=0), what="rows") == 0


def test_more_keys_later(tmp_path):
    cache = TensorCache(tmp_path, "s")
    cache.build(keys(3), Maker(), what="rows")
    maker = Maker()
    assert cache.build(keys(5), maker, what="rows") == 2
    assert maker.asked == [3, 4]
    same(cache, 5)


def test_duplicates_are_made_once(tmp_path):
    cache, maker = TensorCache(tmp_path, "s"), Maker()
    a, b = keys(2)
    assert cache.build([a, b, a, a], maker, what="rows") == 2
    assert len(maker.asked) == 2 and len(cache) == 2
    # Which of the equal ones was handed to the maker is its own business: it is one of them.
    assert float(cache[b]["mean"][0, 0]) == 1
    assert float(cache[a]["mean"][0, 0]) in (0, 2, 3)


def test_several_rows_at_once(tmp_path, monkeypatch):
    """In the order that is asked for, from all shards, and what is asked for twice is read once."""
    cache = TensorCache(tmp_path, "s")
    cache.build(keys(10), Maker(), what="rows", batch=2, shard_rows=4)
    reads, fill = [], shard._fill

    def counted(raw: np.ndarray, *told) -> None:
        reads.append(len(raw))
        fill(raw, *told)

    monkeypatch.setattr(shard, "_fill", counted)
    numbers = [9, 0, 4, 0, 7, 9, 9, 3]
    found = cache.rows([keys(10)[n] for n in numbers])
    assert found["mean"][:, 0, 0].tolist() == numbers
    assert len(reads) == len(found) * len({*numbers})
    for name, value in found.items():
        one = [cache[keys(10)[n]][name] for n in numbers]
        assert value.dtype == one[0].dtype and torch.equal(value, torch.stack(one))
    with pytest.raises(DataError, match=f"lacks the entry {keys(11)[10].hex()}"):
        cache.rows([keys(11)[n] for n in (3, 10, 4)])


def test_a_broken_shard_is_made_again(tmp_path, caplog):
    cache = TensorCache(tmp_path, "s")
    cache.build(keys(8), Maker(), what="rows", shard_rows=4)
    broken = sorted(cache.folder.glob("*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:-5])
    again, maker = TensorCache(tmp_path, "s"), Maker()
    assert len(again) == 4 and str(broken) in caplog.text
    assert again.build(keys(8), maker, what="rows", shard_rows=4) == 4
    same(again, 8)


def one_shard(folder: Path) -> tuple[TensorCache, Path]:
    cache = TensorCache(folder, "s")
    cache.build(keys(4), Maker(), what="rows")
    cache.cover("all")
    (file,) = cache.folder.glob("*.safetensors")
    return cache, file


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def begin(file: Path, name: str) -> int:
    """Where a column begins."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]


def read_all(of: shard.Shard) -> dict[str, torch.Tensor]:
    into = of.empty(4)
    of.read(range(4), into, range(4))
    return into


def test_a_flipped_bit_of_a_value_is_noticed_where_it_is_read(tmp_path):
    cache, file = one_shard(tmp_path)
    flip(file, begin(file, "mean") + 2 * 24 + 5)  # of the third row
    for n in (0, 1, 3):
        assert cache[keys(4)[n]]["mean"][0, 0] == n
    with pytest.raises(DataError) as error:
        cache[keys(4)[2]]
    assert str(error.value).startswith(f"{file} cannot be read (an entry is not what was written")
    assert str(error.value).endswith("the same command makes again what was in it")
    again, maker = TensorCache(tmp_path, "s"), Maker()
    assert not again.covers("all") and again.build(keys(4), maker, what="rows") == 4
    same(again, 4)


def test_a_flipped_bit_of_a_key_is_a_broken_shard(tmp_path, caplog):
    _, file = one_shard(tmp_path)
    flip(file, begin(file, "keys") + 3)
    again = TensorCache(tmp_path, "s")
    assert len(again) == 0 and not again.covers("all") and not file.exists()
    assert f"{file} is broken and is made again: its keys are not what was written" in caplog.text
    file.parent.mkdir(exist_ok=True)
    _, file = one_shard(tmp_path)
    flip(file, begin(file, "keys") + 3)
    with pytest.raises(DataError, match="remove it and start `ldm data cache` again"):
        TensorCache(tmp_path, "s", whole=True)
    assert file.exists()  # what nobody here can make again is left to be looked at


def test_a_flipped_bit_of_a_header_is_a_broken_shard_or_changes_nothing(tmp_path):
    _, file = one_shard(tmp_path)
    good = file.read_bytes()
    whole, broken = shard.Shard(file), 0
    wanted = read_all(whole)
    for place in range(8 * (8 + int.from_bytes(good[:8], "little"))):
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        try:
            found = shard.Shard(file)
            rows = read_all(found)
        except shard.ShardError:
            broken += 1
            continue
        assert found._sums is not None, bytes(data)
        assert rows.keys() == wanted.keys(), bytes(data)
        assert all(torch.equal(rows[name], wanted[name]) for name in rows), bytes(data)
    assert broken > 1000


DAMAGES = {
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 60), "become shorter"),
    "emptied": (lambda file: os.truncate(file, 0), "become shorter"),
    "zeroed": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "its checksum differs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cache_that_is_damaged_while_it_is_read(tmp_path, damage):
    """Mapped, the first two would end the process by SIGBUS."""
    cache, file = one_shard(tmp_path)
    assert cache[keys(4)[3]]["mean"][0, 0] == 3
    act, words = DAMAGES[damage]
    act(file)
    with pytest.raises(DataError, match=words) as error:
        same(cache, 4)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_cache_that_is_removed_while_it_is_read(tmp_path):
    cache, file = one_shard(tmp_path)
    shutil.rmtree(tmp_path)
    same(cache, 4)  # an open file stays where it was
    shard._forget(file)
    with pytest.raises(DataError, match="No such file or directory.: the same command makes again"):
        same(cache, 4)


def test_shards_from_before_there_were_checksums_are_read(tmp_path):
    cache, file = one_shard(tmp_path)
    save_file(load_file(file), file)
    again = TensorCache(tmp_path, "s")
    assert again.covers("all")
    same(again, 4)


def test_shards_whose_sum_is_of_the_keys_alone_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_sum_of_keys", lambda raw, names: zlib.crc32(raw))
    one_shard(tmp_path)
    monkeypatch.undo()
    again = TensorCache(tmp_path, "s")
    assert again.covers("all")
    same(again, 4)


NOTES = {
    "empty": lambda note: note.write_text(""),
    "half": lambda note: note.write_text('["a.safe'),
    "other JSON": lambda note: note.write_text('{"a": 1}'),
    "numbers": lambda note: note.write_text("[1, 2]"),
    "bytes": lambda note: note.write_bytes(b"\xff\xfe"),
    "deep": lambda note: note.write_text("[" * 10_000),
    "digits": lambda note: note.write_text("9" * 5_000),
    "a folder": lambda note: (note.unlink(), note.mkdir()),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_that_cannot_be_read_is_none(tmp_path, name):
    cache, _ = one_shard(tmp_path)
    (note,) = cache.folder.glob("covers-*.json")
    assert cache.covers("all")
    NOTES[name](note)
    assert not cache.covers("all")
    cache.cover("all")
    assert cache.covers("all") == (name != "a folder")


def test_a_miss_makes_the_next_start_look_for_what_is_missing(tmp_path):
    cache, _ = one_shard(tmp_path)
    with pytest.raises(DataError, match="the same command looks for what is missing"):
        cache[keys(5)[4]]
    assert not cache.covers("all")


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_OPEN", 2)
    cache = TensorCache(tmp_path, "s")
    cache.build(keys(10), Maker(), what="rows", batch=2, shard_rows=2)
    same(cache, 10)
    same(cache, 10)
    assert len(shard._open) == 2


def test_unfinished_shards_are_not_read(tmp_path):
    cache = TensorCache(tmp_path, "s")
    cache.build(keys(2), Maker(), what="rows")
    (cache.folder / ".half-1.partial").write_bytes(b"not a shard")
    assert len(TensorCache(tmp_path, "s")) == 2


def test_fingerprint_sees_one_bit_and_nothing_else():
    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    base = fingerprint("latents", ImageTransform(size=16), network(), "float32")
    assert fingerprint("latents", ImageTransform(size=16), network(), "float32") == base

    flipped = network()
    flipped[1].bias.data.view(torch.int32)[0] ^= 1
    others = {
        "a bit": fingerprint("latents", ImageTransform(size=16), flipped, "float32"),
        "a dtype": fingerprint("latents", ImageTransform(size=16), network().double(), "float32"),
        "a name": fingerprint(
            "latents", ImageTransform(size=16), nn.Sequential(network()), "float32"
        ),
        "dtype of the cache": fingerprint(
            "latents", ImageTransform(size=16), network(), "bfloat16"
        ),
        "kind": fingerprint("text", ImageTransform(size=16), network(), "float32"),
    }
    for field, value in dict(size=32, flip=True, background=(0, 0, 0), crop="random").items():
        transform = replace(ImageTransform(size=16), **{field: value})
        others[field] = fingerprint("latents", transform, network(), "float32")
    assert base not in others.values()
    assert len(set(others.values())) == len(others)


def test_parts_of_a_fingerprint_do_not_run_together():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(1, 23) != fingerprint(12, 3)
    assert fingerprint("1") != fingerprint(1)


def test_another_space_is_another_folder(tmp_path):
    TensorCache(tmp_path, fingerprint("a")).build(keys(2), Maker(), what="rows")
    assert len(TensorCache(tmp_path, fingerprint("b"))) == 0
    assert len(TensorCache(tmp_path, fingerprint("a"))) == 2


def test_processes_share_the_work(tmp_path):
    makers = [Maker(), Maker(), Maker()]
    caches = [TensorCache(tmp_path, "s") for _ in makers]
    for rank, (cache, maker) in enumerate(zip(caches, makers, strict=True)):
        cache.build(keys(10), maker, what="rows", shard_rows=2, rank=rank, world=3)
    assert sorted(i for maker in makers for i in maker.asked) == list(range(10))
    for cache in caches:
        cache.refresh()
        same(cache, 10)


def test_a_process_that_comes_late_still_makes_its_share(tmp_path):
    """It finds some entries made already: whose the others are must not depend on that."""
    first, second = Maker(), Maker()
    for rank, maker in enumerate((first, second)):
        cache = TensorCache(tmp_path, "s")
        cache.build(keys(7), maker, what="rows", batch=2, rank=rank, world=2)
    # Whole batches, as one process makes them.
    assert (sorted(first.asked), sorted(second.asked)) == ([0, 1, 4, 5], [2, 3, 6])
    same(TensorCache(tmp_path, "s"), 7)


def test_keys_are_of_content_and_of_one_length():
    assert len({key_of("a", "bc"), key_of("ab", "c"), key_of("abc"), key_of("")}) == 4
    assert {len(key) for key in keys(100)} == {16}


def test_zeros_at_the_end_of_a_key_count(tmp_path):
    """NumPy strips them from what it shows."""
    both = [b"a" * 14 + b"\0\1", b"a" * 14 + b"\0\0"]
    cache = TensorCache(tmp_path, "s")
    assert cache.build(both, Maker(), what="rows") == 2
    assert [float(TensorCache(tmp_path, "s")[key]["mean"][0, 0]) for key in both] == [0, 1]
