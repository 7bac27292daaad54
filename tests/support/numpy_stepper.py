"""A trainer small enough to read: bigram logits ``table[token]``, softmax cross-entropy, AdamW, all in numpy.

It keeps every promise of core.train.stepper.Stepper with real weights, real gradients and real optimizer state, so
tests of the loop (resume, accumulation, skipping) compare true training and not a recording. Several of them, each in
a thread, train together: data parallel, each owning a flat share of every tensor.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from telechat_twins.core.checkpoint.read import TensorPiece
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.reference import adamw

SEQ_LEN, VOCAB = 16, 24


def run_config(**changes) -> RunConfig:
    """A valid run of 12 steps; ``changes``: train__steps=3 sets train.steps, model={...} replaces the group."""
    tree = {
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": 8,
            "ffn_hidden_size": 8,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "norm_eps": 1e-5,
            "training_seqlen": SEQ_LEN,
            "base_seqlen": SEQ_LEN,
            "max_seqlen": SEQ_LEN,
        },
        "data": {"sources": [{"path": "made/in/memory"}], "seq_len": SEQ_LEN},
        "train": {"steps": 12, "global_batch": 4, "micro_batch": 2, "seed": 7},
        "optim": {"lr": 0.05, "min_lr": 0.005, "warmup_steps": 2},
        "health": {"window": 5, "spike_factor": 4.0},
    }
    for name, value in changes.items():
        group, _, leaf = name.partition("__")
        if leaf:
            tree.setdefault(group, {})[leaf] = value
        else:
            tree[group] = value
    return run_config_from_dict(tree)


class MemoryBlend:
    """core.data.blend.Blend's promise, from a random generator: sample i is a function of (seed, i)."""

    def __init__(self, seed: int, masked: bool = True, empty: tuple[int, ...] = ()) -> None:
        self.seed, self.masked, self.empty = seed, masked, empty
        self.num_samples, self.rows_per_sample, self.num_rows = [1000], 1, 1000
        self.pairs = False
        self.vocab_size = VOCAB
        self.tokenizer_name, self.end_token = "tokenizer.model", None

    def batch(self, first_sample: int, count: int) -> Batch:
        ids = np.empty((count, SEQ_LEN), np.int32)
        targets = np.empty((count, SEQ_LEN), np.int32)
        for row in range(count):
            random = np.random.default_rng([self.seed, first_sample + row])
            text = np.cumsum(random.integers(0, 3, SEQ_LEN + 1)) % VOCAB  # learnable: the next token is 0 to 2 further
            ids[row], targets[row] = text[:-1], text[1:]
            if self.masked:  # rows with very different numbers of targets, or local and global means would agree
                targets[row, random.integers(1, SEQ_LEN) :] = IGNORE
            if first_sample + row in self.empty:
                targets[row] = IGNORE
        return Batch(ids, targets, np.tile(np.arange(SEQ_LEN, dtype=np.int32), (count, 1)))

    def summary(self) -> str:
        return "made in memory"

    def tokenizer(self) -> bytes:
        return b"any bytes: they only travel with the checkpoint"

    def digest(self) -> str:
        return f"memory-{self.seed}-{self.masked}"


class Cluster:
    """``world`` ranks, each a thread of this process."""

    OPS = {"sum": np.sum, "max": np.max, "min": np.min}

    def __init__(self, world: int, timeout_s: float = 60.0) -> None:
        self.world = world
        self._barrier = threading.Barrier(world, timeout=timeout_s)
        self._given: list[Any] = [None] * world

    def agree(self, rank: int, values: list[float], op: str) -> list[float]:
        """Every rank's numbers reduced; ValueError if the ranks do not bring equally many of the same operation."""
        self._given[rank] = (op, list(values))
        self._barrier.wait()
        ops, rows = zip(*self._given, strict=True)
        self._barrier.wait()
        if len(set(ops)) > 1:
            raise ValueError(f"ranks agree by different operations {ops}")
        return self.OPS[op](np.array(rows, np.float64), axis=0).tolist()

    def run(self, action: Callable[[int], Any], main: int = 0) -> list[Any]:
        """``action(rank)`` on all ranks, on rank ``main`` in this thread (signals go there); results or exceptions."""
        results: list[Any] = [None] * self.world

        def one(rank: int) -> None:
            try:
                results[rank] = action(rank)
            except BaseException as error:
                results[rank] = error
                if not isinstance(error, Exception):
                    self._barrier.abort()  # as if the process was gone

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world) if rank != main]
        for thread in threads:
            thread.start()
        one(main)
        for thread in threads:
            thread.join()
        return results


