"""What CONTRIBUTING.md counts under "Where do I add ...": a thing is declared once, and whatever
lists such things lists this one.
"""

import re

from typer.main import get_command

from ldm.cli import app
from ldm.formats.png import Parameters
from ldm.sampling import PROCESS_SAMPLERS, SAMPLERS
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
    assert (tuple(SAMPLERS), tuple(PROCESS_SAMPLERS)) == (tuple(SCHEDULED), OF_ANY_PROCESS)
    words = re.findall(r"[\w+-]+", option("sample", "sampler").help)
    assert [word for word in words if word in NAMES][: len(NAMES)] == [*NAMES]
    for name, known in SCHEDULED.items():
        assert {canonical(alias) for alias in (known.label, *known.aliases.split())} == {name}
        (word,) = re.findall("Sampler: (.+)", str(Parameters("x", sampler=name)))
        assert word == known.label
