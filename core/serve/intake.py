"""Request intake: reads, parses and tokenizes bodies in threads beside the event loop.

Parsing and tokenizing run in threads, two at a time at most: one with a body of ordinary size and one with a large one,
so that a few megabytes from one client do not stand in the way of another's question. The queue's limit is looked at
before anything is tokenized.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.requests import ClientDisconnect

from telechat_twins.core.serve import strict_json
from telechat_twins.core.serve.errors import ApiError, shown
from telechat_twins.core.serve.exchange import ClientGone
from telechat_twins.core.serve.job import AnswerJob, Draft, Served
from telechat_twins.core.serve.length import max_characters, too_long
from telechat_twins.core.serve.service import Service
from telechat_twins.core.types import JsonObject

BODY_SECONDS = 30.0  # for a request's body to arrive
LARGE_BODY_BYTES = 1 << 16  # bytes of a body that is not of ordinary size
PACE_SECONDS = 0.002  # between pieces of large bodies, which have up to 256 KiB each
HELD_BODIES = 16  # of the largest size: what large bodies may take together
Read = Callable[[JsonObject, Served, str], Draft]


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """``body``: bytes of a request. ``seconds``: from a request's arrival to the end of its answer."""

    body: int
    seconds: float


class Intake:
    """Makes jobs of requests for one server."""

    def __init__(self, service: Service, served: Served, limits: HttpLimits) -> None:
        self._service, self._served, self._limits = service, served, limits
        self._ordinary, self._large = asyncio.Semaphore(1), asyncio.Semaphore(1)
        self._pace = asyncio.Semaphore(1)
        self._held = 0  # bytes of large bodies

    async def job(self, request: Request, read: Read, tenant: str, deadline: float) -> AnswerJob:
        """The job of a request of ``tenant``; ApiError names the fault."""
        async with self._body(request) as raw:
            turn = self._large if len(raw) > LARGE_BODY_BYTES else self._ordinary
            try:
                async with asyncio.timeout_at(deadline):
                    await turn.acquire()
            except TimeoutError:
                raise ApiError(
                    504, "the request was not read in time; too many large ones wait", code="timeout"
                ) from None
            try:
                draft = await asyncio.to_thread(lambda: read(json_object(raw, self._served), self._served, tenant))
                self._service.admit(draft.answers)
                return await asyncio.to_thread(draft.encode)
            finally:
                turn.release()

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytearray]:
        """A request's body, as long as it is needed; ApiError when its type is not JSON, is too large, or does not
        come."""
        check_kind(request, self._limits.body)
        body, held = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for piece in request.stream():
                        body += piece
                        if len(body) > self._limits.body:
                            raise too_large(self._limits.body)
                        if len(body) > LARGE_BODY_BYTES:
                            self._held += len(body) - held
                            held = len(body)
                            self._check_held()
                            # One piece of one large body at a time; meanwhile the other senders wait.
                            async with self._pace:
                                await asyncio.sleep(PACE_SECONDS)
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
            except ClientDisconnect:
                raise ClientGone from None
            yield body
        finally:
            self._held -= held

    def _check_held(self) -> None:
        if self._held > HELD_BODIES * max(self._limits.body, LARGE_BODY_BYTES):
            raise ApiError(
                429,
                "too many large requests are being read; try again later",
                code="overloaded",
                headers={"Retry-After": "1"},
            )


def check_kind(request: Request, most: int) -> None:
    """ApiError for a body that its header already rules out."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps other sites' pages out: a browser asks before it sends this type across sites.
        raise ApiError(415, f"send JSON, with the header 'Content-Type: application/json' (found {shown(kind)})")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > most):
        raise too_large(most)


def too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes, the limit of this server", code="too_large")


def json_object(raw: bytes | bytearray, served: Served) -> JsonObject:
    """The object in a request's body; ApiError 400 names the fault."""
    try:
        found = strict_json.parse(raw, max(max_characters(served), LARGE_BODY_BYTES))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: not UTF-8 text (byte {error.start})") from None
    except strict_json.HalfCharacter as error:
        raise ApiError(400, str(error), error.place, "invalid_value") from None
    except strict_json.LongString as error:
        raise too_long(served, "request", f"has a string of {error.least} characters or more") from None
    except ValueError as error:
        raise ApiError(400, f"body: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"body: expected a JSON object, found {shown(found)}")
    return found
