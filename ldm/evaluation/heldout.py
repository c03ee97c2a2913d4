"""The loss on pictures that were not trained on, by noise level.

    L_k = E |y(x0, eps) - network(alpha x0 + sigma eps)|^2    at t_k, the middle of cell k of [0, 1]

in the network's own target space and without a weight, so that two models of one target compare
whatever they were trained with. The same picture meets the same noise at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion import Condition, NoiseProcess, Predictor, coefficients, normal
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
