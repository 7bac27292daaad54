"""Messages in every spelling in use -> {"role", "content", "tool_calls", "weight"} as the chat template takes them.

Roles become system, user, assistant, bot and tool; content parts one text, as the server joins them; arguments of calls
the object that the server renders. An assistant's message with weight 0 is context: shown, and not learnt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from telechat_twins.core.data.chat_template import json_text, tool_arguments
from telechat_twins.core.data.kinds.columns import NO_COLUMNS, Columns
from telechat_twins.core.data.kinds.fields import json_list, json_value, listed, refuse_ignored, refuse_unread, text
from telechat_twins.core.data.kinds.harmless import HARMLESS_OF_MESSAGE
from telechat_twins.core.data.kinds.slips import empty_turns, slips
from telechat_twins.core.data.kinds.table import is_empty
from telechat_twins.core.data.kinds.turns import JOINS, whole_turns
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import parse_value
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

CALL = "function_call"  # a message that is a call
ROLES: dict[str, str] = {
    **dict.fromkeys(("system", "developer", "\u7cfb\u7edf"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "\u7528\u6237"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bard", "bing", "chatgpt", "chatbot", "claude", "model", "ai"), "assistant"),
    "\u52a9\u624b": "assistant",
    "bot": "bot",  # TeleChat2's own name, which its template knows
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("tool_result", "tool_results", "function_result"), "tool"),
    **dict.fromkeys((CALL, "tool_call", "tool_calls"), CALL),
}
ANSWERS = ("assistant", "bot")
REASONING = ("refuse", "think", "leave-out")

_WEIGHTS = ("weight", "loss", "train", "training")
_REASONS = ("reasoning_content", "reasoning", "thinking")
_OF_ANSWER = ("tool_calls", "function_call", *_WEIGHTS, *_REASONS)
# Values that say whether a model is to reason, as data sets have them under the names of reasoning.
_SWITCHES = frozenset(("on", "off", "enabled", "disabled", "auto", "none", "low", "medium", "high"))
_PART_TEXTS = {"text": "text", "input_text": "text", "output_text": "text"}
_PART_REASONS = ("thinking", "reasoning")  # types of parts that hold reasoning, and their keys for it beside "text"
_ARGUMENTS = ("arguments", "args", "parameters", "input")  # OpenAI's name; LangChain's, Llama 3's, Anthropic's
_FUNCTION = {"name", *_ARGUMENTS}
_CALL = {"id", "type", "index", "function", *_FUNCTION}


@dataclass
class Reading:
    """How rows are read, and what was noticed on the way.

    ``ignore``: keys to leave out. ``reasoning``: one of REASONING, for an assistant's reasoning beside its answer.
    ``columns``: the rows' own names; ``columns_met``: those of them that a row has. ``left_out``: harmless keys that
    were met. ``named``: messages with a speaker's name, which the layout has no place for. ``kinds``: rows of each
    kind. ``without_system``: rows that get the layout's own system text. ``context``: answers of weight 0.
    ``unanswered``: dialogues without an answer to learn. ``noticed``: what is read as it stands, though hardly meant ->
    (how many, where the first is).
    """

    ignore: frozenset[str] = frozenset()
    reasoning: str = "refuse"
    kind: str | None = None
    columns: Columns = NO_COLUMNS
    columns_met: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    kinds: dict[str, int] = field(default_factory=dict)
    named: int = 0
    without_system: int = 0
    context: int = 0
    unanswered: int = 0
    noticed: dict[str, tuple[int, str]] = field(default_factory=dict)

    def notice(self, what: str, where: str) -> None:
        """Count something that stands at ``where``."""
        count, first = self.noticed.get(what, (0, where))
        self.noticed[what] = count + 1, first

    def absorb(self, later: Reading) -> None:
        """Add what the reading of later rows noticed."""
        self.columns_met |= later.columns_met
        self.left_out |= later.left_out
        for kind, count in later.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count
        for what, (count, first) in later.noticed.items():
            before, earliest = self.noticed.get(what, (0, first))
            self.noticed[what] = before + count, earliest
        self.named += later.named
        self.without_system += later.without_system
        self.context += later.context
        self.unanswered += later.unanswered

    def notice_slips(self, messages: Sequence[JsonObject], tags: bool, where: str) -> None:
        """Count what a dialogue holds that is read as it stands, though hardly meant."""
        for what in (*empty_turns(messages), *slips(messages, tags)):
            self.notice(what, where)


def unused(reading: Reading) -> Reading:
    """A reading of the same options that has noticed nothing."""
    return Reading(reading.ignore, reading.reasoning, reading.kind, reading.columns)


def read_messages(value: object, name: str, where: str, reading: Reading, texts: bool = False) -> list[JsonObject]:
    """The messages of a list, called ``name`` in messages of errors; ``texts``: a list of texts alone is one by turns.
    UserError for what is malformed or not read."""
    members = json_list(value, name, where)
    if texts and members and all(isinstance(said, str) for said in members):
        return _by_turns(members, name, where)
    given = enumerate(members)
    read = ((one, f"{name}[{n}]") for n, said in given for one in _read(said, f"{name}[{n}]", where, reading))
    return whole_turns(read, where)


def _by_turns(texts: list[object], name: str, where: str) -> list[JsonObject]:
    """Texts alone: a question, its answer, and so on. A single one could be anything and is refused."""
    if len(texts) < 2:
        raise UserError(f"{where}: '{name}' holds one text; a dialogue of texts alone has a question and its answer")
    return [{"role": "assistant" if n % 2 else "user", "content": said} for n, said in enumerate(texts)]


def with_system(
    messages: list[JsonObject], system: str | None, name: str, where: str
) -> tuple[str | None, list[JsonObject]]:
    """(the system text, the other messages). UserError for a system message that is not the first and only one; one
    without text, or with the same text again, says nothing that would be lost."""
    first = messages[0]["content"] if messages and messages[0]["role"] == "system" and system is None else system
    for n, message in enumerate(messages):
        if message["role"] == "system" and (n or system is not None) and message["content"] not in ("", first):
            raise UserError(f"{where}: '{name}[{n}]' is {_out_of_place(name, n, system, first)}")
    return first, [message for message in messages if message["role"] != "system"]


def _out_of_place(name: str, n: int, system: str | None, first: str | None) -> str:
    """What a system message is that stands where the chat layout has no place for one, and what to do."""
    if not first:
        return (
            "a system message behind others; the chat layout has a place for one, in front: move it there, or write "
            "its text into the user's message that follows it"
        )
    if system is not None and n == 0:
        return (
            "a second system message beside the row's own system text; the chat layout has a place for one: leave one "
            "of them out, or join their texts"
        )
    place = f"'{name}[0]'" if system is None else "the row's own system text"
    return (
        f"a second system message; the chat layout has a place for one, in front: join its text to {place}, write it "
        "into the user's message that follows it, or begin a row of its own with it"
    )


def read_tools(value: object, name: str, where: str, bare: bool = False) -> list[object] | None:
    """The tools of a row; None when absent. ``bare``: ``functions`` of the older interface, which become tools."""
    if is_empty(value):
        return None
    tools: list[object] = [_tool(tool, f"{name}[{n}]", where) for n, tool in enumerate(json_list(value, name, where))]
    return [_wrapped(tool) for tool in tools] if bare else tools


def _wrapped(tool: object) -> object:
    """A function as a tool; one that stands as a tool already is one."""
    is_tool = isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    return tool if is_tool else {"type": "function", "function": tool}


def _tool(value: object, name: str, where: str) -> JsonObject:
    """A tool's description: an object, or its JSON text (as columns of tables hold them)."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = parse_value(value.encode())
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: '{name}' must be an object that describes a tool, found {shown(value)}")
    json_value(value, name, where)
    return value


