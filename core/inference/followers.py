"""Engine on several ranks: rank 0 schedules and samples and broadcasts each step; the other ranks execute it.

Rank 0 broadcasts each step, which consists of integers only, in a block of fixed size, and what does not fit there in a
second one. The first suffices for some tens of decoding sequences. Rotary tables are not sent: every rank computes them
from positions and lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Protocol

import numpy as np

from telechat_twins.core.checkpoint.source import ReadBox
from telechat_twins.core.inference.runner import Runner, Step
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.model.quantize import LINEAR, Int8Matrix
from telechat_twins.core.model.quantize import quantize as quantized
from telechat_twins.core.parallel.sharding import Shard

WORDS = 1024  # int32 of the first block, its header included
HEADER = 8
STEP, STOP, IDLE = 1, 2, 3


class SharedRunner(Runner, Protocol):
    """A runner whose model is sharded over ranks, all of which call ``run`` with the same steps."""

    def share(self, words: np.ndarray) -> np.ndarray:
        """Broadcast of rank 0's int32 words to every rank; the other ranks pass an array of the same size."""


class Leader:
    """Rank 0's runner for an engine: broadcasts every step to the other ranks, then executes it."""

    def __init__(self, runner: SharedRunner) -> None:
        self.config: ModelConfig = runner.config
        self.num_pages, self.page_size = runner.num_pages, runner.page_size
        self._runner = runner

    def run(self, step: Step) -> np.ndarray:
        first, rest = encode(step)
        self._runner.share(first)
        if rest.size:
            self._runner.share(rest)
        return self._runner.run(step)

    def idle(self) -> None:
        """Broadcast that there is nothing to do, so that no rank waits for longer than a collective may take."""
        words = np.zeros(WORDS, np.int32)
        words[0] = IDLE
        self._runner.share(words)

    def close(self) -> None:
        """Broadcast STOP, which ends ``follow`` on the other ranks."""
        words = np.zeros(WORDS, np.int32)
        words[0] = STOP
        self._runner.share(words)


def follow(runner: SharedRunner) -> None:
    """Loop of the other ranks: execute every step that rank 0 broadcasts, until STOP arrives."""
    while True:
        first = runner.share(np.zeros(WORDS, np.int32))
        if first[0] == STOP:
            return
        if first[0] == IDLE:
            continue
        rest = max(0, int(first[1]) - (WORDS - HEADER))
        more = runner.share(np.zeros(rest, np.int32)) if rest else np.empty(0, np.int32)
        runner.run(decode(first, more))


def encode(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """A step as a first block of WORDS int32, and the words that did not fit.

    Header: STEP, number of words after it, tokens, sequences, pages of the longest sequence, wanted tokens.
    """
    body = np.concatenate([getattr(step, field.name).reshape(-1) for field in fields(step)]).astype(np.int32)
    first = np.zeros(WORDS, np.int32)
    first[:6] = STEP, body.size, len(step.ids), len(step.lengths), step.tables.shape[1], len(step.wanted)
    fitting = min(body.size, WORDS - HEADER)
    first[HEADER : HEADER + fitting] = body[:fitting]
    return first, body[fitting:]


def decode(first: np.ndarray, rest: np.ndarray) -> Step:
    """The step from ``encode``'s two blocks."""
    _, size, tokens, sequences, pages, wanted = first[:6].tolist()
    body = np.concatenate((first[HEADER : HEADER + min(size, WORDS - HEADER)], rest))
    shapes = {
        "ids": (tokens,),
        "positions": (tokens,),
        "scaling_lengths": (tokens,),
        "slots": (tokens,),
        "starts": (sequences + 1,),
        "lengths": (sequences,),
        "tables": (sequences, pages),
        "wanted": (wanted,),
        "adapters": (sequences,),
    }
    parts, at = {}, 0
    for field in fields(Step):
        count = int(np.prod(shapes[field.name]))
        parts[field.name] = body[at : at + count].reshape(shapes[field.name])
        at += count
    return Step(**parts)


def shard_reader(
    config: ModelConfig, table: dict[str, Shard], read: ReadBox, quantize: str = "none"
) -> Callable[[str], np.ndarray | Int8Matrix]:
    """``get(name)``: a rank's shard of each parameter, read by ``read(name, box)``; padding rows of the vocabulary are
    zeros. For int8 a matrix is quantised whole and then cut, so that every layout has the same integers."""
    kinds = {name: spec.kind for name, spec in parameter_table(config).items()}

    def get(name: str) -> np.ndarray | Int8Matrix:
        shard = table[name]
        if quantize == "none" or kinds[name] not in LINEAR:
            return _padded(read(name, shard.index), shard.shape)
        values, factors = quantized(read(name, tuple(slice(0, n) for n in shard.whole)))
        return Int8Matrix(_padded(values[shard.index], shard.shape), _padded(factors[shard.index[0]], shard.shape[:1]))

    return get


def _padded(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if part.shape == shape:
        return part
    whole = np.zeros(shape, part.dtype)
    whole[tuple(slice(0, n) for n in part.shape)] = part
    return whole
