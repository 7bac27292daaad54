"""Cross-entropy over a rank's shard of the vocabulary; the gradient overwrites the logits.

Rank r holds the columns [first, first + C), of which the first ``real`` are tokens. Forward: log_sum_exp over its
columns and the target's logit, 0 if another rank has it; over ranks, lse = log(sum(exp(log_sum_exp))) and the logit is
the sum. Backward, from the lse of all ranks: factor * (exp(x - lse) (1 + 2 z lse) - onehot(target)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.kernels.triton.launch import INTEGERS, check, launch, tiles_for

_IGNORE = tl.constexpr(IGNORE)


@triton.jit
def row_log_sum(
    logits_ptr, targets_ptr, lse_ptr, picked_ptr, N, stride, first, real, STAGES: tl.constexpr, BLOCK: tl.constexpr
):
    """log_sum_exp and target's logit of a row in one pass (online softmax).

    The running maximum is a scalar, the running sums of exponentials are a vector of BLOCK lanes: per block only the
    maximum is reduced, and the lanes are added once at the end.
    """
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        base = logits_ptr + tl.cast(row, tl.int64) * stride
        top = -1.0e38
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, real, BLOCK, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(base + columns, mask=columns < real, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(top, tl.max(x, 0))
            sums = sums * tl.exp(top - larger) + tl.exp(x - larger)
            top = larger
        total = tl.sum(sums, 0)
        log_sum = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + row, log_sum)
        target = tl.load(targets_ptr + row)
        local = target - first
        held = (target != _IGNORE) & (local >= 0) & (local < real)
        picked = tl.load(base + tl.where(held, local, 0), mask=held, other=0.0).to(tl.float32)
        tl.store(picked_ptr + row, picked)


@triton.jit
def row_gradient(
    logits_ptr,
    targets_ptr,
    lse_ptr,
    factor_ptr,
    out_ptr,
    N,
    C,
    stride,
    out_stride,
    first,
    real,
    z_loss,
    factor,
    FACTOR_THERE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(C, BLOCK)
    if FACTOR_THERE:
        factor = tl.load(factor_ptr).to(tl.float32)
    for task in range(tl.program_id(0), N * blocks, tl.num_programs(0)):
        row = task // blocks
        columns = task % blocks * BLOCK + tl.arange(0, BLOCK)
        target = tl.load(targets_ptr + row)
        log_sum = tl.load(lse_ptr + row)  # over all ranks
        counted = target != _IGNORE
        there = columns < C
        x = tl.load(logits_ptr + tl.cast(row, tl.int64) * stride + columns, mask=there, other=0.0).to(tl.float32)
        grad = tl.exp(x - log_sum) * (1.0 + 2.0 * z_loss * log_sum)
        grad = tl.where(columns == target - first, grad - 1.0, grad)
        grad = tl.where((columns < real) & counted, grad * factor, 0.0)
        at = out_ptr + tl.cast(row, tl.int64) * out_stride + columns
        tl.store(at, grad.to(out_ptr.dtype.element_ty), mask=there)


def cross_entropy_forward(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """kernels.reference.cross_entropy_shard: logits [N, C], targets [N] int -> (log_sum_exp, picked) [N] float32.

    Columns [first, first + C) of the vocabulary; those from ``real`` on are padding. Raises TypeError or ValueError
    naming the wrong argument.
    """
    logits = _check(logits, targets, first, real)
    N, C = logits.shape
    log_sum_exp = torch.empty(N, dtype=torch.float32, device=logits.device)
    picked = torch.empty_like(log_sum_exp)
    arguments = {
        "logits_ptr": logits,
        "targets_ptr": targets.contiguous(),
        "lse_ptr": log_sum_exp,
        "picked_ptr": picked,
        "N": N,
        "stride": logits.stride(0),
        "first": first,
        "real": real,
    }
    tiles = tiles_for("cross_entropy_forward", logits, C=C)
    launch(row_log_sum, N, tiles, arguments, STAGES=tiles.stages)
    return log_sum_exp, picked


def cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    first: int,
    real: int,
    log_sum_exp: Tensor,
    factor: Tensor | float = 1.0,
    z_loss: float = 0.0,
    in_place: bool = True,
) -> Tensor:
    """kernels.reference.cross_entropy_shard_backward times ``factor``, in the logits' dtype.

    log_sum_exp [N] float32 over all ranks; factor a number or a tensor of one element. ``in_place`` overwrites and
    returns the logits, without a second tensor of their size; their rows must be contiguous (ValueError).
    """
    if in_place and isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits: got strides {logits.stride()}, needs contiguous columns with in_place")
    given, logits = logits, _check(logits, targets, first, real)
    N, C = logits.shape
    check("log_sum_exp", log_sum_exp, (N,), (torch.float32,), beside=logits)
    if isinstance(factor, Tensor):
        check("factor", factor, beside=logits)
        if factor.numel() != 1:
            raise ValueError(f"factor: got shape {tuple(factor.shape)}, needs one element")
    out = given if in_place else torch.empty((N, C), dtype=logits.dtype, device=logits.device)
    arguments = {
        "logits_ptr": logits,
        "targets_ptr": targets.contiguous(),
        "lse_ptr": log_sum_exp.contiguous(),
        "factor_ptr": factor if isinstance(factor, Tensor) else None,
        "out_ptr": out,
        "N": N,
        "C": C,
        "stride": logits.stride(0),
        "out_stride": out.stride(0),
        "first": first,
        "real": real,
        "z_loss": float(z_loss),
        "factor": 1.0 if isinstance(factor, Tensor) else float(factor),
    }
    tiles = tiles_for("cross_entropy_backward", logits, C=C)
    work = N * triton.cdiv(C, tiles.constants["BLOCK"])
    launch(row_gradient, work, tiles, arguments, FACTOR_THERE=isinstance(factor, Tensor))
    return out


def _check(logits: Tensor, targets: Tensor, first: int, real: int) -> Tensor:
    """The logits with contiguous columns, after the checks of all arguments."""
    check("logits", logits, (None, None))
    N, C = logits.shape
    if C == 0:
        raise ValueError("logits: got no column, needs at least one")
    check("targets", targets, (N,), INTEGERS, beside=logits)
    if not 0 <= real <= C:
        raise ValueError(f"real: got {real}, needs 0 to {C}, the columns of logits")
    if first < 0:
        raise ValueError(f"first: got {first}, needs 0 or more")
    return logits if logits.stride(1) == 1 or C == 1 else logits.contiguous()
