"""The layout of a chat as a model wants it: TeleChat2's own (core.data.chat_template), or a template in the folder.

A folder's ``chat_template`` (chat_template.jinja, chat_template.json, or tokenizer_config.json, as transformers looks
for it) that says the same as the built-in layout changes nothing. Another one is rendered by Jinja2 in its sandbox,
with the names and filters that transformers gives a template. Either way the contents of messages stay ordinary text:
a control token's name written in one does not become the token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from telechat_twins.core.data.chat_template import (
    DEFAULT_SYSTEM,
    chat_parts,
    encode_chat,
    encode_parts,
    encode_thinking,
    render,
)
from telechat_twins.core.data.control import THINK, ControlToken, Splitter
from telechat_twins.core.data.encoders.jinja import (
    Render,
    compiled_template,
    find_template,
    given_template,
    lost_in,
    names_in,
)
from telechat_twins.core.data.encoders.special import KINDS
from telechat_twins.core.data.tokenizer import Allow, Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

BUILT_IN, THINKING, AUTO = "builtin", "thinking", "auto"
# What a template marks as the model's words is put between these two while answers are sought; noncharacters.
_BEGIN, _END = "\ufdee", "\ufdef"
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")

# The layout of core.data.chat_template, for those who render it from a template. {%- and -%} eat the lines' ends. No
# empty tuple: llama.cpp's reader of templates refuses it, and with it the model.
CHAT_TEMPLATE = """\
{%- set told = messages[0]['role'] == 'system' -%}
{{- '<_system>' + (messages[0]['content'] if told else SYSTEM) -}}
{%- if tools -%}
{{- '\\n\\n# 可用工具\\n你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,' -}}
{{- '以下是可用工具详情：\\n<tools>\\n' -}}
{%- for tool in tools -%}{{- tool | tojson -}}{{- '\\n' -}}{%- endfor -%}
{{- '</tools>\\n\\n# 调用方法\\n你需要遵循工具的要求，使用json格式返回工具名称及参数，并用' -}}
{{- '<tool_call></tool_call>包含。下方是一个调用模板：\\n<tool_call>\\n' -}}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>\\n' -}}
{%- endif -%}
{{- '\\n' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<_user>' + message['content'] -}}
{%- elif message['role'] in ('assistant', 'bot') -%}
{{- '<_bot>' + (message['content'] or '') -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set call = call['function'] or call -%}
{{- ('' if loop.first else '\\n') + '<tool_call>\\n{"name": "' + call['name'] + '", "arguments": ' -}}
{%- set given = call['arguments'] -%}
{{- (given if given is string else given | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<_end>\\n' -}}
{%- elif message['role'] == 'tool' -%}
{{- '\\n' if not loop.first and loop.previtem['role'] == 'tool' else '<_user>' -}}
{{- '<tool_response>\\n' + message['content'] + '\\n</tool_response>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<_bot>' -}}{%- endif -%}
""".replace("SYSTEM", json.dumps(DEFAULT_SYSTEM, ensure_ascii=False))
# SHA-256 of templates that say what the built-in layout says: the release's, and what earlier exports wrote.
_SAME = {
    "da986f30ef575d7b3663eab2c837553d0fb1046893d5b07b582244f97ccfa063",
    "e8580912557cffb4ffed61304b2d5fd295fc3f4fa37d9f9eff3725b29a9281fc",
    "613c0fc4121fc33e2714193e3533b535dbfd1d4b810dd9aa7e2753c52e2944a2",
}


class ChatLayout(Protocol):
    """How a conversation becomes ids. ``name``: where the layout comes from, for messages. ``variables``: names of
    further values that it reads. ``reads``: keys of messages and other names that it mentions."""

    @property
    def name(self) -> str: ...

    @property
    def variables(self) -> frozenset[str]: ...

    @property
    def reads(self) -> frozenset[str]: ...

    def encode(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None = None,
        add_generation_prompt: bool = True,
        allow_control: Allow = False,
        variables: JsonObject | None = None,
    ) -> list[int]:
        """The ids. UserError for messages that the layout cannot hold."""

    def texts(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None = None,
        variables: JsonObject | None = None,
    ) -> list[str]:
        """The ordinary text in the prompt, in order."""

    def thinks(self, variables: JsonObject | None = None) -> bool:
        """Whether the prompt opens <think>, so that an answer begins with reasoning."""

    def encode_answers(
        self, messages: Sequence[JsonObject], tools: Sequence[object] | None = None, allow_control: Allow = False
    ) -> tuple[list[int], list[int]]:
        """A conversation to train on as (ids, mask): 1 where the model speaks, but for answers of ``weight`` 0. Up to
        each answer the ids are those of ``encode``. UserError where the layout cannot promise that."""


@dataclass(frozen=True)
class BuiltInLayout:
    """TeleChat2's layout, written in Python; ``thinking``: that of models that reason first."""

    tokenizer: Tokenizer
    name: str = "TeleChat2's built-in layout"
    variables: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    thinking: bool = False

    def encode(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None = None,
        add_generation_prompt: bool = True,
        allow_control: Allow = False,
        variables: JsonObject | None = None,
    ) -> list[int]:
        """As core.data.chat_template.encode_chat; there are no ``variables``."""
        return encode_chat(self.tokenizer, messages, tools, add_generation_prompt, allow_control, self.thinking)

    def texts(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None = None,
        variables: JsonObject | None = None,
    ) -> list[str]:
        """The ordinary text in the prompt, in order."""
        return [part.text for part in chat_parts(messages, tools, thinking=self.thinking) if not part.control]

    def thinks(self, variables: JsonObject | None = None) -> bool:
        """Whether the prompt opens <think>, so that an answer begins with reasoning."""
        return self.thinking

    def encode_answers(
        self, messages: Sequence[JsonObject], tools: Sequence[object] | None = None, allow_control: Allow = False
    ) -> tuple[list[int], list[int]]:
        """Answers, their calls of tools, and <_end>."""
        if self.thinking:
            return encode_thinking(self.tokenizer, messages, tools, allow_control)
        return encode_parts(self.tokenizer, chat_parts(messages, tools, False), allow_control)


class TemplateLayout:
    """A Jinja template, rendered in Jinja2's sandbox. UserError when it cannot be parsed or Jinja2 is missing."""

    def __init__(self, tokenizer: Tokenizer, template: str, name: str) -> None:
        self.name, self._tokenizer = name, tokenizer
        self._silent = {**tokenizer.silent, **tokenizer.control}
        self._splitter = Splitter(tuple(ControlToken(text, index) for text, index in self._silent.items()))
        tokens = _token_names(tokenizer)
        self._render = compiled_template(template, name, tokens)
        marks = "generation" in template  # perhaps
        self._with_marks = compiled_template(template, name, tokens, (_BEGIN, _END)) if marks else None
        found, self.reads = names_in(template)
        self.variables = found - {*_GIVEN, *tokens}
        self._check_tokens(template, {kind for kind in KINDS if f"{kind}_token" in found}, tokens)

    def _check_tokens(self, template: str, kinds: Collection[str], tokens: Mapping[str, str]) -> None:
        """UserError for a special token that the template writes and the files beside the tokenizer describe, where
        the tokenizer has not the same: its name would be encoded as letters. ``kinds``: read as variables."""
        tokenizer, way = self._tokenizer, "give the tokenizer.json that holds it, which transformers writes"
        for token, index in tokenizer.special.described.items():
            own = self._silent.get(token, tokenizer.token_id(token))
            if token in template and (own is None or index not in (None, own)):
                where = "" if index is None else f" with id {index}"
                has = "has not" if own is None else f"has with id {own}"
                raise UserError(
                    f"{self.name}: writes {shown(token)}, which the files beside {tokenizer.path} describe as a "
                    f"token{where} and which that file {has}; {way}, or --chat-template builtin"
                )
        for name in (f"{kind}_token" for kind in sorted(kinds) if tokenizer.control):
            said = tokenizer.special.names.get(name, tokens[name])
            if said != tokens[name]:
                raise UserError(
                    f"{self.name}: writes {name}, which is {shown(said)} by the files beside {tokenizer.path} and "
                    f"{shown(tokens[name])} here; correct them, or give --chat-template builtin"
                )

    def encode(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None = None,
        add_generation_prompt: bool = True,
        allow_control: Allow = False,
        variables: JsonObject | None = None,
    ) -> list[int]:
        """The rendered text as ids. Control tokens are those that the template itself writes; with ``allow_control``
        those in contents count as well (a collection: those names). ``variables``: further values for it."""
        names = () if allow_control is True else set(self._silent) - set(allow_control or ())
        mark, text = self._marked(messages, tools, add_generation_prompt, names, variables)
        return self._cut(text, mark, ())[0]

    def encode_answers(
        self, messages: Sequence[JsonObject], tools: Sequence[object] | None = None, allow_control: Allow = False
    ) -> tuple[list[int], list[int]]:
        """What the template marks by {% generation %}; without marks what follows the prompt, up to the last control
        token where only space follows that."""
        names = set(self._silent) - set(() if allow_control is True else allow_control or ())
        mark, whole = self._marked(messages, tools, False, names, None)
        answers = self._answers(messages, tools, names, mark, whole)
        ids, before = self._cut(whole, mark, {edge for _, *edges in answers for edge in edges})
        mask = [0] * len(ids)
        for n, begin, end in answers:
            if messages[n].get("weight") == 0:
                continue
            prompt = self.encode(messages[:n], tools, True, allow_control)
            if not {begin, end} <= {*before} or ids[: before[begin]] != prompt:
                raise UserError(
                    f"{self.name}: the text before message {n}, an answer, is not the prompt that a chat would have "
                    "there, so that the model would learn another one; give --chat-template builtin"
                )
            mask[before[begin] : before[end]] = [1] * (before[end] - before[begin])
        return ids, mask

    def _cut(self, text: str, mark: str, edges: Collection[int]) -> tuple[list[int], dict[int, int]]:
        """(ids of ``text``, number of ids before each of ``edges``, which are places in it).

        A text between two control tokens is encoded whole, as a chat does that goes on behind an answer: apart, a part
        of it begins with a space of its own in SentencePiece. Where the ids of the part before an edge are not those
        that the whole begins with, no ids of the whole end there, and the parts are encoded apart.
        """
        ids: list[int] = []
        before: dict[int, int] = {}
        at = 0
        for segment in self._splitter.split(text):
            before[at] = len(ids)
            if isinstance(segment, ControlToken):
                ids.append(segment.id)
                at += len(segment.text)
                continue
            places = [at, *sorted(edge for edge in edges if at < edge < at + len(segment)), at + len(segment)]
            whole, first = "", len(ids)  # what is encoded together, and where its ids begin
            for begin, end in itertools.pairwise(places):
                part = segment[begin - at : end - at].replace(mark, "")
                together = self._tokenizer.encode(whole + part)
                if together[: len(ids) - first] != ids[first:]:
                    whole, first, together = "", len(ids), self._tokenizer.encode(part)
                before[begin], whole = len(ids), whole + part
                ids[first:] = together
            at += len(segment)
        before[at] = len(ids)
        return ids, before

    def _answers(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None,
        names: Collection[str],
        mark: str,
        whole: str,
    ) -> list[tuple[int, int, int]]:
        """(number of the message, begin, end in ``whole``) of each answer."""
        numbers = [n for n, message in enumerate(messages) if message.get("role") in ("assistant", "bot")]
        if self._with_marks is not None:
            text = self._marked(messages, tools, False, names, None, self._with_marks)[1]
            pieces = [part for piece in text.split(_BEGIN) for part in piece.split(_END)]
            signs = [sign for sign in text if sign in (_BEGIN, _END)]
            if signs == [_BEGIN, _END] * len(numbers) and "".join(pieces) == whole:
                places = [0, *itertools.accumulate(map(len, pieces))]
                return [(n, places[2 * k + 1], places[2 * k + 2]) for k, n in enumerate(numbers)]
            if signs:
                raise UserError(f"{self.name}: its {{% generation %}} does not hold one answer each; use builtin")
        found = []
        for n in (n for n in numbers if messages[n].get("weight") != 0):
            before = self._marked(messages[:n], tools, True, names, None)[1]
            after = self._marked(messages[: n + 1], tools, False, names, None)[1]
            if not after.startswith(before) and before.rstrip("\n").endswith(THINK):
                raise UserError(
                    f"{self.name}: begins answers with reasoning, and message {n} has none; give it a "
                    "reasoning_content, or weight 0"
                )
            if not (whole.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"{self.name}: renders message {n}, an answer, otherwise once more follows it, and does not mark "
                    "answers by {% generation %}; give --chat-template builtin"
                )
            last = size = 0
            for segment in self._splitter.split(after[len(before) :]):
                size += len(segment.text if isinstance(segment, ControlToken) else segment)
                last = size if isinstance(segment, ControlToken) else last
            rest = after[len(before) + last :].replace(mark, "")
            found.append((n, len(before), len(after) if rest.strip() or not last else len(before) + last))
        return found

    def render(
        self, messages: Sequence[JsonObject], tools: Sequence[object] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The prompt as text."""
        return self._render(_standard(messages), tools, add_generation_prompt, {})

    def thinks(self, variables: JsonObject | None = None) -> bool:
        """Whether the prompt opens <think>, so that an answer begins with reasoning."""
        try:
            prompt = self._render(_standard([{"role": "user", "content": "?"}]), None, True, dict(variables or {}))
        except UserError:  # a template that wants more than a question
            return False
        return prompt.rstrip("\n").endswith(THINK)

    def texts(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None = None,
        variables: JsonObject | None = None,
    ) -> list[str]:
        """The ordinary text in the prompt, in order."""
        mark, text = self._marked(messages, tools, True, self._silent, variables)
        return [s.replace(mark, "") for s in self._splitter.split(text) if isinstance(s, str)]

    def slips(self) -> list[str]:
        """Notes on what a model would learn of the ends of answers, where that is hardly meant."""
        asked: list[JsonObject] = [{"role": "user", "content": "?"}]
        try:
            prompt, open_ended = self.render(asked), self.render(asked, add_generation_prompt=False)
            whole = self.render([*asked, {"role": "assistant", "content": "!"}], add_generation_prompt=False)
        except UserError:  # a template that wants more than a question
            return []
        end, opener = whole.rpartition("!")[2], prompt.rpartition("?")[2]
        if not any(isinstance(segment, ControlToken) for segment in self._splitter.split(end)):
            return [f"{self.name} writes no control token behind an answer, so a model does not learn to end one"]
        if opener and prompt == open_ended and end.endswith(opener):
            return [f"{self.name} opens a further answer behind the last one of a dialogue, which is learnt with it"]
        return []

    def _marked(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None,
        prompt: bool,
        names: Collection[str],
        variables: JsonObject | None,
        render: Render | None = None,
    ) -> tuple[str, str]:
        """(a character that no message holds, the rendered text in which that breaks ``names`` within contents)."""
        given = [_standard(messages), list(tools or ()), dict(variables or {})]
        written = json.dumps(given, ensure_ascii=False)
        # Noncharacters: no text means anything by them, and a template passes them on like any other.
        mark = next((chr(c) for c in range(0xFDD0, ord(_BEGIN)) if chr(c) not in written), None)
        if mark is None or _BEGIN in written or _END in written:
            raise UserError("messages: hold the noncharacters U+FDEE or U+FDEF, or all others; leave them out")
        ordered = sorted(names, key=len, reverse=True)
        inside, offered, values = (_break(some, ordered, mark) for some in given)
        text = (render or self._render)(inside, offered or None, prompt, values)
        if lost := lost_in(text, inside, offered):
            raise UserError(f"{self.name}: leaves out {lost}; give another template, or --chat-template builtin")
        return mark, text


def open_layout(
    tokenizer: Tokenizer, choice: str = AUTO, folders: Sequence[Path] = ()
) -> tuple[ChatLayout | None, list[str]]:
    """The layout of a model's chats, and notes on it; None for a tokenizer without dialogue pieces or a template.

    ``choice``: "auto" looks for a template beside the tokenizer and in ``folders``, "builtin" takes TeleChat2's layout,
    "thinking" the same with answers that begin with reasoning, anything else is a file with a template. UserError for a
    template that cannot be used.
    """
    if choice in (BUILT_IN, THINKING):
        if not tokenizer.control:
            raise UserError(f"--chat-template {choice}: {no_dialogue(tokenizer)}")
        if choice == THINKING:
            return BuiltInLayout(tokenizer, "TeleChat2's layout with reasoning first", thinking=True), []
        return BuiltInLayout(tokenizer), []
    if choice != AUTO:
        return TemplateLayout(tokenizer, given_template(choice, (AUTO, BUILT_IN, THINKING)), choice), []
    found = find_template([tokenizer.path.parent, *folders])
    if found is None:
        return (BuiltInLayout(tokenizer) if tokenizer.control else None), []
    template, where = found
    if tokenizer.control and _known(template):
        return BuiltInLayout(tokenizer), []
    own = TemplateLayout(tokenizer, template, where)
    if tokenizer.control and _agrees(own):
        return BuiltInLayout(tokenizer), []
    return own, [f"chats follow {where}, which differs from TeleChat2's built-in layout (--chat-template builtin)"]


def require_layout(tokenizer: Tokenizer, layout: ChatLayout | None) -> ChatLayout:
    """``layout``; UserError with the way out when there is none."""
    if layout is None:
        raise UserError(f"chat: {no_dialogue(tokenizer)}")
    return layout


def open_training_layout(tokenizer: Tokenizer, choice: str = AUTO, own: bool = True) -> tuple[ChatLayout, list[str]]:
    """The layout of dialogues that this tokenizer packs, which is that of its chats, and notes on it. UserError for a
    template of the model's own unless ``own`` allows one."""
    layout, notes = open_layout(tokenizer, choice)
    layout = require_layout(tokenizer, layout)
    if not own and (not isinstance(layout, BuiltInLayout) or layout.thinking):
        raise UserError(
            "--sft deepspeed and --sft mindformers pack dialogues in TeleChat2's built-in layout, and "
            f"chats with this model follow {layout.name}, which differs; use --sft plain, or give --chat-template "
            "builtin to train the built-in one"
        )
    return layout, [*notes, *(layout.slips() if isinstance(layout, TemplateLayout) else [])]


def no_dialogue(tokenizer: Tokenizer) -> str:
    """Why a tokenizer cannot hold a dialogue, and what to do."""
    return (
        f"{tokenizer.path} has no dialogue pieces (<_user>, <_bot>, ...) and no chat template beside it: this is a "
        "base model, which continues text; use `tele generate` or /v1/completions, or give --chat-template FILE"
    )


def _known(template: str) -> bool:
    return template == CHAT_TEMPLATE or hashlib.sha256(template.encode()).hexdigest() in _SAME


def _agrees(own: TemplateLayout) -> bool:
    """Whether a template renders what the built-in layout does, on conversations of every kind."""
    call = {"name": "look_up", "arguments": {"word": "\u4e2d<b>", "n": [1, 2.5, None, True]}}
    tools = [{"type": "function", "function": {"name": "look_up", "description": "\u67e5 'x'", "parameters": {}}}]
    ask: JsonObject = {"role": "user", "content": " Who?\n"}
    tell: JsonObject = {"role": "assistant", "content": "Me. "}
    calls: JsonObject = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    results: list[JsonObject] = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    talks: tuple[list[JsonObject], ...] = (
        [ask],
        [{"role": "system", "content": "Be brief."}, ask],
        [ask, tell, ask],
        [ask, calls, *results],
    )
    try:
        return all(
            own.render(talk, offered, prompt) == render(talk, offered, prompt)
            for talk in talks
            for offered in (None, tools)
            for prompt in (True, False)
        )
    except UserError:
        return False


def _standard(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """Messages in the shape that templates are written for: roles of the OpenAI interface, calls as functions."""
    result: list[JsonObject] = []
    for message in messages:
        changed = {**message, "role": "assistant" if message.get("role") == "bot" else message.get("role")}
        if calls := message.get("tool_calls"):
            functions = [call.get("function", call) for call in calls]
            changed["tool_calls"] = [{"type": "function", "function": dict(function)} for function in functions]
        result.append(changed)
    return result


def _break(value: object, names: Sequence[str], mark: str) -> object:
    """``value`` with ``mark`` inside each of ``names`` that its strings hold or could begin at their ends."""
    if isinstance(value, dict):
        return {key: _break(inner, names, mark) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_break(inner, names, mark) for inner in value]
    if not isinstance(value, str):
        return value
    for name in names:
        value = value.replace(name, name[:1] + mark + name[1:])
    begun = max((n for name in names for n in range(1, len(name)) if value.endswith(name[:n])), default=0)
    return value[: len(value) - begun + 1] + mark + value[len(value) - begun + 1 :] if begun > 1 else value


def _token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Tokens as templates name them: bos_token, eos_token and pad_token, empty text where there is none; and others
    that the files beside the tokenizer name (unk_token, sep_token)."""
    names = dict(tokenizer.special.names)
    for kind in ("bos", "eos", "pad"):
        try:
            names[f"{kind}_token"] = tokenizer.piece(getattr(tokenizer, f"{kind}_token_id"))
        except UserError:
            names[f"{kind}_token"] = ""
    return names
