"""The layout of a response: an object with output items, and its events while streaming."""

from __future__ import annotations

import secrets

from telechat_twins.core.inference.requests import Event, Usage
from telechat_twins.core.inference.text_stream import Thought, ThoughtStream
from telechat_twins.core.inference.tool_calls import ToolCall, ToolCallStream
from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.frames import Head, to_json
from telechat_twins.core.types import JsonObject

COMPLETED, INCOMPLETE, RUNNING = "completed", "incomplete", "in_progress"
# Of an item with text, by its type: the beginning of its id, its own fields, its only part (whose type names its
# events), and what its events have besides.
ITEMS: dict[str, tuple[str, JsonObject, JsonObject, JsonObject]] = {
    "message": (
        "msg_",
        {"role": "assistant"},
        {"type": "output_text", "annotations": [], "logprobs": []},
        {"logprobs": []},
    ),
    "reasoning": ("rs_", {"summary": []}, {"type": "reasoning_text"}, {}),
}


class ResponseFrame:
    """Frame (core.serve.frames.Frame) of one response.

    The answer's text is one item of type message, interrupted by an item of type function_call for each call; before
    it comes an item of type reasoning if the model reasons first. Each item has an event where it begins, for what is
    added to it, and where it ends.
    """

    def __init__(self, tools: bool, thinking: bool, echo: JsonObject, head: Head) -> None:
        """``echo``: what the request said, as the response repeats it. ``thinking``: the answer begins with
        reasoning."""
        self._echo, self._head = echo, head
        self._parser = ToolCallStream() if tools else None
        self._thoughts = ThoughtStream() if thinking else None
        self._reasoned = 0  # tokens of the reasoning, its end included
        self._output: list[JsonObject] = []
        self._open: JsonObject | None = None  # the item that text is added to
        self._status = RUNNING
        self._events = 0

    def opening(self, answers: int) -> bytes:
        return self._state("response.created") + self._state("response.in_progress")

    def push(self, index: int, event: Event) -> bytes:
        texts = [event.text] if event.text else []
        if self._thoughts is not None:
            self._reasoned += self._thoughts.reasoning and event.choice is not None
            texts = self._thoughts.push(event.text)
            texts += self._thoughts.flush() if event.finish_reason is not None else []
        sent = b"".join(self._add("reasoning", text) for text in texts if isinstance(text, Thought))
        parts: list[str | ToolCall] = [text for text in texts if not isinstance(text, Thought)]
        if self._parser is not None:
            parts = self._parser.push("".join(str(part) for part in parts))
            if event.finish_reason is not None:
                parts += self._parser.flush()
        sent += b"".join(self._add("message", part) if isinstance(part, str) else self._call(part) for part in parts)
        if event.finish_reason is not None:
            self._status = INCOMPLETE if event.finish_reason == "length" else COMPLETED
            sent += self._end_item() if self._output else self._add("message", "") + self._end_item()
        return sent

    def closing(self, usage: Usage) -> bytes:
        return self._state(f"response.{self._status}", usage)

    def failed(self, error: ApiError) -> bytes:
        found = error.body()["error"]
        return self._event("error", {name: found[name] for name in ("code", "message", "param")})

    def whole(self, usage: Usage) -> JsonObject:
        return self._response(usage)

    def _add(self, kind: str, text: str) -> bytes:
        """Add text to the open item, or to a new one where that is of another ``kind``."""
        prefix, own, part, more = ITEMS[kind]
        sent = b""
        if self._open is None or self._open["type"] != kind:
            sent = self._end_item()
            self._open = {"id": _new(prefix), "type": kind, **own, "status": RUNNING, "content": []}
            self._output.append(self._open)
            sent += self._item("added", self._open)
            self._open["content"].append({**part, "text": ""})
            sent += self._part("content_part.added", {"part": self._open["content"][0]})
        if text:
            self._open["content"][0]["text"] += text
            sent += self._part(f"{part['type']}.delta", {"delta": text, **more})
        return sent

    def _end_item(self) -> bytes:
        if self._open is None:
            return b""
        part, more = self._open["content"][0], ITEMS[self._open["type"]][3]
        self._open["status"] = self._status if self._status == INCOMPLETE else COMPLETED
        sent = self._part(f"{part['type']}.done", {"text": part["text"], **more})
        sent += self._part("content_part.done", {"part": part}) + self._item("done", self._open)
        self._open = None
        return sent

    def _call(self, call: ToolCall) -> bytes:
        sent = self._end_item()
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
        """An event of the open item's only part."""
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
            "usage": None if usage is None else _usage(usage, self._reasoned),
        }


def _usage(usage: Usage, reasoned: int) -> JsonObject:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": reasoned},
        "total_tokens": usage.prompt + usage.completion,
    }


def _new(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
