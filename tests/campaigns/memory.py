"""Memory of long training runs: both twins train a very small model for many steps, side by side, and are weighed.

    python -m tests.campaigns.memory --steps 20000 --out report.json     (make campaign-memory)

Each twin is a process of its own that trains with the loop of `tele train` (blend, records, checkpoints) and samples
itself: anonymous memory as the kernel counts it, and the bytes that malloc has given out and not got back, which show a
leak of a few bytes a step before a page is added. The promise is that the second half of the run adds less than
``ALLOWED`` bytes a step to either. ``--part`` repeats one piece of a step only, to find which one a leak belongs to.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.launch.worker import die_with_parent
from telechat_twins.core.model.config import PRECISIONS
from telechat_twins.core.train import loop
from tests.support.packed import write_packed

BACKENDS = ("ms", "pt")
PARTS = ("loop", "gradients", "forward", "norm", "data")
ALLOWED = 100.0  # bytes a step; MindSpore 2.9.0 kept 11,000 and more before its operators were chosen with care
SAMPLES, LEAST = 40, 2000
VOCAB, SEQ_LEN = 64, 16


class _Malloc(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def sample(step: int) -> dict[str, int]:
    """Bytes of this process: ``anonymous`` and ``resident`` (kernel), ``malloc`` (in use), and Python's objects."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Malloc
    counted = libc.mallinfo2()
    found = {"step": step, "malloc": counted.uordblks + counted.hblkhd, "objects": len(gc.get_objects())}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, *value = line.split()
        if name in ("Rss:", "Anonymous:"):
            found["resident" if name == "Rss:" else "anonymous"] = int(value[0]) * 1024
    return found


