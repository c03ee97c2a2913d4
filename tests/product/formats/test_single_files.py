"""A whole model in one file: the folder it was made of comes back to the bit, and what is wrong
with one is told in a line.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
import tiny_flux
import tiny_sd3
import tiny_sdxl
from ldm.cli.export import Family
from ldm.cli.main import app
from ldm.formats.single.families import kind_in
from ldm.formats.single.folder import to_folder
from ldm.formats.single.header import CONFIGS, HASH
from ldm.formats.single.read import SingleFile
from ldm.formats.single.write import CHOICES, write
from ldm.pipeline import LatentDiffusionPipeline
from runs import ROOT

MODELS = {
    "sd1": tiny.components,
    "sd2": tiny.second,
    "sdxl": tiny_sdxl.components,
    "sdxl-refiner": lambda: tiny_sdxl.components(refiner=True),
    "sd3": tiny_sd3.components,
    "flux": tiny_flux.components,
}


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def ldm(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folders of all families, and their files."""
    root, found = tmp_path_factory.mktemp("single"), {}
    for name, components in MODELS.items():
        parts = components()
        refines = {"requires_aesthetics_score": True} if name == "sdxl-refiner" else {}
        LatentDiffusionPipeline(**{"unet": None} | parts | refines).save_pretrained(root / name)
        file = root / f"{name}.safetensors"
        assert write(root / name, file, kind="none").kind.name == name
        found[name] = root / name, file
    return found


