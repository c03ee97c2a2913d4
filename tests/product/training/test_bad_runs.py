"""Every kind of bad input is one line on stderr that names it, and status 2."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

import tiny
from bad_data import BAD, ODD
from bad_runs import ARCHIVES, CHECKPOINTS, CONFIGS, HARMLESS, LORAS, MODELS, RUNS
from launched import losses
from ldm.cli import app
from programs import told
from runs import train, tree

WHOLE = dict(duration="3 steps", checkpoints={"every": "2 steps", "keep": 2})


def test_there_are_many():
    tables = (BAD, ODD, CONFIGS, MODELS, CHECKPOINTS, RUNS, HARMLESS, ARCHIVES, LORAS)
    assert sum(map(len, tables)) >= 250


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, command, tmp_path):
    content, words = CONFIGS[name]
    if isinstance(content, dict):
        merged = {key: value for key, value in content.items() if key not in ("data", "run")}
        config = tree(tmp_path / "run", **merged)
        config |= {key: content[key] for key in content.keys() - merged.keys()}
        message = told(*command(config))
    else:
        file = tmp_path / "bad.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        message = told(*command({}, "--config", str(file)))
        assert str(file) in message
    assert words in message and len(message) < 500
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "model")


def tuned(run: Path, model: Path, **changes) -> dict:
    config = tree(run, model=str(model), duration="1 step", **changes)
    return {key: value for key, value in config.items() if key not in ("vae", "text", "unet")}


@pytest.mark.parametrize("name", MODELS)
def test_model_folders(name, command, model, tmp_path):
    damage, words = MODELS[name]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    damage(folder)
    message = told(*command(tuned(tmp_path / "run", folder)))
    assert words in message and len(message) < 700
    assert str(folder) in message or "text" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_model_folder_that_is_damaged_is_a_good_one(command, model, tmp_path):
    status, output = command(tuned(tmp_path / "run", model))
    assert status == 0, output


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_CACHE", str(folder / "cache"))
        train(folder / "run", **{**WHOLE, "duration": "2 steps"})
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path, command, kept_cache) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, command, run, caplog):
    damage, words = CHECKPOINTS[name]
    folder = run / "checkpoints" / "images-000000000032"
    damage(folder)
    message = told(*command(tree(run, **WHOLE)))
    warned = [record.getMessage() for record in caplog.records]
    assert any(words in line and str(folder) in line for line in [message, *warned])


@pytest.mark.parametrize("name", RUNS)
def test_run_folders(name, command, run):
    damage, words = RUNS[name]
    damage(run)
    message = told(*command(tree(run, **WHOLE)))
    assert words in message


@pytest.mark.parametrize("name", HARMLESS)
def test_run_folders_that_hold_more(name, command, run):
    HARMLESS[name](run)
    status, output = command(tree(run, **WHOLE))
    assert status == 0, output
    assert len(losses(run)) == (1 if name == "no metrics" else 3)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name, command, tmp_path):
    file, data, words = ARCHIVES[name]
    (tmp_path / file).write_bytes(data)
    config = {**tree(tmp_path / "run"), "data": {"path": str(tmp_path / file)}}
    message = told(*command(config))
    assert words in message and str(tmp_path) in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", LORAS)
def test_loras(name, model, tmp_path):
    content, words = LORAS[name]
    file = tmp_path / "lora.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    # A folder is what it holds: said of one that cannot be read, and of one that does not fit.
    for path in (file, tmp_path) if name in ("empty", "other size") else (file,):
        asked = ["sample", "x", "--model", str(model), "--lora", str(path), "--steps", "1"]
        done = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "x.png")])
        assert done.exit_code == 2, done.exception
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert words in done.stderr and str(tmp_path) in done.stderr
        assert not (tmp_path / "x.png").exists()
