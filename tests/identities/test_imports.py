"""The rooms of the house: what may import what, and how large a file may grow.

Floors from the ground: a room may use those below it, and itself, but none beside it or above.
``import ldm`` imports nothing before a name is asked for.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

from runs import ROOT

FILES = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "training").rglob("*.py")])
LEVELS = [
    {"training"},
    {"ldm.cli"},
    {"ldm.serving"},
    {"ldm.tasks"},
    {"ldm.engine"},
    {"ldm.encoding"},
    {"ldm.cascade"},
    {"ldm.pipeline"},
    {"ldm.calls"},  # of the pipeline
    {"ldm.families"},
    {"ldm.config"},  # what a YAML may say, of all of the rooms below
    {"ldm.demo"},
    {"ldm.evaluation"},  # of whatever draws, known by what it is asked for
    {"ldm.data"},
    {"ldm.formats", "ldm.prompts"},
    {"ldm.editing"},  # pictures that a call sets out from
    {"ldm.models", "ldm.guidance", "ldm.sampling"},
    {"ldm.diffusion"},
    {"ldm.storage"},
    {"ldm.errors", "ldm.lazy", "ldm.progress", "ldm.threads"},
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
LONGEST = 400


def room(module: str) -> str:
    """``ldm.data.order`` -> ``ldm.data``; what is outside keeps its first name."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ldm" else parts[0]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(text: str) -> list[str]:
    """Modules that a program imports, at any depth."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            # ``from ldm import engine`` imports ldm.engine.
            names = [alias.name for alias in node.names] if node.module == "ldm" else [None]
            found += [f"ldm.{name}" if name else node.module for name in names]
    return found


def at_import(text: str) -> set[str]:
    """Modules that a program imports as soon as it is imported itself."""
    body = ast.parse(text).body
    return set(imports("\n".join(ast.unparse(n) for n in body if not isinstance(n, ast.If))))


def wrong(here: str, module: str) -> bool:
    there = room(module)
    if here == there or not module.startswith(("ldm.", "training")):
        return False
    return LEVEL[there] <= LEVEL[here]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_run_one_way(file):
    here = room(module_of(file))
    if here == "ldm":
        assert at_import(file.read_text()) == {"typing", "ldm.lazy"}, "it would import all"
        return
    assert here in LEVEL, f"{here} is a new room: give it its place in LEVELS"
    assert [m for m in imports(file.read_text()) if wrong(here, m)] == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Arrows that are left when whoever imports nothing, or is imported by nothing, is gone."""
    graph = {module: set(known) & set(graph) for module, known in graph.items()}
    while True:
        imported = set().union(*graph.values()) if graph else set()
        ends = {m for m, known in graph.items() if not known or m not in imported}
        if not ends:
            return sorted([module, *sorted(known)] for module, known in graph.items())
        graph = {m: known - ends for m, known in graph.items() if m not in ends}


def test_no_import_goes_in_a_circle():
    """At any depth: an import inside a function hides a circle, and does not open it."""
    modules = {module_of(file): file for file in FILES}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        tree, graph[module] = ast.parse(file.read_text()), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
                graph[module] |= inside or {node.module}
    for front in ("ldm", "ldm.diffusion", "ldm.guidance", "ldm.sampling"):
        del graph[front]  # which import what is asked of them
    arrows = sum(len(known & set(modules)) for known in graph.values())
    print(f"{len(graph)} modules, {arrows} imports among them")
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"], ["c", "b"]]


