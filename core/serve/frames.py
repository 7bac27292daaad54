"""Frames: how the answers of a job are laid out as JSON, whole or as server-sent events."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol

from telechat_twins.core.inference.requests import Event, Usage
from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.types import JsonObject


@dataclass(frozen=True)
class Head:
    """What identifies a response: the end of its id, the time it began, the model's name and its fingerprint."""

    number: str
    created: int
    model: str
    fingerprint: str


class Frame(Protocol):
    """The layout of one response. ``index``: number of an answer among those of all prompts."""

    def opening(self, answers: int) -> bytes:
        """What a stream of so many answers sends before their first tokens."""

    def push(self, index: int, event: Event) -> bytes:
        """What a stream sends for an event."""

    def closing(self, usage: Usage) -> bytes:
        """The end of a stream."""

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that failed."""

    def whole(self, usage: Usage) -> JsonObject:
        """The response that was not streamed, from all that was pushed."""


class Writer(Protocol):
    """Formatter of ``choices`` for one of the completions endpoints."""

    prefix: str  # of the id
    kind: str  # of object
    chunk_kind: str

    @property
    def reasoned(self) -> int | None:
        """Tokens of the answers' reasoning so far, its end included; None where no answer begins with reasoning."""

    def opening(self, index: int) -> list[JsonObject]:
        """The entries of ``choices`` that a stream sends before an answer's first token."""

    def push(self, index: int, event: Event) -> list[JsonObject]:
        """The entries of ``choices`` that a stream sends for an event."""

    def whole(self) -> list[JsonObject]:
        """``choices`` of the answer that was not streamed, from all that was pushed."""


class ChoicesFrame:
    """Frame of completions and chat completions: an object with ``choices``, and chunks with one entry each."""

    def __init__(self, writer: Writer, include_usage: bool, head: Head) -> None:
        self._writer, self._include_usage = writer, include_usage
        self._head = {
            "id": writer.prefix + head.number,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }

    def opening(self, answers: int) -> bytes:
        return b"".join(self._chunk(entry) for index in range(answers) for entry in self._writer.opening(index))

    def push(self, index: int, event: Event) -> bytes:
        return b"".join(map(self._chunk, self._writer.push(index, event)))

    def closing(self, usage: Usage) -> bytes:
        return (self._chunk(None, usage) if self._include_usage else b"") + b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        return b"data: " + to_json(error.body()) + b"\n\n"

    def whole(self, usage: Usage) -> JsonObject:
        choices = self._writer.whole()
        return {"object": self._writer.kind, **self._head, "choices": choices, "usage": self._usage(usage)}

    def _usage(self, usage: Usage) -> JsonObject:
        reasoned = self._writer.reasoned
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
            **({} if reasoned is None else {"completion_tokens_details": {"reasoning_tokens": reasoned}}),
        }

    def _chunk(self, entry: JsonObject | None, usage: Usage | None = None) -> bytes:
        """One server-sent event with an entry; None gives the final event, which has the usage."""
        chunk = {"object": self._writer.chunk_kind, **self._head, "choices": [] if entry is None else [entry]}
        if self._include_usage:
            chunk["usage"] = None if usage is None else self._usage(usage)
        return b"data: " + to_json(chunk) + b"\n\n"


def to_json(found: JsonObject) -> bytes:
    """Compact JSON in UTF-8. A lone surrogate, which may come from a client's value in a message, stays an escape."""
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
