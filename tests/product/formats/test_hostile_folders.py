"""What opening a pipeline from Python says of a folder that is damaged, or made to do harm: one
line that names the file, before anything of its size is allocated.
"""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from bad_runs import MODELS, SCHEDULER, TEXT, UNET, cut, gone, replaced, rewritten
from ldm.cli import app
from ldm.errors import ConfigError
from ldm.families.networks import read
from ldm.formats import textual_inversion
from ldm.pipeline import LatentDiffusionPipeline

HEADER = b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,0]}}'
Change = Callable[[Path], object]
INDEX, UNET_CONFIG, TEXT_CONFIG = "model_index.json", "unet/config.json", "text_encoder/config.json"
LARGE: dict[str, tuple[Change, str]] = {
    "layers": (rewritten(UNET_CONFIG, layers_per_block=10**6), "1,000,000 layers in 2 blocks"),
    "layers of one block": (rewritten(UNET_CONFIG, layers_per_block=[1, 10**6]), "1,000,000 layer"),
    "blocks": (rewritten(UNET_CONFIG, block_out_channels=[32] * 10**5), "1 layers in 100,000 bl"),
    "channels": (rewritten(UNET_CONFIG, block_out_channels=[32, 2**30]), "block_out_channels 1,07"),
    "latents": (rewritten("vae/config.json", latent_channels=2**30), "latent_channels 1,073"),
    "sides": (rewritten(UNET_CONFIG, sample_size=10**9), "sample_size 1,000,000,000 is more than"),
    "layers of text": (rewritten(TEXT_CONFIG, num_hidden_layers=10**6), "1,000,000 layers in 1"),
    "words": (rewritten(TEXT_CONFIG, vocab_size=2**40), "vocab_size 1,099,511,627,776 is more"),
    "width": (rewritten(TEXT_CONFIG, hidden_size=2**30), "hidden_size 1,073,741,824 is more than"),
    "timesteps": (rewritten(SCHEDULER, num_train_timesteps=10**12), "must lie in 1..1,000,000"),
    "no timestep": (rewritten(SCHEDULER, num_train_timesteps=0), "must lie in 1..1,000,000, not 0"),
    "half a timestep": (rewritten(SCHEDULER, num_train_timesteps=0.5), "must lie in 1..1,000,000"),
    "text as timesteps": (rewritten(SCHEDULER, num_train_timesteps="x" * 999), "not 'xxxx"),
    "depth": (replaced(UNET_CONFIG, "[" * 100_000), "config.json cannot be read: it is not val"),
    "digits": (replaced(SCHEDULER, '{"a": ' + "1" * 5000 + "}"), "cannot be read: it is not val"),
    "header": (replaced(UNET, b"\xff" * 99), "no whole safetensors file (it does not begin with a"),
    "header's shapes": (
        replaced(TEXT, (54).to_bytes(8, "little") + HEADER),
        "no whole safetensors file",
    ),
}  # fmt: skip
FOREIGN: dict[str, tuple[Change, str]] = {
    "unknown class": (rewritten(INDEX, unet=["diffusers", "Nope"]), "has no class `Nope`"),
    "a module": (rewritten(INDEX, unet=["antigravity", "x"]), "is not one of the libraries"),
    "a function": (rewritten(INDEX, unet=["os", "system"]), "cannot be loaded"),
    "a path": (rewritten(INDEX, unet=["../unet", "x"]), "cannot be opened as a pipeline"),
    "an entry": (rewritten(INDEX, unet="x"), "unet must be a library and a class of it"),
    "another entry": (rewritten(INDEX, vae=["diffusers", 3]), "vae must be a library and a class"),
    "no denoiser": (rewritten(INDEX, unet=[None, None]), "lists no unet"),
    "an index as list": (replaced(INDEX, "[]"), "cannot be read: it is no JSON object"),
    "half an index": (cut(INDEX, 40), "model_index.json cannot be read: it is no"),
    "no folder": (gone("scheduler"), "scheduler is missing, which model_index.json lists"),
}  # fmt: skip
# Told by the call that draws, as it is where parts are put together by hand.
AT_THE_CALL = {"unknown target", "trained betas", "longer tokenizer", "endless tokenizer",
               "other end of text"}  # fmt: skip
