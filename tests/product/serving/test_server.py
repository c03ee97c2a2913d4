"""The server behind its wires: one tiny model, and every API."""

import base64
import io
import json
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from typer.testing import CliRunner

import tiny
from launched import launch, wait_for
from ldm.cli import app as command
from ldm.formats import lora
from ldm.formats.png import read_beside, read_parameters
from ldm.models.lora import attach, collect, weights
from ldm.pipeline import LatentDiffusionPipeline
from ldm.serving.draw import Draw
from ldm.serving.job import Job, State
from ldm.serving.limits import Limits
from ldm.serving.service import Service
from ldm.serving.shelf import Shelf

# What the extra "serve" brings; without it these are skipped.
TestClient = pytest.importorskip("starlette.testclient").TestClient
create_app = pytest.importorskip("ldm.serving.api.app").create_app
door = pytest.importorskip("ldm.serving.api.door")
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
KEY = "open sesame"
SHORT = {"steps": 2, "guidance": 3.0}


def adapter(file: Path, width: int = tiny.WIDTH) -> None:
    unet = tiny.unet()
    attach(unet, ["attn2.to_q", "attn2.to_v"], rank=2, alpha=2.0, dora=False)
    for number, weight in enumerate(weights(unet).values()):
        weight.data.normal_(generator=torch.Generator().manual_seed(number))
    read = {"unet": collect(unet)}
    if width != tiny.WIDTH:
        named = {f"{n}x": u for n, u in read["unet"].items()}
        read = {"unet": named}
    lora.write(read, file)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "loras").mkdir()
    adapter(folder / "loras" / "style.safetensors")
    adapter(folder / "loras" / "foreign.safetensors", 1)
    model = tiny.folder(folder / "tiny")
    return Shelf({"tiny": model}, folder / "loras")


