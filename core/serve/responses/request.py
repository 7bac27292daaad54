"""``/v1/responses``: the OpenAI API's newer way to ask for an answer. Nothing is stored: each request has the whole
conversation, and what refers to an earlier response is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from telechat_twins.core.inference.decoding.grammar import ANY_OBJECT, Schema
from telechat_twins.core.serve.chat import (
    ROLES,
    UNSUPPORTED,
    Conversation,
    check_parts,
    check_variables,
    layout_of,
    order_results,
    tool_call,
    write_reasoning,
)
from telechat_twins.core.serve.constraint import ToolUse, read_schema, read_tools
from telechat_twins.core.serve.errors import ApiError, shown
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.serve.job import AnswerJob, Draft, Served, read_options
from telechat_twins.core.serve.responses.frame import ResponseFrame
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.core.data.chat_layout import ChatLayout

TEXTS = ("input_text", "output_text", "reasoning_text", "text")
STATELESS = "is not supported: this server stores no responses; send the whole conversation as input"
ENCRYPTED = "reasoning.encrypted_content"
# Fields of the API that are not honoured, with the values at which they ask for nothing.
NEUTRAL: JsonObject = {
    "background": False,
    "top_logprobs": 0,
    "truncation": "disabled",
    "reasoning": {},
}


def read_response(body: JsonObject, served: Served, tenant: str = "") -> Draft:
    """Draft of the request in ``body``; ApiError names the invalid field. ``tenant``: from check_key."""
    fields = Fields(body)
    if fields.any("store") is True:
        fields.refuse("store", STATELESS.replace("is not supported", "must be false"), "unsupported_parameter")
    options, layout = read_options(fields, served, tenant), layout_of(served)
    fields.absent(("previous_response_id", "conversation", "prompt"), STATELESS)
    fields.absent(
        (*NEUTRAL, "access_programs", "background_options", "context_management", "image", "max_tool_calls"),
        UNSUPPORTED,
        NEUTRAL,
    )
    fields.absent(("moderation",), UNSUPPORTED)
    _check_include(fields)
    stream = fields.boolean("stream")
    _check_stream_options(fields, stream)
    schema, given_format = _read_format(fields)
    asked = fields.integer("max_output_tokens", 1, None)
    use = _read_tools(fields)
    variables, instructions = fields.object("chat_template_kwargs"), fields.text("instructions")
    check_parts(fields, served, "input")
    found = fields.any("input")
    fields.done()
    check_variables(fields, variables, layout)
    conversation = Conversation(
        served=served,
        options=options,
        messages=read_input(fields, found, instructions, layout),
        use=use,
        schema=schema,
        variables=variables,
        asked=asked,
        param="input",
        limit="max_output_tokens",
    )
    echo: JsonObject = {
        "instructions": instructions,
        "max_output_tokens": asked,
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "temperature": options.sampling.temperature,
        "top_p": options.sampling.top_p,
        "text": {"format": given_format},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
    }

    def encode() -> AnswerJob:
        frame = partial(ResponseFrame, bool(use.tools), conversation.thinks, echo)
        return AnswerJob((conversation.request(),), frame, stream)

    return Draft(1, encode)


def _check_include(fields: Fields) -> None:
    """Refuse what ``include`` asks for, but for encrypted reasoning: clients that store nothing ask for it in order to
    send the reasoning back, which they can do with its text."""
    for place, wanted in enumerate(fields.list("include") or ()):
        if wanted != ENCRYPTED:
            message = f"include[{place}]: {shown(wanted)} {UNSUPPORTED}"
            raise ApiError(400, message, "include", "unsupported_parameter")


def _check_stream_options(fields: Fields, stream: bool) -> None:
    found = fields.object("stream_options")
    if found is None:
        return
    if not stream:
        fields.refuse("stream_options", "is only allowed with stream; set stream to true, or leave it out")
    inner = Fields(found, "stream_options")
    inner.boolean("include_obfuscation")  # would pad events against eavesdroppers; has no effect here
    inner.done()


def _read_format(fields: Fields) -> tuple[Schema | None, JsonObject]:
    """The JSON schema of ``text.format``, None for any text, and the format itself."""
    text = Fields(fields.object("text") or {}, "text")
    text.absent(("verbosity",), UNSUPPORTED, {"verbosity": "medium"})
    found = text.object("format")
    text.done()
    inner = Fields(found or {"type": "text"}, "text.format")
    kind = inner.text("type")
    if kind == "json_schema":
        return read_schema(inner), found or {}
    if kind not in ("text", "json_object"):
        inner.refuse("type", f"must be 'text', 'json_object' or 'json_schema', found {shown(kind)}", "invalid_value")
    inner.done()
    return ANY_OBJECT if kind == "json_object" else None, {"type": kind}


def _read_tools(fields: Fields) -> ToolUse:
    """Tools and ``tool_choice``, which name a function directly, in the form of chat completions."""
    tools = []
    for place, tool in enumerate(fields.list("tools") or ()):
        where = f"tools[{place}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = shown(tool.get("type")) if isinstance(tool, dict) else shown(tool)
            raise ApiError(400, f"{where}: must be of type 'function', found {kind}", where, "unsupported_parameter")
        tools.append(
            {"type": "function", "function": {key: tool[key] for key in tool if key not in ("type", "strict")}}
        )
    choice = fields.any("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    several = fields.any("parallel_tool_calls")
    return read_tools(Fields({"tools": tools or None, "tool_choice": choice, "parallel_tool_calls": several}))


def read_input(fields: Fields, found: object, instructions: str | None, layout: ChatLayout) -> list[JsonObject]:
    """``instructions`` and the items of ``input`` as messages of core.data.chat_template. Calls that follow an
    assistant's message, or each other, belong to one message, and so does the reasoning before them."""
    items = [{"role": "user", "content": found}] if isinstance(found, str) else found
    if not isinstance(items, list) or not items:
        fields.refuse("input", f"expected a string or a list of items, found {shown(found)}", "invalid_type")
    messages: list[JsonObject] = [] if instructions is None else [{"role": "system", "content": instructions}]
    for place, item in enumerate(items):
        where = f"input[{place}]"
        if not isinstance(item, dict):
            raise ApiError(400, f"{where}: expected an object, found {shown(item)}", where, "invalid_type")
        _add_item(Fields(item, where), messages)
    write_reasoning(messages, layout)
    order_results(messages, "input")
    if not any(message["role"] == "user" for message in messages):
        fields.refuse("input", "needs a message of role user, found none", "invalid_value")
    return messages


