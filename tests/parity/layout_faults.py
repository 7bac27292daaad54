"""The ranks' own script of tests/parity/test_layouts.py: core/parity/worker.py, where a task may bring a planted fault.

    layout_faults.py JOB.json

A task named after one of FAULTS is done by a trainer that has that fault: functions of the product are replaced in this
process before the task's model is built and put back after it. Each is a mistake that a parallel program can be made
with, and sends as many messages as the right one, so that no rank waits for another.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np

import telechat_twins.core.parallel.schedule
from telechat_twins.convert.source import weight_reader
from telechat_twins.core.backends import load
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.parity import worker as layout_worker
from telechat_twins.core.train import trainer

Change = tuple[Any, str, Any]  # owner, attribute, what to put there


def main() -> int:
    return layout_worker.main(around=planted, open_reader=weight_reader)


@contextmanager
def planted(task: layout_worker.Task, backend: str) -> Iterator[None]:
    with ExitStack() as stack:
        if task.name in FAULTS:
            for change in FAULTS[task.name][1](backend):
                stack.enter_context(_changed(*change))
        yield


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = vars(owner)[name]  # a static method as it is, not as a class would bind it
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


class _Stale:
    """A transfer that is made, and whose result is then not used."""

    def __init__(self, handle: Any, kept: Any) -> None:
        self.handle, self.kept = handle, kept

    def wait(self) -> Any:
        self.handle.wait()
        return self.kept


def stale_key_value(backend: str) -> Iterator[Change]:
    """The ring's backward computes every step with the keys and values of its first."""
    ring = load(backend, "ring_attention")
    shift, backward = ring.start_shift, ring.RingAttention.backward
    calls: list[int] = []  # of the backward under way

    def faulty_shift(x: Any, group: Any) -> Any:
        calls[:] = [calls[0] + 1] if calls else []
        # In turn: keys and values, then the sums of their gradients; the last step sends no keys.
        keys = bool(calls) and calls[0] % 2 == 1 and calls[0] < 2 * group.size - 2
        return _Stale(shift(x, group), x) if keys else shift(x, group)

    def faulty_backward(ctx: Any, grad: Any) -> Any:
        calls[:] = [0]
        try:
            return backward(ctx, grad)
        finally:
            calls.clear()

    yield ring, "start_shift", faulty_shift
    yield ring.RingAttention, "backward", staticmethod(faulty_backward)


