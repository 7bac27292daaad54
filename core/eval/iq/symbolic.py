"""Symbolic mapping (section 5.1): rows of SuperGLUE and CLUE whose labels are replaced by random strings.

The rows are the user's files, a JSON object a line, with the fields of the benchmarks' validation sets. Examples of
each label come before the question, drawn from the other rows; the answer is one of the labels' strings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.iq.items import Draw, IQOptions, Item
from telechat_twins.core.eval.local_files import read_records
from telechat_twins.core.types import JsonObject

SIZE = 300  # rows at most, as in the paper
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789%@?#&!"
SYMBOL = (8, 8)  # characters between < and >


@dataclass(frozen=True)
class Source:
    """A task of a benchmark: the fields of a row, its text, the names of labels by their value, and the published
    scores in per cent."""

    fields: tuple[str, ...]
    text: Callable[[JsonObject], str]
    labels: Mapping[str, str]
    scores: Mapping[str, float]


def _coreference(row: JsonObject) -> str:
    spans = row["target"] if isinstance(row.get("target"), dict) else row
    return f"{row['text']}\n{spans['span1_text']} = {spans['span2_text']}"


def _scores(flm: float, glm: float, gpt3: float | None = None) -> dict[str, float]:
    return {**({} if gpt3 is None else {"GPT-3": gpt3}), "GLM-130B": glm, "FLM-101B": flm}


YES_NO = {"true": "true", "1": "true", "false": "false", "0": "false"}
RTE = {"entailment": "entailment", "0": "entailment", "not_entailment": "not", "1": "not"}
NLI = {name: name for name in ("entailment", "neutral", "contradiction")}
SOURCES: dict[str, Source] = {
    "boolq": Source(
        ("passage", "question", "label"),
        lambda row: f"{row['passage']}\n{row['question']}?",
        YES_NO,
        _scores(49.50, 40.13, 50.84),
    ),
    "wic": Source(
        ("word", "sentence1", "sentence2", "label"),
        lambda row: f"{row['word']}\n{row['sentence1']}\n{row['sentence2']}",
        YES_NO,
        _scores(50.33, 48.67, 53.33),
    ),
    "rte": Source(
        ("premise", "hypothesis", "label"),
        lambda row: f"{row['premise']}\n{row['hypothesis']}",
        RTE,
        _scores(48.38, 47.65, 48.38),
    ),
    "wsc": Source(("text", "label"), _coreference, YES_NO, _scores(38.83, 56.31, 37.86)),
    "afqmc": Source(
        ("sentence1", "sentence2", "label"),
        lambda row: f"{row['sentence1']}\n{row['sentence2']}",
        YES_NO,
        _scores(38.33, 33.33),
    ),
    "csl": Source(
        ("abst", "keyword", "label"),
        lambda row: f"{row['abst']}\n{'、'.join(map(str, row['keyword']))}",
        YES_NO,
        _scores(55.29, 53.85),
    ),
    "ocnli": Source(
        ("sentence1", "sentence2", "label"),
        lambda row: f"{row['sentence1']}\n{row['sentence2']}",
        NLI,
        _scores(27.33, 34.00),
    ),
    "cluewsc2020": Source(("text", "label"), _coreference, YES_NO, _scores(47.33, 38.67)),
}


def symbolic_items(name: str, file: Path, options: IQOptions) -> list[Item]:
    """The items of one source. UserError names file and line of what lacks a field or has another label; rows without
    an agreed label ("-", as in OCNLI) are left out."""
    source, rows = SOURCES[name], []
    for where, row in read_records(file):
        missing = [field for field in source.fields if field not in row]
        if missing:
            raise UserError(f"{where}: lacks the field '{missing[0]}'; {name} needs {', '.join(source.fields)}")
        label = str(row["label"]).lower()
        if label == "-":
            continue
        if label not in source.labels:
            raise UserError(f"{where}: has the label '{label[:40]}', not one of {', '.join(source.labels)}")
        try:
            rows.append((source.text(row), source.labels[label]))
        except (KeyError, TypeError):
            raise UserError(f"{where}: lacks a span of its target") from None
    names = list(dict.fromkeys(source.labels.values()))
    for label in names:
        if sum(found == label for _, found in rows) <= options.shots_a_label:
            raise UserError(f"{file}: has too few rows of label '{label}' for {options.shots_a_label} examples each")
    chosen = Draw(options.seed, name).some(range(len(rows)), min(SIZE, len(rows)))
    return [_item(name, rows, place, names, options) for place in chosen]


def _item(name: str, rows: Sequence[tuple[str, str]], place: int, names: Sequence[str], options: IQOptions) -> Item:
    draw = Draw(options.seed, name, place)
    symbols: dict[str, str] = {}
    while len(symbols) < len(names):
        made = f"<{draw.text(CHARACTERS, SYMBOL)}>"
        if made not in symbols.values():
            symbols[names[len(symbols)]] = made
    shown: list[int] = []
    for label in names:
        others = [n for n, (_, found) in enumerate(rows) if found == label and n != place]
        shown += draw.some(others, options.shots_a_label)
    blocks = [f"{rows[n][0]}\n{symbols[rows[n][1]]}\n\n" for n in draw.some(shown, len(shown))]
    text, label = rows[place]
    return Item("".join(blocks) + text + "\n", symbols[label], tuple(symbols.values()))