@pytest.fixture(scope="module")
def service(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = Limits(count=4, steps=50, pixels=64 * 64, body=2**20, work=500.0)
    found = Service(shelf, tmp_path_factory.mktemp("served"), limits)
    found.start()
    yield found
    found.close()


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[Any]:
    app = create_app(service)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        client.headers["X-Client"] = "tests"
        yield client


def drawn(http: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The job of ``asked`` when it is over."""
    answer = http.post("/api/jobs", json=SHORT | asked)
    assert answer.status_code == 202, answer.text
    return told(http.get(f"/api/jobs/{answer.json()['id']}/events").text)[-1][1]


def told(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events."""
    found = []
    for block in filter(None, text.split("\n\n")):
        kind, data = block.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def file_of(http: Any, job: dict[str, Any], number: int = 0) -> bytes:
    answer = http.get(job["pictures"][number]["url"])
    assert answer.headers["content-type"] == "image/png"
    return answer.content


def pixels(data: bytes | str) -> Any:
    data = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(seed: int = 0, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_job_from_its_coming_to_its_picture(
    http: Any, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt": "a red heart", "count": 2, "seed": 7, "previews": 2, **SHORT}
    everybody = service.listen(lambda: None)
    stream = http.post("/api/jobs", json=asked, headers={"Accept": "text/event-stream"})
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = told(stream.text)
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "state" and kinds[-1] == "done" and kinds.count("picture") <= 2
    job = events[-1][1]
    assert job["state"] == "done" and [p["seed"] for p in job["pictures"]] == [7, 8]
    heard, end = everybody.take(), time.monotonic() + 30
    while heard[-1][0] != "done" and time.monotonic() < end:  # told behind who asked for it
        time.sleep(0.01)
        heard += everybody.take()
    service.leave(everybody)
    assert heard[0][0] == "taken" and heard[-1] == ("done", job)
    assert {"place", "step", "picture"} <= {kind for kind, _ in heard}
    assert {data["id"] for _, data in heard} == {job["id"]}
    assert job["settings"]["sampler"] == "dpm++" and job["settings"]["model"] == "tiny"
    file = tmp_path / "0.png"
    file.write_bytes(file_of(http, job))
    parameters, beside = read_parameters(file), read_beside(file)
    assert parameters is not None and beside is not None
    assert (parameters.seed, parameters.steps, parameters.model) == (7, 2, "tiny")
    # The same pixels as the pipeline draws, and as the command draws from the file alone.
    pipe = tiny.pipeline()
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "sampler": "dpm++"}
    plain = np.asarray(pipe("a red heart", seed=8, **call).images[0])
    assert np.array_equal(plain, pixels(file_of(http, job, 1)))
    again, model = tmp_path / "again.png", str(service.shelf.models["tiny"])
    line = ["sample", "--model", model, "--from", str(file), "--out", str(again)]
    result = CliRunner().invoke(command, line)
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(again.read_bytes()), pixels(file.read_bytes()))
    # So does one that is not guided, whose lone row is evaluated twice there as well.
    rows, evaluated = [], UNet2DConditionModel.forward

    def seen(network: Any, x: Any, *told: Any, **named: Any) -> Any:
        rows.append(len(x))
        return evaluated(network, x, *told, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", seen)
    other = tmp_path / "other.png"
    other.write_bytes(file_of(http, drawn(http, {"prompt": "a", "seed": 9, "guidance": 1.0})))
    line[line.index(str(file))] = str(other)
    result = CliRunner().invoke(command, line)
    assert result.exit_code == 0 and rows == [2] * 4, result.output
    assert np.array_equal(pixels(again.read_bytes()), pixels(other.read_bytes()))
    # And dropped back it says what it was.
    dropped = http.post("/api/settings", json={"image": text(file.read_bytes())}).json()
    settings = {"prompt": "a red heart", "seed": 7, "steps": 2, "guidance": 3.0, "width": 16}
    assert settings.items() <= dropped["settings"].items() and dropped["model"] == "tiny"
    same = drawn(http, dropped["settings"])
    assert file_of(http, same) == file.read_bytes()


def test_previews_are_seen_and_change_nothing(service: Service) -> None:
    engine, found = service.engine(None), {}
    for previews in (0, 3):
        draw = engine.how(Draw(seed=3, steps=6, guidance=2.0, previews=previews))
        job, heard = Job(draw, "a", 1.0, True, time.time() + 100), []
        job.tell = lambda kind, number=0, heard=heard, **data: heard.append((kind, data))
        found[previews] = engine.draw(job, 0).image
        shown = [data for kind, data in heard if kind == "preview"]
        assert len(shown) == previews
        assert [data["step"] for kind, data in heard if kind == "step"] == [1, 2, 3, 4, 5, 6]
        if shown:
            image = pixels(shown[-1]["image"].partition(",")[2])
            assert min(image.shape[:2]) >= 64 and image.std() > 1
    assert np.array_equal(*map(np.asarray, found.values()))


def test_pictures_at_once_are_those_alone(http: Any) -> None:
    image = {"image": text(png(noise())), "strength": 0.8}
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    asked = [
        {"prompt": "one", "seed": 1, "sampler": "euler-a", "steps": 4},
        {"prompt": "two", "seed": 2, "sampler": "dpm++", "guidance": 1.0, "steps": 3},
        {"prompt": "three " * 20, "seed": 3, "syntax": "a1111", "steps": 3},
        {"prompt": "four", "seed": 4, "width": 24, "sampler": "heun"},
        {"prompt": "five", "seed": 5, "loras": [{"name": "style", "weight": 0.5}]},
        {"prompt": "six", "seed": 6, "steps": 4} | image,
        {"prompt": "seven", "seed": 7, "mask": text(png(mask)), "feather": 0} | image | {
            "strength": 1.0},
        {"prompt": "eight", "seed": 8, "variation_seed": 1, "variation_strength": 0.5},
    ]  # fmt: skip
    alone = [file_of(http, drawn(http, each)) for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda each: file_of(http, drawn(http, each)), asked))
    assert [a == b for a, b in zip(alone, together, strict=True)] == [True] * len(asked)
    kept = np.asarray(mask) == 0
    assert np.array_equal(pixels(alone[6])[kept], np.asarray(noise())[kept])
    without = file_of(http, drawn(http, asked[4] | {"loras": []}))
    assert not np.array_equal(pixels(without), pixels(alone[4]))


def test_the_same_pixels_through_every_api(http: Any) -> None:
    want = pixels(file_of(http, drawn(http, {"prompt": "a", "seed": 5, "sampler": "euler-a"})))
    sent = {"prompt": "a", "seed": 5, "num_inference_steps": 2, "guidance_scale": 3.0}
    answer = http.post("/v1/images/generations", json=sent | {"n": 2, "size": "16x16"})
    data = answer.json()["data"]
    assert [each["seed"] for each in data] == [5, 6] and answer.json()["size"] == "16x16"
    usual = pixels(file_of(http, drawn(http, {"prompt": "a", "seed": 5})))
    assert np.array_equal(pixels(data[0]["b64_json"]), usual)
    answer = http.post("/sdapi/v1/txt2img", json=a1111(seed=5, prompt="a", steps=2, cfg_scale=3.0))
    assert answer.status_code == 200, answer.text
    assert np.array_equal(pixels(answer.json()["images"][0]), want)
    info = json.loads(answer.json()["info"])
    assert info["all_seeds"] == [5] and info["sampler_name"] == "Euler a"
    read = http.post("/sdapi/v1/png-info", json={"image": answer.json()["images"][0]}).json()
    assert read["info"] == info["infotexts"][0] and read["parameters"]["Seed"] == "5"


def a1111(**asked: Any) -> dict[str, Any]:
    """What webuiapi sends."""
    return {
        "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0,
        "hr_resize_x": 0, "hr_resize_y": 0, "denoising_strength": 0.7, "firstphase_width": 0,
        "firstphase_height": 0, "prompt": "", "styles": [], "seed": -1, "subseed": -1,
        "subseed_strength": 0.0, "seed_resize_from_h": 0, "seed_resize_from_w": 0,
        "batch_size": 1, "n_iter": 1, "steps": 20, "cfg_scale": 7.0, "width": 16, "height": 16,
        "restore_faces": False, "tiling": False, "do_not_save_samples": False,
        "do_not_save_grid": False, "negative_prompt": "", "eta": 1.0, "s_churn": 0, "s_tmax": 0,
        "s_tmin": 0, "s_noise": 1, "override_settings": {},
        "override_settings_restore_afterwards": True, "sampler_name": "Euler a",
        "sampler_index": "Euler a", "script_name": None, "script_args": [], "send_images": True,
        "save_images": False, "alwayson_scripts": {},
    } | asked  # fmt: skip


def test_a1111_fields_are_honoured_or_refused(http: Any) -> None:
    wrong = {
        "restore_faces": True, "tiling": True, "enable_hr": True, "script_name": "x/y/z plot",
        "alwayson_scripts": {"ControlNet": {"args": [{}]}}, "eta": 0.5, "styles": ["a"],
        "scheduler": "Karras", "sampler_name": "nothing", "something": 1, "s_churn": 1.0,
        "override_settings": {"CLIP_stop_at_last_layers": 2}, "width": 17, "prompt": None,
    }  # fmt: skip
    for name, value in wrong.items():
        answer = http.post("/sdapi/v1/txt2img", json=a1111(**{name: value}))
        assert answer.status_code == 422 and answer.json()["detail"], (name, answer.text)
    missing = http.post("/sdapi/v1/txt2img", json=a1111(prompt="a <lora:nothing:1>"))
    assert missing.status_code == 404
    image, mask = png(noise()), Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 16, 8))
    sent = a1111(init_images=[f"data:image/png;base64,{text(image)}"], denoising_strength=1.0,
                 mask=text(png(mask)), mask_blur=0, inpaint_full_res=False, resize_mode=0,
                 inpainting_fill=0, inpainting_mask_invert=1, steps=2, seed=1,
                 prompt="a <lora:style:0.5>")  # fmt: skip
    answer = http.post("/sdapi/v1/img2img", json=sent)
    assert answer.status_code == 200, answer.text
    found = pixels(answer.json()["images"][0])
    assert np.array_equal(found[8:], np.asarray(noise())[8:])
    assert not np.array_equal(found[:8], np.asarray(noise())[:8])
    get = {name: http.get(f"/sdapi/v1/{name}").json() for name in (
        "options", "samplers", "schedulers", "sd-models", "sd-vae", "loras", "embeddings",
        "upscalers", "memory", "cmd-flags", "scripts", "progress")}  # fmt: skip
    assert get["options"]["sd_model_checkpoint"] == "tiny" == get["sd-models"][0]["title"]
    assert {"Euler a", "DDIM"} <= {each["name"] for each in get["samplers"]}
    assert [each["name"] for each in get["loras"]] == ["foreign", "style"]
    assert get["progress"]["progress"] == 0.0 and get["progress"]["state"]["job_count"] == 0
    chosen = http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "tiny [abc123]"})
    assert chosen.status_code == 200
    assert http.post("/sdapi/v1/options", json={"sd_vae": "x"}).status_code == 422
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "x"}).status_code == 404


