"""Tokenization of documents in processes, in order: the ids are those of one process, whatever the number of processes.

This process hands out tasks, encodes others itself, and takes the results in order. The others get lines of a file by
their place and read them themselves; what has no place in a file, and all ids, pass through memory that is shared, so
that nobody waits for a pipe to be emptied.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from telechat_twins.core.data.encoders.tasks import Encoded, Given, Reader, Task, TaskEncoder, make_tasks
from telechat_twins.core.data.encoders.wire import from_bytes, to_bytes
from telechat_twins.core.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

_AHEAD = 4  # tasks that a process has at once, those included whose ids are not yet taken
_OWN = 1 << 25  # bytes of ids that this process makes ahead of those of others, which come first
_PLACE = 5 << 20  # bytes for a task on its way, and then for its ids: four for each byte of most texts at worst
_MESSAGE = 1 << 12  # bytes that a pipe takes at once, whoever reads
_LOST = "tokenizing: a worker process ended, perhaps for lack of memory; use fewer --threads"

# number of the task, place, (ids, starts) there or counts of them, what the reader noticed, error
_Found = tuple[int, int, Any, Reader | None, Exception | None]


def encode_blocks(
    blocks: Iterable[Given], encoder: TaskEncoder, processes: int = 1, size: Callable[[], int] | None = None
) -> Iterator[Encoded]:
    """The ids of documents, in the order of ``blocks``, by this process and ``processes`` - 1 others, in tasks of about
    ``size()`` characters.

    What is yielded holds until the next is asked for. UserError as ``make_tasks`` and ``encoder.encode`` have it:
    always that of the first document at fault.
    """
    tasks = make_tasks(blocks, encoder.tokenizer, size)
    first = next(tasks, None)
    try:
        second = next(tasks, None)
    except UserError:
        if first is not None:
            yield encoder.encode(first)  # which may be at fault itself
        raise
    ahead = [task for task in (first, second) if task is not None]
    if processes == 1 or second is None:  # processes would take longer to start than to work
        for task in chain(ahead, tasks):
            yield encoder.encode(task)
        return
    encoder.tokenizer.encode_batch([""], [False])  # what is found out once about the tokenizer, before it is everywhere
    with contextlib.closing(_Pool(encoder, processes - 1)) as pool:
        yield from pool.encode(chain(ahead, tasks))


class _Worker:
    """Another process, the end of the pipe to it, and the places in shared memory that it may be given."""

    def __init__(self, process: ForkProcess, pipe: Connection, places: list[int]):
        self.process, self.pipe, self.free = process, pipe, places
        self.given = 0  # tasks of which nothing came back yet


class _Pool:
    """Processes that encode, forked, so that they have the tokenizer without reading it again and import nothing."""

    def __init__(self, encoder: TaskEncoder, count: int):
        from multiprocessing import Pipe, get_context

        self._encoder = encoder
        self._memory = mmap.mmap(-1, count * _AHEAD * _PLACE)
        self._workers: list[_Worker] = []
        # Done and not yet taken, by number: ids or an error, and whose place they lie in.
        self._done: dict[int, tuple[Encoded | Exception, Reader | None, tuple[_Worker, int] | None]] = {}
        self._own = 0  # bytes of the ids of this process among them
        try:
            for number in range(count):
                ours, theirs = Pipe()
                pipes = [ours, *(worker.pipe for worker in self._workers)]
                process = get_context("fork").Process(
                    target=_serve, args=(theirs, pipes, self._memory, encoder), daemon=True
                )
                process.start()
                theirs.close()
                places = [number * _AHEAD + place for place in range(_AHEAD)]
                self._workers.append(_Worker(process, ours, places))
        except BaseException:
            self.close()
            raise

    def encode(self, tasks: Iterator[Task]) -> Iterator[Encoded]:
        """The ids of tasks in their order."""
        given = taken = 0
        error: UserError | None = None
        task: Task | None = []
        while True:
            self._collect(0)
            while taken in self._done:
                yield from self._take(taken)
                taken += 1
            if task is None and taken == given:
                break
            if task is None or self._own >= _OWN:  # what is to be taken next is with another process
                self._collect(None)
                continue
            try:
                task = next(tasks, None)
            except UserError as wrong:  # what was read before it may be at fault, too
                task, error = None, wrong
            if task is None:
                self._finish()
            else:
                self._give(given, task)
                given += 1
        if error is not None:
            raise error

    def _finish(self) -> None:
        """Let each process end behind its last task: to give its memory back takes it some milliseconds."""
        for worker in self._workers:
            with contextlib.suppress(OSError):  # one that is lost is noticed by what it owes
                worker.pipe.send(None)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def _give(self, number: int, task: Task) -> None:
        """To the process with the least to do, or done here where all have enough, or it does not fit."""
        worker = max(self._workers, key=lambda one: len(one.free))
        if worker.free:
            wired = to_bytes(task)
            if len(wired) <= _PLACE:
                place = worker.free.pop()
                if len(wired) > _MESSAGE:
                    self._memory[place * _PLACE : place * _PLACE + len(wired)] = wired
                try:
                    worker.pipe.send((number, place, wired if len(wired) <= _MESSAGE else len(wired)))
                except OSError:
                    raise UserError(_LOST) from None
                worker.given += 1
                return
        found: Encoded | Exception
        read = _fresh(self._encoder)
        try:
            found = self._encoder.encode(task, read)
            self._own += found.ids.nbytes
        except Exception as error:
            found = error
        self._done[number] = found, read, None

    def _collect(self, seconds: float | None) -> None:
        """What the processes have done so far; with None for ``seconds``, wait until there is something."""
        from multiprocessing.connection import wait

        busy = [worker for worker in self._workers if worker.given]
        ready = wait([worker.pipe for worker in busy], seconds)
        for worker in busy:
            if worker.pipe not in ready:
                continue
            try:
                number, place, ids, read, error = worker.pipe.recv()
            except (EOFError, OSError):
                raise UserError(_LOST) from None
            worker.given -= 1
            found = error or Encoded(*(_arrays(self._memory, place, *ids) if isinstance(ids[0], int) else ids))
            self._done[number] = found, read, (worker, place)

    def _take(self, number: int) -> Iterator[Encoded]:
        found, read, at = self._done.pop(number)
        if isinstance(found, Exception):
            raise found
        if read is not None and self._encoder.reader is not None:
            self._encoder.reader.absorb(read)
        yield found
        if at is None:
            self._own -= found.ids.nbytes
        else:
            worker, place = at
            worker.free.append(place)


def _fresh(encoder: TaskEncoder) -> Reader | None:
    """A reader for a task whose turn has not come; what it notices is to be absorbed in order."""
    return None if encoder.reader is None else encoder.reader.fresh()


def _arrays(memory: mmap.mmap, place: int, ids: int, starts: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a result: the starts come first, so that both are aligned."""
    at = place * _PLACE
    return (
        np.frombuffer(memory, dtype, ids, at + 8 * starts),
        np.frombuffer(memory, np.int64, starts, at),
    )


