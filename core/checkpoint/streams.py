"""Streams of checkpoint pieces: counting, interleaving, planning, and copying for an asynchronous save."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from telechat_twins.core.checkpoint.pieces import PieceSpec, Planned, TensorPiece, Tensors, whole


class Stream:
    """A stream of pieces that counts their bytes, so that a failed save can report the space it needs.

    ``size``: total bytes of the stream, if known; needed to take turns with other streams.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = iter(tensors)
        self._bytes = 0
        self.size: int | None = None

    @property
    def share(self) -> float:
        """Fraction of the stream that has passed; 0 throughout without ``size``."""
        if self.size is None:
            return 0.0
        return self._bytes / self.size if self.size else 1.0

    def __iter__(self) -> Iterator[TensorPiece]:
        for item in self._tensors:
            piece = item if isinstance(item, TensorPiece) else whole(*item)
            del item
            self._bytes += piece.array.nbytes
            yield piece
            del piece

    def drain(self) -> int:
        """Consume the rest of the stream. Returns its total bytes."""
        for _ in self:
            pass
        return self._bytes


def in_turns(streams: Mapping[str, Stream]) -> Iterator[tuple[str, TensorPiece]]:
    """The pieces of all streams with their kinds: each time from the stream of which the smallest fraction has passed,
    the first among equals."""
    left = {kind: iter(stream) for kind, stream in streams.items()}
    while left:
        kind = min(left, key=lambda kind: streams[kind].share)
        piece = next(left[kind], None)
        if piece is None:
            del left[kind]
        else:
            yield kind, piece
        del piece


def copied(tensors: Tensors) -> tuple[Iterator[TensorPiece], Planned]:
    """The pieces with copied arrays, and their plan. All copies are made at once, by as many threads as there are
    processors, at most four (faults on new memory take longer than the copying); each is released after it has been
    taken."""
    count = min(4, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(count, "copy-tensor") as pool:
        copies: deque[Future[TensorPiece]] = deque()
        for piece in Stream(tensors):
            if len(copies) >= 2 * count:  # pieces that their stream makes itself must not all wait to be copied
                copies[-2 * count].result()
            copies.append(pool.submit(_copy, piece))
        kept = deque(copy.result() for copy in copies)
    plan = planned(kept)

    def taken() -> Iterator[TensorPiece]:
        while kept:
            yield kept.popleft()

    return taken(), plan


def _copy(piece: TensorPiece) -> TensorPiece:
    return piece._replace(array=np.array(piece.array))


def planned(pieces: Iterable[TensorPiece]) -> Planned:
    """The plan of pieces that are all there, for a writer past the page cache."""
    # A rank's empty part of a tensor that is not empty is not written (PieceWriter.add).
    written = [piece for piece in pieces if piece.array.size or 0 in piece.shape]
    specs = [PieceSpec(p.name, p.array.dtype, tuple(p.offset), p.array.shape, tuple(p.shape)) for p in written]
    return Planned(specs, sum(spec.nbytes for spec in specs))
