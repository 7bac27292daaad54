"""``/v1/chat/completions``: a conversation in the model's chat template, with tools."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from telechat_twins.core.data.kinds.turns import order_of_results
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.decoding.grammar import Form
from telechat_twins.core.inference.requests import Event, Request, turn_stops
from telechat_twins.core.inference.sampling import TokenChoice
from telechat_twins.core.inference.text_stream import Thought, ThoughtStream
from telechat_twins.core.inference.tool_calls import ToolCall, ToolCallStream
from telechat_twins.core.serve import strict_json
from telechat_twins.core.serve.constraint import ToolUse, grammar_of, read_format, read_tools
from telechat_twins.core.serve.echo import Named, read_named
from telechat_twins.core.serve.errors import ApiError, shown
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.serve.frames import ChoicesFrame
from telechat_twins.core.serve.job import (
    MAX_LOGPROBS,
    AnswerJob,
    AnswerOptions,
    Draft,
    Served,
    read_options,
    read_samples,
    read_stream,
    room,
)
from telechat_twins.core.serve.length import check_length, too_long
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.core.data.chat_layout import ChatLayout
    from telechat_twins.core.data.tokenizer import Tokenizer

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
THOUGHT = "<think>\n{}\n</think>\n\n{}"
UNSUPPORTED = "is not supported by this server; leave it out"


def read_chat(body: JsonObject, served: Served, tenant: str = "") -> Draft:
    """Draft of the chat request in ``body``; ApiError names the invalid field. ``tenant``: from check_key."""
    fields = Fields(body)
    options, layout = read_options(fields, served, tenant), layout_of(served)
    stream, include_usage = read_stream(fields)
    samples, asked = read_samples(fields), _asked_tokens(fields)
    logprobs, named = _read_logprobs(fields), read_named(fields, served.tokenizer)
    fields.absent(("audio", "function_call", "functions", "reasoning_effort", "verbosity"), UNSUPPORTED)
    fields.absent(("web_search_options", "moderation"), UNSUPPORTED)
    fields.absent(("modalities",), "must be ['text']: this model generates text only", {"modalities": ["text"]})
    schema, variables = read_format(fields), fields.object("chat_template_kwargs")
    found = fields.list("messages")
    check_parts(fields, served, "messages")
    use = read_tools(fields)
    fields.done()
    messages = read_messages(fields, found, layout)
    check_variables(fields, variables, layout)
    conversation = Conversation(
        served=served,
        options=options,
        messages=messages,
        use=use,
        schema=schema,
        variables=variables,
        asked=asked,
        samples=samples,
        logprobs=logprobs,
    )

    def encode() -> AnswerJob:
        writer = ChatWriter(served.tokenizer, named, bool(use.tools), conversation.thinks)
        return AnswerJob((conversation.request(),), partial(ChoicesFrame, writer, include_usage), stream)

    return Draft(samples, encode)


def layout_of(served: Served) -> ChatLayout:
    """The model's chat layout; ApiError 400 for one that holds no dialogues."""
    if served.layout is None:
        raise ApiError(
            400, "this model's tokenizer has no chat tokens or template; use /v1/completions", code="no_chat_template"
        )
    return served.layout


