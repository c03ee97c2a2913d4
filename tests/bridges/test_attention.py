"""How attention is computed is a question of speed, never of numbers."""

import importlib.metadata

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

import tiny
from ldm.config.schema import UNetShape
from ldm.errors import BackendError
from ldm.families.parts import make_unet
from ldm.models.attention import check_backend, set_attention

CPU = torch.device("cpu")


def processors(unet) -> set[type]:
    kinds = {type(p) for p in unet.attn_processors.values()}
    assert len(unet.attn_processors) >= 4  # self- and cross-attention, down and up
    return kinds


def inputs(unet) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    x = torch.randn(3, 4, side, side, generator=draw)
    return x, torch.tensor([3, 500, 990]), torch.randn(3, 24, width, generator=draw)


def outputs(unet, **arguments) -> tuple[Tensor, list[Tensor]]:
    """What a U-Net says, and the gradients of the mean of its squares."""
    x, t, tokens = inputs(unet)
    unet.zero_grad()
    y = unet(x, t, encoder_hidden_states=tokens, **arguments).sample
    y.square().mean().backward()
    return y.detach(), [p.grad.clone() for p in unet.parameters()]


@pytest.fixture
def unet():
    return tiny.components()["unet"]


def test_bfloat16_on_a_cpu_is_not_fused(unet):
    set_attention(unet, "auto", CPU, bfloat16=True)
    assert processors(unet) == {AttnProcessor}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(("named", "kind"), [("plain", AttnProcessor), ("sdpa", AttnProcessor2_0)])
def test_what_is_named_is_used(unet, named, kind, bfloat16):
    set_attention(unet, named, CPU, bfloat16=bfloat16)
    assert processors(unet) == {kind}


def test_float32_is_sdpa(unet):
    set_attention(unet, "auto", CPU, bfloat16=True)
    set_attention(unet, "auto", CPU, bfloat16=False)
    assert processors(unet) == {AttnProcessor2_0}


def test_bfloat16_on_a_gpu_is_sdpa(unet):
    # Only the device's type is looked at: no GPU is needed.
    set_attention(unet, "auto", torch.device("cuda"), bfloat16=True)
    assert processors(unet) == {AttnProcessor2_0}


@pytest.mark.parametrize("masked", [False, True])
def test_both_agree_in_float32(unet, masked):
    arguments = {}
    if masked:
        mask = torch.arange(24)[None] < torch.tensor([24, 3, 10])[:, None]
        arguments["encoder_attention_mask"] = mask
    found = {}
    for bfloat16 in (False, True):
        set_attention(unet, "auto", CPU, bfloat16=bfloat16)
        found[bfloat16] = outputs(unet, **arguments)
    (fused, fused_gradients), (plain, plain_gradients) = found[False], found[True]
    assert (fused - plain).abs().max() < 1e-5 * fused.abs().max()
    largest = max(g.abs().max() for g in fused_gradients)
    for a, b in zip(fused_gradients, plain_gradients, strict=True):
        assert (a - b).abs().max() < 1e-5 * largest
    if masked:
        unmasked, _ = outputs(unet)
        assert (unmasked - plain).abs().max() > 1e-3 * plain.abs().max()


def test_plain_attention_under_autocast_is_near_float32(unet):
    set_attention(unet, "auto", CPU, bfloat16=False)
    exact, _ = outputs(unet)
    set_attention(unet, "auto", CPU, bfloat16=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = outputs(unet)
    # bfloat16 keeps 8 bits; the network is a dozen layers deep.
    assert 1e-5 < (rounded.float() - exact).abs().max() / exact.abs().max() < 0.05


def test_the_choice_changes_no_weight_name():
    unet = make_unet(
        UNetShape(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8), 4, 32, 8
    )
    names = list(unet.state_dict())
    for bfloat16 in (True, False):
        set_attention(unet, "auto", CPU, bfloat16=bfloat16)
        assert list(unet.state_dict()) == names


def test_xformers_is_refused_on_a_cpu(unet):
    before = processors(unet)
    with pytest.raises(BackendError) as caught:
        set_attention(unet, "xformers", CPU, bfloat16=False)
    assert str(caught.value) == (
        "attention xformers needs a CUDA device, this is cpu: leave attention out"
    )
    assert processors(unet) == before


def test_xformers_that_is_not_installed_says_what_to_install(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BackendError, match=r"pip install 'ldm\[xformers\]', or use sdpa$"):
        check_backend("xformers", torch.device("cuda"))
    check_backend("sdpa", torch.device("cuda"))
