"""A config is read whole and right, or refused in one line that says which key is wrong."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml

from ldm.config.autoencoder import AutoencoderConfig
from ldm.config.classifier import ClassifierConfig
from ldm.config.clip import ClipConfig
from ldm.config.loader import images, load, plain, validate
from ldm.config.schema import (
    ProcessSettings,
    TrainConfig,
    VaeShape,
)
from ldm.data.folder import FolderData
from ldm.demo.emoji import EmojiData
from ldm.demo.shapes import ShapesData
from ldm.errors import ConfigError
from runs import ROOT, tree

CONFIGS = sorted(
    file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name != "accelerate"
)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path / "run")))
    return path


def refusal(file: Path, *overrides: str) -> str:
    """The one line that refuses ``file`` with ``overrides``, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, file, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert message.startswith(f"{file}: ")
    return message.removeprefix(f"{file}: ")


def schema(file: Path) -> type:
    """The class that a file of configs/ is for, told by what only that program needs."""
    keys = yaml.safe_load(file.read_text())
    if "clip" in keys or "vocab_size" in keys:
        return ClipConfig
    if "labels" in keys:
        return ClassifierConfig
    return AutoencoderConfig if "kl" in keys else TrainConfig


# -- reading --


def test_numbers_written_as_text_become_numbers(file):
    # YAML 1.1 reads 1e-4 (no dot) as text.
    assert yaml.safe_load("1e-4") == "1e-4"
    config = load(TrainConfig, file, ["optimizer.lr=1e-4", "optimizer.betas=[9e-1, 0.99]"])
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.9, 0.99)


def test_overrides(file):
    before = load(TrainConfig, file)
    after = load(
        TrainConfig,
        file,
        ["batch_size=24", "images.flip=false", "ema=null", "process.zero_terminal_snr=true"],
    )
    assert after.batch_size == 24 and before.batch_size == 16
    assert after.images == dataclasses.replace(before.images, flip=False)
    assert after.ema is None
    assert after.process == ProcessSettings(zero_terminal_snr=True)  # made where there was none
    expected = dict(batch_size=24, images=after.images, ema=None, process=after.process)
    assert after == dataclasses.replace(before, **expected)


def test_a_sampler_by_the_name_that_others_use(file):
    config = load(TrainConfig, file, ["validation={sampler: DPM++ 2M}", "score={sampler: euler_a}"])
    assert (config.validation.sampler, config.score.sampler) == ("dpm++", "euler-a")
    message = refusal(file, "score.sampler=DPM++ 2M Karras")
    assert message.startswith("score.sampler: sampler 'DPM++ 2M Karras': no named sampler steps")


def test_an_override_may_hold_an_equals_sign(file):
    assert load(TrainConfig, file, ["run=a=b"]).run == "a=b"


def test_a_path_gives_way_to_a_described_part(file):
    text = file.read_text()
    file.write_text(yaml.safe_dump({**yaml.safe_load(text), "vae": "some/folder"}))
    assert load(TrainConfig, file).vae == "some/folder"
    assert load(TrainConfig, file, ["vae.latent_channels=8"]).vae == VaeShape(latent_channels=8)


@pytest.mark.parametrize(
    "data, kind",
    [
        ({"path": "here"}, FolderData),
        ({"kind": "folder", "path": "here"}, FolderData),
        ({"kind": "emoji", "limit": 3}, EmojiData),
        ({"kind": "shapes", "count": 3}, ShapesData),
    ],
)
def test_kind_is_filled_in(tmp_path, data, kind):
    config = validate(TrainConfig, {**tree(tmp_path), "data": data})
    assert type(config.data) is kind
    assert config.data == kind(**data)
    assert plain(config)["data"]["kind"] == kind.kind


def test_several_sources(tmp_path):
    data = [{"path": "here"}, {"kind": "shapes", "count": 3}]
    config = validate(TrainConfig, {**tree(tmp_path), "data": data})
    assert config.data == (FolderData(path="here"), ShapesData(count=3))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: str(f.relative_to(ROOT / "configs")))
def test_every_config_loads_dumps_and_loads_back(file, tmp_path):
    config = load(schema(file), file)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(yaml.safe_dump(plain(config), sort_keys=False))
    assert load(schema(file), dumped) == config
    every = plain(config)
    assert set(every) == {f.name for f in dataclasses.fields(config)}
    # Plain means plain: what a YAML holds and nothing else.
    assert yaml.safe_load(yaml.safe_dump(every)) == every


