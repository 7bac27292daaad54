"""`tele eval` on lm-evaluation-harness in both backends: three kinds of task on local files, results, and refusals.

The agreement with the harness's own ``hf`` model is tests/campaigns/harness.py's, since that needs transformers.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest

from telechat_twins.convert.adapter import MergedSource
from telechat_twins.convert.copy import to_hf
from telechat_twins.convert.hf.peft import write_peft
from telechat_twins.convert.source import open_model
from telechat_twins.core.checkpoint.adapter import write_adapter
from telechat_twins.core.cli import main
from telechat_twins.core.eval.compare import compare_items
from telechat_twins.core.types import JsonObject
from tests.support.adapters import modules, random_adapter
from tests.support.harness_support import write_llama, write_tasks

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra eval")

GOOD = '{"q": "x%d", "choices": ["a", "b"], "gold": %d}\n'
KINDS = ["made_choices", "made_rolling", "made_answers"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    write_llama(root / "model", num_layers=2)
    write_tasks(root / "tasks", items=8, context=8)
    return root


def tele(place: Path, out: str, *more: str, tasks: tuple[str, ...] = tuple(KINDS), backend: str = "pt") -> int:
    include = ["--include", str(place / "tasks")] if "--include" not in more else []
    model = [] if "--checkpoint" in more else ["--checkpoint", str(place / "model")]
    options = [*model, *include, "--quiet"]
    which = [] if "--backends" in more else ["--backend", backend]
    data = ["--data", str(place / "tasks" / "data")] if "--data" not in more else []
    return main(["eval", *which, *options, *data, "--tasks", *tasks, "--out", str(place / out), *more])


def rows(out: Path) -> list[JsonObject]:
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


def test_both_backends_give_the_same_items(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mindspore")
    assert tele(place, "both", "--backends", "ms", "pt") == 0
    shown, notes = capsys.readouterr()
    assert notes.count("note: compared in fp64, beyond rounding") == 1
    differences = json.loads((place / "both" / "differences.json").read_text())["tasks"]
    assert list(differences) == KINDS and "ms against pt, item by item" in shown
    for name, found in differences.items():
        assert found["items"] == 8 and found["flipped"] == found["different_texts"] == 0
        assert found["largest_difference"] is None or found["largest_difference"] < 1e-9, name
    results = [json.loads((place / "both" / backend / "results.json").read_text()) for backend in ("ms", "pt")]
    for task in KINDS:
        assert results[0]["tasks"][task]["score"] == pytest.approx(results[1]["tasks"][task]["score"], rel=1e-5)
        assert results[0]["tasks"][task]["items"] == 8
    assert results[0]["tasks"]["made_choices"]["shots"] == 2
    assert [found["precision"] for found in results] == ["fp64", "fp64"]


def test_outside_a_repository_nothing_is_said_of_git(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tele(place, "outside", "--limit", "1", tasks=("made_choices",)) == 0
    assert "git" not in capfd.readouterr().err


def test_an_interrupted_evaluation_continues(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tele(place, "once", tasks=("made_choices",)) == 0
    whole = rows(place / "once")
    journal = place / "once" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:10]) + lines[10][:7])
    capsys.readouterr()
    assert tele(place, "once", tasks=("made_choices,made_answers",)) == 0
    assert "note: 9 answers of an earlier run are used again" in capsys.readouterr().err
    found = compare_items(whole, rows(place / "once")[: len(whole)])["made_choices"]
    assert found["flipped"] == 0 and found["largest_difference"] < 1e-5  # of sums in other company
    assert len(journal.read_bytes().splitlines()) > len(lines)
    assert tele(place, "once", "--limit", "2", tasks=("made_choices",)) == 0
    assert (
        "results.json of an earlier run is replaced (scores of made_answers; other --limit)" in capsys.readouterr().err
    )
    assert tele(place, "once", "--precision", "bf16", tasks=("made_choices",)) == 2
    assert "was begun with other options (precision)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_layout_gives_the_same_answers(place: Path) -> None:
    assert tele(place, "alone") == tele(place, "tp2", "--layout", "tp2") == 0
    for name, found in compare_items(rows(place / "alone"), rows(place / "tp2")).items():
        assert found["items"] == 8 and found["flipped"] == found["different_texts"] == 0
        largest = found["largest_difference"]
        assert largest is None or largest < (2e-3 if "rolling" in name else 1e-5)


@pytest.mark.parametrize(
    ("more", "tasks", "message"),
    [
        ((), ("made_choice",), "unknown task 'made_choice'; did you mean 'made_choices'?"),
        (("--data", "nowhere"), ("made_choices",), "--data nowhere: no such folder"),
        (("--include", "nowhere"), ("made_choices",), "--include nowhere: no such folder"),
        (("--system", "s"), ("made_choices",), "add --chat"),
        (("--max-len", "0"), ("made_choices",), "--max-len: must be at least 1, found 0"),
        (
            ("--max-len", "12"),
            ("made_answers",),
            "max_gen_toks: must be 1 to 11, found 12; give a larger --max-len, or",
        ),
        (("--shots", "8"), ("made_choices",), "made_choices: there are fewer rows to give as examples than the task"),
        (("--backends", "pt", "pt"), ("made_choices",), "--backend: give ms or pt"),
        (("--layout", "dp2"), ("made_choices",), "generation has the axes tp, pp and ring only"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more, tasks, message
) -> None:
    if "unknown" in message:  # the harness's own 14,000 tasks take long to index
        from lm_eval.tasks import TaskManager

        own = TaskManager.__init__
        monkeypatch.setattr(TaskManager, "__init__", lambda self, **o: own(self, **{**o, "include_defaults": False}))
    assert tele(place, f"refused-{'-'.join(more)}", *more, tasks=tasks) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_a_misspelt_task_is_told_before_a_missing_out(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    own = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **o: own(self, **{**o, "include_defaults": False}))
    words = ["eval", "--backend", "pt", "--checkpoint", str(place), "--include", str(place / "tasks"), "--tasks"]
    assert main([*words, "made_choice"]) == 2
    assert "unknown task 'made_choice'" in capsys.readouterr().err
    assert main([*words, "made_choices"]) == 2
    assert capsys.readouterr().err == "tele: --out: is missing; give the folder of the results\n"


def test_a_task_file_in_place_of_its_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "tasks" / "choices.yaml"
    assert tele(place, "file", "--include", str(file), tasks=("made_choices",)) == 2
    assert f"--include {file}: is a file; give {place / 'tasks'}, which holds it" in capsys.readouterr().err


def test_packages_that_the_harness_cannot_be_imported_with(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert tele(place, "packages") == 2
    assert "lm_eval: cannot be used here (import of datasets halted" in capsys.readouterr().err


def test_a_task_that_counts_sentences_wants_its_table_first(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("langdetect")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    row = {"key": 1, "prompt": "Go.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    data = tmp_path / "data"
    (data / "google" / "IFEval").mkdir(parents=True)
    (data / "google" / "IFEval" / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert tele(place, "sentences", "--data", str(data), "--max-len", "1400", tasks=("ifeval",)) == 2
    error = capsys.readouterr().err
    assert f"NLTK's table punkt_tab, which is not here; unpack it to {data}/nltk_data/tokenizers/punkt_tab" in error
    assert not (place / "sentences" / "journal.jsonl").exists() or rows_of_journal(place / "sentences") == 0
    (data / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    assert tele(place, "sentences", "--data", str(data), "--max-len", "1400", tasks=("ifeval",)) == 0


def rows_of_journal(out: Path) -> int:
    return len((out / "journal.jsonl").read_text().splitlines()) - 1  # the first says what was evaluated


def test_data_of_another_schema_name_the_field(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, message in (
        (
            "schema",
            '{"question": "x", "choices": ["a", "b"], "gold": 0}\n',
            "test.jsonl:1: lacks the field 'q', which the task",
        ),
        ("json", '{"q": 1}\n{"q"\n', "test.jsonl:2: not valid JSON"),
        ("keys", '{"q": "a"}\n{"q": "b", "gold": 1}\n', "test.jsonl:2: has a field 'gold'; every row must have"),
        ("types", '{"q": "a"}\n{"q": 1}\n', "test.jsonl:2: q: must have one type in all rows, found int here and str"),
        ("range", "".join([GOOD % (n, 7 * (n > 3)) for n in range(5)]), "test.jsonl:5: its process_results does not"),
    ):
        folder = tmp_path / name / "made" / "choices"
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text(text)
        assert tele(place, name, "--data", str(tmp_path / name), tasks=("made_choices",)) == 2
        assert message in capsys.readouterr().err
    assert tele(place, "empty", "--data", str(tmp_path), tasks=("made_choices",)) == 2
    assert "has no split; put <split>.jsonl there" in capsys.readouterr().err


def test_adapters_of_both_forms_are_the_merged_model_in_both_backends(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of ours and a PEFT folder, of other layers and ranks, one after another."""
    pytest.importorskip("mindspore")
    source = open_model(str(place / "model"))
    adapters = [
        random_adapter(source, modules(source.config, targets, rank), rank)
        for targets, rank in ((("q", "v"), 2), (("k", "o", "up", "down"), 3))
    ]
    write_adapter(place / "ours", adapters[0])
    write_peft(adapters[1], place / "peft")
    for name, adapter in zip(("ours", "peft"), adapters, strict=True):
        words = ("--backends", "ms", "pt", "--adapter", str(place / name), "--limit", "3")
        assert tele(place, f"with-{name}", *words, tasks=("made_choices",)) == 0
        to_hf(MergedSource(source, adapter), place / f"merged-{name}")
        merged = ("--checkpoint", str(place / f"merged-{name}"), "--limit", "3")
        assert tele(place, f"of-merged-{name}", *merged, tasks=("made_choices",)) == 0
        found = [rows(place / f"with-{name}" / backend) for backend in ("ms", "pt")]
        for one in found:
            compared = compare_items(one, rows(place / f"of-merged-{name}"))["made_choices"]
            assert compared["items"] == 3 and compared["flipped"] == 0 and compared["largest_difference"] < 2e-5
    apart = compare_items(*(rows(place / f"with-{name}" / "ms") for name in ("ours", "peft")))["made_choices"]
    assert apart["largest_difference"] > 0.1
    capsys.readouterr()
    other = ("--backends", "ms", "pt", "--adapter", str(place / "ours"), "--limit", "3")
    assert tele(place, "with-peft", *other, tasks=("made_choices",)) == 2
    assert "was begun with other options (adapter)" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may be no longer than a part of the journal, then than the results, and at last as long as they are."""
    tasks, limits = ("made_choices", "made_answers"), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert tele(place, "free", tasks=tasks) == 0
    out, most = place / "full", (place / "free" / "journal.jsonl").stat().st_size
    capsys.readouterr()
    for size in (300, 700, 1500, most + 100, limits[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            code = tele(place, "full", tasks=tasks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert (code, len(told)) == ((0, 0) if size == limits[0] else (2, 1)), told
        assert size == limits[0] or "file-size limit was exceeded" in told[0] or "File too large" in told[0]
        assert not [file.name for file in out.glob("*") if file.name.startswith(".tmp") or file.suffix == ".part"]
        assert size < 1000 or len((out / "journal.jsonl").read_bytes().splitlines()) > 3
    assert not any(found["flipped"] for found in compare_items(rows(out), rows(place / "free")).values())


def write_task(file: Path, place: Path, **changes: object) -> None:
    """The task of multiple choice with changes; JSON is YAML."""
    task = json.loads((place / "tasks" / "choices.yaml").read_text()) | changes
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in task.items()))


@pytest.fixture
def own_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own 14,000 tasks take long to index."""
    from lm_eval.tasks import TaskManager

    own = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **o: own(self, **{**o, "include_defaults": False}))


