"""Tensor and sequence parallelism: a layer's matrices split over ranks, the stream between layers split by position.

Column-parallel matrices (q, k, v, gate, up, head) hold rows, row-parallel ones (o, down) columns. A norm is followed by
the gathering of positions, a row-parallel product by the sum over ranks that scatters them again (Korthikanti et al.,
arXiv 2205.05198). Without sequence parallelism both sides hold all positions and only sums remain (Shoeybi et al.,
arXiv 1909.08053).
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn
from mindspore import ops as mops

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.parallel.mesh import Group, Mesh
from telechat_twins.telechat_ms import ops
from telechat_twins.telechat_ms.autograd import Context, Function
from telechat_twins.telechat_ms.collectives import all_reduce, copy_to, gather_sequence, reduce_from, scatter_sum
from telechat_twins.telechat_ms.model import Again, Decoder, Embedding, Linear, Norm

SEQUENCE = 1  # the axis of positions in [B, S, E]


def apply_tensor_parallel(stage: Decoder, mesh: Mesh) -> None:
    """Put the communicating layers in place of the plain ones of a stage that was built with local shapes."""
    if mesh.tp.size == 1:
        return
    for block in stage.layers.values():
        block.attn_norm, block.ffn_norm = (NormBeforeColumns(norm, mesh) for norm in (block.attn_norm, block.ffn_norm))
        block.attn.o, block.ffn.down = RowParallel(block.attn.o, mesh), RowParallel(block.ffn.down, mesh)
    if stage.embed is not None and stage.first:
        stage.embed = VocabParallelEmbedding(stage.embed, mesh)
    if stage.norm is not None:
        stage.norm = NormBeforeColumns(stage.norm, mesh)


class NormBeforeColumns(Norm):
    """A norm whose output goes into column-parallel matrices: afterwards every rank needs every position."""

    def __init__(self, norm: Norm, mesh: Mesh) -> None:
        nn.Cell.__init__(self)
        self.eps, self.share, self.counted, self.dtypes = norm.eps, norm.share, norm.counted, norm.dtypes
        self.weight, self.bias, self.mask = norm.weight, norm.bias, norm.mask
        self.group, self.sequence_parallel = mesh.tp, mesh.layout.sequence_parallel

    def construct(self, x: Tensor) -> Tensor:
        return self._spread(super().construct(x))

    def again(self, x: Tensor) -> None:
        """Positions would have to be gathered anew: layers keep what they read."""

    def after_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, stream = super().after_sum(x, residual)
        return self._spread(x), stream

    def _spread(self, x: Tensor) -> Tensor:
        return gather_sequence(x, self.group, SEQUENCE) if self.sequence_parallel else copy_to(x, self.group)


class RowParallel(Linear):
    """A product whose inner dimension is split: partial results are summed, and only then the bias is added, once."""

    def __init__(self, linear: Linear, mesh: Mesh) -> None:
        nn.Cell.__init__(self)
        self.compute, self.weight, self.bias = linear.compute, linear.weight, linear.bias
        self.lora_a, self.lora_b, self.scale = linear.lora_a, linear.lora_b, linear.scale
        self.group, self.sequence_parallel = mesh.tp, mesh.layout.sequence_parallel

    def construct(self, x: Tensor, dropped: Tensor | None = None, again: Again | None = None) -> Tensor:
        # The adapter's A holds this rank's columns and B is whole: B (A x) of the parts is summed with W x.
        x = _sum_parts(self.product(x, dropped, None, again), self)
        return x if self.bias is None else ops.add_bias(x, self.bias, self.compute)


class VocabParallelEmbedding(Embedding):
    """A lookup in this rank's rows of the table; the other ranks' tokens contribute zeros."""

    def __init__(self, embedding: Embedding, mesh: Mesh) -> None:
        nn.Cell.__init__(self)
        self.residual, self.weight = embedding.residual, embedding.weight
        self.group, self.sequence_parallel = mesh.tp, mesh.layout.sequence_parallel

    def construct(self, input_ids: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = input_ids - self.group.rank * rows
        held = mops.cast(mops.logical_and(local >= 0, local < rows), ms.int32)
        x = ops.embedding(self.weight, local * held)
        return mops.cast(_sum_parts(x * mops.cast(held, x.dtype).reshape(*held.shape, 1), self), self.residual)


def _sum_parts(x: Tensor, layer: RowParallel | VocabParallelEmbedding) -> Tensor:
    if layer.sequence_parallel:
        return scatter_sum(x, layer.group, SEQUENCE)
    return reduce_from(x, layer.group)


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, mesh: Mesh) -> Tensor:
    """ops.cross_entropy of logits [B, S, V/tp] that are this rank's columns; every rank gets the whole sum.

    Columns that stand for no token (the vocabulary was padded) get no probability and no gradient.
    """
    if mesh.tp.size == 1:
        return ops.cross_entropy(logits, targets)
    flat = ops.wide(logits).reshape(-1, logits.shape[-1])
    return VocabParallelCrossEntropy.apply(flat, targets.reshape(-1), vocab_size, mesh.tp)


class VocabParallelCrossEntropy(Function):
    """Sum of -log softmax(logits)[target] over positions whose target is not IGNORE.

    logits [N, V/tp], targets [N].
    """

    @staticmethod
    def forward(ctx: Context, logits: Tensor, targets: Tensor, vocab_size: int, group: Group) -> Tensor:
        columns = logits.shape[-1]
        first = group.rank * columns
        real = max(0, min(columns, vocab_size - first))
        own, picked = ops.shard_statistics(logits, targets, first, real)
        largest = all_reduce(own, group, "max")
        sums, picked = all_reduce(mops.stack((ops.accurate(mops.exp, own - largest), picked)), group)
        log_sum_exp = largest + ops.accurate(mops.log, sums)
        ctx.save_for_backward(logits, targets, log_sum_exp)
        ctx.columns = first, real
        return ops.total((log_sum_exp - picked) * mops.cast(targets != IGNORE, logits.dtype))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum_exp = ctx.saved_tensors
        first, real = ctx.columns
        return ops.shard_gradient(logits, targets, first, real, log_sum_exp, grad), None, None, None
