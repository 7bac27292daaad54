"""A server on the loopback for tests: in a thread, on a runner without a model, or as the process that users start."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from starlette.types import ASGIApp

from telechat_twins.core.data.chat_layout import AUTO, THINKING, open_layout
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.inference.decoding.settings import Settings
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.runner import Runner
from telechat_twins.core.types import JsonObject
from tests.house import ROOT
from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import CONTEXT, Replier

pytest.importorskip("fastapi", reason="fastapi and uvicorn are in the extra serve")

from telechat_twins.core.serve.app import HttpLimits, create_app  # noqa: E402
from telechat_twins.core.serve.hosts import Hosts  # noqa: E402
from telechat_twins.core.serve.job import Served  # noqa: E402
from telechat_twins.core.serve.server import address_of, open_socket, serve_until  # noqa: E402
from telechat_twins.core.serve.service import Service  # noqa: E402

NAME = "tiny"


@dataclass
class Running:
    """A server in a thread of this process; ``signal`` is what SIGTERM does to a real one."""

    url: str
    port: int
    service: Service
    signal: Callable[[], None]
    thread: threading.Thread
    runner: Runner

    @property
    def engine(self) -> Engine:
        return self.service.engine


@contextlib.contextmanager
def running(
    reply: Callable[[str], str] = lambda question: f"You said: {question}",
    *,
    runner: Runner | None = None,
    pause: float = 0.0,
    max_running: int = 8,
    max_queue: int = 8,
    keys: Sequence[str] = (),
    body: int = 1 << 16,
    seconds: float = 30.0,
    grace: float = 5.0,
    max_prompt: int = CONTEXT - 1,
    max_new: int = CONTEXT - 1,
    tokenizer: Tokenizer | None = None,
    narrow: bool = False,
    hosts: Hosts | None = Hosts(),  # noqa: B008  (it is never changed)
    connections: int = 64,
    reuse: bool = True,
    settings: Settings | None = None,
    adapters: tuple[str, ...] = (),
    thinking: bool = False,
) -> Iterator[Running]:
    """Serve until the block is left; ``narrow``: on connections that hold little; ``thinking``: the prompt opens
    <think>.

    AssertionError when a page or a thread is left behind.
    """
    runner = runner or Replier(reply, pause, thinking=thinking)
    tokenizer = tokenizer or tiny_tokenizer(in_vocabulary=True)
    limits = EngineLimits(max_len=CONTEXT, max_running=max_running)
    service = Service(Engine(runner, tokenizer, reuse=reuse, limits=limits, adapters=len(adapters)), max_queue)
    served = served_model(service.engine, tokenizer, max_prompt, max_new, settings, adapters, thinking)
    app = create_app(service, served, HttpLimits(body=body, seconds=seconds), keys, hosts)
    with open_socket("127.0.0.1", 0) as opened:
        if narrow:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with in_thread(app, service, opened, grace, connections) as (thread, end):
            yield Running(address_of(opened), opened.getsockname()[1], service, end, thread, runner)
        pool = service.engine.pool
        pool.check()
        assert pool.available == pool.num_pages - 1, "a page was left behind"


def served_model(
    engine: Engine,
    tokenizer: Tokenizer,
    max_prompt: int,
    max_new: int,
    settings: Settings | None = None,
    adapters: tuple[str, ...] = (),
    thinking: bool = False,
) -> Served:
    """The tiny model as clients see it."""
    return Served(
        layout=open_layout(tokenizer, THINKING if thinking else AUTO)[0],
        grammars=engine.grammars,
        settings=settings or Settings(),
        adapters=adapters,
        name=NAME,
        config=engine.config,
        tokenizer=tokenizer,
        context=CONTEXT,
        max_prompt=max_prompt,
        max_new=max_new,
        created=1,
        fingerprint="fp_test",
    )


@contextlib.contextmanager
def in_thread(
    app: ASGIApp, service: Service, opened: socket.socket, grace: float, connections: int
) -> Iterator[tuple[threading.Thread, Callable[[], None]]]:
    """Serve in a thread until the block is left: it, and what a signal does. AssertionError if it does not end."""
    up, loops, queues = threading.Event(), list[asyncio.AbstractEventLoop](), list[asyncio.Queue[int]]()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        queues.append(asyncio.Queue())
        await serve_until(queues[0], app, service, opened, grace, up.set, connections)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server")
    thread.start()
    assert up.wait(20), "the server did not start"

    def end() -> None:
        with contextlib.suppress(RuntimeError):  # its loop may have ended
            loops[0].call_soon_threadsafe(queues[0].put_nowait, signal.SIGTERM)

    try:
        yield thread, end
    finally:
        end()
        thread.join(grace + 20)
        assert not thread.is_alive() and not service.alive, "a thread was left behind"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    raw: bytes = field(repr=False)

    @property
    def json(self) -> JsonObject:
        return json.loads(self.raw)

    @property
    def error(self) -> JsonObject:
        """The error object, whose shape is checked."""
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"} and found["message"] and found["type"]
        return found


def ask(
    port: int, path: str, body: object = None, *, method: str | None = None, headers: dict[str, str] | None = None
) -> Reply:
    """One request on a connection of its own. ``body``: an object for JSON, bytes as they are, None for GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method or ("GET" if body is None else "POST"), path, raw, {**sent, **(headers or {})})
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def chat_body(question: str = "hello", **options: object) -> JsonObject:
    return {"model": NAME, "messages": [{"role": "user", "content": question}], **options}


def until(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait for something to become true; whether it did."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


@contextlib.contextmanager
def process(*words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`tele serve` as a user starts it, on a free port: it and its port; killed at the end if it still runs.

    AssertionError when it reported a defect of its own.
    """
    command = [sys.executable, "-m", "telechat_twins.core.cli", "serve", "--port", "0", *words]
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    # A file and no pipe: one that nobody reads would stop the server when it is full.
    with tempfile.TemporaryFile("w+") as log:
        started = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            log.seek(0)
            assert found, f"no ready line: {line!r}\n{log.read()}"
            yield started, int(found[1])
        finally:
            if started.poll() is None:
                started.kill()
            started.communicate()
        log.seek(0)
        said = log.read()
        assert "Traceback" not in said, said
