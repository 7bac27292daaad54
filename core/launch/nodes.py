"""Connections between the launchers of one job on several machines: all start together, and when one ends, all end.

msrun and torchrun each watch one machine. When a machine's ranks die, the others notice minutes later, inside a
collective, and without the reason. So the launchers keep TCP connections of their own, a star around node 0 on the port
after ``--master``'s, and exchange JSON lines: hello (once, checked against node 0's options), go, done, and end (with
the reason). A connection that breaks means that the launcher at its other end is gone.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import math
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.worker import STOPPED
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

RENDEZVOUS_S = 600.0  # for all nodes to arrive: machines of a cluster are not ready at the same time
POLL_S = 0.1
CLOSE_GRACE_S = 1.0  # for the other side to read our last message
MAX_LINE_BYTES = 16_384  # a sender of longer lines is not one of our launchers
MAX_REASON_CHARACTERS = 2_000  # of a reason that is passed on


class JobEnd(NamedTuple):
    """End of the job, as announced by another node, with its reason."""

    node: int
    code: int  # exit code of its launcher
    why: str
    when: float  # seconds since the epoch by that node's clock
    hang: bool = False  # a collective exceeded its limit: every node then prints where its ranks are


class Nodes:
    """Connections to the launchers of the other nodes; of a job on one machine there are none."""

    def __init__(self, rank: int = 0, lines: dict[int, _Line] | None = None) -> None:
        self.rank = rank
        self.finished = False  # all ranks of all nodes have succeeded
        self._lines = lines or {}
        self._done: set[int] = set()
        self._ended = False

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self, wait: float = 0.0) -> JobEnd | None:
        """The end of the job once another node has announced it; None after ``wait`` seconds. Node 0 passes it on."""
        deadline = time.monotonic() + wait
        while True:
            for node, line in self._lines.items():
                for message in line.read():
                    ended = self._hear(node, message)
                    if ended is not None:
                        return ended
            if time.monotonic() >= deadline or not self._lines:
                return None
            time.sleep(POLL_S / 2)

    def done(self) -> None:
        """Announce that all ranks of this node have succeeded; ``finished`` becomes true when every node's have."""
        if self.rank in self._done:
            return
        self._done.add(self.rank)
        if self.rank:
            self._lines[0].send({"done": True})
        self._count()

    def end(self, code: int, why: str, when: float | None = None, hang: bool = False) -> None:
        """Announce, once, that the job ends with exit code ``code`` for the reason ``why``, as of ``when`` (now)."""
        if not self._ended:
            self._pass_on(
                JobEnd(self.rank, code, why[:MAX_REASON_CHARACTERS], time.time() if when is None else when, hang)
            )

    def close(self) -> None:
        """Close the connections after the other sides have read what was sent."""
        _close(list(self._lines.values()))
        self._lines = {}

    def _hear(self, node: int, message: JsonObject | None) -> JobEnd | None:
        if message is None:
            if self.finished or self._ended:
                return None
            why = f"the launcher of node {node} is gone (killed, or its machine is off the network)"
            ended = JobEnd(node, 1, why, time.time())
        elif "done" in message:
            self._done.add(node)
            self.finished = self.finished or self.rank != 0
            self._count()
            return None
        elif "end" in message:
            ended = _parse_end(message["end"], node)
        else:
            return None
        if self.rank == 0:
            self._pass_on(ended, source=node)
        return ended

    def _pass_on(self, ended: JobEnd, source: int | None = None) -> None:
        self._ended = True
        for node, line in self._lines.items():
            if node != source:
                line.send({"end": ended._asdict()})

    def _count(self) -> None:
        if self.rank == 0 and not self.finished and len(self._done) == len(self._lines) + 1:
            self.finished = True
            for line in self._lines.values():
                line.send({"done": True})


def parse_master(text: str) -> tuple[str, int]:
    """("host", port) from ``host:port`` or ``[v6]:port``; UserError otherwise. At most 65534: port + 1 is used, too."""
    host, colon, number = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    # At most five digits: int() raises ValueError beyond 4,300 of them.
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", number) or not 1 <= int(number) <= 65534:
        raise UserError(f"--master: expected HOST:PORT with a port from 1 to 65534, found {shown(text)}")
    return host, int(number)


