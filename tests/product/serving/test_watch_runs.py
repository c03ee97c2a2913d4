"""Runs as their page sees them: from their folders alone, while they train and when they do not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from launched import TRAIN, digests, finish, launch, locked, logged, steps, wait_for
from ldm.serving.limits import Limits
from ldm.serving.shelf import NoSuch, Shelf
from ldm.serving.watch.curves import Curves, thinned
from ldm.serving.watch.errors import Conflict
from ldm.serving.watch.pathless import pathless
from ldm.serving.watch.runs import Runs
from ldm.storage.checkpoint import name_of
from ldm.storage.lock import NAME, holder, lock
from runs import ROOT, train, tree

TestClient = pytest.importorskip("starlette.testclient").TestClient
create_app = pytest.importorskip("ldm.serving.api.app").create_app
Watching = pytest.importorskip("ldm.serving.api.watching").Watching
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
Client = Callable[..., Any]


def metrics(run: Path, *lines: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def record(run: Path, **config: Any) -> Path:
    """A run folder as one has it when it begins."""
    run.mkdir(parents=True)
    told = {"run": str(run), "batch_size": 4, "duration": "100 steps", "seed": 1} | config
    (run / "config.yaml").write_text(yaml.safe_dump(told))
    (run / "environment.json").write_text(json.dumps({"git": "abc", "changes": []}))
    return run


def finished(run: Path, *parts: str) -> None:
    for part in parts:
        (run / part).mkdir(parents=True)
        for name in ("manifest.json", "model_index.json"):
            (run / part / name).write_text('{"sha256": {}}')


@pytest.fixture(scope="module")
def client() -> Client:
    """Clients of a server that watches a folder, and draws nothing."""
    engine = SimpleNamespace(unit=8, name="tiny")
    shelf = Shelf({"tiny": Path("tiny")})
    service: Any = SimpleNamespace(
        limits=Limits(), engine=lambda name: engine, shelf=shelf, exact=True, jobs={}, counts=None,
        queue=SimpleNamespace(waiting=0, work=0.0), close=lambda: None, draining=False,
    )  # fmt: skip

    def made(root: Path | None, data: list[Path] | None = None, **settings: Any) -> Any:
        watch = Watching.of(root, data or [], manage=settings.pop("manage", False))
        app = create_app(service, watch=watch, **settings)
        return TestClient(app, "http://localhost", raise_server_exceptions=False)

    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def asleep() -> Iterator[Callable[[Path], int]]:
    """Starts processes that hold the lock of a folder and do nothing else."""
    started = []

    def start(run: Path) -> int:
        program = "import sys, time; from pathlib import Path; from ldm.storage.lock import lock\n"
        program += "held = lock(Path(sys.argv[1])); print(1, flush=True); time.sleep(600)"
        line = [sys.executable, "-c", program, str(run)]
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_who_holds_a_folder_is_asked_without_holding_it(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    kept = lock(tmp_path)
    assert holder(tmp_path) == (os.uname().nodename, os.getpid(), True)
    del kept
    assert holder(tmp_path) is None
    with locked(tmp_path) as other:
        assert holder(tmp_path) == (os.uname().nodename, other, True)
        (tmp_path / NAME).write_text(f"another-host {other}")
        found = holder(tmp_path)
        assert found is not None and not found.here
    kept = lock(tmp_path)  # and to ask has taken nothing
    assert kept.sure


def test_states_are_those_of_the_folders(client: Client, root: Path, asleep: Any) -> None:
    run = record(root / "alive")
    metrics(run, {"images": 4, "step": 1, "loss": 0.5, "images_per_second": 2.0})
    with client(root) as http:
        process = asleep(run)
        (told,) = http.get("/api/runs").json()["runs"]  # one look is enough
        assert told["state"] == "alive"
        assert (told["images"], told["total"], told["loss"]) == (4, 400, 0.5)
        assert told["seconds_left"] == (400 - 4) / 2.0
        os.kill(process, signal.SIGKILL)
        begun = time.monotonic()
        while http.get("/api/runs/alive").json()["state"] != "stopped":
            assert time.monotonic() - begun < 2
        finished(run, "checkpoints/" + name_of(8), "final")
        assert http.get("/api/runs/alive").json()["state"] == "finished"
        newer = run / "checkpoints" / name_of(400)
        finished(run, f"checkpoints/{newer.name}")
        os.utime(newer / "manifest.json", ns=(1, time.time_ns() + 10**9))
        assert http.get("/api/runs/alive").json()["state"] == "stopped"  # it went on from there
        (run / "fault.json").write_text(json.dumps({"images": [4, 8], "loss": "nan"}))
        os.utime(run / "metrics.jsonl", ns=(1, 1))
        told = http.get("/api/runs/alive").json()
        assert told["state"] == "broken" and "no number" in told["why"] and told["fault"]["loss"]
        (root / "torn").mkdir()
        for name in ("config.yaml", "environment.json"):
            (root / "torn" / name).write_text("{ :")
        told = http.get("/api/runs/torn").json()
        assert (told["state"], told["why"]) == ("broken", "config.yaml cannot be read")
        assert told["environment"] is None


def test_numbers_are_those_of_the_file(client: Client, root: Path) -> None:
    run = record(root / "a")
    lines = [{"images": 4 * n, "step": n, "loss": 1 / 3 / n, "lr": 1} for n in range(1, 41)]
    lines[7]["skipped"] = {"loss": "nan"}  # values of several kinds
    lines[9] |= {"held_out_loss": 0.25, "held_out_loss/0.05": 0.1, "emoji/fid/low": 3.5}
    lines[11]["loss"] = float("nan")
    metrics(run, *lines[:30])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images": 9, "lo\n')  # as a kill leaves it
    metrics(run, *lines[30:])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images": 164, "loss"')  # being written
    with client(root) as http:
        told = http.get("/api/runs/a/curves").json()
        curves = told["curves"]
        good = [n for n in range(40) if n != 11]
        assert curves["loss"] == {
            "x": [lines[n]["images"] for n in good], "y": [lines[n]["loss"] for n in good]
        }  # fmt: skip
        assert curves["held_out_loss/0.05"] == {"x": [40], "y": [0.1]} and told["whole"]
        assert curves["emoji/fid/low"] == {"x": [40], "y": [3.5]}
        assert "skipped" not in curves and told["read"] == 1.0
        again = http.get("/api/runs/a/curves", params={"after": told["end"]}).json()
        assert again["curves"] == {} and not again["whole"]
        with (run / "metrics.jsonl").open("a") as file:
            file.write(': 0.125}\n{"images": 168, "loss": 0.0625}\n')
        again = http.get("/api/runs/a/curves", params={"after": told["end"]}).json()
        assert again["curves"]["loss"] == {"x": [164, 168], "y": [0.125, 0.0625]}
        assert not again["whole"]
        # A run that goes on from a checkpoint cuts its file.
        (run / "new").write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
        (run / "new").replace(run / "metrics.jsonl")
        cut = http.get("/api/runs/a/curves", params={"after": again["end"]}).json()
        assert cut["whole"] and cut["curves"]["loss"]["y"] == [1 / 3 / n for n in range(1, 6)]


def test_a_million_lines_show_at_once_and_become_exact(tmp_path: Path) -> None:
    file, count = tmp_path / "metrics.jsonl", 1_000_000
    with file.open("wb") as lines:
        for first in range(0, count, 1000):
            block = b"".join(
                b'{"images": %d, "loss": %d.5, "lr": 0.001}\n' % (16 * n, n % 977)
                for n in range(first, first + 1000)
            )
            lines.write(block)
            if first == 500_000:
                lines.write(b'{"images": 8000001, "loss": -7.25}\n')
    curves, begun = Curves(file), time.process_time()  # others may have the machine
    told = curves.look(300)
    assert time.process_time() - begun < 1
    loss = told["curves"]["loss"]
    assert told["read"] < 1 and told["end"] == "" and len(loss["x"]) > 200
    assert loss["x"][-1] > 0.99 * 16 * count  # of what is not read yet as well
    while told["read"] < 1:
        told = curves.look(300)
    loss = told["curves"]["loss"]
    assert min(loss["low"]) == -7.25 and max(loss["high"]) == 976.5
    assert loss["x"][-1] == 16 * (count - 1)
    begun = time.process_time()
    assert not curves.look(300, told["end"])["curves"] and time.process_time() - begun < 0.1


def test_thinned_curves_keep_extremes() -> None:
    import numpy as np

    x, y = np.arange(10.0), np.array([1.0, 2, 9, 2, 1, 1, -5, 1, 1, 3])
    assert thinned(x, y, 10) == {"x": x.tolist(), "y": y.tolist()}
    told = thinned(x, y, 2)
    assert told == {"x": [4.0, 9.0], "y": [3.0, 0.2], "low": [1.0, -5.0], "high": [9.0, 3.0]}


def test_what_a_run_shows(client: Client, root: Path) -> None:
    home = "/srv/somebody/secret"
    run = record(root / "a", data=[{"path": f"{home}/cats"}], optimizer={"lr": 0.1}, x=[1, 2])
    record(root / "b", data=[{"path": f"{home}/cats"}], optimizer={"lr": 0.2, "beta": 1})
    (run / "samples").mkdir()
    for after in (16, 32):
        Image.new("RGB", (4, 4), (after, 0, 0)).save(run / "samples" / f"images-{after:012d}.png")
    (run / "run.log").write_text(f"going on from {home}/x\nbar 1%\rbar 2%\nhttps://a.b/c and/or\n")
    with client(root) as http:
        told = http.get("/api/runs/a").json()
        assert told["sheets"] == [16, 32]
        assert told["log"] == {
            "name": "run.log", "text": "going on from …/x\nbar 2%\nhttps://a.b/c and/or\n"
        }  # fmt: skip
        assert not told["stoppable"]
        sheet = http.get("/api/runs/a/samples/16")
        assert sheet.content == (run / "samples" / f"images-{16:012d}.png").read_bytes()
        assert sheet.headers["content-type"] == "image/png"
        settings = http.get("/api/runs/a/config").json()["settings"]
        assert settings["optimizer.lr"] == "0.1" and settings["run"] == '"…/a"'
        differ = http.get("/api/runs/a/config", params={"other": "b"}).json()["differences"]
        assert differ == [
            {"key": "optimizer.lr", "here": "0.1", "there": "0.2"},
            {"key": "x", "here": "[1, 2]", "there": None},
            {"key": "optimizer.beta", "here": None, "there": "1"},
        ]
        everything = [http.get(f"/api/runs{path}").text for path in ("", "/a", "/a/config")]
        assert "secret" not in "".join(everything) and str(root) not in "".join(everything)
    assert pathless(f"run:{home}, '/x y' ~/z C:\\d\\e 1/2") == "run:…/secret, '…/x y' …/z …/e 1/2"


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "..%2fout", "%2fetc", "a%00", "out", "link", ".hidden", "x" * 300],
)
def test_hostile_names_are_404(client: Client, tmp_path: Path, root: Path, name: str) -> None:
    outside = record(tmp_path / "out")
    metrics(outside, {"images": 1})
    record(root / ".hidden")
    record(root / "a")
    (root / "link").symlink_to(outside)
    (root / "a" / "samples").mkdir()
    (root / "a" / "samples" / "images-7.png").symlink_to(outside / "config.yaml")
    with client(root, manage=True) as http:
        assert [run["name"] for run in http.get("/api/runs").json()["runs"]] == ["a"]
        for path in ("", "/curves", "/config", "/samples/0"):
            assert http.get(f"/api/runs/{name}{path}").status_code in (404, 422)
        assert http.post(f"/api/runs/{name}/stop", json={}).status_code in (404, 422)
        assert http.get("/api/runs/a/config", params={"other": "../out"}).status_code == 404
        assert http.get("/api/runs/a/samples/7").status_code == 404
        assert http.get("/api/runs/a/samples/-1").status_code == 422
        answer = http.post("/api/runs/a/draw", json={"result": "../../out"})
        assert answer.status_code == 404


def test_only_who_manages_asks(client: Client, root: Path, asleep: Any) -> None:
    run = record(root / "a", validation={"every": "2 steps"})
    with client(root) as http:
        assert http.get("/api/runs").json()["manage"] is False
        for action in ("stop", "sample", "draw"):
            assert http.post(f"/api/runs/a/{action}", json={}).status_code == 403
    with client(root, manage=True) as http:
        for action in ("stop", "sample"):
            answer = http.post(f"/api/runs/a/{action}", json={})
            assert (answer.status_code, answer.json()["detail"]) == (409, "the run is not alive")
        assert http.post("/api/runs/a/draw", json={}).status_code == 404
        assert http.post("/api/runs/a/stop", json={"x": 1}).status_code == 422
        finished(run, "final")
        assert http.post("/api/runs/a/draw", json={}).json() == {"model": "a@final"}
        process = asleep(run)
        assert http.post("/api/runs/a/sample", json={}).status_code == 202
        assert (run / "asked" / "sample").is_file()
        assert http.post("/api/runs/a/stop", json={}).status_code == 202
        assert os.waitpid(process, 0)[1] == signal.SIGTERM
    with client(root, key="open sesame") as http:
        assert http.get("/api/runs").status_code == 401


def test_what_is_drawn_with_and_what_is_not(root: Path) -> None:
    run, shelf, runs = record(root / "a"), Shelf({}), Runs(root)
    finished(run, "checkpoints/" + name_of(16), "checkpoints/" + name_of(32), "final")
    (run / "final" / "model_index.json").unlink()  # of a LoRA
    assert runs.draw("a", None, shelf) == f"a@{name_of(32)}"
    assert shelf.models == {f"a@{name_of(32)}": run / "checkpoints" / name_of(32)}
    with pytest.raises(NoSuch, match="no such pipeline"):
        runs.draw("a", "final", shelf)
    with locked(run), pytest.raises(Conflict, match="has no validation"):
        runs.sample("a")


def test_a_run_that_the_page_stops_goes_on_to_the_same_bits(client: Client, root: Path) -> None:
    """With ten who watch as it trains."""
    settings = {"duration": "60 steps"}
    train(root / "plain", **settings)
    run, config = root / "stopped", root.parent / "config.yaml"
    config.write_text(yaml.safe_dump(tree(run, **settings)))
    with client(root, manage=True) as http:
        process = launch(TRAIN, "--config", config)
        watchers = [Runs(root) for _ in range(10)]

        def seen() -> bool:
            if steps(run) == 0:
                return False
            looks = [each.curves("stopped", 400, "")["curves"]["loss"] for each in watchers]
            every = {told["name"]: told for told in http.get("/api/runs").json()["runs"]}
            assert every["stopped"]["state"] == "alive"  # with its first number, if not before
            return all(len(look["y"]) >= 3 for look in looks)

        wait_for(seen, process)
        process.send_signal(signal.SIGSTOP)  # so that it is not over before it is asked
        assert http.post("/api/runs/stopped/stop", json={}).json() == {"asked": "stop"}
        process.send_signal(signal.SIGCONT)
        assert process.wait(300) == 75
        done = steps(run)
        told = http.get("/api/runs/stopped").json()
        assert (told["state"], told["images"], told["total"]) == ("stopped", 16 * done, 16 * 60)
        assert 3 <= done < 60 and told["drawable"] == [name_of(16 * done)]
        finish(launch(TRAIN, "--config", config))
        told = http.get("/api/runs/stopped").json()
        assert (told["state"], told["images"]) == ("finished", 16 * 60)
        curve = http.get("/api/runs/stopped/curves").json()["curves"]["loss"]
        assert curve["y"] == logged(run, "loss") == logged(root / "plain", "loss")
    assert digests(run / "final", at_least=3) == digests(root / "plain" / "final", at_least=3)


def test_samples_that_are_asked_for_change_no_bit_of_the_run(root: Path) -> None:
    """Nor do ten who watch."""
    settings = {"duration": "4 steps", "validation": {"every": "4 steps", "images": 4, "count": 1}}
    settings["validation"] |= {"prompts": ["a red circle"], "steps": 2, "captions": 0}
    plain, asked = root / "plain", root / "asked"
    (asked / "asked").mkdir(parents=True)
    (asked / "asked" / "sample").write_text("")
    for run in (plain, asked):
        train(run, **settings)
    assert not (asked / "asked" / "sample").exists()
    sheets = [sorted(file.name for file in (run / "samples").iterdir()) for run in (plain, asked)]
    assert [int(name[7:-4]) for name in sheets[0]] == [64]
    assert [int(name[7:-4]) for name in sheets[1]] == [16, 64]
    assert digests(plain / "final", at_least=3) == digests(asked / "final", at_least=3)
    assert logged(plain, "loss") == logged(asked, "loss")

    def state() -> dict[str, tuple[str, int]]:
        return {
            str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
            for file in sorted(root.rglob("*"))
            if file.is_file()
        }

    before = state()
    for _ in range(10):
        runs = Runs(root)
        assert [run["state"] for run in runs.list()] == ["finished", "finished"]
        told = runs.curves("asked", 400, "")["curves"]
        assert told["loss"]["y"] == logged(asked, "loss")
        assert told["held_out_loss"]["x"] == [16, 64]
        runs.told("asked"), runs.config("asked"), runs.differences("asked", "plain")
        runs.sheet("asked", 16)
    assert state() == before
