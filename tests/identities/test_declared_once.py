"""What CONTRIBUTING.md counts under "Where do I add ...": a thing is declared once, and whatever
lists such things lists this one.
"""

import importlib
import json
import re
from dataclasses import dataclass, fields

import pytest
from typer.main import get_command

from ldm.cli import app
from ldm.cli.data import source_of
from ldm.config import sources
from ldm.config.fields import MayChange, dataclasses_in, kind_of, may_change
from ldm.config.json_schema import CONFIGS, documented, text
from ldm.config.loader import config_class
from ldm.config.noise import ObjectiveSettings, ProcessConfig, WeightingSettings
from ldm.config.schema import RunConfig
from ldm.config.suites import SUITES, Suite
from ldm.data.place import AtPath
from ldm.errors import DataError
from ldm.formats.png import Parameters
from ldm.lazy import named
from ldm.sampling import CONSISTENCY_SAMPLERS, FLOW_SAMPLERS, PROCESS_SAMPLERS, SAMPLERS
from ldm.sampling.names import NAMES, OF_ANY_PROCESS, SCHEDULED, canonical
from runs import ROOT


def mentions(*words: str) -> set[str]:
    """Files of ldm/ in which one of ``words`` stands, by itself."""
    word = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, words))})(?![\w-])")
    files = (ROOT / "ldm").rglob("*.py")
    return {str(f.relative_to(ROOT / "ldm")) for f in files if word.search(f.read_text())}


def option(command: str, name: str):
    """``--name`` of ``ldm command``."""
    return next(p for p in get_command(app).commands[command].params if p.name == name)


def test_a_sampler_touches_two_files():
    told = {"sampling/names.py", "sampling/samplers.py"}
    assert [mentions(name) for name in ("dpm2", "unipc", "ode-adaptive")] == [told] * 3
    stepped = (*SAMPLERS, *FLOW_SAMPLERS, *CONSISTENCY_SAMPLERS)
    assert (stepped, tuple(PROCESS_SAMPLERS)) == (tuple(SCHEDULED), OF_ANY_PROCESS)
    words = re.findall(r"[\w+-]+", option("sample", "sampler").help)
    assert [word for word in words if word in NAMES][: len(NAMES)] == [*NAMES]
    for name, known in SCHEDULED.items():
        assert {canonical(alias) for alias in (known.label, *known.aliases.split())} == {name}
        (word,) = re.findall("Sampler: (.+)", str(Parameters("x", sampler=name)))
        assert word == known.label


@dataclass(frozen=True)
class Toys(AtPath):
    path: str
    caption_column: str = "text"
    kind: str = "toys"

    endings = (".toy", ".toys")
    contents = "toys"


def test_a_source_touches_two_files(tmp_path, monkeypatch):
    assert mentions("TarData", "webdataset") == {"data/tar.py", "config/sources.py"}
    assert mentions("TableData", "parquet") >= {"data/table.py", "config/sources.py"}
    for program, config in CONFIGS.items():
        kinds = json.loads(text(config))["properties"]["data"]["anyOf"][0]["discriminator"]
        assert set(kinds["mapping"]) == set(sources.SOURCES), program
    assert [*sources.drawn(), *sources.layouts()] == [
        *("emoji", "shapes", "digits"),
        *("folder", "webdataset", "parquet", "datasets", "sd_scripts", "cached"),
    ]

    (tmp_path / "a.toy").write_bytes(b"")
    how = dict(caption_column="words", image_column=None, held_out_fraction=0.0)
    assert source_of(str(tmp_path), **how).kind == "folder"
    monkeypatch.setitem(sources.SOURCES, "toys", Toys)
    assert sources.layout(str(tmp_path)) == ("toys", "1 toys, the first is a.toy")
    assert sources.layout("x/{0..9}.TOYS") == ("toys", "the name ends in .toys")
    assert source_of(str(tmp_path), **how) == Toys(str(tmp_path), "words")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"several layouts.* webdataset \(1 .* and toys \(1 toys"):
        source_of(str(tmp_path), **how)
    (tmp_path / "b").mkdir()
    assert sources.layout(str(tmp_path / "b")).reason == (
        f"{tmp_path / 'b'}: no pictures, tars, parquet files or toys in this folder or below it"
    )


def test_a_suite_touches_two_files(monkeypatch):
    assert mentions("digit_suites") == {"config/suites.py"}  # and itself
    assert mentions("shapes-new", "likelihood") >= {"config/suites.py", "demo/digit_suites.py"}
    assert mentions("emoji-new") == {"config/suites.py", "demo/emoji_suites.py"}
    again = importlib.import_module("ldm.cli.evaluate")
    assert [*again.Suite] == [*SUITES]
    drawn = json.loads(text(CONFIGS["train"]))["$defs"]["TextToImageValidation"]["properties"]
    known = [name for name, suite in SUITES.items() if suite.in_runs]
    assert drawn["suites"]["propertyNames"]["enum"] == known
    assert not {"prompts", "loss", "likelihood"} & {*known} and "quality" in known
    for suite in SUITES.values():
        assert callable(named(suite.run)) and callable(named(suite.prepare or suite.run))

    toy = Suite("whether a toy is one", "builtins:max", 3, frozenset({"text"}))
    monkeypatch.setitem(SUITES, "toy", toy)
    importlib.reload(again)
    assert again.Suite("toy") in again.Suite and "; toy: whether a toy is one." in again.HELP
    assert [*again._asked(None, None, ROOT)][-1] == "toy"
    assert (toy.measured(1, 2), toy.measured(1, 2, 9)) == (3, 9)  # of max(evaluator, draw, count)
    monkeypatch.undo()
    importlib.reload(again)


def test_a_key_says_whether_it_may_change():
    """Also where a program's config describes it anew, and configs/README.md tells the same."""
    always = may_change(RunConfig)
    assert {"run", "workers", "validation"} <= always and not {"seed", "optimizer"} & always
    every = set().union(*map(may_change, CONFIGS.values()))
    assert all(may_change(config) >= always for config in CONFIGS.values())
    readme = (ROOT / "configs" / "README.md").read_text()
    listed = readme.partition("without being named: ")[2].partition("; and `duration`")[0]
    assert set(re.findall("`(\\w+)`", listed)) == every

    @config_class
    class Longer(RunConfig):
        toys: MayChange[int] = 3
        tools: int = 3

    assert may_change(Longer) == always | {"toys"}


def test_a_noise_process_touches_three_files():
    """And two more, where it gets a public name."""
    told = {"diffusion/process.py", "diffusion/schedulers.py", "config/noise.py"}
    assert mentions("ContinuousVP") == told | {"diffusion/__init__.py", "__init__.py"}
    of_processes = dataclasses_in(ProcessConfig)
    assert [kind_of(cls) for cls in of_processes] == [named(c.mirrors).kind for c in of_processes]
    for settings in (*of_processes, ObjectiveSettings, WeightingSettings):
        mirrored = {field.name for field in fields(named(settings.mirrors))}
        assert {field.name for field in fields(settings)} <= mirrored | {"kind"}
        assert documented(settings).keys() >= {field.name for field in fields(settings)} - {"kind"}
