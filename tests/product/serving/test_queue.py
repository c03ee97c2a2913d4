"""What waits and in which order, without a model and without wires."""

import io
import json
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from ldm.formats.png import Parameters
from ldm.serving.draw import Draw, content, limited
from ldm.serving.gallery import Gallery
from ldm.serving.job import Job, State, Stopped
from ldm.serving.limits import Full, Limits, Rate, work
from ldm.serving.pictures import bounded, flat
from ldm.serving.queue import Queue
from ldm.serving.shelf import NoSuch, Shelf, models_of


def job(client: str = "a", count: int = 1, each: float = 10.0, **more: Any) -> Job:
    kept, until = more.pop("kept", True), more.pop("until", time.time() + 1000)
    draw = Draw(prompt="p", count=count, seed=1, steps=3, guidance=2.0, **more)
    return Job(draw, client, each, kept, until)


def queue(**limits: Any) -> Queue:
    return Queue(Limits(**limits), Rate())


def drawn(queue: Queue) -> list[tuple[str, int]]:
    queue.close()
    return [(job.client, number) for job, number in iter(queue.take, None)]


def test_clients_take_turns_and_places_say_so() -> None:
    waiting = queue()
    many, two, one = job("many", 4), job("two", 2), job("one", 1)
    for each in (many, two, one):
        waiting.put(each)
    assert waiting.work() == 70
    places = {many.id: (0, 0.0), two.id: (1, 10.0), one.id: (2, 20.0)}
    assert waiting.places() == places
    first = waiting.take()
    assert first == (many, 0) and waiting.drawing(many)
    assert waiting.places()[two.id] == (0, 10.0)  # behind what is being drawn
    waiting.finished(many, 0)
    assert not waiting.drawing(many) and waiting.work() == 60
    order = [("two", 0), ("one", 0), ("many", 1), ("two", 1), ("many", 2), ("many", 3)]
    assert drawn(waiting) == order


def test_the_queue_is_bounded_in_work() -> None:
    waiting = queue(work=100.0)
    waiting.put(job(count=9))
    with pytest.raises(Full, match="try again in 1 s") as full:
        waiting.put(job("other", count=2))
    assert full.value.seconds == 1
    waiting._rate.add(10, 40.0)  # four seconds for a unit of it
    with pytest.raises(Full) as full:
        waiting.put(job("other", count=3))
    assert full.value.seconds == 80  # until what is over has been drawn
    waiting.put(job("other", count=1))
    waiting.put(job("restarted", count=50), bounded=False)
    assert work(30, guided=True, pixels=4, own=2) == 120
    few = queue(jobs=1)
    few.put(job())
    with pytest.raises(Full):
        few.put(job())


def test_a_closed_queue_gives_what_is_wanted_and_then_nothing() -> None:
    waiting = queue()
    for each in (job("a", 2), job("b", 2, kept=False)):
        waiting.put(each)
    waiting.close()
    found = [waiting.take(lambda job: not job.kept) for _ in range(3)]
    assert [taken and (taken[0].client, taken[1]) for taken in found] == [("b", 0), ("b", 1), None]
    empty, woken = queue(), []
    thread = threading.Thread(target=lambda: woken.append(empty.take()))
    thread.start()
    empty.close()
    thread.join(10)
    assert woken == [None]


def test_a_job_is_stopped_once_and_tells_the_latest() -> None:
    stopped = job()
    stopped.check()
    stopped.stop()
    stopped.stop(State.EXPIRED)
    with pytest.raises(Stopped, match="cancelled"):
        stopped.check()
    late = job(until=time.time() - 1)
    with pytest.raises(Stopped, match="expired"):
        late.check()
    woken: list[int] = []
    told = job(count=2)
    listener = told.listen(lambda: woken.append(1))
    for step in range(1, 200):
        told.step(1, step, 200)
    told.shown(0, 3, "data:,")
    told.tell("place", place=1)
    kinds = [("place", {"place": 1}), ("step", {"picture": 1, "step": 199, "steps": 200}),
             ("preview", {"picture": 0, "step": 3, "image": "data:,"})]  # fmt: skip
    assert listener.take() == kinds and listener.take() == [] and len(woken) == 201
    assert told.end(State.DONE) and not told.end(State.FAILED) and told.state is State.DONE
    assert told.leave(listener) == 0