def test_what_is_masked_is_drawn_alone_and_put_back(http: Any, tmp_path: Path) -> None:
    photo, mask = noise(side=100), Image.new("L", (100, 100))  # more pixels than are drawn
    mask.paste(255, (40, 30, 60, 45))
    sides, call = {"height": 16, "width": 24}, {"strength": 0.8, "feather": 2, "seed": 5}
    want = np.asarray(tiny.pipeline()(
        "a", image=photo, mask_image=mask, padding_mask_crop=4, sampler="euler-a",
        prompt_syntax="a1111", num_inference_steps=2, guidance_scale=3.0, **sides, **call,
    ).images[0])  # fmt: skip
    image, hole = text(png(photo)), text(png(mask))
    asked = {"prompt": "a", "sampler": "euler-a", "syntax": "a1111", "image": image, "mask": hole,
             "mask_crop": 4, **sides, **call}  # fmt: skip
    file = file_of(http, drawn(http, asked))
    assert np.array_equal(pixels(file), want)
    seen = np.asarray(photo)
    assert np.array_equal(want[:28], seen[:28]) and not np.array_equal(want, seen)
    sent = a1111(init_images=[image], mask=hole, mask_blur=2, denoising_strength=0.8, steps=2,
                 cfg_scale=3.0, inpainting_fill=1, inpaint_full_res_padding=4, seed=5, prompt="a",
                 **sides)  # fmt: skip
    for told, same in (({}, True), ({"inpaint_full_res": False}, False)):
        answer = http.post("/sdapi/v1/img2img", json=sent | told)
        assert answer.status_code == 200, answer.text
        assert np.array_equal(pixels(answer.json()["images"][0]), want) is same
    # What the file says draws it again, at the size that was drawn.
    drop = http.post("/api/settings", json={"image": text(file)}).json()
    assert sides.items() <= drop["settings"].items()
    assert drop["edited"] == {"image": True, "mask": True, "feather": 2, "mask_crop": 4}
    files = {name: tmp_path / f"{name}.png" for name in ("from", "image", "mask", "out")}
    files["from"].write_bytes(file)
    photo.save(files["image"])
    mask.save(files["mask"])
    line = ["sample", "--model", str(tiny.folder(tmp_path / "tiny"))]
    line += [word for name, path in files.items() for word in (f"--{name}", str(path))]
    result = CliRunner().invoke(command, line)
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(files["out"].read_bytes()), want)
    wide = {"mask": None, "feather": None, "outpaint": [4000, 4000, 4000, 4000]}
    for wrong, said in (({"mask": None, "feather": None}, "mask_crop is that of a mask"),
                        (wide, "16,777,216"), ({"width": 17}, "multiple of 2")):  # fmt: skip
        answer = http.post("/api/jobs", json=SHORT | asked | wrong)
        assert answer.status_code == 422 and said in answer.json()["detail"], answer.text


