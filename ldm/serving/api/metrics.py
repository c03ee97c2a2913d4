"""Numbers for a monitor, in Prometheus' text format; a queue's seconds are what replicas are scaled
by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from ldm.serving.service import Counts, Service


class Metrics:
    """The numbers of one service."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._rows = Histogram(
            "ldm_network_rows", "Rows of an evaluation of the network", registry=registry,
            buckets=(1, 2, 4, 6, 8, 16),
        )  # fmt: skip
        self._seconds = Counter(
            "ldm_network_seconds", "Seconds that the network was evaluated", registry=registry
        )
        self._jobs = Counter("ldm_jobs", "Jobs that have ended", ["state"], registry=registry)
        self._took = Histogram(
            "ldm_job_seconds", "From a job's coming to its end", registry=registry,
            buckets=(0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800),
        )  # fmt: skip

    @property
    def counts(self) -> Counts:
        """What a service tells of itself."""

        def evaluated(rows: int, seconds: float) -> None:
            self._rows.observe(rows)
            self._seconds.inc(seconds)

        def ended(state: str, seconds: float) -> None:
            self._jobs.labels(state).inc()
            self._took.observe(seconds)

        return Counts(evaluated, ended)

    def of(self, service: Service) -> None:
        """From here on also of what waits in ``service``."""
        self._registry.register(_Queued(service))

    def text(self) -> bytes:
        """All numbers now."""
        return generate_latest(self._registry)


class _Queued:
    """What waits, looked at when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        """The gauges."""
        work = self._service.queue.work()
        gauges = {
            "ldm_queue_work": ("Rows of the network that wait, at the model's own size", work),
            "ldm_queue_seconds": (
                "Seconds in which what waits is drawn, at the speed of late",
                self._service.rate.seconds(work) or 0.0,
            ),
            "ldm_jobs_here": ("Jobs that wait or are drawn", len(self._service.jobs)),
            "ldm_exact": ("1 where company changes no picture", float(self._service.exact)),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(name, help, value)
