"""Benchmark of `tele grow` against the disk: growing a checkpoint and writing as many plain bytes, in turns."""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from telechat_twins.core.checkpoint.read import write_checkpoint
from telechat_twins.core.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.params import count_parameters, parameter_table
from telechat_twins.core.types import JsonObject

# 2 GB with m and v, which grows to about twice as much.
SOURCE: JsonObject = {
    "preset": "telechat2-mini",
    "hidden_size": 1024,
    "num_heads": 16,
    "num_kv_heads": 4,
    "ffn_hidden_size": 3072,
    "num_layers": 13,
    "vocab_size": 4096,
}
TARGET = ("hidden_size=1280", "num_heads=20", "num_kv_heads=5", "ffn_hidden_size=4096", "num_layers=16")
BLOCK = 4 << 20
_COMMAND = """\
import sys
from pathlib import Path
from telechat_twins.core.cli import main

code = main(sys.argv[1:])
print(Path("/proc/self/status").read_text())
sys.exit(code)
"""


def measure_growth(rounds: int) -> JsonObject:
    """Time of ``tele grow`` in its own process, with its peak memory, against that of writing and syncing as many bytes
    to the same disk, in turns; medians in seconds, and the ratio of each round."""
    config = load_model_config(SOURCE)
    with tempfile.TemporaryDirectory(prefix="tele-bench-grow-", dir=Path.cwd()) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        _write_source(source, config)
        size, grow, plain, peaks = 0, [], [], []
        # Every turn follows the writing and removal of as many bytes, which leaves free memory for the page cache (of
        # the kernel, and of the host of a virtual machine). This write does the same for the first turn.
        _write(Path(folder) / "plain", 2 * 12 * count_parameters(config))
        for _ in range(rounds):
            seconds, peak = _grow(source, target)
            size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
            subprocess.run(["rm", "-rf", str(target)], check=True)
            grow.append(seconds)
            peaks.append(peak)
            plain.append(_write(Path(folder) / "plain", size))
    ratios = [disk / seconds for disk, seconds in zip(plain, grow, strict=True)]
    return {
        "parameters": count_parameters(config),
        "source_bytes": 12 * count_parameters(config),
        "grown_bytes": size,
        "rounds": rounds,
        "grow_s": statistics.median(grow),
        "disk_s": statistics.median(plain),
        "share_of_disk": statistics.median(ratios),
        "shares": ratios,
        "peak_bytes": max(peaks),
    }


def growth_to_markdown(result: JsonObject) -> str:
    """Markdown report of the measurement."""
    shares = ", ".join(f"{share:.0%}" for share in result["shares"])
    return (
        f"`tele grow`, {result['source_bytes'] / 1e9:.1f} GB to {result['grown_bytes'] / 1e9:.1f} GB "
        f"({result['parameters']:,} parameters, m and v), {result['rounds']} rounds in turns:\n\n"
        f"| | seconds | written |\n|---|---|---|\n"
        f"| tele grow | {result['grow_s']:.1f} | {result['grown_bytes'] / result['grow_s'] / 1e6:.0f} MB/s |\n"
        f"| writing as many bytes and syncing them | {result['disk_s']:.1f} | "
        f"{result['grown_bytes'] / result['disk_s'] / 1e6:.0f} MB/s |\n\n"
        f"Share of the disk's rate: {result['share_of_disk']:.0%} (rounds: {shares}); growing also reads, checks and "
        f"hashes the source. Peak memory {result['peak_bytes'] / 2**20:.0f} MiB."
    )


def _write_source(folder: Path, config: ModelConfig) -> None:
    random = np.random.default_rng(0)

    def tensors(prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in parameter_table(config).items():
            yield prefix + name, random.random(spec.shape, np.float32) - 0.5

    run = RunConfig(
        model=config,
        data=DataConfig(sources=[], seq_len=2),
        train=TrainConfig(steps=2, global_batch=1, micro_batch=1),
        optim=OptimConfig(lr=1e-3),
    )
    write_checkpoint(
        folder,
        1,
        model={"config": config.to_dict()},
        weights=tensors(""),
        optimizer=itertools.chain(tensors("m."), tensors("v.")),
        trainer={"step": 1, "optimizer_steps": 1, "config": run.to_dict()},
    )


def _grow(source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak memory in bytes of the command. The command itself reports its peak, since wait4's figure for a
    forked child starts from its parent's."""
    command = [sys.executable, "-c", _COMMAND, "grow", str(source), str(target), "--set", *TARGET]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB$", done.stdout, re.MULTILINE)
    return seconds, int(peak) * 1024


def _write(path: Path, size: int) -> float:
    """Seconds to write and sync ``size`` incompressible bytes; the file is removed afterwards."""
    block = np.random.default_rng(1).bytes(BLOCK)
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds
