"""The page: files of this package, as they are, without a build step."""

from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parents[1] / "page"


class Page(StaticFiles):
    """The files at ``/``, which a browser asks for again whenever it opens them: an update of the
    package must not meet half of an older page.
    """

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, to be revalidated by its tag."""
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response
