"""Hostile requests against `tele serve`: bodies, headers and paths that ought to be refused, quickly and cheaply.

    python -m tests.campaigns.hostile_requests --backend pt --trials 1000 --seed 0 --out report.json

Each request has to be answered with 4xx in the OpenAI interface's form within SECONDS, or with 200 where it is legal
after all, or where it is no HTTP with a closed connection. Meanwhile the server's memory may rise by MEGABYTES, its
log may hold no traceback, and at the end it has to answer a question as it did before. Half of the requests come one
at a time, so that their seconds are their own; of the others WORKERS are under way at once.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.docs_workspace import add_release
from tests.support.serve_soak import CHAT, COMPLETIONS, NAME, bad_request, broken_http, percentiles
from tests.support.serve_support import ask, process, until

SECONDS = 2.0
MEGABYTES = 200.0
WORKERS = 6
BODY = 4 << 20  # the server's default
JSON = {"Content-Type": "application/json"}
GOOD = {"model": NAME, "prompt": "The answer is", "max_tokens": 8, "temperature": 0}


@dataclass(frozen=True)
class Hostile:
    """``kind`` is for the report. ``raw`` in place of the rest: bytes for a connection, as they are."""

    kind: str
    path: str = CHAT
    body: bytes = b""
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = tuple(JSON.items())
    legal: bool = False  # 200 is right, too


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}], **fields}


def written(body: dict[str, Any], rng: random.Random) -> bytes:
    return json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "backslashreplace")


def _size(rng: random.Random, most: int = BODY - 500) -> int:
    """Small sizes and large ones alike."""
    return min(most, int(2 ** rng.uniform(4, 22)))


def long_text(rng: random.Random) -> Hostile:
    letters = rng.choice(
        ["x", "word ", "\u4f60\u597d", "\U0001f600", " ", "\n", "a\u0301", "<_end>", "</tool_call>", '"\\']
    )
    text = letters * (_size(rng, BODY // 3) // len(letters.encode()) + 1)
    place = rng.randrange(6)
    if place == 0:
        return Hostile("long text", COMPLETIONS, written({**GOOD, "prompt": text}, rng), legal=True)
    if place == 1:
        size = max(1, len(text) // 100)
        prompts = [text[n : n + size] for n in range(0, min(len(text), 200 * size), size)]
        return Hostile("long text", COMPLETIONS, written({**GOOD, "prompt": prompts}, rng), legal=True)
    fields: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": text}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text[:100]}] * (len(text) // 100)}]},
        {"messages": [{"role": "user", "content": text[:9]}] * min(9000, len(text) // 9)},
        {rng.choice(["user", "cache_salt", "model", "stop", text[: len(text) // 2], "metadata", "tools"]): text},
    ]
    return Hostile("long text", CHAT, written(chat(**fields[place - 2]), rng), legal=True)


def nested(rng: random.Random) -> Hostile:
    depth = _size(rng, BODY // 8)
    opened, closed = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"[{},", b"]"), (b'[{"b":1},', b"]")])
    depth = min(depth, BODY // (len(opened) + 2))
    inner = opened * depth + b"1" + closed * (depth if rng.random() < 0.7 else 0)
    field = rng.choice([b"metadata", b"messages", b"tools", b"prompt", b"x", b"logit_bias"])
    body = written(chat(), rng)[:-1] + b', "' + field + b'": ' + inner + b"}"
    return Hostile("nested", CHAT, rng.choice([body, inner]), legal=depth < 60)


def numbers(rng: random.Random) -> Hostile:
    digits = "".join(rng.choice("0123456789") for _ in range(rng.choice([20, 33, 400, 4000, 4300, 5000, 100_000])))
    number = rng.choice(
        ["1e999", "-1e999", "1e308", "NaN", "Infinity", "-Infinity", "1" + digits, "-1" + digits, "0." + digits]
        + ["1e" + digits[:9], "1e-" + digits[:9], "00", "1.", "+1", "0x10", "1_0", "1" + digits + ".5", "-0", "1e-5"]
    )
    field = rng.choice(
        ["max_tokens", "max_completion_tokens", "n", "seed", "top_k", "temperature", "top_p", "logprobs", "min_p"]
        + ["top_logprobs", "presence_penalty", "repetition_penalty", "metadata", "user", "model", "x"]
    )
    inner = rng.choice(["%s", "%s", "[%s]", '{"a": %s}', '{"5": %s}']) % number
    base = rng.choice([chat(), GOOD])
    body = json.dumps({key: value for key, value in base.items() if key != field})
    body = body[:-1] + f', "{rng.choice([field, field, "logit_bias", "prompt"])}": {inner}}}'
    return Hostile("numbers", CHAT if "messages" in base else COMPLETIONS, body.encode(), legal=True)


def many(rng: random.Random) -> Hostile:
    count = _size(rng, BODY // 8)
    fields: dict[str, Any] = rng.choice(
        [
            lambda: {"stop": ["x"] * count},
            lambda: {"stop": ["ab" * 400 + str(n) for n in range(16)]},
            lambda: {"logit_bias": {str(n): 1 for n in range(min(count, 200_000))}},
            lambda: {"metadata": {str(n): n for n in range(min(count, 200_000))}},
            lambda: {f"field{n}": 1 for n in range(min(count, 100_000))},
            lambda: {"tools": [{"type": "function", "function": {"name": "f"}}] * min(count, 50_000)},
            lambda: {"messages": [{}] * count},
            lambda: {"messages": [{"role": "tool", "content": ""}] * min(count, 50_000)},
            lambda: {"messages": [{"role": "user", "content": ""}] * min(count, 50_000)},
            lambda: {"n": 128, "max_tokens": 200},
            lambda: {"modalities": ["text"] * count, "stream_options": [None] * 99},
        ]
    )()
    if rng.random() < 0.4:
        ids = rng.choice([[1] * count, [[1]] * count, ["a"] * count, [[]] * count, [1.5] * count, [[1, 2]] * 128])
        return Hostile(
            "many", COMPLETIONS, written({**GOOD, "prompt": ids, "n": rng.choice([1, 128])}, rng), legal=True
        )
    return Hostile("many", CHAT, written(chat(**fields), rng)[:BODY], legal=True)


def twice(rng: random.Random) -> Hostile:
    key = rng.choice(["model", "messages", "max_tokens", "stream", "x\u001b"])
    body = json.dumps(chat())[:-1]
    value = rng.choice(["1", "null", '"tiny"', "[]", "true"])
    doubled = rng.choice([f'"{key}": {value}', '"metadata": {"a": 1, "a": 2}', '"tools": [{"a": {"b": 1, "b": 1}}]'])
    again = f", {doubled}" if key in doubled and f'"{key}"' in body else f", {doubled}, {doubled}"
    return Hostile("twice", CHAT, (body + again + "}").encode())


def letters(rng: random.Random) -> Hostile:
    odd = rng.choice(
        ["\x1b[2J", "\x1b]0;x\x07", "\r\nSet-Cookie: a=b", "\x00", "\ud800", "\udc00x", "\u202e", "\x9b31m"]
    )
    odd = odd * rng.choice([1, 1, 50, 5000])
    fields: dict[str, Any] = rng.choice(
        [{odd: 1}, {"model": odd}, {"user": odd}, {"stop": [odd]}, {"stop": odd[:1000]}, {"metadata": {odd: odd}}]
        + [{"cache_salt": odd}, {"messages": [{"role": odd, "content": "x"}]}, {"logit_bias": {odd: 1}}]
        + [{"messages": [{"role": "user", "content": odd, odd: 1}]}, {"tools": [{"type": odd}]}, {"service_tier": odd}]
        + [{"tools": [{"type": "function", "function": {"name": odd, "description": odd}}]}]
        + [{"messages": [{"role": "user", "content": [{"type": odd}]}]}]
    )
    raw = json.dumps(chat(**fields)).encode()
    return Hostile("letters", CHAT, raw, legal=True)


def mutated(rng: random.Random) -> Hostile:
    """A good body with some bytes changed, cut out or repeated."""
    raw = bytearray(
        json.dumps(rng.choice([chat(stop=["a"], seed=3, tools=[]), {**GOOD, "logit_bias": {"5": 1}}])).encode()
    )
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(raw))
        what = rng.randrange(4)
        if what == 0:
            raw[at] = rng.randrange(256)
        elif what == 1:
            del raw[at : at + rng.randrange(1, 9)]
        elif what == 2:
            raw[at:at] = raw[at : at + rng.randrange(1, 40)] * rng.choice([1, 3, 1000])
        else:
            raw[at:at] = rng.choice(
                [b"\xef\xbb\xbf", b"\x00", b"//", b"{}", b"[", b'"', b"\\u", b",,", b"\xed\xa0\x80"]
            )
        raw = raw or bytearray(b"{")
    return Hostile("mutated", rng.choice([CHAT, COMPLETIONS]), bytes(raw), legal=True)


def headers(rng: random.Random) -> Hostile:
    odd = rng.choice(
        [("Host", "evil.example"), ("Host", "localhost:99999999"), ("Host", "a" * 9000), ("Content-Length", "9" * 30)]
        + [
            ("Content-Type", "text/plain"),
            ("Content-Type", "application/json" * 400),
            ("Authorization", "Bearer " * 99),
        ]
        + [("X" * 9000, "1"), ("Cookie", "a=b; " * 3000), ("Expect", "100-continue"), ("Upgrade", "websocket")]
        + [("Content-Encoding", "gzip"), ("Transfer-Encoding", "gzip, chunked"), ("Range", "bytes=0-"), ("TE", "x")]
        + [("Connection", "Upgrade"), ("X-Forwarded-For", "\x0bevil"), ("Content-Length", "-1"), ("Content-Type", "")]
    )
    several = tuple((f"X-{n}", "v") for n in range(rng.choice([0, 0, 50, 800])))
    return Hostile("headers", CHAT, json.dumps(chat()).encode(), headers=(*JSON.items(), odd, *several), legal=True)


def paths(rng: random.Random) -> Hostile:
    place = rng.choice(
        ["/../../etc/passwd", "/%2e%2e/%2e%2e/", "/v1/models/" + "a" * 9000, "/v1/models/%1b%5b2J", "/%00", "/%ff%fe"]
        + ["//evil.example/", "/v1/chat/completions/", "/v1/chat/completions?x=" + "y" * 5000, "/docs", "/openapi.json"]
        + [
            "/v1//completions",
            "http://evil.example/v1/models",
            "*",
            "/" + "a/" * 4000,
            "/v1/models/%ed%a0%80",
            "/?" * 500,
        ]
        + ["/metrics/x", "/health/..", "/\u00e9".encode().decode("latin-1"), "/v1/models/tiny%0d%0aX: y"]
    )
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "BREW", "CONNECT"])
    return Hostile("paths", place, b"{}", method, legal=True)


def known(rng: random.Random) -> Hostile:
    """What the soak test sends."""
    method, path, body, sent = bad_request(rng)
    return Hostile("soak", path, body, method, tuple(sent.items()))


GENERATORS: tuple[Callable[[random.Random], Hostile], ...] = (
    long_text, nested, numbers, many, twice, letters, mutated, headers, paths, known,
)  # fmt: skip


def hostile(number: int, seed: int) -> Hostile:
    """The request of that number: every kind in turn."""
    rng = random.Random(seed * 1_000_003 + number)
    return GENERATORS[number % len(GENERATORS)](rng)


def fault_of(request: Hostile, port: int) -> tuple[str | None, str]:
    """(what is wrong with the server's answer, or None; the status, or "closed")."""
    line = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = f"{request.method} {request.path} HTTP/1.1\r\n"
    named = {name.lower() for name, _ in request.headers}
    sent = [("Connection", "close"), *request.headers]
    sent += [("Host", f"127.0.0.1:{port}")] if "host" not in named else []
    sent += [("Content-Length", str(len(request.body)))] if "content-length" not in named else []
    head += "".join(f"{name}: {value}\r\n" for name, value in sent) + "\r\n"
    with line:
        with contextlib.suppress(OSError):  # refused before all of it was sent
            line.sendall(head.encode("latin-1", "replace") + request.body)
        try:
            response = http.client.HTTPResponse(line, method=request.method)
            response.begin()
            raw = response.read()
        except TimeoutError:
            return "no answer", "none"
        except (OSError, http.client.HTTPException):
            return None, "closed"  # no HTTP, or an answer that was lost because the rest was not read
    status = response.status
    if status == 200:
        return (None if request.legal else f"served: {raw[:200]!r}"), "200"
    if not 400 <= status < 500:
        return f"status {status}: {raw[:300]!r}", str(status)
    if request.method == "HEAD":
        return None, str(status)
    try:
        error = json.loads(raw)["error"]
    except (ValueError, KeyError, TypeError):
        return f"no error object: {raw[:300]!r}", str(status)
    if not error["message"] or len(raw) > 2000:
        return f"no reason, or too many words: {raw[:300]!r}", str(status)
    if not (error["message"] + str(error["param"])).isprintable():
        return f"control characters: {raw[:300]!r}", str(status)
    return None, str(status)


class Memory:
    """The most that a process held, looked at every few milliseconds."""

    def __init__(self, pid: int) -> None:
        self._process, self._ended = psutil.Process(pid), threading.Event()
        self.before = self.most = self.now()
        self._thread = threading.Thread(target=self._watch)

    def now(self) -> float:
        return self._process.memory_info().rss / 2**20

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.most = max(self.most, self.now())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def campaign(
    port: int,
    pid: int,
    trials: int,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    within: float = SECONDS,
) -> dict[str, Any]:
    """The report on the server at ``port``, process ``pid``; "wrong" lists the promises that were broken. ``within``:
    seconds that a refusal may take when nothing else is under way."""
    expected = ask(port, COMPLETIONS, GOOD).json["choices"]
    wrong: list[str] = []
    statuses: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    seconds: dict[bool, list[float]] = {True: [], False: []}

    def one(number: int, alone: bool) -> None:
        request = hostile(number, seed)
        started = time.perf_counter()
        fault, status = fault_of(request, port)
        took = time.perf_counter() - started
        kinds[request.kind] += 1
        statuses[status] += 1
        seconds[alone].append(took)
        if fault is None and alone and took > within and status != "200":
            fault = f"{took:.2f} s"
        if fault is not None:
            wrong.append(f"request {number} ({request.kind}, {len(request.body)} bytes): {fault}")
        if number % 100 == 99:
            say(f"{number + 1} of {trials}, {len(wrong)} wrong")

    rng = random.Random(seed)
    with Memory(pid) as memory:
        for number in range(0, trials // 2):
            one(number, True)
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda number: one(number, False), range(trials // 2, trials)))
        wrong += [said for _ in range(max(1, trials // 50)) if (said := broken_http(port, rng))]
    if memory.most - memory.before > MEGABYTES:
        wrong.append(f"memory rose by {memory.most - memory.before:.0f} MiB")
    if not until(lambda: ask(port, "/health").status == 200, 10):
        wrong.append("/health is not 200 at the end")
    if ask(port, COMPLETIONS, GOOD).json["choices"] != expected:
        wrong.append("the server answers otherwise than before")
    return {
        "trials": trials,
        "seed": seed,
        "kinds": dict(sorted(kinds.items())),
        "statuses": dict(sorted(statuses.items())),
        "seconds_alone": percentiles(seconds[True]),
        "seconds_in_company": percentiles(seconds[False]),
        "memory_rise_mib": {"most": memory.most - memory.before, "end": memory.now() - memory.before},
        "wrong": wrong,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="pt", choices=("ms", "pt"))
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the report here, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tele-hostile-") as folder:
        add_release(Path(folder))
        options = ("--backend", args.backend, "--checkpoint", f"{folder}/run", "--name", NAME)
        with process(*options) as (made, port):  # AssertionError for a traceback in its log
            say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
            report = {"backend": args.backend, **campaign(port, made.pid, args.trials, args.seed, say)}
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
