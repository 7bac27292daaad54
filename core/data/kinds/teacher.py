"""Propositions of a teacher (eFLM): a text that is true or false; a multiple choice is one true and k - 1 false ones.

FreeLM's teacher signal as causal language modelling, FLM-101B paper section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from telechat_twins.core.data.kinds.fields import found_type, json_list, text
from telechat_twins.core.data.kinds.judged import read_slots
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.table import TEACHER, Slots, is_empty
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

_TRUE = ("true", "yes", "1", "correct", "\u6b63\u786e", "\u5bf9", "\u662f")
_FALSE = ("false", "no", "0", "incorrect", "\u9519\u8bef", "\u9519", "\u5426")
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Proposition:
    """One text and whether it is true."""

    where: str
    text: str
    true: bool


def parse_propositions(row: JsonObject, where: str, reading: Reading) -> list[Proposition]:
    """The propositions of a row. UserError for what is malformed, and for a key that is not read.

    A text with its label is one. A question with choices is one for each choice, in their order: the context, the
    question and the choice, with a newline between them. The answer is a choice's place (a number, from 0), its label
    or letter, or its text.
    """
    slots = read_slots(row, where, TEACHER, reading)
    if slots.kind.name == "proposition":
        return [
            Proposition(where, _filled_text(slots, "text"), _label(slots.value("label"), slots.name("label"), where))
        ]
    choices = _choices(slots)
    right = _answer(slots, choices)
    context = [text(slots.value("context"), slots.name("context"), where)] if "context" in slots else []
    asked = "\n".join([*context, _filled_text(slots, "question")])
    return [Proposition(where, f"{asked}\n{choice}", n == right) for n, (_, choice) in enumerate(choices)]


def _filled_text(slots: Slots, slot: str) -> str:
    if slot not in slots:
        raise UserError(f"{slots.where}: '{slots.name(slot)}' is empty; a proposition needs a text")
    return text(slots.value(slot), slots.name(slot), slots.where)


def _label(value: object, name: str, where: str) -> bool:
    word = str(value).strip().lower() if isinstance(value, bool | int | str) else ""
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise UserError(f"{where}: '{name}' must be true or false (also 1 or 0, yes or no), found {shown(value)}")


def _choices(slots: Slots) -> list[tuple[str, str]]:
    """(label, text) of every choice; labels are letters where the row gives none."""
    where = slots.where
    letters = [letter for letter in _LETTERS if letter in slots]
    if "choices" not in slots:
        return [(letter, text(slots.value(letter), letter, where)) for letter in letters]
    name, value = slots.name("choices"), slots.value("choices")
    if letters:
        raise UserError(f"{where}: '{name}' and '{letters[0]}' both hold choices; leave one out")
    if isinstance(value, dict):
        if set(value) == {"text", "label"}:  # as ARC writes them
            labels = json_list(value["label"], f"{name}.label", where)
            if strange := [label for label in labels if not isinstance(label, str | int)]:
                raise UserError(f"{where}: '{name}.label' must hold texts or numbers, found {shown(strange[0])}")
            texts = json_list(value["text"], f"{name}.text", where)
            if len(texts) != len(labels):
                raise UserError(f"{where}: '{name}' has {len(labels)} labels and {len(texts)} texts; give one of each")
            pairs = list(zip(map(str, labels), texts, strict=True))
        else:
            pairs = [(key, one) for key, one in value.items() if not is_empty(one)]
    else:
        pairs = [_labelled(one, n) for n, one in enumerate(json_list(value, name, where))]
    if len(pairs) < 2:
        raise UserError(f"{where}: '{name}' must hold two choices or more, found {len(pairs)}")
    return [(label, text(one, f"{name}[{n}]", where)) for n, (label, one) in enumerate(pairs)]


def _labelled(one: object, place: int) -> tuple[str, object]:
    if isinstance(one, dict) and set(one) == {"label", "text"}:
        return str(one["label"]), one["text"]
    return _LETTERS[place] if place < len(_LETTERS) else str(place), one


def _answer(slots: Slots, choices: list[tuple[str, str]]) -> int:
    """The place of the right choice; UserError for an answer that names none of them, or two."""
    name, value, where = slots.name("answer"), slots.value("answer"), slots.where
    labels, texts = [label for label, _ in choices], [said for _, said in choices]
    found: set[int] = set()
    gap = "choices" not in slots and labels != list(_LETTERS[: len(labels)])
    if gap and not isinstance(value, bool) and str(value).strip().isdecimal() and value not in texts:
        raise UserError(
            f"{where}: '{name}' is the place {shown(value)} among {', '.join(labels)}, of which a letter before the "
            "last is left out or empty; name the letter"
        )
    if isinstance(value, int) and not isinstance(value, bool):
        found = {value} if 0 <= value < len(choices) else set()
    elif isinstance(value, str):
        word = value.strip()
        found = {n for n, label in enumerate(labels) if label == word}
        numbered = bool(found) and word.isdigit()  # the row's own labels, as in ARC; a number says nothing else then
        if not numbered:
            found |= {n for n, said in enumerate(texts) if said == value}
        if not numbered and word.isascii() and word.isdigit() and int(word) < len(choices):
            found.add(int(word))
    else:
        raise UserError(f"{where}: '{name}' must be a number or text, found {found_type(value)}")
    if len(found) != 1:
        what = "several" if found else "none"
        raise UserError(
            f"{where}: '{name}' is {shown(value)}, which names {what} of the choices; legal: 0 to {len(choices) - 1}, "
            f"{printable(', '.join(labels), 200)}, or the text of one"
        )
    return found.pop()