def test_there_are_configs():
    assert len(CONFIGS) >= 3


# -- lengths --


@pytest.mark.parametrize(
    "text, expected",
    [
        ("20k steps", 20_000 * 32),
        ("1 step", 32),
        ("2M images", 2_000_000),
        ("1.5k images", 1504),  # rounded up to whole batches of 32
        ("1 image", 32),
        ("0 steps", 0),
        ("30 epochs", 3008),
        ("1 epoch", 128),
        (" 3steps ", 96),
        ("0.5 epochs", 64),
    ],
)
def test_durations_in_images(text, expected):
    assert images(text, batch_size=32, epoch=100) == expected


# -- refusals --


@pytest.mark.parametrize(
    "override, key, nearest",
    [
        ("optimiser.lr=1", "optimiser", "optimizer"),
        ("optimizer.weight_deacy=1", "optimizer.weight_deacy", "optimizer.weight_decay"),
        ("data.cuont=3", "data.cuont", "data.count"),
        ("data=[{kind: shapes, cuont: 3}]", "data.0.cuont", "data.0.count"),
        ("data={kind: emoji, stiles: [twemoji]}", "data.stiles", "data.styles"),
        ("data={kind: folder, pth: x}", "data.pth", "data.path"),
        ("data={pth: x}", "data.pth", "data.path"),
        ("data={path: x, caption_colunm: x}", "data.caption_colunm", "data.caption_column"),
        ("unet.layers_per_blok=1", "unet.layers_per_blok", "unet.layers_per_block"),
        ("vae.latent_chanels=4", "vae.latent_chanels", "vae.latent_channels"),
        ("text.hiden_size=4", "text.hiden_size", "text.hidden_size"),
        ("process.shedule=linear", "process.shedule", "process.schedule"),
        ("objective.gama=1", "objective.gama", "objective.gamma"),
        ("images.sise=3", "images.sise", "images.size"),
        ("checkpoints.kep=3", "checkpoints.kep", "checkpoints.keep"),
        ("score.caption=3", "score.caption", "score.captions"),
    ],
)
def test_unknown_key_names_the_nearest(file, override, key, nearest):
    assert refusal(file, override) == f"unknown key {key!r}; did you mean {nearest!r}?"


def test_unknown_key_with_nothing_near_lists_the_known(file):
    assert (
        refusal(file, "ema.zzz=1")
        == "unknown key 'ema.zzz'; known keys: half_life, ramp, device, every"
    )


def test_a_key_of_another_kind_names_that_kind(file):
    # The test config's data are shapes.
    message = refusal(file, "data.path=my_images")
    assert message == (
        "unknown key 'data.path'; kind 'shapes' does not have it, kind 'folder' does"
    )


@pytest.mark.parametrize(
    "override, message",
    [
        ("batch_size=x", "key 'batch_size' is 'x': input should be a valid integer"),
        ("batch_size=0", "key 'batch_size' is 0: input should be greater than 0"),
        ("batch_size=1.5", "key 'batch_size' is 1.5: input should be a valid integer"),
        ("optimizer.lr=fast", "key 'optimizer.lr' is 'fast': input should be a valid number"),
        ("optimizer.lr=.nan", "key 'optimizer.lr' is nan: input should be"),
        ("optimizer.betas=[0.9]", "key 'optimizer.betas' has too few values: [0.9]"),
        ("optimizer.betas=[0.9, 2]", "key 'optimizer.betas.1' is 2: input should be less than"),
        ("optimizer=3", "key 'optimizer' is 3: input should be keys and values"),
        (
            "precision=fp16",
            "key 'precision' is 'fp16': input should be 'auto', 'float32', 'tf32', 'bfloat16' or",
        ),
        ("train=unet", "key 'train' is 'unet': input should be a list"),
        (
            "train=[unett]",
            "train.0: 'unett' is no part: write unet or text_encoder, or parameters of one of them"
            " as unet.PATTERN (unet.*attn2*); did you mean 'unet'?",
        ),
        ("images.size=abc", "key 'images.size' is 'abc': input should be a valid integer"),
        ("images.size=0", "images: size=0: a picture has at least one pixel"),
        ("images.background=[1, 2, 700]", "images: background=(1, 2, 700): red, green and blue"),
        # Inside unions: the alternative that was meant, not the first that fails.
        ("vae.latent_channels=0", "key 'vae.latent_channels' is 0: input should be greater"),
        ("text.layers=x", "key 'text.layers' is 'x': input should be a valid integer"),
        ("unet.attention_head_dim=[1, a]", "key 'unet.attention_head_dim.1' is 'a': input should"),
        ("data.count=x", "key 'data.count' is 'x': input should be a valid integer"),
        ("data.count=0", "data: shapes: count=0 makes no picture, set it to at least 1"),
        ("data=[{kind: shapes, count: x}]", "key 'data.0.count' is 'x': input should be a valid"),
        ("data=[3]", "key 'data.0' is 3: input should be keys and values"),
        (
            "data.kind=shape",
            "key 'data.kind' is 'shape': known kinds: 'folder', 'webdataset', 'parquet',",
        ),
        (
            "data=[{kind: a}]",
            "key 'data.0.kind' is 'a': known kinds: 'folder', 'webdataset', 'parquet',",
        ),
        ("duration=soon", "duration: 'soon' is no duration: write '20k steps', '2M images' or"),
        ("duration=3 parsecs", "duration: '3 parsecs' is no duration: write '20k steps'"),
        ("duration=-3 steps", "duration: '-3 steps' is no duration: write '20k steps'"),
        ("duration=300", "duration: '300' is no duration: write '20k steps', '2M images' or"),
        ("checkpoints.every=0 steps", "checkpoints.every: '0 steps' is no interval"),
        ("data=null", "key 'data' is None: input should be keys and values"),
    ],
)
def test_wrong_values(file, override, message):
    assert refusal(file, override).startswith(message)


