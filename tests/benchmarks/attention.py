"""Times one training step of a small U-Net on the CPU: float32 and bfloat16, fused or not.

    python tests/benchmarks/attention.py [--batch 8] [--rounds 7] [--channels 64 128] [--side 16]

The three ways are interleaved, so that a machine that is busy is busy for all of them, and the
ratios are those of medians. ``ldm.models.attention`` picks plain attention for bfloat16 on a CPU
because the fused backward pass is slow there; this script says whether that still holds.
"""

import argparse
import statistics
import time

import torch
from diffusers import UNet2DConditionModel

from ldm.config.schema import UNetShape
from ldm.families.networks import initialised
from ldm.families.unet import make_unet
from ldm.models.attention import set_attention

# Name: autocast, plain attention.
WAYS = {"float32 sdpa": (False, False), "bf16 sdpa": (True, False), "bf16 plain": (True, True)}


def step(unet: UNet2DConditionModel, batch: int, side: int, bfloat16: bool) -> None:
    x = torch.randn(batch, 4, side, side)
    tokens = torch.randn(batch, 32, unet.config.cross_attention_dim)
    t = torch.randint(1000, (batch,))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        y = unet(x, t, encoder_hidden_states=tokens).sample
    (y.float() - x).square().mean().backward()
    unet.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--side", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = UNetShape(
        block_out_channels=tuple(arguments.channels),
        layers_per_block=1,
        attention=(True,) * len(arguments.channels),
        norm_num_groups=16,
    )
    with initialised(0, "unet"):
        unet = make_unet(shape, 4, 128, arguments.side)
    size = sum(p.numel() for p in unet.parameters())
    print(f"U-Net of {size:,} parameters, batch {arguments.batch}, {torch.get_num_threads()} cores")
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(arguments.rounds + 1):  # the first round warms up
        for name, (bfloat16, plain) in WAYS.items():
            set_attention(unet, "auto", torch.device("cpu"), bfloat16=plain)
            start = time.perf_counter()
            step(unet, arguments.batch, arguments.side, bfloat16)
            if number:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["float32 sdpa"])
    print(f"{'':>14} {'s a step':>9} {'spread':>15} {'images/s':>9} {'speed':>6}")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(
            f"{name:>14} {middle:9.3f} {min(taken):7.3f}-{max(taken):.3f} "
            f"{arguments.batch / middle:11.1f} {base / middle:6.2f}"
        )


if __name__ == "__main__":
    main()