# A question and its answer in one object: of the names of the two those that go together.
_TURNS = (
    ("human", "assistant"),
    ("user", "assistant"),
    ("input", "output"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
)


def _read(value: object, name: str, where: str, reading: Reading) -> list[JsonObject]:
    """The message that an object is; several for an object of a question and its answer."""
    if isinstance(value, dict):
        for asked, said in _TURNS:
            if asked in value and said in value:
                return _turn(value, asked, said, name, where, reading)
    speaker, words = _spelling(value, name, where, reading.columns)
    if reading.columns.parts:
        reading.columns_met.update(part for part, key in reading.columns.parts if key in (speaker, words))
    assert isinstance(value, dict)
    called: str = value[speaker]
    plain = called.strip().lower().replace("-", "_").replace(" ", "_")
    role = ROLES.get(dict(reading.columns.roles).get(called, called)) or ROLES.get(plain)
    if role is None:
        raise UserError(
            f"{where}: '{name}.{speaker}' is {shown(value[speaker])}; legal: {', '.join(ROLES)}; another name is given "
            "by --role NAME=ROLE"
        )
    return [_message(value, role, (speaker, words), name, where, reading)]


def _turn(value: JsonObject, asked: str, said: str, name: str, where: str, reading: Reading) -> list[JsonObject]:
    """The messages of a question and its answer, with a system text in front where the object has one."""
    if asked == "input" and not is_empty(value.get("instruction")):
        raise UserError(
            f"{where}: '{name}' has instruction, input and output: a row, not a turn of a dialogue; write the list "
            "that holds it as a file of its own"
        )
    refuse_unread(value, (asked, said, "system"), name, where, reading.ignore, HARMLESS_OF_MESSAGE, reading.left_out)
    roles = [("user", asked), ("assistant", said)]
    if not is_empty(value.get("system")):
        roles.insert(0, ("system", "system"))
    return [{"role": role, "content": text(value[key], f"{name}.{key}", where)} for role, key in roles]


def _spelling(value: object, name: str, where: str, columns: Columns) -> tuple[str, str]:
    """The keys of the speaker and of what is said."""
    spellings = columns.spellings
    if isinstance(value, dict):
        spoken = [(speaker, words) for speaker, words in spellings if isinstance(value.get(speaker), str)]
        said = [(speaker, words) for speaker, words in spoken if words in value]
        if spoken:
            return (said or spoken)[0]
    pairs = ", or with ".join(f"{speaker} and {words}" for speaker, words in spellings[:2])
    way = "; other names are given by --column role=KEY --column content=KEY" if isinstance(value, dict) else ""
    raise UserError(f"{where}: '{name}' must be an object with {pairs}{way}")


def _message(
    value: JsonObject, role: str, spelling: tuple[str, str], name: str, where: str, reading: Reading
) -> JsonObject:
    words = spelling[1]
    said = value.get(words)
    if len(value) == 2 and isinstance(said, str) and role not in (CALL, "tool") and not reading.ignore:
        return {"role": role, "content": said}  # nearly every message: nothing but who speaks and what is said
    known = {*spelling, "name", *_WEIGHTS}.union(_OF_ANSWER if role in ANSWERS else ())
    known |= {"tool_call_id"} if role == "tool" else set()
    parts = {*spelling, "tool_calls", "function_call"}
    refuse_ignored(value, parts & known, name, where, reading.ignore)
    refuse_unread(value, known, name, where, reading.ignore, HARMLESS_OF_MESSAGE, reading.left_out)
    given = {key: value.get(key) for key in known if key not in reading.ignore or key in parts}
    message: JsonObject = {"role": role}
    if role == CALL:
        calls = enumerate(_calls_in(given[words], name, words, where))
        made = [_call(call, n, f"{name}.{words}", where, reading) for n, call in calls]
        message = {"role": "assistant", "content": "", "tool_calls": made, JOINS: True}
    elif role in ANSWERS:
        message |= _answer(given, words, name, where, reading)
    elif role == "tool":
        message["content"] = _result(given[words], f"{name}.{words}", where)
    else:
        message["content"] = _content(given[words], f"{name}.{words}", where)
    if role == "tool":
        message |= {key: given[key] for key in ("tool_call_id", "name") if given.get(key) is not None}
    elif not is_empty(given.get("name")):
        reading.named += 1
    learnt = _weight(given, name, where, role in ANSWERS or role == CALL)
    if not learnt and message["role"] in ANSWERS:
        message["weight"] = 0
        reading.context += 1
    return message


def _answer(given: JsonObject, words: str, name: str, where: str, reading: Reading) -> JsonObject:
    """Content and calls of an assistant's message."""
    calls: list[object] = []
    if not is_empty(given.get("tool_calls")):
        calls = json_list(given["tool_calls"], f"{name}.tool_calls", where)
    if not is_empty(given.get("function_call")):
        if calls:
            raise UserError(f"{where}: '{name}' has both tool_calls and function_call; leave one out")
        calls = [given["function_call"]]
    answer: JsonObject = {}
    if calls:
        key = "tool_calls" if not is_empty(given.get("tool_calls")) else "function_call"
        answer["tool_calls"] = [
            _call(call, n, f"{name}.{key}[{n}]" if key == "tool_calls" else f"{name}.{key}", where, reading)
            for n, call in enumerate(calls)
        ]
    apart = _parts_apart(given.get(words), words, name, where)
    if apart and not is_empty(given.get("thinking")):
        raise UserError(f"{where}: '{name}' has reasoning in '{words}' and in 'thinking'; leave one out")
    given = given | apart
    content = given.get(words)
    answer = {"content": None if content is None and calls else _content(content, f"{name}.{words}", where), **answer}
    return answer | _reasoned(given, answer["content"], name, where, reading)


def reasoned_answer(value: object, key: str, answer: str, where: str, reading: Reading) -> JsonObject:
    """An assistant's message of an answer and the reasoning that the row has beside it under ``key``."""
    message: JsonObject = {"role": "assistant", "content": answer}
    if is_empty(value):
        return message
    return message | _thought(value, key, answer, where, reading)


def _reasoned(given: JsonObject, content: str | None, name: str, where: str, reading: Reading) -> JsonObject:
    """The content with the reasoning in front, as ``reading`` says; nothing where there is none."""
    reasons = [key for key in _REASONS if not is_empty(given.get(key))]
    if len(reasons) > 1 and reading.reasoning != "leave-out":
        raise UserError(f"{where}: '{name}' has both {reasons[0]} and {reasons[1]}; leave one out")
    return _thought(given[reasons[0]], f"{name}.{reasons[0]}", content, where, reading) if reasons else {}


def _parts_apart(content: object, words: str, name: str, where: str) -> JsonObject:
    """The reasoning among the parts of an answer, which becomes its "thinking", and the other parts; nothing where none
    is reasoning."""
    if not isinstance(content, list):
        return {}
    thoughts, others = list[str](), list[object]()
    for n, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in _PART_REASONS:
            others.append(part)
            continue
        place = f"{name}.{words}[{n}]"
        refuse_unread(part, ("type", "text", *_PART_REASONS), place, where, (), ("signature", "index"))
        found = [key for key in ("text", *_PART_REASONS) if not is_empty(part.get(key))]
        if len(found) > 1 or (found and others):
            why = "behind a part of the answer" if others else f"under {' and '.join(found)}"
            raise UserError(f"{where}: '{place}' is reasoning {why}; write it into 'reasoning_content'")
        thoughts += [text(part[key], f"{place}.{key}", where) for key in found]
    return {words: others, "thinking": "\n".join(thoughts)} if len(others) < len(content) else {}


def _thought(value: object, name: str, content: str | None, where: str, reading: Reading) -> JsonObject:
    if reading.reasoning == "leave-out":
        return {}
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCHES):
        raise UserError(
            f"{where}: '{name}' is {shown(value)}, which says whether to reason and is no reasoning; leave it out with "
            "--reasoning leave-out"
        )
    if reading.reasoning == "refuse":
        raise UserError(
            f"{where}: '{name}' has no place in the chat layout; train on it in front of the answer with "
            "--reasoning think, or leave it out with --reasoning leave-out"
        )
    thought = text(value, name, where).strip("\n")
    if "</think>" in thought:
        raise UserError(f"{where}: '{name}' holds </think>, which ends it; take it out")
    if (content or "").lstrip().startswith("<think>"):
        raise UserError(
            f"{where}: '{name}' stands beside an answer that begins with <think> itself; leave one of them out, e.g. "
            "with --reasoning leave-out, which keeps the answer as it is"
        )
    return {"content": f"<think>\n{thought}\n</think>\n\n{content or ''}", "thought": True}


