"""A trainer small enough to read: bigram logits ``table[token]``, softmax cross-entropy, AdamW, all in numpy.

It keeps every promise of core.loop.Stepper with real weights, real gradients and real optimizer state, so tests of the
loop (resume, accumulation, skipping) compare true training and not a recording.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from core.batch import IGNORE, Batch
from core.config import RunConfig, run_config_from_dict
from kernels.reference import adamw

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
        self.num_samples = [1000]

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

    def tokenizer_path(self) -> Path:
        return Path(__file__)  # any file: it only travels with the checkpoint

    def digest(self) -> str:
        return f"memory-{self.seed}-{self.masked}"


class NumpyStepper:
    """core.loop.Stepper over one matrix and one bias. ``faults`` maps a step to what goes wrong there:
    a factor on its gradients ("nan" and "inf" are factors too)."""

    def __init__(self, config: RunConfig, faults: dict[int, float] | None = None) -> None:
        self.config, self.faults = config, faults or {}
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

    def micro_step(self, batch, num_targets, loss_scale):
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
            p[...], self.m[name], self.v[name] = adamw(
                p, g, self.m[name], self.v[name], self.step, lr, optim.beta1, optim.beta2, optim.eps, decay
            )
        self.discard()

    def discard(self):
        for g in self.grads.values():
            g[:] = 0

    def weights(self):
        yield from self.params.items()

    def optimizer_state(self):
        for name in self.params:
            yield f"m.{name}", self.m[name]
            yield f"v.{name}", self.v[name]

    def load(self, checkpoint, optimizer):
        for name in self.params:
            self.params[name] = np.array(checkpoint.read("weights", name))
            if optimizer:
                self.m[name] = np.array(checkpoint.read("optimizer", f"m.{name}"))
                self.v[name] = np.array(checkpoint.read("optimizer", f"v.{name}"))
        if optimizer:
            self.step = checkpoint.trainer["optimizer_steps"]

    def implementation(self):
        return {"backend": "numpy", "device": "CPU", "everything": "tests/numpy_stepper.py"}
