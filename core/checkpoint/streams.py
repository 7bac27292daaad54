"""Streams of checkpoint pieces: counted, taken in turns, and copied for an asynchronous save."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np

from telechat_twins.core.checkpoint.pieces import TensorPiece, Tensors, whole


class Stream:
    """A stream of pieces that knows the bytes that passed, so that a failed save can say what it would take.

    ``size``: all bytes that will, where they are known and the stream takes turns with others.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = iter(tensors)
        self._bytes = 0
        self.size: int | None = None

    @property
    def share(self) -> float:
        """What of it has passed; 0 to its end where it takes no turns."""
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
        for _ in self:
            pass
        return self._bytes


def in_turns(streams: Mapping[str, Stream]) -> Iterator[tuple[str, TensorPiece]]:
    """The pieces with their kinds: always of the stream of which least has passed, of the first among equals."""
    left = {kind: iter(stream) for kind, stream in streams.items()}
    while left:
        kind = min(left, key=lambda kind: streams[kind].share)
        piece = next(left[kind], None)
        if piece is None:
            del left[kind]
        else:
            yield kind, piece
        del piece


def copied(tensors: Tensors) -> Iterator[TensorPiece]:
    """The pieces with arrays of their own, all made now; each is let go when it has been taken."""
    kept = deque(piece._replace(array=np.array(piece.array)) for piece in Stream(tensors))

    def taken() -> Iterator[TensorPiece]:
        while kept:
            yield kept.popleft()

    return taken()
