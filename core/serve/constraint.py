"""Constraints on an answer: tools and ``tool_choice``, ``response_format``, and the grammar that both make."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.decoding.grammar import (
    ANY_OBJECT,
    Form,
    Schema,
    Words,
    answer_grammar,
    call_rules,
)
from telechat_twins.core.serve import strict_json
from telechat_twins.core.serve.errors import ApiError, shown
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.serve.job import Served
from telechat_twins.core.types import JsonObject

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FORMAT_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FORMS = ("json", "json_object", "choice", "regex")  # of structured_outputs
MAX_PATTERN_CHARACTERS = 1000


@dataclass(frozen=True)
class ToolUse:
    """The tools for the prompt, None when there are none or the model may not call any; ``forced``: places of those of
    which one must be called; ``several``: calls are allowed; otherwise an answer ends behind its first."""

    tools: list[JsonObject] | None = None
    forced: tuple[int, ...] = ()
    several: bool = True


def read_tools(fields: Fields) -> ToolUse:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls``."""
    tools = [_tool(f"tools[{place}]", tool) for place, tool in enumerate(fields.list("tools") or ())]
    choice, several = fields.any("tool_choice"), fields.any("parallel_tool_calls")
    if several not in (None, True, False) or isinstance(several, int) and not isinstance(several, bool):
        fields.refuse("parallel_tool_calls", f"expected true or false, found {shown(several)}", "invalid_type")
    if choice in (None, "auto", "none"):
        if choice == "auto" and not tools:
            fields.refuse("tool_choice", "is only allowed with tools")
        return ToolUse(None if choice == "none" else tools or None, several=several is not False)
    if not tools:
        fields.refuse("tool_choice", "is only allowed with tools")
    if choice == "required":
        return ToolUse(tools, tuple(range(len(tools))), several is not False)
    return ToolUse(tools, (_named(fields, choice, tools),), several=False)


def _named(fields: Fields, choice: object, tools: Sequence[JsonObject]) -> int:
    """The place of the tool that ``tool_choice`` names."""
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        fields.refuse(
            "tool_choice",
            "must be 'none', 'auto', 'required', or {'type': 'function', 'function': {'name': ...}}, found "
            f"{shown(choice)}",
            "unsupported_parameter",
        )
    places = [place for place, tool in enumerate(tools) if tool["function"]["name"] == function["name"]]
    if not places:
        fields.refuse("tool_choice", f"names {shown(function['name'])}, which is not one of the tools", "invalid_value")
    return places[0]


def _tool(where: str, tool: object) -> JsonObject:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(tool, dict) or not isinstance(function, dict):
        raise ApiError(
            400, f"{where}: expected {{'type': 'function', 'function': {{...}}}}, found {shown(tool)}", where
        )
    name = function.get("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ApiError(
            400, f"{where}.function.name: expected 1 to 64 of a-z, A-Z, 0-9, _ and -, found {shown(name)}", where
        )
    for key, kind in (("description", str), ("parameters", dict)):
        if not isinstance(function.get(key), (kind, type(None))):
            raise ApiError(400, f"{where}.function.{key}: has the wrong type, {shown(function[key])}", where)
    return tool


def read_format(fields: Fields) -> Form | None:
    """What ``response_format``, or vLLM's ``structured_outputs``, demands of the answer; None for any text."""
    found, other = _read_response_format(fields), _read_structured(fields)
    if other is not None and found is not None:
        fields.refuse(other[0], "is not allowed beside response_format; give one of the two")
    return found if other is None else other[1]


def _read_response_format(fields: Fields) -> Schema | None:
    found = fields.object("response_format")
    if found is None:
        return None
    inner = Fields(found, "response_format")
    kind = inner.text("type")
    if kind not in ("text", "json_object", "json_schema"):
        inner.refuse("type", f"must be 'text', 'json_object' or 'json_schema', found {shown(kind)}", "invalid_value")
    given = inner.object("json_schema")
    inner.done()
    if kind != "json_schema":
        if given is not None:
            inner.refuse("json_schema", "is only allowed with the type 'json_schema'")
        return ANY_OBJECT if kind == "json_object" else None
    if given is None:
        inner.refuse("json_schema", "is missing", "missing_required_parameter")
    return read_schema(Fields(given, "response_format.json_schema"))


