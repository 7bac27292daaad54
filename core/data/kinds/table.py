"""Row kinds: by which keys a row is known, which of its keys are read, and which carry nothing to learn.

Every other key with a value is an error, because its content would be lost. A slot is one part of a kind, under each
name that is in use for it; a row fills it once.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from telechat_twins.core.data.kinds.refused import refuse_known
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

# What a row is packed as: a document, a dialogue, a pair of answers, a proposition.
TEXT, DIALOGUE, PREFERENCE, TEACHER = "text", "dialogue", "preference", "teacher"
OPTION = {
    TEXT: "without --sft",
    DIALOGUE: "with --sft plain",
    PREFERENCE: "with --preference",
    TEACHER: "with --teacher",
}
_PLURALS = {TEXT: "texts", DIALOGUE: "dialogues", PREFERENCE: "such pairs", TEACHER: "them"}


@dataclass(frozen=True)
class Kind:
    """One kind of row. ``slots``: slot -> the keys that fill it; ``marks``: the slots that tell the kind, any group.
    ``own``: the rows' own key -> the name that ``--column`` says it stands for."""

    name: str
    use: str
    slots: dict[str, tuple[str, ...]]
    marks: tuple[tuple[str, ...], ...]
    flags: frozenset[str] = field(default=frozenset())
    own: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """Every key that is read."""
        return self.flags.union(*self.slots.values())

    def marked_by(self, keys: Collection[str]) -> bool:
        """Whether a row with these keys can be of this kind."""
        return any(all(any(key in keys for key in self.slots[slot]) for slot in group) for group in self.marks)


