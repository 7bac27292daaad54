"""Campaign of records: what does a recorded step take, in units of the same step without a record?

    python -m tests.campaigns.record_cost [--backend ms|pt] [--rows 16] [--seq-len 256] [--pairs 10] [--profile]

Trains telechat2-mini (fp32, micro-batches of 4 rows) in this process and records every second step into a new folder.
Each recorded step is compared with the plain step before it, in processor seconds of all threads, which other work on
the machine moves less than the clock. Prints every pair and the median of their ratios; exit 1 above LIMIT.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import os
import pstats
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from telechat_twins.core.backends import TITLES, load
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.parity.record.recorder import FOLDER, Recorder
from telechat_twins.core.train.recipe import clip_factor
from telechat_twins.core.train.trainer import BaseTrainer

LIMIT, MICRO, RATE = 1.3, 4, 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=tuple(TITLES), default="pt")
    parser.add_argument("--rows", type=int, default=16, help="of the global batch")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print where recorded steps spend their time in Python")
    args = parser.parse_args(argv)
    config = mini(args.rows, args.seq_len, args.precision)
    profile = cProfile.Profile(time.process_time) if args.profile else None
    with tempfile.TemporaryDirectory(prefix="tele-record-cost-") as folder:
        pairs = measure(args.backend, config, Path(folder), args.pairs, profile)
    for plain, recorded in pairs:
        print(f"{plain:8.3f} s  {recorded:8.3f} s  {recorded / plain:.3f}")
    found = statistics.median(recorded / plain for plain, recorded in pairs)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print(
        f"{TITLES[args.backend]}, {processor()}: a recorded step of {args.rows} x {args.seq_len} takes {found:.2f} "
        f"times a plain one (median of {len(pairs)} pairs, limit {LIMIT})"
    )
    return 0 if found <= LIMIT else 1


def mini(rows: int, seq_len: int, precision: str) -> RunConfig:
    return run_config_from_dict(
        {
            "model": "telechat2-mini",
            "data": {"sources": [], "seq_len": seq_len},
            "train": {"steps": 1, "global_batch": rows, "micro_batch": min(MICRO, rows), "precision": precision},
            "optim": {"lr": RATE},
        }
    )


def measure(
    backend: str, config: RunConfig, folder: Path, pairs: int, profile: cProfile.Profile | None = None
) -> list[tuple[float, float]]:
    """Processor seconds of a plain step and of the recorded one after it, ``pairs`` times; the first pair, which
    compiles and allocates, is left out."""
    trainer = load(backend, "train").Trainer(config)
    trainer.load_weights(lambda name, box: init_tensor(name, config.model, 0, box, "normal"))
    trainer.optimizer.refresh()
    rows, length = config.train.global_batch, config.data.seq_len
    ids = np.random.default_rng(1).integers(0, config.model.num_tokens, (rows, length)).astype(np.int32)
    batch = Batch(ids, shift_labels(ids), np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape))
    recorder, taken = Recorder(config, folder, every=2), list[float]()
    for step in range(1, 2 * (pairs + 1) + 1):
        seen = recorder.wants(step) and step > 2
        with _profiled(profile if seen else None):
            started = time.process_time()
            one_step(trainer, recorder, step, batch, config)
            taken.append(time.process_time() - started)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    return list(zip(taken[2::2], taken[3::2], strict=True))


def one_step(trainer: BaseTrainer, recorder: Recorder, step: int, batch: Batch, config: RunConfig) -> None:  # type: ignore[type-arg]
    """As core.train.run.step makes it: the recorder is asked in every step."""
    recorder.before(trainer, step, batch, 0, len(batch.input_ids), config.model.to_dict())
    loss = trainer.gradients(batch, trainer.count_targets(batch.num_terms), 1.0)
    norm = trainer.grad_norm(1.0)
    recorder.computed(loss, norm, 1.0)
    trainer.update(RATE, clip_factor(norm, config.optim.clip_grad))
    recorder.after({"step": step, "loss": loss, "grad_norm": norm, "lr": RATE})


@contextlib.contextmanager
def _profiled(profile: cProfile.Profile | None) -> Iterator[None]:
    if profile is None:
        yield
        return
    profile.enable()
    try:
        yield
    finally:
        profile.disable()


def processor() -> str:
    """The machine's name of its processor, and its number."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} of its threads"
    return "processor unknown"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