def flat_boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[slice, ...]]:
    """The boxes that make up the elements first .. last - 1, in row-major order, of a vector or matrix."""
    width = shape[1] if len(shape) == 2 else 1
    begin, end = min(last, -(-first // width) * width), max(first, last // width * width)
    for a, b in ((first, begin), (begin, end), (max(begin, end), last)):
        if a < b and len(shape) == 1:
            yield (slice(a, b),)
        elif a < b:
            rows = slice(a // width, max(a // width + 1, b // width))
            yield rows, slice(a % width, a % width + min(b - a, width))


class NumpyStepper:
    """core.train.stepper.Stepper over one matrix and one bias. ``faults`` maps a step to what goes wrong there:
    a factor on its gradients ("nan" and "inf" are factors too)."""

    def __init__(
        self,
        config: RunConfig,
        faults: dict[int, float] | None = None,
        cluster: Cluster | None = None,
        rank: int = 0,
    ) -> None:
        self.config, self.faults = config, faults or {}
        self.micro_batch = config.train.micro_batch
        self.cluster, self.rank = cluster, rank
        self.world = cluster.world if cluster else 1
        random = np.random.default_rng(config.train.seed)
        self.params = {
            "embed.weight": random.normal(0, 0.5, (VOCAB, VOCAB)).astype(np.float32),
            "norm.weight": np.zeros(VOCAB, np.float32),
        }
        self.m = {n: np.zeros_like(p) for n, p in self.params.items()}
        self.v = {n: np.zeros_like(p) for n, p in self.params.items()}
        self.grads = {n: np.zeros_like(p) for n, p in self.params.items()}
        self.step = 0
        self.calls = 0  # global batches seen, skipped ones included; for faults
        self.scales: list[float] = []
        self.masks: list[float | None] = []

    def agree(self, values, op):
        return self.cluster.agree(self.rank, values, op) if self.cluster else list(values)

    def share(self, global_batch):
        count = global_batch // self.world
        return self.rank * count, count

    def count_targets(self, num_targets):
        return int(self.agree([float(num_targets)], "sum")[0])

    def gradients(self, batch, num_targets, loss_scale):
        size = self.micro_batch
        pieces = [batch.rows(start, start + size) for start in range(0, len(batch.input_ids), size)]
        loss = sum(self._micro_batch(piece, num_targets, loss_scale) for piece in pieces)
        for g in self.grads.values() if self.cluster else ():
            g[...] = np.reshape(self.agree(g.ravel().tolist(), "sum"), g.shape)
        return self.agree([loss], "sum")[0]

    def _micro_batch(self, batch, num_targets, loss_scale):
        ids, targets = batch.input_ids.ravel(), batch.targets.ravel()
        counted = targets != IGNORE
        ids, targets = ids[counted], targets[counted]
        logits = self.params["embed.weight"][ids] + self.params["norm.weight"]
        logits -= logits.max(-1, keepdims=True)
        probabilities = np.exp(logits)
        probabilities /= probabilities.sum(-1, keepdims=True)
        rows = np.arange(len(ids))
        loss = -np.log(probabilities[rows, targets]).sum(dtype=np.float64) / num_targets
        probabilities[rows, targets] -= 1
        probabilities *= np.float32(loss_scale / num_targets)
        np.add.at(self.grads["embed.weight"], ids, probabilities)
        self.grads["norm.weight"] += probabilities.sum(0)
        return float(loss)

    def held_out_loss(self, batch, num_targets):
        kept = {name: grad.copy() for name, grad in self.grads.items()}
        loss = self._micro_batch(batch, num_targets, 1.0)
        self.grads = kept
        return self.agree([loss], "sum")[0]

    def set_mask(self, c):
        self.masks.append(c)

    def grad_norm(self, loss_scale):
        self.calls += 1
        self.scales.append(loss_scale)
        if self.calls in self.faults:
            with np.errstate(invalid="ignore"):  # zero times inf is meant to be nan
                for g in self.grads.values():
                    g *= np.float32(self.faults[self.calls])
        total = sum(float(np.square(g, dtype=np.float64).sum()) for g in self.grads.values())
        return float(np.sqrt(total)) / loss_scale

    def update(self, lr, grad_scale):
        optim = self.config.optim
        self.step += 1
        for name, p in self.params.items():
            g = self.grads[name] * np.float32(grad_scale)
            decay = optim.weight_decay if p.ndim == 2 else 0.0
            scalars = AdamWStep(self.step, lr, optim.beta1, optim.beta2, optim.eps, decay)
            p[...], self.m[name], self.v[name] = adamw(p, g, self.m[name], self.v[name], scalars)
        self.discard()

    def discard(self):
        for g in self.grads.values():
            g[:] = 0

    def _own(self, name, array):
        size = array.size
        for box in flat_boxes(array.shape, size * self.rank // self.world, size * (self.rank + 1) // self.world):
            yield TensorPiece(name, array[box], tuple(s.start for s in box), array.shape)

    def weights(self):
        for name, array in self.params.items():
            yield from self._own(name, array)

    def optimizer_state(self):
        for name in self.params:
            yield from self._own(f"m.{name}", self.m[name])
            yield from self._own(f"v.{name}", self.v[name])

    def load_weights(self, read):
        for name, array in self.params.items():
            self.params[name] = np.array(read(name, tuple(slice(0, n) for n in array.shape)), np.float32)

    def load(self, checkpoint, optimizer):
        for name in self.params:
            self.params[name] = np.array(checkpoint.read("weights", name))
            if optimizer:
                self.m[name] = np.array(checkpoint.read("optimizer", f"m.{name}"))
                self.v[name] = np.array(checkpoint.read("optimizer", f"v.{name}"))
        if optimizer:
            self.step = checkpoint.trainer["optimizer_steps"]

    def device_peak(self):
        return 0

    @contextmanager
    def profiled(self, folder, steps):
        ends = []
        yield lambda: ends.append(len(ends) + 1)
        (folder / f"rank-{self.rank}.json").write_text(json.dumps({"traceEvents": [], "steps": ends}))

    def implementation(self):
        return {"backend": "numpy", "device": "CPU", "everything": "tests/support/numpy_stepper.py"}
