"""Load, impatience and endings: the queue, the clock, clients that leave, and shutting down."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from telechat_twins.core.serve.server import is_defect
from tests.support.engine_support import CONTEXT
from tests.support.serve_support import NAME, Reply, Running, ask, chat_body, running, until

CHAT = "/v1/chat/completions"
LONG = "a long answer, please " * 4


def metrics_of(server: Running) -> dict[str, float]:
    """Every sample of the page, which is checked for its form."""
    answer = ask(server.port, "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found, kinds = {}, {}
    for line in answer.raw.decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            kinds[name] = kind
        elif not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
            family = re.sub(r"(_bucket|_sum|_count)?(\{.*\})?$", "", name)
            assert family in kinds and (kinds[family] != "histogram" or family != name), line
    return found


@contextlib.contextmanager
def asking(server: Running, **options):
    """A request whose answer nobody reads yet; the connection is closed at the end."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.sock = socket.socket()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sock.settimeout(30)
    connection.sock.connect(("127.0.0.1", server.port))
    body = json.dumps(chat_body(LONG, temperature=0, **options))
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


def test_a_full_queue_is_said_with_when_to_come_again():
    with running(pause=0.02, max_running=2, max_queue=1) as server:
        with asking(server) as one, asking(server) as two, asking(server) as three:
            assert until(lambda: server.service.open_answers == 3)
            answer = ask(server.port, CHAT, chat_body())
            assert (answer.status, answer.error["type"], answer.error["code"]) == (
                429,
                "rate_limit_error",
                "queue_full",
            )
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert until(lambda: metrics_of(server)["tele_running"] == 2)
            assert metrics_of(server)["tele_queue_length"] == 1
            texts = [
                json.loads(line.getresponse().read())["choices"][0]["message"]["content"] for line in (one, two, three)
            ]
            assert texts == [f"You said: {LONG}"] * 3
        assert ask(server.port, CHAT, chat_body()).status == 200
        # Two answers to one question take two places, and three more than there will ever be.
        with asking(server, n=2), asking(server):
            assert until(lambda: server.service.open_answers == 3)
            assert ask(server.port, CHAT, chat_body()).status == 429
        assert ask(server.port, CHAT, chat_body(n=4)).status == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages_at_once(stream):
    with running(pause=0.02) as server:
        with asking(server, stream=stream, n=3) as connection:
            assert until(lambda: server.engine.pool.available < server.engine.pool.num_pages - 1)
            if stream:
                assert connection.getresponse().read(20)
        assert until(lambda: server.service.open_answers == 0, 2)
        assert until(lambda: server.engine.pool.available == server.engine.pool.num_pages - 1, 2)
        made = server.service.metrics.generated_tokens
        assert made < 3 * 30
        assert metrics_of(server)['tele_requests_total{endpoint="chat",outcome="client_gone"}'] == 1
        assert ask(server.port, CHAT, chat_body("still here?")).status == 200


def test_a_client_that_leaves_while_it_waits_leaves_the_queue():
    with running(pause=0.02, max_running=1) as server, asking(server):
        assert until(lambda: server.service.open_answers == 1)
        with asking(server):
            assert until(lambda: server.service.open_answers == 2)
        assert until(lambda: server.service.open_answers == 1, 2)


def test_an_answer_that_takes_too_long_is_ended():
    with running(pause=0.02, seconds=0.3) as server:
        answer = ask(server.port, CHAT, chat_body(LONG))
        assert (answer.status, answer.error["type"], answer.error["code"]) == (504, "timeout", "timeout")
        assert "after 0.3 s, this server's time limit" in answer.error["message"]
        *told, last = events_of(ask(server.port, CHAT, chat_body(LONG, stream=True)))
        assert last["error"]["code"] == "timeout" and len(told) > 2
        assert until(lambda: server.engine.pool.available == server.engine.pool.num_pages - 1, 2)
        assert metrics_of(server)['tele_requests_total{endpoint="chat",outcome="timed_out"}'] == 2


def events_of(answer: Reply) -> list[dict]:
    lines = answer.raw.decode().strip().split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_shutting_down_lets_answers_end_and_admits_nothing():
    with running(pause=0.01) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(ask, server.port, CHAT, chat_body(LONG))
        stream = pool.submit(ask, server.port, CHAT, chat_body(LONG, stream=True))
        assert until(lambda: server.service.open_answers == 2)
        server.signal()
        assert until(lambda: server.service.draining)
        late = ask(server.port, CHAT, chat_body())
        assert (late.status, late.error["code"]) == (503, "shutting_down") and late.headers["retry-after"]
        assert ask(server.port, "/health").json == {"status": "shutting down"}
        assert whole.result(20).json["choices"][0]["message"]["content"] == f"You said: {LONG}"
        assert stream.result(20).raw.endswith(b"data: [DONE]\n\n")
        server.thread.join(10)
        assert not server.thread.is_alive() and not server.service.alive
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), timeout=1)


