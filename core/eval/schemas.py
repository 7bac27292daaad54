"""Fields of the published data sets that the presets' tasks read, by the data set's path on the Hugging Face hub.

With them a local copy of another schema is refused with file, line and field, before a task turns it into wrong
questions. Fields that no task of the presets reads are left out here, and may be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject


@dataclass(frozen=True)
class Kind:
    """A kind of value. ``item``: of each element of a list; ``fields``: of an object; ``values``: the allowed ones."""

    name: str
    types: tuple[type, ...] = ()
    item: Kind | None = None
    fields: Mapping[str, Kind] | None = None
    values: tuple[object, ...] | None = None

    def fits(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, self.types):
            return False
        if self.values is not None and value not in self.values:
            return False
        if self.fields is not None:
            assert isinstance(value, dict)
            return all(kind.fits(value.get(name)) for name, kind in self.fields.items())
        return self.item is None or (isinstance(value, list) and all(self.item.fits(one) for one in value))


TEXT = Kind("a text", (str,))
NUMBER = Kind("a whole number", (int,))
TEXTS = Kind("a list of texts", (list,), TEXT)
NUMBERS = Kind("a list of whole numbers", (list,), NUMBER)
LETTER = Kind("one of A, B, C, D", (str,), values=("A", "B", "C", "D"))
FOUR = {"A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT}


def _object(**fields: Kind) -> Kind:
    inner = ", ".join(f"{name}: {kind.name}" for name, kind in fields.items())
    return Kind(f"an object with {inner}", (dict,), fields=fields)


def _one_of(*values: object) -> Kind:
    types = tuple({type(value) for value in values})
    return Kind("one of " + ", ".join(repr(value) for value in values), types, values=values)


_TARGETS = _object(choices=TEXTS, labels=NUMBERS)
SCHEMAS: dict[str, Mapping[str, Kind]] = {
    "allenai/ai2_arc": {"question": TEXT, "choices": _object(text=TEXTS, label=TEXTS), "answerKey": TEXT},
    "Rowan/hellaswag": {"ctx_a": TEXT, "ctx_b": TEXT, "activity_label": TEXT, "endings": TEXTS, "label": TEXT},
    "cais/mmlu": {"question": TEXT, "choices": TEXTS, "answer": _one_of(0, 1, 2, 3)},
    "truthfulqa/truthful_qa": {"question": TEXT, "mc1_targets": _TARGETS, "mc2_targets": _TARGETS},
    "allenai/winogrande": {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": _one_of("1", "2")},
    "openai/gsm8k": {"question": TEXT, "answer": TEXT},
    "openai/openai_humaneval": {"task_id": TEXT, "prompt": TEXT, "test": TEXT, "entry_point": TEXT},
    "SaylorTwift/bbh": {"input": TEXT, "target": TEXT},
    "google-research-datasets/mbpp": {"text": TEXT, "code": TEXT, "test_list": TEXTS},
    "google/IFEval": {
        "key": NUMBER,
        "prompt": TEXT,
        "instruction_id_list": TEXTS,
        "kwargs": Kind("a list of objects", (list,), Kind("an object", (dict,))),
    },
    "ceval/ceval-exam": {"question": TEXT, **FOUR, "answer": LETTER},
    "haonan-li/cmmlu": {"Question": TEXT, **FOUR, "Answer": LETTER},
    "clue/c3": {"context": TEXTS, "question": TEXT, "choice": TEXTS, "answer": TEXT},
    "clue/csl": {"abst": TEXT, "keyword": TEXTS, "label": _one_of(0, 1, "0", "1")},
    "clue/chid": {"candidates": TEXTS},
}


def schema_of(path: str, name: str | None) -> Mapping[str, Kind]:
    """Fields of a published data set; none where nothing is known of it."""
    return SCHEMAS.get(f"{path}/{name}", SCHEMAS.get(path, {}))


def check_rows(rows: Sequence[tuple[str, JsonObject]], path: str, name: str | None) -> None:
    """UserError for the first row, a pair of its place and its fields, that lacks a field of the published data set or
    has another kind of value there."""
    known = next((key for key in (f"{path}/{name}", path) if key in SCHEMAS), None)
    if known is None:
        return
    for where, row in rows:
        for field, kind in SCHEMAS[known].items():
            if field not in row:
                has = ", ".join(row)[:120]
                raise UserError(f"{where}: lacks the field '{field}' of the data set {known}; it has {has}")
            if not kind.fits(row[field]):
                found = repr(row[field])[:80]
                raise UserError(f"{where}: {field}: must be {kind.name}, as in {known}, found {found}")


def converted(row: JsonObject, path: str, name: str | None) -> JsonObject:
    """A row of a CSV file, whose values are texts, with the whole numbers of the published data set."""
    numbers = {key for key, kind in schema_of(path, name).items() if kind.types == (int,)}
    return {key: int(v) if key in numbers and str(v).isdecimal() else v for key, v in row.items()}
