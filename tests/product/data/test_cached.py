"""Cached sets: made in any number of processes and kills, checked, and trained on alone."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel
from typer.testing import CliRunner

import tiny
import tiny_sd3
from launched import ENVIRONMENT, finish, launch, locked, logged, losses, wait_for
from ldm.cli import app
from ldm.data.folder import FolderData
from ldm.errors import ConfigError, DataError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage.checkpoint import sha256
from ldm.storage.lock import NAME
from ldm.tasks.denoising import DenoisingTask
from programs import told
from runs import train, tree

BATCH = dict(
    batch_size=4,
    duration="3 steps",
    validation={"every": "3 steps", "images": 4, "levels": 2},
    checkpoints={"every": "3 steps", "keep": 1},
)


@pytest.fixture(autouse=True)
def _own_cache(own_cache, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(own_cache))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "model")


def photos(folder: Path, count: int = 24) -> Path:
    """Of two shapes, with two captions each."""
    folder.mkdir()
    lines = []
    for n in range(count):
        size = (24, 16) if n % 3 == 0 else (18, 18)
        pixels = np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:02d}.png")
        text = [f"picture {n}, red, round", f"number {n}"]
        lines.append(json.dumps({"file_name": f"{n:02d}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(tmp_path: Path, model: Path) -> dict:
    """Buckets, flips, two sources by weight, one of them with drawn captions."""
    if not (tmp_path / "a").exists():
        photos(tmp_path / "a")
        photos(tmp_path / "b", 9)
    grammar = {"shuffle": True, "variants": 3}
    data = [
        {"path": str(tmp_path / "a"), "held_out_fraction": 0.2, "weight": 3.0},
        {"path": str(tmp_path / "b"), "held_out_fraction": 0.2, "weight": 1.0, "grammar": grammar},
    ]
    images = {"size": 16, "flip": True, "buckets": {"step": 4, "max_aspect": 2.0}}
    own = dict.fromkeys(("vae", "text", "unet"))
    return dict(BATCH, model=str(model), data=data, images=images, **own)


def call(tmp_path: Path, config: dict, *arguments: str, out: str = "set") -> tuple[int, str]:
    """``ldm data cache`` in this process: exit status and all that it said."""
    file = tmp_path / "cache.yaml"
    file.write_text(yaml.safe_dump(config))
    command = ["data", "cache", "--config", str(file), "--out", str(tmp_path / out), *arguments]
    found = CliRunner().invoke(app, command)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.output
    return found.exit_code, found.output


def made(tmp_path: Path, config: dict, **options: str) -> Path:
    status, output = call(tmp_path, config, **options)
    assert status == 0 and output.rstrip().endswith("; made"), output
    return tmp_path / options.get("out", "set")


def cached(changes: dict, folder: Path, **more) -> dict:
    return {**changes, "data": {"path": str(folder)}, **more}


def bits(run: Path) -> dict[str, torch.Tensor]:
    """All that a run has learnt."""
    (last,) = sorted((run / "checkpoints").iterdir())
    return load_file(last / "training" / "raw.safetensors")


def networks(folder: Path) -> dict[str, str]:
    """The hash of every file of weights."""
    return {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*.safetensors"))}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Opened(AssertionError):
    """What a run over a cached set must not touch was touched."""


@pytest.fixture
def closed(monkeypatch):
    """Neither pictures nor the weights of the frozen networks can be opened."""

    def refuse(*_, **__):
        raise Opened

    monkeypatch.setattr(FolderData, "load", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    for network in (AutoencoderKL, CLIPTextModel):
        monkeypatch.setattr(network, "from_pretrained", refuse)
        monkeypatch.setattr(network, "to", refuse)
        monkeypatch.setattr(network, "forward", refuse)


def test_the_same_weights_without_pictures_and_networks(tmp_path, model, request):
    changes = settings(tmp_path, model)
    train(tmp_path / "ordinary", **changes)
    folder = made(tmp_path, tree(tmp_path / "none", **changes))
    report = CliRunner().invoke(app, ["data", "check", str(folder), "--size", "16", "--step", "4"])
    assert report.exit_code == 0, report.output
    assert f"{tmp_path / 'b'} (cached): " in report.stdout
    assert "not checked: the pixels: a cached set holds none; `ldm data cache" in report.stdout
    for name in ("a", "b", "cache"):
        shutil.rmtree(tmp_path / name)
    request.getfixturevalue("closed")
    with pytest.raises(DataError, match="cannot be read"):
        train(tmp_path / "none", **settings(tmp_path, model))
    with pytest.raises(Opened):
        train(tmp_path / "none", vae=None, text=None, unet=None, model=str(model))
    final = train(tmp_path / "run", **cached(changes, folder))
    assert equal(bits(tmp_path / "run"), bits(tmp_path / "ordinary"))
    assert losses(tmp_path / "run") == losses(tmp_path / "ordinary")
    held_out = [logged(tmp_path / name, "held_out_loss") for name in ("run", "ordinary")]
    assert len(held_out[0]) == 1 and held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    request.getfixturevalue("monkeypatch").undo()
    # The frozen parts are the files of the set, not copies; stock opens the whole.
    part = "vae/diffusion_pytorch_model.safetensors"
    assert (final / part).stat().st_ino == (folder / part).stat().st_ino
    ordinary = networks(tmp_path / "ordinary" / "final")
    assert networks(final) == ordinary and len(ordinary) == 3
    pipe = StableDiffusionPipeline.from_pretrained(final)
    assert pipe.vae.device.type == "cpu" and pipe.scheduler.config.steps_offset == 1


def test_lora_and_prompts(tmp_path, model, caplog):
    lora = {"rank": 2, "alpha": 1.0}
    prompts = {"every": "3 steps", "images": 0, "prompts": ["picture 1"], "steps": 2}
    changes = dict(settings(tmp_path, model), lora=lora, validation=prompts)
    train(tmp_path / "ordinary", **changes)
    folder = made(tmp_path, tree(tmp_path / "none", **changes))
    caplog.set_level("INFO", "ldm")
    train(tmp_path / "run", **cached(changes, folder))
    assert equal(bits(tmp_path / "run"), bits(tmp_path / "ordinary"))
    assert "validation.prompts: vae, text_encoder are read from" in caplog.text
    pages = [next((tmp_path / name / "samples").iterdir()) for name in ("run", "ordinary")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_lora_whose_base_is_written_from_the_set(tmp_path):
    changes = dict(BATCH, lora={"rank": 2}, duration="2 steps", checkpoints={"every": "2 steps"})
    folder = made(tmp_path, tree(tmp_path / "none", **changes))
    train(tmp_path / "run", **cached(changes, folder, vae=None, text=None))
    base = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "base")
    assert not any("lora" in name for name, _ in base.unet.named_parameters())


def test_parts_from_random_init_are_in_the_set(tmp_path):
    """Also the tokenizer, which was trained on the captions."""
    changes = dict(BATCH, images={"size": 16, "flip": False})
    folder = made(tmp_path, tree(tmp_path / "none", **changes))
    train(tmp_path / "ordinary", **changes)
    train(tmp_path / "run", **cached(changes, folder))
    train(tmp_path / "from-set", **cached(changes, folder, vae=None, text=None))
    for name in ("run", "from-set"):
        assert equal(bits(tmp_path / name), bits(tmp_path / "ordinary"))
        assert networks(tmp_path / name / "final") == networks(tmp_path / "ordinary" / "final")


def test_what_a_set_was_not_made_with_is_refused(tmp_path, model):
    changes = settings(tmp_path, model)
    folder = made(tmp_path, tree(tmp_path / "none", **changes))
    other = tiny.pipeline(seed=1)
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(model, tmp_path / "words")
    file = tmp_path / "words" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"id":1,', '"id":1 ,').replace("</w>", "</x>"))
    on_set = cached(changes, folder)
    for more, words in (
        (dict(vae=str(tmp_path / "other" / "vae")), "vae: * another autoencoder"),
        (dict(text=str(tmp_path / "other")), "text: * another text encoder"),
        (dict(text=str(tmp_path / "words")), "text: * another tokenizer"),
        (dict(vae={"block_out_channels": [8, 16]}), "vae: * another autoencoder"),
        (dict(images={**changes["images"], "flip": False}), "images.flip: * made with True"),
        (dict(train=["text_encoder"]), "train: * a text encoder that learns"),
        (dict(score={}, images={"size": 16}), "score: * no pictures"),
        (dict(prompt_syntax="a1111"), "prompt_syntax, prompt_windows: * were read as text"),
        (dict(data=[{"path": str(folder)}, {"path": str(tmp_path / "a")}]), "data: * together"),
    ):
        with pytest.raises(ConfigError) as error:
            train(tmp_path / "run", **{**on_set, **more})
        start, _, rest = words.partition("* ")
        assert str(error.value).startswith(start) and rest in str(error.value), error.value
        assert "\n" not in str(error.value)
    # The same numbers in another file are the same part.
    tiny.pipeline().vae.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    train(tmp_path / "run", **{**on_set, "vae": str(tmp_path / "again"), "duration": "1 steps"})
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not complete"):
        train(tmp_path / "run", **on_set)


def test_what_cannot_be_cached_is_refused(tmp_path, model):
    changes = settings(tmp_path, model)
    endless = [{"path": str(tmp_path / "a"), "grammar": {"shuffle": True}}]
    something = tmp_path / "something"
    something.mkdir()
    (something / "else.txt").write_text("a")
    for more, options, words in (
        (dict(data=endless), {}, "data.grammar.variants: "),
        (dict(images={"size": 16, "crop": "random"}), {}, "images: a random crop"),
        (dict(train=["unet", "text_encoder"]), {}, "train: "),
        (dict(), {"out": "something"}, "it holds something else"),
    ):
        status, output = call(tmp_path, tree(tmp_path / "n", **{**changes, **more}), **options)
        assert words in told(status, output)
    folder = made(tmp_path, tree(tmp_path / "n", **changes))
    for more, words in (
        (dict(data={"path": str(folder)}), "a cached set already"),
        (dict(images={**changes["images"], "flip": False}), "made with another images.flip"),
    ):
        status, output = call(tmp_path, tree(tmp_path / "n", **{**changes, **more}))
        assert words in told(status, output)


def test_every_counted_crop_is_cached(tmp_path, model):
    """Of the 9 pictures 3 are wider than high: they have three crops, the others one."""
    images = {"size": 16, "crop": "random", "crops": 3, "flip": True}
    changes = dict(settings(tmp_path, model), images=images, duration="2 steps")
    changes["data"] = {"path": str(tmp_path / "b"), "held_out_fraction": 0.2}
    train(tmp_path / "ordinary", **changes)
    train(tmp_path / "pixels", **changes, cache_latents=False)
    assert losses(tmp_path / "pixels") == pytest.approx(losses(tmp_path / "ordinary"), rel=1e-5)
    folder = made(tmp_path, tree(tmp_path / "none", **changes))
    assert sum(name[0] == "1" for name in entries(folder)) == 2 * (3 * 3 + 6)  # of 16x16
    train(tmp_path / "run", **cached(changes, folder))
    assert equal(bits(tmp_path / "run"), bits(tmp_path / "ordinary"))
    status, output = call(tmp_path, tree(tmp_path / "none", **changes), "--verify")
    assert status == 0, output


def test_two_makers_of_one_set(tmp_path):
    (tmp_path / "set").mkdir()
    config = tree(tmp_path / "none", **BATCH)
    with locked(tmp_path / "set") as other:
        status, output = call(tmp_path, config)
    assert status == 2
    assert f"error: --out: {tmp_path}/set is in use by process {other} on " in output
    assert [p.name for p in (tmp_path / "set").iterdir()] == [NAME]


def test_a_set_that_is_damaged_is_not_trained_on(tmp_path, model):
    """Without --verify."""
    changes = settings(tmp_path, model)
    folder = made(tmp_path, tree(tmp_path / "none", **changes))
    shard = max((folder / "latents").rglob("*.safetensors"), key=lambda f: f.stat().st_size)
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    for file, place, words in (
        (shard, header, "an entry is not what was written (its checksum differs)"),
        (shard, -5, "its keys are not what was written (their checksum differs)"),
        (folder / "source-000.arrow", 3000, "is not what was written (its SHA-256 differs)"),
    ):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        for at in range(place, len(whole) // 2, 64) if place == header else [place]:
            flipped[at] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(DataError) as error:
            train(tmp_path / "run", **cached(changes, folder))
        assert str(file) in str(error.value) and words in str(error.value)
        assert "`ldm data cache` again" in str(error.value)
        file.write_bytes(whole)
    for name, text, words in (
        ("manifest.json", "[]", "it is no JSON object; the `ldm data cache` that made it makes"),
        ("manifest.json", '{"sources": 3}', "it is not what is due at sources: input should be"),
        ("cached.json", "[" * 10_000, "it is not valid JSON (too deep); what the set was made wit"),
        ("cached.json", '{"format": 1}', "it is not what is due at images: field required"),
    ):
        whole = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(DataError) as error:
            train(tmp_path / "run", **cached(changes, folder))
        assert f"{folder / name} cannot be read: {words}" in str(error.value)
        (folder / name).write_text(whole)


def test_a_set_in_half_precision(tmp_path, model):
    """Is checked, is trained on, and is not that of float32."""
    config = tree(tmp_path / "none", **settings(tmp_path, model)) | {"cache_dtype": "bfloat16"}
    folder = made(tmp_path, config)
    shard, *_ = (folder / "text").rglob("*.safetensors")
    assert load_file(shard)["tokens"].dtype == torch.bfloat16
    assert call(tmp_path, config, "--verify")[0] == 0
    train(tmp_path / "run", **cached(settings(tmp_path, model), folder))
    status, output = call(tmp_path, config | {"cache_dtype": "float32"})
    assert status != 0 and "its set was made with another cache_dtype" in output


def test_what_is_cached_is_computed_as_asked(tmp_path, model, own_cache):
    """In bfloat16 it is near what float32 says, in sets and caches of its own."""
    changes, found, spaces = settings(tmp_path, model), [], []
    for precision in ("float32", "bfloat16"):
        config = tree(tmp_path / "none", **changes, cache_precision=precision)
        folder = made(tmp_path, config, out=precision)
        files = sorted((folder / "latents").rglob("*.safetensors"))
        found.append(torch.cat([load_file(file)["mean"].flatten() for file in files]))
        assert found[-1].dtype == torch.float32
        train(tmp_path / f"run {precision}", **changes, cache_precision=precision)
        kinds = [own_cache / kind for kind in ("latents", "text")]
        spaces.append(sum(space.is_dir() for kind in kinds for space in kind.iterdir()))
    apart = float((found[0] - found[1]).square().mean().sqrt() / found[0].std())
    assert 1e-4 < apart < 3e-2
    assert spaces[1] == 2 * spaces[0] > 0
    status, output = call(tmp_path, config, out="float32")
    assert status != 0 and "its set was made with another cache_precision" in output


@pytest.mark.slow  # what it adds to half precision and to frozen, of which each has tests
def test_a_set_of_text_encoders_held_in_half_precision(tmp_path, model):
    """A run on it is bit for bit that without it; what it keeps of the networks is exact."""
    changes = settings(tmp_path, model)
    exact = made(tmp_path, tree(tmp_path / "none", **changes), out="exact")
    told = changes | {"frozen": "bfloat16"}
    config = tree(tmp_path / "none", **told)
    folder = made(tmp_path, config)
    file = "text_encoder/model.safetensors"
    assert sha256(folder / file) == sha256(exact / file)
    exact_rows, rows = (load_file(min((at / "text").glob("*.safetensors")))["tokens"]
                        for at in (exact, folder))  # fmt: skip
    assert rows.dtype == exact_rows.dtype and not torch.equal(rows, exact_rows)
    assert call(tmp_path, config, "--verify")[0] == 0
    status, output = call(tmp_path, tree(tmp_path / "none", **changes))
    assert status != 0 and "its set was made with another frozen" in output
    with pytest.raises(ConfigError, match="^frozen: .*made with 'bfloat16'.*has 'float32'"):
        train(tmp_path / "run", **cached(changes, folder))
    adapted = told | {"lora": {"rank": 2}, "precision": "bfloat16", "duration": "2 steps"}
    validation = {"every": "2 steps", "images": 4, "levels": 2}
    train(tmp_path / "on", **cached(adapted, folder, validation=validation))
    train(tmp_path / "off", **adapted | {"validation": validation})
    assert logged(tmp_path / "on", "held_out_loss") and equal(
        bits(tmp_path / "on"), bits(tmp_path / "off")
    )
    train(tmp_path / "full", **cached(told, folder, duration="1 step"))  # whose files are exact
    assert sha256(tmp_path / "full" / "final" / file) == sha256(exact / file)


def test_verify_names_what_is_broken_and_a_second_start_makes_it_again(tmp_path, model):
    config = tree(tmp_path / "none", **settings(tmp_path, model))
    folder = made(tmp_path, config)
    status, output = call(tmp_path, config, "--verify")
    assert status == 0 and "all of it is as it was made" in output
    assert call(tmp_path, config)[1].rstrip().endswith("complete already")
    shard = max((folder / "latents").rglob("*.safetensors"), key=lambda f: f.stat().st_size)
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    shard.write_bytes(flipped)
    status, output = call(tmp_path, config, "--verify")
    assert status == 1 and f"{shard.relative_to(folder)} is not what was written" in output
    assert len(output.splitlines()) == 1
    shard.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=rf"{shard} cannot be read .*remove it"):
        train(tmp_path / "run", **cached(settings(tmp_path, model), folder))
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.relative_to(folder)} is missing"):
        train(tmp_path / "run", **cached(settings(tmp_path, model), folder))
    assert call(tmp_path, config)[1].rstrip().endswith("; made")
    assert call(tmp_path, config, "--verify")[0] == 0
    # One bit in the numbers under a hash that fits: found by making them again.
    column = load_file(shard)
    column["mean"] += 0.1
    save_file(column, shard)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][shard.relative_to(folder).as_posix()] = sha256(shard)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, output = call(tmp_path, config, "--verify")
    assert status == 1 and "its latent is not what encoding it gives now" in output


def test_new_pictures_are_added(tmp_path, model):
    changes = settings(tmp_path, model)
    folder = made(tmp_path, tree(tmp_path / "none", **changes))
    before = networks(folder)
    Image.new("RGB", (18, 18), (200, 30, 90)).save(tmp_path / "b" / "99.png")
    with (tmp_path / "b" / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "99.png", "text": "a new one"}')
    status, output = call(tmp_path, tree(tmp_path / "none", **changes), "--verify")
    assert status == 1 and "have changed since" in output
    made(tmp_path, tree(tmp_path / "none", **changes))
    after = networks(folder)
    assert before.items() <= after.items() and len(after) == len(before) + 2
    assert call(tmp_path, tree(tmp_path / "none", **changes), "--verify")[0] == 0


def test_other_variants_of_captions_are_found_missing_in_the_ordinary_cache(tmp_path, model):
    """That all of a run's entries are there is kept in mind for these captions alone."""
    changes = settings(tmp_path, model)
    train(tmp_path / "three", **changes)
    changes["data"][1]["grammar"] = {"shuffle": True, "variants": 50}
    train(tmp_path / "fifty", **dict(changes, duration="6 steps"))


