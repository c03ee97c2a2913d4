"""What a server does under load: requests of several clients at once against the same one by one.

    python tests/benchmarks/serving.py --model assets/ldm-small --requests 200 --clients 16

Starts ``ldm serve`` twice on folders of its own: draws the requests one after the other, then all
at once from as many threads as there are clients, and tells how many were lost, how many files are
not their twins' to the byte, seconds (50th and 95th percentile) and the server's CPU seconds.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SAMPLERS = ("ddim", "euler-a", "dpm++", "heun", "unipc", "euler")


def asked(number: int, equal: bool) -> dict[str, Any]:
    """Request ``number``: all alike but for the seed, or of many kinds."""
    found = {
        "prompt": f"a red apple, number {number}",
        "seed": number,
        "steps": 12,
        "guidance": 3.0,
    }
    if equal:
        return found
    kinds = {
        "sampler": SAMPLERS[number % len(SAMPLERS)],
        "steps": 6 + number % 7,
        "guidance": (1.0, 3.0, 5.0)[number % 3],
    }
    return found | kinds


class Server:
    """``ldm serve`` in a process of its own."""

    def __init__(self, model: str, out: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        line = ["serve", "--model", model, "--out", str(out), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ldm.cli", *line, "--queue", "1000000"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        print(self.process.stdout.readline().strip())

    def cpu(self) -> float:
        """Seconds of it so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def drawn(self, client: int, request: dict[str, Any]) -> tuple[float, bytes | None]:
        """Seconds of a request, and its picture."""
        url, start = f"http://127.0.0.1:{self.port}", time.perf_counter()
        told = {"Content-Type": "application/json", "Accept": "text/event-stream",
                "X-Client": f"client-{client}"}  # fmt: skip
        sent = urllib.request.Request(f"{url}/api/jobs", json.dumps(request).encode(), told)
        try:
            with urllib.request.urlopen(sent, timeout=3600) as answer:
                last = [line for line in answer.read().decode().splitlines() if line][-1]
            job = json.loads(last.removeprefix("data: "))
            with urllib.request.urlopen(url + job["pictures"][0]["url"]) as answer:
                return time.perf_counter() - start, answer.read()
        except (urllib.error.URLError, ValueError, KeyError, TypeError) as error:
            print(f"lost: {error}", file=sys.stderr)
            return time.perf_counter() - start, None


def run(model: str, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Draws ``requests`` by so many clients."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(model, Path(folder))
        server.drawn(0, requests[0] | {"seed": 2**31})
        before, start = server.cpu(), time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            numbers = range(len(requests))
            found = list(pool.map(lambda n: server.drawn(n % clients, requests[n]), numbers))
        cpu, seconds = server.cpu() - before, time.perf_counter() - start
        server.process.terminate()
        server.process.wait()
    return {"cpu": cpu, "seconds": seconds, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="assets/ldm-small")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--equal", action="store_true", help="all alike but for their seeds")
    given = parser.parse_args()
    requests = [asked(number, given.equal) for number in range(given.requests)]
    alone, together = (run(given.model, requests, clients) for clients in (1, given.clients))
    pairs = zip(alone["found"], together["found"], strict=True)
    times = sorted(seconds for seconds, _ in together["found"])
    print(
        f"lost {sum(data is None for _, data in together['found'])},"
        f" other than alone {sum(a[1] != b[1] for a, b in pairs)} of {len(requests)};"
        f" p50 {times[len(times) // 2]:.1f} s, p95 {times[int(len(times) * 0.95)]:.1f} s;"
        f" CPU s alone {alone['cpu']:.1f}, together {together['cpu']:.1f}"
        f" ({alone['cpu'] / together['cpu']:.2f} times as much)"
    )


if __name__ == "__main__":
    main()
