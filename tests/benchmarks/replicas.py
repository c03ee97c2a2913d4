"""Two servers behind HAProxy, with the file that ships: one is killed, then each is restarted, with
requests in their hands. None may be lost, and each is answered by the same picture.

    python tests/benchmarks/replicas.py [--tiny]
"""

import argparse
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from served import Balancer, Server, ask  # noqa: E402


def replicas(model: Path, folder: Path, count: int, steps: int) -> None:
    servers = [Server(model, folder / name) for name in "ab"]
    for server in servers:
        print(server.ready())
    front = Balancer(folder, [server.port for server in servers])
    usual = {"num_inference_steps": steps, "guidance_scale": 3.0}
    requests = [usual | {"prompt": f"a red apple, {n}", "seed": n} for n in range(count)]

    def one(request: dict[str, Any]) -> tuple[int, str | None]:
        answer = ask(f"{front.url}/v1/images/generations", request)
        if answer.status != 200:
            print(answer.status, answer.body[:200], file=sys.stderr)
            return answer.status, None
        return 200, answer.json["data"][0]["b64_json"]

    def all_at_once(meanwhile: Any) -> list[tuple[int, str | None]]:
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(one, request) for request in requests]
            meanwhile(futures)
            return [future.result() for future in futures]

    def done(futures: list[Any], count: int) -> None:
        while sum(future.done() for future in futures) < count:
            time.sleep(0.01)

    def kill(futures: list[Any]) -> None:
        done(futures, len(futures) // 4)
        holds = ask(f"{servers[0].url}/healthz").json["jobs"]
        servers[0].stop(signal.SIGKILL)
        print(f"one replica is killed with {holds} requests in its hands")

    def again(number: int) -> None:
        old = servers[number]
        servers[number] = Server(model, folder / "ab"[number], port=old.port)
        print(servers[number].ready())

    def restart(futures: list[Any]) -> None:
        for number in range(2):
            done(futures, (1 + number) * len(futures) // 8)
            holds = ask(f"{servers[number].url}/healthz").json["jobs"]
            servers[number].stop()
            print(f"replica {number} is asked to end with {holds} requests in its hands")
            again(number)
            time.sleep(2)  # the balancer looks once a second

    want = [one(request) for request in requests]
    assert {status for status, _ in want} == {200}
    for name, meanwhile in (("one killed", kill), ("both restarted in turn", restart)):
        if name != "one killed":
            again(0)
            time.sleep(2)
        found = all_at_once(meanwhile)
        same = sum(a == b for a, b in zip(want, found, strict=True))
        answered = sum(status == 200 for status, _ in found)
        print(f"{name}: {answered} of {len(requests)} answered, {same} equal")
    front.stop()
    for server in servers:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "ldm-small")
    parser.add_argument("--tiny", action="store_true", help="the model of the tests")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.tiny:
            import tiny

            asked.model = tiny.folder(folder / "tiny")
        replicas(asked.model, folder, asked.requests, asked.steps)


if __name__ == "__main__":
    main()
