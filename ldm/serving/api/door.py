"""The one door of the server, before the page, the APIs, their docs and the metrics alike.

host -> origin -> key -> size of the body -> the app -> headers of the answer

A browser that is led to another name of this machine (DNS rebinding) sends that name, and a page of
others sends its origin: both are refused. There is no cookie: browsers keep what was entered as
HTTP's own basic authentication, and send it to this origin alone.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Names of this machine for itself."""

_HEADERS = (
    (b"content-security-policy",
     b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none';"
     b" frame-ancestors 'none'; form-action 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip


class Door:
    """An ASGI application before another.

    Args:
        app: the other.
        key: that everybody has to know; None: nobody.
        hosts: names by which the server may be called; empty: any.
        body: bytes of a request at most.
    """

    def __init__(
        self, app: ASGIApp, *, key: str | None = None, hosts: Collection[str] = (), body: int
    ) -> None:
        self._app, self._body = app, body
        self._too_large = f"the body is larger than {body:,} bytes"
        self._key = None if key is None else key.encode()
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refused(headers)
        if refused is not None:
            await _answer(scope, send, *refused)
            return
        seen = 0

        async def heard() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._body:
                    raise HTTPException(413, self._too_large)
            return message

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        await self._app(scope, heard, told)

    def _refused(self, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts and _name(host) not in self._hosts:
            return 400, "this server is not called so: see ldm serve --name"
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc.lower() != host.lower():
            return 400, "pages of other hosts have no business here"
        if headers.get(b"sec-fetch-site", b"") == b"cross-site":
            return 400, "pages of other hosts have no business here"
        if self._key is not None and not self._knows(headers.get(b"authorization", b"")):
            return 401, "the key is missing or wrong"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._body:
            return 413, self._too_large
        return None

    def _knows(self, told: bytes) -> bool:
        assert self._key is not None
        kind, _, rest = told.partition(b" ")
        if kind.lower() == b"basic":
            try:
                rest = base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(rest.strip(), self._key)


def _name(host: str) -> str:
    """A host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


async def _answer(scope: Scope, send: Send, status: int, message: str) -> None:
    openai = scope["path"].startswith("/v1/")
    told = {"error": {"message": message, "type": "invalid_request_error", "param": None,
                      "code": str(status)}} if openai else {"detail": message}  # fmt: skip
    body = json.dumps(told).encode()
    headers: Sequence[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *_HEADERS,
    ]
    if status == 401:
        headers = [*headers, (b"www-authenticate", b'Basic realm="ldm", charset="UTF-8"')]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
