"""Memory that the threads of a server take from the C library."""

import os
import subprocess
import sys

import pytest

from runs import ROOT

SCRIPT = """
import ctypes, threading
from ldm.threads import share_memory

share_memory()
library, together = ctypes.CDLL(None), threading.Barrier(12)

def take():
    together.wait()
    for _ in range(100):
        library.malloc(1000)
        library.malloc(100_000)
    together.wait()

threads = [threading.Thread(target=take) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
library.malloc_stats()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="arenas are of the GNU C library")
@pytest.mark.parametrize(("said", "arenas"), [(None, 2), ("1", 1), ("5", 5)])
def test_threads_share_arenas(said, arenas):
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
    if said is not None:
        environment["MALLOC_ARENA_MAX"] = said
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Arena ") == arenas
