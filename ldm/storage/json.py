"""JSON that another process wrote, or somebody else did, or a disk has damaged."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, get_origin

from pydantic import TypeAdapter, ValidationError


class JsonError(ValueError):
    """Text that is not the JSON that is due. The message is a phrase ("not valid JSON (...)"); of
    ``read_json`` it is one line that names the file.
    """


def parse_json(data: str | bytes, kind: Any = Any) -> Any:
    """The value that ``data`` says.

    Args:
        data: one JSON value; bytes are UTF-8.
        kind: its type, ``dict[str, Any]`` or a ``TypedDict``: whatever pydantic understands. Types
            are strict, so that a text is no number; keys that a ``TypedDict`` lacks are left out.

    Raises:
        JsonError: it is no JSON, cannot be held (too deep, too many digits), or is another type.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise JsonError("not valid JSON (too deep)") from None
    except UnicodeDecodeError:
        raise JsonError("not valid JSON (not UTF-8 text)") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"not valid JSON ({error.msg})") from None
    except ValueError:  # Python reads whole numbers of up to 4,300 digits
        raise JsonError("not valid JSON (a number of too many digits)") from None
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in problem["loc"])
        where = where.encode(errors="replace").decode()  # half a character cannot be printed
        if not where:
            due = "list" if (get_origin(kind) or kind) is list else "object"
            raise JsonError(f"no JSON {due}") from None
        raise JsonError(f"not what is due at {where}: {_uncapitalised(problem['msg'])}") from None


def read_json(file: Path, kind: Any) -> Any:
    """What ``file`` holds; see ``parse_json``.

    Raises:
        FileNotFoundError: there is no such file.
        JsonError: it cannot be read, or holds something else; one line that names it.
    """
    try:
        return parse_json(file.read_bytes(), kind)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise JsonError(f"{file} cannot be read: {error.strerror}") from None
    except JsonError as error:
        raise JsonError(f"{file} cannot be read: it is {error}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _uncapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]