@pytest.mark.parametrize("name", MODELS)
def test_folder_to_file_to_folder(made, tmp_path, name):
    folder, file = made[name]
    source = SingleFile(file)
    assert source.kind.name == name and not any(n.startswith("ldm.") for n in source.shapes)
    to_folder(source, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(folder)
    assert source.left() == []
    write(tmp_path / "back", tmp_path / file.name, kind="none")
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert told[HASH] == "0x" + hashlib.sha256(file.read_bytes()[start:]).hexdigest()
    assert told["modelspec.title"] == name and told["modelspec.sai_model_spec"] == "1.0.0"
    assert (
        json.loads(told[CONFIGS])["model_index.json"] == (folder / "model_index.json").read_text()
    )


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_file_draws_what_its_folder_draws(made, name):
    folder, file = made[name]
    asked = dict(prompt="a red apple", num_inference_steps=2, seed=3, output_type="np")
    asked |= dict(height=16, width=16)
    pictures = []
    for path in (folder, str(file)):
        pipe = tiny.aligned(LatentDiffusionPipeline.from_pretrained(path))
        pictures.append(pipe(**asked).images)
    assert (pictures[0] == pictures[1]).all() and pictures[0].std() > 0.01


def test_the_shipped_model(tmp_path):
    """Of a shape that no other program opens: said so, and written where it is asked for."""
    small, file = ROOT / "assets" / "ldm-small", tmp_path / "small.safetensors"
    run = ldm("export", file, "--model", small)
    told = "ComfyUI and A1111 open 320 channels, context 768: this has 64, 192; --family none"
    assert run.exit_code == 2 and told in run.stderr and run.stderr.count("\n") == 1
    assert not file.exists()
    run = ldm("export", file, "--model", small, "--family", "sdxl")
    assert "is no sdxl: its file would be of the kind sd1" in run.stderr
    run = ldm("export", file, "--model", small, "--family", "none")
    assert run.exit_code == 0, run.stderr
    assert f"{file}: sd1, " in run.stdout and "MB" in run.stdout
    assert "already" in ldm("export", file, "--model", small, "--family", "none").stderr
    assert ldm("import", file, tmp_path / "back").exit_code == 0
    back, there = hashes(tmp_path / "back"), hashes(small)
    assert back == {k: v for k, v in there.items() if k in back} and len(back) == 12
    assert "already holds a pipeline" in ldm("import", file, tmp_path / "back").stderr
    told = f"is a whole model in one file; write it as a folder: ldm import {file} "
    assert told in ldm("export", tmp_path / "x", "--model", file).stderr
    other = ldm("export", tmp_path / "folder", "--model", small, "--raw")
    assert "--family and --raw are of a FILE.safetensors" in other.stderr
    picture = tmp_path / "apple.png"
    words = ("--model", file, "--steps", 1, "--sampler", "ddim", "--out", picture)
    run = ldm("sample", "a red apple", *words)
    assert run.exit_code == 0 and picture.is_file(), run.stderr


def test_raw_half_and_average(made, tmp_path):
    folder, file = made["sd1"]
    checkpoint = Path(shutil.copytree(folder, tmp_path / "images-1"))
    (checkpoint / "training").mkdir()
    told = ldm("export", tmp_path / "a.safetensors", "--model", checkpoint, "--raw").stderr
    assert "has no training/raw.safetensors: name a checkpoint of a run" in told
    bias = torch.arange(32.0)
    changed = {"unet.conv_in.bias": bias, "text_encoder.final_layer_norm.bias": bias.clone()}
    save_file(changed, checkpoint / "training" / "raw.safetensors")
    words = ("--model", checkpoint, "--family", "none", "--half")
    assert ldm("export", tmp_path / "ema.safetensors", *words).exit_code == 0
    assert ldm("export", tmp_path / "raw.safetensors", *words, "--raw").exit_code == 0
    raw, ema, whole = (load_file(f) for f in (tmp_path / "raw.safetensors",
                                              tmp_path / "ema.safetensors", file))  # fmt: skip
    own = "model.diffusion_model.input_blocks.0.0.bias"
    text = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    assert torch.equal(raw.pop(own), bias.half()) and torch.equal(raw.pop(text), bias.half())
    assert all(torch.equal(value, ema[name]) for name, value in raw.items())
    kept = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert torch.equal(whole[kept], torch.arange(tiny.LENGTH).expand(1, -1))
    for name, value in whole.items():
        assert torch.equal(ema[name], value if name == kept else value.half())

    # A file of training, with averages under names without dots.
    unet = {k: v for k, v in whole.items() if k.startswith("model.diffusion_model.")}
    averages = {f"model_ema.{k[6:].replace('.', '')}": v + 1 for k, v in unet.items()}
    both = tmp_path / "both.safetensors"
    save_file({**whole, **averages, "betas": torch.ones(3), "what": torch.ones(1)}, both)
    for words, plus in (((), 0), (("--ema",), 1)):
        out = tmp_path / f"plus-{plus}"
        run = ldm("import", both, out, "--config", folder, *words)
        assert run.exit_code == 0 and "1 tensors are of no part" in run.stdout, run.stderr
        name = "diffusion_pytorch_model.safetensors"
        before, after = (load_file(f / "unet" / name) for f in (folder, out))
        assert all(torch.equal(after[name], value + plus) for name, value in before.items())
    assert "holds no averages" in ldm("import", file, tmp_path / "x", "--ema").stderr


def test_what_a_file_does_not_hold(made, tmp_path):
    folder, file = made["flux"]
    whole, root = load_file(file), "model.diffusion_model."
    # As it was published: the transformer alone, without a prefix.
    alone = {k.removeprefix(root): v for k, v in whole.items() if k.startswith(root)}
    bare = tmp_path / "flux1.safetensors"
    save_file(alone, bare)
    run = ldm("import", bare, tmp_path / "none")
    assert run.exit_code == 2 and "of the kind flux: configs and tokenizer come" in run.stderr
    assert run.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
    assert ldm("import", bare, tmp_path / "flux", "--config", folder).exit_code == 0
    assert hashes(tmp_path / "flux") == hashes(folder)

    folder, file = made["sd3"]
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("text_encoders.t5")}
    kept = {k: v for k, v in kept.items() if not k.startswith("first_stage_model.")}
    some, light = tmp_path / "sd3.safetensors", Path(shutil.copytree(folder, tmp_path / "light"))
    save_file(kept, some)
    for weights in light.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="sd3.safetensors holds no vae: name one, --vae FOLDER or"):
        LatentDiffusionPipeline.from_single_file(some, config=light)
    vae = tmp_path / "vae.safetensors"
    named = {k: v for k, v in load_file(file).items() if k.startswith("first_stage_model.")}
    save_file({k.removeprefix("first_stage_model."): v for k, v in named.items()}, vae)
    for given in (vae, folder, folder / "vae"):
        pipe = LatentDiffusionPipeline.from_single_file(some, config=light, vae=given)
        assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
        one = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(v, one[k]) for k, v in pipe.vae.state_dict().items())


