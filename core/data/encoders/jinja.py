"""Chat templates in Jinja2's sandbox, with the names and filters that transformers gives them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from telechat_twins.core.backends import install_command
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MIB, load_json, read_text
from telechat_twins.core.near import near_path, nearest
from telechat_twins.core.shown import printable, shown

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_TEMPLATE = MIB
HOLDERS = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # of a folder's template, in order
# (messages, tools, add_generation_prompt, variables) -> text
Render = Callable[[object, object, bool, object], str]


def names_in(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """Variables that a template reads and does not set, and all names and texts that it mentions."""
    from jinja2 import meta, nodes

    tree = _environment().parse(template)
    constants = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    attributes = (node.attr for node in tree.find_all(nodes.Getattr))
    return frozenset(meta.find_undeclared_variables(tree)), frozenset((*constants, *attributes))


def lost_in(text: str, messages: object, tools: object) -> str:
    """What of ``messages`` and ``tools`` a rendered ``text`` does not show, "" if nothing: a template that reads a
    message's content as a list of parts, or knows no tools, leaves them out without an error. What the assistant says
    is not looked for, since templates shorten earlier reasoning."""
    for n, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content")
        if message.get("role") != "assistant" and isinstance(content, str) and not _shows(text, content):
            return f"what message {n}, of role {message.get('role')}, says"
        for call in message.get("tool_calls") or ():
            if not _shows(text, str(call["function"]["name"])):
                return f"the call of a tool in message {n}"
    for tool in tools if isinstance(tools, list) else []:
        inner = tool.get("function", tool) if isinstance(tool, dict) else {}
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str) and not _shows(text, name):
            return f"the tool {shown(name)}"
    return ""


def _shows(text: str, content: str) -> bool:
    """Whether a text has a content in it: stripped, or as JSON writes it."""
    said = content.strip()
    return said in text or any(json.dumps(said, ensure_ascii=escape)[1:-1] in text for escape in (False, True))


def compiled_template(template: str, name: str, tokens: Mapping[str, str], marks: tuple[str, str] = ("", "")) -> Render:
    """``marks`` go around what the template marks by {% generation %}. UserError names the template in what fails."""
    try:
        import jinja2
    except ModuleNotFoundError:
        raise UserError(
            f"{name}: differs from TeleChat2's built-in layout and is rendered by Jinja2, which is not installed; run: "
            f"{install_command('tokenizers')}, or give --chat-template builtin"
        ) from None
    try:
        compiled = _environment(marks).from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"{name}: not a template that Jinja2 can read ({printable(str(error), 200)})") from None

    def render_with(messages: object, tools: object, prompt: bool, variables: object) -> str:
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            return compiled.render({**tokens, **(variables if isinstance(variables, dict) else {}), **values})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise UserError(f"{name}: cannot render these messages ({printable(str(error), 200)})") from None

    return render_with


def _environment(marks: tuple[str, str] = ("", "")) -> Environment:
    """Jinja2's sandbox with what transformers gives its templates."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock, Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: what the model is to write; it changes no text but for ``marks``."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> Node | list[Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Callable[[], str]) -> str:
            return marks[0] + caller() + marks[1]

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


def given_template(path: str, words: Sequence[str]) -> str:
    """The template of a file that an option names: a text, or a .json file with a ``chat_template``. UserError for what
    is no such file, with a hint where one of the option's other ``words`` or a file of a folder may be meant."""
    file = Path(path)
    if file.is_dir():
        held = next((f"; give {file / name}" for name in HOLDERS if (file / name).is_file()), "")
        raise UserError(f"--chat-template {path}: must be a file, found a folder{held}")
    if not file.exists():
        near = nearest(path, words)
        hint = f"; did you mean '{near}'?" if near else near_path(file)
        raise UserError(f"--chat-template {path}: no such file; give a file or one of {', '.join(words)}{hint}")
    if file.suffix.lower() != ".json":
        return read_text(file, MAX_TEMPLATE)
    value = load_json(file, "a description of the tokenizer").get("chat_template")
    if value is None:
        raise UserError(f"{file}: has no chat_template; give a file that holds one, or a text in Jinja's language")
    return _one_template(value, f"{file}: chat_template")


def find_template(folders: Sequence[Path]) -> tuple[str, str] | None:
    """(template, where it stands) of the first folder that has one, in transformers' order; UserError if damaged."""
    for folder in dict.fromkeys(folders):
        with_tools = folder / "additional_chat_templates" / "tool_use.jinja"
        if (file := folder / HOLDERS[0]).is_file():
            other = read_text(with_tools, MAX_TEMPLATE) if with_tools.is_file() else None
            return _with_tools(read_text(file, MAX_TEMPLATE), other), str(file)
        if with_tools.is_file():
            raise UserError(
                f"{with_tools}: is there without a {HOLDERS[0]} in {folder}, so chats without tools have no template; "
                "restore that file, or give --chat-template"
            )
        for name in HOLDERS[1:]:
            file = folder / name
            value = load_json(file, "a description of the tokenizer").get("chat_template") if file.is_file() else None
            if value is not None:
                return _one_template(value, f"{file}: chat_template"), f"{file}: chat_template"
    return None


def _one_template(value: object, where: str) -> str:
    """The template of tokenizer_config.json: text, or of several named ones the default, with tools "tool_use"."""
    with_tools = None
    if isinstance(value, list):
        named = {str(one.get("name")): one.get("template") for one in value if isinstance(one, dict)}
        value, with_tools = named.get("default"), named.get("tool_use")
    for one in (value, "" if with_tools is None else with_tools):
        if not isinstance(one, str) or len(one) > MAX_TEMPLATE:
            raise UserError(f"{where}: expected the text of a template, or a list with one named 'default'")
    return _with_tools(str(value), with_tools)


def _with_tools(template: str, other: str | None) -> str:
    """``template``, and where tools are given ``other``: which of the two transformers takes, as one template."""
    if other is None or other == template:
        return template
    # The empty texts keep the line ends and spaces beside the blocks, and a template's own last line end is dropped.
    first, second = (f"{{{{ '' }}}}{one.removesuffix(chr(10))}{{{{ '' }}}}" for one in (other, template))
    return f"{{% if tools %}}{first}{{% else %}}{second}{{% endif %}}"
