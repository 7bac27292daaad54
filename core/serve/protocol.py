"""Bounded HTTP protocol for uvicorn: limits the number of connections and the time to receive a request's header.

A connection that waits for the end of a request's header has HEADER_SECONDS, however many bytes come meanwhile. What
follows a request that was answered before its body was there is read for LINGER_SECONDS more, so that the client gets
the answer, and no longer. Where ``most`` connections are open, a new one takes the place of the one that has been
silent the longest, and is turned away when all of them are being answered.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.exchange import to_json
from telechat_twins.core.types import JsonObject

HEADER_SECONDS = 10.0
LINGER_SECONDS = 5.0


class BoundedProtocol(H11Protocol):
    """``most``: connections of a server."""

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
        """The protocol of a server that takes so many connections."""
        return type("BoundedProtocol", (cls,), {"most": most})

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered on it."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_header()
        if len(self.connections) <= self.most:
            return
        others = [other for other in self.connections if other is not self and isinstance(other, BoundedProtocol)]
        silent = min((other for other in others if other.idle), key=lambda other: other._silent_since, default=None)
        if silent is None:
            self._refuse(ApiError(503, f"{self.most} connections are open, as many as this server takes", code="busy"))
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
        """Invalid HTTP: answered in the form of all other errors."""
        self._refuse(ApiError(400, "the request is not valid HTTP, or its header is too large"))

    def _watch(self) -> None:
        """Set the timers that belong to the state that the connection is in."""
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
        says = f"the header of a request was not complete within {HEADER_SECONDS:g} s"
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._refuse, ApiError(408, says))

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._linger_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Close the connection, with an answer unless one has been begun."""
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
            # The handler that makes the answer learns that the client disconnected.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
