"""Editors see the schema that the code has, and it says of a config what the code says."""

import json
import re
from functools import cache

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config.json_schema import CONFIGS, text
from ldm.config.loader import validate
from ldm.errors import ConfigError
from runs import ROOT, tree

FOLDER = ROOT / "configs" / ".schema"
FILES = sorted(
    file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name != "accelerate"
)
LINE = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")


class Loader(yaml.SafeLoader):
    """YAML as editors read it (1.2), to which 1e-4 is a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def named(file) -> str:
    """The program that the first line of a config names."""
    line = LINE.match(file.read_text())
    assert line, f"{file.name}: its first line names no schema"
    schema = (file.parent / line[1]).resolve()
    assert schema.parent == FOLDER, file.name
    return schema.stem


@cache
def schema_of(name: str) -> dict:
    return json.loads(text(CONFIGS[name]))


def problems(name: str, config: object) -> list[str]:
    checked = Draft202012Validator(schema_of(name))
    return [problem.message for problem in checked.iter_errors(config)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_schema_of_editors_is_that_of_the_code(name):
    shown = CliRunner().invoke(app, ["schema", name]).stdout
    Draft202012Validator.check_schema(json.loads(shown))
    kept = (FOLDER / f"{name}.json").read_text()
    assert kept == shown, f"run: ldm schema {name} > configs/.schema/{name}.json"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_is_valid_for_its_schema(file):
    config, name = yaml.load(file.read_text(), Loader), named(file)
    validate(CONFIGS[name], config)
    assert problems(name, config) == []
    others = [other for other in CONFIGS if other != name]
    assert all(problems(other, config) for other in others), "a config of every program"


@pytest.mark.parametrize(
    "change",
    [
        {"batchsize": 3},
        {"optimizer": {"lrr": 1e-3}},
        {"optimizer": {"lr": 0}},
        {"optimizer": {"lr": "fast"}},
        {"optimizer": {"betas": [0.9]}},
        {"duration": "5 minutes"},
        {"duration": 500},
        {"data": {"kind": "shapes", "cuont": 3}},
        {"data": {"kind": "shape"}},
        {"data": {"count": 3}},
        {"data": {"path": "x", "capton_column": "text"}},
        {"data": [{"path": "x"}, {"kind": "emoji", "path": "x"}]},
        {"images": {"size": 64, "buckets": {"steps": 64}}},
        {"train": ["vae"]},
        {"train": []},
        {"trackers": ["tensorbord"]},
        {"resume": "sometimes"},
        {"vae": {"layers": 1}},
    ],
    ids=str,
)
def test_both_refuse_the_same(tmp_path, change):
    config = tree(tmp_path)
    assert problems("train", config) == []
    for key, value in change.items():
        merged = isinstance(value, dict) and key not in ("data", "vae")
        config[key] = {**config.get(key, {}), **value} if merged else value
    assert problems("train", config)
    with pytest.raises(ConfigError):
        validate(CONFIGS["train"], config)


@pytest.mark.parametrize(
    "change",
    [
        {"duration": "2.5k steps"},
        {"duration": "1 epoch"},
        {"duration": "3Mimages"},
        {"resume": {"allow": ["optimizer.lr"]}},
        {"data": {"path": "pictures"}},
        {"data": [{"path": "a", "weight": 2}, {"kind": "webdataset", "path": "b.tar"}]},
        {"vae": "folder", "text": None, "ema": None, "validation": None},
        {"trackers": ["tensorboard", "wandb"]},
        {"unet": {"attention_head_dim": [2, 4]}},
    ],
    ids=str,
)
def test_both_take_the_same(tmp_path, change):
    config = {**tree(tmp_path), **change}
    assert problems("train", config) == []
    validate(CONFIGS["train"], config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_described(name):
    schema = schema_of(name)
    parts = {"": schema, **schema["$defs"]}
    silent = [
        f"{part}.{key}"
        for part, content in parts.items()
        for key, value in content["properties"].items()
        if not value.get("description") and key != "kind"
    ]
    assert silent == []
    assert all(content["additionalProperties"] is False for content in parts.values())
    learning_rate = next(
        part["properties"]["lr"] for title, part in parts.items() if title.endswith("Optimizer")
    )
    assert learning_rate["description"].startswith("peak learning rate. None: 1e-4;")
    assert schema["properties"]["seed"]["description"] == "of every draw."  # of its base class