def meet(
    rank: int,
    count: int,
    host: str,
    port: int,
    facts: JsonObject,
    patience: float = RENDEZVOUS_S,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Nodes:
    """Wait until the launchers of all ``count`` nodes are connected; node 0 listens on ``port`` + 1.

    ``facts``: options and values that must be the same on every node, like the number of nodes. Raises UserError when
    they differ, when two nodes have one number, when ``host`` cannot be resolved, when node 0's ports are in use, and
    when nodes are missing after ``patience`` seconds.
    """
    if count == 1:
        return Nodes()
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"--master: host '{host}' cannot be resolved on this machine ({error.strerror}); give a name or an address "
            "of node 0 that it knows"
        ) from None
    facts = {"--nnodes": count, **facts}
    deadline = time.monotonic() + patience
    if rank == 0:
        return _gather(count, host, port, facts, deadline, say)
    return _find(rank, host, port, facts, deadline, say)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to ``port`` of ``host``. OSError when the port is in use (EADDRINUSE) or the address is another
    machine's (EADDRNOTAVAIL). While it is bound but not listening, the port stays free for the program that is meant to
    use it (SO_REUSEADDR) and is given to no other."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _gather(count: int, host: str, port: int, facts: JsonObject, deadline: float, say: Callable[[str], None]) -> Nodes:
    door = _door(host, port + 1, facts)
    present: dict[int, _Line] = {}
    strangers: list[_Line] = []
    announced = False
    try:
        with door:
            door.listen(count)
            door.setblocking(False)
            while len(present) < count - 1:
                with suppress(BlockingIOError, ConnectionError):
                    strangers.append(_Line(door.accept()[0]))
                for line in list(strangers):
                    for message in line.read()[:1]:
                        strangers.remove(line)
                        _admit(line, message, count, facts, present, say)
                for node in [node for node, line in present.items() if None in line.read()]:
                    _close([present.pop(node)])  # its launcher may be started again
                missing = [node for node in range(1, count) if node not in present]
                if missing and time.monotonic() > deadline:
                    raise UserError(
                        f"--nnodes: node {_list(missing)} of {count} did not connect to {host} port {port + 1} in "
                        "time; start every node with the same --nnodes and --master"
                    )
                if missing and not announced:
                    say(f"tele: node 0 of {count} waits for node {_list(missing)} at {host} port {port + 1}")
                    announced = True
                time.sleep(POLL_S)
        for line in present.values():
            line.send({"go": True})
    except BaseException:
        _close(list(present.values()))
        raise
    finally:
        _close(strangers, 0.0)
    return Nodes(0, dict(sorted(present.items())))


