"""Checkpoint benchmark (``tele bench save``): saving and verified loading, against the safetensors library.

Both save the same arrays to the working folder's disk and read them back, in turns. The library writes one file without
a hash and does not wait for the disk; a checkpoint is hashed, synced and renamed, and its hashes are checked when it is
read. A checkpoint is written past the page cache, in which the library's file stays, so both are read twice: from the
disk, with their pages given up before, and from the page cache. Times are of the wall clock and of the process's
threads together.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import starmap
from pathlib import Path

import numpy as np

from telechat_twins.core.bench.step import machine, processor
from telechat_twins.core.checkpoint.read import Contents, open_checkpoint, whole
from telechat_twins.core.checkpoint.save import Saver
from telechat_twins.core.checkpoint.streams import planned
from telechat_twins.core.types import JsonObject

TENSOR = (1024, 4096)  # float32, 16.8 MB
TITLES = {
    "ours_save": "checkpoint, hashed and synced",
    "library_save": "safetensors save_file",
    "synced_save": "safetensors save_file and fsync",
    "ours_load": "checkpoint, verified and read from the disk",
    "library_load": "safetensors load_file from the disk",
    "ours_cached": "checkpoint, verified and read from the page cache",
    "library_cached": "safetensors load_file from the page cache",
    "begin": "asynchronous save, until training goes on",
}
# Ratios of wall times.
RATIOS = {
    "save / save_file": ("ours_save", "library_save"),
    "save / save_file and fsync": ("ours_save", "synced_save"),
    "load / load_file from the disk": ("ours_load", "library_load"),
    "from the page cache": ("ours_cached", "library_cached"),
}


def measure_saving(size: int, rounds: int) -> JsonObject:
    """Save and load about ``size`` bytes ``rounds`` times; medians of (wall, processor) seconds by operation."""
    from safetensors.numpy import load_file, save_file

    random = np.random.default_rng(0)
    count = max(3, size // (4 * TENSOR[0] * TENSOR[1]))
    arrays = {f"t{i}": random.random(TENSOR, np.float32) for i in range(count)}
    weights = list(arrays.items())[: count // 3]  # of a training checkpoint m and v are two thirds
    states = list(arrays.items())[count // 3 :]
    plans = {"weights": planned(starmap(whole, weights)), "optimizer": planned(starmap(whole, states))}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in TITLES}
    with tempfile.TemporaryDirectory(prefix="tele-bench-save-", dir=Path.cwd()) as name:
        folder = Path(name)

        def ours(asynchronous: bool = False) -> Saver:
            saver = Saver()
            contents = Contents({"config": {}}, weights, states, planned=None if asynchronous else plans)
            saver.save(folder / "run", 1, contents, keep_last=1, asynchronous=asynchronous)
            return saver

        def read() -> None:
            found = open_checkpoint(folder / "run")
            for kind in ("weights", "optimizer"):
                for tensor in found.names(kind):
                    found.read(kind, tensor)

        plain = folder / "plain.safetensors"

        def synced() -> None:
            save_file(arrays, plain)
            _sync(plain)

        for _ in range(rounds):
            taken["ours_save"].append(_timed(ours))
            taken["library_save"].append(_timed(lambda: save_file(arrays, plain)))
            taken["synced_save"].append(_timed(synced))
            for key, load, files in (
                ("ours", read, list((folder / "run").rglob("*.safetensors"))),
                ("library", lambda: load_file(plain), [plain]),
            ):
                for path in files:
                    _give_up(path)
                taken[f"{key}_load"].append(_timed(load))
                taken[f"{key}_cached"].append(_timed(load))
            wall, busy = time.perf_counter(), time.process_time()
            saver = ours(True)
            taken["begin"].append((time.perf_counter() - wall, time.process_time() - busy))
            saver.wait()
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in taken.items()
    }
    return {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": processor()},
        "bytes": 4 * TENSOR[0] * TENSOR[1] * count,
        "rounds": rounds,
        "seconds": medians,
        "ratios": {title: medians[one][0] / medians[other][0] for title, (one, other) in RATIOS.items()},
    }


def saving_to_markdown(result: JsonObject) -> str:
    """Markdown table of the operations, and the ratios."""
    size = result["bytes"]
    rows = [
        f"| {title} | {wall:.2f} s | {busy:.2f} s | {size / wall / 1e6:,.0f} MB/s |"
        for title, (wall, busy) in ((TITLES[name], times) for name, times in result["seconds"].items())
    ]
    ratios = "; ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items())
    return "\n".join(
        [
            f"{size / 1e9:.2f} GB in float32; {machine(result)}; {result['rounds']} rounds in turns, medians.",
            "",
            "| operation | time | processor time | rate |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Ratios of times: {ratios}.",
        ]
    )


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    wall, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - busy


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _give_up(path: Path) -> None:
    """Take a file's pages out of the page cache; only synced ones can be taken."""
    _sync(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
