"""Evaluation of propositions on a runner without a model: passes, odds, and the figures made of them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core.commands.eval.teacher import table
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.teacher import Proposition
from telechat_twins.core.data.packing.teacher import ClassTokens
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference import teacher
from telechat_twins.core.inference.teacher import TeacherRow, class_odds, pages_needed, read_teacher_rows
from tests.support.data_support import tiny_tokenizer, write_rows
from tests.support.engine_support import CONFIG, PlainRunner, fake_logits

TOKENS = ClassTokens(7, 9, "<true>", "<false>")


def odds_of(ids: tuple[int, ...]) -> float:
    logits = fake_logits(ids, CONFIG.vocab_size).astype(np.float64)
    return float(logits[7] - logits[9])


@pytest.mark.parametrize("limits", [(512, 64), (20, 3), (4, 2)])
def test_odds_do_not_depend_on_the_passes(limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "STEP_TOKENS", limits[0])
    monkeypatch.setattr(teacher, "MAX_RUNNING", limits[1])
    rng = random.Random(3)
    # Single tokens between others, and texts that are longer than a pass.
    sequences = [
        tuple(rng.choices(range(CONFIG.vocab_size), k=count)) for count in (5, 1, 9, 20, 21, 1, 4, 8, 41, 3, 1)
    ]
    runner = PlainRunner(num_pages=pages_needed(sequences) * 4)  # pages of 4 tokens, counted as of 16
    done: list[int] = []
    found = class_odds(runner, sequences, TOKENS, on_done=done.append)
    np.testing.assert_array_equal(found, [odds_of(ids) for ids in sequences])
    assert sum(done) == len(sequences) and max(map(sum, runner.sizes)) <= limits[0]
    assert found.dtype == np.float64


def test_logits_that_are_not_finite_are_refused() -> None:
    runner = PlainRunner(logits=lambda ids, size: np.full(size, np.nan, np.float32))
    with pytest.raises(UserError, match="not finite"):
        class_odds(runner, [(1, 2)], TOKENS)


def row(*true: bool, where: str = "f:1") -> TeacherRow:
    return TeacherRow(tuple(Proposition(where, "a", one) for one in true), tuple((1,) for _ in true))


def test_figures_by_hand() -> None:
    rows = [row(True), row(False), row(False), row(False, True, False), row(True, False)]
    log = math.log
    odds = np.array([log(3), log(17 / 3), -log(19), log(65 / 35), log(17 / 3), -log(17 / 3), log(3), log(3)])
    report = teacher.teacher_report(rows, odds)
    single, choices, every = report["propositions"], report["choices"], report["all"]
    assert (single["rows"], single["accuracy"]) == (3, 2 / 3)
    assert single["log_loss"] == pytest.approx(-(log(0.75) + log(0.15) + log(0.95)) / 3)
    # The second multiple choice is a tie, which is wrong.
    assert (choices["rows"], choices["accuracy"], choices["chance"]) == (2, 0.5, pytest.approx((1 / 3 + 1 / 2) / 2))
    assert choices["log_loss"] == pytest.approx(-(log(0.35) + log(0.85) + log(0.85) + log(0.75) + log(0.25)) / 5)
    assert (every["rows"], every["true"], every["accuracy"]) == (8, 3, 5 / 8)
    bins = [(one["rows"], one["p_true"], one["share_true"]) for one in every["calibration"]]
    approx = pytest.approx
    assert bins[0] == (1, approx(0.05), 0.0) and bins[6] == (1, approx(0.65), 0.0) and bins[9] == (0, None, None)
    assert bins[7] == (3, approx(0.75), approx(2 / 3)) and sum(rows for rows, _, _ in bins) == 8
    judged = report["rows"]
    assert [one["right"] for one in judged] == [True, False, True, True, False]
    assert judged[3]["p_true"] == approx([0.65, 0.85, 0.15]) and (judged[3]["chosen"], judged[3]["answer"]) == (1, 1)
    json.dumps(report, allow_nan=False)
    assert "multiple choices           2    0.5000" in "\n".join(table(report))


def test_sure_odds_neither_overflow_nor_tie() -> None:
    odds = np.array([900.0, 1000.0, -1000.0])
    with np.errstate(all="raise", under="ignore"):
        report = teacher.teacher_report([row(False, True, False)], odds)
    (judged,) = report["rows"]
    assert judged["p_true"] == [1.0, 1.0, 0.0] and judged["right"]
    assert report["choices"]["log_loss"] == pytest.approx(300.0) and report["propositions"]["accuracy"] is None


def test_rows_are_those_of_tele_data(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"statement": "a fox", "label": 1}, {"question": "q", "A": "x", "B": "y", "answer": "B"}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    first, second = read_teacher_rows([source], tokenizer, Reading())
    assert first.ids == (tuple(tokenizer.encode("a fox")),) and not first.is_choice
    assert second.ids == tuple(tuple(tokenizer.encode(f"q\n{one}")) for one in "xy") and second.answer == 1
    with pytest.raises(UserError, match="found no row"):
        read_teacher_rows([], tokenizer, Reading())
