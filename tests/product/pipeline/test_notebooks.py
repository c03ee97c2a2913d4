"""The notebooks run as they are and store what they show, and the lines of README run."""

import importlib.util
import json
import os
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from forked import Forked, server
from launched import ENVIRONMENT
from runs import ROOT

# diffusers 0.42 under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _runner() -> ModuleType:
    file = ROOT / "assets" / "notebooks" / "run.py"
    spec = importlib.util.spec_from_file_location("run_notebooks", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNNER = _runner()


def in_a_fork(command: str) -> str:
    """What a line of a terminal prints, without the seconds in which torch is imported."""
    program, *rest = shlex.split(command.replace("\\\n", " "))
    server(ENVIRONMENT)
    arguments = {"python": rest, "ldm": ["-m", "ldm.cli", *rest]}[program]
    process = Forked(arguments, ENVIRONMENT | {"LDM_CACHE": os.environ["LDM_CACHE"]})
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    return told


def kinds(notebook: dict[str, Any]) -> list[list[str]]:
    """What kind of thing each cell shows."""
    return [
        [key for output in cell["outputs"] for key in output.get("data", {"text": ""})]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def stored_text(name: str) -> str:
    cells = RUNNER.read(name)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return "".join(line for output in outputs for line in output.get("text", ()))


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch, own_cache: Path):
    """Runs a notebook where Jupyter would; what its names stand for in the end."""
    pyplot = pytest.importorskip("matplotlib.pyplot")  # of the extra ``evaluate``
    monkeypatch.chdir(RUNNER.NOTEBOOKS)

    def run(name: str, **parameters: Any) -> dict[str, Any]:
        notebook, stored = RUNNER.read(name), RUNNER.read(name)
        names = RUNNER.run(notebook, in_a_fork, **parameters)
        assert kinds(notebook) == kinds(stored)
        return names

    yield run
    pyplot.close("all")


@pytest.mark.parametrize("name", RUNNER.NAMES)
def test_what_is_stored_is_of_one_run(name: str) -> None:
    file = RUNNER.NOTEBOOKS / f"{name}.ipynb"
    cells = [cell for cell in RUNNER.read(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream", "display_data", "execute_result"
    }  # fmt: skip
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert file.stat().st_size < 250_000
    text = json.dumps([[o for o in c["outputs"] if "text" in o] for c in cells])
    assert not re.search(r"/(home|work|tmp|root|Users)/|\b/s\b", text)


@pytest.mark.slow  # with the model that ships, as what README draws
def test_draw(executed) -> None:
    names = executed("draw", STEPS=4, SCALES=(1,), COUNTS=(2,))
    assert sum(verdict.colours == verdict.things for verdict in names["verdicts"]) == 4
    assert "beside others and alone: 0 of 255 apart" in stored_text("draw")
    assert "4 of 4 are right" in stored_text("draw")


@pytest.mark.slow  # 20 CPU s, most of them a step of the model that ships
def test_own_pictures(executed, tmp_path: Path) -> None:
    names = executed("own_pictures", LENGTH="32 images", STEPS=1, RUN=str(tmp_path / "run"))
    (row,) = names["rows"]
    assert (row["images"], len(names["true"]), len(names["right"])) == (32, 24, 2)
    assert row["loss"] == pytest.approx(0.0936, rel=0.02)
    found = dict(re.findall(r"(before|after): (\d) of 6", stored_text("own_pictures")))
    assert int(found["before"]) == 0 and int(found["after"]) >= 3


def test_parts(executed) -> None:
    noise, drawn, other = executed("parts")["distances"]
    assert drawn < 0.4 * noise and drawn < 3 * other
    for told, distance in (("noise", noise), ("drawn", drawn)):
        stored = float(re.search(rf"{told} +to moons: (\S+)", stored_text("parts"))[1])
        assert stored == pytest.approx(distance, abs=0.05)  # rounding differs between CPUs


@pytest.mark.slow  # 7 CPU s
def test_samplers(executed) -> None:
    names = executed("samplers", STEPS=2, ITERATIONS=3)
    orders = {"ddim": 1, "ode-heun": 2, "dpm++": 2, "unipc": 3}
    assert names["slopes"] == pytest.approx(orders, abs=0.3)
    assert float((names["found"] - names["exact"]).abs().max()) < 0.02
    assert float((names["estimated"] - names["exact"]).mean().abs()) < 0.05
    assert names["bits"][1] == pytest.approx(names["bits"][0], abs=0.01)
    assert names["gains"]["half of the squares"] > 3
    gains = re.findall(r": (\S+) dB as it is, (\S+) dB drawn", stored_text("samplers"))
    assert len(gains) == 2 and all(float(after) > float(before) + 3 for before, after in gains)


def test_the_lines_of_readme_are_those_of_the_notebook() -> None:
    """Which is run above, in the same order; it says a seed and a semicolon more."""
    (block,) = (block for block in BLOCKS if "moons" in block)
    lines = [line for line in block.splitlines() if line]
    cells = [cell for cell in RUNNER.read("parts")["cells"] if cell["cell_type"] == "code"]
    code = [line.rstrip(";") for c in cells for line in RUNNER.source(c).splitlines() if line]
    code.remove("torch.manual_seed(0)")
    assert code[: len(lines)] == lines


def test_readme_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    (lines,) = (block for block in BLOCKS if "LatentDiffusionPipeline" in block)
    monkeypatch.chdir(ROOT)
    *before, call = lines.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(before), names)
    picture = eval(call, names)
    red, green, blue = picture.getpixel((32, 40))
    assert red > 150 > max(green, blue)
