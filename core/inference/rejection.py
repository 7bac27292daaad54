"""Rejection sampling (best of N): several answers to each prompt, scored, of which the best becomes a training row.

Results are appended prompt by prompt to the output files, and then, as the commit, one record to a journal beside the
first of them. A run that is repeated with the same options cuts the files to what the journal has committed, and
continues with the prompts that it does not name.

    OUT.journal     line 1: the options; then a record for each prompt, with the sizes of the files after it
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from telechat_twins.core.checkpoint.fingerprint import fingerprint
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.inference.adapters import adapters_digest
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.generation import answer
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.inference.prompts import Prompt, answered_row, preference_row
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.inference.scorers import Score, Scorer
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

FAILURES_SHOWN = 10
_SEEDS = 2**64

_DECIDING = """
backend precision quantize rescale table_dtype add_bos chat_template max_new_tokens samples stop temperature top_k top_p
min_p repetition_penalty presence_penalty frequency_penalty seed min_score keep_cut
"""

# What became of a prompt, and of its pair.
KEPT, BELOW, UNSCORED = "kept", "below", "unscored"
WRITTEN, DROPPED, EQUAL, SAME, TAGS = "written", "dropped", "equal", "same", "tags"
_WITHOUT_PAIR = {
    DROPPED: "of dropped prompts",
    EQUAL: "with equal scores only",
    SAME: "whose best and worst are the same text",
    TAGS: "with tool tags in their texts, which preference rows cannot hold",
}


@dataclass(frozen=True)
class Answer:
    """A sampled answer; ``cut``: it reached the limit of new tokens, so it has no end of its own."""

    text: str
    cut: bool = False


@dataclass(frozen=True)
class Selection:
    """What is written of the answers. ``out``: the rows of best answers; ``pairs``: the preference rows, or None.

    ``min_score``: prompts whose best score is below it are dropped. ``keep_cut``: answers cut at the limit of new
    tokens take part; otherwise they are neither scored nor written.
    """

    out: Path
    pairs: Path | None = None
    min_score: float | None = None
    keep_cut: bool = False


@dataclass(frozen=True)
class Record:
    """The journal's record of one prompt. ``scores``: None for an answer without one (cut, failed or not finite).

    ``tied``: several different answers have the best score. ``out_bytes``, ``pairs_bytes``: sizes of the files with
    this prompt's rows.
    """

    index: int
    where: str
    outcome: str
    pair: str | None
    scores: list[float | None]
    cut: int
    failed: int
    not_finite: int
    tied: bool
    out_bytes: int = 0
    pairs_bytes: int = 0

    @property
    def finite(self) -> list[float]:
        return [score for score in self.scores if score is not None]


def draw(engine: Engine, request: Request) -> list[Answer]:
    """The answers to a request, generated in one batch that shares the prompt's cache."""
    texts: list[list[str]] = [[] for _ in range(request.samples)]
    cut = [False] * request.samples
    for event in answer(engine, request):
        texts[event.sample].append(event.text)
        if event.finish_reason is not None:
            cut[event.sample] = event.finish_reason == "length"
    return [Answer("".join(text), ended) for text, ended in zip(texts, cut, strict=True)]


def request_of(template: Request, prompt: Prompt, index: int, ids: Sequence[int]) -> Request:
    """The request for the prompt of number ``index``: the template with the prompt's ids and a seed of its own."""
    seed = (template.sampling.seed + index) % _SEEDS
    return dataclasses.replace(
        template,
        prompt_ids=tuple(ids),
        sampling=dataclasses.replace(template.sampling, seed=seed),
        text="tools" if prompt.calls_tools else "answer",
    )


def deciding(model: Loaded, prompts: str, scorer: JsonObject) -> JsonObject:
    """Everything that decides the rows: options, weights and tokenizer, the digest of the prompts, and the scorer.

    ``model.args``: the options of ``tele generate``.
    """
    pairs = model.args.preference_out
    return {
        **{name: getattr(model.args, name) for name in _DECIDING.split()},
        "preference_out": None if pairs is None else str(Path(pairs).resolve()),
        **({"min_new_tokens": least} if (least := model.settings.min_new_tokens) else {}),
        "prompts": prompts,
        "score": scorer,
        "weights": fingerprint(model.source.config, model.source.read),
        "adapter": adapters_digest(model.adapters.values()),
        "tokenizer": None if model.tokenizer is None else model.tokenizer.sha256,
    }


