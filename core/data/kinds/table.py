"""Row kinds: by which keys a row is known, which of its keys are read, and which carry nothing to learn.

Every other key with a value is an error, because its content would be lost. A slot is one part of a kind, under each
name that is in use for it; a row fills it once.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, field

from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

# What a row is packed as: a document, a dialogue, a pair of answers, a proposition.
TEXT, DIALOGUE, PREFERENCE, TEACHER = "text", "dialogue", "preference", "teacher"
OPTION = {TEXT: "without --sft", DIALOGUE: "with --sft", PREFERENCE: "with --preference", TEACHER: "with --teacher"}
_PLURALS = {TEXT: "texts", DIALOGUE: "dialogues", PREFERENCE: "such pairs", TEACHER: "them"}


@dataclass(frozen=True)
class Kind:
    """One kind of row. ``slots``: slot -> the keys that fill it; ``marks``: the slots that tell the kind, any group."""

    name: str
    use: str
    slots: dict[str, tuple[str, ...]]
    marks: tuple[tuple[str, ...], ...]
    flags: frozenset[str] = field(default=frozenset())

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """Every key that is read."""
        return self.flags.union(*self.slots.values())

    def marked_by(self, keys: Collection[str]) -> bool:
        """Whether a row with these keys can be of this kind."""
        return any(all(any(key in keys for key in self.slots[slot]) for slot in group) for group in self.marks)


_SETTING = {"system": ("system", "system_prompt"), "tools": ("tools", "functions")}
_HISTORY = {"history": ("history",)}
_PROMPT = ("prompt", "question", "query", "instruction")
_FLAGS = frozenset({"multiturn", "tool"})
_LETTERS = {letter: (letter,) for letter in "ABCDEFGHIJ"}

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("text", TEXT, {"text": ("text",)}, (("text",),)),
        # TeleChat2's own form.
        Kind("dialog", DIALOGUE, {"messages": ("dialog",), **_SETTING}, (("messages",),), _FLAGS),
        Kind("messages", DIALOGUE, {"messages": ("messages",), **_SETTING}, (("messages",),), _FLAGS),
        Kind(
            "sharegpt", DIALOGUE, {"messages": ("conversations", "conversation"), **_SETTING}, (("messages",),), _FLAGS
        ),
        Kind(
            "alpaca",
            DIALOGUE,
            {
                "instruction": ("instruction",),
                "input": ("input", "context"),
                "answer": ("output", "response", "answer"),
                **_HISTORY,
                **_SETTING,
            },
            (("instruction", "answer"), ("input", "answer")),
            _FLAGS,
        ),
        Kind(
            "query",
            DIALOGUE,
            {"question": ("query", "question"), "answer": ("response", "answer", "output"), **_HISTORY, **_SETTING},
            (("question", "answer"),),
        ),
        Kind(
            "completion",
            DIALOGUE,
            {"prompt": ("prompt",), "answer": ("completion", "response", "answer", "output"), **_HISTORY, **_SETTING},
            (("prompt", "answer"),),
        ),
        Kind(
            "preference",
            PREFERENCE,
            {
                "prompt": (*_PROMPT, "messages", "conversations", "conversation"),
                "input": ("input",),
                "chosen": ("chosen", "chosen_response", "response_chosen", "preferred", "preferred_output", "response"),
                "rejected": (
                    "rejected",
                    "rejected_response",
                    "response_rejected",
                    "dispreferred",
                    "non_preferred",
                    "non_preferred_output",
                ),
                **_HISTORY,
                **_SETTING,
            },
            (("chosen", "rejected"), ("prompt", "rejected")),
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

# Keys that say where a row comes from or how it was made, and hold nothing that a model is to learn.
_HARMLESS = """
id idx index _id uid uuid guid row_id example_id sample_id conversation_id conv_id dialog_id prompt_id question_id
message_id thread_id doc_id docid ids __index_level_0__ hash md5 sha sha1 sha256 checksum
source sources src origin data_source dataset dataset_name data_name corpus subset split config file file_name
filename file_path filepath path url uri link repo repo_name domain dump crawl license licence copyright citation
lang language languages language_score lang_score script locale
category categories subcategory topic topics task task_name task_type type_of_task type kind tag tags label_source
difficulty
level grade subject
date time timestamp created created_at created_time create_time updated_at added version revision
meta metadata meta_data stats
score scores quality quality_score rating ratings score_chosen score_rejected chosen_score rejected_score
chosen_rating rejected_rating chosen_model rejected_model margin reward rewards perplexity ppl toxicity
model model_name model_id generator engine author annotator annotators annotator_id user_id worker_id created_by
length len num_tokens token_count n_tokens tokens_count char_count word_count num_turns n_turns turn
parallel_tool_calls redacted openai_moderation
"""
HARMLESS = frozenset(_HARMLESS.split()) | {"Unnamed: 0"}  # as pandas names an index without a name
# The same of a message: who sent it when, not what it says.
_HARMLESS_OF_MESSAGE = """
id _id index timestamp created created_at create_time model turn tokens token_count end_turn language toxic
"""
HARMLESS_OF_MESSAGE = frozenset(_HARMLESS_OF_MESSAGE.split())


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, "", [] or {}."""
    return not value and (value is None or value == "" or value == [] or value == {})


