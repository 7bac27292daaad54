"""Packing of a teacher's propositions: each is a document of its own, and only its class token is learnt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_twins.core.data.forms.streams import UTF8
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.teacher import Proposition, parse_propositions
from telechat_twins.core.data.packed import PackedWriter
from telechat_twins.core.data.prepare import noticed, progress_bar
from telechat_twins.core.data.rows import Unchanged, read_rows, row_files, total_bytes
from telechat_twins.core.data.sft import TrainingSequence
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

# Reserved pieces of TeleChat2's tokenizers; in them the paper's emoji are five pieces each.
TRUE_PIECE, FALSE_PIECE = "<_control8>", "<_control9>"


@dataclass(frozen=True)
class ClassTokens:
    """The tokens that end a true and a false proposition."""

    true: int
    false: int
    true_piece: str
    false_piece: str

    def of(self, proposition: Proposition) -> int:
        return self.true if proposition.true else self.false


def class_tokens(tokenizer: Tokenizer, true_piece: str = TRUE_PIECE, false_piece: str = FALSE_PIECE) -> ClassTokens:
    """The class tokens by name. UserError for a name that is not one piece of the vocabulary, or both the same."""
    if true_piece == false_piece:
        raise UserError(f"--true-token and --false-token: both are {true_piece}; a proposition's class is one of two")
    found = {}
    for option, piece in (("--true-token", true_piece), ("--false-token", false_piece)):
        index = next((i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == piece), None)
        if index is None:
            raise UserError(
                f"{option}: {piece} is not one piece of {tokenizer.path}; name a piece, best a control piece that text "
                "never holds (tele tokenize decode shows the piece of an id)"
            )
        found[option] = index
    return ClassTokens(found["--true-token"], found["--false-token"], true_piece, false_piece)


def text_ids(proposition: Proposition, tokenizer: Tokenizer) -> list[int]:
    """The ids after which a proposition's class token stands, in training and in evaluation."""
    return tokenizer.encode(proposition.text)


def pack_teacher(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    tokens: ClassTokens,
    *,
    seq_len: int,
    drop_long: bool = False,
    reading: Reading | None = None,
    encoding: str = UTF8,
    force: bool = False,
    quiet: bool = False,
) -> JsonObject:
    """Propositions -> packed folder ``out`` of kind "sft", for training with isolated documents; returns its meta.

    A proposition is its text and its class token, the only target. One of more than ``seq_len`` tokens is a UserError,
    or left out and counted with ``drop_long``: it cannot be cut, since its class is at its end.
    """
    files = row_files(inputs, "propositions")
    reading = reading if reading is not None else Reading()
    sources = Unchanged(files)
    counts = {"propositions": 0, "true": 0, "dropped_long": 0}
    with (
        PackedWriter(out, tokenizer, "sft", force) as writer,
        progress_bar("packing", total_bytes(files), quiet) as bar,
    ):
        propositions = (
            proposition
            for file in files
            for where, row in read_rows(file, bar.update, encoding)
            for proposition in parse_propositions(row, where, reading)
        )
        encoded = _encoded(propositions, tokenizer, tokens, seq_len, drop_long, counts)
        for number, sequence in enumerate(_packs(encoded, seq_len)):
            writer.add_sequence(sequence.ids, sequence.loss_mask, sequence.starts, f"sequence {number}")
        facts = {"true": tokens.true, "false": tokens.false, "pieces": [tokens.true_piece, tokens.false_piece]}
        sources.check()
        return writer.finish(
            {
                "inputs": len(files),
                "variant": "teacher",
                "isolated": True,
                "max_length": seq_len,
                **counts,
                "class_tokens": facts,
                **noticed(reading),
            }
        )


def _encoded(
    propositions: Iterable[Proposition],
    tokenizer: Tokenizer,
    tokens: ClassTokens,
    seq_len: int,
    drop_long: bool,
    counts: dict[str, int],
) -> Iterator[list[int]]:
    """The ids of each proposition, its class token last."""
    for proposition in propositions:
        ids = [*text_ids(proposition, tokenizer), tokens.of(proposition)]
        if len(ids) > seq_len:
            if not drop_long:
                raise UserError(
                    f"{proposition.where}: a proposition of {len(ids)} tokens, above --seq-len {seq_len}; it cannot be "
                    "cut, so raise --seq-len, or leave such rows out with --drop-long"
                )
            counts["dropped_long"] += 1
            continue
        counts["propositions"] += 1
        counts["true"] += proposition.true
        yield ids


def _packs(encoded: Iterable[list[int]], seq_len: int) -> Iterator[TrainingSequence]:
    """Propositions in order, packed while they fit into ``seq_len``; each is a document."""
    ids: list[int] = []
    mask: list[int] = []
    starts: list[int] = []
    for one in encoded:
        if ids and len(ids) + len(one) > seq_len:
            yield TrainingSequence(np.asarray(ids, np.int32), np.asarray(mask, np.uint8), tuple(starts))
            ids, mask, starts = [], [], []
        starts.append(len(ids))
        ids += one
        mask += [0] * (len(one) - 1) + [1]
    if ids:
        yield TrainingSequence(np.asarray(ids, np.int32), np.asarray(mask, np.uint8), tuple(starts))
