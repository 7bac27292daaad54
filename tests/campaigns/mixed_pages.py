"""Paged attention of one step over sequences of unequal length, against the sum of its parts.

    python -m tests.campaigns.mixed_pages [--backends ms numpy] [--calls N]

The C++ operator on MindSpore's tensors, or on arrays, as PyTorch calls it, in turns: the short sequences, the long one,
and all of them in one step; processor time of the calls, medians, and the ratio, which the goal wants at 1.2 at most.
MindSpore's time includes that of its threads that wait, so its ratio alone says little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from telechat_twins.kernels.cpu import ops

CASES = ((31, 256, 8192), (31, 16, 32768))  # short sequences, their keys, the keys of the long one
HEADS, WIDTH, PAGE = 8, 64, 16


def step(lengths: list[int], backend: str) -> list[Any]:
    """Arguments of ops.paged_attention for one query a sequence, its pages in a mixed order."""
    random, rows = np.random.default_rng(0), len(lengths)
    counts = [-(-length // PAGE) for length in lengths]
    order = np.split(random.permutation(sum(counts)) + 1, np.cumsum(counts)[:-1])
    tables = np.zeros((rows, max(counts)), np.int32)
    for row, pages in enumerate(order):
        tables[row, : len(pages)] = pages
    last = np.array(lengths, np.int32) - 1
    slots = tables[np.arange(rows), last // PAGE] * np.int32(PAGE) + last % PAGE
    shapes = [(1, rows, HEADS, WIDTH)] * 3 + [(1 + sum(counts), PAGE, HEADS, WIDTH)] * 2
    arrays = [random.standard_normal(shape, np.float32) for shape in shapes]
    arrays += [slots, np.arange(rows + 1, dtype=np.int32), last + 1, tables]
    if backend == "ms":
        import mindspore as ms

        return [*map(ms.Tensor, arrays), rows]
    return [*arrays, rows]


def seconds(given: list[Any]) -> float:
    began = time.process_time()
    out = ops.paged_attention(*given)
    if not isinstance(out, np.ndarray):
        out.asnumpy()  # type: ignore[attr-defined]  # waits for MindSpore's queue
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backends", nargs="+", choices=("ms", "numpy"), default=["numpy", "ms"])
    parser.add_argument("--calls", type=int, default=30)
    args = parser.parse_args()
    good = True
    for backend in args.backends:
        for count, short, long in CASES:
            given = [step(lengths, backend) for lengths in ([short] * count, [long], [short] * count + [long])]
            found = [[seconds(one) for one in given] for _ in range(args.calls + 2)][2:]
            parts, alone, mixed = (statistics.median(times) * 1e3 for times in zip(*found, strict=True))
            ratio = statistics.median(row[2] / (row[0] + row[1]) for row in found)
            good = good and ratio <= 1.2
            print(f"{backend}: {count} x {short}: {parts:.2f} ms, {long}: {alone:.2f}, both: {mixed:.2f}, {ratio:.2f}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
