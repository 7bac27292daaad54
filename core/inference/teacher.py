"""P(true) of a teacher's propositions, and the accuracy, log loss and calibration that follow from it.

eFLM (FLM-101B paper, arXiv 2309.03852, section 2.2) ends a proposition with one of two class tokens. P(true) is the
softmax over the logits of these two tokens after the last token of the text, so it depends on their difference alone:

    odds = logit(true token) - logit(false token)        P(true) = 1 / (1 + exp(-odds))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_twins.core.data.forms.streams import UTF8
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.teacher import Proposition, parse_propositions
from telechat_twins.core.data.packing.teacher import ClassTokens, text_ids
from telechat_twins.core.data.rows import read_rows
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import MAX_RUNNING, STEP_TOKENS
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.runner import Runner, Step
from telechat_twins.core.types import JsonObject

BINS = 10  # of the calibration, equally wide
Ids = Sequence[int]


@dataclass(frozen=True)
class TeacherRow:
    """A proposition, or the choices of a multiple choice as propositions of which one is true; ``ids`` of each text."""

    propositions: tuple[Proposition, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def is_choice(self) -> bool:
        return len(self.propositions) > 1

    @property
    def answer(self) -> int:
        """The place of the true choice."""
        return next(n for n, proposition in enumerate(self.propositions) if proposition.true)


def read_teacher_rows(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    reading: Reading,
    encoding: str = UTF8,
    on_bytes: Callable[[int], object] | None = None,
) -> list[TeacherRow]:
    """The rows of ``files``, with the ids that ``tele data --teacher`` packs. UserError for what it refuses, for a text
    without a token, and when there is no row."""
    rows = []
    for file in files:
        for where, row in read_rows(file, on_bytes, encoding):
            propositions = parse_propositions(row, where, reading)
            ids = tuple(tuple(text_ids(proposition, tokenizer)) for proposition in propositions)
            if not all(ids):
                raise UserError(f"{where}: a proposition's text has no tokens; give it a text")
            rows.append(TeacherRow(tuple(propositions), ids))
    if not rows:
        raise UserError("FILES: must hold propositions or multiple choices, found no row")
    return rows


def pages_needed(sequences: Sequence[Ids]) -> int:
    """Pages that ``class_odds`` needs for the largest of its batches, the blank page included."""
    return 1 + max(sum(pool_size(len(sequences[n])) - 1 for n in batch) for batch in _batches(sequences))


def class_odds(
    runner: Runner,
    sequences: Sequence[Ids],
    tokens: ClassTokens,
    adapter: int = 0,
    on_done: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Logit of the true class token minus that of the false one after each sequence, float64 [N].

    Sequences are computed together, up to STEP_TOKENS tokens in a pass, and logits at their last tokens only.
    ``adapter``: its number in the runner, 0 for none. ``on_done(n)``: n more sequences are computed. UserError for
    logits that are not finite.
    """
    odds = np.zeros(len(sequences))
    for batch in _batches(sequences):
        logits = _last_logits(runner, [sequences[n] for n in batch], adapter)
        pair = logits[:, [tokens.true, tokens.false]].astype(np.float64)
        if not np.isfinite(pair).all():
            raise UserError("the logits of a class token are not finite; check the weights, or use --precision fp32")
        odds[batch] = pair[:, 0] - pair[:, 1]
        if on_done is not None:
            on_done(len(batch))
    return odds


def _batches(sequences: Sequence[Ids]) -> Iterator[list[int]]:
    """Places of sequences that share a pass; one longer than a pass is alone. Single tokens first, as Step asks."""
    batch: list[int] = []
    used = 0
    for n, ids in enumerate(sequences):
        if batch and (used + len(ids) > STEP_TOKENS or len(batch) == MAX_RUNNING):
            yield sorted(batch, key=lambda place: len(sequences[place]) > 1)
            batch, used = [], 0
        batch.append(n)
        used += len(ids)
    if batch:
        yield sorted(batch, key=lambda place: len(sequences[place]) > 1)


