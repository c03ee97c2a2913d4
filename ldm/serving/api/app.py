"""All routes behind one door."""

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp

from ldm.serving.api import a1111, native, openai, watching
from ldm.serving.api.door import Door
from ldm.serving.api.metrics import Metrics
from ldm.serving.api.waiting import RESPONSES, ClientGone, service_of
from ldm.serving.draw import limited
from ldm.serving.limits import Full
from ldm.serving.service import Draining, Service
from ldm.serving.shelf import NoSuch

log = logging.getLogger(__name__)

_AGAIN = 5  # seconds, of a server that ends
_SHOWN = 300  # characters of a message
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


def create_app(
    service: Service,
    *,
    key: str | None = None,
    hosts: Collection[str] = (),
    page: ASGIApp | None = None,
    watch: watching.Watching | None = None,
) -> Door:
    """The application over ``service``, which has started; it is closed with the application.

    Args:
        service: what draws.
        key: that everybody has to know; None: nobody.
        hosts: names by which the server may be called; empty: any.
        page: what answers at ``/`` all that no API does.
        watch: runs and data sets that are shown; None: none are.
    """
    metrics = Metrics()
    metrics.of(service)
    service.counts = metrics.counts

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()  # nobody is connected any more

    app = FastAPI(title="ldm", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service, app.state.pages = service, watch.pages if watch else []
    app.include_router(native.router(limited(service.limits, service.engine(None).unit)))
    app.include_router(openai.routes)
    app.include_router(a1111.routes)
    if watch is not None:
        app.include_router(watching.router(watch))
    _watched(app, metrics)
    _told(app)
    if page is not None:
        app.router.default = page  # what no route knows, by any method
    return Door(app, key=key, hosts=hosts, body=service.limits.body)


def _watched(app: FastAPI, metrics: Metrics) -> None:
    """Routes of monitors and balancers."""

    @app.get("/healthz", tags=["watching"], responses=RESPONSES)
    async def healthz(request: Request, response: Response) -> dict[str, Any]:
        """Whether it takes requests, and whether company changes no picture (``exact``)."""
        service = service_of(request)
        if service.draining:
            response.status_code = 503
        return {"ok": not service.draining, "exact": service.exact, "jobs": len(service.jobs)}

    @app.get("/metrics", tags=["watching"], responses=RESPONSES, response_class=Response)
    async def numbers() -> Response:
        """Numbers in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _methods(request: Request) -> list[str]:
    """Those of all routes of a path; the one that has refused tells its own alone."""

    def known(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [*filter(known, _METHODS)]


def _told(app: FastAPI) -> None:
    """How errors are told, by the words of the API that was asked."""

    def answer(
        request: Request, status: int, message: str, headers: dict[str, str] | None = None
    ) -> JSONResponse:
        line = " ".join(message.split())[:_SHOWN].encode(errors="replace").decode()
        if request.url.path.startswith("/v1/"):
            status = 400 if status == 422 else status
            return JSONResponse(openai.error(status, line), status, headers)
        told = {"detail": line}
        if request.url.path.startswith("/sdapi/"):
            told = {"error": "Error", "detail": line, "body": "", "errors": line}
        return JSONResponse(told, status, headers)

    async def http(request: Request, error: Any) -> Response:
        headers = error.headers
        if error.status_code == 405 and (methods := _methods(request)):
            headers = {"Allow": ", ".join(methods)}
        return answer(request, error.status_code, str(error.detail), headers)

    async def invalid(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        json_at_all = first["type"] == "json_invalid"
        where = ".".join(str(part)[:60] for part in first["loc"] if part != "body")
        message = first["msg"].removeprefix("Value error, ")
        told = "the body is no JSON" if json_at_all else f"{where}: {message}" if where else message
        return answer(request, 400 if json_at_all else 422, told)

    async def full(request: Request, error: Any) -> Response:
        return answer(request, 429, str(error), {"Retry-After": str(error.seconds)})

    async def draining(request: Request, error: Any) -> Response:
        told = "the server is about to end: ask again, or another"
        return answer(request, 503, told, {"Retry-After": str(_AGAIN)})

    async def none(request: Request, error: Any) -> Response:
        return answer(request, 404, str(error.args[0]))

    async def wrong(request: Request, error: Any) -> Response:
        return answer(request, 422, str(error))

    async def gone(request: Request, error: Any) -> Response:
        return Response(status_code=499)  # which nobody reads

    async def failed(request: Request, error: Any) -> Response:
        return answer(request, 500, "an error of the server, see its log")

    for kind, handler in (
        (HTTPException, http), (RequestValidationError, invalid), (ValidationError, invalid),
        (Full, full), (Draining, draining), (NoSuch, none), (ValueError, wrong),
        (ClientGone, gone), (Exception, failed),
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)
