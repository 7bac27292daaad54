"""Faults of programs of many ranks: two processes against one device. Those of tests/parity/layout_faults.py are here
too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from telechat_twins.core.backends import load
from telechat_twins.core.parallel import sequence
from telechat_twins.core.parity import worker
from telechat_twins.core.train import trainer
from tests.mutation.fault import CATALOGUE, Change, Fault, Tensors, fault
from tests.parity.layout_faults import FAULTS

Changes = Iterator[Change]

_KINDS = {
    "stale key and value in the ring's backward": "stale",
    "wrong zigzag half": "halves",
    "merge without log-sum-exp": "factor",
    "norm's gradient not summed": "group",
    "adapter's gradient not summed": "adapter",
    "dropout by local place": "adapter",
    "norm counted tp times": "twice",
    "local token count": "one rank",
    "labels shifted after the split": "position",
    "bias added tp times": "twice",
    "micro-batch gradients overwritten": "stale",
    "ZeRO shard off by one": "position",
    "rate of matrix-like parameters lost": "schedule",
    "growth mask of the first rank": "growth",
    "interleaved chunk order swapped": "halves",
}
for _name, (_layout, _plant, _bound) in FAULTS.items():
    _text = " ".join((_plant.__doc__ or "").split())
    CATALOGUE[_name] = Fault(_name, _KINDS[_name], f"layout {_layout}", _bound, _text, _plant)


class _Done:
    """A transfer whose result has been replaced."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def wait(self) -> Any:
        return self.value


def _reduced(backend: str, wrong: Any) -> Changes:
    """``wrong(sum, x, group)`` in the place of a bucket's sum over the ranks that share it."""
    module = load(backend, "data_parallel")
    scatter, reduce = module.start_reduce_scatter, module.start_all_reduce

    def scattered(x: Any, group: Any, axis: int) -> Any:
        size = x.shape[axis] // group.size
        own = x[group.rank * size : (group.rank + 1) * size] + 0.0
        return _Done(wrong(scatter(x, group, axis).wait(), own, group))

    def reduced(x: Any, group: Any, *rest: Any) -> Any:
        own = x + 0.0
        return _Done(wrong(reduce(x, group, *rest).wait(), own, group))

    yield module, "start_reduce_scatter", scattered
    yield module, "start_all_reduce", reduced


