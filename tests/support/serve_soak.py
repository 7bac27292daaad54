"""Many requests of every kind against `tele serve`, and many that are wrong: what leaks, and what is answered wrongly.

    python -m tests.support.serve_soak --backend pt --requests 2000 --bodies 5000     (make soak)

A short form of both runs with the tests (tests/serve/test_soak.py). Every answer is compared with the one that the same
request got when the server served nobody else.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.support.docs_workspace import add_release
from tests.support.serve_support import ask, process, until

NAME = "tiny"
WORKERS = 16
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SECRET = "sesame-4711"  # in the prompts of those who ask while others send nonsense


# ------------------------------------------------------------------------------------------------------ good requests


def good_bodies(count: int, seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """(path, body) of every kind: short and long, greedy and drawn, whole and streamed, with what can be asked for."""
    rng, made = random.Random(seed), []
    for number in range(count):
        words = " ".join(f"word{rng.randrange(97)}" for _ in range(rng.choice([1, 3, 3, 20])))
        body: dict[str, Any] = {"model": NAME, "max_tokens": rng.choice([1, 4, 12, 40]), "seed": number}
        body |= rng.choice([{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9}, {"top_k": 40, "min_p": 0.01}])
        body |= rng.choice([{}, {}, {"n": 2}, {"frequency_penalty": 0.5}, {"stop": ["e", "\n"]}])
        if number % 2:
            path, asked = CHAT, {"messages": [{"role": "user", "content": words}]}
            body |= rng.choice([{}, {"logprobs": True, "top_logprobs": 2}])
        else:
            path, asked = COMPLETIONS, {"prompt": rng.choice([words, [words, "x"]])}
            body |= rng.choice([{}, {"logprobs": 2}])
        body |= rng.choice([{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
        made.append((path, {**body, **asked}))
    return made


def answer_of(raw: bytes, stream: bool) -> list[tuple[str, str | None]]:
    """(text, finish_reason) of each choice of an answer, whole or streamed. ValueError for an error in a stream."""
    if not stream:
        chunks = [json.loads(raw)]
    else:
        lines = raw.decode().strip().split("\n\n")
        if lines[-1] != "data: [DONE]":
            raise ValueError(f"the stream ends with {lines[-1][:200]}")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            said = choice.get("delta") or choice.get("message") or choice
            text = said.get("content") or said.get("text") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
            reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
    return [(texts[index], reasons[index]) for index in sorted(texts)]


def leave(port: int, path: str, body: dict[str, Any], rng: random.Random) -> None:
    """Ask for a long answer and hang up: before it begins, or in the middle of its stream."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    long = {**body, "max_tokens": 60, "stream": True}
    connection.request("POST", path, json.dumps(long), {"Content-Type": "application/json"})
    if rng.random() < 0.6:
        response = connection.getresponse()
        for _ in range(rng.randrange(4)):
            response.readline()
    else:
        time.sleep(rng.random() * 0.05)
    connection.close()


# ------------------------------------------------------------------------------------------------------- bad requests

JUNK: tuple[Any, ...] = (
    -1, 10**40, -0.5, 1e308, "", "x", "\ud800", [], [[]], {}, {"a": 1}, [None], True, ["x" * 300] * 30, "\x00", 2.5,
)  # fmt: skip
# Values that each field may have after all, and that are therefore no mistake.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "model": (),
    "messages": (),
    "temperature": (),
    "top_p": (),
    "n": (),
    "max_tokens": (),
    "stream": (True,),
    "stop": ("x", [], "\ud800", "\x00"),
    "logit_bias": ({},),
    "tools": ([],),
    "logprobs": (True,),
    "seed": (-1,),
    "top_k": (-1,),
    "presence_penalty": (-1, -0.5),
    "user": ("", "x", "\ud800", "\x00"),
}


