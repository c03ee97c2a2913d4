"""Our training program against diffusers' example scripts, on one model and the same pictures.

    python tests/benchmarks/training.py --peer train_text_to_image.py --out table.md
    python tests/benchmarks/training.py --peer train_text_to_image_lora.py --lora --out table.md

``--peer`` is ``examples/text_to_image/...`` of diffusers, which is run as it is, once without any
flag and once with each ``--flags`` ("best" is the fastest). The model has the proportions of Stable
Diffusion 1 (``proportioned.py``). All programs are started, and then take turns of a few steps on
the machine while the others are stopped (``stepped.py``), so that a machine that is busy is busy
for all. Both sides train the same parts of the same folder, without an average of the weights and
without text dropout, which the peer does not have, on the same number of pictures of the size they
are trained at, at the same batch and learning rate.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEER_FLAGS = ("--mixed_precision bf16", "--mixed_precision bf16 --dataloader_num_workers 1")
HELD_OUT = 16


class ProgramError(RuntimeError):
    """A program that is measured ended before it was asked to."""


@dataclass
class Program:
    """One training program, which stops itself after every turn.

    Args:
        name: row of the table.
        script: a training script.
        arguments: its command line.
        result: folder of what it has trained.
        folder: where its time stamps and its output go.
        environment: added to this process's.
    """

    name: str
    script: Path
    arguments: Sequence[str]
    result: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    cold: bool = False  # the first of its kind, which finds nothing cached
    peak: int = 0  # bytes
    over: bool = False

    def start(self, first: int, turn: int) -> None:
        """Runs it to the end of its first turn, of ``first`` steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stamps, self.log = self.folder / "stamps", self.folder / "log"
        command = [sys.executable, str(HERE / "stepped.py"), str(self.stamps), str(first)]
        command += [str(turn), str(self.script), *self.arguments]
        self.peak, self.over, self.began = 0, False, time.monotonic()
        self.used: list[float] = []  # CPU seconds at the end of every turn
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        self._wait()

    def turn(self) -> None:
        """Lets it run until it has done its next turn, or is over."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self._wait()

    def kill(self) -> None:
        """Ends it and what it has started."""
        if hasattr(self, "process") and not self.over:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.over = True

    def _wait(self) -> None:
        process = psutil.Process(self.process.pid)
        while True:
            found, status = os.waitpid(self.process.pid, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                self.used.append(processor_time(process))
                return
            if found:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.over = True
                if self.process.returncode:
                    last = self.log.read_text().strip().splitlines()[-1:]
                    raise ProgramError(f"{self.name}: {''.join(last)} (all of it: {self.log})")
                return
            self.peak = max(self.peak, resident(process))
            time.sleep(0.02)

    @property
    def first_step(self) -> tuple[float, float]:
        """Seconds from its start to the end of its first step, and CPU seconds."""
        at, used = map(float, self.stamps.read_text().split()[:2])
        return at - self.began, used

    def turns(self) -> list[list[float]]:
        """Seconds of every step after the first turn, by turn."""
        return parse(self.stamps.read_text())


def resident(process: psutil.Process) -> int:
    """Bytes in memory of ``process`` and all that it has started."""
    total = 0
    try:
        for part in (process, *process.children(recursive=True)):
            total += part.memory_info().rss
    except psutil.NoSuchProcess:  # ended meanwhile
        pass
    return total


def processor_time(process: psutil.Process) -> float:
    """CPU seconds of ``process`` and all that it has started and that is still there."""
    parts = (process, *process.children(recursive=True))
    return sum(sum(part.cpu_times()[:2]) for part in parts)


def parse(stamps: str) -> list[list[float]]:
    """Seconds of every step by turn; those before the first pause are left out."""
    turns: list[list[float]] = []
    before = 0.0
    for line in stamps.splitlines():
        at, _, event = line.split(" ", 2)
        if event == "goes on":
            turns.append([])
        elif turns:
            turns[-1].append(float(at) - before)
        before = float(at)
    return [turn for turn in turns if turn]


@dataclass(frozen=True)
class Row:
    """What was measured of one program: images/s by turn, CPU seconds an image, seconds and CPU
    seconds, bytes.
    """

    name: str
    ours: bool
    cold: bool
    speeds: Sequence[float]
    processor: float
    first_step: tuple[float, float]
    peak: int
    held_out: float

    @property
    def speed(self) -> float:
        return median(self.speeds)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each program, its speed against that of the peer without flags and with
    the fastest ones.
    """
    peers = [row for row in rows if not row.ours]
    plain, best = peers[0], max(peers, key=lambda row: row.speed)
    lines = [
        "| program | images/s (slowest to fastest turn) | x peer at its defaults |"
        " x peer at its best | CPU s an image | first step, s (CPU s) | peak memory, MB |"
        " held-out loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        against = [median_ratio(row, other) for other in (plain, best)]
        mark = " (its best)" if row is best else ""
        lines.append(
            f"| {row.name}{mark} | {row.speed:.2f} ({min(row.speeds):.2f} to"
            f" {max(row.speeds):.2f}) | {against[0]:.2f} | {against[1]:.2f} |"
            f" {row.processor:.3f} | {row.first_step[0]:.1f} ({row.first_step[1]:.1f})"
            f"{', cold' if row.cold else ''} |"
            f" {row.peak / 1e6:,.0f} | {row.held_out:.4f} |"
        )
    return "\n".join(lines)


def median_ratio(row: Row, other: Row) -> float:
    """Median over the rounds of the ratio of speeds: two turns of one round lie side by side."""
    return median(a / b for a, b in zip(row.speeds, other.speeds, strict=True))


def peer(name: str, arguments: argparse.Namespace, flags: str, steps: int, work: Path) -> Program:
    """diffusers' script."""
    where = work / "programs" / name.replace(" ", "_")
    line = ["--pretrained_model_name_or_path", str(work / "model")]
    line += ["--train_data_dir", str(work / "pictures"), "--resolution", str(arguments.size)]
    line += ["--train_batch_size", str(arguments.batch), "--max_train_steps", str(steps)]
    line += ["--learning_rate", str(arguments.lr), "--seed", "0"]
    line += ["--output_dir", str(where / "result"), *shlex.split(flags)]
    environment = {"HF_DATASETS_CACHE": str(work / "datasets")}
    return Program(name, arguments.peer, line, where / "result", where, environment)


def ours(
    name: str,
    arguments: argparse.Namespace,
    precision: str,
    steps: int,
    work: Path,
    **changes: str,
) -> Program:
    """``training/train.py``, set as the peer is."""
    where = work / "programs" / name.replace(" ", "_").replace(",", "")
    config = {
        "run": str(where / "result"),
        "model": str(work / "model"),
        "data": {"path": str(work / "pictures"), "held_out_fraction": 0.0},
        "images": {"size": arguments.size},
        "batch_size": arguments.batch,
        "duration": f"{steps} steps",
        "optimizer": {"lr": arguments.lr},
        "text_dropout": 0.0,
        "ema": None,
        "validation": None,
        "precision": precision,
        **changes,
    }
    if arguments.lora:
        config["lora"] = {"rank": arguments.rank}
    where.mkdir(parents=True, exist_ok=True)
    file = where / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {
        "LDM_CACHE": str(work / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    script = ROOT / "training" / "train.py"
    return Program(
        name, script, ["--config", str(file)], where / "result" / "final", where, environment
    )


def main() -> None:
    sys.path[:0] = [str(ROOT), str(HERE)]
    import diffusers
    import proportioned
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so end the programs
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--peer", type=Path, required=True, help="diffusers' script")
    parser.add_argument("--lora", action="store_true", help="the script is the one for LoRA")
    parser.add_argument(
        "--flags",
        action="append",
        help="flags that the peer is also run with; may be given several times (default:"
        f" {'; '.join(PEER_FLAGS)})",
    )
    parser.add_argument("--out", type=Path, help="write the table here as well")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="turns of every program")
    parser.add_argument("--turn", type=int, default=5, help="steps of a turn")
    parser.add_argument(
        "--threads", type=int, help="of every program; on a machine that others use, 1 is fairest"
    )
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps")
    arguments = parser.parse_args()
    arguments.peer = arguments.peer.resolve()
    arguments.size, arguments.rank = proportioned.SIZE, proportioned.RANK
    if arguments.quick:
        arguments.rounds, arguments.turn = 2, 2
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="ldm-benchmark-") as folder:
        text = measure(arguments, Path(folder), proportioned)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def measure(arguments: argparse.Namespace, work: Path, proportioned) -> str:
    """The whole report, markdown."""
    steps = arguments.turn * (arguments.rounds + 1)
    say("makes the pictures and the model")
    proportioned.pictures(work / "pictures", arguments.pictures, 0)
    proportioned.pictures(work / "held_out", HELD_OUT, 1)
    base = proportioned.model(work / "model", work / "pictures")
    flops = proportioned.gigaflops(work / "model", arguments.lora)
    untrained = proportioned.held_out_loss(base, work / "held_out")
    say("times the parts of a step")
    times = {
        precision: proportioned.seconds(
            work / "model", arguments.lora, arguments.batch, precision == "bfloat16"
        )
        for precision in ("float32", "bfloat16")
    }
    peers = [peer("peer, defaults", arguments, "", steps, work)]
    for flags in arguments.flags or PEER_FLAGS:
        peers.append(peer(f"peer, {flags}", arguments, flags, steps, work))
    mine = [
        ours(f"ours, {precision}", arguments, precision, steps, work)
        for precision in ("float32", "bfloat16")
    ]
    name, low = "ours, bfloat16, cached in bfloat16", {"cache_precision": "bfloat16"}
    mine.append(ours(name, arguments, "bfloat16", steps, work, **low))
    peers[0].cold = mine[0].cold = mine[2].cold = True
    programs = [peers[0], mine[0], *peers[1:], *mine[1:]]
    rows = []
    try:
        for program in programs:
            say(f"starts: {program.name}")
            program.start(arguments.turn, arguments.turn)
        for number in range(arguments.rounds):
            say(f"round {number + 1} of {arguments.rounds}")
            for program in programs:
                program.turn()
        for program in programs:
            peak, used = program.peak, program.used
            program.turn()  # saves, and is over
            speeds = [arguments.batch / median(turn) for turn in program.turns()]
            trained = arguments.batch * arguments.turn * arguments.rounds
            rows.append(
                Row(
                    name=program.name,
                    ours=program in mine,
                    cold=program.cold,
                    speeds=speeds,
                    processor=(used[-1] - used[0]) / trained,
                    first_step=program.first_step,
                    peak=peak,
                    held_out=trained_loss(program, arguments, work, proportioned),
                )
            )
    finally:
        for program in programs:
            program.kill()
    return report(arguments, flops, times, rows, untrained, proportioned.SD1)


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def trained_loss(program: Program, arguments: argparse.Namespace, work: Path, proportioned):
    """Held-out loss of what a program has saved."""
    from diffusers import UNet2DConditionModel

    from ldm.pipeline import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline.from_pretrained(work / "model")
    if arguments.lora:
        pipe.load_lora_weights(program.result)
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(program.result / "unet")
    return proportioned.held_out_loss(pipe, work / "held_out")


def report(arguments, flops, times, rows, untrained, sd1) -> str:
    """The table with what it needs to be read."""
    peers = [row for row in rows if not row.ours]
    best = max(peers, key=lambda row: row.speed)
    kind = "LoRA" if arguments.lora else "full training"
    steps = arguments.turn * (arguments.rounds + 1)
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
    shares = [flops.vae / flops.forward, flops.text / flops.forward]
    wanted = [sd1["vae"] / sd1["unet"], sd1["text"] / sd1["unet"]]
    lines = [
        f"**{kind}**, batch {arguments.batch}, {steps * arguments.batch} images each,"
        f" {arguments.rounds} rounds of {arguments.turn} steps; {os.cpu_count()} CPU cores,"
        f" {arguments.threads or os.cpu_count()} of them for each program, Python"
        f" {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages),
        "",
        table(rows),
        "",
        f"Held-out loss before training: {untrained:.4f}.",
        "",
        f"GFLOP an image: U-Net forward {flops.forward:.2f}, with backward {flops.step:.2f},"
        f" autoencoder {flops.vae:.2f} ({shares[0]:.2f} forward passes; SD 1 {wanted[0]:.2f}), text"
        f" {flops.text:.3f} ({shares[1]:.3f}; SD 1 {wanted[1]:.3f}). By these a perfect cache is"
        f" worth {flops.limit:.2f}x.",
    ]
    for precision, cost in times.items():
        lines.append(
            f"By the CPU time that a batch takes here in {precision} ({cost.step:.2f} s forward and"
            f" backward, {cost.vae:.2f} s autoencoder, {cost.text:.3f} s text): {cost.limit:.2f}x."
        )
    warm = next(row for row in rows if row.ours and not row.cold)
    lines += ["", f"Cold: nothing was cached before, of {arguments.pictures} pictures."]
    for row in rows:
        if row.ours and row.cold:
            # What starting and the first step itself take is in both.
            fill = row.first_step[1] - warm.first_step[1]
            fill -= arguments.batch * (row.processor - warm.processor)
            fill = max(fill, 1e-9) / arguments.pictures
            lines.append(
                f"{row.name}: filling the cache takes {fill:.3f} CPU s an image, once; an image of"
                f" a first epoch, that included, costs {fill + row.processor:.3f} CPU s (the peer"
                f" {peers[0].processor:.3f}, at its best {best.processor:.3f}), of every later one"
                f" {row.processor:.3f}."
            )
    lines += [
        "",
        "Each of ours against the peer at its best: "
        + ", ".join(
            f"{row.name.removeprefix('ours, ')} {median_ratio(row, best):.2f}x by the clock and"
            f" {best.processor / row.processor:.2f}x by CPU time"
            for row in rows
            if row.ours
        )
        + ".",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