def test_the_rule_itself():
    assert imports("from ldm import engine\nimport ldm.data.order, torch") == [
        "ldm.engine",
        "ldm.data.order",
        "torch",
    ]
    assert wrong("ldm.diffusion", "ldm.models.codec")
    assert wrong("ldm.data", "ldm.config.loader")
    assert wrong("ldm.data", "ldm.pipeline")
    assert wrong("ldm.models", "ldm.sampling")
    assert wrong("ldm.engine", "ldm.cli")
    assert wrong("ldm.formats", "ldm.pipeline")
    assert not wrong("ldm.pipeline", "ldm.formats.lora")
    assert wrong("ldm.evaluation", "ldm.pipeline")
    assert wrong("ldm.evaluation", "ldm.demo.emoji_suites")
    assert not wrong("ldm.models", "ldm.diffusion")
    assert not wrong("ldm.data", "ldm.diffusion.streams")
    assert not wrong("training", "ldm.engine.trainer")
    assert not wrong("ldm.models", "torch.nn")
    assert at_import("import a\nif x:\n    import b\ndef f():\n    import c") == {"a", "c"}
    assert len(FILES) > 30


def test_the_maths_needs_torch_numpy_and_the_beta_tables_alone():
    allowed = {"torch", "numpy", "diffusers", "jaxtyping", "ldm.diffusion", "ldm.lazy"}
    allowed |= {"__future__"}
    for file in (ROOT / "ldm" / "diffusion").glob("*.py"):
        outside = {room(m) for m in imports(file.read_text())} - allowed
        assert outside <= set(sys.stdlib_module_names), name(file)
        beta_tables = [m for m in imports(file.read_text()) if room(m) == "diffusers"]
        assert beta_tables in ([], ["diffusers.schedulers.scheduling_ddim"])


def test_no_file_is_too_long():
    lengths = {name(file): len(file.read_text().splitlines()) for file in FILES}
    assert {file: n for file, n in lengths.items() if n > LONGEST} == {}


def test_no_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert [name(file) for file in FILES if set(file.with_suffix("").parts) & drawers] == []


TEXTS = sorted(
    path
    for folder in ("ldm", "training", "configs", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".json", ".toml", ".md")
)
MACHINE = re.compile(  # but no route, /data/{name}
    r"""(?<![\w.~])/(?:home|root|work|Users|mnt|data|tmp|opt|workspace|content)/(?!\{)"""
)


def test_no_path_of_one_machine():
    found = [
        f"{name(path)}: {line.strip()}"
        for path in TEXTS
        if path != Path(__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if MACHINE.search(line)
    ]
    assert found == []
    assert MACHINE.search("data = '/home/me/pictures'") and not MACHINE.search("tests/data/x")


# Functions that read or move a global generator.
GLOBAL_DRAWS = re.compile(
    r"""^(?:
      random\..+
    | (?:np|numpy)\.random\.(?!Generator$|Philox$).+
    | torch\.(?:rand|randn|randint|randperm|rand_like|randn_like|bernoulli|normal|multinomial)
    | torch\.(?:\w+\.)?(?:manual_seed|manual_seed_all|seed)
    | accelerate\.utils\.set_seed | set_seed
    )$""",
    re.VERBOSE,
)
# Where the global generator is set on purpose, inside fork_rng or per step for network dropout.
SEEDED = {
    "ldm/families/networks.py": 1,
    "ldm/engine/gradient.py": 1,
    "ldm/models/clip.py": 1,
}


def calls(text: str) -> list[str]:
    """Dotted names of what is called without ``generator=``."""
    return [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, (ast.Attribute, ast.Name))
        and not any(keyword.arg == "generator" for keyword in node.keywords)
    ]


def test_no_draw_from_a_global_generator():
    found = {
        name(file): drawn
        for file in FILES
        if (drawn := [c for c in calls(file.read_text()) if GLOBAL_DRAWS.match(c)])
    }
    assert {file: len(drawn) for file, drawn in found.items()} == SEEDED, found
    assert all("manual_seed" in call for drawn in found.values() for call in drawn)
    for bad in ("np.random.rand(3)", "torch.randn(3)", "random.random()", "torch.rand_like(x)"):
        assert GLOBAL_DRAWS.match(calls(bad)[0])
    for good in ("np.random.Generator(x)", "draw.random(3)", "torch.randn(3, generator=g)"):
        assert not any(GLOBAL_DRAWS.match(c) for c in calls(good))
