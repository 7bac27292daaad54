"""Server process: one socket, one event loop, one engine thread, and a graceful shutdown on SIGTERM and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import errno
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

SPARE_FILES = 64  # files that the process has open beside its connections
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLOSING_SECONDS = 5  # for connections to close after their last responses
BACKLOG = 1024
SWITCH_SECONDS = 0.0005


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. UserError when the address is unknown or the port in use."""
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
        way = "choose another port, or 0 for any free one"
        if error.errno == errno.EADDRNOTAVAIL:
            way = "it is no address of this machine; 127.0.0.1 serves this machine only, 0.0.0.0 all that reach it"
        raise UserError(f"--host {host} --port {port}: {error.strerror}; {way}") from None
    return opened


def allow_connections(most: int) -> None:
    """Raise the process's limit of open files for ``most`` connections. UserError when the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"--max-connections: must be at most {hard - SPARE_FILES}, since the system allows {hard} open files "
            f"(ulimit -Hn), found {most}; give fewer, or raise the limit to {wanted}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def address_of(opened: socket.socket) -> str:
    """The socket's URL."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_defect(record: logging.LogRecord) -> bool:
    """Whether a log record of uvicorn reports an internal error rather than a client's behaviour.

    Two records are caused by clients: HTTP that broke off, which uvicorn answers itself before the application can, and
    a stream that was ended because its client did not read it.
    """
    raised = record.exc_info[1] if record.exc_info else None
    broken = isinstance(raised, h11.LocalProtocolError) and "state=MUST_CLOSE" in str(raised)
    return not broken and record.msg != "ASGI callable returned without completing response."


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close its socket at the first signal, while this server goes on
    answering with 503 during the shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    app: ASGIApp, service: Service, opened: socket.socket, grace: float, ready: Callable[[], None], most: int
) -> None:
    """Run ``serve_until`` until SIGTERM, SIGHUP or Ctrl-C; a second signal ends the grace period."""

    async def with_signals() -> None:
        signals: asyncio.Queue[int] = asyncio.Queue()
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup, or in a shell's background
                asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
        await serve_until(signals, app, service, opened, grace, ready, most)

    # Threads that parse or tokenize then yield to the event loop and the engine earlier than after Python's 5 ms.
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
    """Serve ``app`` until a signal arrives in ``signals``. ``ready`` is called when the server accepts requests;
    ``most``: connections at once.

    After the signal, new requests get 503 and running ones have ``grace`` seconds, after which unfinished requests
    receive an error; the next signal ends the grace period at once. Returns when no request, connection or thread is
    left.
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
        print(f"shutting down: {running} answers have {grace:g} s to finish", file=sys.stderr, flush=True)
    draining, hurry = asyncio.create_task(service.drain(grace)), asyncio.create_task(signals.get())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        service.end_all()
    for task in (draining, hurry):
        task.cancel()
    await asyncio.gather(draining, hurry, return_exceptions=True)
