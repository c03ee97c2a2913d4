"""Long work without a terminal: a line every half minute."""

import io
import logging
import sys
from itertools import count

import pytest
import torch
from typer.testing import CliRunner

import tiny
from ldm import progress
from ldm.evaluation.sheets import counted
from ldm.progress import Progress, track
from runs import train


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, in seconds."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "ldm.progress")
    return lambda: [r.message for r in caplog.records if r.name == "ldm.progress"]


def test_a_line_every_half_minute_with_what_is_left(clock, said):
    with Progress("training", "images", 64_000, done=1_000) as work:
        for second in range(1, 71):
            clock.now = 100.0 + second
            work.note = f"loss {1 / second:.4f}"
            work.advance(100)
    assert said() == [
        "training: 4,000 of 64,000 images, loss 0.0333, 100 images/s, 0:10:00 left",
        "training: 7,000 of 64,000 images, loss 0.0167, 100 images/s, 0:09:30 left",
        "training: 7,000 images in 0:01:10, 100 images/s",
    ]


def test_slow_work_and_work_of_unknown_length(clock, said):
    with Progress("drawing", "pictures", 4) as work:
        clock.now += 40
        work.advance(0.5)
        clock.now += 20
        work.advance(0.25)  # within half a minute of the last line
        clock.now += 20
        work.advance(0.25)
    with Progress("looking", "pictures", None) as work:
        clock.now += 30
        work.advance(90_000)
    assert said() == [
        "drawing: 0 of 4 pictures, 0.013 pictures/s, 0:04:40 left",
        "drawing: 1 of 4 pictures, 0.013 pictures/s, 0:04:00 left",
        "drawing: 1 pictures in 0:01:20, 0.013 pictures/s",
        "looking: 90,000 pictures, 3,000 pictures/s",
        "looking: 90,000 pictures in 30.0 s, 3,000 pictures/s",
    ]


def test_short_work_inner_work_and_broken_work_end_without_a_line(clock, said):
    for _ in track(range(3), "counting"):
        clock.now += 0.1
    with Progress("training", "images", 10) as outer:
        for _ in track(range(3), "validating"):
            clock.now += 20
        outer.advance(10)
    with pytest.raises(KeyError), Progress("failing", "images", 10):
        clock.now += 100
        raise KeyError
    assert said() == [
        "validating: 2 of 3 pictures, 0.05 pictures/s, 0:00:20 left",
        "training: 10 of 10 images, 0.17 images/s, 0:00:00 left",
        "training: 10 images in 0:01:00, 0.17 images/s",
    ]


def test_only_the_main_process_tells(clock, said, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for _ in track(range(3), "counting"):
        clock.now += 40
    assert said() == []


def test_lines_are_read_by_whoever_listens(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    before = {name: logging.getLogger(name).level for name in ("ldm", "ldm.progress")}
    stderr = io.StringIO()
    try:
        logging.getLogger("ldm").setLevel(logging.NOTSET)  # a program lets all through
        progress.listen("ldm.progress")
        monkeypatch.setattr(sys, "stderr", stderr)  # as rich does while a bar is shown
        progress.log.info("a line")
        logging.getLogger("ldm.data").info("none")
        logging.getLogger("ldm.data").warning("another")
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
    assert stderr.getvalue() == "INFO: a line\nWARNING: another\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_bar_for_each_work(clock, said, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("training", "images", 10) as outer:
        clock.now += 31
        outer.note = "loss [0.5]"
        outer.advance(5)
        for _ in track(range(2), "validating"):
            Progress._bars.refresh()
        assert len(Progress._bars.tasks) == 1
        Progress._bars.refresh()
    assert Progress._bars is None
    shown = terminal.getvalue()
    assert "training" in shown and "loss [0.5]" in shown and "validating" in shown
    assert "5/10" in shown and "0.16 images/s" in shown
    assert said() == ["training: 5 images in 31.0 s, 0.16 images/s"]


@pytest.mark.parametrize(("sampler", "evaluations"), [("ddim", 4), ("heun", 7)])
def test_drawing_advances_with_every_evaluation(sampler, evaluations):
    pipe = tiny.pipeline()
    seen = []

    class Seen(Progress):
        def advance(self, count: float = 1) -> None:
            super().advance(count)
            seen.append(self.done)

    with Seen("drawing", "pictures", 3) as work, counted(pipe, work, 3):
        pipe(["a", "b", "c"], num_inference_steps=4, sampler=sampler, batch_size=2, seed=0)
    each = 3 / (2 * evaluations)
    assert seen == pytest.approx([each * n for n in range(1, 2 * evaluations + 1)])
    assert progress._whole(work.done) == 3
    assert "progress_bar" not in vars(pipe)


def test_everything_that_takes_long_in_a_run_tells(tmp_path, own_cache, said, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    train(
        tmp_path / "run",
        duration="1 step",
        precision="float32",
        validation={"images": 4, "levels": 2, "prompts": ["a red circle"], "steps": 2},
        score={"captions": 2, "shown": 2, "steps": 2},
    )
    works = list(dict.fromkeys(line.partition(":")[0] for line in said()))
    assert works == [
        "measuring the captions of shapes",
        "caching latents of 16x16",
        "caching text",
        "training",
        "measuring held-out loss",
        "drawing the validation's previews",
        "drawing the score's pictures, drawn",
        "reading the pictures to compare with",
    ]
    (line,) = [line for line in said() if line.startswith("training: 16 of 16")]
    assert ", loss " in line and line.endswith("0:00:00 left")


def test_checking_data_tells(pictures, own_cache, said, monkeypatch):
    from ldm.cli import app

    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert CliRunner().invoke(app, ["data", "check", str(pictures)]).exit_code == 0
    works = {line.partition(":")[0] for line in said()}
    assert works == {
        f"looking at the pictures of {pictures}",
        f"examining the pictures of {pictures}",
    }


def test_likelihood_and_held_out_loss_tell(said, monkeypatch):
    from ldm.diffusion import Condition, ContinuousVP, Objective, predictor
    from ldm.evaluation.heldout import held_out_bits, held_out_loss

    monkeypatch.setattr(progress, "EVERY", 0.0)
    ticks = count(100)
    monkeypatch.setattr(progress, "time", type("T", (), {"monotonic": lambda _: next(ticks)})())
    process, z = ContinuousVP(), torch.zeros(3, 1, 4, 4)

    def denoiser(x, timestep, cond):
        return 0 * x

    cond = Condition(extra={"label": torch.zeros(3)})
    held_out_loss(Objective(), process, denoiser, z, cond, levels=2, batch=2)
    held_out_bits(predictor(denoiser, "eps"), process, z, cond, steps=2, batch=2)
    loss = [line for line in said() if line.startswith("measuring held-out loss")]
    bits = [line for line in said() if line.startswith("measuring likelihood")]
    assert (len(loss), len(bits)) == (4 + 1, 2 * 8 + 1)
    assert "3 of 3 pictures" in loss[-2] and "3 of 3 pictures" in bits[-2]
