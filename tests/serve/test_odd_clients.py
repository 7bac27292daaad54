"""Clients that speak HTTP in the ways that libraries do not: by hand, on the bytes of a connection."""

from __future__ import annotations

import json
import socket
import struct
import time

import pytest

from tests.support.serve_support import NAME, Running, ask, chat_body, running, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "one two three four five six seven eight nine ten " * 4


@pytest.fixture(scope="module")
def server():
    with running() as made:
        yield made


def sent(body: object, *headers: str, path: str = CHAT, version: str = "1.1", chunks: int = 0) -> bytes:
    """A request as bytes; with ``chunks``, its body in pieces of so many bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json", *headers]
    lines.append("Transfer-Encoding: chunked" if chunks else f"Content-Length: {len(raw)}")
    head = "\r\n".join([*lines, "", ""]).encode()
    if not chunks:
        return head + raw
    pieces = [raw[first : first + chunks] for first in range(0, len(raw), chunks)]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX-Trailer: a\r\n\r\n"


def said(server: Running, raw: bytes) -> bytes:
    """All that comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(raw)
        return b"".join(iter(lambda: line.recv(1 << 16), b""))


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_a_plain_body_and_a_closed_connection(server, stream: bool):
    head, _, body = said(server, sent(chat_body(temperature=0, stream=stream), version="1.0")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"chunked" not in head.lower()
    assert body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)["usage"]["completion_tokens"] > 3


def test_chunked_bodies_with_trailers(server):
    for size in (1, 7, 4096):
        answer = said(server, sent(chat_body(temperature=0), "Connection: close", chunks=size))
        assert answer.startswith(b"HTTP/1.1 200") and b"You said: hello" in answer
    waits = said(server, sent(chat_body(temperature=0), "Expect: 100-continue", "Connection: close"))
    assert waits.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


def test_requests_on_one_line_are_answered_in_their_order(server):
    asked = [
        sent(chat_body("first", temperature=0)),
        sent(chat_body("second", temperature=0, stream=True)),
        sent(b"{"),
        sent(chat_body("fourth", temperature=0), "Connection: close"),
    ]
    answer = said(server, b"".join(asked))
    assert [answer.count(status) for status in (b"HTTP/1.1 200 OK", b"HTTP/1.1 400")] == [3, 1]
    places = [answer.find(mark) for mark in (b"You said: first", b"[DONE]", b"not valid JSON", b"You said: fourth")]
    assert places == sorted(places) and places[0] > 0
    refused = said(server, sent(chat_body("last", temperature=0)) + sent(b"x" * 70_000) + asked[-1])
    assert refused.count(b"HTTP/1.1 200") == 2 and refused.count(b"HTTP/1.1 413") == 1


def test_many_small_requests(server):
    """Hundreds on one connection and hundreds on as many; neither files nor pages are left behind."""
    body, answers = {"model": NAME, "prompt": [5, 6], "max_tokens": 1, "temperature": 0}, set()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        reader = line.makefile("rb")
        for _ in range(400):
            line.sendall(sent(body, path=COMPLETIONS))
            assert reader.readline().startswith(b"HTTP/1.1 200")
            length = 0
            while (header := reader.readline()) != b"\r\n":
                length = int(header.split(b":")[1]) if header.lower().startswith(b"content-length") else length
            answers.add(json.loads(reader.read(length))["choices"][0]["text"])
    answers |= {ask(server.port, COMPLETIONS, body).json["choices"][0]["text"] for _ in range(200)}
    assert len(answers) == 1


def test_a_reader_who_is_slow_gets_all_of_it():
    with running(lambda _: LONG, narrow=True) as server, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(20)
        line.connect(("127.0.0.1", server.port))
        line.sendall(
            sent(chat_body(temperature=0, n=4, stream=True, logprobs=True, top_logprobs=20), "Connection: close")
        )
        began, quick = time.monotonic(), ask(server.port, CHAT, chat_body(temperature=0, max_tokens=3))
        assert quick.status == 200 and time.monotonic() - began < 10
        found = b""
        while piece := line.recv(2048):
            found += piece
            time.sleep(0.0005)
    assert found.count(b'"finish_reason":"stop"') == 4 and found.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("reset", [False, True])
def test_who_leaves_during_the_prompt_leaves_nothing(reset: bool):
    with running(pause=0.01) as server:
        for number in range(12):
            body = {
                "model": NAME,
                "prompt": [5 + number] * 1500,
                "max_tokens": 50,
                "n": 1 + number % 3,
                "stream": number % 2 == 0,
            }
            line = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            line.sendall(sent(body, path=COMPLETIONS))
            time.sleep(0.004 * number)
            if reset:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.close()
        pool = server.engine.pool
        assert until(lambda: not server.engine.busy and pool.available == pool.num_pages - 1)


def test_stop_strings_cut_wherever_they_lie(server):
    """Over the borders of tokens, and inside characters of several bytes: whole and streamed."""
    body = {"model": NAME, "prompt": "hello", "max_tokens": 60, "temperature": 1, "seed": 5, "ignore_eos": True}
    full = ask(server.port, COMPLETIONS, body).json["choices"][0]["text"]
    assert len(full.encode()) > len(full) > 80
    for first in range(0, len(full), 9):
        for length in (1, 2, 5):
            stop = full[first : first + length]
            (choice,) = ask(server.port, COMPLETIONS, {**body, "stop": ["no such", stop]}).json["choices"]
            assert (choice["text"], choice["finish_reason"]) == (full[: full.find(stop)], "stop")
    raw = ask(server.port, COMPLETIONS, {**body, "stop": full[40:43], "stream": True}).raw.decode()
    chunks = [json.loads(line.removeprefix("data: ")) for line in raw.split("\n\n") if line.startswith("data: {")]
    told = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert told == full[: full.find(full[40:43])]


def test_a_prompt_of_exactly_the_limit(server):
    context = ask(server.port, "/v1/models").json["data"][0]["max_model_len"]
    body = {"model": NAME, "temperature": 0, "ignore_eos": True}
    for prompt, new, status in ((context - 1, 1, 200), (context, 1, 400), (context - 1, 2, 400), (context - 9, 9, 200)):
        answer = ask(server.port, COMPLETIONS, {**body, "prompt": [7] * prompt, "max_tokens": new})
        assert answer.status == status, answer.raw
        assert status == 400 or answer.json["usage"]["total_tokens"] == context
    echoed = {**body, "prompt": [7] * (context - 1), "max_tokens": 0, "echo": True, "logprobs": 1}
    assert ask(server.port, COMPLETIONS, echoed).status == 200


def test_a_body_that_is_still_arriving_does_not_hold_up_the_end():
    with running(grace=20) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
            line.sendall(sent(chat_body())[:-5])
            ask(server.port, "/health")  # behind it in the event loop
            began = time.monotonic()
            server.signal()
            answer = b"".join(iter(lambda: line.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"shutting_down" in answer
        server.thread.join(10)
        assert not server.thread.is_alive() and time.monotonic() - began < 8
