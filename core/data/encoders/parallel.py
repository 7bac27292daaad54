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
from typing import TYPE_CHECKING, Protocol

import numpy as np

from telechat_twins.core.errors import UserError

if TYPE_CHECKING:
    from telechat_twins.core.data.tokenizer import Tokenizer

# Characters of a task: enough to make the way to another process short, few enough that little waits in memory.
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
class Encoded:
    """Ids (int32) of part of a document; the parts of one document follow each other."""

    where: str
    ids: np.ndarray
    first: bool
    last: bool


@dataclass(frozen=True)
class _Part:
    where: str
    text: str
    first: bool
    last: bool


def encode_blocks(blocks: Iterable[TextBlock], tokenizer: Tokenizer, workers: int = 1) -> Iterator[Encoded]:
    """The ids of documents, in the order of ``blocks``, by ``workers`` processes beside this one (1: by this one).

    UserError for a document that has to be cut for its length and cannot be cut exactly.
    """
    tasks = _tasks(_parts(blocks, tokenizer))
    first = next(tasks, None)
    second = next(tasks, None)
    ahead = (task for task in (first, second) if task is not None)
    if workers == 1 or second is None:  # processes would take longer to start than to work
        for task in _chained(ahead, tasks):
            yield from _with_ids(task, _encode(tokenizer, task))
        return
    yield from _in_processes(_chained(ahead, tasks), tokenizer, workers)


def _parts(blocks: Iterable[TextBlock], tokenizer: Tokenizer) -> Iterator[_Part]:
    rest, where, first = "", "", True
    for block in blocks:
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


def _tasks(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    task: list[_Part] = []
    size = 0
    for part in parts:
        task.append(part)
        size += len(part.text)
        if size >= _TASK or len(task) >= 4096:
            yield task
            task, size = [], 0
    if task:
        yield task


def _encode(tokenizer: Tokenizer, task: Sequence[_Part]) -> list[np.ndarray]:
    return tokenizer.encode_batch([part.text for part in task], [part.first for part in task])


def _with_ids(task: Sequence[_Part], found: Sequence[np.ndarray]) -> Iterator[Encoded]:
    for part, ids in zip(task, found, strict=True):
        yield Encoded(part.where, ids, part.first, part.last)


def _chained(*tasks: Iterable[list[_Part]]) -> Iterator[list[_Part]]:
    for some in tasks:
        yield from some


def _in_processes(tasks: Iterator[list[_Part]], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    tokenizer.encode_batch([""], [False])  # what is found out once about the tokenizer, before it is in every process
    # Forked, so that the workers have the tokenizer without reading it again and import nothing.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _adopt, (tokenizer, os.getpid()))
    waiting: deque[tuple[list[_Part], Future[tuple[bytes, list[int]]]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(_work, [(part.text, part.first) for part in task])))
            if len(waiting) > workers + 1:
                yield from _result(*waiting.popleft())
        while waiting:
            yield from _result(*waiting.popleft())
    except BrokenProcessPool:
        raise UserError("tokenizing: a worker process ended, perhaps for lack of memory; use fewer --threads") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(task: list[_Part], future: Future[tuple[bytes, list[int]]]) -> Iterator[Encoded]:
    data, sizes = future.result()
    ids = np.frombuffer(data, np.int32)
    return _with_ids(task, np.split(ids, np.cumsum(sizes)[:-1]))


_adopted: list[Tokenizer] = []


def _adopt(tokenizer: Tokenizer, parent: int) -> None:
    """In a worker: keep the tokenizer, leave Ctrl-C to the parent, and end when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the parent's handlers would print a worker's stack
        signal.signal(number, signal.SIG_DFL)
    _adopted[:] = [tokenizer]

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    with contextlib.suppress(RuntimeError):
        threading.Thread(target=watch, daemon=True).start()


def _work(texts: list[tuple[str, bool]]) -> tuple[bytes, list[int]]:
    found = _adopted[0].encode_batch([text for text, _ in texts], [first for _, first in texts])
    return b"".join(ids.astype(np.int32, copy=False).tobytes() for ids in found), [len(ids) for ids in found]