_SETTING = {"system": ("system", "system_prompt", "system_message"), "tools": ("tools", "functions")}
_HISTORY = {"history": ("history",)}
_REASONS = {"reasoning": ("reasoning_content", "reasoning", "thinking", "think", "cot", "Complex_CoT")}
_PROMPT = ("prompt", "question", "query", "instruction")
TRANSCRIPT = "transcript"  # any text may be one, so a row is of this kind only where it is of no other
_FLAGS = frozenset({"multiturn", "tool"})
SPEAKERS, WORDS = ("role", "from"), ("content", "value")  # keys of a message
_LETTERS = {letter: (letter,) for letter in "ABCDEFGHIJ"}

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("text", TEXT, {"text": ("text",)}, (("text",),)),
        # TeleChat2's own form.
        Kind("dialog", DIALOGUE, {"messages": ("dialog",), **_SETTING}, (("messages",),), _FLAGS),
        Kind("messages", DIALOGUE, {"messages": ("messages",), **_SETTING}, (("messages",),), _FLAGS),
        Kind(
            "sharegpt",
            DIALOGUE,
            {"messages": ("conversations", "conversation", "items", "turns", "dialogue", "data"), **_SETTING},
            (("messages",),),
            _FLAGS,
        ),
        Kind(
            "alpaca",
            DIALOGUE,
            {
                "instruction": ("instruction",),
                "input": ("input", "context"),
                "answer": ("output", "response", "answer", "target"),
                **_REASONS,
                **_HISTORY,
                **_SETTING,
            },
            (("instruction", "answer"), ("input", "answer")),
            _FLAGS,
        ),
        Kind(
            "query",
            DIALOGUE,
            {
                "question": ("query", "question", "problem", "Question", "user", "human", "inputs"),
                "answer": ("response", "answer", "output", "solution", "Response", "assistant", "targets"),
                "calls": ("answers",),
                **_REASONS,
                **_HISTORY,
                **_SETTING,
            },
            (("question", "answer"), ("question", "calls")),
        ),
        Kind(
            "completion",
            DIALOGUE,
            {
                "prompt": ("prompt",),
                "answer": ("completion", "response", "answer", "output"),
                **_REASONS,
                **_HISTORY,
                **_SETTING,
            },
            (("prompt", "answer"),),
        ),
        # A dialogue written as one text (core.data.kinds.transcripts).
        Kind(
            TRANSCRIPT,
            DIALOGUE,
            {
                "text": ("text", "chat", "plain_text"),
                "system": (*_SETTING["system"], "prefix", "meta_instruction"),
                "tools": _SETTING["tools"],
            },
            (("text",),),
        ),
        Kind(
            "preference",
            PREFERENCE,
            {
                "prompt": (*_PROMPT, "messages", "conversations", "conversation"),
                "input": ("input",),
                "chosen": (
                    "chosen",
                    "chosen_response",
                    "response_chosen",
                    "preferred",
                    "preferred_output",
                    "response",
                    "response_j",
                ),
                "rejected": (
                    "rejected",
                    "reject",
                    "rejected_response",
                    "response_rejected",
                    "dispreferred",
                    "non_preferred",
                    "non_preferred_output",
                    "response_k",
                    "rejected_messages",
                ),
                **_HISTORY,
                **_SETTING,
            },
            (("chosen", "rejected"), ("prompt", "rejected")),
        ),
        # Two answers, and which is better (core.data.kinds.preference).
        Kind(
            "comparison",
            PREFERENCE,
            {
                "prompt": (*_PROMPT, "messages", "history"),
                "first": ("response_0", "response_a", "conversation_a", "human_ref_A"),
                "second": ("response_1", "response_b", "conversation_b", "human_ref_B"),
                "verdict": ("better_response_id", "winner", "labels"),
                **_SETTING,
            },
            (("first", "second"),),
        ),
        Kind(
            "proposition",
            TEACHER,
            {"text": ("proposition", "statement", "claim", "sentence", "text"), "label": ("label", "is_true", "truth")},
            (("text", "label"),),
        ),
        Kind(
            "choice",
            TEACHER,
            {
                "context": ("context", "passage"),
                "question": ("question", "query", "ctx"),
                "choices": ("choices", "options", "endings"),
                "answer": ("answer", "answerKey", "answer_key", "label", "target", "gold"),
                **_LETTERS,
            },
            (("question", "choices", "answer"), ("question", "A", "B", "answer")),
        ),
    )
}
USES = {use: [kind for kind in KINDS.values() if kind.use == use] for use in OPTION}


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, "", [] or {}."""
    return not value and (value is None or value == "" or value == [] or value == {})


def is_count(key: str, value: object) -> bool:
    """Whether a key that mostly holds a dialogue says how many turns it has."""
    return key in ("turns", "items") and isinstance(value, int)


Parts = tuple[tuple[str, str], ...]
"""(a name that a slot has, the rows' own key for it), of which ``--column`` makes rows readable."""


@functools.lru_cache(maxsize=64)
def kinds_with(parts: Parts) -> dict[str, Kind]:
    """KINDS in which the slots that ``parts`` names take the rows' own keys alone."""
    own = {name: key for name, key in parts if name not in (*SPEAKERS, *WORDS)}

    def keys(names: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(own[name] for name in names if name in own)
        return named or tuple(name for name in names if name not in own.values())

    return {
        name: replace(
            kind,
            slots={slot: keys(names) for slot, names in kind.slots.items()},
            own={key: name for name, key in own.items()},
        )
        for name, kind in KINDS.items()
    }


def kinds_of(
    row: JsonObject,
    where: str,
    use: str,
    ignore: Collection[str] = (),
    forced: str | None = None,
    parts: Parts = (),
) -> tuple[Kind, ...]:
    """The kinds, among those of ``use``, that a row can be of. UserError for a row of no kind or of another use.

    Keys with a value decide; where none does, empty ones do. ``forced`` names the kind, which the row must then fit.
    """
    given = row.keys() - set(ignore)
    if use in (DIALOGUE, PREFERENCE):
        refuse_known(row, given, where)
    if forced is not None:
        kind = kinds_with(parts)[forced]
        if not kind.marked_by(given):
            raise UserError(f"{where}: not a row of kind {forced} ({_wanted(kind)}); keys found: {keys_found(row)}")
        return (kind,)
    filled = frozenset(key for key in given if not is_empty(row[key]) and not is_count(key, row[key]))
    found = _marked(use, filled, parts) or _marked(use, frozenset(given), parts)
    if sure := tuple(kind for kind in found if kind.name != TRANSCRIPT):
        return sure
    if not found or not KINDS["text"].marked_by(given) or KINDS["proposition"].marked_by(given):
        refuse_other_use(row, where, use, ignore)
    if found:
        return found
    wanted = "; ".join(f"{kind.name} ({_wanted(kind)})" for kind in kinds_with(parts).values() if kind.use == use)
    raise UserError(
        f"{where}: a row of no kind that is read: {wanted}; keys found: {keys_found(row)}; parts under other "
        f"names are named by --column, e.g. --column {_EXAMPLES[use]}{rows_inside(row)}"
    )


def rows_inside(row: JsonObject) -> str:
    """The end of a message about an object that is no row, where one of its keys holds rows; "" for any other."""
    names = []
    for key, value in row.items():
        held = value.values() if isinstance(value, dict) else value
        if isinstance(value, (list, dict)) and value and all(isinstance(one, dict) for one in held):
            names.append(f"'{printable(key, 80)}'")
    if not names:
        return ""
    verb = "hold" if len(names) > 1 else "holds"
    return f"; {' and '.join(names[:5])} {verb} objects: if these are the rows, write them alone, as a list"


_EXAMPLES = {
    DIALOGUE: "question=KEY --column answer=KEY",
    PREFERENCE: "chosen=KEY --column rejected=KEY",
    TEACHER: "text=KEY --column label=KEY",
}


def several_kinds(row: JsonObject, where: str, kinds: Collection[Kind]) -> UserError:
    """The error for a row whose kind cannot be told."""
    names = [kind.name for kind in kinds]
    both = "question" in row and "context" in row and {"alpaca", "query"} <= {*names}
    way = "; or read the question and its context together: --column instruction=question" if both else ""
    return UserError(
        f"{where}: the row can be of several kinds ({', '.join(names)}) by its keys {keys_found(row)}; say which with "
        f"--kind NAME, and leave the others' keys out with --ignore-key{way}"
    )


@functools.lru_cache(maxsize=1024)
def _marked(use: str, keys: frozenset[str], parts: Parts) -> tuple[Kind, ...]:
    """The kinds for ``use`` that a row with these keys can be of; rows of a file mostly have the same keys."""
    return tuple(kind for kind in kinds_with(parts).values() if kind.use == use and kind.marked_by(keys))


def refuse_other_use(row: JsonObject, where: str, use: str, ignore: Collection[str] = ()) -> None:
    """UserError that names the option, where a row is of a kind that is not for ``use``."""
    given = [key for key in row if key not in ignore and not _holds_documents(row[key])]
    others = (kind for kind in KINDS.values() if kind.use != use and kind.name != TRANSCRIPT)
    if other := next((kind for kind in others if kind.marked_by(given)), None):
        answers = next((key for key in other.slots.get("answer", ()) if isinstance(row.get(key), list)), None)
        if use == PREFERENCE and other.use == DIALOGUE and answers:
            raise UserError(
                f"{where}: '{answers}' is a list of {len(row[answers])} answers; write the better one as 'chosen' and "
                "the other as 'rejected'"
            )
        raise UserError(f"{where}: {_is_a(other)}; pack {_PLURALS[other.use]} {OPTION[other.use]}")


def _holds_documents(value: object) -> bool:
    """Whether a value is a list of objects that are neither messages nor rows of dialogues, as where a file's rows lie
    under a key that may also hold turns."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, dict) or any(name in first for name in SPEAKERS):
        return False
    return not any(kind.marked_by(first) for kind in KINDS.values() if kind.use == DIALOGUE and kind.name != TRANSCRIPT)


class Slots:
    """What fills the slots of a row: its value, and the key that holds it. UserError for a slot under two names."""

    def __init__(self, kind: Kind, row: JsonObject, where: str, ignore: Collection[str] = ()):
        self.kind, self.row, self.where = kind, row, where
        self._names: dict[str, str] = {}
        for slot, names in kind.slots.items():
            if len(names) == 1 and names[0] not in row:
                continue
            given = [name for name in names if name in row and name not in ignore and not is_empty(row[name])]
            given = [name for name in given if not is_count(name, row[name])]
            if len(given) > 1:
                given = self._told(given)
            if len(given) > 1:
                raise UserError(
                    f"{where}: '{given[0]}' and '{given[1]}' both hold the {slot} of a row of kind {kind.name}; "
                    f"leave one out, e.g. with --ignore-key {given[1]}"
                )
            if given:
                self._names[slot] = given[0]

    def _told(self, names: list[str]) -> list[str]:
        """Of several names of a slot those that say more than others: not one that repeats the value of one before it,
        or of a key that fills another slot (``messages`` beside the ``chosen`` that they are)."""
        others = [name for name in self.kind.keys if name in self.row and name not in names]
        values = [self.row[name] for name in names]
        return [
            name
            for n, name in enumerate(names)
            if values[n] not in values[:n] and not any(self.row[other] == values[n] for other in others)
        ]

    def __contains__(self, slot: str) -> bool:
        """Whether the row fills it with something that is not empty."""
        return slot in self._names

    def name(self, slot: str) -> str:
        """The key that fills it; else the one that stands there empty, or the first that could (the slot's own name
        where ``--column`` gave all of them to other slots)."""
        names = self.kind.slots[slot]
        return self._names.get(slot) or next((name for name in names if name in self.row), names[0] if names else slot)

    def known(self, slot: str) -> str:
        """``name``, as the table of kinds calls it."""
        name = self.name(slot)
        return self.kind.own.get(name, name)

    def value(self, slot: str) -> object:
        """What fills it; else what stands there (empty), or None."""
        return self.row.get(self.name(slot)) if self.kind.slots[slot] else None

    def parts(self, ignore: Collection[str]) -> set[str]:
        """The keys that cannot be ignored: those of slots that nothing else fills."""
        if not ignore:
            return set()
        return {
            name
            for slot, names in self.kind.slots.items()
            for name in names
            if slot not in self._names or name not in ignore
        }


def keys_found(row: JsonObject) -> str:
    """A row's keys for a message."""
    return printable(", ".join(map(str, row)), 200) or "none"


def mark_keys() -> frozenset[str]:
    """Every key that can tell a kind."""
    return frozenset(
        name
        for kind in KINDS.values()
        for group in kind.marks
        for slot in group
        if len(slot) > 1
        for name in kind.slots[slot]
    )


def _wanted(kind: Kind) -> str:
    return " or ".join(" and ".join("/".join(kind.slots[slot]) for slot in group) for group in kind.marks)


def _is_a(kind: Kind) -> str:
    return {
        TEXT: "a text",
        DIALOGUE: "a dialogue",
        PREFERENCE: "a pair of a chosen and a rejected answer",
        TEACHER: f"a teacher's {kind.name}",
    }[kind.use]
