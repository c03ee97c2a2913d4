"""What ``ldm serve`` promises, shown with servers of their own in processes of their own.

    python tests/benchmarks/serving.py exact      # every kind of request, alone and all at once
    python tests/benchmarks/serving.py load       # clients at once: none lost, seconds, CPU gain
    python tests/benchmarks/serving.py fair       # one picture behind a hundred of another's
    python tests/benchmarks/serving.py full       # ten times the work that the queue holds
    python tests/benchmarks/serving.py memory     # of a server after so many pictures

``exact`` draws with ``ldm sample`` too, and compares pixels. CPU seconds are the server's own, of
requests one by one and all at once in turns on one server, so that what else the machine does
falls on both.
"""

import argparse
import base64
import io
import json
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from ldm.sampling.names import NAMES  # noqa: E402
from served import Server, ask, drawn, started  # noqa: E402

OTHER = {"ode-adaptive", "langevin", "flow-euler", "flow-heun"}  # not exact, or of other processes
SAMPLERS = [name for name in (*NAMES, "model") if name not in OTHER]
LONG = "a red apple beside a green pear, and (a yellow banana:1.3) under them, " * 6


def text(image: Image.Image) -> str:
    """A picture as a request brings it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def given(side: int) -> tuple[Image.Image, Image.Image]:
    """A picture to set out from, and a mask of its middle."""
    draw = np.random.default_rng(0).integers(0, 255, (side // 8, side // 8, 3), np.uint8)
    image = Image.fromarray(draw).resize((side, side), Image.Resampling.BICUBIC)
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 4, side // 4, side // 4 * 3, side // 4 * 3))
    return image, mask


def mixed(count: int, side: int, loras: bool = True) -> list[dict[str, Any]]:
    """Requests of all kinds: the kind goes with the number by 4, the rest by others."""
    image, mask = given(side)
    found = []
    for number in range(count):
        asked: dict[str, Any] = {
            "prompt": f"a red apple, number {number}",
            "seed": number,
            "sampler": SAMPLERS[number % len(SAMPLERS)],
            "steps": 2 + number % 3,
            "guidance": (1.0, 3.0, 5.0)[number % 3],
        }
        if number % 5 == 4:
            asked |= {"prompt": LONG + str(number), "syntax": "a1111"}
        kind = number // len(SAMPLERS) % 4
        if number % 2 and kind < 2:
            asked |= {"width": side + side // 2, "height": side}
        if kind == 1 and loras:
            asked["loras"] = [{"name": "style", "weight": (0.5, 1.0)[number // 2 % 2]}]
        if kind >= 2:
            asked |= {"image": text(image), "strength": 0.7}
        if kind == 3:
            asked |= {"mask": text(mask), "strength": 1.0}
        found.append(asked)
    return found


def chosen(asked: argparse.Namespace, count: int, side: int) -> list[dict[str, Any]]:
    """Of all kinds, or alike, as the command line says."""
    return equal(count, asked.steps) if asked.equal else mixed(count, side, False)


def equal(count: int, steps: int = 8) -> list[dict[str, Any]]:
    """Requests that differ in their seeds."""
    usual = {"prompt": "a red apple", "steps": steps, "guidance": 3.0, "sampler": "ddim"}
    return [usual | {"seed": number} for number in range(count)]


def together(url: str, requests: list[dict[str, Any]], clients: int) -> list[Any]:
    """Seconds and file of each, asked for by so many clients at once."""

    def one(number: int) -> tuple[float, bytes | None]:
        start = time.perf_counter()
        file = drawn(url, requests[number], f"client-{number % clients}")
        return time.perf_counter() - start, file

    with ThreadPoolExecutor(clients) as pool:
        return [*pool.map(one, range(len(requests)))]


def lora(folder: Path, model: Path) -> None:
    """A LoRA of random numbers for ``model``."""
    import torch
    from diffusers import UNet2DConditionModel

    from ldm.formats import lora
    from ldm.models.lora import attach, collect, weights

    network = UNet2DConditionModel.from_pretrained(model / "unet")
    attach(network, ["to_q", "to_v"], rank=4, alpha=4.0, dora=False)
    draw = torch.Generator().manual_seed(0)
    for weight in weights(network).values():
        weight.data.normal_(std=0.05, generator=draw)
    lora.write({"unet": collect(network)}, folder / "style.safetensors")


def tiny(folder: Path) -> Path:
    """The model of the tests."""
    import tiny as small

    return small.folder(folder / "tiny")


def sampled(model: Path, requests: list[dict[str, Any]], folder: Path, *options: Any) -> list[Path]:
    """What ``ldm sample`` draws of ``requests``, alike but for settings that a row may have."""
    from typer.testing import CliRunner

    from ldm.cli import app

    names = {"prompt", "seed", "sampler", "steps", "guidance", "syntax"}
    rows = []
    for asked in requests:
        row = {name: asked[name] for name in names & asked.keys()}
        if "width" in asked:
            row["size"] = f"{asked['width']}x{asked['height']}"
        rows.append(json.dumps(row))
    (folder / "out").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("\n".join(rows))
    line = ["sample", "--model", model, "--prompts", folder / "rows.jsonl", "--out", folder / "out",
            "--batch", 1, *options]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, line)])
    assert result.exit_code == 0, result.output
    return sorted((folder / "out").glob("*.png"))


def by_command(
    model: Path, requests: list[dict[str, Any]], files: list[bytes], folder: Path, threads: int
) -> list[int]:
    """Numbers of requests whose picture ``ldm sample`` draws otherwise."""
    import torch

    torch.set_num_threads(threads)
    side = pixels(files[0]).shape[0]
    image, mask = given(side)
    image.save(folder / "image.png")
    mask.save(folder / "mask.png")
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, asked in enumerate(requests):
        options: tuple[Any, ...] = ()
        if "image" in asked:
            options = ("--image", folder / "image.png", "--strength", asked["strength"])
        if "mask" in asked:
            options += ("--mask", folder / "mask.png")
        if "loras" in asked:
            weight = asked["loras"][0]["weight"]
            options = ("--lora", folder / "style.safetensors", "--lora-scale", weight)
        kinds.setdefault(options, []).append(number)
    other = []
    for place, (options, numbers) in enumerate(kinds.items()):
        own = folder / f"rows-{threads}-{place}"
        made = sampled(model, [requests[n] for n in numbers], own, *options)
        assert len(made) == len(numbers)
        for number, file in zip(numbers, made, strict=True):
            if not np.array_equal(pixels(file.read_bytes()), pixels(files[number])):
                other.append(number)
    return sorted(other)


def exact(model: Path, folder: Path, asked: argparse.Namespace) -> None:
    lora(folder, model)
    for threads in asked.threads:
        server = Server(model, folder / f"out-{threads}", "--loras", folder,
                        start=partial(started, threads=threads))  # fmt: skip
        print(server.ready())
        side = ask(f"{server.url}/api/info").json["model"]["width"]
        requests = mixed(asked.requests, side)
        start = server.cpu()
        alone = [drawn(server.url, each) for each in requests]
        cpu = server.cpu() - start
        company = together(server.url, requests, len(requests))
        both = server.cpu() - start - cpu
        rows = _rows(ask(f"{server.url}/metrics").body.decode())
        server.stop()
        other = [n for n, (a, (_, b)) in enumerate(zip(alone, company, strict=True)) if a != b]
        print(
            f"{threads} threads: {len(requests) - len(other)} of {len(requests)} files equal alone"
            f" and at once {other or ''}, {sum(a is None for a in alone)} not drawn;"
            f" CPU s {cpu:.1f} and {both:.1f}; {rows}"
        )
        there = [n for n, file in enumerate(alone) if file is not None]
        few = [requests[n] for n in there], [alone[n] for n in there]
        command = [there[n] for n in by_command(model, *few, folder, threads)]
        print(f"  ldm sample: {len(there) - len(command)} of {len(there)} the same pixels")
        for number in command:
            told = {k: v for k, v in requests[number].items() if k not in ("image", "mask")}
            print("   other: ", json.dumps(told)[:200])


def _rows(metrics: str) -> str:
    """Rows of an evaluation on average."""
    numbers = dict(re.findall(r"^ldm_network_rows_(count|sum) (\S+)", metrics, re.MULTILINE))
    return f"{float(numbers['sum']) / float(numbers['count']):.2f} rows an evaluation"


def load(model: Path, folder: Path, asked: argparse.Namespace) -> None:
    server = Server(model, folder / "out", "--queue", 1_000_000)
    print(server.ready())
    side = ask(f"{server.url}/api/info").json["model"]["width"]
    requests = chosen(asked, asked.requests, side)
    for each in requests[:2]:
        drawn(server.url, each)
    cpu, times, lost, other = [0.0, 0.0], [], 0, 0
    for first in range(0, len(requests), 50):
        part, before = requests[first : first + 50], server.cpu()
        alone = [drawn(server.url, each) for each in part]
        between = server.cpu()
        company = together(server.url, part, asked.clients)
        cpu = [cpu[0] + between - before, cpu[1] + server.cpu() - between]
        times += [seconds for seconds, _ in company]
        lost += sum(file is None for _, file in company)
        other += sum(a != b for a, (_, b) in zip(alone, company, strict=True))
    server.stop()
    times.sort()
    print(
        f"{len(requests)} requests, {'equal' if asked.equal else 'mixed'}, of {asked.clients}"
        f" clients: lost {lost}, other than alone {other};"
        f" p50 {times[len(times) // 2]:.1f} s, p95 {times[int(len(times) * 0.95)]:.1f} s;"
        f" CPU s one by one {cpu[0]:.1f}, at once {cpu[1]:.1f}: {cpu[0] / cpu[1]:.2f} times"
    )


def fair(model: Path, folder: Path, asked: argparse.Namespace) -> None:
    server = Server(model, folder / "out", "--queue", 1_000_000, "--count", 100)
    print(server.ready())
    jobs, request = f"{server.url}/api/jobs", equal(1)[0]
    start = time.perf_counter()
    drawn(server.url, request, "b")
    alone = time.perf_counter() - start
    many = ask(jobs, request | {"count": 100}, X_Client="a").json["id"]
    time.sleep(5 * alone)

    def begun() -> int:
        """Pictures of the hundred that are drawn, or are being drawn."""
        told = ask(f"{jobs}/{many}").json
        files = sum(picture["file"] is not None for picture in told["pictures"])
        return files + len(told["progress"])

    before, start = begun(), time.perf_counter()
    job = ask(jobs, request, X_Client="b").json
    while not (told := ask(f"{jobs}/{job['id']}").json)["progress"] and told["state"] != "done":
        time.sleep(0.01)
    between = begun() - before
    ask(f"{jobs}/{job['id']}/events")
    took = time.perf_counter() - start
    ask(f"{jobs}/{many}", method="DELETE")
    server.stop()
    print(
        f"100 pictures of one client wait, one of another comes: its place is {job['place']}, and"
        f" {between} of the others are begun before it; {took:.1f} s instead of {alone:.1f} s"
    )


def full(model: Path, folder: Path, asked: argparse.Namespace) -> None:
    holds = 400
    server = Server(model, folder / "out", "--queue", holds)
    print(server.ready())
    requests = equal(10 * holds // 16)  # of 16 rows each
    drawn(server.url, requests[0])  # which tells how fast it is
    before = server.memory()

    def one(request: dict[str, Any]) -> tuple[int, str | None]:
        sent = {k: v for k, v in request.items() if k in ("prompt", "seed")}
        sent |= {"num_inference_steps": 8, "guidance_scale": 3.0}
        answer = ask(f"{server.url}/v1/images/generations", sent, X_Client=f"c{request['seed']}")
        return answer.status, answer.headers.get("retry-after")

    start = time.perf_counter()
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [*pool.map(one, requests)]
    statuses = Counter(status for status, _ in answers)
    waits = [int(after) for status, after in answers if status == 429 and after is not None]
    refused = statuses[429]
    memory, took = server.memory(), time.perf_counter() - start
    after = one(requests[0])[0]
    server.stop()
    print(
        f"{len(requests)} requests at once, of ten times the work that is held: {dict(statuses)}"
        f" in {took:.1f} s; {len(waits)} of {refused} with Retry-After"
        f" ({min(waits, default=0)} to {max(waits, default=0)} s); the next one: {after};"
        f" MB {before:.0f} before, {memory:.0f} after"
    )


def memory(model: Path, folder: Path, asked: argparse.Namespace) -> None:
    server = Server(model, folder / "out", "--queue", 1_000_000)
    print(server.ready())
    side = ask(f"{server.url}/api/info").json["model"]["width"]
    print(f"at first: {server.memory():.0f} MB")
    for first in range(0, asked.requests, 100):
        kinds = [each | {"steps": 2, "sampler": "ddim"} for each in chosen(asked, 100, side)]
        requests = [each | {"seed": first + n} for n, each in enumerate(kinds)]
        lost = sum(file is None for _, file in together(server.url, requests, 16))
        print(f"after {first + 100} pictures: {server.memory():.0f} MB, {lost} lost", flush=True)
    server.stop()


def main() -> None:
    shown = {"exact": exact, "load": load, "fair": fair, "full": full, "memory": memory}
    usual = {"exact": 64, "load": 200, "memory": 1000}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=shown)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "ldm-small")
    parser.add_argument("--tiny", action="store_true", help="the model of the tests")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="exact: of the server")
    parser.add_argument("--equal", action="store_true", help="load, memory: alike but for seeds")
    parser.add_argument("--steps", type=int, default=8, help="load --equal: of each")
    asked = parser.parse_args()
    asked.requests = asked.requests or usual.get(asked.what)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny(Path(folder)) if asked.tiny else asked.model
        shown[asked.what](model, Path(folder), asked)


if __name__ == "__main__":
    main()
