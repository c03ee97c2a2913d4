"""Runs a training script as it is, and notes when each of its optimiser steps is over.

    python stepped.py STAMPS FIRST TURN SCRIPT [ARGUMENT ...]

Once FIRST steps are done, and then after every TURN more, the process group stops itself (SIGSTOP)
until it is sent SIGCONT: so that several programs, all of them started, can take turns on one
machine. STAMPS gets one line for each event, ``step`` or ``goes on``, behind the time (monotonic)
and the CPU time of this process, both in seconds. The script is not changed: the hook is torch's
own, on every optimiser.
"""

import os
import runpy
import signal
import sys
import time

from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    stamps, first, turn, script, *arguments = sys.argv[1:]
    done = 0
    file = open(stamps, "w", buffering=1)  # open to the end of the process

    def note(event: str) -> None:
        file.write(f"{time.monotonic():.6f} {time.process_time():.6f} {event}\n")

    def stepped(*_: object) -> None:
        nonlocal done
        done += 1
        note("step")
        if done >= int(first) and (done - int(first)) % int(turn) == 0:
            os.killpg(0, signal.SIGSTOP)
            note("goes on")

    register_optimizer_step_post_hook(stepped)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
