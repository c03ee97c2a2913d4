"""LoRA files that are broken in their details are one line, not a traceback."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.interop import lora

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