def kind_of(row: JsonObject, where: str, use: str, ignore: Collection[str] = (), forced: str | None = None) -> Kind:
    """The kind of a row among those of ``use``. UserError for a row of no kind, of another use, or of several kinds.

    Keys with a value decide; where none does, empty ones do. ``forced`` names the kind, which the row must then fit.
    """
    given = row.keys() - set(ignore)
    if forced is not None:
        kind = KINDS[forced]
        if not kind.marked_by(given):
            raise UserError(f"{where}: not a row of kind {forced} ({_wanted(kind)}); keys found: {keys_found(row)}")
        return kind
    filled = frozenset(key for key in given if not is_empty(row[key]))
    found = _marked(use, filled) or _marked(use, frozenset(given))
    if len(found) > 1:
        names = ", ".join(kind.name for kind in found)
        raise UserError(
            f"{where}: the row can be of several kinds ({names}) by its keys {keys_found(row)}; say which with "
            "--kind NAME, and leave the others' keys out with --ignore-key"
        )
    if found:
        return found[0]
    refuse_other_use(row, where, use, ignore)
    wanted = "; ".join(f"{kind.name} ({_wanted(kind)})" for kind in USES[use])
    raise UserError(f"{where}: a row of no kind that is read: {wanted}; keys found: {keys_found(row)}")


@functools.lru_cache(maxsize=1024)
def _marked(use: str, keys: frozenset[str]) -> tuple[Kind, ...]:
    """The kinds for ``use`` that a row with these keys can be of; rows of a file mostly have the same keys."""
    return tuple(kind for kind in USES[use] if kind.marked_by(keys))


def refuse_other_use(row: JsonObject, where: str, use: str, ignore: Collection[str] = ()) -> None:
    """UserError that names the option, where a row is of a kind that is not for ``use``."""
    given = row.keys() - set(ignore)
    if other := next((kind for kind in KINDS.values() if kind.use != use and kind.marked_by(given)), None):
        raise UserError(f"{where}: {_is_a(other)}; pack {_PLURALS[other.use]} {OPTION[other.use]}")


class Slots:
    """What fills the slots of a row: its value, and the key that holds it. UserError for a slot under two names."""

    def __init__(self, kind: Kind, row: JsonObject, where: str, ignore: Collection[str] = ()):
        self.kind, self.row, self.where = kind, row, where
        self._names: dict[str, str] = {}
        for slot, names in kind.slots.items():
            if len(names) == 1 and names[0] not in row:
                continue
            given = [name for name in names if name in row and name not in ignore and not is_empty(row[name])]
            if len(given) > 1:
                raise UserError(
                    f"{where}: '{given[0]}' and '{given[1]}' both hold the {slot} of a row of kind {kind.name}; "
                    f"leave one out, e.g. with --ignore-key {given[1]}"
                )
            if given:
                self._names[slot] = given[0]

    def __contains__(self, slot: str) -> bool:
        """Whether the row fills it with something that is not empty."""
        return slot in self._names

    def name(self, slot: str) -> str:
        """The key that fills it; else the one that stands there empty, or the first that could."""
        names = self.kind.slots[slot]
        return self._names.get(slot) or next((name for name in names if name in self.row), names[0])

    def value(self, slot: str) -> object:
        """What fills it; else what stands there (empty), or None."""
        return self.row.get(self.name(slot))

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