@pytest.mark.parametrize("key", ["duration", "run", "data"])
def test_missing_required_key(file, key):
    described = yaml.safe_load(file.read_text())
    del described[key]
    file.write_text(yaml.safe_dump(described))
    assert refusal(file) == f"key {key!r} is required"


def test_missing_required_key_inside_a_part(file):
    assert refusal(file, "data={kind: folder}") == "key 'data.path' is required"
    assert refusal(file, "data=[{caption_column: x}]") == "key 'data.0.path' is required"


ANCHORS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{name}'] * 10)}]\n"
    for name, after in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [1", r"line \d+ cannot be used: "),
        ("- 1\n- 2\n", r"must hold keys and values"),
        ("just text", r"must hold keys and values"),
        ("", r": key '\w+' is required"),
        ("[" * 10_000, "cannot be used: nested too deep"),
        ("run: " + "{a: " * 3000, "cannot be used: nested too deep"),
        ("run: &a [*a]", "cannot be used: nested too deep"),
        (ANCHORS, "cannot be used: it holds more than 100,000 values"),
        (
            "batch_size: " + "9" * 5000,
            r"line 1 cannot be used: '9{40}\.\.\.' cannot be read as int",
        ),
        ("run: a\nrun: b", "line 2 cannot be used: key 'run' stands twice"),
        ("? [1]\n: 2", "line 1 cannot be used: a key is a list or a mapping"),
        ("a: 1\n---\nb: 2\n", "cannot be used: but found another document"),
        ("run: a\0b", "cannot be used: special characters are not allowed"),
        ("run: !!python/name:os.system", "line 1 cannot be used: !!python/name:os.system is no"),
        ("run: !!bool x", "line 1 cannot be used: 'x' cannot be read as bool"),
        ("run: !!set {a}", "line 1 cannot be used: !!set is no plain value"),
        ("#" * (2**20 + 1), "is no config: 1,048,577 bytes long"),
    ],
    ids=lambda text: text[:30],
)
def test_broken_files(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(TrainConfig, file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_dates_and_odd_numbers_are_not_made_something_else(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("run: 2024-99-99\nduration: 3 steps\ndata: {kind: shapes}\nbatch_size: 010\n")
    config = load(TrainConfig, file)
    assert (config.run, config.batch_size) == ("2024-99-99", 10)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load(TrainConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(TrainConfig, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match="is no regular file: write the config into one"):
            load(TrainConfig, special)
    (tmp_path / "latin.yaml").write_bytes("run: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(TrainConfig, tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["batch_size", "=3", ""])
def test_overrides_without_key_or_value(file, override):
    with pytest.raises(ConfigError, match=f"^{re.escape(repr(override))} is no override: write"):
        load(TrainConfig, file, [override])


def test_an_override_into_a_list_is_refused(file):
    with pytest.raises(ConfigError, match=r"data is a list; give all of it, data=\[\.\.\.\]"):
        load(TrainConfig, file, ["data=[{path: a}, {path: b}]", "data.0.path=c"])
