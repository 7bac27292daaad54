"""The line between the launchers of one job on several machines: all start together, and when one ends, all end.

msrun and torchrun each look after one machine. When a machine's ranks die, the others find out late (minutes, inside a
collective) and without the reason. So the launchers hold a TCP line of their own, a star around node 0 on the port
after ``--master``'s, and say in JSON lines: hello (once, checked), go, done, end (with the reason). A line that breaks
means that the launcher at its other end is gone.
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
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

RENDEZVOUS_S = (
    600.0  # seconds the nodes wait for one another at the start: machines of a cluster are not ready together
)
POLL_S = 0.1
CLOSE_GRACE_S = 1.0  # seconds for the other side to hear our last words
MAX_LINE_BYTES = 16_384  # bytes of a line; more is no launcher of ours
MAX_REASON_CHARACTERS = 2_000  # characters of a reason that are passed on


class Word(NamedTuple):
    """Why another node ended the job."""

    node: int
    code: int  # exit code of its launcher
    why: str
    when: float  # seconds since the epoch by that node's clock
    hang: bool = False  # a collective waited too long: where the ranks of this node are matters too


class Nodes:
    """The launchers of the other nodes, as this one sees them; of a job on one machine, nothing at all."""

    def __init__(self, rank: int = 0, lines: dict[int, _Line] | None = None) -> None:
        self.rank = rank
        self.finished = False  # all ranks of all nodes have finished well
        self._lines = lines or {}
        self._done: set[int] = set()
        self._ended = False

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self, wait: float = 0.0) -> Word | None:
        """The news that the job is to end, or None; waits up to ``wait`` seconds for it. Node 0 passes it on."""
        deadline = time.monotonic() + wait
        while True:
            for node, line in self._lines.items():
                for message in line.read():
                    word = self._hear(node, message)
                    if word is not None:
                        return word
            if time.monotonic() >= deadline or not self._lines:
                return None
            time.sleep(POLL_S / 2)

    def done(self) -> None:
        """All ranks of this node have finished well; ``finished`` follows when those of the others have too."""
        if self.rank in self._done:
            return
        self._done.add(self.rank)
        if self.rank:
            self._lines[0].send({"done": True})
        self._count()

    def end(self, code: int, why: str, when: float | None = None, hang: bool = False) -> None:
        """Tell the others, once, that the job ends with exit code ``code``, since ``when`` (default: now)."""
        if not self._ended:
            self._pass_on(
                Word(self.rank, code, why[:MAX_REASON_CHARACTERS], time.time() if when is None else when, hang)
            )

    def close(self) -> None:
        """Take leave so that what was said last arrives."""
        _close(list(self._lines.values()))
        self._lines = {}

    def _hear(self, node: int, message: JsonObject | None) -> Word | None:
        if message is None:
            if self.finished or self._ended:
                return None
            why = f"the launcher of node {node} is gone (ended by force, or its machine is off the network)"
            word = Word(node, 1, why, time.time())
        elif "done" in message:
            self._done.add(node)
            self.finished = self.finished or self.rank != 0
            self._count()
            return None
        elif "end" in message:
            word = _word(message["end"], node)
        else:
            return None
        if self.rank == 0:
            self._pass_on(word, source=node)
        return word

    def _pass_on(self, word: Word, source: int | None = None) -> None:
        self._ended = True
        for node, line in self._lines.items():
            if node != source:
                line.send({"end": word._asdict()})

    def _count(self) -> None:
        if self.rank == 0 and not self.finished and len(self._done) == len(self._lines) + 1:
            self.finished = True
            for line in self._lines.values():
                line.send({"done": True})


def parse_master(text: str) -> tuple[str, int]:
    """("host", port) of ``host:port`` or ``[v6]:port``; UserError otherwise. The port after it must exist too."""
    host, colon, number = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    # No more digits than a port has: int() raises ValueError beyond 4,300 of them.
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
    """Wait until the launchers of all ``count`` nodes are there; node 0 listens at ``port`` + 1.

    ``facts``: option -> value, must be the same on every node, like the number of nodes. Raises UserError when they are
    not, when a node number is taken, when ``host`` has no address or node 0's ports are in use, and when ``patience``
    seconds pass.
    """
    if count == 1:
        return Nodes()
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--master: no address of '{host}' is known here ({error.strerror})") from None
    facts = {"--nnodes": count, **facts}
    deadline = time.monotonic() + patience
    if rank == 0:
        return _gather(count, host, port, facts, deadline, say)
    return _find(rank, host, port, facts, deadline, say)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to ``port`` of ``host``; OSError when it is in use (EADDRINUSE) or of another machine
    (EADDRNOTAVAIL). One that is bound but not listening keeps the port for a program that will bind it too."""
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
    told = False
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
                    _close([present.pop(node)])  # it may come again
                missing = [node for node in range(1, count) if node not in present]
                if missing and time.monotonic() > deadline:
                    raise UserError(
                        f"--nnodes: node {_list(missing)} of {count} did not come to {host} port {port + 1} in time; "
                        "start every node with the same --nnodes and --master"
                    )
                if missing and not told:
                    say(f"tele: node 0 of {count} waits for node {_list(missing)} at {host} port {port + 1}")
                    told = True
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
    """Where node 0 listens: at ``host`` if that is an address of this machine, else at all of its addresses (a machine
    may know its own name by another address than the others do, or stand behind a translated one)."""
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
                f"--master: another node 0, of this job or of another, waits at {host} port {port} already; give this "
                "machine its own --node-rank, or this job another port"
            ) from None
        raise UserError(
            f"--master: port {port}, the one after {port - 1}, is needed too and cannot be had ({error.strerror}); "
            "give another port"
        ) from None


