"""Dialogues as samples by several processes: those of one process, in its order.

The samples of a task are one array of 2 id + mask, so that they pass between processes as the ids of texts do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from telechat_twins.core.data.chat_layout import ChatLayout
from telechat_twins.core.data.dialogues import Dialogue, parse_dialogue
from telechat_twins.core.data.encoders.parallel import encode_blocks
from telechat_twins.core.data.encoders.tasks import Encoded, Pace, TableRow, Task
from telechat_twins.core.data.forms.formats import JSON, LINES, form_of
from telechat_twins.core.data.forms.json_rows import UnreadRow, parse_row, raw_rows
from telechat_twins.core.data.forms.streams import OnBytes
from telechat_twins.core.data.kinds.fields import typed
from telechat_twins.core.data.kinds.messages import Reading, unused
from telechat_twins.core.data.rows import read_rows, total_bytes
from telechat_twins.core.data.sft import Counts, counted_samples
from telechat_twins.core.data.tokenizer import Tokenizer


def dialogue_samples_of(
    files: Sequence[Path],
    encoder: DialogueEncoder,
    processes: int,
    on_bytes: OnBytes,
    encoding: str,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [n], mask uint8 [n]) of every sample of the rows of ``files``, by this process and ``processes`` - 1
    others. UserError for the first row at fault."""
    pace = Pace(total_bytes(files), processes)

    def on_read(count: int) -> None:
        pace.left -= count
        on_bytes(count)

    rows = (row for file in files for row in _unread(file, on_read, encoding))
    for encoded in encode_blocks(rows, encoder, processes, pace.size):
        ids, mask = encoded.ids >> 1, (encoded.ids & 1).astype(np.uint8)
        bounds = [*encoded.starts.tolist(), len(ids)]
        yield from ((ids[begin:end], mask[begin:end]) for begin, end in zip(bounds[:-1], bounds[1:], strict=True))


class DialogueReader:
    """What was noticed in rows of dialogues, and how many there were."""

    def __init__(self, reading: Reading, counts: Counts):
        self.reading, self.counts = reading, counts

    def fresh(self) -> DialogueReader:
        """One with the same options that noticed nothing yet."""
        return DialogueReader(unused(self.reading), Counts())

    def absorb(self, other: DialogueReader) -> None:
        """Take over what the reader of later rows noticed."""
        self.reading.absorb(other.reading)
        self.counts.rows += other.counts.rows
        self.counts.apart += other.counts.apart


class DialogueEncoder:
    """Samples of tasks of rows, in the ``layout`` of the model's chats (None: TeleChat2's)."""

    def __init__(self, tokenizer: Tokenizer, layout: ChatLayout | None, reading: Reading, counts: Counts):
        self.tokenizer, self.reader, self._layout = tokenizer, DialogueReader(reading, counts), layout

    def encode(self, task: Task, reader: DialogueReader | None = None) -> Encoded:
        """``starts``: of the samples. UserError for a row that cannot be read or trained."""
        reader = reader or self.reader
        values: list[int] = []
        targets: list[int] = []
        starts: list[int] = []
        dialogues = _dialogues(task, reader.reading)
        for ids, mask in counted_samples(dialogues, self.tokenizer, reader.counts, self._layout):
            starts.append(len(values))
            values += ids
            targets += mask
        both = np.asarray(values, np.int32) << 1 | np.asarray(targets, np.int32)
        return Encoded(both, np.asarray(starts, np.int64))


def _dialogues(task: Task, reading: Reading) -> Iterator[Dialogue]:
    for part in task:
        if isinstance(part, TableRow):
            yield parse_dialogue(json.loads(part.data), part.where, reading=reading)
        else:
            assert isinstance(part, UnreadRow)
            yield parse_dialogue(parse_row(part.data, part.where), part.where, reading=reading)


def _unread(file: Path, on_bytes: OnBytes, encoding: str) -> Iterator[UnreadRow | TableRow]:
    if form_of(file).name in (LINES, JSON):
        for row in raw_rows(file, on_bytes, encoding):
            yield UnreadRow(file, row.line, row.item, row.data)
        return
    for where, found in read_rows(file, on_bytes, encoding):
        data = json.dumps(found, ensure_ascii=False, default=typed)
        yield TableRow(where, data.encode("utf-8", "surrogatepass"))