def test_marks_of_what_is_predicted(made, tmp_path, monkeypatch):
    def scheduler(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())

    monkeypatch.setattr("ldm.formats.single.write.refused", lambda *_: None)
    for name in ("sd1", "sdxl"):
        folder = Path(shutil.copytree(made[name][0], tmp_path / name))
        told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(scheduler(folder) | told))
        file = tmp_path / f"{name}.safetensors"
        written = write(folder, file)
        marks = {"v_pred", "ztsnr"} & load_file(file).keys()
        assert marks == ({"v_pred", "ztsnr"} if name == "sdxl" else set())
        assert file.with_suffix(".yaml").is_file() == (name == "sd1")
        notes = " ".join(written.notes)
        assert ("its node ModelSamplingDiscrete" in notes) == (name == "sd1")
        assert ("A1111 reads what is beside it, sd1.yaml" in notes) == (name == "sd1")
        # With the configs of a model that predicts eps.
        to_folder(SingleFile(file), tmp_path / f"{name}-back", configs=made[name][0])
        back = scheduler(tmp_path / f"{name}-back")
        assert back["prediction_type"] == "v_prediction"
        if name == "sdxl":
            assert back["rescale_betas_zero_snr"] and back["timestep_spacing"] == "trailing"
    (tmp_path / "sd1.yaml").write_text("- no")
    with pytest.raises(ValueError, match=r"sd1\.yaml: it is no config of a model"):
        to_folder(SingleFile(tmp_path / "sd1.safetensors"), tmp_path / "x", configs=made["sd1"][0])
    written = write(made["sd2"][0], tmp_path / "sd2.safetensors")
    assert "ComfyUI will take it for one that predicts eps, and it predicts v" in written.notes[1]


def line(path: Path, **asked: Any) -> str:
    with pytest.raises((OSError, ValueError)) as error:
        LatentDiffusionPipeline.from_single_file(path, **asked)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_damaged_and_hostile_files(made, tmp_path):
    folder, file = made["sd1"]
    data, bad = file.read_bytes(), tmp_path / "bad.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        told = opened.metadata()

    def saved(change: dict[str, Any] | None = None, **configs: Any) -> str:
        files = json.loads(told[CONFIGS])
        files |= {name: text for name, text in configs.items()}
        kept = {k: v for k, v in (tensors | (change or {})).items() if v is not None}
        save_file(kept, bad, told | {CONFIGS: json.dumps(files)})
        return line(bad)

    bad.write_bytes(data[:-1])
    assert "is no whole safetensors file (it holds" in line(bad)
    bad.write_bytes(b"no")
    assert "is no whole safetensors file" in line(bad)
    assert "there is no such file" in line(tmp_path / "none.safetensors")
    own = "model.diffusion_model.input_blocks.0.0.weight"
    assert f"bad.safetensors, unet: it lacks {own}" in saved({own: None})
    shaped = saved({own: torch.ones(3, 4, 3, 3)})
    assert f"unet: {own} is (3, 4, 3, 3), and by its config (32, 4, 3, 3)" in shaped
    save_file(tensors, bad, told | {CONFIGS: "{"})
    assert "ldm.configs in its header is damaged: export it again" in line(bad)
    assert "holds '../evil.json', no config" in saved(**{"../evil.json": "{}"})
    assert "holds 'unet/x.bin', no config" in saved(**{"unet/x.bin": "{}"})
    index = json.loads((folder / "model_index.json").read_text())
    evil = json.dumps(index | {"unet": ["os", "system"]})
    assert "unet is a system, which no single file holds" in saved(**{"model_index.json": evil})
    config = json.loads((folder / "unet" / "config.json").read_text())
    for key, value, words in (
        ("layers_per_block", 10**9, "layers in 2 blocks are more than the"),
        ("block_out_channels", [2**30, 2**30], "is more than the weights beside it have"),
        ("norm_num_groups", 7, "the config of its unet makes none: num_channels"),
    ):
        assert words in saved(**{"unet/config.json": json.dumps(config | {key: value})})
    for name, words in (("x.ckpt", 't.get("state_dict", t)'), ("x.txt", "is no .safetensors")):
        (tmp_path / name).write_bytes(b"no")
        assert words in line(tmp_path / name)
        run = ldm("import", tmp_path / name, tmp_path / "out")
        assert run.exit_code == 2 and run.stderr.count("\n") == 1 and words in run.stderr
    save_file({"a": torch.ones(1)}, bad)
    assert "is no whole model: it holds 1 tensors, a for one" in line(bad)
    assert not (tmp_path / "out").exists()


def test_kinds_are_named_once():
    assert {family.value for family in Family} == {*CHOICES}
    assert kind_in(["a"]) is None
