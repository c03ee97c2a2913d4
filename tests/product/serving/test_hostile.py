"""Hostile requests: each is refused, nothing outside of the server's folders is opened,
and the next good one is answered as before.
"""

import base64
import io
import json
import os
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny
from ldm.serving.limits import Limits
from ldm.serving.service import Service
from ldm.serving.shelf import Shelf

TestClient = pytest.importorskip("starlette.testclient").TestClient
create_app = pytest.importorskip("ldm.serving.api.app").create_app
Page = pytest.importorskip("ldm.serving.api.page").Page
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

GOOD = {"prompt": "a red heart", "seed": 3, "steps": 2, "guidance": 3.0, "width": 16, "height": 16}
UP = ("../../../etc/passwd", "/etc/passwd", "..\\..\\secret", "tiny/../tiny", "secret")
opened: list[str] = []
listening = False


def _hear(event: str, args: Any) -> None:
    if listening and event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], str):
        opened.append(os.path.realpath(args[0]))


class Raw(str):
    """Is JSON as it stands."""


def body(fields: dict[str, Any]) -> bytes:
    """JSON, also what ``json`` would not write."""
    parts = [
        f"{json.dumps(name)}: {value if isinstance(value, Raw) else json.dumps(value)}"
        for name, value in fields.items()
    ]
    return ("{" + ", ".join(parts) + "}").encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A picture that says to be so large."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def files() -> list[bytes]:
    """What is no picture that can be drawn from."""
    whole = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(whole, "PNG")
    good, bomb = whole.getvalue(), zlib.compress(bytes(2**22))
    return [
        b"x", b"\x89PNG\r\n\x1a\n", good[:40], good[:-30], good[20:], png(60_000, 60_000),
        png(2**31 - 1, 1), png(0, 0), png(16, 16, chunk(b"IDAT", b"nothing")), png(4096, 4097),
        png(16, 16, chunk(b"zTXt", b"parameters\0\0" + bomb)), b"GIF89a\xff\xff\xff\xff\0\0\0;",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%PDF-1.4", b"PK\3\4", b"II*\0\xff\xff\xff\x7f", b"BM\xff\xff\xff\x7f" + bytes(50),
        b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(9), b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(9),
    ]  # fmt: skip


WRONG: list[Any] = [
    True, -1, Raw("1e999"), Raw("NaN"), Raw("-Infinity"), Raw("9" * 5000), Raw('"\\ud800"'), {},
    {"__class__": "os"}, [[]], "\0", Raw("[" * 300 + "]" * 300),
]  # fmt: skip


def native(draw: random.Random, bad: list[str]) -> tuple[str, bytes]:
    """A job of which one thing is wrong."""
    kind = draw.randrange(4)
    if kind == 0:
        return "/api/jobs", body(GOOD | {draw.choice(["x", "__proto__", "prompt ", "lora"]): 1})
    if kind == 1:
        return "/api/jobs", body(GOOD | {draw.choice(["image", "mask"]): draw.choice(bad)})
    if kind == 2:
        name = draw.choice(UP)
        told = draw.choice([{"model": name}, {"loras": [{"name": name}]}, {"sampler": name}])
        return "/api/jobs", body(GOOD | told)
    field = draw.choice([
        "prompt", "negative", "model", "count", "seed", "width", "height", "steps", "guidance",
        "guidance_rescale", "sampler", "syntax", "image", "mask", "strength", "feather", "outpaint",
        "variation_seed", "variation_strength", "loras", "previews", "deadline",
    ])  # fmt: skip
    return "/api/jobs", body(GOOD | {field: draw.choice(WRONG)})


def others(draw: random.Random, bad: list[str]) -> tuple[str, bytes]:
    """The same of the other APIs."""
    wrong, file, up = draw.choice(WRONG), draw.choice(bad), draw.choice(UP)
    one = {"prompt": "a", "num_inference_steps": 2, "size": "16x16"}
    two = {"prompt": "a", "steps": 2, "width": 16, "height": 16}
    return draw.choice([
        ("/v1/images/generations", body(one | {draw.choice([*one, "n", "seed", "stream"]): wrong})),
        ("/v1/images/generations", body(one | {"model": up})),
        ("/v1/images/generations", body(one | {"size": draw.choice(["1x1", "99999x8", "-8x8"])})),
        ("/sdapi/v1/txt2img", body(two | {draw.choice([*two, "seed", "batch_size"]): wrong})),
        ("/sdapi/v1/txt2img", body(two | {"prompt": f"a <lora:{up}:1>"})),
        ("/sdapi/v1/txt2img", body(two | {"override_settings": {"sd_model_checkpoint": up}})),
        ("/sdapi/v1/txt2img", body(two | {"script_name": up})),
        ("/sdapi/v1/img2img", body(two | {"init_images": [file]})),
        ("/sdapi/v1/options", body({"sd_model_checkpoint": up})),
        ("/api/tokens", body({"text": draw.choice([*WRONG[:10], None])})),
        ("/api/tokens", body({"text": "a", "model": up})),
        ("/api/settings", body({"image": file})),
    ])  # fmt: skip