def bad_request(rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers) of a request that has to be refused."""
    headers = {"Content-Type": "application/json"}
    good = {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
    kind = rng.randrange(8)
    if kind == 0:
        return "POST", rng.choice([CHAT, COMPLETIONS]), rng.randbytes(rng.randrange(300)) + b"\xff", headers
    if kind == 1:
        raw = json.dumps(good).encode()
        return "POST", CHAT, raw[: rng.randrange(len(raw))], headers
    if kind == 2:
        return "POST", CHAT, b"[{"[rng.randrange(2) :][:1] * rng.randrange(1, 60_000), headers
    if kind == 3:
        return "POST", CHAT, json.dumps({**good, "field" + str(rng.random()): rng.choice(JUNK)}).encode(), headers
    if kind == 4:
        place = rng.choice(["/", "/v1", "/v1/models/x", "/health", "/v1/embeddings", "/%00", "/v1/chat/completions/"])
        return rng.choice(["PUT", "DELETE", "PATCH"]), place, b"{}", headers
    if kind == 5:
        return "POST", CHAT, json.dumps(good).encode(), {"Content-Type": rng.choice(["text/plain", "x", "a/b;c"])}
    if kind == 6:
        message = rng.choice(
            [{"role": rng.choice(JUNK), "content": "x"}, {"role": "user", "content": rng.choice((3, {}, [3], [None]))}]
        )
        return "POST", CHAT, json.dumps({**good, "messages": [message]}).encode(), headers
    field = rng.choice(sorted(HARMLESS))
    wrong = [value for value in JUNK if not any(_same(value, fine) for fine in HARMLESS[field])]
    return "POST", CHAT, json.dumps({**good, field: rng.choice(wrong)}).encode(), headers


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def refused(port: int, method: str, path: str, body: bytes, headers: dict[str, str]) -> str | None:
    """What is wrong with the server's refusal, or None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        raw = response.read()
    except OSError as error:
        return f"no answer: {error}"
    finally:
        connection.close()
    if not 400 <= response.status < 500:
        return f"status {response.status}: {raw[:300]!r}"
    try:
        error = json.loads(raw)["error"]
    except (ValueError, KeyError):
        return f"no error object: {raw[:300]!r}"
    if not error["message"] or len(raw) > 1000:
        return f"no reason, or too many words: {raw[:1500]!r}"
    return f"another's words: {raw!r}" if SECRET.encode() in raw else None


def broken_http(port: int, rng: random.Random) -> str | None:
    """Bytes that are no HTTP request at all: 4xx, or a closed line."""
    chat = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
    lines = [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00",  # a browser that expects TLS
        b"POST / HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        chat + b"Content-Length: -5\r\n\r\n",
        chat + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        rng.randbytes(200) + b"\r\n\r\n",
        b"A" * 70_000 + b"\r\n\r\n",
    ]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            line.sendall(rng.choice(lines))
            line.shutdown(socket.SHUT_WR)
        try:
            said = line.recv(1 << 16)
        except ConnectionResetError:
            said = b""
    return None if not said or re.match(rb"HTTP/1\.1 4\d\d ", said) else f"broken HTTP: {said[:200]!r}"


# --------------------------------------------------------------------------------------------------------------- runs


def state(port: int, pid: int) -> dict[str, float]:
    """What must not grow, once nothing runs any more."""
    at_rest = re.compile(rb"^tele_(running|queue_length|cache_pages_used) 0$", re.MULTILINE)
    assert until(lambda: len(at_rest.findall(ask(port, "/metrics").raw)) == 3, 20), ask(port, "/metrics").raw.decode()
    seen = psutil.Process(pid)
    # A connection that was closed takes the event loop a moment.
    until(lambda: not [c for c in seen.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED], 10)
    return {"fds": seen.num_fds(), "threads": seen.num_threads(), "megabytes": seen.memory_info().rss / 2**20}


