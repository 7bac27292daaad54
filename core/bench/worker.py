"""Worker process of ``tele bench``: one contestant, with orders on stdin and answers on stdout as JSON lines.

    python -m telechat_twins.core.bench.worker ms '{"model": "telechat2-tiny", ...}'
    {"steps": 5}

The workers of all contestants live side by side and run in turns, so that all are measured on the machine in the same
state. ``Worker`` is the side that gives the orders.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.files import IMPORT_ROOT
from telechat_twins.core.launch.memory import largest_resident
from telechat_twins.core.launch.worker import die_with_parent
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from tqdm import tqdm

EAGER = "eager"  # the released code's composition in PyTorch, kernels/bench/eager.py
# transformers' Llama of the same shapes, kernels/bench/hf_step.py, and the same through torch.compile.
HF_STEP = {"hf": "transformers", "hf-compile": "compiled transformers"}
LLAMA_CPP = "llama.cpp"  # decodes a Llama of the same shapes, kernels/bench/llama_cpp.py
TITLES = {**backends.TITLES, EAGER: "the eager composition", **HF_STEP, LLAMA_CPP: LLAMA_CPP}
_MODULES = {
    EAGER: "telechat_twins.kernels.bench.eager",
    **dict.fromkeys(HF_STEP, "telechat_twins.kernels.bench.hf_step"),
}

# Idle OpenMP threads sleep instead of spinning, on both backends (MindSpore's launches set this anyway): with another
# process on 2 cores, spinning made PyTorch's step tens of times slower. The user's own setting takes precedence.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}

PROCESSOR = " processor"

Handle = Callable[[JsonObject], JsonObject]


class Trainer(Protocol):
    """Methods of a trainer that benchmarks use; a backend's, or the eager composition's (kernels/bench/eager.py)."""

    def share(self, global_batch: int) -> tuple[int, int]: ...

    def gradients(self, batch: Batch, num_targets: int, loss_scale: float, /) -> float: ...

    def grad_norm(self, loss_scale: float, /) -> float: ...

    def update(self, lr: float, grad_scale: float, /) -> None: ...

    def implementation(self) -> dict[str, str]: ...


class PhasedTrainer(Trainer, Protocol):
    """A backend's trainer, which can also run forward alone."""

    def gradients(self, batch: Batch, num_targets: int, loss_scale: float, /, backward: bool = True) -> float: ...


def bar(turns: int) -> tqdm:
    """A progress bar over the turns of all contestants; on a terminal only, since the report has what was measured."""
    from tqdm import tqdm

    return tqdm(total=turns, unit="turn", file=sys.stderr, disable=None, dynamic_ncols=True)


def bench_config(options: JsonObject) -> RunConfig:
    """A training run on random tokens: ``model``, ``seq_len``, ``micro_batch``, ``micro_batches``, ``precision``.

    ``layout``: the text of a parallel layout; without it, one process. ``overrides``: fields of the model that differ
    from those of the preset. UserError for a sequence above the model's length.
    """
    model, length = load_model_config(options["model"]), options["seq_len"]  # overrides leave max_seqlen as it is
    if length > model.max_seqlen:
        raise UserError(
            f"--seq-len, or prompt and new tokens: {length} is above max_seqlen {model.max_seqlen} of "
            f"{options['model']}; give --model FILE.yaml with the lines `preset: {options['model']}` and "
            f"`max_seqlen: {length}`, or shorten it"
        )
    return run_config_from_dict(
        {
            "model": {"preset": options["model"], **options.get("overrides", {})},
            "data": {"sources": [{"path": "random tokens"}], "seq_len": options["seq_len"]},
            "train": {
                "steps": 1_000_000,
                "global_batch": options["micro_batch"] * options["micro_batches"],
                "micro_batch": options["micro_batch"],
                "precision": options["precision"],
            },
            "optim": {"lr": 1e-4},
            "parallel": dataclasses.asdict(parse_layout(options.get("layout", "single"))),
        }
    )


def random_batch(config: RunConfig, step: int) -> Batch:
    """A batch of random tokens that depends on the step only, equal for every backend and layout."""
    shape = (config.train.global_batch, config.data.seq_len)
    ids = np.random.default_rng(step).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    return Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), positions)


def timed_steps(trainer: Trainer, config: RunConfig, first: int, count: int) -> tuple[list[float], float]:
    """Seconds of each of ``count`` whole optimizer steps (forward, backward, norm, update), and the last loss."""
    seconds, loss = [], 0.0
    start, rows = trainer.share(config.train.global_batch)
    for step in range(first, first + count):
        batch = random_batch(config, step)
        mine = batch.rows(start, start + rows)
        started = time.perf_counter()
        loss = trainer.gradients(mine, batch.num_targets, 1.0)
        # The norm is a number on the host, so all work before it has ended. The update may still be in an accelerator's
        # queue when its call returns; its time then counts for the next step, until that step's norm.
        norm = trainer.grad_norm(1.0)
        trainer.update(1e-4, min(1.0, 1.0 / (norm + 1e-6)))
        seconds.append(time.perf_counter() - started)
    return seconds, loss


