"""Local data of another schema: file, line and field of what a task cannot use. Nothing here needs the extra eval."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.local_data import LocalSets, check_fields
from telechat_twins.core.eval.local_files import read_records
from telechat_twins.core.eval.presets import PRESETS
from telechat_twins.core.eval.schemas import SCHEMAS, check_rows, converted
from telechat_twins.core.eval.task_errors import task_errors
from telechat_twins.core.eval.task_index import OWN_TASKS
from telechat_twins.core.types import JsonObject
from tests.campaigns.presets import ROWS

CASES = {  # a change of a good row, and what is said about it
    "allenai/ai2_arc": ({"choices": {"text": ["a"], "label": "A"}}, "choices: must be an object with text: a list of"),
    "cais/mmlu": ({"answer": "B"}, "answer: must be one of 0, 1, 2, 3, as in cais/mmlu, found 'B'"),
    "allenai/winogrande": ({"answer": 1}, "answer: must be one of '1', '2', as in allenai/winogrande, found 1"),
    "ceval/ceval-exam": ({"answer": "E"}, "answer: must be one of A, B, C, D, as in ceval/ceval-exam, found 'E'"),
    "clue/c3": ({"context": "a"}, "context: must be a list of texts, as in clue/c3, found 'a'"),
    "google/IFEval": ({"kwargs": [1]}, "kwargs: must be a list of objects"),
}


def test_the_published_rows_fit_and_others_name_their_field(tmp_path: Path) -> None:
    assert ROWS.keys() == SCHEMAS.keys()
    for path, row in ROWS.items():
        data, _, name = path.partition("/") if path.startswith("clue/") else (path, "", None)
        check_rows([("f:1", row)], data, name)
        for field in SCHEMAS[path]:
            less = {key: value for key, value in row.items() if key != field}
            with pytest.raises(UserError, match=f"f:2: lacks the field '{field}' of the data set {path}; it has"):
                check_rows([("f:1", row), ("f:2", less)], data, name)
        if path in CASES:
            with pytest.raises(UserError) as caught:
                check_rows([("f:9", row | CASES[path][0])], data, name)
            assert str(caught.value).startswith(f"f:9: {CASES[path][1]}")
    check_rows([("f:1", {})], "unknown", None)  # of other data sets nothing is known
    assert converted({"key": "7", "prompt": "7"}, "google/IFEval", None) == {"key": 7, "prompt": "7"}
    file = tmp_path / "test.jsonl"
    file.write_text('{"a": 1, "b": 2}\n\n{"a": 1}\n')
    with pytest.raises(UserError, match=r"test.jsonl:3: lacks the field 'b', which .*test.jsonl:1 has"):
        check_fields(read_records(file))


class Table(list):  # type: ignore[type-arg]
    """Stand-in of datasets.Dataset."""

    column_names = ["q", "choices", "gold"]


class Task:
    """Steps of lm_eval.api.task.ConfigurableTask, whose frames the harness leaves in a traceback."""

    class config:  # noqa: N801 (an attribute of the harness's task)
        doc_to_target = "{{choices.index(gold)}}"

    def doc_to_target(self, doc: JsonObject) -> int:
        return doc["choices"].index(doc["gold"])

    def doc_to_text(self, doc: JsonObject) -> str:
        return doc["question"]


@pytest.fixture
def sets() -> Iterator[LocalSets]:
    found = LocalSets()
    rows = [{"q": str(n), "choices": ["a", "b"], "gold": "ab"[n % 2]} for n in range(3)]
    rows.append({"q": "3", "choices": ["a", "b"], "gold": "c"})
    found.add(Table(rows), [f"test.jsonl:{number}" for number in range(1, 5)])  # type: ignore[arg-type]
    yield found


def test_an_error_of_a_task_names_the_row(sets: LocalSets) -> None:
    rows = [row for split, _ in sets._splits for row in split]
    with pytest.raises(UserError) as caught, task_errors("mine", None, sets):
        for row in rows:
            Task().doc_to_target(row)
    assert str(caught.value) == (
        "test.jsonl:4: its doc_to_target does not fit the task ('c' is not in list); it has choices = \"['a', 'b']\", "
        "gold = 'c' (task mine)"
    )
    with pytest.raises(UserError) as caught, task_errors("mine", None, sets):
        Task().doc_to_text(rows[1])
    assert str(caught.value).startswith("test.jsonl:2: lacks the field 'question', which the task uses; the row has q,")
    with pytest.raises(ZeroDivisionError), task_errors("mine", None, sets):  # of no row: left as it is
        print(1 // 0)
    with pytest.raises(UserError, match="cannot be read below --data d"), task_errors("mine", Path("d"), sets):
        raise FileNotFoundError("x")


def chid() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chid", OWN_TASKS / "chid.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_blank_of_chid_is_a_question() -> None:
    module, row = chid(), ROWS["clue/chid"]
    found = list(module._questions(row))
    assert [(one["before"], one["after"], one["candidates"][one["gold"]]) for one in found] == [
        ("他做事", "，从不____。", "一心一意"),
        ("他做事____，从不", "。", "三心二意"),
        ("这是", "。", "画蛇添足"),
    ]
    as_rows = [{"text": "", "candidate_id": number} for number in (0, 1, 2)]
    assert list(module._questions(row | {"answers": as_rows})) == found
    few = json.loads('{"candidates": ["x", "y"], "content": "a#idiom#b", "answer": 1}')
    (one,) = module._questions(few)
    assert module.choices(one) == ["xb", "yb"] and (one["before"], one["gold"]) == ("a", 1)


def test_every_preset_task_has_published_scores() -> None:
    for plans in PRESETS.values():
        assert all(plan.published and plan.metric for plan in plans)