def _answers(host: str, port: int, facts: JsonObject, seconds: float = 2.0) -> bool:
    """Whether the program at a port speaks as a node 0 that gathers its nodes: it sends a second node 0 away."""
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
    """Take a newcomer in, or send it away with the reason."""
    hello = message.get("hello") if message else None
    node, theirs = (hello.get("node"), hello.get("facts")) if isinstance(hello, dict) else (None, None)
    if not isinstance(node, int) or not isinstance(theirs, dict):
        _close([line], 0.0)
        return
    differing = [name for name in facts if theirs.get(name) != facts[name]]
    if differing:
        name = differing[0]
        reason = f"{name}: node {node} was started with {theirs.get(name)}, node 0 with {facts[name]}; start all alike"
    elif node == 0:
        reason = "--node-rank: node 0 is here already, and another was started; give each node its own number"
    elif node in present or not 1 <= node < count:
        reason = f"--node-rank: node {node} is there already; give each node its own number"
    else:
        present[node] = line
        return
    say(printable(f"tele: sent a node away: {reason}"))
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
                    # What follows "go" at once must not be lost.
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
        time.sleep(5 * POLL_S)  # node 0 left, or something else answers there
    raise UserError(
        f"--master: node 0 was not found at {host} port {port + 1} in time; "
        "start it with the same --nnodes and --master"
    )


def _word(told: object, node: int) -> Word:
    """What another launcher wrote, taken with care: it came over a network."""
    message: JsonObject = told if isinstance(told, dict) else {}
    code, when = message.get("code"), message.get("when")
    return Word(
        node=message["node"] if isinstance(message.get("node"), int) else node,
        code=code if code in (1, 2, 130) else 1,
        why=printable(str(message.get("why", "no reason given"))[:MAX_REASON_CHARACTERS]),
        when=when if isinstance(when, float) and math.isfinite(when) else time.time(),
        hang=message.get("hang") is True,
    )


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


class _Line:
    """JSON lines over one socket, never blocking."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        # A machine that loses power says nothing: ask every 5 s after 15 s of silence, give up after 6 askings.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
        self._socket = connection
        self._buffer = b""
        self._waiting: list[JsonObject | None] = []
        self._open = True

    def send(self, message: JsonObject) -> None:
        with suppress(OSError):  # a line that broke is found by reading
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def unread(self, messages: list[JsonObject | None]) -> None:
        self._waiting = messages + self._waiting

    def read(self) -> list[JsonObject | None]:
        """Messages that have come; None at the end stands for the end of the line, and comes once."""
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
                    news = b""  # no launcher of ours: as good as gone
                    break
                if isinstance(message, dict):
                    messages.append(message)
            if not news or len(self._buffer) > MAX_LINE_BYTES:
                self._open = False
                messages.append(None)
        return messages

    def leave(self) -> None:
        """Say that nothing more will come from here."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self, deadline: float) -> None:
        """Read until the other side has left too, at most until ``deadline``, then close. Closing over unread bytes
        would reset the connection and might take back what we said last."""
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
