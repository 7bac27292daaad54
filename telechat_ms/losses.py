"""Losses whose terms are not all alike: token losses with weights, and functions of a row's log-probability."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor
from mindspore import ops as mops

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.parallel.mesh import Group, Mesh
from telechat_twins.core.parallel.objective import RowObjective
from telechat_twins.core.parallel.sequence import LocalBatch
from telechat_twins.telechat_ms import ops
from telechat_twins.telechat_ms.autograd import Context, Function
from telechat_twins.telechat_ms.collectives import agree, all_reduce


def weighted_cross_entropy(logits: Tensor, batch: LocalBatch, vocab_size: int, mesh: Mesh) -> Tensor:
    """Sum over this rank's positions of weight * token loss; every tensor rank gets the whole sum.

    logits [B, s, V/tp], over which the gradient may be written.
    """
    assert batch.weights is not None
    losses = _token_losses(logits, batch, vocab_size, mesh)
    return ops.total(losses * _row_vector(batch.weights, losses))


def row_surrogate(
    logits: Tensor, batch: LocalBatch, vocab_size: int, mesh: Mesh, objective: RowObjective, num_terms: int
) -> Tensor:
    """A scalar whose gradient is that of ``objective / num_terms``; its own value has no meaning.

    An objective is a function of the log-probabilities of whole rows, summed here over positions and context-parallel
    ranks in float64. By the chain rule its gradient is that of the token losses, each row times a number: minus the
    objective's derivative by the row's log-probability.
    """
    losses = _token_losses(logits, batch, vocab_size, mesh)
    tokens_Bs = losses.asnumpy().astype(np.float64).reshape(batch.targets.shape)
    log_probs = np.asarray(agree((-tokens_Bs.sum(1)).tolist(), mesh.cp, "sum"))
    factors = -objective(log_probs, batch.reference) / num_terms
    return ops.total(losses * _row_vector(np.broadcast_to(factors[:, None], tokens_Bs.shape), losses))


def _token_losses(logits: Tensor, batch: LocalBatch, vocab_size: int, mesh: Mesh) -> Tensor:
    flat = ops.wide(logits).reshape(-1, logits.shape[-1])
    return TokenLosses.apply(flat, Tensor(batch.targets.reshape(-1)), vocab_size, mesh.tp)


def _row_vector(values: np.ndarray, beside: Tensor) -> Tensor:
    """values [B, s] as [B * s] in the dtype of ``beside``."""
    return Tensor(np.ascontiguousarray(values).reshape(-1), beside.dtype)


class TokenLosses(Function):
    """-log softmax(logits)[target] of every position, [N]; 0 where the target is IGNORE.

    logits [N, V/tp], over which a fused operator writes the gradient; targets [N].
    """

    @staticmethod
    def forward(ctx: Context, logits: Tensor, targets: Tensor, vocab_size: int, group: Group) -> Tensor:
        columns = logits.shape[-1]
        first = group.rank * columns
        real = max(0, min(columns, vocab_size - first))
        log_sum_exp, picked = ops.shard_statistics(logits, targets, first, real)
        if group.size > 1:
            # log(sum over ranks of exp(own)), shifted by the largest so that nothing overflows.
            largest = all_reduce(log_sum_exp, group, "max")
            shifted = ops.accurate(mops.exp, log_sum_exp - largest)
            sums, picked = all_reduce(mops.stack((shifted, picked)), group)
            log_sum_exp = largest + ops.accurate(mops.log, sums)
        ctx.save_for_backward(logits, targets, log_sum_exp)
        ctx.columns = first, real
        return (log_sum_exp - picked) * mops.cast(targets != IGNORE, log_sum_exp.dtype)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum_exp = ctx.saved_tensors
        first, real = ctx.columns
        one = Tensor(1.0, grad.dtype)
        unit = ops.shard_gradient(logits, targets, first, real, log_sum_exp, one)
        return unit * grad.reshape(-1, 1), None, None, None