def test_openai_edits_keep_what_is_opaque(http: Any) -> None:
    image, mask = noise(), Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 8, 16))
    files = {"image": ("a.png", png(image), "image/png"), "mask": ("m.png", png(mask))}
    sent = {"prompt": "a", "num_inference_steps": "2", "guidance_scale": "3", "seed": "1"}
    answer = http.post("/v1/images/edits", data=sent, files=files)
    assert answer.status_code == 200, answer.text
    found, before = pixels(answer.json()["data"][0]["b64_json"]), np.asarray(image)
    # The feather is that of the pipeline, a latent cell, beyond what is transparent.
    assert np.array_equal(found[:, 10:], before[:, 10:])
    assert not np.array_equal(found[:, :8], before[:, :8])
    one = {"image": files["image"]}
    varied = http.post("/v1/images/variations", data={"num_inference_steps": "2"}, files=one)
    assert varied.status_code == 200, varied.text
    models = http.get("/v1/models").json()["data"]
    assert [each["id"] for each in models] == ["tiny"]
    opaque = {"image": files["image"], "mask": ("m.png", png(image))}
    wrong: list[Any] = [
        http.post("/v1/images/edits", data=sent, files=opaque),
        http.post("/v1/images/edits", data=sent | {"input_fidelity": "high"}, files=one),
        http.post("/v1/images/edits", data=sent | {"n": "11"}, files=one),
        http.post("/v1/images/generations", json={"prompt": "a", "response_format": "url"}),
        http.post("/v1/images/generations", json={"prompt": "a", "quality": "hd"}),
        http.post("/v1/images/generations", json={"prompt": "a", "n": True}),
        http.post("/v1/images/generations", json={"n": 1}),
    ]
    assert [each.status_code for each in wrong] == [400] * len(wrong)
    assert all(each.json()["error"]["message"] for each in wrong)
    none = http.post("/v1/images/generations", json={"prompt": "a", "model": "gpt-image-1"})
    assert none.status_code == 404 and "tiny" in none.json()["error"]["message"]
    sent = {"prompt": "a", "stream": True, "partial_images": 2, "num_inference_steps": 6}
    events = told(http.post("/v1/images/generations", json=sent | {"size": "16x16"}).text)
    assert events[-1][0] == events[-1][1]["type"] == "image_generation.completed"
    assert pixels(events[-1][1]["b64_json"]).shape == (16, 16, 3)


