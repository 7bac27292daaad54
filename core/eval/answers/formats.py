"""Formats of question files and of answer files: AlignBench, MT-bench, and plain prompts.

AlignBench (Liu et al., arXiv 2311.18743; its get_answers.py and judge.py): one question a row, answered in the chat
template at a temperature of its category; the answer file repeats the question's row, with ``model_id``, ``answer_id``
and ``answer``. MT-bench (Zheng et al., arXiv 2306.05685; FastChat's llm_judge): two turns a row, the second asked after
the model's answer to the first; the answer file has ``choices``, each with an answer a turn. Plain prompts are
continued, not answered: rows ``{"prompt": ...}``, or a prompt a line of a text file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE, lines, open_regular, parse_json
from telechat_twins.core.types import JsonObject

DRAWN = 0.7  # temperature of a category that neither repository lists


@dataclass(frozen=True)
class Question:
    """A row of a question file. ``turns``: the user's texts, in order; ``where``: file and line."""

    where: str
    row: JsonObject
    turns: tuple[str, ...]
    category: str = ""


@dataclass(frozen=True)
class AnswerFormat:
    """A benchmark's questions and answers.

    ``texts``: fields that a row must have, with text in them; ``temperatures`` by category; ``max_new``: tokens of an
    answer; ``chat``: asked in the chat template; ``several``: an answer file may hold several choices a question.
    ``answered(question, model_id, choices)``: the row of the answer file, choices having a text for each turn.
    """

    name: str
    texts: tuple[str, ...]
    answered: Callable[[Question, str, Sequence[Sequence[str]]], JsonObject]
    temperatures: Mapping[str, float] = field(default_factory=dict)
    max_new: int = 1024
    chat: bool = True
    several: bool = False

    def temperature(self, question: Question) -> float:
        return self.temperatures.get(question.category, DRAWN) if self.chat else 0.0


def _align(question: Question, model_id: str, choices: Sequence[Sequence[str]]) -> JsonObject:
    number = question.row["question_id"]
    return {**question.row, "model_id": model_id, "answer_id": f"{number}_{model_id}", "answer": choices[0][0]}


def _mt(question: Question, model_id: str, choices: Sequence[Sequence[str]]) -> JsonObject:
    number = question.row["question_id"]
    return {
        "question_id": number,
        "answer_id": f"{number}_{model_id}",  # FastChat draws a random one; its judges do not read it
        "model_id": model_id,
        "choices": [{"index": index, "turns": list(turns)} for index, turns in enumerate(choices)],
        "tstamp": time.time(),
    }


def _plain(question: Question, model_id: str, choices: Sequence[Sequence[str]]) -> JsonObject:
    return {**question.row, "model_id": model_id, "text": choices[0][0]}


FORMATS: dict[str, AnswerFormat] = {
    "alignbench": AnswerFormat(
        "alignbench",
        ("category", "subcategory", "question", "reference"),
        _align,
        {
            "数学计算": 0.1,
            "逻辑推理": 0.1,
            "角色扮演": 0.7,
            "文本写作": 0.7,
            "专业能力": 0.1,
            "中文理解": 0.1,
            "综合问答": 0.7,
            "基本任务": 0.1,
        },
    ),
    "mt-bench": AnswerFormat(
        "mt-bench",
        ("category",),
        _mt,
        {
            "writing": 0.7,
            "roleplay": 0.7,
            "extraction": 0.0,
            "math": 0.0,
            "coding": 0.0,
            "reasoning": 0.0,
            "stem": 0.1,
            "humanities": 0.1,
        },
        several=True,
    ),
    "prompts": AnswerFormat("prompts", ("prompt",), _plain, max_new=128, chat=False),
}


def read_questions(path: Path, form: AnswerFormat, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a file. UserError names file, line and field of what does not fit the format."""
    found: list[Question] = []
    numbers: set[object] = set()
    with open_regular(path, "no such file; give the benchmark's file of questions") as file:
        for number, line in enumerate(lines(file, path, MAX_LINE), 1):
            if not line.strip() or (limit is not None and len(found) == limit):
                continue
            where = f"{path}:{number}"
            question = _question(_row(line, where, path, form), where, form)
            key = question.row.get("question_id", number)
            if key in numbers:
                raise UserError(f"{where}: question_id: must be unlike those before, found {key} again")
            numbers.add(key)
            found.append(question)
    if not found:
        raise UserError(f"{path}: must hold a question, found none; give the benchmark's file of questions")
    return found


def _row(line: bytes, where: str, path: Path, form: AnswerFormat) -> JsonObject:
    try:
        if path.suffix == ".txt" and form.name == "prompts":
            return {"prompt": line.decode("utf-8").rstrip("\r\n")}
        return parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: must be a JSON object a line, found something else ({error})") from None


def _question(row: JsonObject, where: str, form: AnswerFormat) -> Question:
    for name in form.texts:
        value = row.get(name)
        if not isinstance(value, str) or not (value or name == "reference"):
            raise UserError(f"{where}: {name}: must be text in the format of {form.name}, found {_shown(row, name)}")
    if form.name == "prompts":
        return Question(where, row, (row["prompt"],))
    if type(row.get("question_id")) is not int:
        raise UserError(f"{where}: question_id: must be a whole number, found {_shown(row, 'question_id')}")
    turns = row.get("turns") if form.name == "mt-bench" else [row["question"]]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise UserError(f"{where}: turns: must be a list of texts, found {_shown(row, 'turns')}")
    return Question(where, row, tuple(turns), row["category"])


def _shown(row: JsonObject, name: str) -> str:
    return repr(row[name])[:80] if name in row else "no such field"
