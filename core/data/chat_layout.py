"""The layout of a chat as a model wants it: TeleChat2's own (core.data.chat_template), or a template in the folder.

A folder's ``chat_template`` (chat_template.jinja, chat_template.json, or tokenizer_config.json, as transformers looks
for it) that says the same as the built-in layout changes nothing. Another one is rendered by Jinja2 in its sandbox,
with the names and filters that transformers gives a template. Either way the contents of messages stay ordinary text:
a control token's name written in one does not become the token.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from telechat_twins.core.backends import install_command
from telechat_twins.core.data.chat_template import DEFAULT_SYSTEM, chat_parts, encode_chat, render
from telechat_twins.core.data.control import THINK, ControlToken, Splitter
from telechat_twins.core.data.tokenizer import Allow, Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MIB, load_json, read_text
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from jinja2 import Environment

BUILT_IN, THINKING, AUTO = "builtin", "thinking", "auto"
MAX_TEMPLATE = MIB
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


class TemplateLayout:
    """A Jinja template, rendered in Jinja2's sandbox. UserError when it cannot be parsed or Jinja2 is missing."""

    def __init__(self, tokenizer: Tokenizer, template: str, name: str) -> None:
        self.name, self._tokenizer = name, tokenizer
        self._silent = {**tokenizer.silent, **tokenizer.control}
        self._splitter = Splitter(tuple(ControlToken(text, index) for text, index in self._silent.items()))
        tokens = _token_names(tokenizer)
        self._render = _compiled(template, name, tokens)
        found, self.reads = _names_in(template)
        self.variables = found - {*_GIVEN, *tokens}

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
        ids: list[int] = []
        for segment in self._splitter.split(text):
            if isinstance(segment, ControlToken):
                ids.append(segment.id)
            elif plain := segment.replace(mark, ""):
                ids += self._tokenizer.encode(plain)
        return ids

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

    def _marked(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[object] | None,
        prompt: bool,
        names: Collection[str],
        variables: JsonObject | None,
    ) -> tuple[str, str]:
        """(a character that no message holds, the rendered text in which that breaks ``names`` within contents)."""
        given = [_standard(messages), list(tools or ()), dict(variables or {})]
        written = json.dumps(given, ensure_ascii=False)
        # Noncharacters: no text means anything by them, and a template passes them on like any other.
        mark = next((chr(c) for c in range(0xFDD0, 0xFDF0) if chr(c) not in written), None)
        if mark is None:
            raise UserError("messages: hold all the noncharacters U+FDD0 to U+FDEF; leave one of them out")
        ordered = sorted(names, key=len, reverse=True)
        inside, offered, values = (_break(some, ordered, mark) for some in given)
        return mark, self._render(inside, offered or None, prompt, values)


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
        return BuiltInLayout(tokenizer, thinking=choice == THINKING), []
    if choice != AUTO:
        return TemplateLayout(tokenizer, read_text(choice, MAX_TEMPLATE), choice), []
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


def check_training_layout(tokenizer: Tokenizer, choice: str = AUTO) -> list[str]:
    """UserError unless dialogues can be packed by this tokenizer: they are packed in TeleChat2's layout only, so a
    model whose chats follow a template of its own would be trained on another one."""
    layout, notes = open_layout(tokenizer, choice)
    layout = require_layout(tokenizer, layout)
    if not isinstance(layout, BuiltInLayout):
        raise UserError(
            "--sft: dialogues are packed in TeleChat2's built-in layout, and chats with this model follow "
            f"{layout.name}, which differs; give --chat-template builtin to train the built-in one"
        )
    return notes


def no_dialogue(tokenizer: Tokenizer) -> str:
    """Why a tokenizer cannot hold a dialogue, and what to do."""
    return (
        f"{tokenizer.path} has no dialogue pieces (<_user>, <_bot>, ...) and no chat template beside it: this is a "
        "base model, which continues text; use `tele generate` or /v1/completions, or give --chat-template FILE"
    )


def find_template(folders: Sequence[Path]) -> tuple[str, str] | None:
    """(template, where it stands) of the first folder that has one, in transformers' order; UserError if damaged."""
    for folder in dict.fromkeys(folders):
        if (file := folder / "chat_template.jinja").is_file():
            return read_text(file, MAX_TEMPLATE), str(file)
        for name in ("chat_template.json", "tokenizer_config.json"):
            file = folder / name
            value = load_json(file, "a description of the tokenizer").get("chat_template") if file.is_file() else None
            if value is not None:
                return _one_template(value, f"{file}: chat_template"), f"{file}: chat_template"
    return None


def _one_template(value: object, where: str) -> str:
    """The template of tokenizer_config.json: text, or of several named ones the default."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    if not isinstance(value, str) or len(value) > MAX_TEMPLATE:
        raise UserError(f"{where}: expected the text of a template, or a list with one named 'default'")
    return value


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
    """bos_token, eos_token and pad_token, as templates name them; empty text where there is none."""
    names = {}
    for kind in ("bos", "eos", "pad"):
        try:
            names[f"{kind}_token"] = tokenizer.piece(getattr(tokenizer, f"{kind}_token_id"))
        except UserError:
            names[f"{kind}_token"] = ""
    return names


def _names_in(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """Variables that a template reads and does not set, and all names and texts that it mentions."""
    from jinja2 import meta, nodes

    tree = _environment().parse(template)
    constants = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    attributes = (node.attr for node in tree.find_all(nodes.Getattr))
    return frozenset(meta.find_undeclared_variables(tree)), frozenset((*constants, *attributes))


def _compiled(template: str, name: str, tokens: Mapping[str, str]) -> Callable[[object, object, bool, object], str]:
    """A function (messages, tools, add_generation_prompt, variables) -> text. UserError names the template in what
    fails."""
    try:
        import jinja2
    except ModuleNotFoundError:
        raise UserError(
            f"{name}: differs from TeleChat2's built-in layout and is rendered by Jinja2, which is not installed; run: "
            f"{install_command('tokenizers')}, or give --chat-template builtin"
        ) from None
    try:
        compiled = _environment().from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"{name}: not a template that Jinja2 can read ({printable(str(error), 200)})") from None

    def render_with(messages: object, tools: object, prompt: bool, variables: object) -> str:
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            return compiled.render({**tokens, **(variables if isinstance(variables, dict) else {}), **values})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise UserError(f"{name}: cannot render these messages ({printable(str(error), 200)})") from None

    return render_with


def _environment() -> Environment:
    """Jinja2's sandbox with what transformers gives its templates."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock, Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: what the model is to write; it changes no text."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> Node | list[Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: object) -> str:
        separators, sort_keys = options.get("separators"), bool(options.get("sort_keys", False))
        found = tuple(separators) if isinstance(separators, (list, tuple)) else None
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=found, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
