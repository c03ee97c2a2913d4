"""LoHa and LoKr in files of LyCORIS: the weights of the formulas, drawn with; others by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from ldm.formats import lora
from ldm.models.lora import Update
from ldm.models.lycoris import Factors
from ldm.pipeline import LatentDiffusionPipeline

GENERATOR = torch.Generator().manual_seed(0)
ALPHA, RANK = 3.0, 2


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR) / 2


def loha(out: int, into: int, kernel: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Factors, and the difference that they stand for, number by number in float64."""
    if kernel is None:
        pairs = [(random(out, RANK), random(RANK, into)) for _ in range(2)]
        whole = [a.double() @ b.double() for a, b in pairs]
        cores = {}
    else:
        pairs = [(random(RANK, out), random(RANK, into)) for _ in range(2)]
        ts = [random(RANK, RANK, kernel, kernel) for _ in range(2)]
        whole = [
            sum(
                a[i].double()[:, None, None, None] * b[j].double()[:, None, None] * t[i, j].double()
                for i in range(RANK)
                for j in range(RANK)
            )
            for (a, b), t in zip(pairs, ts, strict=True)
        ]
        cores = {"hada_t1": ts[0], "hada_t2": ts[1]}
    named = {
        f"hada_w{n + 1}_{k}": v for n, p in enumerate(pairs) for k, v in zip("ab", p, strict=True)
    }
    return named | cores, ALPHA / RANK * whole[0] * whole[1]


def lokr(out: int, into: int, kernel: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """D is a product for a matrix, and has no r, so a scale of 1, for a convolution."""
    one = random(2, 4)
    if kernel is None:
        a, b = random(out // 2, RANK), random(RANK, into // 4)
        two, named, scale = a.double() @ b.double(), {"lokr_w2_a": a, "lokr_w2_b": b}, ALPHA / RANK
    else:
        w2 = random(out // 2, into // 4, kernel, kernel)
        two, named, scale = w2.double(), {"lokr_w2": w2}, 1.0
    blocks = [torch.cat([c.double() * two for c in row], 1) for row in one]
    return {"lokr_w1": one, **named}, scale * torch.cat(blocks)


def layers(pipe: Any) -> dict[str, Any]:
    return dict(pipe.text_encoder.named_modules()) | dict(pipe.unet.named_modules())


def file_for(pipe: Any, kind: Any, path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors, whole = {}, {}
    for name, module in layers(pipe).items():
        if name.endswith(("attn1.to_q", "resnets.0.conv1", "attn2.to_out.0", "layers.0.mlp.fc1")):
            out, into, *kernel = module.weight.shape
            factors, whole[name] = kind(out, into, kernel[0] if kernel else None)
            factors["alpha"] = torch.tensor(ALPHA)
            text = name.startswith("encoder")
            stem = ("lora_te_text_model_" if text else "lora_unet_") + name.replace(".", "_")
            tensors |= {f"{stem}.{key}": value for key, value in factors.items()}
    save_file(tensors, path)
    return path, whole


def draw(pipe: Any, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", num_inference_steps=2, seed=0, output_type="np", **more).images


@pytest.mark.parametrize("kind", [loha, lokr])
def test_the_weights_of_the_formula_are_drawn_with(tmp_path, kind):
    base = tiny.folder(tmp_path / "base")
    pipe, merged = (LatentDiffusionPipeline.from_pretrained(base) for _ in range(2))
    file, whole = file_for(pipe, kind, tmp_path / "it.safetensors")
    plain = draw(pipe)
    before = torch.get_rng_state()
    pipe.load_lora_weights(file, adapter_name="it")
    assert torch.equal(torch.get_rng_state(), before)
    modules = layers(pipe)
    assert len(whole) > 4 and "encoder.layers.0.mlp.fc1" in whole
    for name, expected in whole.items():
        found = modules[name].get_delta_weight("it")
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    for name, module in layers(merged).items():
        if name in whole:
            module.weight.data += 0.5 * whole[name].float()
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.set_adapters(["it"], [0.5])
    assert np.array_equal(draw(pipe), half)
    with pytest.raises(ValueError, match="a pipeline folder has no place for adapters"):
        pipe.save_pretrained(tmp_path / "saved")
    assert np.abs(half - draw(merged)).max() <= 1e-5 < np.abs(half - plain).max()
    # With a LoRA beside it, both count.
    name, weight = next((n, m.weight) for n, m in merged.unet.named_modules() if n in whole)
    down, up = random(1, *weight.shape[1:]), random(len(weight), 1, *[1] * (weight.ndim - 2))
    beside = {"unet": {name: Update(down, up, 1.0)}}
    pipe.load_lora_weights(lora.write(beside, tmp_path / "beside.safetensors"), "beside")
    pipe.set_adapters(["it", "beside"], [0.5, 1.0])
    merged.load_lora_weights(tmp_path / "beside.safetensors")
    assert np.abs(draw(pipe) - draw(merged)).max() <= 1e-5 < np.abs(draw(pipe) - half).max()
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), plain)
    pipe.load_lora_weights(file, adapter_name="it")
    pipe.set_adapters(["it"], [0.5])
    pipe.fuse_lora(adapter_names=["it"])
    assert np.abs(draw(pipe) - half).max() <= 1e-5
    with pytest.raises(
        ValueError, match=f"this is Lo{kind.__name__[2:].title()}, no LoRA: --lora and"
    ):
        lora.read(file)


@pytest.mark.parametrize(
    ("ending", "shape", "message"),
    [
        ("oft_blocks", (2, 2, 2), "this is OFT of LyCORIS, and of those LoHa and LoKr alone are"),
        ("on_input", (2,), "this is IA3 of LyCORIS"),
        ("a1.weight", (2, 2), "this is GLoRA of LyCORIS"),
        ("diff", (2, 2), "this is full difference of LyCORIS"),
        ("lokr_w1", (2, 2), "this is no LoKr: lokr_w1"),
    ],
)
def test_what_peft_has_no_layer_for_is_named(ending, shape, message):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    with pytest.raises(ValueError, match=message) as caught:
        lora.parse({f"{stem}.{ending}": torch.ones(shape)}, drawn=True)
    assert "\n" not in str(caught.value)


def test_factors_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="this is no LoHa: hada_w1_a"):
        Factors("LoHa", {f"hada_w{n}_{k}": random(n, 2) for n in (1, 2) for k in "ab"})
