"""Networks beside a tiny U-Net that say something, as trained ones do; a pure function of
``seed``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from ldm.models.clip_size import ClipSize

EMBEDDING = 8
"""Width of what the picture tower beside an IP-Adapter says."""


def controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """For hints twice as large as latents along each side."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
        last = [net.controlnet_cond_embedding.conv_out, net.controlnet_mid_block]
        for zero in [*last, *net.controlnet_down_blocks]:
            nn.init.normal_(zero.weight, std=0.3)
    return net.eval()


def adapter(unet: UNet2DConditionModel, seed: int = 0) -> T2IAdapter:
    """For pictures twice as large as latents along each side.

    Beside a U-Net that does not attend at its first level, as SDXL's, it is of SDXL's form: such a
    level hears it only when it has halved its picture, and of the four features that it has the
    first two, of that size, are heard.
    """
    widths, kind, factor = list(unet.config.block_out_channels), "full_adapter", 2
    if unet.config.down_block_types[0] == "DownBlock2D":
        widths, kind, factor = [*widths, *widths[-1:] * 2][:4], "full_adapter_xl", 4
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T2IAdapter(3, widths, 1, factor, kind).eval()


def ip_adapter(unet: UNet2DConditionModel, folder: Path) -> str:
    """A file of an IP-Adapter and its picture tower, in ``folder`` / models."""
    tokens = 4  # as many as diffusers reads
    draw, width = torch.Generator().manual_seed(0), unet.config.cross_attention_dim

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    weights = {
        "image_proj.proj.weight": noise(tokens * width, EMBEDDING),
        "image_proj.proj.bias": noise(tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    every = dict(unet.named_modules())
    cross = [name for name in unet.attn_processors if ".attn2." in name]
    for number, name in enumerate(cross):
        inner = every[name.removesuffix(".processor")].to_q.out_features
        for key in ("to_k_ip", "to_v_ip"):
            weights[f"ip_adapter.{2 * number + 1}.{key}.weight"] = noise(inner, width)
    size = ClipSize(text_width=16, text_layers=1, text_heads=2, vision_width=16, vision_layers=1,
                    vision_heads=2, patch=4, size=tiny.SIZE, projection=EMBEDDING)  # fmt: skip
    (folder / "models").mkdir(parents=True)
    size.build(tiny.tokenizer(), seed=0).save_vision(folder / "models" / "image_encoder")
    save_file(weights, folder / "models" / "ip.safetensors")
    return str(folder)
