"""Runs and data sets of configured folders: their page, and whoever else watches.

All of it is read from the folders at each request. What changes something is refused unless the
server was started to manage.
"""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from ldm.serving.api.waiting import RESPONSES, service_of
from ldm.serving.watch.data import Data, data_sets
from ldm.serving.watch.errors import Conflict
from ldm.serving.watch.runs import Runs

_ALSO: dict[int | str, dict[str, Any]] = {
    403: {"description": "The server was not started with --manage."},
    409: {"description": "Things are not as they are taken to be; the message says how."},
}
_Name = Annotated[str, Path(max_length=255)]
_Key = Annotated[str, Field(max_length=4096)]
_Caption = Annotated[str, Field(min_length=1, max_length=10_000)]
_Captions = Annotated[list[_Caption], Field(min_length=1, max_length=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Which(_Strict):
    """Which result of a run is drawn with; null: the newest."""

    result: Annotated[str, Field(max_length=255)] | None = None


class Edit(_Strict):
    """New captions of a picture, and what they are taken to be."""

    key: _Key
    captions: _Captions
    was: Annotated[list[Annotated[str, Field(max_length=1_000_000)]], Field(max_length=1000)]


class Replace(_Strict):
    """A part of captions, by its case, and what is put there."""

    search: Annotated[str, Field(min_length=1, max_length=1000)]
    put: Annotated[str, Field(max_length=1000)]


class Nothing(_Strict):
    """No settings."""


@dataclass
class Watching:
    """What is watched.

    Args:
        runs: the runs of a folder; None: there is no such page.
        data: data sets by name; none: there is no such page.
        manage: whether runs are asked, and captions changed.
    """

    runs: Runs | None = None
    data: dict[str, Data] = field(default_factory=dict)
    manage: bool = False

    @classmethod
    def of(cls, root: pathlib.Path | None, data: list[pathlib.Path], *, manage: bool) -> Self:
        """Of folders. Raises ``ValueError`` where two data sets have one name."""
        runs = None if root is None else Runs(root)
        return cls(runs, data_sets(data, runs.reading if runs else lambda path: ()), manage)

    @property
    def pages(self) -> list[str]:
        """Pages that there are beside those that draw."""
        return ["training"] * (self.runs is not None) + ["data"] * bool(self.data)


def router(watching: Watching) -> APIRouter:
    """The routes of what is watched."""
    routes = APIRouter(prefix="/api", responses=RESPONSES | _ALSO)
    if watching.runs is not None:
        _runs(routes, watching.runs, watching.manage)
    if watching.data:
        _data(routes, watching)
    return routes


async def _done(call: Callable[..., Any], *given: Any) -> Any:
    try:
        return await run_in_threadpool(call, *given)
    except Conflict as error:
        raise HTTPException(409, str(error)) from None


def _allowed(manage: bool) -> Callable[[], None]:
    def allowed() -> None:
        if not manage:
            raise HTTPException(403, "this server only shows: start it with --manage to change")

    return allowed


def _runs(routes: APIRouter, runs: Runs, manage: bool) -> None:
    asks = [Depends(_allowed(manage))]

    @routes.get("/runs", tags=["runs"])
    async def listed() -> Any:
        """All runs, the living first."""
        return {"runs": await _done(runs.list), "manage": manage}

    @routes.get("/runs/{name}", tags=["runs"])
    async def one(name: _Name) -> Any:
        """A run: its state, sheets, results, environment, and the end of its log."""
        return await _done(runs.told, name)

    @routes.get("/runs/{name}/curves", tags=["runs"])
    async def curves(
        name: _Name,
        points: Annotated[int, Query(ge=10, le=5000)] = 400,
        after: Annotated[str, Query(max_length=60)] = "",
    ) -> Any:
        """The numbers of metrics.jsonl by key: ``x`` in images and ``y``; of many their mean, and
        ``low`` and ``high``. ``after`` the ``end`` of the last answer: what has come since.
        ``read`` below 1: of a large file not all is read yet, and the rest is told in samples.
        """
        return await _done(runs.curves, name, points, after)

    @routes.get("/runs/{name}/samples/{after}", tags=["runs"], response_class=FileResponse)
    async def sheet(name: _Name, after: Annotated[int, Path(ge=0, lt=10**18)]) -> FileResponse:
        """The sheet of samples after so many images."""
        file = await _done(runs.sheet, name, after)
        kept = {"Cache-Control": "no-cache"}
        return FileResponse(file, media_type="image/png", headers=kept)

    @routes.get("/runs/{name}/config", tags=["runs"])
    async def config(
        name: _Name, other: Annotated[str | None, Query(max_length=255)] = None
    ) -> Any:
        """The settings of a run, each as JSON; with ``other`` those that differ between the two."""
        if other is not None:
            return {"differences": await _done(runs.differences, name, other)}
        return {"settings": await _done(runs.config, name)}

    @routes.post("/runs/{name}/stop", tags=["runs"], status_code=202, dependencies=asks)
    async def stop(name: _Name, _: Nothing) -> Any:
        """Asks a run to save and to end."""
        await _done(runs.stop, name)
        return {"asked": "stop"}

    @routes.post("/runs/{name}/sample", tags=["runs"], status_code=202, dependencies=asks)
    async def sample(name: _Name, _: Nothing) -> Any:
        """Asks a run for samples after the step that it is at."""
        await _done(runs.sample, name)
        return {"asked": "sample"}

    @routes.post("/runs/{name}/draw", tags=["runs"], dependencies=asks)
    async def draw(request: Request, name: _Name, which: Which) -> Any:
        """Makes a result of a run a model that requests may name."""
        shelf = service_of(request).shelf
        return {"model": await _done(runs.draw, name, which.result, shelf)}


def _data(routes: APIRouter, watching: Watching) -> None:
    asks = [Depends(_allowed(watching.manage))]

    def data(name: _Name) -> Data:
        if name not in watching.data:
            raise HTTPException(404, "there are no such data")
        return watching.data[name]

    Of = Annotated[Data, Depends(data)]

    @routes.get("/data", tags=["data"])
    async def listed() -> Any:
        """Names of the data sets."""
        return {"data": [*watching.data], "manage": watching.manage}

    @routes.get("/data/{name}", tags=["data"])
    async def one(of: Of, size: Annotated[int, Query(ge=8, le=4096)] = 512) -> Any:
        """What ``ldm data check --size`` finds, as its JSON; null while it is looked for."""
        return await _done(of.told, size)

    @routes.get("/data/{name}/rows", tags=["data"])
    async def rows(
        of: Of,
        search: Annotated[str, Query(max_length=1000)] = "",
        start: Annotated[int, Query(ge=0, le=10**9)] = 0,
        count: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Any:
        """Pictures with their captions, those that have ``search`` in them."""
        return await _done(of.rows, search, start, count)

    @routes.get("/data/{name}/counts", tags=["data"])
    async def counts(of: Of) -> Any:
        """How many captions there are, and of which words."""
        return await _done(of.counts)

    @routes.get("/data/{name}/thumbnail", tags=["data"], response_class=Response)
    async def thumbnail(of: Of, key: Annotated[str, Query(max_length=4096)]) -> Response:
        """A small picture."""
        small = await _done(of.thumbnail, key)
        kept = {"Cache-Control": "private, max-age=60"}
        return Response(small, media_type="image/jpeg", headers=kept)

    @routes.post("/data/{name}/captions", tags=["data"], dependencies=asks)
    async def edit(of: Of, asked: Edit) -> Any:
        """Gives a picture other captions, where they stand."""
        await _done(of.edit, asked.key, asked.captions, asked.was)
        return {"changed": 1}

    @routes.post("/data/{name}/replace", tags=["data"], dependencies=asks)
    async def replace(of: Of, asked: Replace) -> Any:
        """Replaces a part of all captions that have it."""
        return {"changed": await _done(of.replace, asked.search, asked.put)}

    @routes.post("/data/{name}/undo", tags=["data"], dependencies=asks)
    async def undo(of: Of, _: Nothing) -> Any:
        """Takes the last change of captions back."""
        return {"keys": await _done(of.undo)}
