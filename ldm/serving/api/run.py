"""The application on a port, until a signal ends it."""

import asyncio
import gc
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn

from ldm.serving.service import Service

_WAITING = 1000  # connections at a time


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # Half a million objects of libraries stay as long as the process: a full collection,
            # which waits for a quarter as many, would come late for the tensors of pictures.
            gc.collect()
            gc.freeze()
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()
        await super().shutdown(sockets)


def run(
    app: Any, service: Service, host: str, port: int, *, drain: int, ready: Callable[[], None]
) -> None:
    """Serves ``app`` until SIGTERM or SIGINT: then nothing is taken any more, and what is drawn or
    waited for is answered, for ``drain`` seconds at most.

    Args:
        app: over ``service``.
        service: that has started.
        host: address.
        port: of it.
        drain: seconds.
        ready: is called when the port is open.
    """
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level="warning",
        server_header=False,
        limit_concurrency=_WAITING,
        timeout_graceful_shutdown=drain,
        timeout_keep_alive=30,
    )
    with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
        asyncio.run(_Server(config, service, ready).serve())
