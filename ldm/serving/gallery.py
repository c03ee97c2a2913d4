"""Jobs and their pictures as files: what a restart finds again, and all that a gallery shows.

OUT/ID-0.png              pictures, each with the parameters that draw it again
OUT/jobs/ID.json          what was asked for, by whom, and how it ended
OUT/jobs/ID-image.bin     what it sets out from, until it ends

Each is whole or not there (``atomic_write``): a picture that is there is not drawn again.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError
from typing_extensions import TypedDict

from ldm.formats.png import Parameters, write_picture
from ldm.serving.draw import Draw, content
from ldm.serving.job import Job, State
from ldm.storage.disk import atomic_write, write_text
from ldm.storage.json import JsonError, read_json

log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{28}")
_PICTURE = re.compile(r"(?P<id>[0-9a-f]{28})-(?P<number>\d{1,4})\.png")
_GIVEN = ("image", "mask")


class _Record(TypedDict):
    """What the file of a job holds."""

    client: str
    work: float
    kept: bool
    until: float
    taken: float
    state: str
    error: str | None
    draw: dict[str, Any]
    given: list[str]


class Gallery:
    """The folder OUT; made if it is not there.

    Args:
        folder: of pictures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._jobs = folder, folder / "jobs"
        self._jobs.mkdir(parents=True, exist_ok=True)

    def take(self, job: Job) -> None:
        """Writes a job that has come."""
        for name in _GIVEN:
            if (text := getattr(job.draw, name)) is not None:
                with atomic_write(self._given(job.id, name)) as partial:
                    partial.write_bytes(content(text))
        self.write(job)

    def write(self, job: Job) -> None:
        """Writes how far it is; what it was given goes when it is over."""
        record: _Record = {
            "client": job.client,
            "work": job.work,
            "kept": job.kept,
            "until": job.until,
            "taken": job.taken,
            "state": str(job.state),
            "error": job.error,
            "draw": job.draw.model_dump(exclude={*_GIVEN}),
            "given": [name for name in _GIVEN if getattr(job.draw, name) is not None],
        }
        write_text(self._job(job.id), json.dumps(record, ensure_ascii=False))
        if job.state.over:
            for name in _GIVEN:
                self._given(job.id, name).unlink(missing_ok=True)

    def forget(self, job: Job) -> None:
        """Removes a job that was not taken after all."""
        for file in (*(self._given(job.id, name) for name in _GIVEN), self._job(job.id)):
            file.unlink(missing_ok=True)

    def add(
        self,
        job: Job,
        number: int,
        image: Image.Image,
        parameters: Parameters,
        beside: dict[str, Any],
    ) -> str:
        """Writes a picture of ``job``; its name."""
        name = f"{job.id}-{number}.png"
        partial = self.folder / f".{name}"
        write_picture(image, partial, parameters, beside)
        partial.replace(self.folder / name)
        return name

    def picture(self, name: str) -> Path | None:
        """The file of a picture; None: there is none of this name."""
        file = self.folder / name
        return file if _PICTURE.fullmatch(name) and file.is_file() else None

    def ids(self, before: str | None = None) -> Iterator[str]:
        """Of all jobs, the newest first; ``before``: those that are older than this one."""
        names = sorted((file.stem for file in self._jobs.glob("*.json")), reverse=True)
        return (name for name in names if _ID.fullmatch(name) and (not before or name < before))

    def job(self, name: str, *, given: bool = False) -> Job | None:
        """The job of this id as its file has it; None: there is none, or its file is damaged.

        Args:
            name: its id.
            given: whether with what it sets out from.
        """
        if not _ID.fullmatch(name):
            return None
        try:
            found = read_json(self._job(name), _Record)
            told = dict(found["draw"])
            for key in found["given"]:
                file = self._given(name, key)
                told[key] = base64.b64encode(file.read_bytes() if given else b"-").decode()
            job = Job(
                Draw.model_validate(told), found["client"], found["work"], found["kept"],
                found["until"], name, found["taken"], State(found["state"]), found["error"],
            )  # fmt: skip
        except FileNotFoundError:
            return None
        except (JsonError, ValidationError, ValueError, OSError) as error:
            log.warning("the job %s is passed over: %s", name, " ".join(str(error).split())[:200])
            return None
        for number in range(job.draw.count):
            if (self.folder / f"{name}-{number}.png").is_file():
                job.pictures[number] = f"{name}-{number}.png"
        return job

    def unfinished(self) -> list[Job]:
        """Jobs that somebody expects and that have not ended, the oldest first."""
        found = []
        for name in reversed([*self.ids()]):
            job = self.job(name)
            if job is not None and not job.state.over and (job := self.job(name, given=True)):
                job.state = State.QUEUED
                found.append(job)
        return found

    def _job(self, name: str) -> Path:
        return self._jobs / f"{name}.json"

    def _given(self, name: str, key: str) -> Path:
        return self._jobs / f"{name}-{key}.bin"
