"""API errors: the error object of the OpenAI API and its HTTP status."""

from __future__ import annotations

from collections.abc import Mapping

from telechat_twins.core.types import JsonObject

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout",
}


class ApiError(Exception):
    """Error response: an HTTP status, {"error": {"message", "type", "param", "code"}}, and ``headers``."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> JsonObject:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shown(value: object) -> str:
    """A client's value for use in a message to it: at most 60 characters, without control characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true" if value else "false"
    text = repr(value[:60] if isinstance(value, str) else value)
    whole = len(text) <= 60 and not (isinstance(value, str) and len(value) > 60)
    return text if whole else text[:57] + "..."


def shown_name(name: str) -> str:
    """``shown`` for the name of a client's field, without quotation marks."""
    return shown(name)[1:-1] if len(name) <= 50 else shown(name[:50])[1:-1] + "..."