def test_a_full_queue_is_fair_and_is_left(http: Any, service: Service) -> None:
    network = service.engine(None).network
    with network.alone():  # nobody draws
        mine = [http.post("/api/jobs", json=SHORT | {"count": 4, "steps": 7}) for _ in range(8)]
        assert [each.status_code for each in mine] == [202] * 8  # 448 of 500
        places = [each.json()["place"] for each in mine]
        # Eight pictures are with the drawers, or are going to be.
        assert places[-1] is not None and places[-1] >= 16
        full = http.post("/api/jobs", json=SHORT | {"count": 4, "steps": 7})
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        other = http.post("/api/jobs", json=SHORT, headers={"X-Client": "other"}).json()
        assert other["place"] is None or other["place"] <= 2
        shown = {j["id"] for j in http.get("/api/jobs", params={"limit": 9}).json()["jobs"]}
        assert {each.json()["id"] for each in mine} | {other["id"]} == shown
        gone = http.delete(f"/api/jobs/{mine[-1].json()['id']}").json()
        assert gone["state"] == "cancelled"
        progress = http.get("/sdapi/v1/progress").json()["state"]
        assert progress["job_count"] == 7
        assert http.post("/sdapi/v1/interrupt").status_code == 200
        assert "ldm_queue_work" in http.get("/metrics").text
    for each in mine:
        last = told(http.get(f"/api/jobs/{each.json()['id']}/events").text)[-1]
        assert last[0] == "done" and last[1]["state"] == "cancelled"
    last = told(http.get(f"/api/jobs/{other['id']}/events").text)[-1][1]
    assert last["state"] == "done"  # nobody else's are


