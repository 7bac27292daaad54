"""One backend, warm and waiting, for ``tele bench``: reads orders on stdin, answers on stdout, one JSON object a line.

    python -m core.bench_worker ms '{"model": "telechat2-tiny", ...}'

Two such processes are kept alive side by side and work in turns, so that both meet the same machine in the same state.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from core import backends
from core.batch import Batch
from core.config import RunConfig, run_config_from_dict


def bench_config(options: dict[str, Any]) -> RunConfig:
    """A training run on random tokens: ``model``, ``seq_len``, ``micro_batch``, ``micro_batches``, ``precision``."""
    return run_config_from_dict(
        {
            "model": {"preset": options["model"]},
            "data": {"sources": [{"path": "random tokens"}], "seq_len": options["seq_len"]},
            "train": {
                "steps": 1_000_000,
                "global_batch": options["micro_batch"] * options["micro_batches"],
                "micro_batch": options["micro_batch"],
                "precision": options["precision"],
            },
            "optim": {"lr": 1e-4},
        }
    )


def random_batch(config: RunConfig, step: int) -> Batch:
    """The same tokens for every backend: a function of the step."""
    shape = (config.train.global_batch, config.data.seq_len)
    ids = np.random.default_rng(step).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    return Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), positions)


def timed_steps(trainer: Any, config: RunConfig, first: int, count: int) -> tuple[list[float], float]:
    """Seconds of each of ``count`` whole optimizer steps (forward, backward, norm, update), and the last loss."""
    seconds, loss = [], 0.0
    for step in range(first, first + count):
        batch = random_batch(config, step)
        started = time.perf_counter()
        loss = sum(
            trainer.micro_step(batch.rows(i, i + config.train.micro_batch), batch.num_targets, 1.0)
            for i in range(0, config.train.global_batch, config.train.micro_batch)
        )
        # The norm is a number on the host, so everything before it is done; the update may still run when its call
        # returns (an accelerator's queue), and is then paid by the next step's norm.
        norm = trainer.grad_norm(1.0)
        trainer.update(1e-4, min(1.0, 1.0 / (norm + 1e-6)))
        seconds.append(time.perf_counter() - started)
    return seconds, loss


def main(argv: list[str]) -> int:
    """Build the trainer, report ready, then serve {"steps": n} until stdin ends."""
    # Frameworks print on stdout when they please; keep the real one for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = bench_config(json.loads(argv[1]))
    trainer = backends.load(argv[0], "train").Trainer(config)
    print(json.dumps({"ready": trainer.implementation()}), file=answers, flush=True)
    done = 0
    for line in sys.stdin:
        count = json.loads(line)["steps"]
        seconds, loss = timed_steps(trainer, config, done, count)
        done += count
        print(json.dumps({"seconds": seconds, "loss": loss}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
