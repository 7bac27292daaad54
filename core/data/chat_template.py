"""TeleChat2's chat layout, written in Python: rendering executes no template that came with a checkpoint.

    <_system>SYSTEM\\n<_user>QUESTION<_bot>ANSWER<_end>\\n<_user>...<_bot>

A message is {"role", "content"} with role system, user, assistant or bot (may carry "tool_calls", whose arguments are
objects or the JSON text of one; with "weight" 0 it is context and not an ``answer``), or tool. As in the released
template a system message counts only where it comes first and is passed over elsewhere; commands refuse it there.

Models that reason (T1, TeleChat3-Thinking) write <think>\nREASONING\n</think>\n\n before the answer: ``thinking`` puts
<think>\n behind the last <_bot>, and the reasoning of earlier answers is left out, as their templates do. The marks are
control tokens where the tokenizer has them, else text.

``render`` gives the released text; ``encode_chat`` gives ids in which only the layout's own control tokens are control
tokens, whatever strings the contents hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from telechat_twins.core.data.control import (
    BOT,
    END,
    SYSTEM,
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
    TOOL_RESPONSE,
    TOOL_RESPONSE_END,
    USER,
)
from telechat_twins.core.data.tokenizer import Allow, Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import parse_value
from telechat_twins.core.types import JsonObject

DEFAULT_SYSTEM = (
    "你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和"
    "中国电信人工智能研究院（TeleAI）研发的人工智能助手。"
)
ROLES = ("system", "user", "assistant", "bot", "tool")


@dataclass(frozen=True)
class Part:
    """A stretch of the rendered text. ``control``: one control token. ``answer``: what the model is to learn to say."""

    text: str
    control: bool = False
    answer: bool = False


def render(
    messages: Sequence[JsonObject],
    tools: Sequence[object] | None = None,
    add_generation_prompt: bool = True,
    thinking: bool = False,
) -> str:
    """The chat as text, character for character as the released template renders it."""
    return "".join(part.text for part in chat_parts(messages, tools, add_generation_prompt, thinking))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[JsonObject],
    tools: Sequence[object] | None = None,
    add_generation_prompt: bool = True,
    allow_control: Allow = False,
    thinking: bool = False,
) -> list[int]:
    """The chat as ids.

    Contents stay ordinary text: "<_end>" in a question is five letters and brackets. ``allow_control=True`` tokenises
    the rendered text as the released pipeline does, so that control tokens written in contents count; a collection of
    names lets only those through.
    """
    if allow_control is True:
        return tokenizer.encode(render(messages, tools, add_generation_prompt, thinking), allow_control=True)
    return encode_parts(tokenizer, chat_parts(messages, tools, add_generation_prompt, thinking), allow_control)[0]


def encode_parts(
    tokenizer: Tokenizer, parts: Sequence[Part], allow_control: Allow = False
) -> tuple[list[int], list[int]]:
    """Parts -> (ids, mask); mask is 1 on tokens of parts marked ``answer``.

    Neighbouring text is encoded together, as the tokenizer sees it between two control tokens.
    """
    ids: list[int] = []
    mask: list[int] = []
    text = ""
    answer = False

    def close() -> None:
        nonlocal text
        if text:
            new = tokenizer.encode(text, allow_control=allow_control)
            ids.extend(new)
            mask.extend([int(answer)] * len(new))
            text = ""

    for part in parts:
        if part.control and (part.text not in (THINK, THINK_END) or part.text in tokenizer.silent):
            close()
            thought = tokenizer.silent.get(part.text)
            ids.append(tokenizer.control_id(part.text) if thought is None else thought)
            mask.append(int(part.answer))
        else:
            if text and part.answer != answer:
                close()
            answer = part.answer
            text += part.text
    close()
    return ids, mask


def encode_thinking(
    tokenizer: Tokenizer,
    messages: Sequence[JsonObject],
    tools: Sequence[object] | None = None,
    allow_control: Allow = False,
) -> tuple[list[int], list[int]]:
    """(ids, mask) of a chat with a model that reasons first, of which the last message alone may be learnt: the prompt
    that such a chat has there, which opens <think>, and what the model writes, to <_end>. UserError for an answer
    without reasoning, and where others are to be learnt, which no prompt holds as they were said."""
    learnt = [n for n, one in enumerate(messages) if one["role"] in ("assistant", "bot") and one.get("weight") != 0]
    said = [{key: value for key, value in message.items() if key != "thought"} for message in messages]
    if not learnt:
        ids = encode_chat(tokenizer, said, tools, False, allow_control, thinking=True)
        return ids, [0] * len(ids)
    if learnt != [len(messages) - 1]:
        raise UserError("answers behind which the chat goes on lose their reasoning there; learn one at a time")
    if not messages[-1].get("thought"):
        raise UserError(
            f"message {learnt[0]}, an answer, has no reasoning, with which this model begins; give it a "
            "reasoning_content, or weight 0"
        )
    prompt = chat_parts(said[:-1], tools, thinking=True)
    opened, *answer = _assistant_parts(messages[-1], thinking=False)[1:-1]
    answer[0] = replace(answer[0], text=answer[0].text.removeprefix("\n"))
    assert opened.text == THINK
    before = encode_parts(tokenizer, prompt, allow_control)[0]
    # Where no ids end between prompt and answer, the two are encoded apart.
    ids = encode_parts(tokenizer, [*prompt, *(replace(part, answer=False) for part in answer)], allow_control)[0]
    if ids[: len(before)] != before:
        ids = before + encode_parts(tokenizer, answer, allow_control)[0]
    return ids, [0] * len(before) + [1] * (len(ids) - len(before))


def chat_parts(
    messages: Sequence[JsonObject],
    tools: Sequence[object] | None = None,
    add_generation_prompt: bool = True,
    thinking: bool = False,
) -> list[Part]:
    """The chat as parts. UserError names the message whose role or content is not usable."""
    if not messages:
        raise UserError("messages: empty; a chat needs at least one message")
    for n, message in enumerate(messages):
        _check(message, n)
    parts = _system_parts(messages[0], tools)
    for n, message in enumerate(messages):
        role = message["role"]
        if role == "user":
            parts += [Part(USER, control=True), Part(message["content"])]
        elif role in ("assistant", "bot"):
            parts += _assistant_parts(message, thinking)
        elif role == "tool":
            parts += _tool_parts(message, follows_tool=n > 0 and messages[n - 1]["role"] == "tool")
    if add_generation_prompt:
        parts.append(Part(BOT, control=True))
        parts += [Part(THINK, control=True), Part("\n")] if thinking else []
    return [part for part in parts if part.text]


def _system_parts(first: JsonObject, tools: Sequence[object] | None) -> list[Part]:
    system = first["content"] if first["role"] == "system" else DEFAULT_SYSTEM
    parts = [Part(SYSTEM, control=True), Part(system)]
    if not tools:
        return [*parts, Part("\n")]
    listed = "".join(json_text(tool) + "\n" for tool in tools)
    parts.append(
        Part(
            "\n\n# 可用工具\n你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,以下是可用工具详情：\n"
            f"<tools>\n{listed}</tools>\n\n# 调用方法\n你需要遵循工具的要求，使用json格式返回工具名称及参数，并用"
        )
    )
    parts += [Part(TOOL_CALL, control=True), Part(TOOL_CALL_END, control=True)]
    parts.append(Part("包含。下方是一个调用模板：\n"))
    parts.append(Part(TOOL_CALL, control=True))
    parts.append(Part('\n{"name": <function-name>, "arguments": <args-json-object>}\n'))
    return [*parts, Part(TOOL_CALL_END, control=True), Part("\n\n")]


def without_thought(text: str) -> str:
    """An answer without the reasoning in front of it: what follows the last </think>, its beginning stripped."""
    before, mark, after = text.rpartition(THINK_END)
    return after.lstrip() if mark else text


def _assistant_parts(message: JsonObject, thinking: bool) -> list[Part]:
    learnt = message.get("weight") != 0
    content = message.get("content") or ""
    parts = [Part(BOT, control=True)]
    if message.get("thought"):  # core.data.kinds.messages: the content begins with <think>
        thought, _, content = content.removeprefix(THINK).partition(THINK_END)
        parts += [Part(THINK, control=True, answer=learnt), Part(thought, answer=learnt)]
        parts.append(Part(THINK_END, control=True, answer=learnt))
    parts.append(Part(without_thought(content) if thinking else content, answer=learnt))
    for n, call in enumerate(message.get("tool_calls") or ()):
        call = call.get("function", call)
        try:
            arguments = tool_arguments(call["arguments"])
        except ValueError as error:
            raise UserError(f"tool_calls[{n}].arguments: {error}") from None
        body = f'\n{{"name": "{call["name"]}", "arguments": {json_text(arguments)}}}\n'
        parts += [Part("\n" if n else "", answer=learnt), Part(TOOL_CALL, control=True, answer=learnt)]
        parts += [Part(body, answer=learnt), Part(TOOL_CALL_END, control=True, answer=learnt)]
    return [*parts, Part(END, control=True, answer=learnt), Part("\n")]


def tool_arguments(value: object) -> JsonObject:
    """A call's arguments as an object; the OpenAI interface has them as its JSON text. ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = parse_value(value.encode()) if value.strip() else {}
        except ValueError as error:
            raise ValueError(f"must be a JSON object or the text of one ({getattr(error, 'msg', error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object or the text of one, found {type(value).__name__}")
    return value


def _tool_parts(message: JsonObject, follows_tool: bool) -> list[Part]:
    # Consecutive results share one <_user>.
    parts = [Part("\n")] if follows_tool else [Part(USER, control=True)]
    parts += [Part(TOOL_RESPONSE, control=True), Part(f"\n{message['content']}\n")]
    return [*parts, Part(TOOL_RESPONSE_END, control=True)]


def _check(message: object, n: int) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"messages[{n}]: expected an object with role and content, found {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"messages[{n}].role: {role!r} is not one of {', '.join(ROLES)}")
    content = message.get("content")
    silent = role in ("assistant", "bot") and content is None
    if not isinstance(content, str) and not silent:
        raise UserError(f"messages[{n}].content: expected text, found {type(content).__name__}")
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"messages[{n}].tool_calls: expected a list, found {type(calls).__name__}")
    for k, call in enumerate(calls):
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
            raise UserError(f"messages[{n}].tool_calls[{k}]: expected an object with name and arguments")


def json_text(value: object) -> str:
    """A value as the layout writes it, and as the results of tools that are no text are written."""
    return json.dumps(value, ensure_ascii=False)
