"""Responses to an admitted request, whole or as server-sent events; cancelled when the client disconnects."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from telechat_twins.core.inference.requests import Usage
from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.frames import Head, to_json
from telechat_twins.core.serve.job import AnswerJob, Served
from telechat_twins.core.serve.service import Ticket
from telechat_twins.core.types import JsonObject

OUTCOMES = {401: "unauthorized", 429: "overloaded", 503: "shutting_down", 504: "timed_out"}
SLOW_READER_S = 1.0  # after the deadline, for a slow client to read the rest of its stream
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client disconnected."""


class Exchange:
    """An admitted request, until its response is complete or the client has disconnected."""

    def __init__(
        self,
        served: Served,
        job: AnswerJob,
        ticket: Ticket,
        deadline: float,
        seconds: float,
        over: Callable[[str], None],
    ) -> None:
        self._job, self._ticket, self._seconds, self._over = job, ticket, seconds, over
        self.deadline = deadline
        self._usages: dict[int, Usage] = {}
        self._outcome: str | None = "client_gone"  # replaced when the response ends in any other way; None once counted
        head = Head(secrets.token_hex(12), int(time.time()), served.names[job.adapter], served.fingerprint)
        self._frame = job.frame(head)

    async def whole(self, request: Request) -> Response:
        """The whole answer as one response. ApiError when it fails, ClientGone when the client disconnects."""
        try:
            await unless_gone(request.receive, self._collect())
            self._outcome = "ok"
        except ApiError as error:
            self._outcome = outcome_of(error)
            raise
        finally:
            self.close()
        return json_response(self._frame.whole(self._usage()))

    async def _collect(self) -> None:
        async with aclosing(self._sent()) as parts:
            async for _ in parts:
                pass

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; an error is sent as the last of them. Call ``close`` afterwards."""
        try:
            async with aclosing(self._sent()) as parts:
                yield self._frame.opening(self._answers)
                async for part in parts:
                    if part:
                        yield part
            yield self._frame.closing(self._usage())
            self._outcome = "ok"
        except ApiError as error:
            self._outcome = outcome_of(error)
            yield self._frame.failed(error)

    def close(self) -> None:
        """Count the outcome and cancel what still runs for the client. Further calls have no effect."""
        self._ticket.close()
        if self._outcome is not None:
            self._over(self._outcome)
            self._outcome = None

    @property
    def _answers(self) -> int:
        return len(self._job.requests) * self._job.samples

    async def _sent(self) -> AsyncGenerator[bytes, None]:
        """For each step, what a stream sends."""
        try:
            async with aclosing(self._ticket.batches(self.deadline)) as batches:
                async for batch in batches:
                    made = b""
                    for place, event in batch:
                        index = place * self._job.samples + event.sample
                        if event.usage is not None:
                            self._usages[index] = event.usage
                        made += self._frame.push(index, event)
                    yield made
        except TimeoutError:
            raise ApiError(
                504, f"the answer was not complete after {self._seconds:g} s, this server's time limit", code="timeout"
            ) from None

    def _usage(self) -> Usage:
        """Token counts of all answers. A prompt counts once, however many answers it has."""
        first = [usage for index, usage in self._usages.items() if index % self._job.samples == 0]
        made = sum(usage.completion for usage in self._usages.values())
        return Usage(sum(usage.prompt for usage in first), made, sum(usage.cached for usage in first))


class EventStream(Response):
    """Response that sends an exchange as server-sent events. It ends when the client disconnects or has not read
    everything ``SLOW_READER_S`` after the deadline."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._exchange.lines()) as lines:
                async for line in lines:
                    await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            with suppress(ClientGone, TimeoutError):  # no response can reach the client any more
                async with asyncio.timeout_at(self._exchange.deadline + SLOW_READER_S):
                    await unless_gone(receive, stream())
        finally:
            self._exchange.close()


async def unless_gone(receive: Receive, work: Coroutine[object, object, Result]) -> Result:
    """The result of ``work``. If the client disconnects first, ``work`` is cancelled and ClientGone raised."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def outcome_of(error: ApiError) -> str:
    return OUTCOMES.get(error.status, "refused" if error.status < 500 else "failed")


def json_response(found: JsonObject, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(found), status, headers, "application/json")
