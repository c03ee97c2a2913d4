"""The loss on pictures that were not trained on, by noise level, and their likelihood.

    L_k = E |y(x0, eps) - network(alpha x0 + sigma eps)|^2    at t_k, the middle of cell k of [0, 1]

in the network's own target space and without a weight, so that two models of one target compare
whatever they were trained with. The same picture meets the same noise at every call.

    bits/dim = -log2 p(x0 + w),   w uniform over one of 256 bins

in pixel space, by ``ldm.diffusion.likelihood``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import (
    Condition,
    Denoiser,
    Level,
    NoiseProcess,
    Objective,
    Prediction,
    Predictor,
    normal,
    stream,
)
from ldm.diffusion.likelihood import bits_per_dim, log_likelihood
from ldm.diffusion.times import Uniform
from ldm.evaluation.distances import Figure, mean
from ldm.progress import Progress


def errors_by_level(
    objective: Objective,
    process: NoiseProcess,
    denoiser: Denoiser,
    z: Tensor,
    cond: Condition,
    *,
    levels: int,
    seed: int,
    name: str,
    numbers: Sequence[int],
) -> Iterator[Tensor]:
    """At the middle of each of ``levels`` cells of t, the mean squared error of every sample, ``b``
    float64.

    Args:
        objective: whose target the network speaks.
        process: the noise.
        denoiser: the network.
        z: what it models, ``b ...``.
        cond: of each.
        levels: cells.
        seed: of the noise.
        name: of its streams, before the number of the cell.
        numbers: of the samples in these, ``b``.
    """
    objective, shape = replace(objective, times=Uniform()), tuple(z.shape[1:])
    for k in range(levels):
        u = torch.full((len(z),), (k + 0.5) / levels, dtype=torch.float64, device=z.device)
        eps = torch.stack([normal(seed, f"{name} {k}", n, shape) for n in numbers]).to(z.device)
        yield objective(process, denoiser, z, cond, u=u, eps=eps).mse.double()


@torch.no_grad()
def held_out_loss(
    objective: Objective,
    process: NoiseProcess,
    denoiser: Denoiser,
    z: Tensor,
    cond: Condition,
    *,
    levels: int = 10,
    seed: int = 0,
    batch: int = 64,
) -> dict[str, Figure]:
    """``loss``, the mean over all levels, and ``loss at t``, each with its interval over pictures.

    Args:
        objective: whose target the network speaks.
        process: the noise.
        denoiser: the network, without guidance.
        z: what the network models, ``n ...``.
        cond: of each, length n.
        levels: cells of t.
        seed: of the noise.
        batch: pictures at a time, which changes no figure beyond rounding.
    """
    found = []
    with Progress("measuring held-out loss", "pictures", len(z)) as progress:
        for start in range(0, len(z), batch):
            part = slice(start, start + batch)
            errors = errors_by_level(
                objective,
                process,
                denoiser,
                z[part],
                cond.map(lambda x, part=part: x[part]),
                levels=levels,
                seed=seed,
                name="held-out",
                numbers=range(len(z))[part],
            )
            columns = []
            for error in errors:
                columns.append(error)
                progress.advance(len(error) / levels)
            found.append(torch.stack(columns, 1).cpu())
    losses = torch.cat(found)
    columns = {f"loss at {(k + 0.5) / levels:.2f}": mean(losses[:, k]) for k in range(levels)}
    return {"loss": mean(losses.mean(1)), **columns}


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
    with Progress("measuring likelihood", "pictures", len(pixels)) as progress:

        def told(x: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            progress.advance(len(x) / (4 * steps))
            return predict(x, level, timestep, cond)

        for start in range(0, len(pixels), batch):
            x = pixels[start : start + batch]
            numbers = range(start, start + len(x))
            # The values of 256 bins are 2 / 255 apart.
            bins = [stream(seed, "dequantise", n).random(shape) - 0.5 for n in numbers]
            w = torch.from_numpy(np.stack(bins)).to(x) * (2 / 255)
            probe = torch.stack([normal(seed, "probe", n, shape) for n in numbers]).sign().to(x)
            here = cond.map(lambda part, at=start: part[at : at + batch])
            nats = log_likelihood(process, told, x + w, here, steps=steps, probes=probe[None])
            found.append(bits_per_dim(nats, x[0].numel()))
    return mean(torch.cat(found))