def test_what_is_wrong_is_one_line_that_names_no_path(http: Any, service: Service) -> None:
    image, kind = text(png(noise(side=128))), {"Content-Type": "application/json"}
    wrong = {
        404: [{"loras": [{"name": "nothing"}]}, {"model": "nothing"}, {"model": "../tiny"},
              {"loras": [{"name": "../loras/style"}]}],
        422: [{"loras": [{"name": "foreign"}]}, {"width": 17}, {"steps": 51}, {"count": 5},
              {"width": 1024, "height": 1024}, {"image": image}, {"image": "aGFsbG8="},
              {"prompt": "a\0b"}, {"prompt": "\ud800"}, {"steps": True}, {"x": 1},
              {"sampler": "langevin"}, {"sampler": "flow-euler"},
              {"steps": 50, "count": 4, "width": 64}, {"sampler": "euler", "image": ""}],
    }  # fmt: skip
    for status, several in wrong.items():
        for asked in several:
            answer = http.post("/api/jobs", content=json.dumps(SHORT | asked), headers=kind)
            assert answer.status_code == status, (asked, answer.text)
            line = answer.json()["detail"]
            assert line and "\n" not in line and str(service.folder.parent) not in line
            assert "/tmp" not in line and "safetensors" not in line, line
    assert http.post("/api/jobs", content="{", headers=kind).status_code == 400
    assert http.post("/api/jobs", content="x" * (2**20 + 1), headers=kind).status_code == 413
    pieces = http.post("/api/jobs", content=iter([b"x" * 2**19] * 3), headers=kind)
    assert pieces.status_code == 413
    for path in ("/api/jobs/" + "0" * 28, "/api/pictures/..%2Fjobs", "/api/nothing", "/x"):
        assert http.get(path).status_code == 404
    info = http.get("/api/info").json()
    assert info["model"] == {
        "name": "tiny", "width": 16, "height": 16, "multiple": 2, "steps": 30, "guidance": 7.5,
        "sampler": "dpm++", "classes": None, "exact": True,
    }  # fmt: skip
    assert {"ddim", "euler-a", "ode-heun", "model"} <= {*info["samplers"]}
    assert "flow-euler" not in info["samplers"]  # no flow
    assert info["loras"] == ["foreign", "style"] and info["limits"]["count"] == 4
    counted = http.post("/api/tokens", json={"text": "a red heart", "syntax": "a1111"}).json()
    assert counted["towers"] == [{"tokens": 11, "length": 24, "windows": 1}]
    assert http.get("/healthz").json()["exact"] is True
    answer = http.get("/openapi.json")
    assert answer.json()["paths"]["/api/jobs"]["post"]["responses"].keys() >= {"202", "422", "429"}
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_the_door_asks_everybody(service: Service) -> None:
    inner = create_app(service, key=KEY)
    bare = TestClient(inner, "http://localhost", raise_server_exceptions=False)
    routes = [route for route in _routes(inner)]
    assert len(routes) > 30
    for method, path in routes:
        answer = bare.request(method, path)
        assert answer.status_code == 401 and "www-authenticate" in answer.headers, path
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    for value, status in ((f"Bearer {KEY}", 200), (f"Basic {basic}", 200), ("Bearer x", 401),
                          (f"Digest {KEY}", 401), ("Basic ?", 401)):  # fmt: skip
        answer = bare.get("/healthz", headers={"Authorization": value})
        assert answer.status_code == status, value

    async def anything(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    inner = door.Door(anything, hosts=door.LOCAL, body=10)
    outside = TestClient(inner, "http://localhost:7860")
    own = {"Origin": "http://localhost:7860"}
    cases: list[tuple[dict[str, str], int]] = [
        ({}, 200), (own, 200), ({"Host": "127.0.0.1:7860"}, 200), ({"Host": "[::1]:7860"}, 200),
        ({"Host": "evil.example"}, 400), ({"Host": "evil.example:7860"}, 400),
        ({"Origin": "http://evil.example"}, 400), ({"Origin": "null"}, 400),
        ({"Sec-Fetch-Site": "cross-site"}, 400), ({"Content-Length": "11"}, 413),
        ({"Content-Length": "-1"}, 413),
    ]  # fmt: skip
    assert [(h, outside.get("/", headers=h).status_code) for h, _ in cases] == cases


def _routes(door: Any) -> Iterator[tuple[str, str]]:
    for path, methods in door._app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path
    yield from (("GET", "/openapi.json"), ("GET", "/"), ("GET", "/anything.js"))


def test_a_server_that_is_killed_goes_on(shelf: Shelf, tmp_path: Path) -> None:
    out, model = tmp_path / "out", shelf.models["tiny"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        "-m",
        "ldm.cli",
        "serve",
        "--model",
        model,
        "--out",
        out,
        "--port",
        port,
        "--drain",
        300,
    ]

    def asked(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, kind)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())

    first = launch(*map(str, line))
    shown: list[str] = []
    wait_for(lambda: shown.append(first.stdout.read()) or "ready: " in "".join(shown), first)
    assert "exact" in "".join(shown) and "NOT" not in "".join(shown)
    jobs = [
        asked("/api/jobs", {"prompt": f"{n}", "seed": n, "steps": 40 if n else 2, "guidance": 3.0})
        for n in range(4)
    ]
    wait_for(lambda: len([*out.glob("*.png")]) >= 1, first)
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    before = {file.name: file.read_bytes() for file in out.glob("*.png")}
    assert 1 <= len(before) < 4
    second = launch(*map(str, line))
    wait_for(lambda: len([*out.glob("*.png")]) == 4, second)
    for file in out.glob("*.png"):
        assert before.get(file.name, file.read_bytes()) == file.read_bytes()
    wait_for(lambda: {j["state"] for j in asked("/api/jobs")["jobs"]} == {"done"}, second)
    assert {job["id"] for job in asked("/api/jobs")["jobs"]} == {job["id"] for job in jobs}
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    call = {"num_inference_steps": 40, "guidance_scale": 3.0, "sampler": "dpm++", "seed": 3}
    plain = np.asarray(pipe("3", **call).images[0])
    assert np.array_equal(plain, pixels((out / f"{jobs[3]['id']}-0.png").read_bytes()))
    # A signal lets those who wait have their answer.
    with ThreadPoolExecutor(1) as pool:
        sent = {"prompt": "a", "num_inference_steps": 30, "guidance_scale": 1.0}
        waits = pool.submit(asked, "/v1/images/generations", sent)
        wait_for(lambda: asked("/healthz")["jobs"] == 1, second)
        second.send_signal(signal.SIGTERM)
        assert len(waits.result(300)["data"]) == 1
    assert second.wait(300) in (0, -signal.SIGTERM)


