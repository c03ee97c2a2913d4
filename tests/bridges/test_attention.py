"""How attention is computed is a question of speed, never of numbers."""

import importlib.metadata
import logging

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

import tiny
from ldm.config.schema import UNetShape
from ldm.errors import BackendError
from ldm.families.unet import make_unet
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


# -- other networks --


def deepfloyd() -> tuple[UNet2DConditionModel, dict[str, Tensor]]:
    """A U-Net as DeepFloyd IF's, and what it is called with."""
    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        only_cross_attention=False,
        cross_attention_norm="group_norm",
    )
    draw = torch.Generator().manual_seed(1)
    return net, {
        "sample": torch.randn(2, 3, 8, 8, generator=draw),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=draw),
    }


def sd3() -> tuple[SD3Transformer2DModel, dict[str, Tensor]]:
    """A transformer as SD3's, and what it is called with."""
    net = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    draw = torch.Generator().manual_seed(1)
    return net, {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([3.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=draw),
        "pooled_projections": torch.randn(2, 12, generator=draw),
    }


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("asked", ["auto", "sdpa", "plain"])
@pytest.mark.parametrize("make", [deepfloyd, sd3])
def test_other_attention_is_left_as_it_is(make, asked, bfloat16, caplog):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, told = make()
    with torch.no_grad():
        for parameter in net.parameters():  # SD3's begins with layers that are 0
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
        before = net.eval()(**told).sample
        kinds = {name: type(kind) for name, kind in net.attn_processors.items()}
        assert kinds and not {AttnProcessor, AttnProcessor2_0} & set(kinds.values())
        with caplog.at_level(logging.WARNING):
            set_attention(net, asked, CPU, bfloat16=bfloat16)
        after = net(**told).sample
    assert {name: type(kind) for name, kind in net.attn_processors.items()} == kinds
    assert before.std() > 0.01 and (before - after).abs().max() <= 1e-6
    line = f"attention {asked} changes nothing: {type(net).__name__} has no plain attention, only "
    # A run's config names what auto has given it: nothing is said of that.
    named = asked not in ("auto", "plain" if bfloat16 else "sdpa")
    assert [record.getMessage().startswith(line) for record in caplog.records] == [True] * named
    if named:
        assert caplog.records[0].getMessage().endswith(next(iter(kinds.values())).__name__)


def test_attention_without_a_scale_stays_without():
    # Fused kinds always divide by sqrt(d).
    net = tiny.unet()
    module = next(m for m in net.modules() if isinstance(m, Attention))
    module.scale_qk, module.scale = False, 1.0
    module.set_processor(AttnProcessor())
    set_attention(net, "sdpa", CPU, bfloat16=False)
    others = [m for m in net.modules() if isinstance(m, Attention) and m is not module]
    assert type(module.processor) is AttnProcessor
    assert others and {type(m.processor) for m in others} == {AttnProcessor2_0}


def test_a_network_without_attention_is_told(caplog):
    net = UNet2DModel(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                      down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                      add_attention=False)  # fmt: skip
    with caplog.at_level(logging.WARNING):
        set_attention(net, "auto", CPU, bfloat16=True)
        assert not caplog.records
        set_attention(net, "plain", CPU, bfloat16=False)
    assert [record.getMessage() for record in caplog.records] == [
        "attention plain changes nothing: UNet2DModel has no attention"
    ]


def test_what_is_plain_is_changed_and_says_nothing(unet, caplog):
    with caplog.at_level(logging.WARNING):
        set_attention(unet, "plain", CPU, bfloat16=False)
    assert processors(unet) == {AttnProcessor} and not caplog.records
