"""The layout of a response: an object with output items, and its events while streaming."""

from __future__ import annotations

import secrets

from telechat_twins.core.inference.requests import Event, Usage
from telechat_twins.core.inference.tool_calls import ToolCall, ToolCallStream
from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.frames import Head, to_json
from telechat_twins.core.types import JsonObject

COMPLETED, INCOMPLETE, RUNNING = "completed", "incomplete", "in_progress"


class ResponseFrame:
    """Frame (core.serve.frames.Frame) of one response.

    The answer's text is one item of type message, interrupted by an item of type function_call for each call. Each item
    has an event where it begins, for what is added to it, and where it ends.
    """

    def __init__(self, tools: bool, echo: JsonObject, head: Head) -> None:
        """``echo``: what the request said, as the response repeats it."""
        self._echo, self._head = echo, head
        self._parser = ToolCallStream() if tools else None
        self._output: list[JsonObject] = []
        self._open: JsonObject | None = None  # the message that text is added to
        self._status = RUNNING
        self._events = 0

    def opening(self, answers: int) -> bytes:
        return self._state("response.created") + self._state("response.in_progress")

    def push(self, index: int, event: Event) -> bytes:
        parts: list[str | ToolCall] = [event.text] if event.text else []
        if self._parser is not None:
            parts = self._parser.push(event.text)
            if event.finish_reason is not None:
                parts += self._parser.flush()
        sent = b"".join(self._text(part) if isinstance(part, str) else self._call(part) for part in parts)
        if event.finish_reason is not None:
            self._status = INCOMPLETE if event.finish_reason == "length" else COMPLETED
            sent += self._end_message() if self._output else self._text("") + self._end_message()
        return sent

    def closing(self, usage: Usage) -> bytes:
        return self._state(f"response.{self._status}", usage)

    def failed(self, error: ApiError) -> bytes:
        found = error.body()["error"]
        return self._event("error", {name: found[name] for name in ("code", "message", "param")})

    def whole(self, usage: Usage) -> JsonObject:
        return self._response(usage)

    def _text(self, text: str) -> bytes:
        sent = b""
        if self._open is None:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._open = {"id": _new("msg_"), "type": "message", "role": "assistant", "status": RUNNING, "content": []}
            self._output.append(self._open)
            sent += self._item("added", self._open)
            self._open["content"].append(part)
            sent += self._part("content_part.added", {"part": part})
        if text:
            self._open["content"][0]["text"] += text
            sent += self._part("output_text.delta", {"delta": text, "logprobs": []})
        return sent

    def _end_message(self) -> bytes:
        if self._open is None:
            return b""
        part = self._open["content"][0]
        self._open["status"] = self._status if self._status == INCOMPLETE else COMPLETED
        sent = self._part("output_text.done", {"text": part["text"], "logprobs": []})
        sent += self._part("content_part.done", {"part": part}) + self._item("done", self._open)
        self._open = None
        return sent

    def _call(self, call: ToolCall) -> bytes:
        sent = self._end_message()
        item: JsonObject = {"id": _new("fc_"), "type": "function_call", "call_id": _new("call_"), "name": call.name}
        item |= {"arguments": "", "status": RUNNING}
        self._output.append(item)
        sent += self._item("added", item)
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        sent += self._event("response.function_call_arguments.delta", {**place, "delta": call.arguments})
        done = {**place, "name": call.name, "arguments": call.arguments}
        sent += self._event("response.function_call_arguments.done", done)
        item |= {"arguments": call.arguments, "status": COMPLETED}
        return sent + self._item("done", item)

    def _item(self, what: str, item: JsonObject) -> bytes:
        return self._event(f"response.output_item.{what}", {"output_index": len(self._output) - 1, "item": item})

    def _part(self, what: str, values: JsonObject) -> bytes:
        """An event of the open message's only part."""
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}
        return self._event(f"response.{what}", {**place, **values})

    def _state(self, kind: str, usage: Usage | None = None) -> bytes:
        return self._event(kind, {"response": self._response(usage)})

    def _event(self, kind: str, values: JsonObject) -> bytes:
        found = {"type": kind, "sequence_number": self._events, **values}
        self._events += 1
        return f"event: {kind}\ndata: ".encode() + to_json(found) + b"\n\n"

    def _response(self, usage: Usage | None) -> JsonObject:
        cut = {"reason": "max_output_tokens"} if self._status == INCOMPLETE else None
        return {
            "id": "resp_" + self._head.number,
            "object": "response",
            "created_at": self._head.created,
            "model": self._head.model,
            "status": self._status,
            "error": None,
            "incomplete_details": cut,
            "output": self._output,
            "background": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            **self._echo,
            "usage": None if usage is None else _usage(usage),
        }


def _usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }


def _new(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
