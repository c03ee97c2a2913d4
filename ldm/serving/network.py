"""One network that many calls of a pipeline share: each runs its own sampler in its own thread, and
one thread evaluates whoever waits.

Calls that are at different steps, of different samplers, of different guidance are one batch, as
long as their pictures have one size and their adapters are the same. Since rows do not know each
other (``ldm.models.rows``), what is drawn is what would be drawn alone, to the bit. All else that
calls do, texts, autoencoder and the samplers' own arithmetic, they do one at a time: who computes
has the turn, and leaves it to others while it waits for the network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion import Condition, Denoiser
from ldm.models.rows import MOST_ROWS, alike, evaluated, separate

Adapters = tuple[tuple[str, float], ...]
"""Names of LoRAs and how strong each is, in the order in which they are added up."""

_PATIENCE = 0.005  # seconds for calls that do not wait yet, or
_SHARE = 0.1  # of the time that the last evaluation took


@dataclass(eq=False)
class _Ask:
    """Rows that wait."""

    key: Any
    x_t: Tensor
    timestep: Tensor
    cond: Condition
    answer: Future[Tensor] = field(default_factory=Future)


class Network:
    """The networks of a pipeline behind one thread, from ``start`` to ``close``.

    Args:
        pipe: the pipeline, which from here on belongs to this.
        adapt: puts adapters into its networks, in place of those that are there.
        most: rows of a batch at most.
        constant: whether all batches have so many, where those of different sizes know each other.
        seen: is told the rows of every evaluation, and its seconds.
    """

    def __init__(
        self,
        pipe: Any,
        adapt: Callable[[Adapters], None] = lambda adapters: None,
        *,
        most: int = MOST_ROWS,
        constant: bool = False,
        seen: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self.pipe, self.most, self._adapt, self._seen = pipe, most, adapt, seen
        self.least = most if constant else 2
        self._denoiser: Denoiser = pipe.denoiser
        self._turn = threading.Lock()
        self._state = threading.Condition()
        self._waiting: list[_Ask] = []
        self._active = 0
        self._last = 0.0  # seconds of an evaluation
        self._closed = False
        self._adapters: Adapters | None = None
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        separate(pipe.network)

    def start(self) -> None:
        """From here on it evaluates."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread when nobody waits any more."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._thread.join()

    @contextmanager
    def drawing(
        self, adapters: Adapters = (), check: Callable[[], None] = lambda: None
    ) -> Iterator[Any]:
        """The pipeline for one call in this thread, which has the turn but while it waits.

        Args:
            adapters: that it draws with.
            check: is asked at every evaluation, and ends the call by an error.
        """
        with self._state:
            self._active += 1
        try:
            with self._turn:
                check()
                self._set(adapters)
                yield self.pipe.asking(lambda denoiser: self._through(adapters, check))
        finally:
            with self._state:
                self._active -= 1
                self._state.notify_all()

    @contextmanager
    def alone(self) -> Iterator[Any]:
        """The pipeline itself, while nobody else computes; whatever becomes of its adapters."""
        with self._turn:
            self._adapters = None
            yield self.pipe

    def exact(self, condition: Condition, shape: Sequence[int]) -> bool:
        """Whether what is drawn in company is what is drawn alone, to the bit, as far as one
        evaluation of ``most`` rows of noise tells.

        Args:
            condition: of one row.
            shape: of a latent, ``c h w``.
        """
        draw = torch.Generator().manual_seed(0)
        device, rows = self.pipe.network.device, self.most
        x_t = torch.randn((rows, *shape), generator=draw).to(device)
        timestep = 999 * torch.rand(rows, generator=draw).to(device)
        every = condition.map(lambda part: part[:1].expand(rows, *part.shape[1:]).contiguous())
        with self._turn, torch.no_grad():
            self._set(())
            return alike(self._denoiser, x_t, timestep, every, least=self.least)

    def _through(self, adapters: Adapters, check: Callable[[], None]) -> Denoiser:
        def ask(x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
            check()
            shapes = [(n, x.shape[1:], x.dtype) for n, x in sorted(cond.tensors().items())]
            key = adapters, x_t.shape[1:], x_t.dtype, repr(shapes)
            times = timestep.float().to(x_t.device).expand(len(x_t))
            own = _Ask(key, x_t, times, cond)
            self._turn.release()
            try:
                with self._state:
                    self._waiting.append(own)
                    self._state.notify_all()
                found = own.answer.result()
            finally:
                self._turn.acquire()
            check()
            return found

        return ask

    def _set(self, adapters: Adapters) -> None:
        """Under the turn."""
        if adapters != self._adapters:
            self._adapters = None
            self._adapt(adapters)
            separate(self.pipe.network)
            self._adapters = adapters

    def _run(self) -> None:
        while self._gather():
            with self._turn:
                batch = self._taken()
                start = time.perf_counter()
                try:
                    self._set(batch[0].key[0])
                    answers = self._evaluate(batch)
                except BaseException as error:  # of all that wait for it, and told by them
                    for ask in batch:
                        ask.answer.set_exception(error)
                    continue
                self._last = time.perf_counter() - start
                for ask, answer in zip(batch, answers, strict=True):
                    ask.answer.set_result(answer)
            self._seen(sum(len(ask.x_t) for ask in batch), self._last)

    def _gather(self) -> bool:
        """Waits for calls that ask, and a moment for those that are about to; False at the end."""
        with self._state:
            while not self._waiting:
                if self._closed:
                    return False
                self._state.wait()
            until = time.monotonic() + max(_PATIENCE, _SHARE * self._last)
            while len(self._waiting) < self._active and self._rows() < self.most:
                if (left := until - time.monotonic()) <= 0:
                    break
                self._state.wait(left)
        return True

    def _rows(self) -> int:
        first = self._waiting[0].key
        return sum(len(ask.x_t) for ask in self._waiting if ask.key == first)

    def _taken(self) -> list[_Ask]:
        """The oldest, and those that go with it."""
        with self._state:
            batch, rows = [self._waiting[0]], len(self._waiting[0].x_t)
            for ask in self._waiting[1:]:
                if ask.key == batch[0].key and rows + len(ask.x_t) <= self.most:
                    batch.append(ask)
                    rows += len(ask.x_t)
            self._waiting = [ask for ask in self._waiting if ask not in batch]
        return batch

    @torch.no_grad()
    def _evaluate(self, batch: Sequence[_Ask]) -> Sequence[Tensor]:
        x_t, timestep = (torch.cat(parts) for parts in zip(
            *((ask.x_t, ask.timestep) for ask in batch), strict=True))  # fmt: skip
        cond = Condition.cat([ask.cond for ask in batch])
        found = evaluated(self._denoiser, x_t, timestep, cond, least=self.least)
        return found.split([len(ask.x_t) for ask in batch])
