"""The journal of answers, the table of results, the comparison of two evaluations, and local data sets."""

from __future__ import annotations

import json
import resource
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.compare import compare_items, is_close, lines
from telechat_twins.core.eval.harness import warned
from telechat_twins.core.eval.journal import Journal, digest_of
from telechat_twins.core.eval.local_files import read_records
from telechat_twins.core.eval.presets import PRESETS, TaskPlan
from telechat_twins.core.eval.results import items, markdown, replaced, summarised, table, write_results
from telechat_twins.core.eval.session import _close, _notes
from telechat_twins.core.types import JsonObject

FOUND: JsonObject = {
    "results": {
        "made": {"alias": "made", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": 0.25, "acc_norm,none": 1.0},
        "made_part": {"alias": " - part", "acc,none": 0.5},
    },
    "n-shot": {"made": 5},
    "samples": {
        "made_part": [
            {
                "doc_id": n,
                "filter": "none",
                "doc_hash": f"h{n}",
                "target": 1,
                "filtered_resps": [(-1.5, False), (-1.0, True)],
                "metrics": ["acc"],
                "acc": 1.0,
            }
            for n in range(2)
        ]
    },
}


def test_a_journal_continues_after_a_torn_line(tmp_path: Path) -> None:
    path, identity = tmp_path / "journal.jsonl", {"weights": "a", "precision": "fp32"}
    key = digest_of("likelihood", (1, 2), (3,))
    assert key != digest_of("likelihood", (1,), (2, 3))
    with Journal(path, identity) as journal:
        journal.put(key, [-1.5, True])
        journal.put("other", "text \ud800 \u4f60")
    with path.open("ab") as file:
        file.write(b'["torn", [-2.')
    with Journal(path, identity) as journal:
        assert journal.found == {key: [-1.5, True], "other": "text \ud800 \u4f60"} and journal.earlier == 2
        journal.put("third", 1.0)
    assert len(path.read_bytes().splitlines()) == 4
    with pytest.raises(UserError, match=r"was begun with other options \(precision\)"):
        Journal(path, {**identity, "precision": "bf16"})
    path.write_text(path.read_text(errors="replace").replace('["third"', "third"))
    with pytest.raises(UserError, match="damaged; remove it"):
        Journal(path, identity)


def test_a_full_disk_leaves_a_journal_that_continues(tmp_path: Path) -> None:
    path, limits = tmp_path / "journal.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    said = r"journal.jsonl: an answer cannot be written \(File too large\); the answers before it are kept"
    with pytest.raises(UserError, match=said), Journal(path, {}) as journal:
        journal.put("first", -1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
        try:
            journal.put("second", -2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Journal(path, {}) as journal:
        assert journal.found["first"] == -1.0 and set(journal.found) <= {"first", "second"}
        journal.put("third", -3.0)
    with Journal(path, {}) as journal:
        assert journal.found["third"] == -3.0


def test_results_are_written_beside_the_published_scores(tmp_path: Path) -> None:
    plan = TaskPlan("made", 5, "acc", {"Tele-FLM": 64.0})
    entry = summarised(plan, FOUND)
    assert (entry["score"], entry["stderr"], entry["shots"], entry["items"]) == (0.5, 0.25, 5, 2)
    assert entry["parts"] == {"made_part": {"acc,none": 0.5}} and "sample_len" not in entry["metrics"]
    assert summarised(TaskPlan("made", metric="acc_norm"), FOUND)["score"] == 1.0
    facts = {"checkpoint": "m", "backend": "pt", "precision": "fp32"}
    write_results(tmp_path, facts, {"made": entry}, list(items(FOUND)))
    text = (tmp_path / "results.md").read_text()
    assert "| task | shots | metric | items | score | ± stderr | Tele-FLM |" in text
    assert "| made | 5 | acc | 2 | 50.00 | 25.00 | 64.0 |" in text
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["made"]["score"] == 0.5
    first = json.loads((tmp_path / "items.jsonl").read_text().splitlines()[0])
    assert first["answers"] == [[-1.5, False], [-1.0, True]] and first["metrics"] == {"acc": 1.0}
    assert "50.00" in table({"made": entry})[1] and "(Tele-FLM 64.0)" in table({"made": entry})[1]


def test_a_group_without_a_score_of_its_own_shows_its_parts() -> None:
    found = {**FOUND, "results": {"made": {"alias": "made"}, "made_part": FOUND["results"]["made"]}}
    entry = summarised(TaskPlan("made"), found)
    assert entry["score"] is None
    shown = table({"made": entry})
    assert shown[1].split() == ["made", "5", "2", "-"]
    assert shown[2].split() == ["-", "made_part", "50.00", "25.00", "acc"]
    assert "| - made_part |  | acc |  | 50.00 | 25.00 |" in markdown({}, {"made": entry})


def row(item: int, *answers: object, task: str = "t") -> JsonObject:
    return {"task": task, "item": item, "filter": "none", "hash": str(item), "answers": list(answers), "metrics": {}}


def test_differences_are_found_item_by_item() -> None:
    left = [row(0, [-1.0, True], [-2.0, False]), row(1, [-1.0, True], [-1.1, False]), row(0, "a", task="g")]
    right = [row(0, [-1.0, True], [-2.5, False]), row(1, [-1.2, False], [-1.1, True]), row(0, "b", task="g")]
    found = compare_items(left, right)
    assert found["t"]["largest_difference"] == pytest.approx(0.5) and found["t"]["likelihoods"] == 4
    (flip,) = found["t"]["flips"]
    assert flip["item"] == 1 and flip["choices"] == [0, 1] and flip["margins"] == pytest.approx([0.1, 0.1])
    assert found["g"]["different_texts"] == 1 and found["g"]["largest_difference"] is None
    shown = "\n".join(lines(("ms", "pt"), found))
    assert "1 choices flipped" in shown and "item 1: choice 0 by 1.00e-01, 1 by 1.00e-01" in shown
    assert "fp64" not in shown and lines(("ms", "pt"), found, "fp32")[-1].startswith("  --precision fp64 (with another")
    assert "fp64" not in "".join(lines(("ms", "pt"), compare_items(left, left), "fp32"))
    assert found["t"]["beyond_rounding"] == 1 and not flip["by_rounding"]
    assert compare_items(left, left)["t"]["flipped"] == 0
    near = compare_items([row(0, [-50.0, True], [-50.00004, False])], [row(0, [-50.00004, True], [-50.0, False])])["t"]
    assert (near["flipped"], near["beyond_rounding"]) == (1, 0)  # 8e-5 of four times 5e-5
    # A rolling likelihood is a number of its own.
    assert compare_items([row(0, -5.0)], [row(0, -5.25)])["t"]["largest_difference"] == 0.25
    with pytest.raises(UserError, match="different items, e.g. t item 1"):
        compare_items(left, [right[0], right[2]])


def test_choices_that_float32_could_turn_over_are_counted() -> None:
    for values, close in (
        ((-3.0, -1.0, -1.000015), True),
        ((-3.0, -1.0, -1.00003), False),
        ((-80.0, -80.0001, -90.0), True),
        ((-80.0, -80.0002, -90.0), False),
        ((-1.0, -1.0, -3.0), False),  # the same text twice
        ((-1.0,), False),
    ):
        assert is_close([[value, False] for value in values]) is close
    assert not is_close(["a text", "another"])
    near, far = ([[-1.0, True], [-1.000015, False]], [[-1.0, True], [-2.0, False]])
    answered = [row(0, *near), row(0, *near), row(1, *far), row(0, *near, task="other")]  # twice: by two filters
    assert (_close(answered, "fp32"), _close(answered, "fp64")) == (2, 0)
    (note,) = _notes({"cut": 0, "crossed": 0, "close": 2}, 64)
    assert note.startswith("in 2 items two choices are closer than fp32 rounds; --precision fp64 (with another --out)")


def test_local_rows_are_read_and_refused_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"date": "2024-01-02", "n": "12"}\n\n{"date": "x", "n": "true"}\n')
    assert [row for _, row in read_records(file)] == [{"date": "2024-01-02", "n": "12"}, {"date": "x", "n": "true"}]
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}]')
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    assert [row for _, row in read_records(tmp_path / "a.json")] == [{"a": 1}, {"a": 2}]
    assert read_records(tmp_path / "a.csv") == [(f"{tmp_path}/a.csv:2", {"a": "1", "b": "2"})]
    for text, message in (
        ('{"a": 1}\n{a}\n', ":2: not valid JSON"),
        ("[1]\n", ":1: item 1: expected a JSON object, found int"),
        ("", "has no row"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_records(file)


def test_presets_have_the_published_shots_and_scores() -> None:
    open_llm = {plan.name: plan for plan in PRESETS["open-llm"]}
    assert (open_llm["arc_challenge"].shots, open_llm["arc_challenge"].metric) == (25, "acc_norm")
    assert (open_llm["bbh"].shots, open_llm["gsm8k"].shots, open_llm["truthfulqa_mc2"].shots) == (3, 5, 0)
    average = sum(plan.published["Tele-FLM"] for plan in open_llm.values()) / len(open_llm)
    assert round(average, 2) == 56.60  # the average that the table prints
    average = sum(plan.published["Tele-FLM"] for plan in PRESETS["teleflm-zh"]) / 5
    assert round(average, 2) == 71.13


def test_results_that_a_run_replaces_are_named(tmp_path: Path) -> None:
    """Of other tasks, options or shots; nothing is said where the same command goes on."""
    plan = TaskPlan("made", 5, "acc_norm", {"Tele": 80.0})
    facts: JsonObject = {"chat": False, "multiturn": False, "system": None, "limit": None}
    assert replaced(tmp_path, facts, [plan]) == ""
    write_results(tmp_path, facts, {"made": summarised(plan, FOUND)}, [])
    assert replaced(tmp_path, facts, [plan]) == replaced(tmp_path, facts, [replace(plan, shots=None)]) == ""
    other = replace(plan, name="other")
    assert replaced(tmp_path, facts, [plan, other]) == ""
    assert replaced(tmp_path, facts, [other]) == "scores of made"
    assert replaced(tmp_path, {**facts, "limit": 5, "system": "s"}, [other]) == (
        "scores of made; other --system, --limit"
    )
    assert replaced(tmp_path, facts, [replace(plan, shots=0)]) == "other --shots"
    for damaged in ("[]", "{", '{"tasks": 3}'):
        (tmp_path / "results.json").write_text(damaged)
        assert replaced(tmp_path, facts, [plan]) == ""


def test_what_numpy_says_of_the_harness_is_one_note_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    """Two lines of its code divide by the length of a choice; other warnings go their way."""
    with pytest.warns(UserWarning, match="mine"), warned("made"):
        for line, kind in ((1, "divide by zero"), (2, "divide by zero"), (3, "invalid value"), (3, "overflow")):
            said = f"{kind} encountered in {'exp' if kind == 'overflow' else 'divide'}"
            warnings.warn_explicit(said, RuntimeWarning, "/x/lm_eval/api/task.py", line)
        warnings.warn("mine", UserWarning, stacklevel=1)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("note: made: divide by zero encountered in divide; a choice or text of an item holds no")
    assert "invalid value encountered in divide; a choice" in second
    assert third == "note: made: overflow encountered in exp"
