"""What others notice of six bodies of 3.9 MB that are sent to `tele serve` at once and refused for their length.

    python -m tests.campaigns.large_bodies --backend pt

Every client is a process of its own. Times depend on the machine, so nothing is promised here and no test runs it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.docs_workspace import add_release
from tests.serve_soak import CHAT, NAME
from tests.serve_support import process

SENDERS, ROUNDS = 6, 3
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
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": TEXT}]}).encode()
    for _ in range(ROUNDS):
        together.wait()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        started = time.perf_counter()
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 400
        found.put(time.perf_counter() - started)
        connection.close()


def watch(ask: Callable[[int], float], port: int, ended: Any, found: Any) -> None:
    seconds = []
    while not ended.is_set():
        seconds.append(ask(port))
    found.put(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="pt", choices=("ms", "pt"))
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="tele-large-") as folder:
        add_release(Path(folder))
        options = ("--backend", args.backend, "--checkpoint", f"{folder}/run", "--name", NAME)
        with process(*options) as (_, port):
            asks = {"first token": first_token, "/health": health}
            idle = {name: [ask(port) for _ in range(30)] for name, ask in asks.items()}
            together, ended, refused = spawn.Barrier(SENDERS), spawn.Event(), spawn.Queue()
            queues = {name: spawn.Queue() for name in asks}
            workers = [spawn.Process(target=watch, args=(asks[n], port, ended, queues[n])) for n in asks]
            workers += [spawn.Process(target=send, args=(port, together, refused)) for _ in range(SENDERS)]
            for worker in workers:
                worker.start()
            refusals = [refused.get() for _ in range(SENDERS * ROUNDS)]
            ended.set()
            busy = {name: queue.get() for name, queue in queues.items()}
            for worker in workers:
                worker.join()
    for name in asks:
        for when, seconds in (("idle", idle[name]), ("meanwhile", busy[name])):
            print(f"{name} {when}: median {statistics.median(seconds):.3f} s, most {max(seconds):.3f} s")
    print(f"refused: median {statistics.median(refusals):.2f} s, most {max(refusals):.2f} s")


if __name__ == "__main__":
    main()
