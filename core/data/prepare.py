"""Data preparation of ``tele data``: input files to a packed folder, in memory independent of the corpus size."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from telechat_twins.core.data.chat_layout import ChatLayout
from telechat_twins.core.data.control import START
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.encoders.parallel import encode_blocks
from telechat_twins.core.data.encoders.tasks import Encoder, Pace
from telechat_twins.core.data.forms.formats import TOKENS, form_of
from telechat_twins.core.data.forms.megatron import TokenFile
from telechat_twins.core.data.forms.streams import UTF8
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.packed import PackedWriter
from telechat_twins.core.data.packing.dialogue_file import DialogueFile
from telechat_twins.core.data.packing.processes import DialogueEncoder, dialogue_samples_of
from telechat_twins.core.data.rows import (
    RowReader,
    Unchanged,
    document_parts,
    find_inputs,
    read_documents,
    read_rows,
    row_files,
    total_bytes,
)
from telechat_twins.core.data.sft import (
    MINDFORMERS_SEED,
    VARIANTS,
    Counts,
    TrainingSequence,
    deepspeed_mask,
    deepspeed_sequences,
    mindformers_packs,
    pack_samples,
)
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject


class Bar(Protocol):
    """What is told of bytes that were read."""

    def update(self, n: float = 1) -> object: ...


def pack_text(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    add_bos: bool = False,
    text_key: str = "text",
    threads: int = 1,
    reading: Reading | None = None,
    encoding: str = UTF8,
    force: bool = False,
    quiet: bool = False,
) -> JsonObject:
    """Texts -> packed folder ``out`` of kind "text"; returns its meta. ``threads``: processes that tokenize.

    A row is a document, so is any other file. Each document ends with the end token (and begins with the first one
    on ``add_bos``), as in the released pre-training pipeline; control tokens in text are never matched. Empty documents
    are skipped.
    Megatron's token files are taken as they are, without tokenizing: "documents_without_end" of the meta counts theirs
    that do not end with it. Harmless keys of rows are in "fields_left_out"; ``reading`` has further options.
    """
    files = find_inputs(inputs)
    reading = reading if reading is not None else Reading()
    sources, tokens = Unchanged(files), [file for file in files if form_of(file).name == TOKENS]
    if tokens and add_bos:
        raise UserError(f"{tokens[0]}: holds token ids, which are taken as they are; leave --bos out")
    bos, eos = tokenizer.bos_token_id if add_bos else None, tokenizer.eos_token_id
    reader = RowReader(text_key, reading)
    with (
        PackedWriter(out, tokenizer, "text", force) as writer,
        progress_bar("tokenizing", total_bytes(files), quiet) as bar,
    ):
        encoder = Encoder(tokenizer, reader, bos, eos, writer.dtype)
        pace = Pace(total_bytes(files), threads)

        def on_bytes(count: int) -> None:
            pace.left -= count
            bar.update(count)

        parts = (
            part
            for file in files
            if file not in tokens
            for part in document_parts(file, reader, on_bytes, encoding, pace.size)
        )
        for encoded in encode_blocks(parts, encoder, threads, pace.size):
            writer.add_documents(encoded.ids, encoded.starts)
        unended = _copy_tokens(tokens, writer, tokenizer, bar)
        sources.check()
        facts = {"inputs": len(files), "add_bos": add_bos, **noticed(reading)}
        return writer.finish({**facts, "documents_without_end": unended} if tokens else facts)


def _copy_tokens(files: Sequence[Path], writer: PackedWriter, tokenizer: Tokenizer, bar: Bar) -> int:
    """Write the documents of token files; the number of those that do not end with <_end>."""
    unended = 0
    for file in files:
        found = TokenFile(file)
        for number, parts in enumerate(found, 1):
            last = None
            for ids in parts:
                if last is None:
                    writer.start_document()
                writer.add_tokens(ids, f"{found.data}: document {number}")
                bar.update(ids.size * found.dtype.itemsize)
                last = int(ids[-1])
            unended += last is not None and last != tokenizer.eos_token_id
    return unended


def noticed(reading: Reading) -> JsonObject:
    """What reading the rows brought to light, for a folder's meta."""
    return {
        "kinds": reading.kinds,
        "fields_left_out": sorted(reading.left_out),
        "keys_ignored": sorted(reading.ignore),
    }


