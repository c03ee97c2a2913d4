"""Replicas behind HAProxy, by the file that ships: one dies with requests in its hands, and one is
asked to end.
"""

import base64
import hashlib
import io
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import served
import tiny
from launched import launch, wait_for
from ldm.pipeline import LatentDiffusionPipeline

COUNT, BODY = 32, 600_000  # requests, and bytes of each
pytestmark = [
    pytest.mark.skipif(served.HAPROXY is None, reason="replicas are tested behind haproxy"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


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
    """The address of the balancer; its first replica, a stand-in as the other, is the one that
    dies.
    """
    Replica.asked = []
    servers = [Server(("127.0.0.1", 0), Replica) for _ in range(2)]
    for server in servers:
        server.dying = servers[0].server_address[1]  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
    balancer = served.Balancer(tmp_path, [server.server_address[1] for server in servers])
    yield balancer.url
    balancer.stop()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_replica_that_dies_loses_no_request(front: str) -> None:
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


@pytest.mark.slow  # 20 CPU s: four servers are started
def test_replicas_that_are_killed_and_restarted_lose_nothing(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    model = tiny.folder(tmp_path / "tiny")

    def begun(name: str, port: int | None = None) -> served.Server:
        return served.Server(
            model, tmp_path / name, "--drain", 300, port=port, start=lambda line: launch(*line)
        )

    def is_well(server: served.Server) -> None:
        wait_for(lambda: served.ask(f"{server.url}/healthz").status == 200, server.process)

    usual = {"num_inference_steps": 12, "guidance_scale": 3.0}
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    want = [
        np.asarray(pipe("a", seed=seed, sampler="dpm++", **usual).images[0]) for seed in range(8)
    ]

    def picture(seed: int) -> Any:
        sent = usual | {"prompt": "a", "seed": seed}
        answer = served.ask(f"{front.url}/v1/images/generations", sent)
        assert answer.status == 200, answer
        data = base64.b64decode(answer.json["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(data)))

    def all_are_answered(count: int, server: served.Server, how: signal.Signals) -> None:
        """Though ``server`` is ended with some of them in its hands."""
        seeds = [number % len(want) for number in range(count)]
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(picture, seed) for seed in seeds]
            wait_for(lambda: served.ask(f"{server.url}/healthz").json["jobs"] >= 2, server.process)
            server.process.send_signal(how)
            same = [
                np.array_equal(each.result(), want[seed])
                for each, seed in zip(found, seeds, strict=True)
            ]
        assert same == [True] * count
        server.process.wait(300)

    replicas = [begun(name) for name in "ab"]
    for replica in replicas:
        is_well(replica)
    front = served.Balancer(tmp_path, [replica.port for replica in replicas])
    try:
        all_are_answered(COUNT, replicas[0], signal.SIGKILL)
        replicas[0] = begun("a", replicas[0].port)
        is_well(replicas[0])
        while "set-cookie" in served.ask(f"{front.url}/healthz", Cookie="replica=a").headers:
            time.sleep(0.05)  # until the balancer has seen it too
        all_are_answered(COUNT // 2, replicas[1], signal.SIGTERM)
    finally:
        front.stop()
        for replica in replicas:
            replica.stop(signal.SIGKILL)
