"""`tele eval answers` in both backends: the rows that AlignBench's judge.py and FastChat's llm_judge read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from telechat_twins.core.cli import main
from telechat_twins.core.data.chat_layout import BuiltInLayout
from telechat_twins.core.data.chat_template import encode_chat
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.answers.formats import FORMATS, read_questions
from telechat_twins.core.eval.answers.run import Asking, answer_all
from telechat_twins.core.eval.journal import Journal
from telechat_twins.core.eval.scorer import Scorer
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.types import JsonObject
from tests.support.data_support import tiny_tokenizer
from tests.support.docs_workspace import add_release

MT = [
    {"question_id": 81, "category": "writing", "turns": ["Write about the sea.", "Now shorter."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Twice that?"], "reference": ["2", "4"]},
]
ALIGN = [
    {"question_id": 7, "category": "数学计算", "subcategory": "初等数学", "question": "一加一？", "reference": "二"},
    {"question_id": 9, "category": "文本写作", "subcategory": "诗歌", "question": "写诗", "reference": "", "more": [1]},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    add_release(folder)
    for name, rows in (("mt-bench", MT), ("alignbench", ALIGN), ("prompts", [{"prompt": "The quick"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tele(place: Path, form: str, out: Path, *more: str, backend: str = "pt", new: int = 6) -> int:
    given = ["--checkpoint", str(place / "TeleChat2-7B"), "--format", form, "--out", str(out), "--quiet"]
    questions = [] if "--questions" in more else ["--questions", str(place / f"{form}.jsonl")]
    return main(["eval", "answers", "--backend", backend, *given, *questions, "--max-new-tokens", str(new), *more])


def rows(path: Path) -> list[JsonObject]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_backends_write_the_rows_that_judges_read(place: Path, tmp_path: Path) -> None:
    for framework in ("mindspore", "torch"):
        pytest.importorskip(framework)
    found: dict[tuple[str, str], list[JsonObject]] = {}
    for backend in ("ms", "pt"):
        for form in FORMATS:
            out = tmp_path / backend / form / "made.jsonl"
            assert tele(place, form, out, "--temperature", "0", backend=backend) == 0
            found[form, backend] = rows(out)
            assert [file.name for file in out.parent.glob("*.jsonl")] == ["made.jsonl"]  # no other file is an answer's
    for row, question in zip(found["alignbench", "pt"], ALIGN, strict=True):
        made = {"model_id": "made", "answer_id": f"{question['question_id']}_made", "answer": row["answer"]}
        assert row == question | made and isinstance(row["answer"], str)
    for row, given in zip(found["mt-bench", "pt"], MT, strict=True):
        assert row["question_id"] == given["question_id"] and row["model_id"] == "made"
        (choice,) = row["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2 and all(isinstance(t, str) for t in choice["turns"])
    assert found["prompts", "pt"][0]["prompt"] == "The quick" and found["prompts", "pt"][0]["text"]
    for form in FORMATS:
        left, right = ([row | {"tstamp": 0} for row in found[form, backend]] for backend in ("ms", "pt"))
        assert left == right


class Echo(Scorer):
    """Scorer whose answers name their request; it ends after ``count`` of them."""

    def __init__(self, count: int = 1000) -> None:
        self.adapter, self.count, self.asked = 0, count, list[Request]()

    def generate(self, requests: Sequence[Request], on_done=None) -> list[str]:  # type: ignore[no-untyped-def]
        for place, request in enumerate(requests):
            self.asked.append(request)
            if len(self.asked) > self.count:
                raise KeyboardInterrupt
            on_done(place, f" answer {len(request.prompt_ids)} {request.sampling.seed} ")
        return []


def test_turns_temperatures_and_choices(place: Path, tmp_path: Path) -> None:
    tokenizer, form = tiny_tokenizer(), FORMATS["mt-bench"]
    questions = read_questions(place / "mt-bench.jsonl", form)
    asking = Asking(form, tokenizer, BuiltInLayout(tokenizer), 256, frozenset(), 5, choices=2, seed=3)
    whole = Echo()
    with Journal(tmp_path / "whole", {}) as journal:
        made = answer_all(questions, asking, whole, journal, lambda: None)
    assert [request.sampling.temperature for request in whole.asked] == [0.7, 0.7, 0.0, 0.0] * 2
    assert [request.sampling.seed for request in whole.asked] == [3, 4, 0, 0] * 2
    first = made[0][1][0]
    assert first == first.strip() and first.endswith(" 4")
    messages = [("user", MT[0]["turns"][0]), ("assistant", first), ("user", MT[0]["turns"][1])]
    expected = encode_chat(tokenizer, [{"role": role, "content": text} for role, text in messages])
    assert list(whole.asked[5].prompt_ids) == expected
    # An interrupted run goes on with what it lacks, to the same answers.
    for count in (1, 3):
        with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "torn", {}) as journal:
            answer_all(questions, asking, Echo(count), journal, lambda: None)
    rest = Echo()
    with Journal(tmp_path / "torn", {}) as journal:
        assert answer_all(questions, asking, rest, journal, lambda: None) == made
    assert len(rest.asked) == len(whole.asked) - 4


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("mt-bench", '{"question_id": 1, "category": "a"}', ":1: turns: must be a list of texts, found no such field"),
        (
            "mt-bench",
            '{"question_id": "x", "category": "a", "turns": ["b"]}',
            ":1: question_id: must be a whole number",
        ),
        ("alignbench", '{"category": "a"}', ":1: subcategory: must be text in the format of alignbench, found no such"),
        ("prompts", '{"prompt": "a"}\n{"text": "b"}', ":2: prompt: must be text"),
        ("prompts", '{"prompt": "a"}\nb', ":2: must be a JSON object a line"),
        ("prompts", "\n", "must hold a question, found none"),
    ],
)
def test_questions_of_another_format_name_file_line_and_field(
    tmp_path: Path, form: str, text: str, message: str
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_questions(file, FORMATS[form])
    assert str(caught.value).startswith(str(file)) and message in str(caught.value)


def test_options_that_do_not_fit_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form, more, message in (
        ("alignbench", ("--choices", "2"), "holds one answer a question"),
        ("prompts", ("--system", "s"), "--system: belongs to chats"),
        ("mt-bench", ("--max-len", "4"), "give --max-len, or shorten the question"),
        ("mt-bench", ("--questions", "nowhere"), "give the benchmark's file of questions"),
    ):
        assert tele(place, form, tmp_path / "x.jsonl", *more) == 2
        assert message in capsys.readouterr().err
