"""How attention is computed: ``sdpa`` (PyTorch), ``plain`` or ``xformers`` (CUDA only).

On a CPU the backward pass of PyTorch's fused attention is several times slower in bfloat16 than in
float32, which alone makes a small U-Net slower under autocast than without. Plain matrix products
and a softmax are not, so that is what ``auto`` gives bfloat16 on a CPU; elsewhere it is ``sdpa``.
"""

from __future__ import annotations

import importlib.metadata
from typing import Literal

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from ldm.errors import BackendError

Backend = Literal["sdpa", "plain", "xformers"]


def chosen(asked: Literal["auto"] | Backend, device: torch.device, *, bfloat16: bool) -> Backend:
    """The backend that ``auto`` stands for on ``device``; any other is itself."""
    if asked != "auto":
        return asked
    return "plain" if bfloat16 and device.type == "cpu" else "sdpa"


def check_backend(backend: Backend, device: torch.device) -> None:
    """``BackendError`` where ``backend`` cannot run on ``device``; called before any step."""
    if backend != "xformers":
        return
    if device.type != "cuda":
        raise BackendError(
            f"attention xformers needs a CUDA device, this is {device.type}: leave attention out"
        )
    try:
        version = importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(
            "attention xformers: the package is missing: pip install 'ldm[xformers]', or use sdpa"
        ) from None
    try:
        import xformers.ops as ops

        probe = torch.zeros(1, 8, 1, 32, device=device, dtype=torch.float16)
        ops.memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise BackendError(
            f"attention xformers: version {version} does not run with torch {torch.__version__} on"
            f" this device ({str(error).splitlines()[0]}): use sdpa"
        ) from None


def set_attention(
    unet: UNet2DConditionModel | UNet2DModel,
    backend: Literal["auto"] | Backend,
    device: torch.device,
    *,
    bfloat16: bool,
) -> None:
    """Makes ``unet`` compute attention with ``backend`` on ``device``.

    Args:
        unet: changed in place; the numbers are the same up to rounding.
        backend: which, see ``chosen``.
        device: where it will run.
        bfloat16: whether it will train under bfloat16 autocast.

    Raises:
        BackendError: the backend cannot run there.
    """
    backend = chosen(backend, device, bfloat16=bfloat16)
    check_backend(backend, device)
    if backend == "xformers":
        unet.enable_xformers_memory_efficient_attention()
        return
    for module in unet.modules():  # a UNet2DModel has no call for all
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor() if backend == "plain" else AttnProcessor2_0())
