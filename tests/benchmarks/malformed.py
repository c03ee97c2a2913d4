"""Requests of schemathesis (``pip install schemathesis``) against every operation of ``ldm serve``.

    python tests/benchmarks/malformed.py                      # 200 examples an operation
    python tests/benchmarks/malformed.py --only /sdapi --examples 20

The application is called in this process, over the model of the tests, a run and a data set, which
may be changed. Each operation is asked all cases of the coverage phase, then so many of fuzzing,
half of both against its schema, and answers are put to all checks but ``positive_data_acceptance``
where a schema cannot say what is drawn (``DRAWS``); of what fits those three in four are changed to
what is there, so that they are drawn. Prints cases, answers and failures of each.
"""

import argparse
import base64
import io
import json
import logging
import re
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import schemathesis  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402
from schemathesis.config import SchemathesisConfig  # noqa: E402
from schemathesis.engine import events, from_schema  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.generation.meta import TestPhase  # noqa: E402

import tiny  # noqa: E402
from ldm.serving.api import a1111, openai  # noqa: E402
from ldm.serving.api.app import create_app  # noqa: E402
from ldm.serving.api.page import Page  # noqa: E402
from ldm.serving.api.watching import Watching  # noqa: E402
from ldm.serving.draw import Draw  # noqa: E402
from ldm.serving.limits import Limits  # noqa: E402
from ldm.serving.service import Service  # noqa: E402
from ldm.serving.shelf import Shelf  # noqa: E402

DRAWS = "/(jobs|generations|edits|variations|txt2img|img2img|settings|png-info|options)$"
"""Operations whose schemas hold more than what is drawn: a text may be no picture, a mask needs an
image of its size, pictures times steps may be more than the queue holds.
"""


PARAMETERS = "a\nSteps: 2, Sampler: DDIM, CFG scale: 2.0, Seed: 1, Size: 16x16"


def text(**parameters: str) -> str:
    """A picture in base64."""
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    for name, value in parameters.items():
        info.add_text(name, value)
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, "PNG", pnginfo=info)
    return base64.b64encode(file.getvalue()).decode()


def watched(folder: Path) -> Watching:
    """A run and a data set."""
    run = folder / "runs" / "first"
    (run / "samples").mkdir(parents=True)
    told = {"run": str(run), "batch_size": 4, "duration": "100 steps", "seed": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(told))
    (run / "environment.json").write_text(json.dumps({"git": "abc", "changes": []}))
    (run / "metrics.jsonl").write_text('{"step": 1, "images": 4, "loss": 0.5}\n')
    Image.new("RGB", (16, 16)).save(run / "samples" / "4.png")
    cats = folder / "cats"
    cats.mkdir()
    for name in "ab":
        Image.new("RGB", (16, 16), (ord(name), 0, 0)).save(cats / f"{name}.png")
        (cats / f"{name}.txt").write_text(f"a cat, {name}")
    return Watching.of(folder / "runs", [cats], manage=True)


FITS: dict[str, Any] = {
    "model": "tiny", "sampler": "ddim", "sampler_name": "Euler a", "sampler_index": "DDIM",
    "loras": [], "steps": 2, "num_inference_steps": 2, "n": 1, "count": 2, "batch_size": 1,
    "n_iter": 1, "size": "16x16", "response_format": "b64_json", "override_settings": {},
    "prompt": "a", "negative": "b", "negative_prompt": "b", "deadline": 9.0,
}  # fmt: skip
"""What there is to ask for, where a schema lets one ask for anything."""
KNOWN = {"img": {*a1111.Img2img.model_fields}, "txt": {*a1111.Txt2img.model_fields},
         "job": {*Draw.model_fields},
         "gen": {*openai.Generation.model_fields}}  # fmt: skip
"""Fields by how the name of an operation begins."""


def drawable(name: str, body: dict[str, Any]) -> dict[str, Any]:
    """``body``, which fits the schema of the operation ``name``, as near to what is drawn as it can
    be.
    """
    kind = name[:3]
    found = {key: FITS.get(key, value) for key, value in body.items()}
    if kind in KNOWN:
        found = {key: value for key, value in found.items() if key in KNOWN[kind]}
        found["steps" if kind in ("img", "txt", "job") else "num_inference_steps"] = 2
    if kind in ("img", "txt"):
        found |= {"width": 16, "height": 16, "scheduler": None}
    if kind == "img":
        found["inpainting_fill"] = 1
    for key in ("image", "mask", "init_images"):
        if found.get(key) is not None:
            data = text(parameters=PARAMETERS)
            found[key] = [data] if key == "init_images" else data
    if kind == "job" and found.get("mask") is not None:
        found["outpaint"] = None
    masked = found.get("mask") is not None or found.get("outpaint") is not None
    for key in ("mask", "strength", "feather", "outpaint", "mask_crop"):
        if kind == "job" and not (found.get("image") and (masked or key == "strength")):
            found.pop(key, None)
    return found