def _last_logits(runner: Runner, sequences: Sequence[Ids], adapter: int) -> np.ndarray:
    """Logits after the last token of each sequence, [R, V], in one pass, or in several for a single long sequence."""
    size = runner.page_size
    counts = [-(-len(ids) // size) for ids in sequences]
    tables = np.zeros((len(sequences), max(counts)), np.int32)
    page = 1  # page 0 stays blank
    for row, count in enumerate(counts):
        tables[row, :count] = np.arange(page, page + count)
        page += count
    for first in range(0, max(map(len, sequences)), STEP_TOKENS):
        logits = runner.run(_step(sequences, tables, first, size, adapter))
    return logits[: len(sequences)]


def _step(sequences: Sequence[Ids], tables: np.ndarray, first: int, size: int, adapter: int) -> Step:
    """The pass over the tokens [first, first + STEP_TOKENS) of each sequence; wanted is the last of each."""
    parts = [np.asarray(ids[first : first + STEP_TOKENS], np.int32) for ids in sequences]
    counts = np.array([len(part) for part in parts])
    starts = np.zeros(len(parts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    owner = np.repeat(np.arange(len(parts)), counts)  # [N]: the sequence of each token
    positions = (np.arange(len(owner), dtype=np.int32) - starts[owner] + np.int32(first)).astype(np.int32)
    # The rotary scaling counts the class token, as a request for one more token does.
    totals = np.array([len(ids) + 1 for ids in sequences], np.int32)
    return Step(
        ids=np.concatenate(parts),
        positions=positions,
        scaling_lengths=totals[owner],
        slots=tables[owner, positions // size] * np.int32(size) + positions % size,
        starts=starts,
        lengths=(counts + first).astype(np.int32),
        tables=tables[:, : -(-int(counts.max() + first) // size)],
        wanted=(starts[1:] - 1).astype(np.int32),
        adapters=np.full(len(parts), adapter, np.int32),
    )


def probability(odds: np.ndarray) -> np.ndarray:
    """P(true), without overflow for large odds."""
    return np.exp(-np.logaddexp(0.0, -odds))


def log_losses(odds: np.ndarray, true: np.ndarray) -> np.ndarray:
    """-log of the probability of the class that each proposition has, in nats."""
    return np.logaddexp(0.0, np.where(true, -odds, odds))


def teacher_report(rows: Sequence[TeacherRow], odds: np.ndarray) -> JsonObject:
    """Figures of ``rows``, whose propositions have ``odds`` [N] in their order.

    "propositions" and "choices" are of the rows of that kind: a proposition is right when P(true) is above 0.5 and it
    is true, or not above and false; a multiple choice when P(true) of the true choice is above that of every other, so
    that a tie is wrong. "all": every proposition, those of choices included; None where there is none.
    """
    true = np.array([proposition.true for row in rows for proposition in row.propositions])
    ends = np.cumsum([len(row.propositions) for row in rows])
    judged = [_judged(row, part) for row, part in zip(rows, np.split(odds, ends[:-1]), strict=True)]
    of_choice = np.repeat([row.is_choice for row in rows], [len(row.propositions) for row in rows])
    choices = [found for found in judged if found["kind"] == "choice"]
    chances = [1 / len(found["p_true"]) for found in choices]
    return {
        "propositions": _figures(odds[~of_choice], true[~of_choice]),
        "choices": {
            "rows": len(choices),
            "accuracy": _mean([found["right"] for found in choices]),
            "chance": _mean(chances),
            "log_loss": _mean(log_losses(odds[of_choice], true[of_choice])),
        },
        "all": {**_figures(odds, true), "true": int(true.sum()), **calibration(probability(odds), true)},
        "rows": judged,
    }


def _judged(row: TeacherRow, odds: np.ndarray) -> JsonObject:
    where, chances = row.propositions[0].where, [float(p) for p in probability(odds)]
    if not row.is_choice:
        true = row.propositions[0].true
        found = {"kind": "proposition", "p_true": chances[0], "true": true, "right": bool((odds[0] > 0) == true)}
        return {"where": where, **found}
    # Compared by their odds: P(true) of two sure choices may round to 1 alike.
    others = np.delete(odds, row.answer)
    right = bool((odds[row.answer] > others).all())
    chosen = {"chosen": int(odds.argmax()), "answer": row.answer, "right": right}
    return {"where": where, "kind": "choice", "p_true": chances, **chosen}


def _figures(odds: np.ndarray, true: np.ndarray) -> JsonObject:
    accuracy, loss = _mean((odds > 0) == true), _mean(log_losses(odds, true))
    return {"rows": len(odds), "accuracy": accuracy, "log_loss": loss}


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def calibration(p_true: np.ndarray, true: np.ndarray) -> JsonObject:
    """Mean P(true) beside the share that is true in BINS bins of P(true), and the mean distance of the two, weighted by
    the propositions of a bin (expected calibration error). A bin holds its lower bound, the last one also 1."""
    place = np.minimum((p_true * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for n in range(BINS):
        here = place == n
        mean, share = _mean(p_true[here]), _mean(true[here])
        if mean is not None and share is not None:
            error += abs(mean - share) * here.sum() / len(true)
        bins.append(
            {"low": n / BINS, "high": (n + 1) / BINS, "rows": int(here.sum()), "p_true": mean, "share_true": share}
        )
    return {"calibration": bins, "calibration_error": float(error)}
