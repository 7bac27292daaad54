"""Documents as tasks of about equal work, and the ids of a task: what one process or several do in the same way.

A document may come in several blocks. It is cut where the tokenizer knows that the parts encode as the whole does
(``last_cut``), never anywhere else, so the blocks' borders leave no trace in the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from telechat_twins.core.data.forms.json_rows import UnreadLines, UnreadRow
from telechat_twins.core.data.packed import check_ids
from telechat_twins.core.errors import UserError

if TYPE_CHECKING:
    from telechat_twins.core.data.rows import RowReader
    from telechat_twins.core.data.tokenizer import Tokenizer

# Characters, or bytes of unread rows, of a task: enough to make the way to another process short, few enough that
# little waits in memory.
TASK = 1 << 20
_SMALL = 1 << 14  # of a task near the end of the input
_PARTS = 4096  # of a task at most
_UNCUT = 1 << 24  # characters of a document that are held until a place to cut is found


class TextBlock(Protocol):
    """Part of a document: ``first`` starts it, ``last`` ends it, ``where`` names it in messages."""

    @property
    def where(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def first(self) -> bool: ...
    @property
    def last(self) -> bool: ...


class Part(NamedTuple):
    """Part of a document that encodes on its own as it does in the whole."""

    where: str
    text: str
    first: bool
    last: bool


class TableRow(NamedTuple):
    """A row of a table, written as JSON."""

    where: str
    data: bytes


Given = TextBlock | UnreadRow | UnreadLines | TableRow
Task = Sequence[Part | UnreadRow | UnreadLines | TableRow]


@dataclass(frozen=True)
class Encoded:
    """Ids of parts of documents one after the other: ``starts``, int64, is where among them documents begin."""

    ids: np.ndarray
    starts: np.ndarray


class Reader(Protocol):
    """Reads rows, and keeps what was noticed on the way. ``fresh``: one that noticed nothing yet; ``absorb``: take over
    what the reader of later rows noticed."""

    def fresh(self) -> Any: ...
    def absorb(self, other: Any) -> None: ...


class TaskEncoder(Protocol):
    """Makes ids of tasks; in this process by ``reader``, in others by fresh ones, which are absorbed in order."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def reader(self) -> Reader | None: ...
    def encode(self, task: Task, reader: Any = None) -> Encoded: ...


class Pace:
    """How large tasks are: toward the end of the input smaller ones, so that several processes end together.

    ``left``: bytes of the input that are to be read still.
    """

    def __init__(self, left: int, processes: int):
        self.left, self._processes = left, processes

    def size(self) -> int:
        """Bytes or characters of the next task."""
        return min(TASK, max(_SMALL, self.left // (4 * self._processes))) if self._processes > 1 else TASK


def make_tasks(blocks: Iterable[Given], tokenizer: Tokenizer, size: Callable[[], int] | None = None) -> Iterator[Task]:
    """Blocks as tasks of about ``size()`` characters each (None: TASK).

    UserError for a document that has to be cut for its length and cannot be cut exactly, and of ``blocks``, behind what
    was read before.
    """
    task: list[Part | UnreadRow | UnreadLines | TableRow] = []
    taken = 0
    try:
        for part in _parts(blocks, tokenizer):
            task.append(part)
            taken += len(part.text) if isinstance(part, Part) else _bytes(part)
            if taken >= (size() if size else TASK) or len(task) >= _PARTS:
                yield task
                task, taken = [], 0
    except UserError:
        if task:  # in which a row before the one that cannot be read may be at fault
            yield task
        raise
    if task:
        yield task


def _bytes(part: UnreadRow | UnreadLines | TableRow) -> int:
    return part.size if isinstance(part, UnreadLines) else len(part.data)


def _parts(blocks: Iterable[Given], tokenizer: Tokenizer) -> Iterator[Part | UnreadRow | UnreadLines | TableRow]:
    rest, where, first = "", "", True
    for block in blocks:
        if isinstance(block, (UnreadRow, UnreadLines, TableRow)):
            yield block
            continue
        if block.first:
            rest, where, first = "", block.where, True
        text = rest + block.text
        if block.last:
            yield Part(where, text, first, True)
            rest = ""
            continue
        cut = tokenizer.last_cut(text)
        if cut:
            yield Part(where, text[:cut], first, False)
            where, first = block.where, False
        elif len(text) > _UNCUT:
            raise UserError(
                f"{where}: more than {_UNCUT} characters of one document, which this tokenizer cannot encode in parts "
                "exactly; split the document"
            )
        rest = text[cut:]


class Encoder:
    """Ids of tasks. ``reader`` has the texts of unread rows, and notices what is empty and thus no document.

    Documents begin with ``bos`` and end with ``eos`` (None: without). ``dtype``: of the ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reader: RowReader | None = None,
        bos: int | None = None,
        eos: int | None = None,
        dtype: np.dtype | type = np.int32,
    ):
        self.tokenizer, self.reader = tokenizer, reader
        self._bos, self._eos, self._dtype = _one(bos), _one(eos), np.dtype(dtype)

    def encode(self, task: Task, reader: RowReader | None = None) -> Encoded:
        """``reader``: another one that reads the rows. UserError for a row that cannot be read, and an id outside the
        vocabulary."""
        parts = list(_texts(task, reader or self.reader))
        found = self.tokenizer.encode_batch([part.text for part in parts], [part.first for part in parts])
        pieces: list[np.ndarray] = []
        starts: list[int] = []
        at = 0
        for part, ids in zip(parts, found, strict=True):
            if part.first:
                starts.append(at)
                pieces += self._bos
                at += len(self._bos)
            pieces.append(ids)
            at += len(ids)
            if part.last:
                pieces += self._eos
                at += len(self._eos)
        together = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        if len(together) and not 0 <= together.min() <= together.max() < self.tokenizer.vocab_size:
            for part, ids in zip(parts, found, strict=True):
                check_ids(ids, self.tokenizer, part.where)
        return Encoded(together.astype(self._dtype, copy=False), np.asarray(starts, np.int64))


def _one(mark: int | None) -> list[np.ndarray]:
    return [] if mark is None else [np.asarray([mark], np.int32)]


def _texts(task: Task, reader: RowReader | None) -> Iterator[Part]:
    for part in task:
        if isinstance(part, Part):
            if part.text or not (part.first and part.last):
                yield part
            elif reader is not None:
                reader.notice_empty(part.where)
            continue
        assert reader is not None and not isinstance(part, TableRow)  # tables of texts are read where they are met
        for row in part.rows() if isinstance(part, UnreadLines) else (part,):
            if text := reader.text(row):
                yield Part(row.where, text, True, True)
