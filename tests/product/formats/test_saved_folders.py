"""Saving a pipeline over another: the new one alone is there, and a kill leaves one of the two."""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tiny
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage import folders
from ldm.storage.checkpoint import write_folder

NOT_OURS = {"README.md": "mine", "pictures/a.png": "drawn", "image_encoder/x": "a tower beside"}


def names(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in names(folder)}


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("saved") / "fresh")


@pytest.mark.parametrize(
    "before",
    [
        {"max_shard_size": "200KB"},
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"variant": "fp16", "safe_serialization": False, "max_shard_size": "200KB"},
    ],
    ids=lambda before: "+".join(before),
)
def test_over_any_layout(fresh: Path, tmp_path: Path, before: dict[str, Any]) -> None:
    folder, pipe = tmp_path / "model", tiny.pipeline()
    pipe.save_pretrained(folder, **before)
    put(folder, NOT_OURS)
    assert not names(folder) - set(NOT_OURS) <= names(fresh)
    other = tiny.pipeline(seed=1)
    other.save_pretrained(folder)
    assert names(folder) == names(fresh) | set(NOT_OURS)
    # safetensors alone would keep weights from others.
    assert len({(folder / name).stat().st_mode for name in names(folder)}) == 1
    assert {name: (folder / name).read_text() for name in NOT_OURS} == NOT_OURS
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for kind in (LatentDiffusionPipeline, StableDiffusionPipeline):
        weights = kind.from_pretrained(folder).unet.state_dict()
        assert all(torch.equal(weights[k], v) for k, v in other.unet.state_dict().items())


def test_sharded_over_whole(fresh: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fresh, tmp_path / "model")
    tiny.pipeline().save_pretrained(folder, max_shard_size="200KB")
    found = names(folder)
    assert "unet/diffusion_pytorch_model.safetensors" not in found
    assert [n for n in found if n.startswith("text_encoder/model")] == [
        "text_encoder/model.safetensors"
    ]
    LatentDiffusionPipeline.from_pretrained(folder)


def test_parts_that_are_none_now(tmp_path: Path) -> None:
    folder = put(tiny.folder(tmp_path / "model"), {"safety_checker/config.json": "{}", "notes": ""})
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    tiny.pipeline().save_pretrained(folder)
    assert not (folder / "safety_checker").exists() and (folder / "notes").exists()


def test_what_fails_leaves_the_old(fresh: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = shutil.copytree(fresh, tmp_path / "model")
    before = {name: (folder / name).read_bytes() for name in names(folder)}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.formats.pipeline_folder.save_text_encoder", full)
    with pytest.raises(OSError, match="No space left"):
        tiny.pipeline(seed=1).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match=r"model_index.json is a file: a pipeline is saved as a"):
        tiny.pipeline().save_pretrained(folder / "model_index.json")


# -- folders --

OLD = {"index": "old", "a/w": "old a", "b/w-1": "old b", "b/w-2": "old b", "c/w": "old c"}
NEW = {"index": "new", "a/w": "new a", "b/w": "new b"}
STAYS = {"README": "stays", "pictures/1": "stays", "pictures/more/2": "stays"}


def write(staging: Path) -> None:
    put(staging, NEW)


def replaced(folder: Path) -> None:
    folders.replace(folder, write, lambda _: ["index", "a", "b", "c"], last="index")


def whole(folder: Path) -> bool:
    """New or old, and not new where it is old."""
    found = {n: t for n, t in texts(folder).items() if not n.startswith(folders.STAGING)}
    assert found in (OLD | STAYS, NEW | STAYS)
    return found == NEW | STAYS


def killed(folder: Path, at: int) -> bool:
    """Whether a process that replaces ``folder`` was killed at its ``at``-th call of the system."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        left = [at]

        def counts(event: str, _: Any) -> None:
            if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(counts)
        replaced(folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: Any, exchange: bool) -> None:
    folder = put(tmp_path / "model", OLD | STAYS)
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    kept = tmp_path / ".staging-replaced-model"
    at, news = 0, []
    while killed(folder, at):
        if not exchange and not folder.exists():  # between two renames: the old one is beside
            kept.rename(folder)
        news.append(whole(folder))
        if news[-1]:
            shutil.rmtree(folder)
            put(folder, OLD | STAYS)
        at += 7 if exchange else 11
    assert at > 30 and not news[0] and news[-1]
    assert whole(folder) and [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("make", [replaced, lambda folder: write_folder(folder, write)])
def test_all_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: Any, make: Any) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    make(folder := tmp_path / "model")
    inside = [path.stat().st_ino for path in folder.rglob("*")]
    assert len(inside) >= 5 and sorted(flushed[:-2]) == sorted(inside)
    assert flushed[-2:] == [folder.stat().st_ino, tmp_path.stat().st_ino]


def test_where_a_folder_cannot_be_moved(tmp_path: Path, monkeypatch: Any) -> None:
    folder = put(tmp_path / "model", OLD | STAYS)
    number = folder.stat().st_ino
    monkeypatch.chdir(folder)
    replaced(Path("."))
    assert whole(folder) and folder.stat().st_ino == number
    assert Path("index").read_text() == "new"
    assert texts(folder).keys() == NEW.keys() | STAYS.keys()


def test_modes_and_links(tmp_path: Path) -> None:
    folder = put(tmp_path / "model", OLD | STAYS)
    folder.chmod(0o750)
    (folder / "link").symlink_to("README")
    (tmp_path / "named").symlink_to("model")
    replaced(tmp_path / "named")
    assert (tmp_path / "named").is_symlink() and folder.stat().st_mode & 0o777 == 0o750
    assert os.readlink(folder / "link") == "README"
    (folder / "link").unlink()
    assert whole(folder)


@pytest.mark.parametrize("exchange", [True, False])
def test_checkpoints_take_their_place_so(tmp_path: Path, monkeypatch: Any, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    folder = put(tmp_path / "final", OLD)
    write_folder(folder, write)
    assert names(folder) == {*NEW, "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