def _weight(given: JsonObject, name: str, where: str, answer: bool) -> bool:
    """Whether a message is learnt; what is not an assistant's never is, and may say so."""
    found = [key for key in _WEIGHTS if given.get(key) is not None and given[key] != ""]
    values = {key: given[key] for key in found}
    for key, value in values.items():
        if value not in (0, 1, "0", "1", "true", "false", "True", "False"):
            raise UserError(f"{where}: '{name}.{key}' must be 0 (context) or 1 (learnt), found {shown(value)}")
    weights = {0 if value in (0, "0", "false", "False") else 1 for value in values.values()}
    if len(weights) > 1:
        raise UserError(f"{where}: '{name}': {' and '.join(found)} contradict each other")
    if not answer and 1 in weights:
        raise UserError(
            f"{where}: '{name}.{found[0]}' is 1, but only messages of the assistant are learnt; leave it out"
        )
    return answer and 0 not in weights


def _result(value: object, name: str, where: str) -> str:
    """What a tool gave: text or parts of it; an object, a list of objects or a number as its JSON text, written as the
    arguments of calls are."""
    of_parts = isinstance(value, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and part.get("type") in _PART_TEXTS) for part in value
    )
    if isinstance(value, str) or value is None or of_parts:
        return _content(value, name, where)
    json_value(value, name, where)
    return json_text(value)


