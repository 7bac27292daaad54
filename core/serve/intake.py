"""Request intake: reads request bodies, and parses and tokenizes them in threads beside the event loop.

At most two threads parse and tokenize at a time, one for a body of ordinary size and one for a large body, so that a
few megabytes from one client do not delay another client's short question. The queue's limit is checked before a prompt
is tokenized.
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
LARGE_BODY_BYTES = 1 << 16  # a larger body counts as large
PACE_SECONDS = 0.002  # between two chunks (of up to 256 KiB) of all large bodies
HELD_BODIES = 16  # bodies of the largest allowed size: the memory that all large bodies may take together
Read = Callable[[JsonObject, Served, str], Draft]


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Limits of a request: ``body`` in bytes, ``seconds`` from its arrival to the end of its answer."""

    body: int
    seconds: float


class Intake:
    """Reader of requests, which it turns into jobs of the engine."""

    def __init__(self, service: Service, served: Served, limits: HttpLimits) -> None:
        self._service, self._served, self._limits = service, served, limits
        self._ordinary, self._large = asyncio.Semaphore(1), asyncio.Semaphore(1)
        self._pace = asyncio.Semaphore(1)
        self._held = 0  # bytes of large bodies

    async def job(self, request: Request, read: Read, tenant: str, deadline: float) -> AnswerJob:
        """The job of a request of ``tenant``; ApiError with the reason for one that is refused."""
        async with self._body(request) as raw:
            turn = self._large if len(raw) > LARGE_BODY_BYTES else self._ordinary
            try:
                async with asyncio.timeout_at(deadline):
                    await turn.acquire()
            except TimeoutError:
                message = "the request was not read within its time limit: too many large ones are waiting"
                raise ApiError(504, message, code="timeout") from None
            try:
                draft = await asyncio.to_thread(lambda: read(json_object(raw, self._served), self._served, tenant))
                self._service.admit(draft.answers)
                return await asyncio.to_thread(draft.encode)
            finally:
                turn.release()

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytearray]:
        """A request's body, whose memory is counted until the block ends. ApiError when it is not declared as JSON, is
        too large, or does not arrive in time or before the server shuts down."""
        check_kind(request, self._limits.body)
        self._service.check_open()
        body, held = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS) as reading, self._service.arrival(reading):
                    async for piece in request.stream():
                        body += piece
                        if len(body) > self._limits.body:
                            raise too_large(self._limits.body)
                        if len(body) > LARGE_BODY_BYTES:
                            self._held += len(body) - held
                            held = len(body)
                            self._check_held()
                            # Large bodies are read one chunk at a time, all senders in turn: the event loop stays free.
                            async with self._pace:
                                await asyncio.sleep(PACE_SECONDS)
            except TimeoutError:
                self._service.check_open()
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
    """ApiError for a request whose header shows that its body is not JSON or too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps out pages of other sites: a browser sends this type to another site only if that site permits it.
        raise ApiError(415, f"Content-Type: must be application/json, found {shown(kind)}; send JSON with that header")
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise ApiError(415, f"Content-Encoding: must be identity, found {shown(coding)}; send the body as it is")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > most):
        raise too_large(most)


def too_large(most: int) -> ApiError:
    return ApiError(413, f"body: must have at most {most} bytes, this server's limit; send less", code="too_large")


def json_object(raw: bytes | bytearray, served: Served) -> JsonObject:
    """The JSON object in a request's body; ApiError 400 with the reason for anything else."""
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
