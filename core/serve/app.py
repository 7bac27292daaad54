"""The HTTP side of the server: routes, keys, limits, streams. FastAPI is imported here and nowhere above."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from core.serve.chat import read_chat
from core.serve.completions import read_completion
from core.serve.errors import ApiError, shown
from core.serve.exchange import ClientGone, EventStream, Exchange, json_response, outcome_of
from core.serve.fields import json_object
from core.serve.job import Job, Served
from core.serve.service import Service

BODY_SECONDS = 30.0  # for a request's body to arrive
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
Read = Callable[[Mapping[str, Any], Served], Job]


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """``body``: bytes of a request. ``seconds``: from a request's arrival to the end of its answer."""

    body: int
    seconds: float


def create_app(service: Service, served: Served, limits: HttpLimits, keys: Sequence[str] = ()) -> FastAPI:
    """The application. With ``keys``, everything but the page and ``/health`` needs one as a bearer token."""
    app = FastAPI(title="tele serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_such_place(request: Request, error: HTTPException) -> Response:
        says = f"there is no {request.method} {shown(request.url.path)} here"
        return error_response(ApiError(error.status_code, says, headers=error.headers))

    @app.exception_handler(ClientGone)
    async def nobody(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def defect(_: Request, __: Exception) -> Response:
        return error_response(ApiError(500, "a defect of the server; its log has the reason"))

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    @app.get("/health")
    async def health() -> Response:
        state = "shutting down" if service.draining else "ok" if service.alive else "the engine's thread has ended"
        return json_response({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_key(request, keys)
        return PlainTextResponse(service.metrics.text(service.now()), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request, keys)
        return json_response({"object": "list", "data": [model_card(served)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request, keys)
        if name != served.name:
            raise ApiError(404, f"The model {shown(name)} does not exist", "model", "model_not_found")
        return json_response(model_card(served))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, "completions", read_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, "chat", read_chat)

    async def answer(request: Request, endpoint: str, read: Read) -> Response:
        deadline = asyncio.get_running_loop().time() + limits.seconds

        def over(outcome: str) -> None:
            service.metrics.requests[endpoint, outcome] += 1

        try:
            check_key(request, keys)
            body = json_object(await body_of(request, limits.body))
            job = await asyncio.to_thread(read, body, served)
            ticket = service.submit(job.requests)
        except ApiError as error:
            over(outcome_of(error))
            raise
        exchange = Exchange(served, job, ticket, deadline, limits.seconds, over)
        return EventStream(exchange) if job.stream else await exchange.whole(request)

    return app


def check_key(request: Request, keys: Sequence[str]) -> None:
    """ApiError 401 without one of the keys. Every key is compared, in a time that does not tell how much was right."""
    if not keys:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not given:
        says = "no API key given; send it in the header 'Authorization: Bearer KEY'"
        raise ApiError(401, says, headers={"WWW-Authenticate": "Bearer"})
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if not any(matches):
        raise ApiError(
            401,
            "this API key is not one of this server's",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def body_of(request: Request, most: int) -> bytes:
    """A request's body; ApiError when it is not said to be JSON, is too large, or does not come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps other sites' pages out: a browser asks before it sends this type across sites.
        raise ApiError(415, f"send JSON, with the header 'Content-Type: application/json' (found {shown(kind)})")
    too_large = ApiError(413, f"the body is larger than {most} bytes, the limit of this server", code="too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


def model_card(served: Served) -> dict[str, Any]:
    """``max_model_len`` as vLLM tells it: clients read it to know how much fits."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "tele serve",
        "max_model_len": served.context,
    }


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)