def timed_phases(trainer: PhasedTrainer, config: RunConfig, count: int) -> dict[str, list[float]]:
    """Seconds of ``count`` steps by phase: ``gradients`` (forward and backward of all micro-batches), ``update`` (norm
    and update), and ``forward``, a forward alone; and by phase with " processor", this process's time on processors."""
    phases = "gradients", "update", "forward"
    found: dict[str, list[float]] = {name + clock: [] for name in phases for clock in ("", PROCESSOR)}
    start, rows = trainer.share(config.train.global_batch)
    for step in range(count):
        batch = random_batch(config, step)
        mine, marks = batch.rows(start, start + rows), [clocks()]
        trainer.gradients(mine, batch.num_targets, 1.0)
        marks.append(clocks())
        trainer.update(1e-4, min(1.0, 1.0 / (trainer.grad_norm(1.0) + 1e-6)))
        marks.append(clocks())
        trainer.gradients(mine, batch.num_targets, 1.0, False)
        marks.append(clocks())
        for name, started, ended in zip(phases, marks, marks[1:], strict=False):
            for clock, before, after in zip(("", PROCESSOR), started, ended, strict=True):
                found[name + clock].append(after - before)
    return found


def clocks() -> tuple[float, float]:
    """Now: the wall's clock, and the time that this process, all its threads, has spent on processors."""
    return time.perf_counter(), time.process_time()


def paired_ratios(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[float]:
    """Median step time of ``first`` over that of ``second``, round by round."""
    return [statistics.median(a) / statistics.median(b) for a, b in zip(first, second, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the range of the middle 80 %."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return {"median": statistics.median(ordered), "low": ordered[cut], "high": ordered[-1 - cut]}


class Worker:
    """Handle of a worker process, which ends with the ``with`` block.

    Between its turns it is stopped by SIGSTOP: idle thread pools of both frameworks spin, and on few cores they would
    slow down the contestant that is being measured.
    """

    def __init__(
        self,
        name: str,
        options: JsonObject,
        env: Mapping[str, str] | None = None,
        module: str | None = None,
    ) -> None:
        """``env``: replaces this process's environment; ``module``: the program, by default one that trains."""
        self.name = name
        module = module or _MODULES.get(name, "telechat_twins.core.bench.worker")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=IMPORT_ROOT,
            env={**QUIET, **(os.environ if env is None else env)},
        )
        self.implementation: dict[str, str] = self._answer()["ready"]
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> Worker:
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

    def steps(self, count: int) -> JsonObject:
        """Run ``count`` steps; {"seconds": [...], "loss": ...}."""
        return self.ask({"steps": count})

    def phases(self, options: JsonObject, count: int) -> dict[str, list[float]]:
        """``timed_phases`` of a trainer with ``options``, which stays for later calls."""
        return self.ask({"phases": count, "options": options})

    def ask(self, order: JsonObject) -> JsonObject:
        """The answer to an order; the worker runs while all others are stopped."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def _answer(self) -> JsonObject:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the worker of {TITLES[self.name]} ended with code {self._process.wait()}; its message is above"
            )
        return json.loads(line)


def answer_orders(prepare: Callable[[], tuple[JsonObject, Handle]]) -> int:
    """Main loop of a worker: answers orders until stdin ends. ``prepare`` returns the worker's description and its
    handler of orders."""
    die_with_parent()  # a stopped process does not notice the end of its stdin
    # Frameworks may print to stdout: keep the real one for answers, and send theirs to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready, handle = prepare()
    print(json.dumps({"ready": ready}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(handle(json.loads(line))), file=answers, flush=True)
    return 0


def serve(argv: Sequence[str], build: Callable[[str, RunConfig], Trainer]) -> int:
    """Run a worker that trains with the trainer from ``build(name, config)``."""

    def prepare() -> tuple[JsonObject, Handle]:
        config, imports = bench_config(json.loads(argv[1])), largest_resident()
        trainer, done = build(argv[0], config), 0
        others: dict[str, tuple[PhasedTrainer, RunConfig]] = {}

        def handle(order: JsonObject) -> JsonObject:
            nonlocal done
            if "memory" in order:
                device = getattr(trainer, "device_peak", lambda: 0)()
                return {"imports": imports, "peak": largest_resident() - imports, "device": device}
            if "phases" in order:
                key = json.dumps(order["options"])
                if key not in others:
                    other = bench_config(order["options"])
                    others[key] = cast("PhasedTrainer", build(argv[0], other)), other
                    timed_phases(*others[key], 1)
                return timed_phases(*others[key], order["phases"])
            seconds, loss = timed_steps(trainer, config, done, order["steps"])
            done += order["steps"]
            return {"seconds": seconds, "loss": loss}

        return trainer.implementation(), handle

    return answer_orders(prepare)


def main(argv: list[str]) -> int:
    module = backends.load(argv[0], "train")  # before the memory of the imports is read
    return serve(argv, lambda name, config: module.Trainer(config))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