def test_files_are_found_again(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "out")
    one, two, other = job(count=2, image="aGFsbG8=", strength=0.5), job(), job("c", kept=False)
    for each in (one, two, other):
        gallery.take(each)
    name = gallery.add(one, 1, Image.new("RGB", (4, 4)), Parameters("p"), {"seed": 2})
    assert gallery.picture(name) == tmp_path / "out" / name
    for wrong in (f"../{name}", "jobs", f"{one.id}-7.png", f"jobs/{one.id}.json", ""):
        assert gallery.picture(wrong) is None
    two.state = State.DONE
    gallery.write(two)
    (tmp_path / "out" / "jobs" / f"{'0' * 28}.json").write_text("{")
    found = gallery.unfinished()
    assert {each.id for each in found} == {one.id, other.id}
    again = next(each for each in found if each.id == one.id)
    assert again.draw == one.draw and again.pictures == {1: name} and again.left() == [0]
    assert (again.client, again.work, again.until) == (one.client, one.work, one.until)
    assert sorted(gallery.ids(), reverse=True) == [*gallery.ids()] and len([*gallery.ids()]) == 4
    one.end(State.DONE)
    gallery.write(one)
    assert not [*(tmp_path / "out" / "jobs").glob("*.bin")]
    over = gallery.job(one.id)
    assert over is not None and over.told()["edited"] == {"image": True, "mask": False}
    gallery.forget(one)
    assert gallery.job(one.id) is None


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"steps": True}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": "3"}, "steps"),
        ({"steps": 51}, "steps"),
        ({"count": 0}, "count"),
        ({"count": 9}, "count"),
        ({"seed": 2**32}, "seed"),
        ({"width": 20}, "width"),
        ({"height": 4096}, "height"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"prompt": "x" * 101}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"sampler": "nothing"}, "sampler"),
        ({"syntax": "compel"}, "syntax"),
        ({"image": "?"}, "image"),
        ({"image": ""}, "image"),
        ({"mask": "aGFsbG8="}, ""),
        ({"strength": 0.5}, ""),
        ({"image": "aGFsbG8=", "feather": 3}, ""),
        ({"image": "aGFsbG8=", "outpaint": [0, 0, 0, 0]}, "outpaint"),
        ({"image": "aGFsbG8=", "outpaint": [1, 1, 1]}, "outpaint"),
        ({"loras": [{"name": "a"}, {"name": "a"}]}, ""),
        ({"loras": [{"name": "a", "weight": "1"}]}, "loras.0.weight"),
        ({"something": 1}, "something"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_told(wrong: dict[str, Any], where: str) -> None:
    asked = limited(Limits(count=8, steps=50, side=1024, text=100), 8)
    with pytest.raises(ValidationError) as error:
        asked.model_validate(wrong)
    assert ".".join(map(str, error.value.errors()[0]["loc"])) == where


def test_a_request_says_its_bounds() -> None:
    asked = limited(Limits(count=8, steps=50, side=1024, text=100), 8)
    fields = asked.model_json_schema()["properties"]
    side = {"type": "integer", "minimum": 8, "maximum": 1024, "multipleOf": 8}
    assert fields["width"]["anyOf"][0] == side
    assert fields["count"]["maximum"] == 8 and fields["prompt"]["maxLength"] == 100
    assert asked(sampler="Euler a", variation_seed=2**32 - 1, seed=7).seeds(1) == (7, 0)
    assert asked(sampler="Euler a").sampler == "euler-a"
    assert content("data:image/png;base64,aGFsbG8=") == content("aGFsbG8=") == b"hallo"


def test_names_are_those_of_the_folders_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model_index.json").write_text(json.dumps({}))
    (tmp_path / "models" / "three").mkdir()
    loras = tmp_path / "loras"
    loras.mkdir()
    (loras / "style.safetensors").touch()
    for name in ("few", "style"):
        (loras / name).mkdir()
        (loras / name / "pytorch_lora_weights.safetensors").touch()
    (loras / "few" / "other.safetensors").touch()
    (tmp_path / "secret.safetensors").touch()
    first = tmp_path / "models" / "two"
    shelf = Shelf(models_of([first], tmp_path / "models"), loras)
    assert [*shelf.models] == ["two", "one"] and shelf.model(None) == ("two", first)
    assert [*shelf.loras()] == ["few", "style"]
    assert shelf.lora("style") == loras / "style.safetensors"
    assert shelf.lora("few") == loras / "few" / "pytorch_lora_weights.safetensors"
    for name in ("../secret", "secret", "", "style.safetensors", str(tmp_path / "secret")):
        with pytest.raises(NoSuch):
            shelf.lora(name)
    with pytest.raises(NoSuch, match="there are two, one"):
        shelf.model("../models/one")
    other = tmp_path / "other" / "one"
    with pytest.raises(ValueError, match="two models are called 'one'"):
        models_of([other], tmp_path / "models")


def test_a_picture_is_bounded_before_it_is_decoded() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(file, "PNG")
    small = file.getvalue()
    assert flat(small, "image").getpixel((0, 0)) == (255, 255, 255)
    assert flat(small, "mask", white=False).getpixel((0, 0)) == (0, 0, 0)
    for side in (5000, 20_000, 100_000):  # which the header says, and no pixel
        large = bytearray(small)
        large[16:24] = struct.pack(">II", side, side)
        large[29:33] = struct.pack(">I", zlib.crc32(large[12:29]))
        with pytest.raises(ValueError, match="image: a picture of more than 16,777,216 pixels"):
            bounded(bytes(large), "image")
    with pytest.raises(ValueError, match="mask: it is no picture"):
        bounded(b"hello", "mask")
