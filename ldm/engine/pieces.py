"""Optimisers that step some parameters at a time: those held in bfloat16, and those that learn in
the backward pass.

    w = round(step(float32(w), float32(g)))      round: ``ldm.engine.rounding``

The step of a piece is computed on float32 copies, which no more than a piece ever has, and what the
optimiser keeps is float32. In the backward pass a piece is one parameter, whose gradient is let go
at once (Lv et al. 2023, LOMO).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.schema import RunConfig
from ldm.engine.rounding import draws, rounded
from ldm.errors import ConfigError

Groups = Iterable[dict[str, Any]]
Piece = Sequence[tuple[dict[str, Any], Tensor]]
"""Parameters, each with the group that it is in."""
_PIECE = 2**24  # numbers: 64 MB of float32
_COPIES = 3 * 4  # bytes of a number in a piece: weight, gradient, random bits


class InPieces(torch.optim.Optimizer):
    """Steps by another optimiser, whose groups and state are its own, piece by piece.

    Args:
        inner: steps each parameter on its own.
        weights: all of its parameters by name.
        seed: of what bfloat16 is rounded by.
        backward: whether each parameter steps as soon as its gradient is there.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        weights: Mapping[str, nn.Parameter],
        seed: int,
        *,
        backward: bool = False,
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.seed, self.backward = inner, seed, backward
        self.state = inner.state
        self.names = {p: name for name, p in weights.items()}
        self.seen = 0  # images before the step
        self._every = [group["params"] for group in self.param_groups]
        self._factor: Tensor | None = None  # on gradients of bfloat16, until they are float32
        self._norms: list[Tensor] = []  # of gradients that are gone
        self._pieces = [] if backward else [*_pieces(self.param_groups)]
        for group in self.param_groups if backward else ():
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(partial(self._arrived, group))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for piece in self._pieces:
            self._step(piece)
        self._factor = None
        return loss

    @torch.no_grad()
    def clip(self, largest: float | None) -> Tensor:
        """Norm of the whole gradient, which the step takes as if it were ``largest`` at most; None:
        as it is. In the backward pass it tells of the gradients that were there.
        """
        if self.backward:
            norms, self._norms = self._norms, []
            return torch.linalg.vector_norm(torch.stack(norms))
        grads: dict[torch.dtype, list[Tensor]] = {}
        for p in self.names:
            if p.grad is not None:
                grads.setdefault(p.grad.dtype, []).append(p.grad)
        norms = [torch._foreach_norm(some, 2, dtype=torch.float32) for some in grads.values()]
        norm = torch.linalg.vector_norm(torch.stack([one for some in norms for one in some]))
        if largest is not None:
            factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
            if plain := grads.get(torch.float32):
                torch._foreach_mul_(plain, factor)
            self._factor = factor
        return norm

    @torch.no_grad()
    def _arrived(self, group: dict[str, Any], p: Tensor) -> None:
        """Steps ``p``, whose gradient is there, and lets that go."""
        assert p.grad is not None
        self._norms.append(torch.linalg.vector_norm(p.grad, dtype=torch.float32))
        self._step([(group, p)])
        p.grad = None

    def _step(self, piece: Piece) -> None:
        """One step of ``piece``."""
        for group in self.param_groups:
            group["params"] = []
        copies = list[tuple[Tensor, Tensor]]()
        for group, p in piece:
            stepped = p
            if p.dtype != torch.float32 and p.grad is not None:
                stepped = self._copy(p)
                copies.append((p, stepped))
            group["params"].append(stepped)
        try:
            self.inner.step()
        finally:
            for group, every in zip(self.param_groups, self._every, strict=True):
                group["params"] = every
        for p, stepped in copies:
            self.state[p] = self.state.pop(stepped)
            stepped.grad = None  # room for what is drawn
            generator = draws(self.seed, self.names[p], self.seen, p.device)  # type: ignore[index]
            p.copy_(rounded(stepped.detach(), generator))

    def _copy(self, p: Tensor) -> nn.Parameter:
        """``p`` in float32, with its gradient and what is kept of it."""
        copy = nn.Parameter(p.detach().float())
        grad = p.grad
        assert grad is not None
        copy.grad = grad.float()
        if self._factor is not None and grad.dtype != torch.float32:
            copy.grad.mul_(self._factor)
        if p in self.state:
            self.state[copy] = self.state.pop(p)
        return copy


