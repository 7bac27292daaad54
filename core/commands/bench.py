"""``tele bench``: measurements. ``tele bench step`` times a training step of both backends, in turns."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from core import backends
from core.atomic import writable_file, write_text
from core.bench_worker import bench_config
from core.config import PRECISIONS, preset_names
from core.errors import UserError
from core.metrics import flops_per_token
from core.params import count_parameters

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele bench``."""
    parser.add_argument("what", choices=("step",), help="step: a whole optimizer step, MindSpore and PyTorch in turns")
    parser.add_argument(
        "--model", default="telechat2-tiny", metavar="PRESET", help=f"one of {', '.join(preset_names())}"
    )
    parser.add_argument("--seq-len", type=int, default=128, metavar="S", help="tokens a sequence (128)")
    parser.add_argument("--micro-batch", type=int, default=4, metavar="B", help="sequences a forward pass (4)")
    parser.add_argument(
        "--micro-batches", type=int, default=1, metavar="M", help="forward passes an optimizer step (1)"
    )
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="steps measured of each backend (30)")
    parser.add_argument(
        "--block", type=int, default=5, metavar="K", help="steps of one backend before the other's turn (5)"
    )
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="arithmetic (fp32)")
    parser.add_argument(
        "--backends", nargs="+", choices=sorted(backends.BACKENDS), default=["ms", "pt"], help="who (ms pt)"
    )
    parser.add_argument("--out", metavar="FILE", help="also write everything measured as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print a Markdown table."""
    for name in ("seq_len", "micro_batch", "micro_batches", "steps", "block"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {getattr(args, name)}")
    options = {name: getattr(args, name) for name in ("model", "seq_len", "micro_batch", "micro_batches", "precision")}
    bench_config(options)  # a mistake is told here, once, and not by two workers
    if args.out:
        writable_file(args.out, "--out")
    result = measure(options, list(dict.fromkeys(args.backends)), args.steps, args.block)
    print(to_markdown(result))
    if args.out:
        write_text(Path(args.out), json.dumps(result, indent=1) + "\n")
    return 0


def measure(options: dict[str, Any], names: list[str], steps: int, block: int) -> dict[str, Any]:
    """Start a process per backend, then let them work in turns: one uncounted block each, then blocks until ``steps``.

    The order within a round alternates, so that neither backend always follows the other.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    rounds = -(-steps // block)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_Worker(name, options)) for name in names}
        losses = {name: worker.steps(block)["loss"] for name, worker in workers.items()}
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                seconds[name].append(workers[name].steps(min(block, steps - turn * block))["seconds"])
        made = {name: worker.implementation for name, worker in workers.items()}
    config = bench_config(options)
    tokens = config.train.global_batch * config.data.seq_len
    return {
        "options": options,
        "machine": {"cores": os.cpu_count(), "processor": _processor()},
        "parameters": count_parameters(config.model),
        "tokens_per_step": tokens,
        "flops_per_step": tokens * flops_per_token(config.model, config.data.seq_len),
        "backends": {
            name: {"implementation": made[name], "loss_after_warm_up": losses[name], "seconds": seconds[name]}
            for name in names
        },
        **({"ratio": spread(paired_ratios(seconds[names[0]], seconds[names[1]]))} if len(names) == 2 else {}),
    }


def paired_ratios(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[float]:
    """Median step time of ``first`` over that of ``second``, round by round."""
    return [statistics.median(a) / statistics.median(b) for a, b in zip(first, second, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the range that holds the middle four fifths."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return {"median": statistics.median(ordered), "low": ordered[cut], "high": ordered[-1 - cut]}


def to_markdown(result: dict[str, Any]) -> str:
    """A table a backend a row, and the ratio."""
    options, tokens = result["options"], result["tokens_per_step"]
    lines = [
        f"`{options['model']}` ({result['parameters']:,} parameters), {options['precision']}, "
        f"{options['micro_batches']} x {options['micro_batch']} x {options['seq_len']} tokens a step; "
        f"{result['machine']['cores']} cores of {result['machine']['processor']}; backends in turns, both warm.",
        "",
        "| backend | device | step, median | middle 80 % | tokens/s | model GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for measured in result["backends"].values():
        times = spread([s for block in measured["seconds"] for s in block])
        median = times["median"]
        made = measured["implementation"]
        cells = [
            made["backend"],
            made["device"],
            f"{median * 1e3:.1f} ms",
            f"{times['low'] * 1e3:.1f} to {times['high'] * 1e3:.1f} ms",
            f"{tokens / median:,.0f}",
            f"{result['flops_per_step'] / median / 1e9:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "ratio" in result:
        first, second = (backends.TITLES[name] for name in result["backends"])
        ratio = result["ratio"]
        lines += [
            "",
            f"{first} takes {ratio['median']:.2f} times {second}'s step time "
            f"(rounds: {ratio['low']:.2f} to {ratio['high']:.2f}).",
        ]
    return "\n".join(lines)


class _Worker:
    """A core.bench_worker process; ended when the ``with`` block is left.

    Between its turns it is stopped by SIGSTOP: idle thread pools of either framework spin, and on few cores they would
    take the time of the one that is being measured.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "core.bench_worker", name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Sleeping instead of spinning OpenMP threads for both (MindSpore's side sets it anyway): with one foreign
            # process on 2 cores, spinning made PyTorch's step tens of times slower. A value set by the user wins.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        self.implementation: dict[str, str] = self._answer()["ready"]
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def steps(self, count: int) -> dict[str, Any]:
        """Make ``count`` steps now, while every other worker waits; {"seconds": [...], "loss": ...}."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"steps": count}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the {backends.TITLES[self.name]} worker ended with code {self._process.wait()}; its message is above"
            )
        return json.loads(line)


def _processor() -> str:
    """The processor's own name where the system tells it (Linux), else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
