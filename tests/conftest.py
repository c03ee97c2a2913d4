"""Every test runs offline, on the CPU, from fixed seeds."""

import gc
import os
import signal
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import typer.testing
from jaxtyping import install_import_hook
from PIL import Image

import forked
import shapes_held

gc.disable()  # until all is imported: none of it is garbage

# What a program has written outlives its kill; only a machine that goes off takes what is not on
# its disk. Tests kill programs, and would wait for the disk a hundred times a run.
os.fsync = lambda descriptor: None

# Each of the hundreds of commands that tests run would make all that there are: 86 ms of CPU.
typer.testing._get_command = cache(typer.testing._get_command)

# Before anything imports them: what is called in these rooms is held to the shapes it names.
install_import_hook(["ldm.diffusion", "ldm.guidance", "ldm.models"], "shapes_held.held")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    # Where the tests are started in the background Ctrl-C is ignored, by what they start as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):  # one of the processes of pytest-xdist
        forked.join()
    else:
        forked.meet()


# The longest files, which begin first: or one of two processes ends long before the other. Before
# others that read emoji comes the one that renders them: or two processes render them at once.
LONG = [
    f"test_{name}.py"
    for name in (
        "shards", "faults", "page", "cached", "emoji", "sdxl_runs", "notebooks", "processes",
        "runs", "server", "estimate", "distil", "pipeline_call", "evaluate", "bad_runs",
        "frozen_dtype", "lora_sdxl", "going_on", "chosen_parts", "classifier", "process_samplers",
        "compiled", "unclip_runs", "imagen_runs", "lora_run", "resting", "suites_in_runs",
        "controlnet_runs", "papers", "combinations", "objectives", "sd3_runs", "lora",
        "stock_callbacks", "lora_sd3", "flux_runs", "pixels", "textual_inversion", "averages",
        "network", "emoji_suites", "shipped_model", "schedulers_on_mixtures", "watch_runs",
        "watch",
    )
]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()  # a million objects of what is imported, which no collection need look through
    import torch

    if not torch.accelerator.is_available():
        # Otherwise it writes down the stack, once for each kind of device that is not there.
        torch.manual_seed = torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _fixed_global_generator() -> None:
    import torch  # which a process that only hands out tests can do without

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shapes_held() -> None:
    shapes_held.begin()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that no other test has filled."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def kept_cache(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one of all tests to which it is no matter who has filled it."""
    folder = tmp_path_factory.getbasetemp() / "kept-cache"
    monkeypatch.setenv("LDM_CACHE", str(folder))
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a training program in this process as its command line would: exit status, stderr."""
    from programs import in_this_process

    return in_this_process(tmp_path, monkeypatch, capsys)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks are compiled by a backend that runs what was traced as it is, since another rounds
    otherwise; a number for each graph.
    """
    from ldm.models import compiled

    graphs: list[int] = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, _: (graphs.append(1), graph.forward)[1])
    return graphs


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(8):
        Image.new("RGB", (20, 20), (30 * n, 0, 0)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    return folder