def _add_item(item: Fields, messages: list[JsonObject]) -> None:
    """Append an item to the messages before it."""
    kind = item.text("type") or "message"
    for name in ("id", "status", "phase"):
        item.text(name)
    last = messages[-1] if messages else {}
    if kind == "message":
        role = item.text("role")
        if role not in ("user", "assistant", "system", "developer"):
            item.refuse("role", f"{shown(role)} is not one of user, assistant, system, developer", "invalid_value")
        if ROLES[role] == "system" and messages:
            item.refuse("role", "a system message must be the first item, without instructions", "invalid_value")
        content = _text(item, "content")
        if role == "assistant" and last.get("reasoning_content") and last["content"] is None and "call_ids" not in last:
            last["content"] = content
        else:
            messages.append({"role": ROLES[role], "content": content})
    elif kind == "reasoning":
        if item.text("encrypted_content"):
            item.refuse("encrypted_content", "cannot be read by this server; leave the item out")
        item.list("summary")
        if item.any("content") is None:
            item.refuse("content", "expected the reasoning's text, found none; leave the item out", "invalid_value")
        thought = _text(item, "content")
        messages.append({"role": "assistant", "content": None, "reasoning_content": thought})
    elif kind == "function_call":
        number = item.text("call_id")
        call = {"name": item.text("name"), "arguments": item.text("arguments")}
        if last.get("role") != "assistant":
            last = {"role": "assistant", "content": None}
            messages.append(last)
        last.setdefault("tool_calls", []).append(tool_call(item.name("arguments"), {"function": call}))
        last.setdefault("call_ids", []).append(number)
    elif kind == "function_call_output":
        number = item.text("call_id")
        if not last.get("tool_calls") and last.get("role") != "tool":
            item.refuse("type", "a function_call_output must follow a function_call", "invalid_value")
        messages.append({"role": "tool", "content": _text(item, "output"), "call_ids": [number]})
    else:
        item.refuse(
            "type",
            f"must be 'message', 'reasoning', 'function_call' or 'function_call_output', found {shown(kind)}",
            "unsupported_parameter",
        )
    item.done()


def _text(item: Fields, field: str) -> str:
    """The text of a string, or of a list of text parts."""
    found = item.any(field)
    if isinstance(found, str):
        return found
    parts: Sequence[object] = found if isinstance(found, list) else [found]
    texts: list[str] = []
    for place, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXTS else None
        if not isinstance(text, str):
            kind = shown(part.get("type")) if isinstance(part, dict) else shown(part)
            item.refuse(field, f"part {place} must be of type 'input_text', found {kind}; this model reads text only")
        texts.append(text)
    return "".join(texts)