def check_parts(fields: Fields, served: Served, param: str) -> None:
    """ApiError where there are more messages or tools than can fit: each takes at least one token."""
    for name in (param, "tools"):
        parts = fields.any(name)
        if isinstance(parts, list) and len(parts) >= served.context:
            raise too_long(served, name, f"have {len(parts)} parts of a token or more")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation that the model is to continue, as read from a request. ``param`` and ``limit``: the fields of the
    messages and of ``asked``, the limit on the answer's tokens; ``variables``: for the chat template."""

    served: Served
    options: AnswerOptions
    messages: list[JsonObject]
    use: ToolUse
    schema: Form | None
    variables: JsonObject | None
    asked: int | None
    samples: int = 1
    logprobs: int | None = None
    param: str = "messages"
    limit: str = "max_tokens"

    @property
    def thinks(self) -> bool:
        """Whether the answer begins with reasoning."""
        return layout_of(self.served).thinks(self.variables)

    def request(self) -> Request:
        """The engine's request. ApiError for a prompt that is too long, and for a schema that cannot be enforced."""
        served, options = self.served, self.options
        grammar = grammar_of(served, self.schema, self.use, self.thinks)
        ids = self._encode()
        new = room(served, [ids], self.asked, None, self.param, self.limit)
        return Request(
            prompt_ids=tuple(ids),
            max_new_tokens=new,
            min_new_tokens=options.least_of(new),
            sampling=options.sampling,
            samples=self.samples,
            stop_ids=options.stop_ids(turn_stops(served.tokenizer, served.config)),
            stop_texts=options.stops,
            logit_bias=options.bias,
            logprobs=self.logprobs,
            text="tools" if self.use.tools else "answer",
            cache_salt=options.salt,
            adapter=options.adapter,
            grammar=grammar,
            one_call=not self.use.several,
            thinking=self.thinks,
        )

    def _encode(self) -> list[int]:
        """Token ids of the prompt. ApiError when its length alone shows that it is too long, or the chat template has
        no form for it."""
        served, tools = self.served, self.use.tools
        layout = layout_of(served)
        try:
            check_length(served, layout.texts(self.messages, tools, self.variables), self.param)
            ids = layout.encode(self.messages, tools, variables=self.variables)
        except UserError as error:
            raise ApiError(400, str(error), self.param, "invalid_value") from None
        bos = [served.config.bos_token_id]
        return [*bos, *ids] if served.add_bos and ids[:1] != bos else ids


def _asked_tokens(fields: Fields) -> int | None:
    older, newer = fields.integer("max_tokens", 1, None), fields.integer("max_completion_tokens", 1, None)
    if older is not None and newer is not None:
        fields.refuse("max_tokens", "is the older name of max_completion_tokens; give only one of the two")
    return older if newer is None else newer


def _read_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        fields.refuse("top_logprobs", "needs logprobs to be true")
    return (top or 0) if wanted else None


def check_variables(fields: Fields, variables: JsonObject | None, layout: ChatLayout) -> None:
    """Refuse ``chat_template_kwargs`` that the chat template does not read."""
    for name in variables or ():
        if name not in layout.variables:
            known = ", ".join(sorted(layout.variables)) or "none"
            fields.refuse(
                "chat_template_kwargs",
                f"{shown(name)} has no effect on this model's chat template, {layout.name}, which reads {known}; leave "
                "it out",
                "unsupported_parameter",
            )


def read_messages(fields: Fields, found: list[object] | None, layout: ChatLayout) -> list[JsonObject]:
    """OpenAI messages in the form of core.data.chat_template, with contents joined to one text. An answer's reasoning
    stays a part of its own where the chat template reads it, and is written in front of the answer as in training
    data (`tele data --reasoning think`) otherwise."""
    if not found:
        fields.refuse("messages", "must have at least one message", "missing_required_parameter")
    messages: list[JsonObject] = []
    for place, message in enumerate(found):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where}: expected an object, found {shown(message)}", where)
        inner = Fields(message, where)
        role = inner.text("role")
        if role not in ROLES:
            inner.refuse("role", f"{shown(role)} is not one of {', '.join(ROLES)}", "invalid_value")
        if role in ("system", "developer") and place:
            inner.refuse("role", "a system message must be the first message", "invalid_value")
        calls = inner.list("tool_calls")
        if calls and role != "assistant":
            inner.refuse("tool_calls", "is only allowed in messages of the assistant")
        content = _content(inner, may_miss=role == "assistant")
        if role == "tool" and not (messages and (messages[-1].get("tool_calls") or messages[-1]["role"] == "tool")):
            inner.refuse("role", "a tool message must follow the assistant's message with tool_calls", "invalid_value")
        reasoning = _reasoning(inner, role == "assistant")
        for name in ("tool_call_id", "name"):
            inner.text(name)
        if refusal := inner.text("refusal"):
            if role != "assistant" or content:
                inner.refuse("refusal", "is what an assistant says in place of content; give one of them")
            content = refusal  # the layout has no other place for it
        inner.list("annotations")
        inner.absent(("audio", "function_call"), UNSUPPORTED)
        inner.done()
        messages.append({"role": ROLES[role], "content": content})
        if reasoning:
            messages[-1]["reasoning_content"] = reasoning
        if calls:
            messages[-1]["tool_calls"] = [tool_call(f"{where}.tool_calls[{n}]", call) for n, call in enumerate(calls)]
        if calls:
            messages[-1]["call_ids"] = [call.get("id") for call in calls if isinstance(call, dict)]
        if role == "tool":
            messages[-1]["call_ids"] = [inner.text("tool_call_id")]
    write_reasoning(messages, layout)
    order_results(messages, "messages")
    if not any(message["role"] == "user" for message in messages):
        fields.refuse("messages", "needs a message of role user, found none", "invalid_value")
    return messages