class Journal:
    """Output files with the journal that makes their rows atomic; ``records`` are those of this and earlier runs.

    UserError where the files exist without a journal, or with one of other options; they are left as they are.
    """

    def __init__(self, selection: Selection, options: JsonObject) -> None:
        self.path = selection.out.with_name(selection.out.name + ".journal")
        self.files = [selection.out] + ([selection.pairs] if selection.pairs else [])
        self.records: list[Record] = []
        text = json.dumps(options, sort_keys=True)
        header = {"tele": "rejection", "digest": hashlib.sha256(text.encode()).hexdigest(), "options": options}
        if self.path.exists():
            self._resume(json.loads(json.dumps(header)))
            return
        for file in self.files:
            if file.exists() and file.stat().st_size:
                raise UserError(
                    f"{file}: exists, and there is no {self.path.name} by which it could be continued; remove it or "
                    "give another path"
                )
        write_text(self.path, json.dumps(header) + "\n")
        for file in self.files:
            _append(file, "")

    def _resume(self, header: JsonObject) -> None:
        head, *lines = self.path.read_bytes().split(b"\n")
        try:
            former = json.loads(head)
            former_digest, former_options = former["digest"], dict(former["options"])
            self.records = [Record(**json.loads(line)) for line in lines[:-1]]  # behind the last newline: torn, or ""
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: damaged; remove it with {self.files[0]}, or give another --out") from None
        if former_digest != header["digest"]:
            names = [k for k, v in header["options"].items() if former_options.get(k) != v]
            raise UserError(
                f"{self.files[0]}: was begun with other options ({', '.join(names) or 'of another version'}); repeat "
                "them to continue, or give another --out"
            )
        last = self.records[-1] if self.records else None
        sizes = [last.out_bytes, last.pairs_bytes] if last else [0, 0]
        for file, size in zip(self.files, sizes, strict=False):
            found = file.stat().st_size if file.exists() else 0
            if found < size:
                raise UserError(
                    f"{file}: has {found} bytes, and {self.path.name} has committed {size}; restore it, or remove both"
                )
        for file, size in zip(
            (self.path, *self.files), (len(head) + 1 + sum(len(x) + 1 for x in lines[:-1]), *sizes), strict=False
        ):
            if file.exists():
                os.truncate(file, size)
            else:
                _append(file, "")

    def commit(self, record: Record, row: JsonObject | None, pair: JsonObject | None) -> None:
        """Append a prompt's rows and then its record. UserError when a file cannot be written; the files then end with
        the prompt before, so that they can be read as they are."""
        before = {file: file.stat().st_size for file in (*self.files, self.path)}
        try:
            sizes = [
                _append(file, "" if value is None else json.dumps(value, ensure_ascii=False, default=str) + "\n")
                for file, value in zip(self.files, (row, pair), strict=False)
            ]
            record = dataclasses.replace(record, out_bytes=sizes[0], pairs_bytes=sizes[1] if len(sizes) > 1 else 0)
            _append(self.path, json.dumps(dataclasses.asdict(record)) + "\n")
        except UserError:
            for file, size in before.items():
                with contextlib.suppress(OSError):  # resuming does it otherwise
                    os.truncate(file, size)
            raise
        self.records.append(record)


def _append(path: Path, text: str) -> int:
    """Append to a file, synced to disk; its size in bytes after it. UserError when it cannot be written."""
    try:
        with path.open("ab") as file:
            # Half a surrogate pair, which JSON can escape, has no UTF-8: it is written as its escape.
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space or change permissions, and repeat the "
            "command, which resumes"
        ) from None


def sample_prompts(
    prompts: Iterable[Prompt],
    total: int,
    ask: Callable[[int, Prompt], list[Answer]],
    scorer: Scorer,
    selection: Selection,
    journal: Journal,
) -> None:
    """Sample, score and write every prompt that the journal does not have; progress goes to stderr.

    UserError when the scorer fails at every answer of the first prompt, and for what ``ask`` and ``scorer`` refuse.
    """
    done = {record.index for record in journal.records}
    shown_failures = 0
    watched = sys.stderr.isatty()
    with tqdm(
        total=total, initial=len(done), desc="sampling", unit=" prompts", mininterval=0.2 if watched else 10.0
    ) as bar:
        for index, prompt in enumerate(prompts):
            if index in done:
                continue
            answers = ask(index, prompt)
            taken = [n for n, one in enumerate(answers) if selection.keep_cut or not one.cut]
            scores = scorer.score(prompt, [answers[n].text for n in taken])
            failures = [score for score in scores if isinstance(score, str)]
            if failures and len(failures) == len(scores) and not any(record.finite for record in journal.records):
                raise UserError(f"--score: failed for every answer at {prompt.where}: {failures[0]}; mend the scorer")
            for failure in failures[: max(0, FAILURES_SHOWN - shown_failures)]:
                bar.write(f"note: no score at {prompt.where}: {printable(failure)}", file=sys.stderr)
            shown_failures += len(failures)
            given: list[Score | None] = [None] * len(answers)
            for n, score in zip(taken, scores, strict=True):
                given[n] = score
            journal.commit(*judge(index, prompt, answers, given, selection))
            bar.update()