def test_what_is_left_is_drawn_by_the_next(shelf: Shelf, tmp_path: Path) -> None:
    first = Service(shelf, tmp_path)  # which never starts to draw
    job = first.submit(Draw(prompt="a", seed=1, count=2, **SHORT), "a", kept=True)
    gone = first.submit(Draw(prompt="b", **SHORT), "b", kept=False)
    assert job.told()["settings"]["seed"] == 1 and job.state is State.QUEUED
    first.close()
    second = Service(shelf, tmp_path)
    second.start()
    end = time.monotonic() + 60
    while second.jobs and time.monotonic() < end:
        time.sleep(0.02)
    found = second.find(job.id)
    assert found is not None and found.state is State.DONE and len(found.pictures) == 2
    left = second.find(gone.id)
    assert left is not None and left.state is State.CANCELLED and "has ended" in str(left.error)
    second.drain()
    ending = TestClient(create_app(second), "http://localhost")
    assert told(ending.get("/api/events").text) == [("state", {"jobs": []})]
    assert ending.get("/healthz").status_code == 503
    refused = ending.post("/api/jobs", json=SHORT)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    second.close()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["--host", "0.0.0.0"], "give it a key"),
        (["--key", "nowhere"], "there is no such file"),
        ([], "--model is missing"),
        (["--loras", "nowhere"], "--loras nowhere: there is no such folder"),
    ],
    ids=str,
)
def test_a_server_that_cannot_start_says_why(
    line: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LDM_SERVE_KEY", raising=False)
    model = ["--model", "model"] if "--loras" in line else []
    result = CliRunner().invoke(command, ["serve", *line, *model])
    assert result.exit_code == 2 and told in result.stderr, result.stderr