def _pieces(groups: Groups) -> Iterator[Piece]:
    """All parameters of ``groups``, as many together as a piece has room for."""
    piece, size = list[tuple[dict[str, Any], Tensor]](), 0
    for group in groups:
        for p in group["params"]:
            if piece and size + p.numel() > _PIECE:
                yield piece
                piece, size = [], 0
            piece.append((group, p))
            size += p.numel()
    if piece:
        yield piece


def gradient(config: RunConfig, weights: Iterable[Tensor], parts: int = 1) -> int:
    """Bytes of what a step has for gradients of ``weights`` at once, and of the copies of a piece.

    Args:
        config: the run.
        weights: what learns.
        parts: micro-batches.
    """
    backward, bytes_of = config.optimizer.in_backward, list[int]()
    halves = list[int]()
    for weight in weights:
        halved = weight.dtype == torch.bfloat16
        wide = halved and parts > 1  # micro-batches are summed in float32
        bytes_of.append(weight.numel() * (4 if wide else weight.element_size()))
        halves += [weight.numel()] * halved
    largest = max(halves, default=0)
    piece = largest if backward else max(largest, min(sum(halves), _PIECE))
    return (max(bytes_of) if backward else sum(bytes_of)) + _COPIES * piece


def prepare(
    config: RunConfig,
    optimizer: torch.optim.Optimizer,
    world: int,
    parts: int,
    *,
    sharded: bool = False,
) -> None:
    """Lets the gradients of weights in bfloat16 be summed in float32 over micro-batches.

    Args:
        config: the run.
        optimizer: its own.
        world: processes.
        parts: micro-batches of a step.
        sharded: whether weights are in shards.

    Raises:
        ConfigError: the run steps by pieces, and asks for what that excludes.
    """
    if not isinstance(optimizer, InPieces):
        return
    if sharded:
        raise ConfigError(
            "optimizer.in_backward: not supported in shards (FSDP): leave it out"
            if optimizer.backward
            else "weights: bfloat16 is not supported in shards (FSDP): leave it out"
        )
    if optimizer.backward:
        told = None
        if world > 1:
            told = f"{world} processes would step before they have told each other: start one"
        elif parts > 1:
            told = f"each of {parts} micro-batches would be a step: leave micro_batch_size out"
        elif config.nonfinite.action == "skip":
            told = "there is no skipping a step that is taken: set nonfinite.action to stop"
        elif config.precision == "float16":
            told = "losses of float16 are scaled: set precision to bfloat16"
        if told:
            raise ConfigError(f"optimizer.in_backward: {told}, or leave this out")
    halved = [p for p in optimizer.names if p.dtype == torch.bfloat16]
    if halved and parts > 1:
        if world > 1:
            raise ConfigError(
                "weights: bfloat16 over several processes: micro-batches would be summed in three"
                " digits: leave micro_batch_size out, or weights"
            )
        sum_in_float32(halved)


def sum_in_float32(weights: Iterable[Tensor]) -> None:
    """Lets gradients of ``weights`` be float32, in whatever they come.

    Raises:
        ConfigError: this PyTorch cannot.
    """
    weights = list(weights)
    if weights and not hasattr(torch.Tensor, "grad_dtype"):
        raise ConfigError(
            f"weights: bfloat16: PyTorch {torch.__version__} cannot sum gradients of micro-batches"
            " in float32 (Tensor.grad_dtype): install a newer one, or leave micro_batch_size out"
        )
    for p in weights:
        p.grad_dtype = torch.float32
