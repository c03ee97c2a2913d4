"""A second text tower in a folder is looked at as the first is, before anything is opened."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny_sdxl
from ldm.formats import integrity


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl.stock().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def wrong(folder: Path) -> str:
    with pytest.raises((OSError, ValueError)) as error:
        integrity.check(folder, {}, pickled=False)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_a_whole_folder(whole: Path) -> None:
    parts = ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert integrity.check(whole, {}, pickled=False) == parts
    assert integrity.check(whole, {"text_encoder_2": None}, pickled=False) == parts[:-1]
    for name, network in tiny_sdxl.components().items():
        if name in parts:
            integrity.check_all_there(whole / name, network, None)


def test_what_is_missing(folder: Path) -> None:
    weights = folder / "text_encoder_2" / "model.safetensors"
    kept = load_file(weights)
    lacking = {k: v for k, v in kept.items() if k != "text_projection.weight"}
    save_file(lacking, weights)
    network = tiny_sdxl.components()["text_encoder_2"]
    with pytest.raises(ValueError, match="text_encoder_2 lack text_projection.weight, which its"):
        integrity.check_all_there(folder / "text_encoder_2", network, None)
    weights.unlink()
    assert wrong(folder).startswith(f"{folder / 'text_encoder_2'} holds no weights")
    save_file(kept, weights)
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer_2" / name).unlink(missing_ok=True)
    assert "tokenizer_2 holds neither tokenizer.json nor vocab.json" in wrong(folder)
    (folder / "tokenizer_2" / "tokenizer_config.json").unlink()
    assert "tokenizer_2/tokenizer_config.json is missing" in wrong(folder)
    shutil.rmtree(folder / "tokenizer_2")
    assert f"{folder / 'tokenizer_2'} is missing, which" in wrong(folder)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("hidden_size", 2**30, "hidden_size 1,073,741,824 is more than the weights beside it have"),
        ("num_hidden_layers", 10**6, "1,000,000 layers in "),
    ],
)
def test_a_config_that_asks_for_more(folder: Path, key: str, value: int, told: str) -> None:
    file = folder / "text_encoder_2" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert wrong(folder).startswith(f"{file}: {told}")
