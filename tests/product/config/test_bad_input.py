"""What a user gets wrong is told in one line on stderr, ``error: ...``, with exit status 2."""

import os
import re
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from ldm.config.autoencoder import AutoencoderConfig
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.data.folder import FolderData
from ldm.errors import ConfigError
from ldm.families.noise import process_and_objective
from ldm.tasks import autoencoder
from programs import own_process, told
from runs import accelerator, train, tree

# -- the config --


def test_unknown_key(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tree(tmp_path / "run")))
    done = own_process("--config", config, "optimizer.lrr=1e-3", cache=tmp_path, fresh=True)
    assert done.stderr == (
        f"error: {config}: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?\n"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "run").exists()


def test_a_key_that_stands_twice(command, tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("run: a\noptimizer: {lr: 1e-4}\nseed: 1\noptimizer: {lr: 1e-3}\n")
    message = told(*command(tree(tmp_path / "run"), "--config", str(file)))
    assert message == f"config file {file} line 4 cannot be used: key 'optimizer' stands twice"


def test_an_autoencoder_that_statistics_cannot_be_folded_into(tmp_path, own_cache):
    whole = tree(tmp_path / "run")
    shape = {**whole["vae"], "quant_conv": False}
    told_by = {key: whole[key] for key in ("run", "data", "images", "batch_size", "duration")}
    config = validate(AutoencoderConfig, told_by | {"vae": shape, "validation": None})
    wrong = r"vae: this shape \(quant_conv: false\) has no quant convolutions"
    with pytest.raises(ConfigError, match=wrong):
        autoencoder.train(config, accelerator())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train", {"text": {"vocab_size": 500}}),
        ("train", {"text": {"max_length": 2}}),
        ("train_clip", {"vocab_size": 500}),
        ("train_clip", {"max_length": 2}),
        ("train_clip", {"clip": {"patch": 0}}),
    ],
)
def test_sizes_that_no_text_fits_into(command, tmp_path, name, change):
    config = tree(tmp_path / "run", **change)
    if name == "train_clip":
        config = {k: v for k, v in config.items() if k not in ("vae", "text", "unet")}
    message = told(*command(config, name=name))
    (key, value), *_ = change.items()
    wrong = next(iter(value)) if isinstance(value, dict) else key
    assert wrong in message


def test_missing_config_file(command, tmp_path, monkeypatch):
    status, output = command(tree(tmp_path / "run"), "--config", str(tmp_path / "none.yaml"))
    assert told(status, output) == f"config file {tmp_path / 'none.yaml'} does not exist"


@pytest.mark.parametrize(
    "batch, micro, message",
    [(16, 5, "micro_batch_size 5 does not divide the 16 images of each process (batch_size 16")],
)
def test_batch_that_does_not_divide(command, tmp_path, batch, micro, message):
    config = tree(tmp_path / "run", batch_size=batch, micro_batch_size=micro)
    assert told(*command(config)).startswith(message)


def test_batch_that_does_not_divide_over_processes():
    from ldm.engine.batch import split_batch
    from ldm.errors import ConfigError

    config = SimpleNamespace(batch_size=16, micro_batch_size=None)
    with pytest.raises(ConfigError, match="^batch_size 16 does not divide over 3 processes$"):
        split_batch(config, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_eps_with_zero_terminal_snr(command, tmp_path, dry):
    config = tree(tmp_path / "run", process={"zero_terminal_snr": True})
    message = told(*command(config, *dry))
    assert message.startswith("target 'eps' says nothing about x0 where alpha = 0")
    assert "use target 'v'" in message
    assert not (tmp_path / "run").exists()


def test_target_that_no_scheduler_can_express(command, tmp_path):
    config = tree(tmp_path / "run", objective={"target": "score"})
    message = told(*command(config))
    assert message.startswith("diffusers' schedulers cannot express target 'score'")


def test_xformers_on_a_cpu(command, tmp_path):
    message = told(*command(tree(tmp_path / "run", attention="xformers")))
    assert message == ("attention xformers needs a CUDA device, this is cpu: leave attention out")
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "part, change, wrong",
    [
        ("unet", {"block_out_channels": [20, 30]}, "20"),  # 8 groups
        ("vae", {"block_out_channels": [10, 14]}, "10"),  # 4 groups
        ("text", {"hidden_size": 33}, "33"),  # 2 heads
    ],
)
def test_widths_that_no_network_can_have(command, tmp_path, part, change, wrong):
    for dry in ((), ("--dry-run",)):
        message = told(*command(tree(tmp_path / "run", **{part: change}), *dry))
        assert message.startswith(f"{part}: ") and wrong in message


def test_tokenizer_that_is_too_long_for_its_text_encoder(command, tmp_path):
    from ldm.models.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    save_tokenizer(train_tokenizer(["a red circle"], 600, 24), folder)
    message = told(*command(tree(tmp_path / "run", text={"tokenizer": str(folder)})))
    assert message == (
        "text: the tokenizer pads to 24 tokens but the text encoder has 16 positions:"
        " set model_max_length"
    )


