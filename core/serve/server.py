"""Server process: one socket, one event loop, one engine thread, and an orderly shutdown on SIGTERM and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import h11
import uvicorn
from starlette.types import ASGIApp

from telechat_twins.core.errors import UserError
from telechat_twins.core.serve.protocol import BoundedProtocol
from telechat_twins.core.serve.service import Service

SPARE_FILES = 64  # that a process has open beside its connections
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLOSING_SECONDS = 5  # for connections to close once every response is complete
BACKLOG = 1024
SWITCH_SECONDS = 0.0005


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. UserError when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}; give an address of this machine, e.g. 127.0.0.1") from None
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; choose another port, or 0 for any free one"
        ) from None
    return opened


def allow_connections(most: int) -> None:
    """Let the process hold so many connections. UserError when the system does not allow as many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"--max-connections: {most} connections need {wanted} open files, and the system allows {hard} "
            f"(ulimit -Hn); give at most {hard - SPARE_FILES}, or raise the limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def address_of(opened: socket.socket) -> str:
    """The socket's URL."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_defect(record: logging.LogRecord) -> bool:
    """Whether a record of uvicorn reports an internal error rather than a client's doing.

    Two records are a client's: HTTP that broke off, which uvicorn has answered itself before the application does, and
    a stream that was ended because its client did not read it.
    """
    raised = record.exc_info[1] if record.exc_info else None
    broken = isinstance(raised, h11.LocalProtocolError) and "state=MUST_CLOSE" in str(raised)
    return not broken and record.msg != "ASGI callable returned without completing response."


class Server(uvicorn.Server):
    """uvicorn without its signals: it would refuse connections at the first; this server answers 503 meanwhile."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    app: ASGIApp, service: Service, opened: socket.socket, grace: float, ready: Callable[[], None], most: int
) -> None:
    """``serve_until`` the first of SIGTERM, Ctrl-C and the terminal's end; a second one ends the grace."""

    async def with_signals() -> None:
        signals: asyncio.Queue[int] = asyncio.Queue()
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background
                asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
        await serve_until(signals, app, service, opened, grace, ready, most)

    # A thread that parses or tokenizes gives way to the event loop and the engine sooner than the 5 ms of Python.
    sys.setswitchinterval(SWITCH_SECONDS)
    asyncio.run(with_signals())


async def serve_until(
    signals: asyncio.Queue[int],
    app: ASGIApp,
    service: Service,
    opened: socket.socket,
    grace: float,
    ready: Callable[[], None],
    most: int = 256,
) -> None:
    """Serve ``app`` until there is something in ``signals``; ``ready`` is called when requests are taken. ``most``:
    connections at once.

    From then on new requests get 503, running ones have ``grace`` seconds; unfinished requests then receive an error.
    The next signal ends the grace at once. Returns when no request, connection or thread is left.
    """
    log = logging.getLogger("uvicorn.error")
    log.setLevel(logging.ERROR)  # a client's broken HTTP is answered and not logged
    log.addFilter(is_defect)
    config = uvicorn.Config(
        app,
        http=BoundedProtocol.with_most(most),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    server = Server(config)
    service.start()
    serving = asyncio.create_task(server.serve(sockets=[opened]))
    first = asyncio.create_task(signals.get())
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await asyncio.wait((serving, first), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await _drain(service, signals, grace)
        server.should_exit = True
        await serving
    finally:
        first.cancel()
        await service.close()


async def _drain(service: Service, signals: asyncio.Queue[int], grace: float) -> None:
    running = service.open_answers
    if running:
        print(f"shutting down: {running} answers have {grace:g} s to end", file=sys.stderr, flush=True)
    draining, hurry = asyncio.create_task(service.drain(grace)), asyncio.create_task(signals.get())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        service.end_all()
    for task in (draining, hurry):
        task.cancel()
    await asyncio.gather(draining, hurry, return_exceptions=True)
