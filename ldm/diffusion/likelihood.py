"""log p(x0) by the instantaneous change of variables along the probability-flow ODE

    log p(x_0) = log p(x_T) + int div v dphi,   dx / d phi = v

(Song et al. 2021, eq. 39; Chen et al. 2018, theorem 1). The divergence is a trace, which Skilling
and Hutchinson estimate without bias by e^T (dv / dx) e with E[e e^T] = 1 (eq. 40); signs
(Rademacher) have the least variance.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition, Predictor
from ldm.diffusion.flow import angle, flow
from ldm.diffusion.process import NoiseProcess


def log_likelihood(
    process: NoiseProcess,
    predict: Predictor,
    x0: Tensor,
    cond: Condition,
    *,
    steps: int = 100,
    probes: Tensor | None = None,
) -> Tensor:
    """Log density of data ``b ...`` under the model, nats, float64 ``b``.

    The density is that of x0 with the noise of the process's first node, sigma / alpha, added (the
    ODE of most targets has no value without any), and p(x_T) is what sampling starts from.

    Args:
        process: of the model.
        predict: differentiable in x; each sample a function of itself alone.
        x0: data; float64 for small problems.
        cond: condition of the batch.
        steps: steps of the classical Runge-Kutta method, each four evaluations (order 4), even in
            log atan(sigma / alpha).
        probes: signs, ``n b ...``: n estimates of the trace, averaged, the same all along the path
            (``normal(...).sign()``); None: the exact trace, by one backward pass per dimension.

    """
    slope = flow(process, predict, cond)

    def rates(phi: float, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = slope(phi, x)
            along = torch.eye(x[0].numel()).to(x).reshape(-1, 1, *x.shape[1:])
            each = [
                torch.autograd.grad(v, x, e.expand_as(v), retain_graph=True)[0] * e
                for e in (along if probes is None else probes.to(x))
            ]
        total = torch.stack([one.double().flatten(1).sum(1) for one in each])
        return v.detach(), total.sum(0) if probes is None else total.mean(0)

    # Even in log phi: sigma / alpha at the clean end is smaller than any even step of t, and data
    # as narrow as it would be stepped over.
    first, last = (angle(process.level(t)) for t in process.grid(2, 0.0, 1.0))
    angles = [first * (last / first) ** (k / steps) for k in range(steps + 1)]
    x, log_volume = x0 * math.cos(angles[0]), torch.zeros(len(x0)).to(x0).double()
    for phi, end in itertools.pairwise(angles):
        h = end - phi
        k1, d1 = rates(phi, x)
        k2, d2 = rates(phi + h / 2, x + h / 2 * k1)
        k3, d3 = rates(phi + h / 2, x + h / 2 * k2)
        k4, d4 = rates(end, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        log_volume = log_volume + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    d = x0[0].numel()
    log_prior = -(x.double().square().flatten(1).sum(1) + d * math.log(2 * math.pi)) / 2
    return log_prior + log_volume + d * math.log(math.cos(angles[0]))


def bits_per_dim(nats: Tensor, dims: int, bins: int = 256) -> Tensor:
    """-log2 of the probability of a bin, per dimension, from the log density of dequantised pixels.

    Pixels in [-1, 1] have ``bins`` values 2 / (bins - 1) apart (as ``Objective.bins``), so density
    becomes probability by the offset log2((bins - 1) / 2) = 6.99 for 256. For the bound to hold the
    data are x + w with w uniform over one such bin around 0 (Theis et al. 2016, eq. 10).
    """
    return -nats / (dims * math.log(2)) + math.log2((bins - 1) / 2)
