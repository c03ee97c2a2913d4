"""Linear inverse problems y = A x0 + n with a model that was trained for none of them.

If p(x0 | x_t) is N(x0_hat, K), then given y its mean moves to

    x0 <- x0_hat + K A^T v,     (A K A^T + noise^2) v = y - A x0_hat.

tweedie      K = (sigma^2 / alpha) J, with J = d x0_hat / d x_t: the true covariance (Boys et al.
             2023), so that the guidance is exact wherever p(x0 | x_t) is Gaussian
pigdm        r^2 in place of K in the equation for v, Tweedie's K where v is applied (Song, Vahdat
             et al. 2023); exact for Gaussian data of covariance data_std^2
replacement  r^2 in both: the part of x0 that y tells is replaced by what it tells, without any
             gradient of the network (Wang et al. 2023; for inpainting Song et al. 2021)

with r^2 = data_std^2 sigma^2 / (alpha^2 data_std^2 + sigma^2). Where alpha is 0, K is 0 / 0 and r^2
stands for it. v comes from conjugate residuals, so that of A nothing is needed but that autograd
knows it, and what no x0 has as its A x0 (a filling of the hole in y) is left out. A decoder may be
part of A: then A is its linearisation at x0_hat, and the Gaussian lives in latents.

The network runs in float32 or bfloat16: its gradients underflow in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion import Condition, Level, Prediction, Predictor
from ldm.diffusion.level import broadcast
from ldm.guidance.chain import detached, differentiable, moved
from ldm.guidance.gradient import towards_x0

Operator: TypeAlias = Callable[[Tensor], Tensor]
"""x0 ``b ...`` -> A x0 ``b ...``, each sample alone."""


# Fused attention, which a decoder may have, has no second derivative. What turns it off holds for
# the process, so that one thread must not undo it under another's hands.
_MATH = Lock()


@dataclass(frozen=True)
class LinearInverse:
    """Guidance towards A x0 = y.

    Args:
        operator: A.
        y: what was measured, ``b ...``, or one for all, ``1 ...``.
        noise: standard deviation of n; 0 for none.
        method: see above.
        data_std: standard deviation of the data, 1 for latents (not used by tweedie).
        iterations: most of conjugate residuals; as many as A A^T has different eigenvalues
            suffice: 1 for masks, means and projections; behind a decoder some 16.

    """

    operator: Operator
    y: Tensor
    noise: float = 0.0
    method: Literal["pigdm", "tweedie", "replacement"] = "pigdm"
    data_std: float = 1.0
    iterations: int = 5

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """The guided predictor; ``null`` is not used. ``ValueError`` where y has another shape than
        what the operator gives.
        """

        def guided(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            alpha, sigma = (broadcast(part, x_t) for part in level[:2])
            r2 = (self.data_std * sigma) ** 2 / ((self.data_std * alpha) ** 2 + sigma**2)
            if self.method == "replacement":
                x, prediction = x_t, predict(x_t, level, timestep, cond)
            else:
                x, prediction = differentiable(predict, x_t, level, timestep, cond)
            with torch.enable_grad(), _MATH, sdpa_kernel(SDPBackend.MATH):
                hat = prediction.x0
                x0 = hat.detach().requires_grad_()
                seen = self.operator(x0)
                rounding = torch.finfo(seen.dtype).eps
                # Squares of pictures are summed, which in float16 would be infinite.
                seen = seen.to(torch.promote_types(seen.dtype, torch.float32))
                probe = torch.zeros_like(seen, requires_grad=True)
                # A^T probe, whose derivative by the probe is A.
                (back,) = grad(seen, x0, probe, create_graph=True)
            y = self.y.to(seen)
            if y.shape[1:] != seen.shape[1:] or len(y) not in (1, len(seen)):
                raise ValueError(
                    f"y has shape {tuple(y.shape)} and the operator gives {tuple(seen.shape)}:"
                    " they must be the same (or one y for the whole batch)"
                )

            def transposed(v: Tensor) -> Tensor:
                return grad(seen, x0, v, retain_graph=True)[0]

            def covariance(u: Tensor) -> Tensor:
                along = towards_x0(level, u) * grad(hat, x, u, retain_graph=True)[0]
                return torch.where(alpha > 0, along, r2 * u)

            def matrix(v: Tensor) -> Tensor:
                u = transposed(v)
                u = covariance(u) if self.method == "tweedie" else r2 * u
                return grad(back, probe, u, retain_graph=True)[0] + self.noise**2 * v

            v = transposed(_solve(matrix, y - seen.detach(), self.iterations, rounding))
            by = r2 * v if self.method == "replacement" else covariance(v)
            return moved(detached(prediction), by)

        return guided


def _solve(matrix: Operator, b: Tensor, iterations: int, rounding: float) -> Tensor:
    """V for which ``b - matrix(v)`` is shortest, every sample's system by itself: conjugate
    residuals (Stiefel 1955), which for a ``b`` out of reach come to the least squares, where
    conjugate gradients have no limit. ``rounding`` is that of ``matrix``, relative.
    """

    def dot(p: Tensor, q: Tensor) -> Tensor:
        return (p * q).flatten(1).sum(1).reshape(-1, *(1,) * (p.ndim - 1))

    v, rest, length = torch.zeros_like(b), b, dot(b, b)
    direction = applied = torch.zeros_like(b)
    before, largest, done = torch.full_like(length, torch.inf), None, length <= 0
    least = length * rounding**2
    for _ in range(iterations):
        image = matrix(rest)
        along = dot(rest, image)
        # An eigenvalue of those that b has a part in; what is left with one of the size of its
        # rounding is out of reach.
        largest = dot(image, image) / along if largest is None else largest
        # Once done, for good: what is left is rounding, which must not be divided by itself.
        done = done | (length <= least) | ~(along > rounding * largest * length)
        if bool(done.all()):
            break
        share = along / before
        direction, applied = rest + share * direction, image + share * applied
        step = torch.where(done, 0.0, along / dot(applied, applied))
        v = torch.where(done, v, v + step * direction)
        rest = torch.where(done, rest, rest - step * applied)
        before, length = along, dot(rest, rest)
    return v