def write_reasoning(messages: list[JsonObject], layout: ChatLayout) -> None:
    """Put the reasoning of answers ("reasoning_content") in front of their texts, where the chat template does not read
    it by itself."""
    for message in messages:
        if "reasoning_content" in message and "reasoning_content" not in layout.reads:
            thought = message.pop("reasoning_content").strip("\n")
            message["content"] = THOUGHT.format(thought, message["content"] or "")


def order_results(messages: list[JsonObject], param: str) -> None:
    """Put the results of tools into the order of their calls, which alone says whose they are in the layout, and take
    the ids ("call_ids") off the messages. ApiError for a result of no call, and where one before it is missing."""
    ids = [message.pop("call_ids", None) for message in messages]
    for place, calls in enumerate(ids):
        if not calls or messages[place]["role"] == "tool" or not all(isinstance(one, str) for one in calls):
            continue
        end = place + 1
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        given = [ids[n][0] for n in range(place + 1, end)]
        try:
            order = order_of_results(calls, given)
        except ValueError as error:
            raise ApiError(400, f"{param}: {error}", param, "invalid_value") from None
        messages[place + 1 : end] = [messages[place + 1 + n] for n in order]


def _reasoning(fields: Fields, answer: bool) -> str | None:
    """The reasoning of an answer that a client sends back, under either of the names that servers give it."""
    found = {name: text for name in ("reasoning_content", "reasoning") if (text := fields.text(name))}
    if found and not answer:
        fields.refuse(next(iter(found)), "is only allowed in messages of the assistant")
    if len(set(found.values())) > 1:
        fields.refuse("reasoning", "differs from reasoning_content; give one of the two")
    return next(iter(found.values()), None)


def _content(fields: Fields, may_miss: bool) -> str | None:
    """A message's content: text, or the joined texts of a list of parts."""
    content = fields.any("content")
    if isinstance(content, list):
        texts = []
        for place, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = shown(part.get("type")) if isinstance(part, dict) else shown(part)
                fields.refuse(
                    "content", f"part {place} must be of type 'text', found {kind}; this model reads text only"
                )
            texts.append(part["text"])
        content = "".join(texts)
    if content is None and may_miss:
        return None
    if not isinstance(content, str):
        fields.refuse("content", f"expected a string or a list of text parts, found {shown(content)}", "invalid_type")
    return content


