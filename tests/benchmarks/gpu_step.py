"""What a card does at best, and what a step of the U-Net takes with one change after another: parts
of ``gpu.py``.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import conv2d

from ldm.config.optimizer import Optimizer
from ldm.engine.optimizer import optimizer_of
from ldm.models import compiled

FORWARD_TFLOP = 0.803  # of an image of 512 pixels in the U-Net; with gradients three times that
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "channels last": {"last": True},
    "adafactor": {"kind": "adafactor"},
    "blocks compiled": {"blocks": True},
    "channels last, blocks compiled": {"last": True, "blocks": True},
}


def ceilings() -> dict[str, Any]:
    """What the card does at best: products, convolutions, copies."""
    if not torch.cuda.is_available():
        return {"device": "cpu", "torch": torch.__version__}
    half = {"device": "cuda", "dtype": torch.bfloat16}
    a, b = (torch.randn(8192, 8192, **half) for _ in range(2))
    long = torch.randn(2**28, device="cuda")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "product_TFLOPs": 2 * 8192**3 / _spent(lambda: a @ b) / 1e12,
        "copy_TB_s": 2 * long.nbytes / _spent(long.clone) / 1e12,
    }
    for name, form in (("first", torch.contiguous_format), ("last", torch.channels_last)):
        x = torch.randn(32, 320, 64, 64, **half).contiguous(memory_format=form)
        w = torch.randn(320, 320, 3, 3, **half).contiguous(memory_format=form)
        spent = _spent(lambda x=x, w=w: conv2d(x, w, padding=1))
        found[f"channels_{name}_TFLOPs"] = 2 * x.numel() * 320 * 9 / spent / 1e12
    return found


def _spent(call: Callable[[], Any], rounds: int = 10) -> float:
    """Seconds of a call, on the device."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / rounds


def variant(folder: Path, batch: int, cells: int, steps: int, how: dict[str, Any]) -> dict:
    """Milliseconds of a step of the U-Net of ``folder``, of which the host's.

    Args:
        folder: of its config.
        batch: pictures.
        cells: side of the latents.
        steps: of which the first three are left out.
        how: one of ``CHANGES``.
    """
    cuda = torch.cuda.is_available()
    device, wait = ("cuda", torch.cuda.synchronize) if cuda else ("cpu", lambda: None)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    shape = UNet2DConditionModel.load_config(folder)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(shape).train()
        x, y = (torch.randn(batch, 4, cells, cells) for _ in range(2))
        t, c = torch.rand(batch), torch.randn(batch, 77, shape["cross_attention_dim"])
    kind = how.get("kind", "adamw")
    if how.get("last"):
        compiled.channels_last(unet, kind)
    if how.get("blocks"):
        compiled.compile_blocks(unet)
    weights = dict(unet.named_parameters())
    optimizer = optimizer_of(weights, Optimizer(kind=kind, lr=1e-5))
    begin, marks, ready = time.perf_counter(), [], 0.0
    for number in range(steps):
        wait()
        first = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            out = unet(x, 1000 * t, c, return_dict=False)[0]
        (out.float() - y).square().mean().backward()
        host = time.perf_counter() - first
        wait()
        second = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait()
        third = time.perf_counter()
        if number == 0:
            ready = third - begin
        elif number > 2:
            marks.append((second - first, host, third - second))
    gradient, host, update = (median(column) for column in zip(*marks, strict=True))
    found = {"ready_s": ready, "gradient_ms": 1e3 * gradient, "host_ms": 1e3 * host}
    found |= {"update_ms": 1e3 * update, "images_s": batch / (gradient + update)}
    if cuda:
        found["TFLOPs"] = 3 * FORWARD_TFLOP * batch / gradient
        found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found
