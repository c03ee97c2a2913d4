"""Float32 on NVIDIA GPUs from Ampere on: exact, or by TF32, which rounds what convolutions and
products multiply to 10 bits and sums in float32.

PyTorch's own default is TF32 for convolutions and not for products. On other devices nothing
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import backends


def allow(convolutions: bool, products: bool) -> None:
    """Lets them be computed by TF32."""
    backends.cudnn.allow_tf32 = convolutions
    backends.cuda.matmul.allow_tf32 = products


@contextmanager
def exact(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, frozen networks compute in float32 and nothing less, whatever the run computes in:
    what is cached is the same for all. No gradients are kept.

    Args:
        device: its type, on which autocast may be on.
        dtype: another in which they are to compute, by autocast.
    """
    before = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    allow(False, False)
    try:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        allow(*before)
