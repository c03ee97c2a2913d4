"""Model cards, and models on the Hub: a server of this machine stands for it."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

import tiny
from ldm.cli.main import app
from ldm.formats.card import NAME, SHEET, write
from ldm.pipeline import LatentDiffusionPipeline

CONFIG = {
    "run": "/srv/somebody/runs/cats", "seed": 3, "model": "someone/apples@v1",
    "data": [{"kind": "datasets", "path": "someone/cats"},
             {"kind": "folder", "path": "/srv/somebody/pictures"}],
    "images": {"size": 16}, "batch_size": 16, "duration": "6 steps", "optimizer": {"lr": 1e-4},
    "train": ["unet"], "validation": {"prompts": ["a grey cat"]}, "precision": "auto",
}  # fmt: skip
COMMIT = "https://huggingface.co/someone/cats/commit/1"
SHARE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("hub") / "model")


def run_of(folder: Path, run: Path) -> Path:
    """A run folder with all that a card tells."""
    shutil.copytree(folder, run / "final")
    (run / "samples").mkdir()
    for seen, colour in ((8, "red"), (96, "blue")):
        Image.new("RGB", (4, 4), colour).save(run / "samples" / f"images-{seen:012d}.png")
    table = "| suite | figure | n | measured |\n|---|---|---|---|\n| shapes | binding | 8 | 50 |\n"
    (run / "samples" / f"images-{96:012d}.md").write_text(table)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (run / "environment.json").write_text(
        json.dumps({"git": "abc", "python": "3.11", "packages": {"torch": "2.9"}})
    )
    lines = [{"images": 96, "held_out_loss": 1.0669}, {"images": 96, "loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"ima')
    score = {"measure": "nearest is the one", "gallery": 60,
             "scores": [{"source": "cats", "drawn": {"top1": SHARE, "top5": SHARE}}]}  # fmt: skip
    (run / "score.json").write_text(json.dumps(score))
    return run


def ldm(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(*arguments: object) -> str:
    result = ldm(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_a_card_tells_of_the_run(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, tmp_path / "cats")
    measured = tmp_path / "evaluation"
    measured.mkdir()
    record = {"data": "/srv/somebody/shapes", "measured": [{"drawing": {"steps": 30}}]}
    (measured / "figures.json").write_text(json.dumps(record))
    (measured / "table.md").write_text("| a table |\n")
    done = ldm("card", run, "--license", "cc-by-4.0", "--figures", measured)
    file = run / "final" / NAME
    assert done.exit_code == 0 and done.stdout.strip() == str(file)
    text, data = file.read_text(), ModelCard.load(file).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "cc-by-4.0", "diffusers", "text-to-image",
    )  # fmt: skip
    assert (data.base_model, data.datasets) == ("someone/apples", ["someone/cats"])
    assert {"stable-diffusion", "text-to-image", "diffusers-training"} <= set(data.tags)
    told = ["# cats", "trained from `someone/apples@v1` on `someone/cats` (datasets),",
            'from_pretrained("cats")', "pipe('a grey cat', seed=0)", f"]({SHEET})",
            "Licence: cc-by-4.0.", "Held-out loss 1.067 after 96 images", "| binding | 8 | 50 |",
            "| cats | drawn | 50.0 % [25.0, 75.0] |", "compared with `shapes` (steps 30)",
            "| a table |", "| learning rate | 0.0001 |", "torch 2.9; code abc",
            ".../pictures"]  # fmt: skip
    assert [each for each in told if each not in text] == []
    assert "somebody" not in text
    assert Image.open(run / "final" / SHEET).getpixel((0, 0)) == (0, 0, 255)
    # What was written above the title stays, and the rest is written anew.
    file.write_text(text.replace("library_name: diffusers", "library_name: ldm") + "\nmore\n")
    assert ldm("card", run / "final").exit_code == 0
    again = file.read_text()
    assert "library_name: ldm" in again and "license: cc-by-4.0" in again and "more" not in again
    file.write_text("# by hand\n")
    assert refused("card", run) == f"error: {file} was not written by ldm card: --replace writes" \
        " it anew"  # fmt: skip
    assert file.read_text() == "# by hand\n" and ldm("card", run, "--replace").exit_code == 0
    LatentDiffusionPipeline.from_pretrained(run / "final")


def test_a_card_of_what_is_no_run(folder: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(folder, tmp_path / "alone")
    text = write(alone).read_text()
    assert "# alone" in text and "Licence: none is stated." in text and "Training" not in text
    lora = tmp_path / "lora" / "final"
    lora.mkdir(parents=True)
    (lora / "pytorch_lora_weights.safetensors").touch()
    (lora.parent / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": "/srv/x/base"}))
    assert ldm("card", lora.parent).exit_code == 0
    text = (lora / NAME).read_text()
    assert 'pipe.load_lora_weights("lora")' in text and 'from_pretrained(".../base")' in text
    assert "base_model" not in text and "- lora\n" in text
    assert "is no model" in refused("card", tmp_path)
    assert "there is no such folder" in refused("card", tmp_path / "x")
    assert "no figures.json" in refused("card", alone, "--figures", tmp_path)


class Hub:
    """What the Hub answers to an upload, and what it was sent."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def answer(self, value: object, status: int = 200) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                if status == 404:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            def do_HEAD(self) -> None:
                there = self.path.partition("/resolve/main/")[2] in hub.files
                self.answer({}, 200 if there else 404)  # and its hash is not asked for

            do_GET = do_HEAD

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if hub.status != 200:
                    return self.answer({"error": "no"}, hub.status)
                if self.path.startswith("/api/repos/create"):
                    self.answer(
                        {"url": f"https://huggingface.co/someone/{json.loads(body)['name']}"}
                    )
                elif "/preupload/" in self.path:
                    asked = json.loads(body)["files"]
                    self.answer({"files": [{"path": one["path"], "uploadMode": "regular",
                                            "shouldIgnore": False} for one in asked]})  # fmt: skip
                elif "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    hub.commits.append(lines[0]["value"]["summary"])
                    for line in lines[1:]:
                        value = line["value"]
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    self.answer({"commitUrl": COMMIT, "commitOid": "1", "hookOutput": ""})
                else:
                    self.answer({"errors": [], "warnings": []})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    served = Hub()
    address = f"http://127.0.0.1:{served.server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    place = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_a_whole_folder_is_one_commit(folder: Path, tmp_path: Path, hub: Hub) -> None:
    run = run_of(folder, tmp_path / "cats")
    final = run / "final"
    (final / "training").mkdir()
    (final / "training" / "raw.safetensors").write_bytes(b"state")
    (final / ".hidden.json").write_text("{}")
    (final / "notes.pt").write_bytes(b"pickled")
    done = ldm("push", run, "someone/cats", "--yes", "--license", "mit", "--message", "Cats")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == COMMIT
    assert hub.commits == ["Cats"]
    parts = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(hub.files) == parts | {NAME, SHEET}
    assert all(hub.files[name] == (final / name).read_bytes() for name in hub.files)
    # From Python the card of the repository stays.
    hub.files[NAME] = b"theirs"
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    hub.files.pop("unet/config.json")
    assert pipe.push_to_hub("someone/cats") == COMMIT
    assert hub.files[NAME] == b"theirs" and "unet/config.json" in hub.files
    kept = tmp_path / "kept"
    pipe.save_pretrained(kept, push_to_hub=True, repo_id="someone/cats", commit_message="More")
    assert hub.commits[-1] == "More" and (kept / "model_index.json").is_file()


def test_what_is_missing_is_one_line(folder, tmp_path, hub, monkeypatch) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    asked = ("push", model, "someone/cats")
    assert refused(*asked).endswith("whether to upload: pass --yes")
    for status, told in ((401, "the Hub refuses the token (401): log in"), (500, "does not take")):
        hub.status = status
        assert told in refused(*asked, "--yes")
    hub.server.shutdown()
    hub.server.server_close()
    assert "the Hub cannot be reached (" in refused(*asked, "--yes")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids the network" in refused(*asked, "--yes")
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(OSError, match="^someone/cats: HF_HUB_OFFLINE forbids the network"):
        pipe.push_to_hub("someone/cats")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token of the Hub: log in with" in refused(*asked, "--yes")
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet" in refused(*asked, "--yes") and hub.files == {}
    assert "holds no model_index.json" in refused("push", tmp_path, "someone/cats")
    shutil.rmtree(model)
    assert "there is no such folder" in refused(*asked)
