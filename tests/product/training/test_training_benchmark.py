"""The benchmark's own machinery, on scripts that take a known time; the peer is not needed."""

import importlib.util
import sys

import pytest

from runs import ROOT

SCRIPT = """
import sys, time, torch
weight = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.AdamW([weight])
for number in range(int(sys.argv[1])):
    if sys.argv[2] == "fails" and number == 3:
        raise ValueError("no more pictures")
    time.sleep(0.1)
    weight.sum().backward()
    optimizer.step()
open(sys.argv[3], "w").write("trained")
"""


@pytest.fixture(scope="module")
def benchmark():
    file = ROOT / "tests" / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("training_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def program(benchmark, folder, ends="well"):
    script, result = folder / "script.py", folder / "result"
    script.write_text(SCRIPT)
    return benchmark.Program("p", script, ["6", ends, str(result)], result, folder / "measured")


@pytest.mark.slow
def test_programs_take_turns_and_are_timed(benchmark, tmp_path):
    found = program(benchmark, tmp_path)
    try:
        found.start(2, 2)
        assert len(found.stamps.read_text().splitlines()) == 2  # it has stopped itself
        found.turn()
        found.turn()
        assert not found.over and not found.result.exists()
        found.turn()
        assert found.over and found.result.read_text() == "trained"
    finally:
        found.kill()
    turns = found.turns()
    assert [len(turn) for turn in turns] == [2, 2]
    assert all(0.1 <= step for turn in turns for step in turn)
    seconds, processor_seconds = found.first_step
    assert seconds > 0.1 and 0.1 < processor_seconds < seconds * 2
    assert found.peak > 50e6  # torch alone
    assert found.used == sorted(found.used) and len(found.used) == 3


@pytest.mark.slow
def test_a_program_that_ends_early_is_named(benchmark, tmp_path):
    found = program(benchmark, tmp_path, "fails")
    found.start(2, 2)
    with pytest.raises(benchmark.ProgramError, match="p: ValueError: no more pictures"):
        found.turn()


def test_pauses_are_no_part_of_a_step(benchmark):
    stamps = "1.0 0 step\n2.0 1 step\n50.0 1 goes on\n50.5 1 step\n51.5 1 step\n90.0 1 goes on\n"
    assert benchmark.parse(stamps) == [[0.5, 1.0]]


def test_the_table_compares_with_the_fastest_peer(benchmark):
    def row(name, ours, *speeds):
        return benchmark.Row(name, ours, False, speeds, 1.0, (9.0, 7.5), 2_000_000_000, 0.5)

    rows = [
        row("peer, defaults", False, 1, 1, 1),
        row("peer, x", False, 2, 2, 4),
        row("ours", True, 3, 3, 8),
    ]
    lines = benchmark.table(rows).splitlines()
    assert "peer, x (its best)" in lines[3]
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    # The median of 3, 3, 8, and of the rounds' ratios: 1.5, 1.5, 2.
    assert cells == [
        "ours",
        "3.00 (3.00 to 8.00)",
        "3.00",
        "1.50",
        "1.000",
        "9.0 (7.5)",
        "2,000",
        "0.5000",
    ]
