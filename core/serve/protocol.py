"""Bounded HTTP protocol for uvicorn: limits the number of connections and the time to receive a request's header.

A request's header must be complete within HEADER_SECONDS, however slowly its bytes arrive. When a request is answered
before its body has arrived, the rest of the body is read for LINGER_SECONDS, so that the client receives the answer,
and then the connection is closed. When ``most`` connections are open, a new one replaces the idle connection that has
been silent the longest; if none is idle, the new one is refused with 503.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.frames import to_json
from telechat_twins.core.types import JsonObject

HEADER_SECONDS = 10.0
LINGER_SECONDS = 5.0


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 connection with these limits. ``most``: connections that the server may have open."""

    most = 256

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: JsonObject,
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._header_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._silent_since = 0.0

    @classmethod
    def with_most(cls, most: int) -> type[BoundedProtocol]:
        """The protocol class for a server of at most ``most`` connections."""
        return type("BoundedProtocol", (cls,), {"most": most})

    @property
    def idle(self) -> bool:
        """Whether no request on this connection is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_header()
        if len(self.connections) <= self.most:
            return
        others = [other for other in self.connections if other is not self and isinstance(other, BoundedProtocol)]
        silent = min((other for other in others if other.idle), key=lambda other: other._silent_since, default=None)
        if silent is None:
            self._refuse(ApiError(503, f"all {self.most} connections of this server are in use", code="busy"))
        else:
            silent.transport.abort()
            self.connections.discard(silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._silent_since = self.loop.time()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP, in the same form as all other errors."""
        self._refuse(ApiError(400, "the request is not valid HTTP, or its header is too large"))

    def _watch(self) -> None:
        """Start and stop the timers according to the state of the connection."""
        if self.transport.is_closing():
            self._stop_timers()
            return
        awaits_header = self.conn.their_state is h11.IDLE
        if awaits_header and self._header_timer is None and self.timeout_keep_alive_task is None:
            self._await_header()
        elif not awaits_header and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        lingers = self.idle and self.conn.their_state is h11.SEND_BODY
        if lingers and self._linger_timer is None:
            self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        elif not lingers and self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _await_header(self) -> None:
        self._silent_since = self.loop.time()
        error = ApiError(408, f"the header of a request was not complete within {HEADER_SECONDS:g} s")
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._refuse, error)

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._linger_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Close the connection, after sending ``error`` unless a response has been started."""
        self._stop_timers()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            raw = to_json(error.body())
            headers = [("content-type", "application/json"), ("content-length", str(len(raw))), ("connection", "close")]
            headers.append(("x-content-type-options", "nosniff"))
            reason = HTTPStatus(error.status).phrase
            response = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (response, h11.Data(data=raw), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            # Wake the handler that is answering: to it, the client has disconnected.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