def _door(host: str, port: int, facts: JsonObject) -> socket.socket:
    """Listening socket of node 0: on ``host`` if that is an address of this machine, else on all of its addresses.

    A machine may resolve its own name to another address than the other nodes do, or be reached by a translated one.
    """
    try:
        try:
            ipaddress.ip_address(host)
            return bind(host, port)
        except ValueError:
            pass
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return bind("::" if family == socket.AF_INET6 else "0.0.0.0", port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _answers(host, port, facts):
            raise UserError(
                f"--master: another node 0, of this job or of another, already waits at {host} port {port}; give this "
                "machine its own --node-rank, or this job another port"
            ) from None
        raise UserError(
            f"--master: port {port} (the given one plus 1) is needed too and cannot be used ({error.strerror}); "
            "give another port"
        ) from None


def _answers(host: str, port: int, facts: JsonObject, seconds: float = 2.0) -> bool:
    """Whether the program on a port is a node 0 that waits for its nodes: such a one refuses a second node 0."""
    try:
        line = _Line(socket.create_connection((host, port), timeout=seconds))
    except OSError:
        return False
    line.send({"hello": {"node": 0, "facts": facts}})
    deadline = time.monotonic() + seconds
    heard: list[JsonObject | None] = []
    while not heard and time.monotonic() < deadline:
        time.sleep(POLL_S / 2)
        heard = line.read()
    _close([line], 0.0)
    return any(message is not None and "refused" in message for message in heard)


def _admit(
    line: _Line,
    message: JsonObject | None,
    count: int,
    facts: JsonObject,
    present: dict[int, _Line],
    say: Callable[[str], None],
) -> None:
    """Accept a node that has connected, or refuse it with the reason."""
    hello = message.get("hello") if message else None
    node, theirs = (hello.get("node"), hello.get("facts")) if isinstance(hello, dict) else (None, None)
    if not isinstance(node, int) or not isinstance(theirs, dict):
        _close([line], 0.0)
        return
    differing = [name for name in facts if theirs.get(name) != facts[name]]
    if differing:
        name = differing[0]
        reason = (
            f"{name}: must be the same on every node, node {node} was started with {theirs.get(name)} and node 0 with "
            f"{facts[name]}; start all nodes alike"
        )
    elif node == 0:
        reason = "--node-rank: two launchers were started as node 0; give each node its own number"
    elif node in present or not 1 <= node < count:
        reason = f"--node-rank: node {node} is connected already; give each node its own number"
    else:
        present[node] = line
        return
    say(printable(f"tele: refused a node: {reason}"))
    line.send({"refused": reason})
    _close([line])


def _find(rank: int, host: str, port: int, facts: JsonObject, deadline: float, say: Callable[[str], None]) -> Nodes:
    say(f"tele: node {rank} of {facts['--nnodes']} looks for node 0 at {host} port {port + 1}")
    while time.monotonic() < deadline:
        try:
            line = _Line(socket.create_connection((host, port + 1), timeout=5))
        except OSError:
            time.sleep(5 * POLL_S)
            continue
        line.send({"hello": {"node": rank, "facts": facts}})
        answer: JsonObject | None = None
        try:
            while time.monotonic() < deadline:
                heard = line.read()
                if heard:
                    answer = heard[0]
                    # Messages that arrived together with "go" belong to the job: keep them.
                    line.unread(heard[1:])
                    break
                time.sleep(POLL_S)
        except BaseException:
            _close([line])
            raise
        if answer and "go" in answer:
            return Nodes(rank, {0: line})
        _close([line])
        if answer and "refused" in answer:
            raise UserError(str(answer["refused"])[:MAX_REASON_CHARACTERS])
        time.sleep(5 * POLL_S)  # node 0 has ended, or another program listens there
    raise UserError(
        f"--master: node 0 was not found at {host} port {port + 1} in time; "
        "start it with the same --nnodes and --master"
    )


def _parse_end(received: object, node: int) -> JobEnd:
    """The end that another launcher announced. Every field is checked, since it came over the network."""
    message: JsonObject = received if isinstance(received, dict) else {}
    code, when = message.get("code"), message.get("when")
    return JobEnd(
        node=message["node"] if isinstance(message.get("node"), int) else node,
        code=code if code in (1, 2, STOPPED, 130) else 1,
        why=printable(str(message.get("why", "no reason given"))[:MAX_REASON_CHARACTERS]),
        when=when if isinstance(when, float) and math.isfinite(when) else time.time(),
        hang=message.get("hang") is True,
    )


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


class _Line:
    """Non-blocking exchange of JSON lines over one socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        # A machine that loses power does not close its connections. TCP keepalive finds it after at most 45 s: probes
        # every 5 s after 15 s of silence, given up after 6 without an answer.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
        self._socket = connection
        self._buffer = b""
        self._waiting: list[JsonObject | None] = []
        self._open = True

    def send(self, message: JsonObject) -> None:
        with suppress(OSError):  # a broken connection is detected by ``read``
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def unread(self, messages: list[JsonObject | None]) -> None:
        self._waiting = messages + self._waiting

    def read(self) -> list[JsonObject | None]:
        """Messages that have arrived. A final None, returned once, means that the connection has ended."""
        messages, self._waiting = self._waiting, []
        while self._open:
            try:
                news = self._socket.recv(MAX_LINE_BYTES)
            except BlockingIOError:
                break
            except OSError:
                news = b""
            *whole, self._buffer = (self._buffer + news).split(b"\n")
            for text in whole:
                try:
                    message = json.loads(text)
                except (ValueError, RecursionError):
                    news = b""  # not one of our launchers: treated as a connection that has ended
                    break
                if isinstance(message, dict):
                    messages.append(message)
            if not news or len(self._buffer) > MAX_LINE_BYTES:
                self._open = False
                messages.append(None)
        return messages

    def leave(self) -> None:
        """Close the sending side of the connection."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self, deadline: float) -> None:
        """Read until the other side has closed too, at most until ``deadline``, then close. Closing with unread bytes
        would reset the connection, and our last message might be lost."""
        with suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(MAX_LINE_BYTES):
                    break
        self._socket.close()


def _close(lines: list[_Line], patience: float = CLOSE_GRACE_S) -> None:
    for line in lines:
        line.leave()
    deadline = time.monotonic() + patience
    for line in lines:
        line.close(deadline)