def tool_call(where: str, call: object) -> JsonObject:
    """A tool call with its arguments as an object, which the template expects; clients send them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}: expected an object with a function and its name, found {shown(call)}", where)
    given = function.get("arguments") or "{}"
    arguments, found = None, f"found {shown(given)}"
    if isinstance(given, str):
        try:
            arguments = strict_json.parse(given.encode("utf-8"))
        except ValueError as error:  # of an answer that reached its limit, for one
            found = str(error)
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{where}.function.arguments: expected the text of a JSON object: {found}", where)
    return {"name": function["name"], "arguments": arguments}


class ChatWriter:
    """Writer (core.serve.frames.Writer) of chat completions."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, named: Named, tools: bool, thinking: bool = False) -> None:
        self._tokenizer, self._named, self._tools, self._thinking = tokenizer, named, tools, thinking
        self._answers: dict[int, _Answer] = {}

    @property
    def reasoned(self) -> int | None:
        """Tokens of the answers' reasoning so far, its end included; None where no answer begins with reasoning."""
        return sum(answer.reasoned for answer in self._answers.values()) if self._thinking else None

    def opening(self, index: int) -> list[JsonObject]:
        return [_entry(index, {"role": "assistant", "content": ""})]

    def push(self, index: int, event: Event) -> list[JsonObject]:
        answer = self._answers.setdefault(index, _Answer(self._tools, self._thinking))
        logprobs: JsonObject | None = None
        # A stop token is not part of the answer.
        if event.choice is not None and event.choice.logprob is not None and not isinstance(event.stop, int):
            logprobs = {"content": [self._logprob(event.choice)], "refusal": None}
            answer.logprobs.append(logprobs["content"][0])
        entries = [_entry(index, delta) for delta in answer.take(event)]
        if logprobs is not None:
            entries = entries or [_entry(index, {})]
            entries[0]["logprobs"] = logprobs
        if answer.finish_reason is not None:
            entries.append(_entry(index, {}, answer.finish_reason))
        return entries

    def whole(self) -> list[JsonObject]:
        choices = []
        for index, answer in sorted(self._answers.items()):
            text = "".join(answer.words)
            message: JsonObject = {"role": "assistant", "content": text, "refusal": None}
            if self._thinking:
                message["reasoning_content"] = "".join(answer.thoughts)
            if answer.calls:
                message |= {"content": text or None, "tool_calls": answer.calls}
            logprobs = {"content": answer.logprobs, "refusal": None} if answer.logprobs else None
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}
            )
        return choices

    def _logprob(self, choice: TokenChoice) -> JsonObject:
        def entry(token: int, logprob: float | None) -> JsonObject:
            raw = self._tokenizer.token_bytes(token)
            return {"token": self._named(token), "logprob": logprob, "bytes": list(raw)}

        return {**entry(choice.token, choice.logprob), "top_logprobs": [entry(*one) for one in choice.top]}


class _Answer:
    """One answer as far as it has been generated."""

    def __init__(self, tools: bool, thinking: bool = False) -> None:
        self.words: list[str] = []
        self.thoughts: list[str] = []
        self.reasoned = 0  # tokens
        self.calls: list[JsonObject] = []
        self.logprobs: list[JsonObject] = []
        self.finish_reason: str | None = None
        self._stream = ToolCallStream() if tools else None
        self._thoughts = ThoughtStream() if thinking else None

    def take(self, event: Event) -> list[JsonObject]:
        """Append an event. Returns the deltas that a stream sends for it."""
        deltas: list[JsonObject] = []
        texts = [event.text] if event.text else []
        if self._thoughts is not None:
            self.reasoned += self._thoughts.reasoning and event.choice is not None
            texts = self._thoughts.push(event.text)
            texts += self._thoughts.flush() if event.finish_reason is not None else []
            self.thoughts += (thoughts := [text for text in texts if isinstance(text, Thought)])
            deltas += [{"reasoning_content": thought} for thought in thoughts]
            texts = [text for text in texts if not isinstance(text, Thought)]
        parts: list[str | ToolCall] = list(texts)
        if self._stream is not None:
            parts = self._stream.push("".join(texts))
            if event.finish_reason is not None:
                parts += self._stream.flush()
        for part in parts:
            if isinstance(part, str):
                self.words.append(part)
                deltas.append({"content": part})
                continue
            call = {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": part.name, "arguments": part.arguments},
            }
            deltas.append({"tool_calls": [{"index": len(self.calls), **call}]})
            self.calls.append(call)
        if event.finish_reason is not None:
            calls = self.calls and event.finish_reason == "stop"
            self.finish_reason = "tool_calls" if calls else event.finish_reason
        return deltas


def _entry(index: int, delta: JsonObject, finish_reason: str | None = None) -> JsonObject:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
