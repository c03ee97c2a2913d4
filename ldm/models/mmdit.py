"""Random init of multimodal diffusion transformers, which diffusers leaves to PyTorch's defaults.

As in DiT (Peebles & Xie 2023, section 3.2 and its code), which Esser et al. 2024 build on: linear
layers Xavier uniform without bias, the embeddings of time and pooled text N(0, 0.02^2), and what
scales, shifts and gates (adaLN-Zero) and the output zero: every block begins as the identity, and
the network as 0.
"""

from __future__ import annotations

from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import nn

_MODULATION = (
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
    AdaLayerNormContinuous,
)


def initialise(network: nn.Module, *, told: nn.Module, output: nn.Linear) -> None:
    """Gives ``network`` new weights by the global generator.

    Args:
        network: a transformer of diffusers.
        told: its part that embeds time and pooled text.
        output: its last layer.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # A convolution of patches is a linear layer of their pixels.
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in told.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    nothing = [module.linear for module in network.modules() if isinstance(module, _MODULATION)]
    for layer in (*nothing, output):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
