"""Replicas behind HAProxy, by the file that ships: one dies with requests in its hands.

That replicas draw the same bytes is tested beside; here stands in for them what answers with a
function of the request.
"""

import hashlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
FILE = Path(__file__).parents[3] / "configs" / "serve" / "haproxy.cfg"
COUNT, BODY = 32, 600_000  # requests, and bytes of each
pytestmark = pytest.mark.skipif(HAPROXY is None, reason="replicas are tested behind haproxy")


class Server(ThreadingHTTPServer):
    """Connections that the balancer drops are nothing to tell of."""

    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        pass


class Replica(BaseHTTPRequestHandler):
    """Answers, or ends with what it was asked for in its hands."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[bool, str]]

    def dies(self) -> bool:
        return self.server.server_address[1] == self.server.dying  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, b"well")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.asked.append((self.dies(), self.path))
        if self.path == "/full":
            self._answer(429, b"full")
        elif self.dies():
            self.close_connection = True  # without a word
        else:
            self._answer(200, hashlib.sha256(body).digest())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[str]:
    """The address of the balancer; its first replica is the one that dies."""
    Replica.asked = []
    servers = [Server(("127.0.0.1", 0), Replica) for _ in range(2)]
    for server in servers:
        server.dying = servers[0].server_address[1]  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = FILE.read_text().partition("\nglobal")[2]
    ports = (port, *(server.server_address[1] for server in servers))
    for shipped, here in zip((7860, 7861, 7862), ports, strict=True):
        assert text.count(f"127.0.0.1:{shipped}") == 1
        text = text.replace(f"127.0.0.1:{shipped}", f"127.0.0.1:{here}")
    file = tmp_path / "haproxy.cfg"
    file.write_text("global" + text)
    balancer = subprocess.Popen([str(HAPROXY), "-f", str(file)], stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}"
    balancer.kill()
    balancer.wait(60)
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_replica_that_dies_loses_no_request(front: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{front}/healthz", timeout=10):
                break
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < end
            time.sleep(0.05)
    bodies = [bytes([number]) * BODY for number in range(COUNT)]

    def answer(body: bytes) -> bytes:
        with urllib.request.urlopen(f"{front}/v1/images/edits", body, timeout=60) as told:
            return told.read()

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(answer, bodies)] == [hashlib.sha256(body).digest() for body in bodies]
    died = [dies for dies, _ in Replica.asked]
    assert any(died) and not all(died)
    # A full replica has answered: the client is told, and no other one is asked.
    Replica.asked.clear()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{front}/full", b"a", timeout=60)
    assert refused.value.code == 429 and len(Replica.asked) == 1
    refused.value.close()
