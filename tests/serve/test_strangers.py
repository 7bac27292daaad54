"""What the server owes its operator: no word of one client to another, no page of another site, no client that keeps
the others waiting."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import pytest

from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.serve import length, protocol
from telechat_twins.core.serve.hosts import Hosts, allowed_hosts
from tests.support.engine_support import CONTEXT
from tests.support.serve_support import NAME, ask, chat_body, running, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = [40 + n % 50 for n in range(100)]  # six full pages of 16 tokens


def cached(server, key=None, **options) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 1, **options}
    return ask(server.port, COMPLETIONS, body, headers=headers).json["usage"]["prompt_tokens_details"]["cached_tokens"]


# ----------------------------------------------------------------------------------------------------- kept prompts


def test_a_prompt_is_found_again_by_its_own_key_only():
    with running(keys=["first-key", "second-key"]) as server:
        assert cached(server, "first-key") == 0
        assert cached(server, "second-key") == 0, "it tells that somebody else's prompt began so"
        assert cached(server, "first-key") == cached(server, "second-key") == 96


def test_a_salt_keeps_the_users_of_one_key_apart():
    for keys in ([], ["key"]):
        with running(keys=keys) as server:
            key = keys[0] if keys else None
            assert cached(server, key, cache_salt="anna") == 0
            assert cached(server, key, cache_salt="bert") == cached(server, key) == 0
            assert cached(server, key, cache_salt="anna") == cached(server, key) == 96
    with running(keys=["key", "other"]) as server:
        assert cached(server, "key", cache_salt="anna") == cached(server, "other", cache_salt="anna") == 0


def test_several_answers_to_one_prompt_share_it_under_a_key():
    with running(keys=["key"]) as server:
        body = chat_body("word " * 40, n=3, temperature=0)
        answer = ask(server.port, CHAT, body, headers={"Authorization": "Bearer key"}).json
        assert len({choice["message"]["content"] for choice in answer["choices"]}) == 1
        tokens = server.service.metrics.cached_tokens
        assert tokens == 2 * (answer["usage"]["prompt_tokens"] // 16 * 16)


def test_without_reuse_nothing_is_found_again():
    with running(reuse=False) as server:
        assert cached(server) == cached(server) == 0


# ------------------------------------------------------------------------------------------------------ other sites


def status_of(server, host: str | None, path: str = "/v1/models", version: str = "1.1") -> int:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        named = "" if host is None else f"Host: {host}\r\n"
        line.sendall(f"GET {path} HTTP/{version}\r\n{named}Connection: close\r\n\r\n".encode())
        return int(line.makefile("rb").readline().split()[1])


LOCAL = ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.8.9.1", "[::1]:9", "[::ffff:127.0.0.1]", "a.localhost.:1")
FOREIGN = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1")
FOREIGN += ("[::2]", "localhost@evil.example", "localhost:80:80", "localhost evil", "0.0.0.0", "", "a\x00b")


def test_only_this_machines_names_are_answered():
    with running() as server:
        for path in ("/", "/health", "/metrics", "/v1/models", "/nowhere"):
            assert status_of(server, "evil.example", path) == 421, "a page of evil.example could read it"
        assert {status_of(server, host) for host in LOCAL} == {200}
        for host in FOREIGN:
            assert status_of(server, host) in (400, 421), host
        assert status_of(server, None, version="1.0") == 421 and status_of(server, None) == 400
        answer = ask(server.port, CHAT, chat_body(), headers={"Host": "evil.example\t\x1b[2J"})
        assert answer.status in (400, 421)
        error = ask(server.port, CHAT, chat_body(), headers={"Host": "evil.example"}).error
        assert error["code"] == "unknown_host" and "'evil.example'" in error["message"]
        assert server.service.metrics.requests.total() == 0
    with running(hosts=Hosts(["evil.example"])) as server:
        assert status_of(server, "Evil.Example.:1") == status_of(server, "localhost") == 200
    with running(hosts=None) as server:
        assert status_of(server, "evil.example") == 200


@pytest.mark.parametrize(
    ("listening", "host", "given", "yes", "no"),
    [
        ("127.0.0.1", "127.0.0.1", [], LOCAL, ("evil.example", None)),
        ("::1", "localhost", [], LOCAL, ("evil.example", None)),
        ("127.0.1.1", "desk", [], ("desk:8000", "localhost"), ("desk2",)),
        ("127.0.0.1", "127.0.0.1", ["a.example", "::5"], ("a.example:1", "[::5]:1", "localhost"), ("b.example",)),
        ("0.0.0.0", "0.0.0.0", ["a.example"], ("a.example", "localhost"), ("b.example", "0.0.0.0")),
    ],
)
def test_who_may_be_asked_for(listening, host, given, yes, no):
    hosts = allowed_hosts(listening, host, given)
    assert hosts is not None
    assert all(map(hosts.allows, yes)) and not any(map(hosts.allows, no))


def test_every_name_is_allowed_where_none_can_be_known():
    assert allowed_hosts("0.0.0.0", "0.0.0.0", []) is allowed_hosts("127.0.0.1", "127.0.0.1", ["*", "a"]) is None
    for name in ("http://a", "a:80", "a b", ""):
        with pytest.raises(UserError, match="--allowed-host: expected a name"):
            allowed_hosts("127.0.0.1", "127.0.0.1", [name])


def test_what_browsers_are_told():
    with running(keys=["key"]) as server:
        for path, body in (("/", None), ("/health", None), ("/v1/models", None), ("/no", None), (CHAT, b"{")):
            headers = ask(server.port, path, body).headers
            assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
            policy = headers["content-security-policy"]
            for rule in ("default-src", "frame-ancestors", "base-uri", "form-action"):
                assert f"{rule} 'none'" in policy, (path, rule)
            assert "access-control-allow-origin" not in headers
        assert ask(server.port, CHAT, method="OPTIONS", headers={"Origin": "http://evil.example"}).status == 405


# ----------------------------------------------------------------------------------------------------- slow clients


@contextlib.contextmanager
def line_to(server, text: str = ""):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(text.encode())
        yield line


def closed(line) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := line.recv(1 << 16):
            found += piece
    return found


def test_a_header_that_comes_byte_by_byte_is_given_up(monkeypatch):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.4)
    with running() as server:
        ended = threading.Event()
        with line_to(server, "GET /health HTTP/1.1\r\n") as line, line_to(server) as mute:

            def drip() -> None:
                while not ended.wait(0.05):
                    with contextlib.suppress(OSError):
                        line.sendall(b"x")

            thread = threading.Thread(target=drip)
            thread.start()
            try:
                for one in (line, mute):
                    said = closed(one)
                    assert said.startswith(b"HTTP/1.1 408 ") and b'"error"' in said
            finally:
                ended.set()
                thread.join()
        # Nor does a second request on a connection have longer.
        with line_to(server, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as line:
            said = b""
            while not said.endswith(b'"ok"}'):
                said += line.recv(1000)
            line.sendall(b"GET / HTTP/1.1\r\nHost: loc")
            assert closed(line).startswith(b"HTTP/1.1 408 ")


def test_a_body_behind_a_refusal_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n"
    with running() as server:
        with line_to(server, head + "\r\n") as line:
            assert closed(line).startswith(b"HTTP/1.1 415 ")
        with line_to(server, head.replace("Content-Length: 999999", "Transfer-Encoding: chunked") + "\r\n") as line:
            line.sendall(b"zz\r\n")  # broken, perhaps behind its answer
            assert closed(line).startswith((b"HTTP/1.1 415 ", b"HTTP/1.1 400 "))
        assert ask(server.port, "/health").status == 200


def test_silent_connections_make_way_for_new_ones():
    with running(connections=4, pause=0.02) as server, contextlib.ExitStack() as lines:
        silent = [lines.enter_context(line_to(server)) for _ in range(4)]
        assert ask(server.port, "/health").status == 200
        assert closed(silent[0]) == b"", "the one that was silent the longest"
        body = json.dumps(chat_body("word " * 50, temperature=0))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        busy = [
            lines.enter_context(line_to(server, f"{head}Content-Length: {len(body)}\r\n\r\n{body}")) for _ in "1234"
        ]
        assert until(lambda: server.service.open_answers == 4)
        with line_to(server) as late:
            said = closed(late)
            assert said.startswith(b"HTTP/1.1 503 ") and b'"code":"busy"' in said
        for line in busy:
            assert line.recv(100).startswith(b"HTTP/1.1 200 ")


# ----------------------------------------------------------------------------------------------------- large bodies


def test_what_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch):
    encoded: list[int] = []
    plain = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, *a, **k: (encoded.append(len(text)), plain(self, text, *a, **k))[1]
    )
    with running(body=1 << 20, max_queue=0, max_running=2, pause=0.01) as server:
        longest = server.engine.tokenizer.longest_piece
        for text in ("x" * 900_000, "x " * (CONTEXT * longest // 2 + 10)):
            for path, body in ((CHAT, chat_body(text)), (COMPLETIONS, {"model": NAME, "prompt": ["a", text]})):
                error = ask(server.port, path, body).error
                assert error["code"] == "context_length_exceeded", error
                assert "maximum context length is 2048 tokens" in error["message"]
        assert sum(encoded) < 100, "some of a long text was tokenized"
        # Of a text that might fit only a beginning is.
        text = "x z " * (CONTEXT * longest // 4 - 100)
        assert ask(server.port, CHAT, chat_body(text)).error["code"] == "context_length_exceeded"
        assert sum(encoded) < 2 * length.CHARACTERS_PER_TOKEN * CONTEXT < len(text)
        # Nor is anything of a request that the queue has no room for.
        before = len(encoded)
        assert ask(server.port, COMPLETIONS, {"model": NAME, "prompt": ["a"] * 3}).error["param"] == "n"
        assert len(encoded) == before


def test_two_threads_at_most_read_requests(monkeypatch):
    running_now, most, lock = [0], [0], threading.Lock()
    plain = length.check_length

    def slow(*arguments):
        with lock:
            running_now[0] += 1
            most[0] = max(most[0], running_now[0])
        threading.Event().wait(0.05)
        with lock:
            running_now[0] -= 1
        plain(*arguments)

    monkeypatch.setattr("telechat_twins.core.serve.completions.check_length", slow)
    with running(body=1 << 20, max_running=16) as server:
        bodies = [{"model": NAME, "prompt": "a", "max_tokens": 1, "user": "x" * (n % 2 * 70_000)} for n in range(8)]
        threads = [threading.Thread(target=ask, args=(server.port, COMPLETIONS, body)) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 2, "one of ordinary size beside a large one"


def test_large_bodies_are_bounded_together(monkeypatch):
    monkeypatch.setattr("telechat_twins.core.serve.intake.HELD_BODIES", 1)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 200000\r\n\r\n"
    )
    with running(body=200_000) as server:
        with line_to(server, head + " " * 150_000):
            assert until(lambda: ask(server.port, CHAT, b" " * 100_000).status == 429)
            answer = ask(server.port, CHAT, b" " * 100_000)
            assert answer.error["code"] == "overloaded" and answer.headers["retry-after"] == "1"
            assert ask(server.port, CHAT, chat_body(max_tokens=1)).status == 200, "ordinary ones are served"
        assert until(lambda: ask(server.port, CHAT, b" " * 100_000).status == 400)