def _read_structured(fields: Fields) -> tuple[str, Form] | None:
    """The field and the form of ``structured_outputs`` {json | json_object | choice | regex: ...}, or of its older
    names ``guided_json`` and so on."""
    given = fields.object("structured_outputs")
    inner = Fields(given or {}, "structured_outputs")
    wanted: list[tuple[Fields, str, str]] = [(inner, kind, kind) for kind in FORMS]
    wanted += [(fields, f"guided_{kind}", kind) for kind in FORMS]
    found = [(of, name, kind) for of, name, kind in wanted if of.any(name) not in (None, False)]
    inner.done()
    if given is not None and not found:
        fields.refuse("structured_outputs", f"must have one of {', '.join(FORMS)}", "missing_required_parameter")
    if len(found) > 1:
        of, name, _ = found[1]
        of.refuse(name, f"is not allowed beside {found[0][0].name(found[0][1])}; give one of the two")
    return None if not found else (found[0][0].name(found[0][1]), _form(*found[0]))


def _form(fields: Fields, name: str, kind: str) -> Form:
    found = fields.any(name)
    if kind == "json_object":
        fields.boolean(name)
        return ANY_OBJECT
    if kind == "regex":
        pattern = fields.text(name) or ""
        if not 1 <= len(pattern) <= MAX_PATTERN_CHARACTERS:
            fields.refuse(name, f"must have 1 to {MAX_PATTERN_CHARACTERS} characters, found {len(pattern)}")
        return Words(pattern=pattern)
    if kind == "choice":
        texts = fields.list(name) or []
        if not (texts and all(isinstance(text, str) and text for text in texts)):
            fields.refuse(name, "expected a list of texts, none empty", "invalid_type")
        return Words(tuple(str(text) for text in texts))
    if isinstance(found, str):  # clients of vLLM also send the schema as text
        try:
            found = strict_json.parse(found.encode("utf-8"))
        except ValueError as error:
            fields.refuse(name, f"expected a JSON schema, found text that is none ({error})", "invalid_type")
    if not isinstance(found, (dict, bool)):
        fields.refuse(name, f"expected a JSON schema, found {shown(found)}", "invalid_type")
    return found


def read_schema(fields: Fields) -> Schema:
    """A named schema. It is enforced with ``strict`` true and false alike."""
    name = fields.text("name")
    if name is None or not FORMAT_NAME.fullmatch(name):
        fields.refuse("name", f"expected 1 to 64 of a-z, A-Z, 0-9, _ and -, found {shown(name)}", "invalid_value")
    fields.text("description")
    fields.boolean("strict")
    schema = fields.any("schema")
    fields.done()
    if not isinstance(schema, (dict, bool)):
        fields.refuse("schema", f"expected a JSON schema, found {shown(schema)}", "invalid_type")
    return schema


def grammar_of(
    served: Served, schema: Form | None, use: ToolUse, thinking: bool = False, continues: bool = False
) -> str | None:
    """The grammar of an answer; None where every text is allowed. ApiError names the schema that cannot be enforced.
    ``thinking``: the answer begins with reasoning, which is free; ``continues``: it continues a text.

    Compiles the grammar, which may take some time.
    """
    if schema is not None:
        _check(served, schema, None, "structured_outputs" if isinstance(schema, Words) else "response_format")
    if schema is None and not use.forced:
        return None
    tools = use.tools or []
    calls = None
    # A schema constrains an answer in words; one that may call tools has the choice.
    for place in use.forced or (range(len(tools)) if schema is not None else ()):
        _check(served, None, {str(tools[place]["function"]["name"]): _parameters(tools[place])}, f"tools[{place}]")
    if tools:
        places = use.forced or range(len(tools))
        functions = {str(tools[place]["function"]["name"]): _parameters(tools[place]) for place in places}
        calls = call_rules(functions, use.several, served.tokenizer)
    grammar = answer_grammar(None if use.forced else schema, calls, served.tokenizer, thinking, continues)
    served.grammars.check(grammar)
    return grammar


def _parameters(tool: JsonObject) -> Schema:
    return {"type": "object", **(tool["function"].get("parameters") or {})}


def _check(served: Served, schema: Form | None, functions: dict[str, Schema] | None, param: str) -> None:
    """ApiError 400 for a schema, or the schema of a tool's arguments, that cannot be enforced."""
    try:
        calls = None if functions is None else call_rules(functions, False, served.tokenizer)
        served.grammars.check(answer_grammar(schema, calls, served.tokenizer))
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param, "invalid_value") from None
