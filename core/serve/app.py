"""The FastAPI application: routes, API keys, error handlers. FastAPI is imported in core.serve only."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from telechat_twins.core.inference.decoding.settings import SAMPLING
from telechat_twins.core.serve.chat import read_chat
from telechat_twins.core.serve.completions import read_completion
from telechat_twins.core.serve.elsewhere.routes import advice
from telechat_twins.core.serve.errors import ApiError, shown
from telechat_twins.core.serve.exchange import ClientGone, EventStream, Exchange, json_response, outcome_of
from telechat_twins.core.serve.guard import NO_PAGE, Guard
from telechat_twins.core.serve.hosts import Hosts
from telechat_twins.core.serve.intake import HttpLimits, Intake, Read
from telechat_twins.core.serve.job import Served
from telechat_twins.core.serve.page import chat_page
from telechat_twins.core.serve.responses.request import read_response
from telechat_twins.core.serve.service import Service
from telechat_twins.core.types import JsonObject


def create_app(
    service: Service, served: Served, limits: HttpLimits, keys: Sequence[str] = (), hosts: Hosts | None = None
) -> ASGIApp:
    """The ASGI application.

    With ``keys``, every route but the page and ``/health`` requires one of them as a bearer token. ``hosts``: accepted
    values of the Host header; None accepts any.
    """
    tenants = {key.encode(): hashlib.sha256(key.encode()).hexdigest() for key in keys}
    app = FastAPI(title="tele serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_error_handlers(app)
    _add_state_routes(app, service, served, tenants)
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")  # load balancers ask so; the HTTP server sends no body
    _add_answer_routes(app, service, served, limits, tenants)
    return Guard(app, hosts)


def _add_error_handlers(app: FastAPI) -> None:
    """Handlers that return every error in the OpenAI API's form."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path, allowed = request.url.path, (error.headers or {}).get("Allow")
        message = f"this server has no route {request.method} {shown(path)}"
        if error.status_code == 404 and (hint := advice(path, {getattr(route, "path", "") for route in app.routes})):
            message += f"; {hint}"
        elif allowed:
            message += f"; it takes {', '.join(sorted(allowed.split(', ')))}"
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(ClientGone)
    async def client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def internal_error(_: Request, __: Exception) -> Response:
        return error_response(ApiError(500, "internal server error; see the server log"))


def _add_state_routes(app: FastAPI, service: Service, served: Served, tenants: Mapping[bytes, str]) -> None:
    """Routes of the chat page, health, metrics and model cards."""
    page = chat_page()
    page_headers = {"Content-Security-Policy": f"{NO_PAGE}; {page.policy}", "Cache-Control": "no-cache"}

    @app.get("/")
    async def root() -> Response:
        return HTMLResponse(page.html, headers=page_headers)

    @app.get("/health")
    async def health() -> Response:
        state = "shutting down" if service.draining else "ok" if service.alive else "the engine's thread has ended"
        return json_response({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_key(request, tenants)
        return PlainTextResponse(service.metrics.text(service.now()), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request, tenants)
        return json_response({"object": "list", "data": [model_card(served, name) for name in served.names]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request, tenants)
        if name not in served.names:
            raise ApiError(404, f"The model {shown(name)} does not exist; {served.has}", "model", "model_not_found")
        return json_response(model_card(served, name))


def _add_answer_routes(
    app: FastAPI, service: Service, served: Served, limits: HttpLimits, tenants: Mapping[bytes, str]
) -> None:
    """Routes of the generating endpoints."""
    intake = Intake(service, served, limits)

    async def answer(request: Request, endpoint: str, read: Read) -> Response:
        # The time limit starts here and covers reading the body, queueing and generating.
        deadline = asyncio.get_running_loop().time() + limits.seconds

        def over(outcome: str) -> None:
            service.metrics.requests[endpoint, outcome] += 1

        try:
            job = await intake.job(request, read, check_key(request, tenants), deadline)
            ticket = service.submit(job.requests)
        except ApiError as error:
            over(outcome_of(error))
            raise
        # The exchange counts the outcome from here on, even if the client disconnects.
        exchange = Exchange(served, job, ticket, deadline, limits.seconds, over)
        return EventStream(exchange) if job.stream else await exchange.whole(request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, "completions", read_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, "chat", read_chat)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await answer(request, "responses", read_response)


def check_key(request: Request, tenants: Mapping[bytes, str]) -> str:
    """The tenant whose API key the request carries (``tenants``: key -> tenant); "" where no keys are required.

    ApiError 401 for a missing or unknown key. All keys are compared, each in constant time, so that timing reveals
    nothing about them.
    """
    if not tenants:
        return ""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not given:
        message = "an API key is required, found none; send it in the header 'Authorization: Bearer KEY'"
        raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
    sent = given.strip().encode()
    matches = [tenant for key, tenant in tenants.items() if hmac.compare_digest(sent, key)]
    if not matches:
        raise ApiError(
            401,
            "the API key is unknown to this server; check it, or ask its operator for one",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return matches[0]


def model_card(served: Served, name: str) -> JsonObject:
    """Description in ``/v1/models`` of the model under one of its names; ``max_model_len``, from which clients learn
    the context, and an adapter's ``parent`` as in vLLM. ``default_sampling``: of a request without sampling
    options; the page shows it."""
    sampling = served.settings.resolve({}, draws=True)
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "tele serve",
        "max_model_len": served.context,
        "default_sampling": {name: getattr(sampling, name) for name in SAMPLING},
        **({} if name == served.name else {"parent": served.name}),
    }


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)