def wrong_zigzag_half(backend: str) -> Iterator[Change]:
    """Of a rank before, the second half of the keys instead of the first."""
    ring = load(backend, "ring_attention")
    real = ring.visible_part

    def faulty(q_rank: int, k_rank: int, length: int) -> tuple[slice, slice]:
        queries, keys = real(q_rank, k_rank, length)
        return queries, slice(length // 2, length) if k_rank < q_rank else keys

    yield ring, "visible_part", faulty


def merge_without_log_sum_exp(backend: str) -> Iterator[Change]:
    """Partial results of the ring are averaged."""
    ops = load(backend, "ops")
    real = ops.merge_blocks

    def faulty(out: Any, log_sum_exp: Any, more: Any, more_lse: Any) -> tuple[Any, Any]:
        return (out + more) * 0.5, real(out, log_sum_exp, more, more_lse)[1]

    yield ops, "merge_blocks", faulty


def norm_gradient_not_summed(backend: str) -> Iterator[Change]:
    """Each tensor rank keeps its own part of the gradients of norms, which it saw a share of the positions with."""
    parallelize = load(backend, "parallelize")
    real = parallelize.chunk_table

    def faulty(*args: Any) -> dict[str, Any]:
        return {
            name: dataclasses.replace(shard, sum_over=()) if "norm" in name else shard
            for name, shard in real(*args).items()
        }

    yield parallelize, "chunk_table", faulty


def adapter_gradient_not_summed(backend: str) -> Iterator[Change]:
    """Each tensor rank keeps its own part of the gradient of an A that all of them hold."""
    parallelize = load(backend, "parallelize")
    real = parallelize.chunk_table

    def faulty(*args: Any) -> dict[str, Any]:
        return {
            name: dataclasses.replace(shard, sum_over=()) if name.endswith("q.lora_a") else shard
            for name, shard in real(*args).items()
        }

    yield parallelize, "chunk_table", faulty


def dropout_by_local_place(backend: str) -> Iterator[Change]:
    """A context-parallel rank draws the adapters' masks by the places in its own part of a row."""
    real = trainer.LoraDropout

    def faulty(rate: float, seed: int, step: int, samples: np.ndarray, places: np.ndarray) -> Any:
        return real(rate, seed, step, samples, np.broadcast_to(np.arange(places.shape[1]), places.shape))

    yield trainer, "LoraDropout", faulty


def norm_counted_by_every_rank(backend: str) -> Iterator[Change]:
    """Every tensor rank counts the parameters that all of them hold in the gradient norm."""
    adamw = load(backend, "optim").AdamW
    real = adamw.grad_norm

    def faulty(self: Any) -> float:
        buckets = self.gradients.buckets
        self.gradients.buckets = [dataclasses.replace(bucket, owner=True) for bucket in buckets]
        try:
            return real(self)
        finally:
            self.gradients.buckets = buckets

    yield adamw, "grad_norm", faulty


def local_token_count(backend: str) -> Iterator[Change]:
    """A rank divides by the targets of its own rows."""
    yield trainer.BaseTrainer, "count_targets", lambda self, num_targets: num_targets


def label_shift_after_the_split(backend: str) -> Iterator[Change]:
    """Every rank shifts the labels of the places it holds."""
    real = trainer.split_batch

    def faulty(batch: Batch, layout: Any, cp_rank: int) -> Any:
        labels = np.full_like(batch.targets, IGNORE)
        labels[:, 1:] = batch.targets[:, :-1]
        local = real(dataclasses.replace(batch, targets=labels), layout, cp_rank)
        targets = np.full_like(local.targets, IGNORE)
        targets[:, :-1] = local.targets[:, 1:]
        return dataclasses.replace(local, targets=targets)

    yield trainer, "split_batch", faulty


def bias_added_by_every_rank(backend: str) -> Iterator[Change]:
    """The bias of a row-parallel product is added before the sum over ranks."""
    parallel = load(backend, "tensor_parallel")

    def faulty(self: Any, x: Any, dropped: Any = None, again: Any = None) -> Any:
        return parallel._sum_parts(parallel.ops.linear(x, self.weight, self.bias, self.compute), self)

    yield parallel.RowParallel, {"ms": "construct", "pt": "forward"}[backend], faulty


def gradients_overwritten(backend: str) -> Iterator[Change]:
    """The last micro-batch's gradients stand, the others are gone."""
    buckets = load(backend, "data_parallel").GradientBuckets
    if backend == "ms":
        add = buckets.add

        def faulty_add(self: Any, names: Any, gradients: Any) -> None:
            before, self._seen = self._seen, {}
            add(self, names, gradients)
            self._seen = before | {name: before.get(name, 0) + 1 for name in names}

        yield buckets, "add", faulty_add
        return
    hook = buckets._hook

    def faulty_hook(self: Any, name: str, number: int, accumulator: Any, place: Any) -> Callable[[Any], None]:
        take = hook(self, name, number, accumulator, place)

        def faulty(weight: Any) -> None:
            if self._seen.get(name):
                accumulator.zero_()
            take(weight)

        return faulty

    yield buckets, "_hook", faulty_hook


def zero_shard_off_by_one(backend: str) -> Iterator[Change]:
    """A rank gets the sum of the shard after its own."""
    module = load(backend, "data_parallel")
    real = module.start_reduce_scatter

    def faulty(x: Any, group: Any, axis: int) -> Any:
        size = x.shape[axis] // group.size
        return real(_joined(backend, (x[size:], x[:size])), group, axis)

    yield module, "start_reduce_scatter", faulty


def matrix_rate_lost(backend: str) -> Iterator[Change]:
    """Every class of parameters takes the rate of the vector-like ones."""
    yield load(backend, "optim"), "class_rate", lambda optim, lr, mup_class: lr


def mask_of_the_first_rank(backend: str) -> Iterator[Change]:
    """Every tensor rank masks its heads and neurons as if they were those of the first."""
    model = load(backend, "model")
    real = model.masks

    def faulty(config: Any, c: float | None, columns: tuple[slice, slice]) -> Any:
        return real(config, c, tuple(slice(0, part.stop - part.start) for part in columns))

    yield model, "masks", faulty


def chunk_order_swapped(backend: str) -> Iterator[Change]:
    """The last pipeline rank takes each micro-batch through all its chunks before the next micro-batch; the others send
    it all micro-batches of a group for one chunk first."""
    real = telechat_twins.core.parallel.schedule._turn

    def faulty(k: int, pp: int, virtual: int, kind: str) -> tuple[int, int]:
        group, place = divmod(k, pp * virtual)
        micro, chunk = divmod(place, virtual)
        return group * pp + micro, chunk if kind == "F" else virtual - 1 - chunk

    rank, world = load(backend, "mesh").join()
    yield telechat_twins.core.parallel.schedule, "_turn", faulty if rank == world - 1 else real


def _joined(backend: str, tensors: tuple[Any, ...]) -> Any:
    framework: ModuleType = importlib.import_module({"ms": "mindspore", "pt": "torch"}[backend])
    return framework.ops.concat(tensors) if backend == "ms" else framework.cat(tensors)


# Name -> the layout that has it, the fault, and the bound, a pattern, that must be broken (docs/parity.md lists them).
FAULTS: dict[str, tuple[str, Callable[[str], Iterator[Change]], str]] = {
    "stale key and value in the ring's backward": ("ring2", stale_key_value, r"gradient \("),
    "wrong zigzag half": ("ring2", wrong_zigzag_half, "loss"),
    "merge without log-sum-exp": ("ring2", merge_without_log_sum_exp, "loss"),
    "norm's gradient not summed": ("tp2", norm_gradient_not_summed, r"gradient \(.*norm\.weight\)"),
    "adapter's gradient not summed": ("tp2:lora", adapter_gradient_not_summed, r"gradient \(.*q\.lora_a\)"),
    "dropout by local place": ("ring2:lora", dropout_by_local_place, "loss"),
    "norm counted tp times": ("tp2", norm_counted_by_every_rank, "gradient norm"),
    "local token count": ("dp2", local_token_count, "loss"),
    "labels shifted after the split": ("ulysses2", label_shift_after_the_split, "loss"),
    "bias added tp times": ("tp2", bias_added_by_every_rank, "loss"),
    "micro-batch gradients overwritten": ("pp2", gradients_overwritten, r"gradient \("),
    "ZeRO shard off by one": ("dp2", zero_shard_off_by_one, r"gradient \("),
    "rate of matrix-like parameters lost": ("dp2:mup", matrix_rate_lost, "weight's change"),
    "growth mask of the first rank": ("tp2:grown", mask_of_the_first_rank, "loss"),
    "interleaved chunk order swapped": ("pp2.vpp2", chunk_order_swapped, "loss"),
}

if __name__ == "__main__":
    raise SystemExit(run_script(main))