@pytest.mark.usefixtures("own_index")
def test_tags_and_patterns_stand_for_their_tasks(place: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_task(tmp_path / f"{name}.yaml", place, task=f"my_{name}", tag="mine")
    for asked in ("mine", "my_*"):
        words = ("--include", str(tmp_path), "--limit", "1")
        assert tele(place, f"asked-{asked[:3]}", *words, tasks=(asked, "my_two")) == 0
        found = json.loads((place / f"asked-{asked[:3]}" / "results.json").read_text())["tasks"]
        assert list(found) == ["my_one", "my_two"] and found["my_one"]["shots"] == 2


@pytest.mark.usefixtures("own_index")
def test_names_that_two_files_give_are_noted(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_task(tmp_path / f"{name}.yaml", place, task="doubled")
    assert tele(place, "doubled", "--include", str(tmp_path), "--limit", "1", tasks=("doubled",)) == 0
    error = capsys.readouterr().err
    assert error.count("note: ") == 1 and "'doubled' found. Already registered from" in error and "b.yaml" in error


@pytest.mark.usefixtures("own_index")
def test_generation_options_of_another_type_are_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = json.loads((place / "tasks" / "answers.yaml").read_text())
    for changed, message in (
        ({"max_gen_toks": "many"}, "max_gen_toks: must be a whole number, found 'many'"),
        ({"until": [5]}, "until: must be texts, found [5]; correct the task's generation_kwargs"),
    ):
        given = {"until": ["x"], "max_gen_toks": 3, **changed}
        (tmp_path / "mine.yaml").write_text(json.dumps(answers | {"task": "mine", "generation_kwargs": given}))
        assert tele(place, "types", "--include", str(tmp_path), tasks=("mine",)) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


@pytest.mark.usefixtures("own_index")
def test_members_of_groups_and_filters_are_judged_in_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "one.yaml", place, task="my_one")
    answers = json.loads((place / "tasks" / "answers.yaml").read_text())
    chain = [{"function": "regex", "regex_pattern": "(x"}, {"function": "take_first"}]
    broken = answers | {"task": "my_filter", "filter_list": [{"name": "first", "filter": chain}]}
    (tmp_path / "filter.yaml").write_text(json.dumps(broken))
    (tmp_path / "inner.yaml").write_text(json.dumps({"group": "inner", "task": ["my_ones"]}))
    (tmp_path / "outer.yaml").write_text(json.dumps({"group": "outer", "task": ["my_one", "inner"]}))
    for name, message in (
        ("outer", "--tasks: the group 'inner' names an unknown task 'my_ones'; did you mean 'my_one'?"),
        ("my_on?", ""),
        ("your_*", "--tasks: unknown task 'your_*'"),
        ("tasks/one.yaml", "is a file; give its folder, --include tasks, and the task's name in it"),
        (str(tmp_path), f"is a folder; give it as --include {tmp_path}, and the tasks' names in it"),
        ("my_filter", "my_filter: the harness cannot run it (error: missing ), unterminated subpattern at"),
    ):
        words = ("--include", str(tmp_path), "--limit", "1")
        assert tele(place, f"members-{name[:5].replace('/', '')}", *words, tasks=(name,)) == (2 if message else 0)
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


BROKEN = {  # changes of a task file, and what is said about it
    "filter": ({"filter_list": [{"name": "n", "filter": [{"function": "regexx"}]}]}, "Unknown filter 'regexx'"),
    "metric": ({"metric_list": [{"metric": "accuracyy"}]}, "it knows no metric 'accuracyy'"),
    "key": ({"output_typ": "multiple_choice"}, "unexpected keyword argument 'output_typ'"),
    "unsafe": ({"unsafe_code": True}, "executes code that the model writes; in a sandbox, add --run-unsafe-code"),
    "include": ({"include": "gone.yaml"}, "broken.yaml: names the task 'broken', but is not read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_task_files_that_cannot_be_used_are_one_line(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    own = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **o: own(self, **{**o, "include_defaults": False}))
    task = json.loads((place / "tasks" / "choices.yaml").read_text()) | {"task": "broken", **BROKEN[name][0]}
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in task.items())
    (tmp_path / "broken.yaml").write_text(text.replace('"broken"', "broken"))
    assert tele(place, f"broken-{name}", "--include", str(tmp_path), tasks=("broken",)) == 2
    error = capsys.readouterr().err
    assert BROKEN[name][1] in error and "Traceback" not in error


def test_rows_that_do_not_fit_while_a_task_is_built_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made" / "choices"
    folder.mkdir(parents=True)
    for row, message in (
        ('{"q": "x", "choices": ["a", ""], "gold": 0}\n', "test.jsonl:1: its row does not fit the task (string index"),
        ('{"q": "x", "choices": ["a", "b"], "gold": 7}\n', "test.jsonl:1: its row does not fit the task (list index"),
    ):
        (folder / "test.jsonl").write_text(row * 4)
        assert tele(place, "first", "--data", str(tmp_path), tasks=("made_choices",)) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_a_split_by_another_of_its_names_is_noted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made" / "choices"
    folder.mkdir(parents=True)
    (folder / "testing.jsonl").write_text((place / "tasks/data/made/choices/test.jsonl").read_text())
    assert tele(place, "alike", "--data", str(tmp_path), "--limit", "2", tasks=("made_choices",)) == 0
    assert capsys.readouterr().err.count("the split 'testing' is read as 'test'") == 1
