"""The page in Chromium: one server and one browser, and a tiny model."""

import base64
import io
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from ldm.serving.job import Job
from ldm.serving.limits import Limits
from ldm.serving.service import Service
from ldm.serving.shelf import Shelf

# What the extras bring; without them, or without the browser, these are skipped.
uvicorn = pytest.importorskip("uvicorn")
create_app = pytest.importorskip("ldm.serving.api.app").create_app
Page = pytest.importorskip("ldm.serving.api.page").Page
Watching = pytest.importorskip("ldm.serving.api.watching").Watching
playwright = pytest.importorskip("playwright.sync_api", reason="the page needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page needs chromium")

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
OVER = ".job.over"
BYTES, REQUESTS = 120_000, 12  # of a first load


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("page")
    (folder / "loras").mkdir()
    (folder / "loras" / "style.safetensors").touch()  # of which only the name is looked at
    shelf = Shelf({"tiny": tiny.folder(folder / "tiny")}, folder / "loras")
    service = Service(shelf, folder / "served", Limits(steps=50, pixels=64 * 64))
    service.start()
    return service


@contextmanager
def served(service: Service, **how: Any) -> Iterator[str]:
    """The address of a page over ``service``."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        app = create_app(service, hosts=["127.0.0.1"], page=Page(), **how)
        config = uvicorn.Config(app, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        yield f"http://127.0.0.1:{port.getsockname()[1]}/"
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with served(service) as address:
        yield address
        service.close()  # which ends the streams that are open


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page as somebody else each time; nobody's console may say anything."""
    contexts, said = list[Any](), list[str]()

    def one(tab: str = "draw", size: dict[str, int] = DESK, **how: Any) -> Any:
        context = browser.new_context(viewport=size, **how)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda line: line.type == "error" and said.append(line.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{address}#{tab}")
        page.wait_for_selector("[name=steps]:valid")
        # A function: the text of one would be evaluated anew at each look, which the page forbids.
        page.wait_for_function("() => document.querySelector('[name=sampler]').value === 'dpm++'")
        return page

    one.said = said  # type: ignore[attr-defined]
    yield one
    for context in contexts:
        context.close()
    assert said == []


class Gate:
    """Pictures stop at the step ``at`` until it is opened; each other step takes ``seconds``."""

    def __init__(self) -> None:
        self.at, self.seconds, self.open = 0, 0.0, threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found, step = Gate(), Job.step

    def slow(job: Job, number: int, done: int, of: int) -> None:
        step(job, number, done, of)
        time.sleep(found.seconds)
        if done == found.at:
            found.open.wait(60)

    monkeypatch.setattr(Job, "step", slow)
    yield found
    found.open.set()


def newest(page: Any) -> str:
    """The id of the newest job that is shown, "" for none."""
    return page.evaluate("document.querySelector('.job')?.id ?? ''")


def drawn(page: Any, act: Callable[[], Any]) -> Any:
    """The card of the job that ``act`` asks for, when it is over."""
    before = newest(page)
    act()
    page.wait_for_function("(b) => (document.querySelector('.job')?.id ?? '') !== b", arg=before)
    name = newest(page)
    page.wait_for_selector(f"#{name}.over")
    return page.locator(f"#{name}")


def press(page: Any) -> Callable[[], Any]:
    return lambda: page.click("#settings button.main")


def file_of(page: Any, card: Any, number: int = 0) -> bytes:
    """The bytes that "Save" of a picture saves."""
    with page.expect_download() as saved:
        card.get_by_role("link", name="Save").nth(number).click()
    return Path(saved.value.path()).read_bytes()


def drop(page: Any, data: bytes) -> None:
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], "a.png", { type: "image/png" }));
            const how = { dataTransfer: carried, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("drop", how));
        }""",
        base64.b64encode(data).decode(),
    )


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_first_load_is_small_and_from_here(browser: Any, address: str) -> None:
    page = browser.new_page(viewport=PHONE)
    answers = list[Any]()
    page.on("response", lambda answer: answers.append(answer))
    page.goto(address)
    page.wait_for_selector("#empty:not([hidden])")
    page.wait_for_load_state("load")
    page.wait_for_timeout(300)
    assert len(answers) <= REQUESTS, [answer.url for answer in answers]
    assert all(answer.url.startswith(address) and answer.ok for answer in answers)
    whole = [answer for answer in answers if not answer.url.endswith("/events")]
    assert sum(len(answer.body()) for answer in whole) <= BYTES
    page.close()


def test_keys_alone_draw_a_picture_that_brings_its_settings_back(opened: Any, gate: Gate) -> None:
    page, gate.seconds = opened(), 0.1
    page.evaluate("""() => {
        window.previews = new Set();
        const look = () => {
            for (const one of document.querySelectorAll("img.preview")) previews.add(one.src);
        };
        const jobs = document.getElementById("jobs");
        new MutationObserver(look).observe(jobs, { childList: true, subtree: true });
    }""")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.type("a red heart")
    while page.evaluate("document.activeElement.name") != "steps":
        page.keyboard.press("Tab")
    page.keyboard.type("8")
    first = drawn(page, lambda: page.keyboard.press("Enter"))
    assert "8 steps, guidance" in first.inner_text() and "a red heart" in first.inner_text()
    assert page.evaluate("previews.size") >= 2
    gate.seconds = 0.0
    page.wait_for_function("() => document.getElementById('prompt-tokens').textContent !== ''")
    assert re.fullmatch(r"\d+ of 24 tokens", page.inner_text("#prompt-tokens"))
    assert page.inner_text("#said") == "a red heart: done"
    data = file_of(page, first)
    # What is typed over comes back with the picture, and draws the same file.
    for name, value in (("prompt", "else"), ("steps", "2"), ("guidance", "1"), ("seed", "3")):
        page.fill(f"[name={name}]", value)
    page.select_option("[name=sampler]", "euler-a")
    drop(page, data)
    page.wait_for_selector("#messages .told")
    assert page.input_value("#prompt") == "a red heart" and page.input_value("[name=steps]") == "8"
    assert page.input_value("[name=sampler]") == "dpm++"
    again = drawn(page, press(page))
    assert file_of(page, again) == data
    # "Vary" draws four that are like it; "Seed" and "Last" put a seed into the form.
    varied = drawn(page, again.get_by_role("button", name="Vary").click)
    assert varied.get_by_role("link", name="Save").count() == 4
    four = {file_of(page, varied, number) for number in range(4)}
    assert len(four) == 4 and data not in four
    seed = page.input_value("[name=seed]")
    page.click("#dice")
    assert page.input_value("[name=seed]") == ""
    page.click("#same")
    assert page.input_value("[name=seed]") == seed
    varied.get_by_role("button", name="Seed").nth(2).click()
    page.wait_for_function("() => document.querySelector('[name=variation_seed]').value !== ''")
    third = drawn(page, press(page))
    assert file_of(page, third) == file_of(page, varied, 2)
    third.get_by_role("button", name="Look at").click()
    assert f"seed {seed}" in page.inner_text("#large .note")
    page.keyboard.press("Escape")
    # A LoRA is a chip with a weight, which stays, and goes.
    page.evaluate("document.querySelector('#settings > details').open = true")
    page.select_option("#lora", "style")
    page.get_by_label("Weight of style").fill("0.5")
    page.reload()
    page.wait_for_selector("#chosen-loras li", state="attached")
    page.evaluate("document.querySelector('#settings > details').open = true")
    assert page.get_by_label("Weight of style").input_value() == "0.5"
    page.get_by_role("button", name="Remove style").click()
    assert page.locator("#chosen-loras li").count() == 0


def test_a_reload_at_half_loses_nothing_and_others_see_the_same(opened: Any, gate: Gate) -> None:
    page, gate.at = opened(), 3
    other = opened(size=PHONE)
    page.fill("#prompt", "half a heart")
    page.fill("[name=steps]", "6")
    before = newest(page)
    press(page)()
    half = ".job:first-child .note:text('Step 3 of 6')"
    page.wait_for_selector(half)
    page.reload()
    page.wait_for_selector(half)
    assert page.input_value("#prompt") == "half a heart"
    other.wait_for_selector(half)
    name = newest(page)
    assert newest(other) == name != before
    # One is cancelled, by another browser; the other one goes on.
    press(page)()
    page.wait_for_function("(b) => document.querySelector('.job').id !== b", arg=name)
    second = newest(page)
    with other.expect_response(lambda answer: answer.request.method == "DELETE"):
        other.locator(f"#{second}").get_by_role("button", name="Cancel").click()
    gate.open.set()  # before, the first holds the turn
    for each in (page, other):
        each.wait_for_selector(f"#{name}.over .open")
        each.wait_for_selector(f"#{second}.over .note:text('Cancelled')")
    assert page.locator(f"#{name} .open img").get_attribute("src") == (
        other.locator(f"#{name} .open img").get_attribute("src")
    )


def test_the_brush_changes_what_it_paints_and_no_byte_beside(opened: Any) -> None:
    page = opened()
    page.fill("[name=steps]", "3")
    page.fill("[name=width]", "32")
    page.fill("[name=height]", "32")
    card = drawn(page, press(page))
    data, sent = file_of(page, card), list[Any]()
    page.on("request", lambda each: each.post_data and sent.append((each.url, each.post_data_json)))
    card.get_by_role("button", name="Edit").click()
    page.wait_for_selector("#stage:not([hidden])")
    assert page.locator("#edit-panel .file").count() == 1  # the panel is built once
    page.get_by_label("Feather").fill("0")
    canvas = page.locator("#stage canvas")
    painted = (
        "(() => { const c = document.querySelector('#stage canvas'); return c.getContext('2d')\
        .getImageData(0, 0, c.width, c.height).data.filter((v, n) => n % 4 === 3 && v).length })()"
    )
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()

    def stroke(*points: tuple[float, float]) -> None:
        spots = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        page.mouse.move(*spots[0])
        page.mouse.down()
        for spot in spots[1:]:
            page.mouse.move(*spot, steps=3)
        page.mouse.up()

    stroke((0.3, 0.4), (0.6, 0.4))
    once = page.evaluate(painted)
    stroke((0.3, 0.8), (0.6, 0.8))
    assert page.evaluate(painted) > once > 0
    page.get_by_role("button", name="Undo").click()
    assert page.evaluate(painted) == once
    page.get_by_role("button", name="Erase").click()
    stroke((0.5, 0.4), (0.7, 0.4))
    assert 0 < page.evaluate(painted) < once
    page.get_by_role("button", name="Erase").click()
    canvas.focus()  # and by keys, from the middle
    for key in ("ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    page.keyboard.down(" ")
    page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    page.get_by_label("Strength").focus()
    assert page.evaluate(painted) > once
    page.fill("#prompt", "else")
    after = pixels(file_of(page, drawn(page, press(page))))
    body = next(body for url, body in sent if url.endswith("/api/jobs"))
    assert "width" not in body and body["feather"] == 0
    assert base64.b64decode(body["image"]) == data
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["mask"]))).convert("L"))
    assert mask.shape == (32, 32) and {*np.unique(mask)} == {0, 255}
    assert np.array_equal(after[mask == 0], pixels(data)[mask == 0])
    assert (after[mask == 255] != pixels(data)[mask == 255]).mean() > 0.5
    compare = page.get_by_label("Before and after")
    page.wait_for_function("(i) => !i.disabled && i.value === '100'", arg=compare.element_handle())
    compare.fill("0")
    assert "100%" in page.evaluate("document.querySelectorAll('#stage img')[1].style.clipPath")
    # Beyond its borders: by a number, and by keys on the border.
    page.click("#edit-panel summary")
    page.get_by_label("Top", exact=True).fill("8")
    page.get_by_role("button", name="Draw beyond the right border").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert int(page.get_by_label("Right", exact=True).input_value()) == 8
    page.get_by_label("Close-up").fill("2")
    wide = pixels(file_of(page, drawn(page, press(page))))
    assert wide.shape == (40, 40, 3)
    assert np.array_equal(wide[16:, :24], pixels(data)[8:, :24])
    last = [body for url, body in sent if url.endswith("/api/jobs")][-1]
    assert last["mask_crop"] == 2 and "mask_crop" not in body


def test_a_grid_over_two_settings_is_one_picture(opened: Any) -> None:
    page, sent = opened("grid"), list[Any]()
    page.on(
        "request", lambda each: each.url.endswith("/api/jobs") and sent.append(each.post_data_json)
    )
    page.fill("#prompt", "a red heart")
    press(page)()
    page.wait_for_selector("#messages p:text('Choose what changes')")
    page.select_option("#axis-across", "steps")
    page.fill("#values-across", "2, 3")
    page.select_option("#axis-down", "prompt words")
    page.fill("#values-down", "blue, red")
    press(page)()
    page.wait_for_selector("#messages p:text('\"blue\" is not in the prompt')")
    page.fill("#values-down", "red, blue, 51")
    page.fill("#values-across", "2, 51")
    press(page)()
    page.wait_for_selector("#grid-result button:not([disabled])")
    cells = page.locator("#grid-result td:has(img)")
    assert cells.count() == 3
    assert "steps" in page.locator("#grid-result td:not(:has(img))").nth(1).inner_text()
    asked = [(each["steps"], each["prompt"]) for each in sent]
    words = [f"a {word} heart" for word in ("red", "blue", "51")]
    assert asked == [(steps, word) for word in words for steps in (2, 51)]
    assert len({each["seed"] for each in sent}) == 1
    # The browser says of three answers that they are 422, as they are to be.
    assert len(opened.said) == 3 and all("422" in line for line in opened.said)
    opened.said.clear()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as one picture").click()
    sheet = Image.open(saved.value.path())
    assert saved.value.suggested_filename == "grid.png"
    assert sheet.width > 2 * tiny.SIZE and sheet.height == 2 * 12 + 3 * tiny.SIZE


def test_what_goes_wrong_is_a_message(opened: Any) -> None:
    page = opened()
    page.route("**/api/jobs", lambda route: route.fulfill(status=500, json={"detail": "no luck"}))
    press(page)()
    page.wait_for_selector("#messages p:text('The server did not do it: no luck')")
    page.unroute("**/api/jobs")
    page.route("**/api/jobs", lambda route: route.abort())
    press(page)()
    page.wait_for_selector("#messages p:text('The server does not answer')")
    page.unroute("**/api/jobs")
    page.get_by_role("button", name="Close").first.click()
    drop(page, b"no picture")
    page.wait_for_selector("#messages p:text('it is no picture that can be read')")
    refused = [line for line in opened.said if "Failed to load resource" in line]
    assert len(refused) == len(opened.said) == 3
    opened.said.clear()

    # A model of classes is asked by their names.
    def classes(route: Any) -> None:
        told = route.fetch().json()
        told["model"]["classes"] = ["cat", "dog"]
        route.fulfill(json=told)

    page.route("**/api/info*", classes)
    known = page.locator(".job").count()  # of the tests before, which come after a while
    page.reload()
    page.wait_for_selector("#class:visible")
    page.wait_for_function("(n) => document.querySelectorAll('.job').length >= n", arg=known)
    assert not page.is_visible("#prompt") and not page.is_visible("#negative")
    page.select_option("#class", "dog")
    card = drawn(page, press(page))
    assert "dog" in card.inner_text()


LOOK = """() => {
    const bad = [];
    const shown = (one) => one.checkVisibility({ opacityProperty: true }) && one.offsetWidth > 1;
    const say = (one, what) => bad.push(`${what}: ${one.outerHTML.slice(0, 120)}`);
    if (document.documentElement.scrollWidth > innerWidth) bad.push("wider than the window");
    const name = (one) => one.ariaLabel || one.labels?.[0]?.textContent.trim()
        || (one.matches("button, a, summary") && one.textContent.trim());
    const controls = "button, a, input, select, textarea, summary, canvas, progress";
    for (const one of [...document.querySelectorAll(controls)].filter(shown)) {
        if (!name(one)) say(one, "no name");
    }
    for (const one of document.querySelectorAll("img:not([alt])")) say(one, "no alt");
    const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
    if (new Set(ids).size < ids.length) bad.push("an id stands twice");
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
    const behind = (one) => {
        for (let at = one; at; at = at.parentElement) {
            const colour = parts(getComputedStyle(at).backgroundColor);
            if ((colour[3] ?? 1) > 0.99) return colour;
        }
        return [255, 255, 255];
    };
    for (const one of document.body.querySelectorAll("*")) {
        const own = [...one.childNodes].filter((node) => node.nodeType === 3);
        const text = own.some((node) => node.textContent.trim()) || one.matches("input, textarea");
        if (!text || !shown(one) || one.disabled) continue;
        const colours = [parts(getComputedStyle(one).color), behind(one)];
        const [low, high] = colours.map(light).sort((a, b) => a - b);
        if ((high + 0.05) / (low + 0.05) < 4.5) say(one, "contrast");
    }
    return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_controls_are_named_and_nothing_overflows(opened: Any, scheme: str) -> None:
    page = opened(size=PHONE, color_scheme=scheme)
    page.fill("#prompt", "averylongwordthatdoesnotfit" * 8)
    page.fill("[name=steps]", "2")
    page.evaluate("document.querySelector('#settings > details').open = true")
    page.select_option("#lora", "style")
    page.get_by_role("button", name="Remove style").wait_for()
    found = page.evaluate(LOOK)
    page.get_by_role("button", name="Remove style").click()
    card = drawn(page, press(page))
    found += page.evaluate(LOOK)
    card.get_by_role("button", name="Edit").click()
    page.wait_for_selector("#stage:not([hidden])")
    page.click("#edit-panel summary")
    found += page.evaluate(LOOK)
    page.click("nav a:text('Grid')")
    page.wait_for_selector("#grid-panel:visible")
    found += page.evaluate(LOOK)
    page.set_viewport_size(DESK)
    found += page.evaluate(LOOK)
    assert found == []
    assert page.evaluate("document.querySelectorAll('nav a[aria-current=page]').length") == 1


@pytest.fixture
def watched(tmp_path: Path, service: Service) -> Iterator[str]:
    """The address of a page that shows a run and data, with what is hard to lay out in them."""
    run, cats = tmp_path / "runs" / ("a-run-with-a-long-name-" * 3), tmp_path / "cats"
    (run / "samples").mkdir(parents=True)
    cats.mkdir()
    (run / "config.yaml").write_text("{batch_size: 4, duration: 100 steps, data: {path: cats}}")
    (run / "environment.json").write_text("{}")
    (run / "run.log").write_text("a long line " * 30)
    numbers = ({"images": 4 * n, "loss": 1 / n, "held_out_loss/0.5": 2 / n} for n in range(1, 30))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in numbers))
    Image.new("RGB", (900, 100)).save(run / "samples" / f"images-{64:012d}.png")
    for n in range(7):
        Image.new("RGB", (64, 48), (40 * n, 0, 0)).save(cats / f"{n}.png")
        (cats / f"{n}.txt").write_text("one caption for all of them" if n else "another")
    (cats / "without.png").write_bytes((cats / "0.png").read_bytes())
    watch = Watching.of(tmp_path / "runs", [cats], manage=True)
    with served(service, watch=watch) as address:
        yield address


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_trainings_and_data_are_named_and_fit(browser: Any, watched: str, scheme: str) -> None:
    page = browser.new_page(viewport=PHONE, color_scheme=scheme)
    page.set_default_timeout(60_000)
    said, found = list[str](), list[Any]()
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda line: line.type == "error" and said.append(line.text))
    for tab, ready in (("training", ".chart svg"), ("data", ".finding")):
        page.goto(f"{watched}#{tab}")
        page.wait_for_selector(f"#{tab}-page {ready}")
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        if tab == "data":
            page.wait_for_selector(".found figure >> nth=7")
        for size in (PHONE, DESK):
            page.set_viewport_size(size)
            found += [(tab, size["width"], what) for what in page.evaluate(LOOK)]
    assert found == said == []
    heads = " ".join(page.locator(".finding summary").all_inner_texts())
    assert "1 picture without a caption" in heads
    assert page.locator("td[scope]").count() == 0
    page.close()


def test_a_run_is_seen_within_two_seconds(browser: Any, watched: str, tmp_path: Path) -> None:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    # The page's own waiting, which does not depend on what else the machine does.
    page.add_init_script("""const real = window.setInterval;
        window.waits = [];
        window.setInterval = (look, wait) => (waits.push(wait), real(look, wait));""")
    page.goto(f"{watched}#training")
    page.wait_for_selector("#training-page .chart svg")
    assert 0 < max(page.evaluate("waits")) <= 1500
    run = tmp_path / "runs" / "late"  # as a training in a terminal makes it
    run.mkdir()
    (run / "config.yaml").write_text("{batch_size: 4, duration: 100 steps}")
    (run / "environment.json").write_text("{}")
    page.wait_for_selector(".runs strong:text('late')")
    page.close()