def config(folder: Path, steps: int, every: int, precision: str = "fp32") -> RunConfig:
    """A run on ``folder``'s data whose steps take a few milliseconds."""
    shape = dict(vocab_size=VOCAB, hidden_size=16, ffn_hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    lengths = dict(training_seqlen=SEQ_LEN, base_seqlen=SEQ_LEN, max_seqlen=SEQ_LEN)
    return run_config_from_dict(
        {
            "model": {**shape, **lengths, "norm_eps": 1e-5},
            "data": {"sources": [{"path": str(folder)}], "seq_len": SEQ_LEN},
            "train": {"steps": steps, "global_batch": 2, "micro_batch": 1, "precision": precision},
            "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
            "checkpoint": {"every": every, "keep_last": 1},
        }
    )


def work(backend: str, part: str, precision: str, steps: int, every: int, folder: Path) -> None:
    """Train in this process on ``folder``/data; a line of JSON in ``folder``/BACKEND.jsonl every ``every`` steps."""
    die_with_parent()
    package = {"ms": "telechat_twins.telechat_ms", "pt": "telechat_twins.pt_reference"}[backend]
    trainer: Any = importlib.import_module(f"{package}.train").Trainer
    run = config(folder / "data", steps, max(every, steps // 4), precision)
    with (folder / f"{backend}.jsonl").open("w", encoding="utf-8") as log:

        def weigh(step: int) -> None:
            if step % every == 0:
                log.write(json.dumps(sample(step)) + "\n")
                log.flush()

        class Watched(trainer):  # type: ignore[misc]
            def update(self, lr: float, grad_scale: float) -> None:
                super().update(lr, grad_scale)
                weigh(self.step)

        if part == "loop":
            loop.train(cast(Callable[[RunConfig], loop.Stepper], Watched), run, folder / backend)
        else:
            _repeat(part, trainer(run), run, steps, weigh)


def _repeat(part: str, stepper: Any, run: RunConfig, steps: int, weigh: Callable[[int], None]) -> None:
    """One piece of a step, ``steps`` times, on the same batch where it needs one."""
    blend = loop.open_blend(run.data, run.train.seed, run.model.num_tokens, run.model.filler_id)
    batch = blend.batch(0, run.train.global_batch)
    stepper.gradients(batch, batch.num_targets, 1.0)
    for step in range(1, steps + 1):
        if part == "data":
            blend.batch(step * run.train.global_batch, run.train.global_batch)
        elif part == "norm":
            stepper.grad_norm(1.0)
        elif part == "forward":
            stepper.gradients(batch, batch.num_targets, 1.0, backward=False)
        else:
            stepper.gradients(batch, batch.num_targets, 1.0)
            stepper.discard()
        weigh(step)


def growth(samples: Sequence[dict[str, int]], what: str) -> float:
    """Bytes a step that ``what`` grew by between the middle and the end."""
    half = [row for row in samples if row["step"] >= samples[-1]["step"] / 2]
    return (half[-1][what] - half[0][what]) / (half[-1]["step"] - half[0]["step"])


def verdict(backend: str, samples: Sequence[dict[str, int]]) -> dict[str, Any]:
    """The figures of one twin, and whether it keeps the promise."""
    grown = {what: growth(samples, what) for what in ("anonymous", "malloc", "objects")}
    first, last = samples[0], samples[-1]
    return {
        "backend": backend,
        "steps": last["step"],
        "anonymous_mib": [round(row["anonymous"] / 2**20, 1) for row in (first, last)],
        "bytes_a_step": grown,
        "kept": grown["anonymous"] <= ALLOWED and grown["malloc"] <= ALLOWED,
        "samples": list(samples),
    }


def campaign(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train the twins side by side and judge what they sampled."""
    every = max(1, args.steps // SAMPLES)
    with tempfile.TemporaryDirectory(prefix="tele-memory-") as name:
        folder = Path(name)
        write_packed(folder / "data", VOCAB, SEQ_LEN, 2000, args.seed)
        given = ["--part", args.part, "--precision", args.precision, "--steps", str(args.steps), "--every", str(every)]
        running = {}
        for backend in args.backend or BACKENDS:
            command = [sys.executable, "-m", "tests.campaigns.memory", "--work", str(folder), "--backend", backend]
            log = (folder / f"{backend}.log").open("w")
            running[backend] = subprocess.Popen([*command, *given], stdout=log, stderr=subprocess.STDOUT)
        try:
            while any(process.poll() is None for process in running.values()):
                time.sleep(1.0)
                if sys.stderr.isatty():
                    done = "  ".join(f"{b} {_steps(folder / f'{b}.jsonl'):,}" for b in running)
                    print(f"\r{done} of {args.steps:,} steps", end="", file=sys.stderr, flush=True)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        found = []
        for backend, process in running.items():
            if process.returncode:
                raise SystemExit(
                    f"{backend}: ended with {process.returncode}:\n{(folder / f'{backend}.log').read_text()}"
                )
            found.append(verdict(backend, [json.loads(line) for line in (folder / f"{backend}.jsonl").open()]))
        return found


def _steps(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", "--trials", type=int, default=20000, help=f"default 20,000; at least {LEAST:,}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="one twin only (default: both)")
    parser.add_argument("--part", choices=PARTS, default="loop")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--out", type=Path, metavar="FILE", help="every sample, as JSON")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--every", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work is not None:
        work(args.backend[0], args.part, args.precision, args.steps, args.every, args.work)
        return 0
    if args.steps < LEAST:
        print(f"{args.steps} steps would weigh what a process sets up; {LEAST:,} it is", file=sys.stderr)
        args.steps = LEAST
    found = campaign(args)
    print(f"{'twin':<6}{'steps':>8}{'MiB, first':>12}{'last':>8}{'bytes a step, 2nd half':>24}{'malloc':>8}{'kept':>6}")
    for row in found:
        first, last = row["anonymous_mib"]
        grown = row["bytes_a_step"]
        print(
            f"{row['backend']:<6}{row['steps']:>8,}{first:>12}{last:>8}{grown['anonymous']:>24.1f}"
            f"{grown['malloc']:>8.1f}{'yes' if row['kept'] else 'NO':>6}"
        )
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["kept"] for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
