"""Data as their page sees them: findings, pictures, and captions changed where they stand."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from launched import locked
from ldm.data.collection import Collection
from ldm.data.folder import FolderData
from ldm.data.images import ImageTransform
from ldm.serving.limits import Limits

TestClient = pytest.importorskip("starlette.testclient").TestClient
create_app = pytest.importorskip("ldm.serving.api.app").create_app
Watching = pytest.importorskip("ldm.serving.api.watching").Watching
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures with text files, with a table, and one that cannot be read."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cats"
    (folder / "sub").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for n, name in enumerate(["a", "b", "c", "sub/1", "sub/2"]):
        pixels = draw.integers(0, 255, (24 + 8 * n, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "a.txt").write_bytes(b"a white cat\r\nsecond line\r\n")
    (folder / "b.txt").write_text("a black Cat")
    (folder / "c.png.txt").write_text("\ufeffa dog, a dog")
    rows = [
        {"file_name": "1.png", "text": "ein Käfer", "by": [1, 2.50]},
        {"file_name": "2.png", "text": ["one", "two"]},
    ]
    table = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "sub" / "metadata.jsonl").write_text(f"{table}\n", encoding="utf-8")
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n")
    (folder / "torn.txt").write_text("torn")
    return folder


@pytest.fixture
def server(cats: Path, tmp_path: Path) -> Iterator[Any]:
    """Makes clients of a server that watches."""
    engine = SimpleNamespace(unit=8, name="tiny")
    service: Any = SimpleNamespace(
        limits=Limits(), engine=lambda name: engine, exact=True, close=lambda: None, counts=None
    )
    (tmp_path / "runs").mkdir()

    def made(manage: bool = True) -> Any:
        watch = Watching.of(tmp_path / "runs", [cats], manage=manage)
        app = create_app(service, watch=watch)
        return TestClient(app, "http://localhost", raise_server_exceptions=False)

    yield made


def content(folder: Path) -> str:
    """The hash of the data that the next run would have."""
    data = FolderData(str(folder), held_out_fraction=0.0)
    return Collection(data, ImageTransform(size=16), "skip").summary()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file() and "log" not in f.name
    }


def put(http: Any, key: str, captions: list[str], was: list[str]) -> Any:
    told = {"key": key, "captions": captions, "was": was}
    return http.post("/api/data/cats/captions", json=told)


def test_what_a_check_finds_and_what_there_is(server: Any, cats: Path) -> None:
    with server(manage=False) as http:
        assert http.get("/api/data").json() == {"data": ["cats"], "manage": False}
        told: dict[str, Any] = {"checking": True}
        while told["checking"]:
            told = http.get("/api/data/cats", params={"size": 16}).json()
        report = told["report"]
        assert report["pictures"]["usable"] == 5 and report["settings"]["size"] == 16
        (torn,) = [f for f in report["findings"] if f["severity"] == "error"]
        assert torn["keys"] == ["torn.png"]
        assert sum(bucket["pictures"] for bucket in report["buckets"]) == 5
        assert told["editable"] and told["undo"] == 0 and told["busy"] == []
        assert str(cats.parent) not in json.dumps(told)
        assert http.get("/api/data/cats", params={"size": 7}).status_code == 422
        rows = http.get("/api/data/cats/rows").json()
        assert rows["found"] == 5 and rows["rows"][0] == {
            "key": "a.png", "captions": ["a white cat"], "width": 32, "height": 24,
            "held_out": rows["rows"][0]["held_out"],
        }  # fmt: skip
        found = http.get("/api/data/cats/rows", params={"search": "CAT"}).json()
        assert [row["key"] for row in found["rows"]] == ["a.png", "b.png"]
        found = http.get("/api/data/cats/rows", params={"start": 3, "count": 1}).json()
        assert found["found"] == 5 and found["rows"][0]["captions"] == ["ein Käfer"]
        counts = http.get("/api/data/cats/counts").json()
        assert (counts["pictures"], counts["captions"], counts["distinct"]) == (5, 6, 6)
        assert counts["words"] == {"least": 1, "median": 2.5, "most": 4}
        assert counts["common"][0] == {"word": "a", "captions": 3}
        small = http.get("/api/data/cats/thumbnail", params={"key": "sub/2.png"})
        assert small.headers["content-type"] == "image/jpeg"
        assert Image.open(BytesIO(small.content)).size == (32, 56)
        # Also of one without a caption, which is looked at to be given one.
        Image.new("RGB", (40, 20)).save(cats / "bare.png")
        small = http.get("/api/data/cats/thumbnail", params={"key": "bare.png"})
        assert Image.open(BytesIO(small.content)).size == (40, 20)
        (cats / "bare.png").unlink()
        before = files(cats)
        assert put(http, "a.png", ["x"], ["a white cat"]).status_code == 403
        assert http.post("/api/data/cats/undo", json={}).status_code == 403
        assert files(cats) == before and not (cats / ".captions").exists()


def test_captions_are_changed_where_they_stand_and_back(server: Any, cats: Path) -> None:
    before, hashes = files(cats), [content(cats)]
    with server() as http:
        changes = [
            ("a.png", ["a grey\u2028cat"], ["a white cat"]),
            ("c.png", ["two dogs"], ["a dog, a dog"]),
            ("sub/1.png", ["a beetle"], ["ein Käfer"]),
            ("sub/2.png", ["one"], ["one", "two"]),
        ]
        for change in changes:
            assert put(http, *change).status_code == 200
            hashes.append(content(cats))
        assert len(set(hashes)) == 5
        assert (cats / "a.txt").read_bytes() == b"a grey cat\r\nsecond line\r\n"
        assert (cats / "c.png.txt").read_text() == "\ufefftwo dogs"
        lines = (cats / "sub" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        assert lines[0] == '{"file_name": "1.png", "text": "a beetle", "by": [1, 2.5]}'
        assert json.loads(lines[1])["text"] == ["one"]
        rows = http.get("/api/data/cats/rows", params={"search": "beetle"}).json()["rows"]
        assert [row["captions"] for row in rows] == [["a beetle"]]
        assert http.get("/api/data/cats").json()["undo"] == 4
    with server() as http:  # the next server knows as well
        for (key, _, _), known in zip(reversed(changes), reversed(hashes[:-1]), strict=True):
            assert http.post("/api/data/cats/undo", json={}).json() == {"keys": [key]}
            assert content(cats) == known
        assert files(cats) == before
        answer = http.post("/api/data/cats/undo", json={})
        assert (answer.status_code, answer.json()["detail"]) == (409, "no caption was changed here")
        replaced = http.post("/api/data/cats/replace", json={"search": "a ", "put": "one "})
        assert replaced.json() == {"changed": 3}
        assert (cats / "c.png.txt").read_text() == "\ufeffone dog, one dog"
        assert len(http.post("/api/data/cats/undo", json={}).json()["keys"]) == 3
        assert files(cats) == before


def test_what_is_refused(server: Any, cats: Path, tmp_path: Path) -> None:
    (cats.parent / "out.txt").write_text("outside")
    with server() as http:
        assert put(http, "a.png", ["x"], ["a stale one"]).status_code == 409
        assert put(http, "a.png", ["x", "y"], ["a white cat"]).status_code == 422
        assert put(http, "a.png", ["\u200b"], ["a white cat"]).status_code == 422
        assert put(http, "a.png", [], ["a white cat"]).status_code == 422
        assert put(http, "a.png", [1], ["a white cat"]).status_code == 422  # type: ignore[list-item]
        hostile = ["../out.png", "/etc/passwd", "a.txt", "torn.png", ".captions/log.jsonl", "\0"]
        for key in hostile:
            assert put(http, key, ["x"], ["y"]).status_code == 404
            told = http.get("/api/data/cats/thumbnail", params={"key": key})
            assert told.status_code == 404 and str(tmp_path) not in told.text
        for name in ("..", "dogs", "%2e%2e", "cats%2f.."):
            assert http.get(f"/api/data/{name}/rows").status_code == 404
        run = tmp_path / "runs" / "one"
        run.mkdir()
        config = {"run": str(run), "data": {"kind": "folder", "path": str(cats)}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "environment.json").write_text("{}")
        before = files(cats)
        with locked(run):
            answer = put(http, "a.png", ["x"], ["a white cat"])
            told = "the run one reads these data: stop it first"
            assert (answer.status_code, answer.json()["detail"]) == (409, told)
            assert http.get("/api/data/cats").json()["busy"] == ["one"]
        assert files(cats) == before
        assert put(http, "a.png", ["x"], ["a white cat"]).status_code == 200
        (cats / "a.txt").write_text("an editor was here")
        assert http.post("/api/data/cats/undo", json={}).status_code == 409
        assert (cats / "a.txt").read_text() == "an editor was here"
        with (cats / ".captions" / "log.jsonl").open("a") as log:  # somebody else's
            told = {"edit": 9, "key": "a.png", "file": "../out.txt", "line": 0}
            log.write(json.dumps(told | {"before": "overwritten", "after": "outside"}) + "\n")
        assert http.post("/api/data/cats/undo", json={}).status_code == 409
        assert (cats.parent / "out.txt").read_text() == "outside"