def _content(value: object, name: str, where: str) -> str:
    """Text, or the texts of a list of parts, one after another."""
    if not isinstance(value, list):
        return text(value, name, where)
    if len(value) > 1 and all(isinstance(part, str) for part in value):
        raise UserError(
            f"{where}: '{name}' is a list of {len(value)} texts, which may be alternatives; choose one, or join them"
        )
    texts = []
    for n, part in enumerate(value):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _PART_TEXTS:
            raise UserError(f"{where}: '{name}[{n}]' is {shown(kind or part)}; only parts of type 'text' can be learnt")
        refuse_unread(part, ("type", "text"), f"{name}[{n}]", where, (), ("annotations", "cache_control", "index"))
        texts.append(text(part.get("text"), f"{name}[{n}].text", where))
    return "".join(texts)


def _calls_in(value: object, name: str, words: str, where: str) -> list[object]:
    """The call or calls that a message of the role function_call says, as JSON text or as objects."""
    if isinstance(value, str):
        try:
            value = parse_value(value.encode())
        except ValueError as error:
            reason = getattr(error, "msg", str(error))
            raise UserError(
                f"{where}: '{name}.{words}' must be a call as JSON, {{name, arguments}} ({reason})"
            ) from None
    if value in (None, [], {}):
        raise UserError(f"{where}: '{name}.{words}' holds no call; leave the message out")
    return value if isinstance(value, list) else [value]