@pytest.mark.parametrize("second", [False, True])
def test_who_does_not_end_in_time_is_told_so(second):
    """By the end of the grace, or by the second signal."""
    with running(pause=0.05, grace=60 if second else 0.3) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(ask, server.port, CHAT, chat_body(LONG))
        stream = pool.submit(ask, server.port, CHAT, chat_body(LONG, stream=True))
        assert until(lambda: server.service.open_answers == 2 and server.service.metrics.generated_tokens > 4)
        server.signal()
        if second:
            assert until(lambda: server.service.draining)
            server.signal()
        answer = whole.result(10)
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        assert "the answer is not complete" in answer.error["message"]
        *told, last = events_of(stream.result(10))
        assert last["error"]["code"] == "shutting_down" and len(told) > 1
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_http_that_breaks_off_is_no_defect_of_the_server(caplog):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n"
    json_head = head + "Content-Type: application/json\r\n"
    with running() as server:
        for text in (
            head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
            json_head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
            json_head + "Content-Length: 9\r\n\r\n{",
        ):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
                line.sendall(text.encode())
                line.shutdown(socket.SHUT_WR)
                said = line.recv(1000)
                assert not said or said.startswith(b"HTTP/1.1 400 ")
        assert ask(server.port, CHAT, chat_body(max_tokens=1)).status == 200
    assert not caplog.records, "it is reported as a defect"


STALLED = {"stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}  # more than buffers hold


def test_a_reader_who_stands_still_is_given_up_in_time(caplog):
    with running(lambda question: "word " * 1500, seconds=1.5, narrow=True) as server:
        with asking(server, **STALLED):
            assert until(lambda: server.service.metrics.generated_tokens > 20)
            assert until(lambda: server.service.open_answers == 0, 10)
            assert until(lambda: server.engine.pool.available == server.engine.pool.num_pages - 1, 2)
            assert metrics_of(server)['tele_requests_total{endpoint="chat",outcome="client_gone"}'] == 1
        assert ask(server.port, CHAT, chat_body(max_tokens=1)).status == 200
    assert not caplog.records, "it is reported as a defect"


def test_a_reader_who_stands_still_does_not_keep_the_server_from_ending():
    with running(lambda question: "word " * 1500, grace=0.2) as server, asking(server, **STALLED):
        assert until(lambda: server.service.metrics.generated_tokens > 100)
        server.signal()
        server.thread.join(15)
        assert not server.thread.is_alive()


def test_numbers_of_the_metrics():
    with running() as server:
        before = metrics_of(server)
        assert before["tele_cache_pages_free"] == server.engine.pool.num_pages - 1
        assert before["tele_request_seconds_count"] == before["tele_cache_pages_used"] == 0
        bodies = [chat_body("hello"), chat_body("hello", stream=True), chat_body("hello", n=2)]
        used = [ask(server.port, CHAT, body) for body in bodies]
        ask(server.port, "/v1/completions", {"model": NAME, "prompt": [40] * CONTEXT})
        usages = [used[0].json["usage"], used[0].json["usage"], used[2].json["usage"]]
        found = metrics_of(server)
        assert found['tele_requests_total{endpoint="chat",outcome="ok"}'] == 3
        assert found['tele_requests_total{endpoint="completions",outcome="refused"}'] == 1
        assert found["tele_generated_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
        prompt = usages[0]["prompt_tokens"]
        by_source = [found[f'tele_prompt_tokens_total{{source="{source}"}}'] for source in ("computed", "cache")]
        # Four answers to one prompt: whole pages of it are found again, the last token is always computed.
        cached = (prompt - 1) // 16 * 16
        assert by_source == [4 * prompt - 3 * cached, 3 * cached]
        assert found["tele_first_token_seconds_count"] == found["tele_request_seconds_count"] == 3
        assert found["tele_next_token_seconds_count"] == found["tele_generated_tokens_total"] - 4
        counts = [value for name, value in found.items() if name.startswith("tele_request_seconds_bucket")]
        assert counts == sorted(counts) and counts[-1] == 3


def test_no_thread_is_left_of_a_server():
    before = threading.active_count()
    with running() as server:
        ask(server.port, CHAT, chat_body())
    assert until(lambda: threading.active_count() == before, 5)


def test_a_defect_of_the_server_is_reported():
    """What clients do is left out of the log; anything else stays."""
    stays = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "Exception in ASGI application\n", (), None)
    left_out = logging.LogRecord(
        "uvicorn.error", logging.ERROR, "", 0, "ASGI callable returned without completing response.", (), None
    )
    assert is_defect(stays) and not is_defect(left_out)
