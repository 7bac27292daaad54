"""The C++ products built for each instruction set that this processor has, against PyTorch told to use the same.

    python -m tests.campaigns.product_rates [--sets avx2 avx512 ...] [--rounds N] [--sizes M K N]

Prints GFLOP/s by processor time, one thread, medians of calls in turns, for the three products of a linear layer in
float32 and bfloat16, each set in a process of its own. MKL, oneDNN and ATen are told the set by their environment, as
each allows: MKL takes its orders on Intel's processors only. Exit code 1 where float32 is below 0.95 of PyTorch's rate
or bfloat16 below 0.8.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from telechat_twins.kernels.cpu import engine, ops
from telechat_twins.kernels.cpu.build import KERNELS

LEAST = {"fp32": 0.95, "bf16": 0.8}
_PART = 0.05  # seconds of calls that are timed together, so that the clock's steps do not count


class Instructions(NamedTuple):
    """What a processor must have, what our library is built without, and what PyTorch's libraries are told."""

    needs: str
    without: str
    told: dict[str, str]


SETS = {
    "avx2": Instructions(
        "avx2",
        "-mno-avx512f",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    ),
    "avx512": Instructions(
        "avx512f",
        "-mno-amx-tile -mno-avx512bf16",
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    ),
    "avx512-bf16": Instructions("avx512_bf16", "-mno-amx-tile", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "amx": Instructions("amx_bf16", "", {}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs=3, default=[1024, 512, 1536], metavar=("M", "K", "N"))
    parser.add_argument("--here", choices=list(SETS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return measure(args.here, args.sizes, args.rounds)
    features = Path("/proc/cpuinfo").read_text().split()
    code = 0
    for name in args.sets:
        if SETS[name].needs not in features:
            print(f"{name}: this processor has no {SETS[name].needs}")
            continue
        command = [sys.executable, "-m", "tests.campaigns.product_rates", "--here", name, "--rounds", str(args.rounds)]
        environment = {**os.environ, **SETS[name].told, "OMP_NUM_THREADS": "1"}
        sizes = [str(size) for size in args.sizes]
        code = max(code, subprocess.run([*command, "--sizes", *sizes], env=environment, check=False).returncode)
    return code


def measure(name: str, sizes: list[int], rounds: int) -> int:
    """Print a line for each product with the instructions ``name``; 1 where one is too slow."""
    import torch

    m, k, n = sizes
    torch.set_num_threads(1)
    made = engine.NumpyEngine(*SETS[name].without.split(), sources=KERNELS)
    made.set_threads(1)
    engine.use_engine("numpy", made)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((m, k), (n, k), (m, n))]
    good = True
    for precision, dtype in (("fp32", np.dtype(np.float32)), ("bf16", np.dtype(ml_dtypes.bfloat16))):
        x, w, dy = (on_lines(array.astype(dtype)) for array in arrays)
        kind = torch.float32 if precision == "fp32" else torch.bfloat16
        tx, tw, tdy = (torch.from_numpy(array).to(kind) for array in arrays)
        multiply: Callable[..., Any] = ops.matmul if precision == "fp32" else partial(ops.matmul_bf16, out_dtype=dtype)
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "x W^T": (partial(multiply, x, w), partial(torch.mm, tx, tw.t())),
            "dy W": (partial(multiply, dy, w, turn_w=True), partial(torch.mm, tdy, tw)),
            "dy^T x": (partial(multiply, dy, x, turn_a=True, turn_w=True), partial(torch.mm, tdy.t(), tx)),
        }
        for product, both in pairs.items():
            ours, theirs = in_turns(both, rounds)
            work = 2e-9 * m * k * n
            ratio = theirs / ours
            good &= ratio >= LEAST[precision]
            print(
                f"{name}, {precision}, {product}: {work / ours:.0f} against {work / theirs:.0f} GFLOP/s, {ratio:.2f} "
                f"(at least {LEAST[precision]}){'' if ratio >= LEAST[precision] else ': BROKEN'}",
                flush=True,
            )
    return 0 if good else 1


def on_lines(array: np.ndarray) -> np.ndarray:
    """A copy that begins on a cache line, as both frameworks' tensors do."""
    room = np.empty(array.nbytes + 64, np.uint8)
    begin = -room.ctypes.data % 64
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def in_turns(calls: tuple[Callable[[], Any], ...], rounds: int) -> list[float]:
    """Median seconds of processor time that each call takes."""
    counts = []
    for call in calls:
        call()
        started = time.process_time()
        call()
        counts.append(max(1, int(_PART / max(time.process_time() - started, 1e-6))))
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call, count in zip(found, calls, counts, strict=True):
            started = time.process_time()
            for _ in range(count):
                call()
            times.append((time.process_time() - started) / count)
    return [statistics.median(times) for times in found]


if __name__ == "__main__":
    sys.exit(main())
