"""Memory and processor time of training adapters against training all weights, in turns.

    python -m tests.campaigns.adapters [--micro-batch B] [--rounds N]

telechat2-mini, fp32, sequences of 256, one thread. Four processes (two twins, all weights and adapters) train in turns.
Memory is the highest resident size above that before the model is built, in a process that has trained
telechat2-tiny before, so that the libraries' own code and caches (some 60 MB) count for neither; with --cold in one
that has not. Time is the processor's, of a whole step, the median of all turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN = 256
BACKENDS = {"pt": "PyTorch", "ms": "MindSpore"}


def resident(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def trainer(backend: str, preset: str, micro_batch: int, adapters: bool) -> Any:
    from telechat_twins.core import backends
    from telechat_twins.core.config import run_config_from_dict
    from telechat_twins.core.model.init import init_tensor

    train = {"steps": 9, "global_batch": micro_batch, "micro_batch": micro_batch, "precision": "fp32"}
    data = {"model": {"preset": preset}, "optim": {"lr": 1e-4}, "train": train}
    data |= {"data": {"sources": [{"path": "random tokens"}], "seq_len": SEQ_LEN}}
    if adapters:
        data |= {"lora": {}, "train": {**train, "init": "random weights"}}
    config = run_config_from_dict(data)
    made = backends.load(backend, "train").Trainer(config)
    if adapters:
        made.load_weights(lambda name, box: init_tensor(name, config.model, 0)[box])
    return made


def step(made: Any, micro_batch: int) -> None:
    from telechat_twins.core.model.batch import Batch

    ids = np.random.default_rng(0).integers(0, made.config.model.vocab_size, (micro_batch, SEQ_LEN + 1), np.int32)
    positions = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (micro_batch, 1))
    batch = Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), positions)
    made.gradients(batch, batch.num_targets, 1.0)
    made.update(1e-4, min(1.0, 1.0 / (made.grad_norm(1.0) + 1e-6)))


def work(backend: str, micro_batch: int, adapters: bool, cold: bool) -> None:
    """Answer each line on stdin with the figures of one more step."""
    import time

    made = trainer(backend, "telechat2-tiny", 1, adapters) if not cold else None
    if made is not None:
        step(made, 1)
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest size begins anew
    made = trainer(backend, "telechat2-mini", micro_batch, adapters)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for _ in sys.stdin:
        started = time.process_time()
        step(made, micro_batch)
        seconds = time.process_time() - started
        print(json.dumps([seconds, resident("VmHWM") - base]), file=answers, flush=True)


def measured(micro_batch: int, rounds: int, cold: bool, names: Sequence[str]) -> None:
    contestants = [(backend, adapters) for backend in names for adapters in (False, True)]
    running = {}
    for backend, adapters in contestants:
        command = [sys.executable, "-m", "tests.campaigns.adapters", "--work", backend]
        command += ["--micro-batch", str(micro_batch), *["--adapters"] * adapters, *["--cold"] * cold]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        running[backend, adapters] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
    found: dict[tuple[str, bool], list[tuple[float, int]]] = {key: [] for key in running}
    for _ in range(rounds + 1):
        for key, process in running.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            found[key].append(tuple(json.loads(process.stdout.readline())))
    for process in running.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    for backend in names:
        whole, adapted = found[backend, False], found[backend, True]
        times = [statistics.median(seconds for seconds, _ in rows[1:]) for rows in (whole, adapted)]
        peaks = [rows[-1][1] / 1e6 for rows in (whole, adapted)]
        print(
            f"{micro_batch} x {SEQ_LEN}, {BACKENDS[backend]}: memory {peaks[0]:.0f} MB, adapters {peaks[1]:.0f} MB "
            f"({peaks[1] / peaks[0]:.2f}); time {times[0]:.2f} s, adapters {times[1]:.2f} s ({times[1] / times[0]:.2f})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each after the first")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--cold", action="store_true", help="count the libraries' code that a first step loads")
    parser.add_argument("--work", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.micro_batch, args.adapters, args.cold)
    else:
        measured(args.micro_batch, args.rounds, args.cold, args.backends)
    return 0


if __name__ == "__main__":
    sys.exit(main())
