"""Published forms of rows that are known and not read, because what they mean must be chosen: with the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject


@dataclass(frozen=True)
class Refused:
    """A form with all ``keys`` (where ``when`` holds of the row), and ``why`` it is refused, with what to do."""

    keys: frozenset[str]
    why: str
    when: Callable[[JsonObject], bool] = lambda row: True


def _verdict(key: str) -> Callable[[JsonObject], bool]:
    return lambda row: isinstance(row[key], bool) or row[key] in (0, 1, "0", "1", "true", "false", "True", "False")


def _ranked(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and "rank" in one for one in value)


_KTO = (
    "says whether one answer is wanted (KTO), which no training here uses: keep the rows that are wanted and give "
    "--ignore-key {0}, or join a wanted and an unwanted answer of one question into a row of chosen and rejected"
)
_RATED = "holds several answers of one question with their ratings; choose, and write the two as chosen and rejected"

_FORMS = (
    *(
        Refused(frozenset({key, answer}), f"'{key}' {_KTO.format(key)}", _verdict(key))
        for key in ("label", "kto_tag")
        for answer in ("completion", "messages", "conversations", "response", "output")
    ),
    Refused(
        frozenset({"message_tree_id", "prompt"}),
        "a tree of messages (OASST), in which a message may have several answers; write the path that is meant, for "
        "example the replies of rank 0, as 'messages'",
        lambda row: isinstance(row["prompt"], dict),
    ),
    Refused(
        frozenset({"message_id", "parent_id", "role", "text"}),
        "one message of a tree (OASST), not a dialogue; join a message and its parents, in order, as 'messages'",
    ),
    Refused(
        frozenset({"chat", "meta_instruction"}),
        "turns with inner thoughts, commands and results (MOSS), which have no place in the chat layout; write "
        "'Human' and 'MOSS' of each turn as 'messages', and the results as messages of the role tool",
        lambda row: isinstance(row["chat"], dict),
    ),
    Refused(
        frozenset({"custom_id", "body"}),
        "a request of a batch, which has a question and no answer; join it by custom_id with the answers' file, as "
        "'messages'",
    ),
    Refused(
        frozenset({"custom_id", "response"}),
        "an answer of a batch, which has no question; join it by custom_id with the requests' file, as 'messages'",
        lambda row: isinstance(row["response"], dict),
    ),
    Refused(frozenset({"instruction", "completions"}), _RATED, lambda row: isinstance(row["completions"], list)),
    Refused(frozenset({"prompt", "responses"}), _RATED, lambda row: isinstance(row["responses"], list)),
    Refused(
        frozenset({"prompt", "answers"}),
        _RATED,
        lambda row: _ranked(row["answers"]),
    ),
    Refused(frozenset({"input_ids"}), "token ids of a tokenizer that the row does not name; give its texts"),
)
# Keys of which every form has one, and few other rows.
_TELLING = {
    "label",
    "kto_tag",
    "message_tree_id",
    "message_id",
    "meta_instruction",
    "custom_id",
    "completions",
    "responses",
    "answers",
}
_TELLING |= {"input_ids"}


def refuse_known(row: JsonObject, given: set[str], where: str) -> None:
    """UserError where the keys ``given`` of a row are those of a form that is not read."""
    if not given & _TELLING:
        return
    for form in _FORMS:
        if form.keys <= given and form.when(row):
            raise UserError(f"{where}: {form.why}")