def judge(
    index: int, prompt: Prompt, answers: Sequence[Answer], given: Sequence[Score | None], selection: Selection
) -> tuple[Record, JsonObject | None, JsonObject | None]:
    """(the record, the row of the best answer, the preference row) of a prompt; None for rows that are not written.

    ``given``: a number, the reason of a failure, or None for an answer that was not scored. Of equal scores, the first
    answer counts, for the best and for the worst.
    """
    finite: dict[int, float] = {n: s for n, s in enumerate(given) if isinstance(s, float) and math.isfinite(s)}
    record = Record(
        index=index,
        where=prompt.where,
        outcome=UNSCORED,
        pair=None if selection.pairs is None else DROPPED,
        scores=[finite.get(n) for n in range(len(given))],
        cut=sum(one.cut for one in answers),
        failed=sum(isinstance(score, str) for score in given),
        not_finite=sum(isinstance(score, float) and not math.isfinite(score) for score in given),
        tied=False,
    )
    if not finite:
        return record, None, None
    best = max(finite, key=lambda n: (finite[n], -n))
    worst = min(finite, key=lambda n: (finite[n], n))
    tied = len({answers[n].text for n in finite if finite[n] == finite[best]}) > 1
    if selection.min_score is not None and finite[best] < selection.min_score:
        return dataclasses.replace(record, outcome=BELOW, tied=tied), None, None
    about: JsonObject = {"index": index, "source": prompt.where}
    row = answered_row(prompt, answers[best].text) | about | {"score": finite[best]}
    pair: JsonObject | None = None
    if selection.pairs is not None:
        reason = _without_pair(prompt, finite[best] == finite[worst], answers[best].text == answers[worst].text)
        record = dataclasses.replace(record, pair=reason or WRITTEN)
        if reason is None:
            scored = {"score_chosen": finite[best], "score_rejected": finite[worst]}
            pair = preference_row(prompt, answers[best].text, answers[worst].text) | about | scored
    return dataclasses.replace(record, outcome=KEPT, tied=tied), row, pair


def _without_pair(prompt: Prompt, equal: bool, same: bool) -> str | None:
    """Why a kept prompt gives no pair; None where it gives one."""
    return EQUAL if equal else SAME if same else TAGS if prompt.tags else None


def summary(selection: Selection, records: Sequence[Record], earlier: int) -> list[str]:
    """Lines on all prompts of the files, of which ``earlier`` were done by runs before this one."""
    scores = [score for record in records for score in record.finite]
    best = [max(record.finite) for record in records if record.finite]
    count = {outcome: sum(record.outcome == outcome for record in records) for outcome in (KEPT, BELOW, UNSCORED)}
    lines = [
        f"{selection.out}: {count[KEPT]} rows kept and {len(records) - count[KEPT]} dropped of {len(records)} prompts "
        f"with {sum(len(record.scores) for record in records)} answers"
        + (f" ({earlier} prompts done before)" if earlier else "")
    ]
    if scores:
        lines.append(f"scores: mean of best {_mean(best):.6g}, mean of all {_mean(scores):.6g}, {len(scores)} scored")
    if count[BELOW]:
        lines.append(f"dropped: {count[BELOW]} prompts whose best score is below --min-score {selection.min_score:g}")
    if count[UNSCORED]:
        lines.append(f"dropped: {count[UNSCORED]} prompts without any scored answer")
    if failed := sum(record.failed for record in records):
        lines.append(f"left out: {failed} answers at which the scorer failed")
    if not_finite := sum(record.not_finite for record in records):
        lines.append(f"left out: {not_finite} answers whose score is not a finite number")
    if cut := sum(record.cut for record in records):
        fate = "kept as --keep-cut says" if selection.keep_cut else "left out unscored; --keep-cut keeps them"
        lines.append(f"cut: {cut} answers reached --max-new-tokens without an end ({fate})")
    if tied := sum(record.tied for record in records):
        lines.append(f"ties: {tied} prompts with several best answers, of which the first counts")
    return lines + _pair_lines(selection, records)


def _pair_lines(selection: Selection, records: Sequence[Record]) -> list[str]:
    if selection.pairs is None:
        return []
    lines = [f"{selection.pairs}: {sum(record.pair == WRITTEN for record in records)} pairs"]
    for reason, text in _WITHOUT_PAIR.items():
        if found := sum(record.pair == reason for record in records):
            lines.append(f"without a pair: {found} {text}")
    return lines


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