def _call(value: object, place: int, name: str, where: str, reading: Reading) -> JsonObject:
    """{"name", "arguments", "id"} of a call, written flat or as the OpenAI interface writes it."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: '{name}' must be an object, found {type(value).__name__}")
    wrapped = "function" in value
    inner = value["function"] if wrapped else value
    refuse_unread(value, _CALL - (_FUNCTION if wrapped else {"function"}), name, where, reading.ignore)
    if wrapped:
        name = f"{name}.function"
        if not isinstance(inner, dict):
            raise UserError(f"{where}: '{name}' must be an object, found {type(inner).__name__}")
        refuse_unread(inner, _FUNCTION, name, where, reading.ignore)
    if not isinstance(inner.get("name"), str):
        raise UserError(f"{where}: '{name}.name' must be text, found {type(inner.get('name')).__name__}")
    if json_text(inner["name"]) != f'"{inner["name"]}"' or not inner["name"]:
        raise UserError(
            f"{where}: '{name}.name' is {shown(inner['name'])}, which no call can say: the layout writes names as they "
            "are, between quotes"
        )
    for key, wanted in (("type", "function"), ("index", place)):
        if value.get(key) is not None and value[key] != wanted:
            raise UserError(f"{where}: '{name}': '{key}' must be {wanted!r}, found {shown(value[key])}")
    filled = [key for key in _ARGUMENTS if not is_empty(inner.get(key))]
    if len(filled) > 1:
        raise UserError(f"{where}: '{name}' has both {filled[0]} and {filled[1]}, which hold a call's arguments")
    called = next((key for key in (*filled, *_ARGUMENTS) if key in inner), "arguments")
    try:
        given = inner.get(called)
        arguments = tool_arguments({} if given is None else given)
    except ValueError as error:
        raise UserError(f"{where}: '{name}.{called}' {error}") from None
    json_value(arguments, f"{name}.{called}", where)
    call: JsonObject = {"name": inner["name"], "arguments": arguments}
    return call if value.get("id") is None else {**call, "id": value["id"]}


def read_calls(value: object, name: str, where: str, reading: Reading) -> list[JsonObject]:
    """Calls that a row gives in place of an answer, as objects or as their JSON text."""
    calls = json_list(value, name, where)
    if not calls:
        raise UserError(f"{where}: '{name}' holds no call; leave the row out, or give it an answer")
    return [_call(call, n, f"{name}[{n}]", where, reading) for n, call in enumerate(calls)]


def turns_of_history(value: object, where: str, reading: Reading) -> list[JsonObject]:
    """Earlier turns: pairs of a question and its answer, or messages."""
    turns = json_list(value, "history", where)
    if turns and isinstance(turns[0], dict):
        return read_messages(turns, "history", where, reading)
    earlier: list[JsonObject] = []
    for n, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise UserError(f"{where}: 'history[{n}]' must be a list of two texts, a question and its answer")
        earlier += [{"role": "user", "content": turn[0]}, {"role": "bot", "content": turn[1]}]
    return earlier


def is_messages(value: object) -> bool:
    """Whether a value is a list of messages, or one, and not a text."""
    return isinstance(value, dict) or (isinstance(value, Sequence) and not isinstance(value, str))


def as_messages(value: object, name: str, where: str) -> list[object]:
    """A list of messages; one message becomes a list."""
    return [value] if isinstance(value, dict) else listed(value, name, where)