def soak(port: int, pid: int, count: int, seed: int = 0) -> dict[str, Any]:
    """``count`` requests by WORKERS at once: a fifth of them leave early, a fifth are wrong. The report; "wrong" lists
    answers that are not those of the request alone."""
    bodies = good_bodies(40, seed)
    alone = [answer_of(ask(port, path, body).raw, bool(body.get("stream"))) for path, body in bodies]
    seconds: list[float] = []
    wrong: list[str] = []
    kinds: Counter[str] = Counter()

    def one(number: int) -> None:
        rng = random.Random(seed * 1_000_003 + number)
        which = rng.randrange(len(bodies))
        path, body = bodies[which]
        kind = rng.choice(["good", "good", "good", "leaves", "wrong"])
        kinds[kind] += 1
        if kind == "leaves":
            leave(port, path, body, rng)
            return
        if kind == "wrong":
            if said := refused(port, *bad_request(rng)):
                wrong.append(said)
            return
        started = time.perf_counter()
        answer = ask(port, path, body)
        seconds.append(time.perf_counter() - started)
        try:
            told = answer_of(answer.raw, bool(body.get("stream")))
        except (ValueError, KeyError) as error:
            wrong.append(f"status {answer.status}: {error}: {answer.raw[:300]!r}")
            return
        if told != alone[which]:
            wrong.append(f"{body}: {told} in company, {alone[which]} alone")

    def many(numbers: range) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            for done in pool.map(one, numbers):
                assert done is None

    many(range(count // 4))  # what grows once, as pools and caches, grows now
    before = state(port, pid)
    began = time.perf_counter()
    many(range(count // 4, count))
    after = state(port, pid)
    return {
        "requests": count,
        "kinds": dict(kinds),
        "requests_per_second": (count - count // 4) / (time.perf_counter() - began),
        "seconds": percentiles(seconds),
        "before": before,
        "after": after,
        "wrong": wrong,
    }


def fuzz(port: int, count: int, seed: int = 0) -> dict[str, Any]:
    """``count`` requests that have to be refused, while others with a secret in their prompts are served."""
    body = {"model": NAME, "prompt": f"{SECRET} is the word", "max_tokens": 8, "temperature": 0}
    expected, wrong, ended = ask(port, COMPLETIONS, body).json["choices"], [], threading.Event()

    def neighbour() -> None:
        while not ended.is_set():
            if ask(port, COMPLETIONS, body).json["choices"] != expected:
                wrong.append("the neighbour got another answer")

    def one(number: int) -> None:
        rng = random.Random(seed * 1_000_003 + number)
        said = broken_http(port, rng) if rng.random() < 0.05 else refused(port, *bad_request(rng))
        if said:
            wrong.append(said)

    with ThreadPoolExecutor(WORKERS + 1) as pool:
        beside = pool.submit(neighbour)
        list(pool.map(one, range(count)))
        ended.set()
        beside.result(60)
    if ask(port, "/health").status != 200:
        wrong.append("the server is not well")
    return {"bodies": count, "wrong": wrong}


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "most": max(values)}


@contextlib.contextmanager
def server(backend: str) -> Iterator[tuple[int, int]]:
    """`tele serve` on a small random model: (port, process id)."""
    with tempfile.TemporaryDirectory(prefix="tele-soak-") as folder:
        add_release(Path(folder))
        options = ("--cache-tokens", "2048", "--max-running", "12", "--max-queue", "64", "--max-body", "65536")
        with process("--backend", backend, "--checkpoint", f"{folder}/run", "--name", NAME, *options) as (made, port):
            yield port, made.pid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="pt", choices=("ms", "pt"))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--bodies", type=int, default=5000)
    args = parser.parse_args()
    with server(args.backend) as (port, pid):
        found = {"backend": args.backend, "soak": soak(port, pid, args.requests), "fuzz": fuzz(port, args.bodies)}
        found["end"] = state(port, pid)
    print(json.dumps(found, indent=1))
    return 1 if found["soak"]["wrong"] or found["fuzz"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