def _serve(pipe: Connection, others: list[Connection], memory: mmap.mmap, encoder: TaskEncoder) -> None:
    """In a worker: encode what comes until the parent is gone or has enough. Ctrl-C is left to the parent."""
    for other in others:  # so that the pipes end with the parent
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the parent's handlers would print a worker's stack
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # what the parent has made is not looked through again
    with contextlib.suppress(EOFError, OSError):
        while (given := pipe.recv()) is not None:
            number, place, wired = given
            pipe.send(_work(number, place, wired, memory, encoder))


def _work(number: int, place: int, wired: bytes | int, memory: mmap.mmap, encoder: TaskEncoder) -> _Found:
    """``wired``: the task, or how many bytes of it lie in the place."""
    read = _fresh(encoder)
    if isinstance(wired, int):
        wired = memory[place * _PLACE : place * _PLACE + wired]
    try:
        found = encoder.encode(from_bytes(wired), read)
    except Exception as error:
        return number, place, (), None, error
    ids, starts = found.ids, found.starts
    if ids.nbytes + starts.nbytes > _PLACE:
        return number, place, (ids, starts), read, None
    for kept, out in zip((ids, starts), _arrays(memory, place, len(ids), len(starts), ids.dtype.str), strict=True):
        out[:] = kept
    return number, place, (len(ids), len(starts), ids.dtype.str), read, None
