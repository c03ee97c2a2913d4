"""The files in configs/accelerate: what accelerate makes of them, a job that restarts itself."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from launched import ENVIRONMENT, TRAIN, free_port, logged, steps, wait_for
from runs import ROOT, tree

FOLDER = ROOT / "configs" / "accelerate"
JOB = FOLDER / "slurm.sbatch"


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines"),
    [
        ("one_gpu", "NO", 1, 1),
        ("eight_gpus", "MULTI_GPU", 8, 1),
        ("several_nodes", "MULTI_GPU", 16, 2),
        ("fsdp", "FSDP", 8, 1),
    ],
)
def test_accelerate_knows_every_key(name, kind, processes, machines):
    file = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(file))  # refuses an unknown key
    assert config.distributed_type.value == kind
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert f"accelerate launch --config_file configs/accelerate/{name}.yaml" in file.read_text()
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    for key in config.fsdp_config:  # which it does not check
        assert hasattr(arguments, key), key


def test_every_file_is_covered():
    covered = {"one_gpu.yaml", "eight_gpus.yaml", "several_nodes.yaml", "fsdp.yaml", JOB.name}
    assert {file.name for file in FOLDER.iterdir()} == covered


def test_what_the_launcher_makes_of_fsdp(monkeypatch):
    line = ["--config_file", str(FOLDER / "fsdp.yaml"), "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True


# Each of as many tasks as the job has, with Slurm's variables; srun ends with the highest status.
SRUN = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    arguments.pop(0)
tasks = [
    subprocess.Popen(arguments, env={{**os.environ, "SLURM_PROCID": n, "SLURM_LOCALID": n}})
    for n in map(str, range(int(os.environ["SLURM_NTASKS"])))
]
with open(os.environ["FAKE"] + "/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) printf '127.0.0.1\\nnode2\\n' ;;
requeue) echo "$2" >> "$FAKE/requeued" ;;
*) exit 1 ;;
esac
"""


@pytest.fixture
def job(tmp_path):
    """Starts the job as Slurm would, with commands of ours for srun and scontrol."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "LDM_CACHE": str(tmp_path / "cache"),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
    }

    def start(*command: str | Path) -> subprocess.Popen[str]:
        # Its port follows from its number.
        number = str(20000 + free_port() % 20000)
        return subprocess.Popen(
            ["bash", str(JOB), *map(str, command)],
            env=environment | {"SLURM_JOB_ID": number},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.parametrize(
    ("ends", "status"), [((0, 0), 0), ((0, 2), 2), ((1, 0), 1), ((137, 75), 137)]
)
def test_only_a_run_that_stopped_goes_back_into_the_queue(job, tmp_path, ends, status):
    script = f"set -- {ends[0]} {ends[1]}; shift $RANK; exit $1"
    process = job("sh", "-c", script)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == status, output
    assert not (tmp_path / "requeued").exists()


def test_what_a_task_is_told(job, tmp_path):
    script = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $1"; exit 75'
    process = job("sh", "-c", script, "task", "a word")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    (number,) = (tmp_path / "requeued").read_text().split()
    port = 20000 + int(number) % 20000
    lines = sorted(output.splitlines())
    assert lines[:2] == [f"{n} {n} 2 127.0.0.1 {port} a word" for n in (0, 1)]
    assert lines[2] == f"job {number} stopped with its state saved: back into the queue"


@pytest.mark.slow
def test_a_job_that_reaches_its_limit_goes_on(job, tmp_path):
    run, file = tmp_path / "run", tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree(run, duration="30 steps")))
    command = [sys.executable, TRAIN, "--config", file]
    process = job(*command)
    wait_for(lambda: steps(run) >= 5, process)
    for task in map(int, (tmp_path / "tasks").read_text().split()):
        os.kill(task, signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and output.count("stopped: SIGUSR1 came; all ") == 1, output
    (number,) = (tmp_path / "requeued").read_text().split()
    left = len(logged(run, "loss"))
    assert 5 <= left < 30
    process = job(*command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"after {left * 16}" not in output, output
    assert f"going on from {run}/checkpoints/images-{left * 16:012d}" in output
    assert len(logged(run, "loss")) == 30
    assert (tmp_path / "requeued").read_text().split() == [number]


def test_the_header_asks_for_what_the_script_relies_on():
    lines = JOB.read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line
    )
    name, seconds = options["signal"].split("@")  # without "B:" the tasks get it, not the script
    assert name == "USR1" and int(seconds) >= 120
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "torchrun" not in shlex.join(lines)