@fault("one rank", "layout dp2", "loss")
def every_rank_reads_the_first_rows(backend: str) -> Changes:
    """Data-parallel ranks draw the same part of the batch."""
    yield (
        trainer.BaseTrainer,
        "share",
        lambda self, global_batch: (0, global_batch // self.mesh.layout.dp),
    )


@fault("group", "layout dp2", r"gradient \(")
def gradients_not_summed_over_replicas(backend: str) -> Changes:
    """Each data-parallel rank keeps its own."""
    return _reduced(backend, lambda total, own, group: own)


@fault("group", "layout ring2", r"gradient \(")
def gradients_not_summed_over_the_ring(backend: str) -> Changes:
    """Each context-parallel rank keeps those of its own positions."""
    return _reduced(backend, lambda total, own, group: own)


@fault("factor", "layout dp2", r"gradient \(")
def gradients_averaged_once_more(backend: str) -> Changes:
    """The sum over ranks is divided by their number, after the loss was divided by all targets."""
    return _reduced(backend, lambda total, own, group: total / group.size)


@fault("twice", "layout dp2.nozero", r"gradient norm")
def norm_counted_by_every_replica(backend: str) -> Changes:
    """Without ZeRO every data-parallel rank counts the whole gradient."""
    adamw = load(backend, "optim").AdamW
    real = adamw.grad_norm

    def wrong(self: Any) -> float:
        mesh = self.mesh
        self.mesh = dataclasses.replace(mesh, replicas=dataclasses.replace(mesh.replicas, rank=0))
        try:
            return real(self)
        finally:
            self.mesh = mesh

    yield adamw, "grad_norm", wrong


@fault("dtype", "layout dp2", r"gradient \(")
def gradients_sent_in_bfloat16(backend: str) -> Changes:
    """A float32 run's gradients are rounded for their sum over ranks."""
    t = Tensors(backend)
    return _reduced(backend, lambda total, own, group: t.rounded(total))


def _gathered(backend: str, wrong: Any) -> Changes:
    """``wrong(whole, own, group)`` in the place of the weights gathered after an update."""
    module = load(backend, "optim")
    real = module.all_gather
    yield module, "all_gather", lambda x, group, axis: wrong(real(x, group, axis), x, group)


@fault("halves", "layout dp2", "loss|weight's change|gradient")
def gathered_weights_in_the_wrong_order(backend: str) -> Changes:
    """The second rank's part comes first."""
    t = Tensors(backend)
    return _gathered(backend, lambda whole, own, group: t.swapped(whole, 0))


@fault("stale", "layout dp2", "weight's change")
def other_ranks_weights_stale(backend: str) -> Changes:
    """After an update a rank computes with the others' weights of before."""
    held: dict[int, Any] = {}
    module = load(backend, "optim")
    real = module.all_gather
    number = [0]

    def wrong(x: Any, group: Any, axis: int) -> Any:
        whole = real(x, group, axis)
        calls = number[0] = number[0] + 1
        first = held.setdefault(whole.shape[0] * 1000 + calls % 2, whole + 0.0)
        size = x.shape[0]
        t = Tensors(backend)
        parts = [x if r == group.rank else t.part(first, 0, r * size, size) for r in range(group.size)]
        return t.cat(parts)

    yield module, "all_gather", wrong


@fault("group", "layout tp2.nosp", r"gradient \(")
def column_gradient_not_summed(backend: str) -> Changes:
    """What goes into column-parallel matrices has no sum over ranks in its backward."""
    yield load(backend, "tensor_parallel"), "copy_to", lambda x, group: x


@fault("twice", "layout tp2", "loss")
def tokens_looked_up_by_every_rank(backend: str) -> Changes:
    """Ranks without a token's row add one of theirs."""
    module = load(backend, "tensor_parallel")
    real, t = module.ops.embedding, Tensors(backend)

    def construct(self: Any, input_ids: Any) -> Any:
        rows = self.weight.shape[0]
        local = input_ids - self.group.rank * rows
        x = real(self.weight, t.not_negative(local) - t.not_negative(local - rows + 1))
        return module._sum_parts(x, self)

    yield module.VocabParallelEmbedding, {"ms": "construct", "pt": "forward"}[backend], construct


@fault("group", "layout tp2", "loss")
def softmax_over_own_columns(backend: str) -> Changes:
    """A rank normalises by its part of the vocabulary."""
    module = load(backend, "tensor_parallel")
    real, t = module.all_reduce, Tensors(backend)

    def wrong(x: Any, group: Any, op: str = "sum") -> Any:
        found = real(x, group, op)
        if op == "max":
            return x
        return t.cat((t.part(x, 0, 0, 1), t.part(found, 0, 1, 1)))

    yield module, "all_reduce", wrong


@fault("one rank", "layout tp2", "loss")
def targets_of_the_first_columns(backend: str) -> Changes:
    """Every rank looks its targets up as if its columns were the first."""
    module = load(backend, "tensor_parallel")
    real = module.ops.shard_statistics
    yield module.ops, "shard_statistics", lambda logits, targets, first, real_: real(logits, targets, 0, real_)


@fault("halves", "layout tp2", "loss")
def positions_gathered_in_the_wrong_order(backend: str) -> Changes:
    """Sequence parallelism puts the second rank's positions first."""
    module, t = load(backend, "tensor_parallel"), Tensors(backend)
    real = module.gather_sequence
    yield module, "gather_sequence", lambda x, group, axis: t.swapped(real(x, group, axis), axis)


@fault("factor", "layout tp2", "loss")
def partial_products_averaged(backend: str) -> Changes:
    """Row-parallel products are averaged over ranks, not summed."""
    module = load(backend, "tensor_parallel")
    real = module.scatter_sum
    yield module, "scatter_sum", lambda x, group, axis: real(x, group, axis) * 0.5


@fault("group", "layout pp2:tied", r"gradient \(embed")
def tied_gradient_not_summed(backend: str) -> Changes:
    """First and last stage keep their own part of the gradient of a tied table."""
    parallelize = load(backend, "parallelize")
    real = parallelize.chunk_table

    def wrong(*args: Any) -> dict[str, Any]:
        table = real(*args)
        return {
            name: dataclasses.replace(shard, sum_over=()) if name == "embed.weight" else shard
            for name, shard in table.items()
        }

    yield parallelize, "chunk_table", wrong


@fault("stale", "layout pp2:gather", "loss")
def masks_of_the_first_micro_batch(backend: str) -> Changes:
    """A pipeline uses one micro-batch's masks for all."""
    return _first_of(backend, "plans")


@fault("stale", "layout pp2", "loss")
def labels_of_the_first_micro_batch(backend: str) -> Changes:
    """The last stage has one micro-batch's labels for all."""
    step = load(backend, "pipeline")._Step
    real = step._loss

    def wrong(self: Any, logits: Any, batch: Any, vocab_size: int) -> Any:
        return real(self, logits, dataclasses.replace(batch, targets=self.batches[0].targets), vocab_size)

    yield step, "_loss", wrong


def _first_of(backend: str, name: str) -> Changes:
    step = load(backend, "pipeline")._Step
    real = step.__init__

    def wrong(self: Any, *args: Any) -> None:
        real(self, *args)
        held = getattr(self, name)
        setattr(self, name, [held[0]] * len(held))

    yield step, "__init__", wrong


@fault("remainder", "layout pp2", "loss")
def loss_of_the_last_micro_batch(backend: str) -> Changes:
    """The pipeline reports one loss of those it made."""
    module = load(backend, "pipeline")
    real = module._Step.end

    def wrong(self: Any) -> None:
        real(self)
        self.losses = self.losses[-1:]

    yield module._Step, "end", wrong


@fault("stale", "layout pp2", r"gradient \(")
def gradient_of_the_stream_stale(backend: str) -> Changes:
    """The first stage goes back with the gradient of the first micro-batch for all of the same length."""
    step = load(backend, "pipeline")._Step
    real, held = step._receive, dict[Any, Any]()

    def wrong(self: Any, micro: int, link: Any) -> Any:
        x = real(self, micro, link)
        if link is self.mesh.backward_in:
            return held.setdefault((id(self), tuple(x.shape)), x)
        return x

    yield step, "_receive", wrong


@fault("halves", "layout ulysses2", "loss")
def heads_of_the_other_rank(backend: str) -> Changes:
    """Ulysses' keys and values meet the other rank's queries."""
    module, t = load(backend, "ulysses"), Tensors(backend)
    real = module.positions_for_heads
    context = load(backend, "context_parallel")

    def wrong(q: Any, k: Any, v: Any, group: Any) -> Any:
        return real(q, t.swapped(k, 2), t.swapped(v, 2), group)

    yield context, "positions_for_heads", wrong


@fault("halves", "layout ulysses2", "loss")
def heads_returned_in_the_wrong_order(backend: str) -> Changes:
    """After Ulysses' attention the second half of the heads comes first."""
    module, t = load(backend, "context_parallel"), Tensors(backend)
    real = module.heads_for_positions
    yield module, "heads_for_positions", lambda out, group: t.swapped(real(out, group), 2)


@fault("one rank", "layout ring2", r"gradient \(.*(k|v)\.weight")
def key_gradients_one_hop_short(backend: str) -> Changes:
    """The sums of a ring's gradients stay with the neighbour of those that they belong to."""
    ring = load(backend, "ring_attention")
    shift, backward, now = ring.start_shift, ring.RingAttention.backward, list[int]()

    def faulty_shift(x: Any, group: Any) -> Any:
        handle = shift(x, group)
        if not now:
            return handle
        now[0] += 1
        last = now[0] == 2 * group.size - 1  # keys R - 1 times, sums R times, the sums last
        value = handle.wait()
        return _Done(x if last else value)

    def faulty_backward(ctx: Any, grad: Any) -> Any:
        now[:] = [0]
        try:
            return backward(ctx, grad)
        finally:
            now.clear()

    yield ring, "start_shift", faulty_shift
    yield ring.RingAttention, "backward", staticmethod(faulty_backward)


@fault("position", "layout ring2", "loss")
def positions_of_the_local_part(backend: str) -> Changes:
    """A context-parallel rank counts its positions from 0."""
    real = trainer.split_batch

    def wrong(batch: Any, layout: Any, cp_rank: int) -> Any:
        local = real(batch, layout, cp_rank)
        count = np.arange(local.positions.shape[1], dtype=np.int32)
        return dataclasses.replace(local, positions=np.tile(count, (len(local.positions), 1)))

    yield trainer, "split_batch", wrong


@fault("remainder", "layout ring2", "loss")
def padding_of_the_split_counted(backend: str) -> Changes:
    """Places that only make a row divisible have token 0 as their target."""
    real = sequence.pad_batch

    def wrong(batch: Any, multiple: int) -> Any:
        padded = real(batch, multiple)
        targets = padded.targets.copy()
        targets[:, batch.targets.shape[1] :] = 0
        return dataclasses.replace(padded, targets=targets)

    yield sequence, "pad_batch", wrong


@fault("group", "layout ring2:gather", "loss")
def keys_gathered_in_rank_order(backend: str) -> Changes:
    """Gathered keys are not sorted back from the zigzag."""
    module = load(backend, "context_parallel")
    real = module.gather_order

    def wrong(visibility: Any) -> Any:
        slices = real(visibility)
        return sorted(slices)

    yield module, "gather_order", wrong


@fault("factor", "layout ring2", r"gradient \(")
def delta_left_out(backend: str) -> Changes:
    """The softmax's backward lacks the sum of out times its gradient."""
    ops = load(backend, "ops")
    real = ops.attention_block_backward

    def wrong(q: Any, k: Any, v: Any, hidden: Any, lse: Any, grad: Any, delta: Any, out: Any = None) -> Any:
        return real(q, k, v, hidden, lse, grad, delta * 0.0, out)

    yield ops, "attention_block_backward", wrong


@fault("stale", "layout tp2:full", r"gradient")
def recomputed_without_rotation(backend: str) -> Changes:
    """A block computed again in the backward has the rotary tables of position 0."""
    attention = load(backend, "model").Attention
    name = {"ms": "construct", "pt": "forward"}[backend]
    real, seen = getattr(attention, name), dict[Any, int]()

    def wrong(self: Any, x: Any, rope: Any, *rest: Any) -> Any:
        key = (id(self), id(rope))
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            rope = tuple(table * 0.0 + (1.0 if n == 0 else 0.0) for n, table in enumerate(rope))
        return real(self, x, rope, *rest)

    yield attention, name, wrong


@fault("adapter", "layout tp2:lora", r"gradient \(.*lora_b\)")
def adapter_b_not_summed(backend: str) -> Changes:
    """Each tensor rank keeps its own part of the gradient of a B after a split product."""
    parallelize = load(backend, "parallelize")
    real = parallelize.chunk_table

    def wrong(*args: Any) -> dict[str, Any]:
        return {
            name: dataclasses.replace(shard, sum_over=()) if name.endswith(("o.lora_b", "down.lora_b")) else shard
            for name, shard in real(*args).items()
        }

    yield parallelize, "chunk_table", wrong


@fault("preference", "layout ring2:pairs", "loss")
def rows_of_pairs_summed_by_each_rank(backend: str) -> Changes:
    """A context-parallel rank takes the log-probability of its own positions for the row's."""
    module = load(backend, "losses")
    real = module.agree

    def wrong(values: list[float], group: Any, op: str) -> list[float]:
        real(values, group, op)
        return list(values)

    yield module, "agree", wrong


@fault("one rank", "layout dp2:pairs", "loss|gradient")
def reference_of_the_first_rows(backend: str) -> Changes:
    """Every data-parallel rank has the first rank's reference."""
    real = worker.pad_rows

    def wrong(batch: Any, multiple: int) -> Any:
        padded = real(batch, multiple)
        if padded.reference is None:
            return padded
        half = len(padded.reference) // 2
        return dataclasses.replace(padded, reference=np.tile(padded.reference[:half], 2))

    yield worker, "pad_rows", wrong