def entries(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every entry of a set, by space and key."""
    found = {}
    spaces = ("latents/*", "text", "text_[23]")
    for file in [file for space in spaces for file in folder.rglob(f"{space}/*.safetensors")]:
        columns = load_file(file)
        for row, key in enumerate(columns.pop("keys")):
            name = f"{file.parent.name} {bytes(key.tolist()).hex()}"
            assert name not in found
            found[name] = {n: column[row] for n, column in columns.items()}
    return found


def test_three_towers_in_one_and_two_processes(tmp_path, monkeypatch):
    """Equal sets, bit for bit; and a run on one is that without caches, whatever is dropped."""
    base = tmp_path / "base"
    LatentDiffusionPipeline(**tiny_sd3.components(), unet=None).save_pretrained(base)
    # 24 latents and, with "", 24 captions: whole batches, since the bits of a row depend on how
    # many rows there are.
    file = photos(tmp_path / "a", 12) / "metadata.jsonl"
    file.write_text(file.read_text().replace("number 11", "number 10"))
    changes = dict(
        BATCH, model=str(base), **dict.fromkeys(("vae", "text", "unet", "validation")),
        data={"path": str(file.parent), "held_out_fraction": 0},
        images={"size": 16, "flip": True}, text_dropout=[0.4, 0.4, 0.4], optimizer={"lr": 1e-2},
        objective={"times": "logit_normal"},
    )  # fmt: skip
    config = tree(tmp_path / "none", **changes)
    one, two = made(tmp_path, config, out="one"), tmp_path / "two"
    command = ["data", "cache", "--config", tmp_path / "cache.yaml", "--out", two]
    finish(launch("-m", "ldm.cli", *command, processes=2))
    whole, found = entries(one), entries(two)
    spaces = Counter(key.partition(" ")[0] for key in whole)
    assert [*spaces] == ["16x16", "text", "text_2", "text_3"] and {*spaces.values()} == {24}
    assert whole.keys() == found.keys() and all(equal(whole[key], found[key]) for key in whole)
    told, forward = [], DenoisingTask.forward

    def noted(task, batch):
        told.append(batch["told"])
        return forward(task, batch)

    monkeypatch.setattr(DenoisingTask, "forward", noted)
    train(tmp_path / "on", **cached(changes, two))
    patterns = set(map(tuple, torch.cat(told).tolist()))
    assert all(len(set(tower)) == 2 for tower in zip(*patterns, strict=True)) and len(patterns) > 4
    train(tmp_path / "off", **changes, cache_text=False, cache_latents=False)
    # In batches of other pictures and captions: sums may be rounded in another order.
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-5)


def test_killed_and_gone_on_in_two_processes(tmp_path, model):
    config = tree(tmp_path / "none", **settings(tmp_path, model))
    whole = entries(made(tmp_path, config, out="whole"))
    file, folder = tmp_path / "config.yaml", tmp_path / "set"
    file.write_text(yaml.safe_dump(config))
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = ["data", "cache", "--config", file, "--out", folder]
    process = launch(script, *command, start_new_session=True)
    wait_for(lambda: len(list(folder.glob("latents/*/*.safetensors"))) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (folder / "manifest.json").exists()
    (folder / "latents" / ".half-1.partial").write_bytes(b"of the killed")
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert 4 <= len(kept) and len(entries(folder)) < len(whole)
    finish(launch("-m", "ldm.cli", *command, processes=2))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing is made twice
    found = entries(folder)
    assert found.keys() == whole.keys() and not list(folder.rglob("*.partial"))
    for key, entry in whole.items():
        for name, value in entry.items():
            torch.testing.assert_close(found[key][name], value, rtol=1e-5, atol=1e-5)
    assert call(tmp_path, config, "--verify")[0] == 0


# Shards of four rows, and time to be killed between them.
SLOW = """
import time
from functools import partial
from ldm.cli import app
from ldm.storage.tensor_cache import TensorCache
from ldm.encoding.encoder import Encoder

build, encode = TensorCache.build, Encoder.encode_pictures

def few(self, *arguments, **options):
    return build(self, *arguments, **{**options, "shard_rows": 4, "batch": 4})

def slow(self, *arguments):
    time.sleep(0.2)
    return encode(self, *arguments)

TensorCache.build, Encoder.encode_pictures = few, slow
app()
"""
