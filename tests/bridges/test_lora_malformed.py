"""LoRA files that are broken in their details are one line, not a traceback."""

import json
import shlex
import time
from pathlib import Path

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from ldm.formats import lora

MODULE = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA = {
    f"lora_unet_{MODULE}.lora_down.weight": torch.zeros(2, 8),
    f"lora_unet_{MODULE}.lora_up.weight": torch.zeros(8, 2),
    f"lora_unet_{MODULE}.alpha": torch.tensor(2.0),
}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("alpha", torch.ones(3)),
        ("lora_down.weight", torch.tensor(1.0)),
        ("dora_scale", torch.tensor(1.0)),
    ],
)
def test_shapes_that_no_update_has(tmp_path, kind, value):
    key = f"lora_unet_{MODULE}.{kind}"
    save_file({**KOHYA, key: value}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="has the shape") as error:
        lora.read(tmp_path / "bad.safetensors")
    assert key in str(error.value) and "\n" not in str(error.value)
    save_file(KOHYA, tmp_path / "good.safetensors")
    assert lora.read(tmp_path / "good.safetensors")["unet"]


def test_metadata_that_is_no_object(tmp_path):
    file = tmp_path / "bad.safetensors"
    save_file(KOHYA, file, metadata={"lora_adapter_metadata": json.dumps([1])})
    with pytest.raises(ValueError, match="lora_adapter_metadata is no JSON object"):
        lora.read(file)


NAMES = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block." + "a" * 40]
DIFFUSERS = {
    f"unet.{name}.lora_{half}.weight": torch.zeros(2, 2) for name in NAMES for half in "AB"
}


def with_metadata(file: Path, **config: object) -> Path:
    told = {f"unet.{key}": value for key, value in config.items()}
    save_file(DIFFUSERS, file, metadata={"lora_adapter_metadata": json.dumps(told)})
    return file


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|aa)*b",
        "(.*)*",
        "(?:a{1,9}){1,9}b",
        "a*a*a*b",
        "x" * 501,
        "(",
        "a{99999999999}",
        "(a|a)" * 40 + "b",
        "(a|a|a|a)(a|a|a|a)b",
        r"mid_block\.a*",
        r"a\1",
        "a\\",
        "",
    ],
)
def test_patterns_that_might_never_end(tmp_path, pattern):
    file = with_metadata(tmp_path / "x.safetensors", r=2, alpha_pattern={pattern: 3})
    start = time.process_time()
    with pytest.raises(ValueError, match=r"x.safetensors: lora_adapter_metadata: the pattern") as e:
        lora.read(file)
    assert time.process_time() - start < 2 and "\n" not in str(e.value)


@pytest.mark.parametrize("patterns", [[1], "x", {str(n): n for n in range(10_001)}])
def test_patterns_that_are_none(tmp_path, patterns):
    file = with_metadata(tmp_path / "x.safetensors", r=2, alpha_pattern=patterns)
    with pytest.raises(ValueError, match="alpha_pattern must be an object of 10,000 at most"):
        lora.read(file)


@pytest.mark.parametrize("alpha", ["much", None, [1], 1e99, {"a": 1}])
def test_alphas_that_are_none(tmp_path, alpha):
    for config in ({"lora_alpha": alpha}, {"alpha_pattern": {NAMES[0]: alpha}}):
        file = with_metadata(tmp_path / "x.safetensors", r=2, **config)
        with pytest.raises(ValueError, match=r"x.safetensors: .*alpha .* is no number"):
            lora.read(file)


@pytest.mark.parametrize(
    ("pattern", "alphas"),
    [
        (NAMES[0], (3, 5)),
        ("attn1.to_q", (3, 5)),
        ("^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", (3, 5)),
        (r"transformer_blocks\.0\.attn1\.to_q$", (3, 5)),
        ("^" + NAMES[1], (5, 3)),
        ("to_k", (5, 5)),
    ],
)
def test_patterns_of_peft(tmp_path, pattern, alphas):
    file = with_metadata(tmp_path / "x", r=2, lora_alpha=5, alpha_pattern={pattern: 3.0})
    file = file.rename(tmp_path / "x.safetensors")
    found = lora.read(file)["unet"]
    assert tuple(found[name].alpha for name in NAMES) == alphas
    theirs = [get_pattern_key([pattern], name) == pattern for name in NAMES]
    assert theirs == [alpha == 3 for alpha in alphas]


def test_a_suffix_in_any_case(tmp_path):
    save_file(KOHYA, tmp_path / "X.SafeTensors")
    assert lora.read(tmp_path / "X.SafeTensors")["unet"]


def test_pickled_files_come_with_the_line_that_converts_them(tmp_path):
    torch.save(KOHYA, tmp_path / "pytorch_lora_weights.bin")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(ValueError, match="is pickled and could run code when it is read") as e:
            lora.read(path)
    _, _, program = shlex.split(str(e.value).partition("this converts it without: ")[2])
    assert "weights_only=True" in program
    exec(program, {})
    assert lora.read(tmp_path)["unet"]
