"""The configs of papers: each is whole, states what it reproduces, and trains two steps."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ldm.config.loader import load
from ldm.config.schema import TrainConfig
from ldm.demo.digits import NAMES
from ldm.families.build import build, parameters
from ldm.families.noise import process_and_objective
from ldm.tasks import text_to_image
from runs import ROOT, accelerator

FOLDER = ROOT / "configs" / "papers"
NAMED = {
    "ddpm", "improved_ddpm", "ncsn", "score_sde_vp", "score_sde_ve", "ddim", "guided_diffusion",
    "cfg", "ldm", "flow_matching", "edm", "progressive_distillation", "consistency_models",
    "latent_consistency", "sdxl", "sd3", "imagen_base", "imagen_sr",
    "unclip_prior", "unclip_prior_regression", "unclip_decoder",
}  # fmt: skip
FILES = sorted(FOLDER.glob("*.yaml"))
TAUGHT = [file for file in FILES if "\ndistil:" in file.read_text()]
# What the header of each makes its teacher by.
TEACHERS = {
    "consistency_models": ["edm"],
    "progressive_distillation": ["ddpm", "process={kind: cosine}", "objective.target=v"],
}
READS = {"imagen_sr": "imagen_base"}  # whose text encoder
# Which parts each takes from the CLIP of configs/clip_shapes.yaml.
SEES = {
    "unclip_prior": ("text", "image_encoder"),
    "unclip_prior_regression": ("text", "image_encoder"),
    "unclip_decoder": ("image_encoder",),
}
QUICK = [
    "duration=2 steps", "batch_size=2", "cache_latents=false", "validation=null", "score=null",
    "optimizer.warmup=0 steps", "images.size=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A picture of each, captioned like those of scikit-learn."""
    folder = tmp_path_factory.mktemp("digits")
    for n, name in enumerate(NAMES):
        Image.new("L", (8, 8), 25 * n).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a handwritten {name}")
    return folder


def test_there_is_one_for_each():
    assert {file.stem for file in FILES} == NAMED


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_header_states_paper_equations_figure_and_command(file):
    header = file.read_text().partition("\nrun:")[0]
    assert re.search(r"\(arXiv\s+(# )?\d{4}\.\d{5}\)", header)
    assert re.search(r"(eq|sec)\. \d", header) and "Published at full size" in header
    assert f"accelerate launch training/train.py --config configs/papers/{file.stem}.yaml" in header
    assert re.search(f"--(model|then|prior) runs/papers/{file.stem}/final", header)
    assert load(TrainConfig, file, []).run == f"runs/papers/{file.stem}"


# That of DDIM is that of DDPM, which another test asks.
@pytest.mark.parametrize(
    "file", [f for f in FILES if f not in TAUGHT and f.stem != "ddim"], ids=lambda file: file.stem
)
def test_it_trains_two_steps(file, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where assets are
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    taken = []
    if file.stem in READS:
        other = FOLDER / f"{READS[file.stem]}.yaml"
        asked = [
            f"run={tmp_path / 'before'}",
            f"data={{path: {digits}}}",
            "unet.block_out_channels=[32, 32, 32]",
        ]
        before = load(TrainConfig, other, [*QUICK, *asked, "unet.attention_head_dim=4"])
        taken = [f"text={text_to_image.train(before, accelerator())}"]
        assert load(TrainConfig, file, []).text == f"runs/papers/{other.stem}/final"
    for part in SEES.get(file.stem, ()):
        assert getattr(load(TrainConfig, file, []), part) == "runs/clip_shapes/final"
        taken.append(f"{part}=assets/ldm-small")
    config = load(TrainConfig, file, taken)
    whole = build(config, [], meta=True)  # as a dry run does
    told = re.search(r"(?:U-Net|MM-DiT|prior) of ([\d.]+) M parameters", file.read_text())
    assert told and float(told[1]) == round(parameters(whole.network) / 1e6, 1)
    # The same processes and targets; a narrow network, and pictures that are there.
    width, narrow = 32 if config.family == "imagen" else 16, []  # 32 groups in its attention
    if config.unet is not None:
        widths = [width] * len(config.unet.block_out_channels)
        narrow = [f"unet.block_out_channels={widths}", "unet.attention_head_dim=4"]
    elif config.transformer is not None:
        narrow = ["transformer.layers=1", "transformer.head_dim=8"]
    overrides = [*QUICK, f"run={tmp_path / 'run'}", f"data={{path: {digits}}}", *narrow, *taken]
    small = load(TrainConfig, file, overrides)
    assert process_and_objective(small)[0] == whole.process
    final = text_to_image.train(small, accelerator())
    network = final / whole.family.network
    assert (network / "diffusion_pytorch_model.safetensors").is_file()
    assert (final / "vae").exists() == (file.stem in ("ldm", "sdxl", "sd3", "unclip_decoder"))
    if file.stem == "sd3":  # a text encoder is that of the folder, with its projection
        known = load_file(ROOT / "assets/ldm-small/image_encoder/text_projection.safetensors")
        tower = load_file(final / "text_encoder" / "model.safetensors")
        assert torch.equal(tower["text_projection.weight"], known["text_projection.weight"])


@pytest.mark.parametrize("file", TAUGHT, ids=lambda file: file.stem)
def test_it_learns_of_its_teacher(file, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    asked = [*QUICK, f"data={{path: {digits}}}"]
    if file.stem in TEACHERS:
        paper, *other = TEACHERS[file.stem]
        assert all(part in file.read_text() for part in (f"papers/{paper}.yaml", *other))
        narrow = ["unet.block_out_channels=[16, 16]", "unet.attention_head_dim=4"]
        teacher = load(
            TrainConfig,
            FOLDER / f"{paper}.yaml",
            [*asked, *other, *narrow, f"run={tmp_path / 'teacher'}"],
        )
        asked.append(f"model={text_to_image.train(teacher, accelerator())}")
    config = load(TrainConfig, file, [*asked, f"run={tmp_path / 'run'}"])
    final = text_to_image.train(config, accelerator())
    index = json.loads((final / "model_index.json").read_text())["_sampling"]
    steps = {"progressive_distillation": 8}.get(file.stem, 4)
    assert index["num_inference_steps"] == steps
    assert index["sampler"] == ("ddim" if steps == 8 else "lcm")


def test_ddim_is_ddpm_drawn_otherwise():
    ddpm, ddim = (yaml.safe_load((FOLDER / f"{n}.yaml").read_text()) for n in ("ddpm", "ddim"))
    differing = {key for key in ddpm if ddpm[key] != ddim[key]}
    assert ddpm.keys() == ddim.keys() and differing == {"run", "validation"}
    assert ddim["validation"]["sampler"] == "ddim"