def hostile(draw: random.Random, bad: list[str]) -> tuple[str, str, dict[str, Any]]:
    """Method, path and the rest of a request."""
    kind, json_ = draw.randrange(10), {"Content-Type": "application/json"}
    if kind < 4:
        path, data = native(draw, bad)
        return "POST", path, {"content": data, "headers": json_}
    if kind < 7:
        path, data = others(draw, bad)
        return "POST", path, {"content": data, "headers": json_}
    if kind == 7:  # bodies that are no JSON, or none of ours
        path = draw.choice(["/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"])
        data = draw.choice([
            draw.randbytes(200), b"", b"[" * 100_000, b"null", b'"a"', b"\xff\xfe{\0",
            b'{"prompt": "a"', b"x" * (2**20 + 1), b"\xef\xbb\xbf{", b"--x\r\n\r\n--x--",
        ])  # fmt: skip
        told = draw.choice([json_, {"Content-Type": "multipart/form-data"}, {},
                            {"Content-Type": "application/xml"}])  # fmt: skip
        return "POST", path, {"content": data, "headers": told}
    if kind == 8:  # forms
        data = base64.b64decode(draw.choice(bad))
        fields = {"prompt": "a", "num_inference_steps": "2"}
        fields |= draw.choice([{}, {"n": "99"}, {"seed": "-1"}, {"x": "y"}, {"size": "8x"}])
        path = draw.choice(["/v1/images/edits", "/v1/images/variations"])
        return "POST", path, {"data": fields, "files": {"image": (draw.choice(UP), data)}}
    way = draw.choice(["..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "....//....//secret",
                       "%00", "..%5c..%5csecret", "%c0%ae%c0%ae/", "x" * 300, "0" * 28,
                       "%2fetc%2fpasswd", "0" * 28 + "-0.png%00", "secret.json"])  # fmt: skip
    room = draw.choice(["/", "/api/jobs/", "/api/pictures/", "/v1/models/", "/sdapi/v1/",
                        "/api/runs/", "/vendor/"])  # fmt: skip
    method = draw.choice(["GET", "GET", "GET", "DELETE", "PUT", "PATCH", "TRACE"])
    where = draw.choice([{}, {}, {"Host": "evil.example"}, {"Origin": "http://evil.example"},
                         {"X-Client": "../" * 99}, {"Content-Length": "-1"}])  # fmt: skip
    return method, room + way, {"headers": where}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "loras").mkdir()
    limits = Limits(count=4, steps=50, pixels=64 * 64, body=2**20, work=500.0)
    shelf = Shelf({"tiny": tiny.folder(tmp_path / "tiny")}, tmp_path / "loras")
    found = Service(shelf, tmp_path / "served", limits)
    found.start()
    yield found
    found.close()


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_requests_are_refused(service: Service, count: int) -> None:
    global listening
    sys.addaudithook(_hear)  # for good: Python takes none back
    opened.clear()
    draw, bad = random.Random(0), [base64.b64encode(file).decode() for file in files()]
    app = create_app(service, hosts=["localhost"], page=Page())
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:

        def picture() -> bytes:
            name = client.post("/api/jobs", json=GOOD).json()["id"]
            client.get(f"/api/jobs/{name}/events")
            return client.get(f"/api/pictures/{name}-0.png").content

        before, wrong = picture(), list[Any]()
        assert client.get("/").status_code == 200  # Python reads the system's table of file types
        jobs = len([*(service.folder / "jobs").iterdir()])
        assert jobs == 1
        # A method that a path has not is told so, though the page answers what no route knows.
        for path, allowed in (("/v1/images/edits", "POST"), ("/api/jobs", "GET, POST")):
            refused = client.put(path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        assert client.get("/sdapi/v1/txt2img").status_code == 405
        for path, method in (("/api/events", "get"), ("/v1/images/generations", "post")):
            said = client.get("/openapi.json").json()["paths"][path][method]["responses"]["200"]
            assert "text/event-stream" in said["content"]
        listening = True
        for number in range(count):
            method, path, rest = hostile(draw, bad)
            answer = client.request(method, path, **rest)
            told = answer.text
            leaks = str(service.folder.parent) in told or "Traceback" in told or "root:" in told
            if not 400 <= answer.status_code < 500 or leaks or "secret" in told[:20]:
                said = answer.status_code, told[:200]
                wrong.append((number, method, path, str(rest)[:300], *said))
        listening = False
        assert wrong == []
        assert len([*(service.folder / "jobs").iterdir()]) == jobs  # and nothing was taken
        root, own = service.folder.parent, Path(__file__).parents[3]
        code = tuple(map(os.path.realpath, (sys.prefix, sys.base_prefix, own / "ldm")))
        inside = (str(service.folder), str(root / "loras"), str(root / "tiny"))
        searched = {*map(os.path.realpath, sys.path)}  # by an import
        outside = {file for file in opened if not file.startswith((*inside, *code))}
        assert outside - searched == set()
        assert picture() == before