def config(examples: int, seed: int, only: str) -> SchemathesisConfig:
    """What is asked, and what of the answers."""
    values = {"run": ["first"], "data": ["cats"]}
    drawn = {
        "include-path-regex": DRAWS,
        "checks": {"positive_data_acceptance": {"enabled": False}},
    }
    named = [
        {"include-path-regex": f"^/api/{what}/",
         "generation": {"dictionaries": {"string": {"dictionary": values, "probability": 0.5}}}}
        for what, values in (("runs", "run"), ("data", "data"))
    ]  # fmt: skip
    return SchemathesisConfig.from_dict({
        "seed": seed,
        "dictionaries": {name: {"values": these} for name, these in values.items()},
        "generation": {"mode": "all", "max-examples": examples, "no-shrink": True,
                       "database": "none"},
        # Of a body that is too large nothing is read: 413, which the check does not know.
        "checks": {"negative_data_rejection": {"expected-statuses": [
            "400", "401", "403", "404", "405", "409", "413", "422", "429"]}},
        "phases": {"stateful": {"enabled": False}, "examples": {"enabled": False}},
        "suppress-health-check": ["all"],
        "continue-on-failure": True,
        "max-stream-events": 3,
        "operations": [drawn, *named, {"exclude-path-regex": only, "enabled": False}],
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--only", default="", help="operations with this in their path")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    logging.getLogger("ldm").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        limits = Limits(count=2, steps=2, side=24, pixels=24 * 24, work=60.0, seconds=20.0)
        service = Service(Shelf({"tiny": tiny.folder(folder / "tiny")}), folder / "out", limits)
        service.start()
        app = create_app(service, page=Page(), watch=watched(folder))
        schema = schemathesis.openapi.from_asgi(
            "/openapi.json", app, config=config(asked.examples, asked.seed, asked.only)
        )
        numbers = count()

        @schemathesis.hook
        def before_call(context: Any, case: Any, kwargs: Any) -> None:
            fits = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
            fuzzed = fits and case.meta.phase.name is TestPhase.FUZZING
            # A file in a form would not be taken to fit its schema when it is put there.
            asks = re.search(DRAWS, case.path) and case.media_type == "application/json"
            if fuzzed and asks and isinstance(case.body, dict) and next(numbers) % 4:
                case.body = drawable(case.path.rpartition("/")[2], case.body)

        wrong = shown(schema)
        service.close()
    sys.exit(1 if wrong else 0)


def shown(schema: Any) -> int:
    """Prints what becomes of each operation; failures of all."""
    total, wrong, operations = 0, 0, set[str]()
    cpu = time.process_time()
    for told in from_schema(schema).execute():
        if isinstance(told, events.NonFatalError | events.FatalError):
            print(f"ERROR {getattr(told, 'label', '')}: {getattr(told, 'value', told)}", flush=True)
            wrong += 1
        if not isinstance(told, events.ScenarioFinished) or not told.recorder.cases:
            continue
        record, failures = told.recorder, dict[str, list[str]]()
        for name, checks in record.checks.items():
            for check in checks:
                if check.failure_info is not None:
                    failures.setdefault(check.name, []).append(name)
        answers = Counter(
            str(each.response.status_code) if each.response else "none"
            for each in record.interactions.values()
        )
        total += len(record.cases)
        operations.add(str(told.label))
        now = time.process_time()
        print(
            f"{told.phase.value:8} {told.label}: {len(record.cases)} cases,"
            f" {dict(sorted(answers.items()))}, {told.elapsed_time:.0f} s, {now - cpu:.1f} CPU s",
            flush=True,
        )
        cpu = now
        for name, cases in failures.items():
            wrong += len(cases)
            print(f"  FAILED {name}: {len(cases)} cases, the first:")
            case, answer = record.cases[cases[0]].value, record.interactions[cases[0]].response
            said = answer.content[:300] if answer else None
            print(
                f"    {case.as_curl_command()[:600]}\n    {answer and answer.status_code} {said!r}"
            )
    print(f"{len(operations)} operations, {total} cases, {wrong} failures")
    return wrong


if __name__ == "__main__":
    main()
