"""Tokenization of documents in processes, in order: the ids are those of one process, whatever the number of workers.

A document may come in several blocks. It is cut where the tokenizer knows that the parts encode as the whole does
(``last_cut``), never anywhere else, so the blocks' borders leave no trace in the ids.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from telechat_twins.core.data.forms.json_rows import UnreadRow
from telechat_twins.core.errors import UserError

if TYPE_CHECKING:
    from telechat_twins.core.data.rows import RowReader
    from telechat_twins.core.data.tokenizer import Tokenizer

# Characters, or bytes of unread rows, of a task: enough to make the way to another process short, few enough that
# little waits in memory.
_TASK = 1 << 20
_UNCUT = 1 << 24  # characters of a document that are held until a place to cut is found
_WATCH_S = 1.0


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


@dataclass(frozen=True)
class _Part:
    where: str
    text: str
    first: bool
    last: bool


_Task = Sequence[_Part | UnreadRow]


@dataclass(frozen=True)
class Encoded:
    """Ids (int32) of parts of documents one after the other; the parts of one document follow each other.

    ``sizes``: how many ids each part has; ``first``: whether it begins a document, ``last``: whether it ends one.
    """

    parts: _Task
    ids: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def where(self, part: int) -> str:
        """The place of a part, for messages."""
        return self.parts[part].where


def encode_blocks(
    blocks: Iterable[TextBlock | UnreadRow], tokenizer: Tokenizer, workers: int = 1, reader: RowReader | None = None
) -> Iterator[Encoded]:
    """The ids of documents, in the order of ``blocks``, by ``workers`` processes beside this one (1: by this one).

    ``reader`` has the texts of unread rows; a row without text is no document. UserError for a document that has to be
    cut for its length and cannot be cut exactly, and of ``reader``: always that of the first row at fault.
    """
    tasks = _tasks(_parts(blocks, tokenizer))
    first = next(tasks, None)
    second = next(tasks, None)
    ahead = [task for task in (first, second) if task is not None]
    if workers == 1 or second is None:  # processes would take longer to start than to work
        for task in chain(ahead, tasks):
            yield _encoded(task, *_encode(tokenizer, reader, task))
        return
    yield from _in_processes(chain(ahead, tasks), tokenizer, workers, reader)


def _parts(blocks: Iterable[TextBlock | UnreadRow], tokenizer: Tokenizer) -> Iterator[_Part | UnreadRow]:
    rest, where, first = "", "", True
    for block in blocks:
        if isinstance(block, UnreadRow):
            yield block
            continue
        if block.first:
            rest, where, first = "", block.where, True
        text = rest + block.text
        if block.last:
            yield _Part(where, text, first, True)
            rest = ""
            continue
        cut = tokenizer.last_cut(text)
        if cut:
            yield _Part(where, text[:cut], first, False)
            where, first = block.where, False
        elif len(text) > _UNCUT:
            raise UserError(
                f"{where}: more than {_UNCUT} characters of one document, which this tokenizer cannot encode in parts "
                "exactly; split the document"
            )
        rest = text[cut:]


def _tasks(parts: Iterable[_Part | UnreadRow]) -> Iterator[_Task]:
    task: list[_Part | UnreadRow] = []
    size = 0
    for part in parts:
        task.append(part)
        size += len(part.data if isinstance(part, UnreadRow) else part.text)
        if size >= _TASK or len(task) >= 4096:
            yield task
            task, size = [], 0
    if task:
        yield task


def _encode(tokenizer: Tokenizer, reader: RowReader | None, task: _Task) -> tuple[np.ndarray, np.ndarray]:
    """All ids of a task, int32, and how many each part has; -1 for a row without text."""
    texts, starts = [], []
    for part in task:
        if isinstance(part, UnreadRow):
            assert reader is not None
            texts.append(reader.text(part))
            starts.append(True)
        else:
            texts.append(part.text)
            starts.append(part.first)
    found = tokenizer.encode_batch(texts, starts)
    sizes = np.fromiter(map(len, found), np.int64, len(found))
    for number, part in enumerate(task):
        if not texts[number] and isinstance(part, UnreadRow):
            sizes[number] = -1
    return np.concatenate(found).astype(np.int32, copy=False), sizes


def _encoded(task: _Task, ids: np.ndarray, sizes: np.ndarray) -> Encoded:
    if (sizes < 0).any():
        task = [part for part, size in zip(task, sizes.tolist(), strict=True) if size >= 0]
        sizes = sizes[sizes >= 0]
    first = np.array([isinstance(part, UnreadRow) or part.first for part in task], bool)
    last = np.array([isinstance(part, UnreadRow) or part.last for part in task], bool)
    return Encoded(task, ids, sizes, first, last)


def _in_processes(
    tasks: Iterator[_Task], tokenizer: Tokenizer, workers: int, reader: RowReader | None
) -> Iterator[Encoded]:
    tokenizer.encode_batch([""], [False])  # what is found out once about the tokenizer, before it is in every process
    # Forked, so that the workers have the tokenizer without reading it again and import nothing.
    about = (tokenizer, reader, os.getpid())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _adopt, about)
    waiting: deque[tuple[_Task, Future[_Found]]] = deque()
    error: UserError | None = None
    try:
        while task := _next(tasks):
            if isinstance(task, UserError):  # what was read before it may be at fault, too
                error = task
                break
            waiting.append((task, pool.submit(_work, [_wire(part) for part in task])))
            if len(waiting) > workers + 1:
                yield _result(*waiting.popleft(), reader)
        while waiting:
            yield _result(*waiting.popleft(), reader)
        if error is not None:
            raise error
    except BrokenProcessPool:
        raise UserError("tokenizing: a worker process ended, perhaps for lack of memory; use fewer --threads") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(tasks: Iterator[_Task]) -> _Task | UserError | None:
    try:
        return next(tasks, None)
    except UserError as error:
        return error


_Wire = tuple[str, bool] | tuple[Path, int, int, bytes]  # a part, an unread row
_Found = tuple[bytes, bytes, "RowReader | None"]


def _wire(part: _Part | UnreadRow) -> _Wire:
    """What another process needs, of types that travel quickly."""
    if isinstance(part, UnreadRow):
        return part.path, part.line, part.item, part.data
    return part.text, part.first


def _result(task: _Task, future: Future[_Found], reader: RowReader | None) -> Encoded:
    ids, sizes, read = future.result()
    if reader is not None and read is not None:
        reader.absorb(read)
    return _encoded(task, np.frombuffer(ids, np.int32), np.frombuffer(sizes, np.int64))


_adopted: list[tuple[Tokenizer, RowReader | None]] = []


def _adopt(tokenizer: Tokenizer, reader: RowReader | None, parent: int) -> None:
    """In a worker: keep the tokenizer and the reader, leave Ctrl-C to the parent, and end when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the parent's handlers would print a worker's stack
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.SIG_DFL)
    _adopted[:] = [(tokenizer, reader)]

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    with contextlib.suppress(RuntimeError):
        threading.Thread(target=watch, daemon=True).start()


def _work(wired: Sequence[_Wire]) -> _Found:
    tokenizer, reader = _adopted[0]
    read = reader.fresh() if reader is not None else None
    task = [_Part("", *one, True) if len(one) == 2 else UnreadRow(*one) for one in wired]
    ids, sizes = _encode(tokenizer, read, task)
    return ids.tobytes(), sizes.tobytes(), read