def pack_dialogues(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    variant: str = "plain",
    template: bool = True,
    shuffle_seed: int | None = MINDFORMERS_SEED,
    start_token: str = START,
    layout: ChatLayout | None = None,
    threads: int = 1,
    reading: Reading | None = None,
    encoding: str = UTF8,
    force: bool = False,
    quiet: bool = False,
) -> JsonObject:
    """Dialogues -> packed folder ``out`` of kind "sft" with loss masks; returns its meta.

    ``variant`` is one of core.data.sft.VARIANTS; ``template`` applies to "deepspeed", ``shuffle_seed`` and
    ``start_token`` to "mindformers", ``layout`` (of the model's chats; None: TeleChat2's) and ``threads`` (processes
    that read and tokenize rows) to "plain". ``reading`` has the options of rows and receives what is noticed. DeepSpeed
    sequences are stored cut to ``seq_len``, as the released collator cuts them. Load the tokenizer with
    ``in_vocabulary=True``: an id outside the vocabulary is refused here.
    """
    files = _dialogue_files(inputs, variant, seq_len)
    sources, counts = Unchanged(files), Counts()
    reading = reading if reading is not None else Reading()
    # The DeepSpeed pipeline groups by system text, so it reads every row once to see it and once to use it.
    passes = 2 if variant == "deepspeed" else 1
    with (
        PackedWriter(out, tokenizer, "sft", force) as writer,
        progress_bar("packing", passes * total_bytes(files), quiet) as bar,
    ):
        if variant == "plain":
            encoder = DialogueEncoder(tokenizer, layout, reading, counts)
            samples = dialogue_samples_of(files, encoder, threads, bar.update, encoding)
            sequences = pack_samples(samples, seq_len, counts)
        else:
            indexed = DialogueFile(files, bar.update, (), reading, encoding, Path(out).absolute().parent)
            if variant == "deepspeed":
                sequences = _deepspeed(indexed, tokenizer, seq_len, template, counts)
            else:
                sequences = mindformers_packs(indexed, tokenizer, seq_len, shuffle_seed, start_token, counts)
        for number, sequence in enumerate(sequences):
            writer.add_sequence(sequence.ids, sequence.loss_mask, sequence.starts, f"sequence {number}")
        sources.check()
        return writer.finish(
            {
                **{"inputs": len(files), "variant": variant, "max_length": seq_len},
                "rows": counts.rows,
                "rows_lost": counts.lost,
                "rows_cut": counts.cut,
                **({"rows_apart": counts.apart} if counts.apart else {}),
                "tokens_truncated": counts.truncated_tokens,
                "systems_left_out": counts.systems_left_out,
                **noticed(reading),
            }
        )


def _dialogue_files(inputs: Sequence[str | Path], variant: str, seq_len: int) -> list[Path]:
    """The files of rows that ``inputs`` name; UserError for a wrong option or a file that holds no rows."""
    if variant not in VARIANTS:
        raise UserError(f"sft: '{variant}' is not one of {', '.join(VARIANTS)}")
    if seq_len < 2:
        raise UserError(f"seq_len: must be at least 2, found {seq_len}")
    return row_files(inputs, "dialogues")


def read_texts(
    inputs: Sequence[str | Path], max_bytes: int | None = None, ignore: Collection[str] = (), encoding: str = UTF8
) -> Iterator[str]:
    """The texts of files for training a tokenizer (dialogue rows give their contents), up to about ``max_bytes``.

    ``ignore``: keys of rows to leave out.
    """
    left, reading = max_bytes if max_bytes is not None else sys.maxsize, Reading(frozenset(ignore))
    for file in find_inputs(inputs):
        for text in _texts_of(file, reading, encoding):
            if left <= 0:
                return
            left -= len(text.encode("utf-8"))
            yield text


def _texts_of(file: Path, reading: Reading, encoding: str) -> Iterator[str]:
    if not form_of(file).holds_rows:
        yield from (block.text for block in read_documents(file, encoding=encoding))
        return
    for where, row in read_rows(file, None, encoding):
        if isinstance(row.get("text"), str):
            yield row["text"]
        else:
            dialogue = parse_dialogue(row, where, reading=reading)
            yield from ([dialogue.system] if dialogue.system else [])
            yield from (m["content"] for m in dialogue.messages if m.get("content"))


def _deepspeed(
    rows: DialogueFile, tokenizer: Tokenizer, seq_len: int, template: bool, counts: Counts
) -> Iterator[TrainingSequence]:
    for number, ids in enumerate(deepspeed_sequences(rows, tokenizer, seq_len, template, counts)):
        mask = deepspeed_mask(ids, tokenizer, f"sequence {number}")
        counts.truncated_tokens += max(0, len(ids) - seq_len)
        yield TrainingSequence(np.asarray(ids[:seq_len], np.int32), mask[:seq_len])


@contextlib.contextmanager
def progress_bar(what: str, total: int, quiet: bool) -> Iterator[Bar]:
    """A progress bar over input bytes with rate and time left; rarely refreshed where the output is not a terminal.

    There it also waits before it first shows, so that in a log a mistake found at once is one line.
    """
    if quiet:
        yield _Quiet()
        return
    from tqdm import tqdm  # which takes a twentieth of the start

    watched = sys.stderr.isatty()
    interval = 0.2 if watched else 10.0
    with tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=interval,
        delay=0.0 if watched else interval,
    ) as bar:
        yield bar
        bar.delay = 0.0  # all went well: the last state is shown, however short the work was


class _Quiet:
    def update(self, n: float = 1) -> None:
        """Show nothing."""
