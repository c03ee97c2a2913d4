"""The loss on pictures that were not trained on, by noise level, and their likelihood.

    L_k = E |y(x0, eps) - network(alpha x0 + sigma eps)|^2    at t_k, the middle of cell k of [0, 1]

in the network's own target space and without a weight, so that two models of one target compare
whatever they were trained with. The same picture meets the same noise at every call.

    bits/dim = -log2 p(x0 + w),   w uniform over one of 256 bins

in pixel space, by ``ldm.diffusion.likelihood``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import Condition, NoiseProcess, Predictor, coefficients, normal, stream
from ldm.diffusion.likelihood import bits_per_dim, log_likelihood
from ldm.evaluation.distances import Figure, mean


@torch.no_grad()
def held_out_loss(
    predict: Predictor,
    process: NoiseProcess,
    z: Tensor,
    cond: Condition,
    *,
    levels: int = 10,
    seed: int = 0,
    batch: int = 64,
) -> dict[str, Figure]:
    """``loss``, the mean over all levels, and ``loss at t``, each with its interval over pictures.

    Args:
        predict: the network, without guidance.
        process: the noise.
        z: what the network models, ``n ...``.
        cond: of each, length n.
        levels: cells of t.
        seed: of the noise.
        batch: pictures at a time, which changes no figure beyond rounding.
    """
    middles = (torch.arange(levels).double() + 0.5) / levels
    times = process.time(middles)
    losses = torch.zeros(len(z), levels, dtype=torch.float64)
    for k, t in enumerate(times):
        level = process.level(t.expand(len(z)))
        timestep = process.timestep(t.expand(len(z))).to(z.device)
        draws = [normal(seed, f"held-out {k}", n, tuple(z.shape[1:])) for n in range(len(z))]
        eps = torch.stack(draws).to(z)
        x_t = process.perturb(z, eps, t.expand(len(z)))
        for start in range(0, len(z), batch):
            part = slice(start, start + batch)
            here = level.map(lambda x, part=part: x[part])
            found = predict(x_t[part], here, timestep[part], cond.map(lambda x, part=part: x[part]))
            a, b = coefficients(found.target, here.like(z))
            wrong = (found.y - (a * z[part] + b * eps[part])).double().square()
            losses[part, k] = wrong.flatten(1).mean(1).cpu()
    figures = {"loss": mean(losses.mean(1))}
    named = enumerate(middles.tolist())
    return figures | {f"loss at {middle:.2f}": mean(losses[:, k]) for k, middle in named}


def held_out_bits(
    predict: Predictor,
    process: NoiseProcess,
    pixels: Tensor,
    cond: Condition,
    *,
    steps: int = 50,
    seed: int = 0,
    batch: int = 64,
) -> Figure:
    """Bits per dimension of ``pixels`` and the interval over pictures: one draw of w and one probe
    of the trace for each.

    Args:
        predict: the network, differentiable, without guidance.
        process: the noise.
        pixels: what was not trained on, ``n 3 h w``, 8-bit values in [-1, 1].
        cond: of each, length n.
        steps: of the likelihood's ODE, four evaluations each.
        seed: of w and the probes.
        batch: pictures at a time.
    """
    shape, found = tuple(pixels.shape[1:]), []
    for start in range(0, len(pixels), batch):
        x = pixels[start : start + batch]
        numbers = range(start, start + len(x))
        # The values of 256 bins are 2 / 255 apart.
        bins = [stream(seed, "dequantise", n).random(shape) - 0.5 for n in numbers]
        w = torch.from_numpy(np.stack(bins)).to(x) * (2 / 255)
        probe = torch.stack([normal(seed, "probe", n, shape) for n in numbers]).sign().to(x)
        here = cond.map(lambda part, at=start: part[at : at + batch])
        nats = log_likelihood(process, predict, x + w, here, steps=steps, probes=probe[None])
        found.append(bits_per_dim(nats, x[0].numel()))
    return mean(torch.cat(found))
