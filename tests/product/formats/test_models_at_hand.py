"""A model in one file, and one of the Hub, where a config or a command names a folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from ldm.cli.main import app
from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.errors import ConfigError
from ldm.families.vae import read_vae
from ldm.formats.at_hand import folder_of
from ldm.formats.single.place import to_file
from ldm.formats.single.vae import placing
from ldm.formats.single.write import write
from ldm.tasks.command import _at_hand
from runs import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("at_hand") / "model")


def config(model: object) -> TrainConfig:
    return load(TrainConfig, ROOT / "configs" / "finetune.yaml", ["data.path=x", f"model={model}"])


def test_a_file_is_a_folder_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.safetensors"
    write(folder, file, kind="none")
    made = Path(_at_hand(config(file)).model or "")
    assert made.parent == tmp_path / "cache" / "models" and made.name.startswith("tiny-")
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (made / name).read_bytes() == (folder / name).read_bytes()
    (made / "mine").touch()
    assert folder_of(file) == made and (made / "mine").is_file()
    assert [*made.parent.iterdir()] == [made]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"^model: .+ is no whole safetensors file \(it holds"):
        _at_hand(config(file))
    assert _at_hand(config(folder)).model == str(folder)


def test_an_autoencoder_of_one_file(folder, tmp_path, monkeypatch):
    """Of it alone in the original layout, of a whole model, and of a folder of diffusers."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    config_file = "diffusion_pytorch_model.safetensors"
    expected = load_file(folder / "vae" / config_file)
    whole, alone = tmp_path / "whole.safetensors", tmp_path / "my_vae.safetensors"
    write(folder, whole, kind="none")
    theirs = to_file(expected, placing(json.loads((folder / "vae" / "config.json").read_text())))
    save_file(theirs, alone)

    def of(vae: Path, model: object) -> str:
        return str(_at_hand(replace(config(model), vae=str(vae))).vae)

    for vae in (whole, alone):
        made = Path(of(vae, folder))
        assert made.parent == tmp_path / "cache" / "models" and of(vae, folder) == str(made)
        found = load_file(made / config_file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        network = read_vae(str(made))
        assert network.config.scaling_factor == 0.18215
    assert of(folder / "vae" / config_file, folder) == str(folder / "vae")
    for file, model, told in (
        (alone, None, "my_vae.safetensors holds tensors alone: give a model"),
        (folder / "text_encoder" / "model.safetensors", folder, "model.safetensors, vae: "),
    ):
        with pytest.raises(ConfigError, match=f"^vae: .+{told}") as error:
            of(file, model)
        assert "\n" not in str(error.value)
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"^vae: .+old.ckpt is pickled"):
        of(tmp_path / "old.ckpt", folder)
    theirs.popitem()
    save_file(theirs, alone)
    with pytest.raises(ConfigError, match=r"^vae: .+my_vae.safetensors, vae: "):
        of(alone, folder)


def test_a_repository_of_the_hub(folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--apples"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = str(repository / "snapshots" / COMMIT)
    assert _at_hand(config("someone/apples")).model == snapshot
    assert _at_hand(config(f"someone/apples@{COMMIT}")).model == snapshot
    for name in ("someone/apples@other", "someone/pears"):
        with pytest.raises(ConfigError) as error:
            _at_hand(config(name))
        line = str(error.value)
        assert line.startswith(f"model: {name}: no such folder is here, and of the Hub: ")
        assert "\n" not in line
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()  # then it is meant as a path of this machine
    assert _at_hand(config("someone/apples")).model == "someone/apples"
    (tmp_path / "someone").rmdir()
    words = ["a red apple", "--steps", "1", "--sampler", "ddim", "--out", "apple.png"]
    run = CliRunner().invoke(app, ["sample", *words, "--model", "someone/apples"])
    assert run.exit_code == 0 and b"Model: apples" in (tmp_path / "apple.png").read_bytes()
    run = CliRunner().invoke(app, ["sample", *words, "--model", "someone/pears"])
    assert run.exit_code == 2 and run.stderr.startswith("error: --model someone/pears: no such")
