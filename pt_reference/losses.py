"""Losses whose terms are not all alike: token losses with weights, and functions of a row's log-probability."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.parallel.mesh import Group, Mesh
from telechat_twins.core.parallel.objective import RowObjective
from telechat_twins.core.parallel.sequence import LocalBatch
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.collectives import agree, all_reduce


def weighted_cross_entropy(logits: Tensor, batch: LocalBatch, vocab_size: int, mesh: Mesh) -> Tensor:
    """Sum over this rank's positions of weight * token loss; every tensor rank gets the whole sum.

    logits [B, s, V/tp], over which the gradient is written.
    """
    assert batch.weights is not None
    losses = _token_losses(logits, batch, vocab_size, mesh)
    return (losses * _row_vector(batch.weights, losses)).sum()


def row_surrogate(
    logits: Tensor, batch: LocalBatch, vocab_size: int, mesh: Mesh, objective: RowObjective, num_terms: int
) -> Tensor:
    """A scalar whose gradient is that of ``objective / num_terms``; its own value has no meaning.

    An objective is a function of the log-probabilities of whole rows, summed here over positions and context-parallel
    ranks in float64. By the chain rule its gradient is that of the token losses, each row times a number: minus the
    objective's derivative by the row's log-probability.
    """
    losses = _token_losses(logits, batch, vocab_size, mesh)
    tokens_Bs = losses.detach().double().cpu().numpy().reshape(batch.targets.shape)
    log_probs = np.asarray(agree((-tokens_Bs.sum(1)).tolist(), mesh.cp, "sum"))
    factors = -objective(log_probs, batch.reference) / num_terms
    return (losses * _row_vector(np.broadcast_to(factors[:, None], tokens_Bs.shape), losses)).sum()


def _token_losses(logits: Tensor, batch: LocalBatch, vocab_size: int, mesh: Mesh) -> Tensor:
    targets = torch.from_numpy(batch.targets).to(logits.device)
    return TokenLosses.apply(logits.flatten(0, -2), targets.flatten(), vocab_size, mesh.tp)


def _row_vector(values: np.ndarray, beside: Tensor) -> Tensor:
    """values [B, s] as [B * s] in the dtype and on the device of ``beside``."""
    return torch.from_numpy(np.ascontiguousarray(values).reshape(-1)).to(beside.device, beside.dtype)


class TokenLosses(torch.autograd.Function):
    """-log softmax(logits)[target] of every position, [N]; 0 where the target is IGNORE.

    logits [N, V/tp], over which the gradient is written; targets [N].
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor, vocab_size: int, group: Group) -> Tensor:
        columns = logits.shape[-1]
        first = group.rank * columns
        real = max(0, min(columns, vocab_size - first))
        log_sum_exp, picked = ops.shard_statistics(logits, targets, first, real)
        if group.size > 1:
            # log(sum over ranks of exp(own)), shifted by the largest so that nothing overflows.
            largest = all_reduce(log_sum_exp, group, "max")
            sums, picked = all_reduce(torch.stack((torch.exp(log_sum_exp - largest), picked)), group)
            log_sum_exp = largest + torch.log(sums)
        ctx.save_for_backward(logits, targets, log_sum_exp)
        ctx.columns = first, real
        return (log_sum_exp - picked) * (targets != IGNORE)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum_exp = ctx.saved_tensors
        first, real = ctx.columns
        unit = ops.shard_gradient(logits, targets, first, real, log_sum_exp, grad.new_ones(()))
        return unit.mul_(grad[:, None]), None, None, None