EVERY = LARGE | FOREIGN | {name: (change, "") for name, (change, _) in MODELS.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module", autouse=True)
def bounded() -> Any:
    """What allocates terabytes after all is an error here, and not the end of the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def line(folder: Path, **asked: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        LatentDiffusionPipeline.from_pretrained(folder, **asked)
    message = str(caught.value)
    assert type(caught.value) in (ValueError, OSError) and "\n" not in message
    assert str(folder) in message and len(message) < 600
    return message


@pytest.mark.parametrize("name", sorted(EVERY.keys() - AT_THE_CALL))
def test_it_is_one_line(model: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    change, words = EVERY[name]
    change(folder)
    assert words in line(folder)


@pytest.mark.parametrize("name", sorted(AT_THE_CALL))
def test_or_one_at_the_call(model: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    MODELS[name][0](folder)
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError) as caught:
        pipe("a", num_inference_steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in LARGE if "layers" in n or n in ("channels", "width")])
def test_a_run_says_it_too(model: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    change, words = LARGE[name]
    change(folder)
    part, cls = "unet", UNet2DConditionModel
    if "text" in name or name == "width":
        part, cls = "text_encoder", type(tiny.components()["text_encoder"])
    for meta in (True, False):
        with pytest.raises(ConfigError) as caught:
            read(cls, folder / part, "model", meta)
        assert words in str(caught.value) and str(folder) in str(caught.value)


def test_what_is_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", str(tmp_path / "none"), tmp_path / "x.safetensors"):
        with pytest.raises(OSError) as caught:
            LatentDiffusionPipeline.from_pretrained(path)
        assert str(caught.value) == f"{path}: there is no such folder"
    for path in (None, 3, "", "a\0b"):
        with pytest.raises(ValueError, match=r"^a pipeline is opened by the path of its folder, n"):
            LatentDiffusionPipeline.from_pretrained(path)  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"^no/such: no such folder is here, and of the Hub: "):
        LatentDiffusionPipeline.from_pretrained("no/such")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "lora.safetensors": (
        lambda f: save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, f),
        "it is a LoRA, which goes with --lora",
    ),
    "word.safetensors": (
        lambda f: save_file({"<cat>": torch.ones(1, 4)}, f),
        "it is a word of textual inversion: --embedding",
    ),
    "many.safetensors": (
        lambda f: save_file({n: torch.ones(1) for n in "abc"}, f),
        "it holds 3 tensors, and a folder with a model_index.json is needed",
    ),
    "bad.safetensors": (lambda f: f.write_bytes(b"no"), "is no whole safetensors file"),
    "sd.ckpt": (lambda f: f.write_bytes(b"no"), "it is pickled; if it is a whole model, python -c"),
    "note.txt": (lambda f: f.write_text("no"), "a folder with a model_index.json is needed"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is(tmp_path: Path, name: str) -> None:
    make, words = FILES[name]
    make(tmp_path / name)
    assert words in line(tmp_path / name)
    run = CliRunner().invoke(app, ["sample", "x", "--model", str(tmp_path / name)])
    assert run.exit_code == 2 and words in run.stderr and run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"error: --model {tmp_path / name}")


@pytest.mark.parametrize(
    "call",
    [
        ("sample", "x", "--model", "PATH"),
        ("sample", "x", "--model", "MODEL", "--lora", "PATH"),
        ("sample", "x", "--model", "MODEL", "--embedding", "PATH"),
        ("sample", "x", "--model", "MODEL", "--captions", "--out", "PATH"),
        ("sample", "x", "--model", "MODEL", "--out", "PATH"),
        ("export", "PATH", "--model", "MODEL"),
        ("lora", "MODEL", "PATH", "--to", "kohya"),
    ],
)
def test_a_path_that_nothing_can_have(model: Path, call: tuple[str, ...]) -> None:
    given = {"PATH": "a" * 5000, "MODEL": str(model)}
    run = CliRunner().invoke(app, [given.get(word, word) for word in call])
    assert run.exit_code == 2 and isinstance(run.exception, SystemExit)
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert "File name too long" in run.stderr


def test_what_a_folder_is(model: Path, tmp_path: Path) -> None:
    assert "is one part of a pipeline: name the folder that it lies in" in line(model / "unet")
    assert "name the folder that it lies in" in line(model / INDEX)
    textual_inversion.write("<cat>", torch.ones(1, tiny.WIDTH), tmp_path / "word")
    assert "the folder of a word of textual inversion" in line(tmp_path / "word")
    shutil.copytree(model, tmp_path / "run" / "final")
    told = line(tmp_path / "run")
    assert told.endswith(f"is the folder of a run: its result is {tmp_path / 'run' / 'final'}")
    (tmp_path / "empty").mkdir()
    assert line(tmp_path / "empty").endswith(
        "holds no model_index.json: it is not a pipeline folder"
    )


def test_pickled_weights(model: Path, tmp_path: Path) -> None:
    folder, pipe = tmp_path / "pickled", tiny.pipeline()
    pipe.save_pretrained(folder, safe_serialization=False)
    assert "unet holds pickled weights alone, which may run code when they are read" in line(folder)
    opened = LatentDiffusionPipeline.from_pretrained(folder, use_safetensors=False)
    for part in ("unet", "vae", "text_encoder"):
        weights = getattr(opened, part).state_dict()
        assert all(torch.equal(weights[k], v) for k, v in getattr(pipe, part).state_dict().items())
    # Folders of earlier days have a pickled text encoder too.
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    torch.save(load_file(older / TEXT), older / "text_encoder" / "pytorch_model.bin")
    (older / TEXT).unlink()
    opened = LatentDiffusionPipeline.from_pretrained(older, use_safetensors=False)
    weights = opened.text_encoder.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in pipe.text_encoder.state_dict().items())


def test_variants_and_shards(tmp_path: Path) -> None:
    pipe, folder = tiny.pipeline(), tmp_path / "model"
    pipe.save_pretrained(folder, variant="fp16", max_shard_size="200KB")
    assert "unet holds the weights of another variant: pass variant='fp16'" in line(folder)
    assert "in place of 'fp8'" in line(folder, variant="fp8")
    opened = LatentDiffusionPipeline.from_pretrained(folder, variant="fp16")
    weights = opened.unet.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in pipe.unet.state_dict().items())
    shards = sorted((folder / "unet").glob("*-of-*"))
    assert len(shards) > 1
    shards[1].unlink()
    assert f"{shards[1]} is missing" in line(folder, variant="fp16")
    (index,) = (folder / "unet").glob("*.index.*")
    index.write_text(json.dumps({"weight_map": {"a": "../../x"}}))
    assert f"{index} lists no files of weights" in line(folder, variant="fp16")


def test_parts_that_are_given_are_not_looked_at(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    shutil.rmtree(folder / "unet")
    unet = tiny.unet()
    assert LatentDiffusionPipeline.from_pretrained(folder, unet=unet).unet is unet
