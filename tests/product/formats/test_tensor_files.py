"""A file of tensors that is written twice is the same file."""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from ldm.formats import lora, textual_inversion
from ldm.models.lora import Update
from ldm.pipeline import LatentDiffusionPipeline
from ldm.storage.tensors import write_tensors
from runs import ROOT

TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor([1, 2], dtype=torch.int64)}
TOLD = {f"key {n}": f'вещь "{n}"\n\x1f\\é' for n in range(12)}


def test_the_order_of_tensors_and_of_metadata_is_one(tmp_path):
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    write_tensors(TENSORS, files[0], TOLD)
    backwards = [dict(reversed(list(found.items()))) for found in (TENSORS, TOLD)]
    write_tensors(backwards[0], files[1], backwards[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    (tmp_path / "plain").touch()  # others may read it as far as they may read new files
    assert files[0].stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(files[0], framework="pt") as opened:
        assert opened.metadata() == TOLD
    found = load_file(files[0])
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    # Nothing but the order is our own.
    save_file({n: v.contiguous() for n, v in TENSORS.items()}, files[2], TOLD)
    assert sorted(files[2].read_bytes()) == sorted(files[0].read_bytes())
    raw = files[0].read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header["__metadata__"]) == sorted(TOLD)


def test_files_of_loras_and_words(tmp_path):
    generator = torch.Generator().manual_seed(0)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    updates = {"unet": {name: Update(down, up, 3.0)}}
    base = {"unet": "1", "vae": "2"}
    files = []
    for n in "ab":
        files.append(lora.write(updates, tmp_path / f"{n}.safetensors", base=base))
        files.append(textual_inversion.write("<cat>", torch.ones(2, 32), tmp_path / n, base))
    assert files[0].read_bytes() == files[2].read_bytes()
    assert files[1].read_bytes() == files[3].read_bytes()
    assert lora.read(files[0])["unet"][name].alpha == 3.0
    with safe_open(files[0], framework="pt") as opened:
        assert list(opened.metadata()) and opened.metadata()["base"] == json.dumps(base)


def test_what_diffusers_saves_of_a_lora(tmp_path):
    layers = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 2)}
    files = [tmp_path / n / lora.FILE for n in "ab"]
    for file in files:
        LatentDiffusionPipeline.save_lora_weights(
            file.parent,
            unet_lora_layers=layers,
            unet_lora_adapter_metadata={"r": 2, "lora_alpha": 3.0, "target_modules": {"a"}},
        )
    assert files[0].read_bytes() == files[1].read_bytes()
    assert lora.read(files[0])["unet"]["a"].alpha == 3.0
    raw = files[0].read_bytes()
    told = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert list(told) == ["format", "lora_adapter_metadata"]


def test_pipelines(tmp_path):
    for n in "ab":
        tiny.folder(tmp_path / n)
    files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 12
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )


def test_nothing_else_writes_tensors():
    writes = re.compile(
        r"^from safetensors.* import .*\bsave_file\b|\btorch\.save\(|serialize_file", re.M
    )
    files = [*(ROOT / "ldm").rglob("*.py"), *(ROOT / "training").rglob("*.py")]
    found = [str(f.relative_to(ROOT)) for f in files if writes.search(f.read_text())]
    assert found == [str(Path("ldm") / "storage" / "tensors.py")]