def test_picture_size_that_the_autoencoder_cannot_halve(command, tmp_path):
    message = told(*command(tree(tmp_path / "run", images={"size": 17})))
    assert message == "images.size 17 is no multiple of 2, the pixels of a latent"


def test_a_loss_that_is_not_finite(command, tmp_path):
    config = tree(tmp_path / "run", optimizer={"lr": 1e30, "clip_norm": 1e30}, duration="40 steps")
    message = told(*command(config))
    assert re.match(r"the loss of step \d+ \(images \d+ to \d+\) is (nan|inf|[\d.]+e)", message)
    assert "lower optimizer.lr" in message
    assert not (tmp_path / "run" / "final").exists()


# -- the data --


def test_missing_data_folder(command, tmp_path):
    config = {**tree(tmp_path / "run"), "data": {"path": str(tmp_path / "none")}}
    message = told(*command(config))
    assert message == f"{tmp_path / 'none'}: this folder does not exist, check data.path"


def test_a_folder_without_captions(command, tmp_path, pictures):
    for file in pictures.glob("*.txt"):
        file.unlink()
    message = told(*command({**tree(tmp_path / "run"), "data": {"path": str(pictures)}}))
    assert message.startswith(f"{pictures}: 8 pictures but no captions, write them as")


def test_a_truncated_picture(tmp_path, pictures):
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    broken = pictures / "3.png"
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:3000])
    config = tmp_path / "c.yaml"
    data = {"path": str(pictures), "held_out_fraction": 0}
    config.write_text(yaml.safe_dump({**tree(tmp_path / "run"), "data": data}))
    done = own_process("--config", config, cache=tmp_path / "cache")
    message = told(done.returncode, done.stderr)
    assert message.startswith(f"{pictures}: 1 pictures that cannot be read (")
    assert "): 3.png; repair or remove them, or set on_bad_sample to skip" in message


def test_a_picture_that_rots_after_it_was_looked_at(command, tmp_path, pictures):
    """With its size and time as they were, only reading it tells; and a DataLoader wraps what a
    worker raises into a text of many lines.
    """
    config = tree(tmp_path / "run", workers=1, cache_latents=False, duration="2 steps")
    config["data"] = {"path": str(pictures), "held_out_fraction": 0}
    file = pictures / "3.png"
    assert len(FolderData(path=str(pictures)).examples) == 8
    state, data = file.stat(), file.read_bytes()
    file.write_bytes(bytes(len(data)))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    message = told(*command(config))
    assert message.startswith(f"{file}: the picture cannot be read (")


# -- folders of models --


def test_model_folder_that_is_missing_or_none(command, tmp_path):
    for model in (tmp_path / "none", tmp_path):
        for key in ("vae", "text", "unet"):
            config = tree(tmp_path / "run", model=str(model))
            config[key] = None
            message = told(*command(config))
            assert message.startswith(f"model: {model} is no pipeline folder (it has no")
            assert message.endswith("model_index.json)")


def test_a_part_that_is_described_nowhere(command, tmp_path):
    config = tree(tmp_path / "run")
    del config["vae"]
    assert told(*command(config)) == ("vae is not described: give vae, or model, a pipeline folder")


def test_folder_without_an_autoencoder(command, tmp_path):
    message = told(*command({**tree(tmp_path / "run"), "vae": str(tmp_path)}))
    assert message == f"vae: {tmp_path} holds no AutoencoderKL (it has no config.json)"


def test_weights_that_cannot_be_read(command, tmp_path):
    from ldm.config.schema import VaeShape
    from ldm.families.vae import make_vae

    shape = VaeShape(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
    folder = tmp_path / "vae"
    make_vae(shape, 0).save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    message = told(*command({**tree(tmp_path / "run"), "vae": str(folder)}))
    assert message.startswith(f"vae: the weights in {folder} cannot be read: ")


# -- what a model says --


def test_a_sampler_that_is_none_is_refused_before_the_first_step(command, tmp_path):
    config = tree(tmp_path / "run", score={"sampler": "dmpp"})
    assert "score.sampler: unknown sampler 'dmpp'" in told(*command(config))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_fine_tuned_model_says_is_kept_where_the_config_is_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    final = train(
        tmp_path / "v", objective={"target": "v"}, process={"schedule": "linear"}, duration="1 step"
    )
    config = tree(tmp_path / "tuned", model=str(final), objective={"weighting": "min_snr"})
    for part in ("vae", "text", "unet"):
        config.pop(part)
    config["process"] = {"beta_end": 0.01}
    process, objective = process_and_objective(validate(TrainConfig, config))
    assert (objective.target, objective.weighting) == ("v", "min_snr")
    assert (process.schedule, process.beta_start, process.beta_end) == ("linear", 0.00085, 0.01)
