"""What others notice of six bodies of 3.9 MB that are sent to `tele serve` at once and refused for their length.

    python -m tests.campaigns.large_bodies --backend pt

Every client is a process of its own. Times depend on the machine, so nothing is promised here and no test runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.docs_workspace import add_release
from tests.support.serve_soak import CHAT, NAME
from tests.support.serve_support import process

SENDERS, ROUNDS = 6, 8
BEFORE, IDLE, BUSY, OVER = range(4)  # phases
IDLE_S = 5.0
PAUSE = 0.02  # seconds between two questions of a bystander
TEXT = "The quick brown fox. " * 186_000


def first_token(port: int) -> float:
    """Seconds until a short question's first token."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    started = time.perf_counter()
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    while (line := response.readline()) and (b'"role"' in line or line == b"\n"):
        pass
    took = time.perf_counter() - started
    connection.close()
    return took


def health(port: int) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    started = time.perf_counter()
    connection.request("GET", "/health")
    connection.getresponse().read()
    connection.close()
    return time.perf_counter() - started


def send(port: int, together: Any, found: Any) -> None:
    """ROUNDS bodies, each together with those of the other senders; the first when ``together`` lets all go."""
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": TEXT}]}).encode()
    for _ in range(ROUNDS):
        together.wait()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        started = time.perf_counter()
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 400
        found.put(time.perf_counter() - started)
        connection.close()


def watch(ask: Callable[[int], float], port: int, phase: Any, found: Any) -> None:
    """Seconds of each answer, by the phase in which it was asked for; ends with the last phase."""
    seconds: dict[int, list[float]] = {IDLE: [], BUSY: []}
    while (now := phase.value) != OVER:
        took = ask(port)
        if now == phase.value and now in seconds:
            seconds[now].append(took)
        time.sleep(PAUSE)
    found.put(seconds)


def measure(watched: int, target: int) -> tuple[dict[str, dict[int, list[float]]], list[float]]:
    """(question -> phase -> seconds at the port ``watched``, seconds until a body sent to ``target`` is refused).

    All processes are there before the first phase, so that the two differ by the bodies alone.
    """
    spawn = multiprocessing.get_context("spawn")
    asks = {"first token": first_token, "/health": health}
    together, phase, refused = spawn.Barrier(SENDERS + 1), spawn.Value("i", BEFORE), spawn.Queue()
    queues = {name: spawn.Queue() for name in asks}
    workers = [spawn.Process(target=watch, args=(asks[n], watched, phase, queues[n])) for n in asks]
    workers += [spawn.Process(target=send, args=(target, together, refused)) for _ in range(SENDERS)]
    for worker in workers:
        worker.start()
    while together.n_waiting < SENDERS:
        time.sleep(0.1)
    phase.value = IDLE
    time.sleep(IDLE_S)
    phase.value = BUSY
    for _ in range(ROUNDS):
        together.wait()
    refusals = [refused.get() for _ in range(SENDERS * ROUNDS)]
    phase.value = OVER
    found = {name: queue.get() for name, queue in queues.items()}
    for worker in workers:
        worker.join()
    return found, refusals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="pt", choices=("ms", "pt"))
    parser.add_argument(
        "--elsewhere",
        action="store_true",
        help="send the bodies to a second server: what the machine alone makes of them",
    )
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tele-large-"))
        add_release(Path(folder))
        options = ("--backend", args.backend, "--checkpoint", f"{folder}/run", "--name", NAME)
        watched = target = stack.enter_context(process(*options))[1]
        if args.elsewhere:
            target = stack.enter_context(process(*options))[1]
        found, refusals = measure(watched, target)
    for name, phases in found.items():
        for when, seconds in (("idle", phases[IDLE]), ("meanwhile", phases[BUSY])):
            median = statistics.median(seconds)
            print(f"{name} {when}: {len(seconds)} answers, median {median:.3f} s, most {max(seconds):.3f} s")
    print(f"refused: median {statistics.median(refusals):.2f} s, most {max(refusals):.2f} s")


if __name__ == "__main__":
    main()
