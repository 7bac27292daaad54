"""Answers to a file of questions: turn after turn on an engine, each answer kept as soon as it is known.

All questions are asked together, a turn at a time: the second turns follow when every first one is answered. An
answer is a function of the model, the question, the options and the number of its choice, so a continued run ends with
the answers of an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.data.chat_layout import ChatLayout
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.answers.formats import AnswerFormat, Question
from telechat_twins.core.eval.journal import Journal, digest_of
from telechat_twins.core.eval.scorer import Scorer
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.inference.sampling import SamplingConfig
from telechat_twins.core.types import JsonObject


@dataclass(frozen=True)
class Asking:
    """How questions are asked. ``layout``: of chats, None for plain prompts; ``bos``: token before every prompt, if
    any; ``max_len``: tokens of prompt and answer together; ``choices``: answers drawn for a question, the n-th with
    seed ``seed`` + n; ``temperature`` None: the format's of each category."""

    form: AnswerFormat
    tokenizer: Tokenizer
    layout: ChatLayout | None
    max_len: int
    stop_ids: frozenset[int]
    max_new: int
    bos: int | None = None
    choices: int = 1
    seed: int = 0
    temperature: float | None = None
    system: str | None = None

    def sampling(self, question: Question, choice: int) -> SamplingConfig:
        given = self.form.temperature(question) if self.temperature is None else self.temperature
        return SamplingConfig(temperature=given, seed=self.seed + choice if given else 0)

    def prompt(self, question: Question, answers: Sequence[str]) -> list[int]:
        """Ids of a question's next turn, after the ``answers`` to those before it."""
        turns = question.turns[: len(answers) + 1]
        if self.layout is None:
            ids = self.tokenizer.encode(turns[0])
        else:
            messages: list[JsonObject] = [] if self.system is None else [{"role": "system", "content": self.system}]
            for turn, answer in zip(turns, [*answers, None], strict=True):
                messages.append({"role": "user", "content": turn})
                messages += [] if answer is None else [{"role": "assistant", "content": answer}]
            ids = self.layout.encode(messages)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def request(self, question: Question, answers: Sequence[str], choice: int, adapter: int) -> Request:
        """UserError for a question that leaves no room for an answer."""
        ids = self.prompt(question, answers)
        room = self.max_len - len(ids)
        if room < 1 or not ids:
            raise UserError(
                f"{question.where}: turn {len(answers) + 1} has {len(ids)} tokens with what precedes it, and must have "
                f"1 to {self.max_len - 1}; give --max-len, or shorten the question"
            )
        return Request(
            prompt_ids=tuple(ids),
            max_new_tokens=min(self.max_new, room),
            sampling=self.sampling(question, choice),
            stop_ids=self.stop_ids,
            text="continuation" if self.layout is None else "answer",
            adapter=adapter,
        )


def answer_all(
    questions: Sequence[Question], asking: Asking, scorer: Scorer, journal: Journal, on_done: Callable[[], object]
) -> list[list[list[str]]]:
    """By question and choice, the texts of the turns. ``on_done`` is called once for each text."""
    made: list[list[list[str]]] = [[[] for _ in range(asking.choices)] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [
            (place, choice)
            for place, question in enumerate(questions)
            for choice in range(asking.choices)
            if turn < len(question.turns)
        ]
        requests = [
            asking.request(questions[place], made[place][choice], choice, scorer.adapter) for place, choice in asked
        ]
        keys = [
            digest_of("answer", request.prompt_ids, request.max_new_tokens, vars(request.sampling), choice)
            for request, (_, choice) in zip(requests, asked, strict=True)
        ]
        missing = [number for number, key in enumerate(keys) if key not in journal.found]

        def done(number: int, text: str, keys: Sequence[str] = keys, missing: Sequence[int] = missing) -> None:
            journal.put(keys[missing[number]], text)
            on_done()

        for _ in range(len(keys) - len(missing)):
            on_done()
        scorer.generate([requests[number] for number in missing], done)
        for key, (place, choice) in zip(keys, asked, strict=True):
            text = str(journal.found[key])
            made[place][choice].append(text if asking.layout is None else text.strip())
    return made


def write_answers(
    path: Path,
    questions: Sequence[Question],
    made: Sequence[Sequence[Sequence[str]]],
    form: AnswerFormat,
    model_id: str,
) -> None:
    """Write the answer file: a row a question, in their order."""
    rows = [form.answered(question, model_id, texts) for question, texts in zip(questions, made, strict=True)]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
