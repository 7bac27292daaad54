"""ASGI middleware of every response: the check of the Host header, and security headers."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from telechat_twins.core.serve.errors import ApiError, shown
from telechat_twins.core.serve.exchange import json_response
from telechat_twins.core.serve.hosts import Hosts

# Content-Security-Policy of every response but the page: nothing in it may be run, framed or sent anywhere.
NO_PAGE = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": NO_PAGE,
}


class Guard:
    """Middleware around ``app``: checks the Host header (``hosts`` None: any is allowed) and adds those of ``HEADERS``
    that a response does not set itself."""

    def __init__(self, app: ASGIApp, hosts: Hosts | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        host = Headers(scope=scope).get("host")
        if self._hosts is None or self._hosts.allows(host):
            await self._app(scope, receive, guarded)
            return
        error = ApiError(
            421,
            f"Host: must be an allowed name of this server, found {shown(host)}; use a name of its machine, e.g. "
            "localhost, or start it with --allowed-host",
            code="unknown_host",
        )
        await json_response(error.body(), error.status)(scope, receive, guarded)
