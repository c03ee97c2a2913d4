"""How attention is computed: ``sdpa`` (PyTorch), ``plain`` or ``xformers`` (CUDA only).

On a CPU the backward pass of PyTorch's fused attention is several times slower in bfloat16 than in
float32, which alone makes a small U-Net slower under autocast than without. Plain matrix products
and a softmax are not, so that is what ``auto`` gives bfloat16 on a CPU; elsewhere it is ``sdpa``.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
)
from torch import nn

from ldm.errors import BackendError

log = logging.getLogger(__name__)

Backend = Literal["sdpa", "plain", "xformers"]
_PROCESSORS: dict[Backend, type[Any]] = {
    "sdpa": AttnProcessor2_0,
    "plain": AttnProcessor,
    "xformers": XFormersAttnProcessor,
}


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
    network: nn.Module,
    backend: Literal["auto"] | Backend,
    device: torch.device,
    *,
    bfloat16: bool,
) -> None:
    """Makes ``network`` compute attention with ``backend`` on ``device``.

    Only softmax(q k^T / sqrt(d)) v of one stream is: where a network attends in another way
    (DeepFloyd IF to text and picture at once, SD3 with two streams), it is left as it is, which a
    log line says if no attention is plain and ``backend`` is another than ``auto`` would give.

    Args:
        network: changed in place; the numbers are the same up to rounding.
        backend: which, see ``chosen``.
        device: where it will run.
        bfloat16: whether it will train under bfloat16 autocast.

    Raises:
        BackendError: the backend cannot run there.
    """
    usual = chosen("auto", device, bfloat16=bfloat16)
    backend = chosen(backend, device, bfloat16=bfloat16)
    check_backend(backend, device)
    every = [module for module in network.modules() if hasattr(module, "processor")]
    # Not of a subclass, which computes something else; and only "plain" can leave the scale out.
    plain = [
        module
        for module in every
        if isinstance(module, Attention)
        and type(module.processor) in _PROCESSORS.values()
        and (module.scale_qk or backend == "plain")
    ]
    for module in plain:
        module.set_processor(_PROCESSORS[backend]())
    if backend != usual and not plain:
        kinds = ", ".join(sorted({type(module.processor).__name__ for module in every}))
        has = f"plain attention, only {kinds}" if kinds else "attention"
        log.warning(
            "attention %s changes nothing: %s has no %s", backend, type(network).__name__, has
        )
