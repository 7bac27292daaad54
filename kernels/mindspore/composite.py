"""Composite operators of the decoder: MindSpore's primitive operators, differentiated by its autograd.

Used where no fused operator is available, and in float64. B batch, S queries, T keys, H heads, K kv heads, D head dim,
E hidden, V vocabulary, N rows.

float64 is the reference for the other precisions, so every step must be float64. MindSpore (2.9.0) rounds a Python
number combined with a tensor to float32, whatever the tensor's dtype: constants are tensors of that dtype here. Its CPU
log_softmax computes float32 for float64 inputs, and Adam and OneHot lack float64; exp, log, softmax, sigmoid, rsqrt,
sums and matrix products are correct to a few units in the last place (tests/parity/test_float64.py).

MindSpore's CPU device lacks a bfloat16 matrix product, and its float16 product does not document how it accumulates.
There operands are rounded to the compute dtype, multiplied in float32, and the result is rounded: the arithmetic of a
matrix unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import Block
from telechat_twins.kernels.adamw import AdamWStep

_HIDDEN = -1.0e30  # added to masked scores; finite, so that a fully masked row gives no NaN
_SERIAL_SUM, _ROW = 16384, 1024  # elements: the longest sum of one CPU thread; a row of a longer sum


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, compute: ms.Type) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias, operands and result in ``compute``, accumulated in float32 or wider."""
    flat = operand(x, compute).reshape(-1, x.shape[-1])
    out = ops.MatMul(transpose_b=True)(flat, operand(weight, compute))
    if bias is not None:
        out = add_bias(out, bias, compute)
    return ops.cast(out, compute).reshape(*x.shape[:-1], weight.shape[0])


def dequantize(values: Tensor, factors: Tensor, dtype: ms.Type) -> Tensor:
    """values int8 [out, in] times factors float32 [out], in ``dtype``."""
    wide = dtype if dtype == ms.float64 else ms.float32
    return ops.cast(ops.cast(values, wide) * ops.cast(factors, wide).reshape(-1, 1), dtype)


def add_bias(x: Tensor, bias: Tensor, compute: ms.Type) -> Tensor:
    """x [..., E] + bias [E] rounded to ``compute``, in the dtype of x; added in a dtype the device can reduce."""
    wide = operand(x, x.dtype)
    return ops.cast(wide + ops.cast(ops.cast(bias, compute), wide.dtype), x.dtype)


def embedding(table: Tensor, input_ids: Tensor) -> Tensor:
    """table [V, E], input_ids [B, S] -> [B, S, E]."""
    return ops.cast(ops.gather(operand(table, table.dtype), input_ids, 0), table.dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, stat: ms.Type, compute: ms.Type, mask: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in ``stat``, cast to ``compute``, then times weight [E]: the released models' order.

    ``mask`` [E]: kernels.reference.rms_norm.
    """
    x = ops.cast(x, stat)
    x = x * ops.rsqrt(_mean(x * x, mask) + Tensor(eps, stat))
    out = operand(x, compute) * operand(weight, compute)
    if mask is not None:
        out = out * ops.cast(mask, out.dtype)
    return ops.cast(out, compute)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stat: ms.Type,
    compute: ms.Type,
    mask: Tensor | None = None,
    counted: int | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight [E] + bias [E] in ``stat``, cast to ``compute``.

    ``mask`` and ``counted``: kernels.reference.layer_norm.
    """
    x = ops.cast(x, stat)
    if counted is None:
        x = x - _mean(x, mask)
        x = x * ops.rsqrt(_mean(x * x, mask) + Tensor(eps, stat))
    else:
        x = x - _mean(x[..., :counted], None)
        few = x[..., :counted]
        x = x * ops.rsqrt(_mean(few * few, None) + Tensor(eps, stat))
    out = x * ops.cast(weight, stat) + ops.cast(bias, stat)
    return ops.cast(out if mask is None else out * ops.cast(mask, stat), compute)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return ops.ReduceMean(keep_dims=True)(x, -1)
    mask = ops.cast(mask, x.dtype)
    return ops.ReduceSum(keep_dims=True)(x * mask, -1) / ops.ReduceSum()(mask)


def rope(x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None = None) -> Tensor:
    """Half rotation of x [B, S, H, D] by cos, sin [B or 1, S, 1, D/2], computed in the tables' dtype.

    ``scale``, shaped like the tables, multiplies both halves.
    """
    if scale is not None:
        cos, sin = cos * scale, sin * scale
    first, second = ops.split(ops.cast(x, cos.dtype), x.shape[-1] // 2, -1)
    return ops.cast(ops.concat((first * cos - second * sin, second * cos + first * sin), -1), x.dtype)


def swiglu(gate: Tensor, up: Tensor, stat: ms.Type) -> Tensor:
    """silu(gate) * up in ``stat``, returned in the dtype of ``gate``."""
    return ops.cast(ops.silu(ops.cast(gate, stat)) * ops.cast(up, stat), gate.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form, in float32 or wider: x / (1 + e^-2u) with u = sqrt(2/pi) * (x + 0.044715 x^3)."""
    wide = x if x.dtype == ms.float64 else ops.cast(x, ms.float32)
    slope, cubic = Tensor(2.0 * math.sqrt(2.0 / math.pi), wide.dtype), Tensor(0.044715, wide.dtype)
    twice = wide * slope * (1 + cubic * wide * wide)
    return ops.cast(wide * ops.sigmoid(twice), x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), softmax in float32 or wider.

    q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]. Query heads j*H/K .. (j+1)*H/K - 1 share kv head j: they are
    stacked along the queries, so that keys and values are not repeated.
    """
    B, S, H, D = q.shape
    K = k.shape[2]
    G = H // K  # query heads per kv head
    compute = q.dtype
    stat = compute if compute in (ms.float32, ms.float64) else ms.float32
    q_BHSD, k_BKTD, v_BKTD = (operand(ops.transpose(t, (0, 2, 1, 3)), compute) for t in (q, k, v))
    out = []
    # A block is a range of queries and the prefix of keys that contains all they attend to.
    for first, last, keys, hidden in blocks:
        rows = last - first
        q_block = q_BHSD if rows == S else q_BHSD[:, :, first:last]
        k_block, v_block = (t if keys == t.shape[2] else t[:, :, :keys] for t in (k_BKTD, v_BKTD))
        # [B, K, G * rows, D] @ [B, K, D, keys] -> [B, K, G * rows, keys]; rounded to compute before the softmax.
        scores = ops.BatchMatMul(transpose_b=True)(q_block.reshape(B, K, G * rows, D), k_block)
        scores = ops.cast(scores, stat) * Tensor(D**-0.5, stat)
        if hidden is not None:  # additive mask [B or 1, 1, 1, rows, keys], one for all heads
            scores = (scores.reshape(B, K, G, rows, keys) + ops.cast(hidden, stat)).reshape(scores.shape)
        weights = operand(_softmax(scores), compute)
        out.append(ops.BatchMatMul()(weights, v_block).reshape(B, H, rows, D))
    out_BHSD = out[0] if len(out) == 1 else ops.concat(out, 2)
    return ops.cast(ops.transpose(out_BHSD, (0, 2, 1, 3)), compute)


def hidden_keys(visible: np.ndarray) -> Tensor:
    """The additive float32 mask [B or 1, 1, 1, S, T] of a mask bool [B or 1, S, T]: 0 or -1e30."""
    return Tensor(np.where(visible, np.float32(0), np.float32(_HIDDEN))[:, None, None])


def attention_block(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Partial attention over one block of keys, for merge_blocks: out [B, H, S, D] and log_sum_exp [B, H, S, 1].

    q [B, H, S, D], k and v [B, K, T, D], float32 or wider; ``hidden`` from ``hidden_keys``, or None when every query
    attends to every key. A query without visible keys has a log_sum_exp of about -1e30, so its output has weight 0.
    """
    weights, log_sum_exp = softmax_and_log_sum(_block_scores(q, k, hidden))
    out = ops.BatchMatMul()(weights, v)  # [B, K, H/K * S, D]
    return out.reshape(q.shape), log_sum_exp.reshape(*q.shape[:3], 1)


def attention_block_backward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, log_sum_exp: Tensor, grad_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block, from the *final* log_sum_exp [B, H, S, 1] and ``delta`` = sum(out * grad_out) over D.

    With P = exp(scores - log_sum_exp), the block's part of the whole softmax: dV = P^T dO, dS = P * (dO V^T - delta),
    dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D) (FlashAttention, arXiv 2205.14135, appendix B).
    """
    B, H, S, D = q.shape
    rows = (B, k.shape[1], H // k.shape[1] * S, -1)  # R = H/K * S: the query heads of a kv head are stacked
    # P = softmax of the block * exp(block_lse - log_sum_exp): one factor per row [B, K, R, 1], applied to dO and delta
    # in place of P.
    weights_BKRT, block_lse = softmax_and_log_sum(_block_scores(q, k, hidden))
    factor = accurate(ops.exp, block_lse - log_sum_exp.reshape(rows))
    dout_BKRD = grad_out.reshape(rows) * factor
    dv = ops.BatchMatMul(transpose_a=True)(weights_BKRT, dout_BKRD)
    dweights_BKRT = ops.BatchMatMul(transpose_b=True)(dout_BKRD, v)
    dscores_BKRT = weights_BKRT * (dweights_BKRT - delta.reshape(rows) * factor)
    dscores_BKRT = dscores_BKRT * Tensor(D**-0.5, q.dtype)
    dq = ops.BatchMatMul()(dscores_BKRT, k).reshape(q.shape)
    dk = ops.BatchMatMul(transpose_a=True)(dscores_BKRT, q.reshape(rows))
    return dq, dk, dv


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from attention over each; [B, H, S, D] and [B, H, S, 1].

    With log-sum-exps a and b: out = (e^a out + e^b more) / (e^a + e^b) = out - sigmoid(b - a) * (out - more), and
    log(e^a + e^b) = a + log(1 + e^(b - a)).
    """
    apart = more_lse - log_sum_exp
    # log(1 + e^x) = max(x, 0) + log1p(e^-|x|): the exponential cannot overflow.
    grown = ops.maximum(apart, ops.zeros_like(apart)) + accurate(lambda x: ops.log1p(ops.exp(-ops.abs(x))), apart)
    return out - accurate(_sigmoid, apart) * (out - more), log_sum_exp + grown


def _sigmoid(x: Tensor) -> Tensor:
    small = ops.exp(-ops.abs(x))  # never overflows
    return ops.select(x >= 0, ops.ones_like(x), small) / (1 + small)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum over positions of -log softmax(logits)[target] + z_loss * log_sum_exp^2; IGNORE contributes 0.

    logits [B, S, V] in the loss dtype, targets [B, S].
    """
    flat = targets.reshape(-1, 1)
    rows = logits.reshape(-1, logits.shape[-1])
    counted = flat != IGNORE
    index = ops.cast(flat * counted, ms.int32)
    if rows.dtype == ms.float64:
        picked = ops.gather_d(rows, 1, index) - _log_sum_exp(rows)
    else:
        picked = ops.gather_d(ops.log_softmax(rows, -1), 1, index)
    losses = -picked
    if z_loss:
        log_sum_exp = ops.gather_d(rows, 1, index) - picked
        losses = losses + Tensor(z_loss, losses.dtype) * log_sum_exp * log_sum_exp
    return total(losses * ops.cast(counted, logits.dtype))


def _log_sum_exp(rows: Tensor) -> Tensor:
    """log(sum(exp(rows))) over the last axis, [..., 1], in float64."""
    largest = ops.stop_gradient(ops.ReduceMax(keep_dims=True)(rows, -1))  # any shift has the same gradient
    return largest + ops.log(ops.ReduceSum(keep_dims=True)(ops.exp(rows - largest), -1))


def cross_entropy_forward(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Statistics of a vocabulary shard, columns [first, first + C) of which ``real`` are tokens, both [N].

    (log_sum_exp over the ``real`` columns; the target's logit, 0 where another rank has it or it is IGNORE).
    """
    columns = logits.shape[-1]
    # Padding columns are masked as -1e30, with which exp underflows to 0.
    if real < columns:
        logits = logits + Tensor(np.where(np.arange(columns) < real, 0.0, _HIDDEN)[None], logits.dtype)
    held, index = _held(targets, first, columns)
    picked = ops.gather_d(logits, 1, index) * ops.cast(held, logits.dtype)
    _, log_sum_exp = softmax_and_log_sum(logits)
    return log_sum_exp.reshape(-1), picked.reshape(-1)


def cross_entropy_backward(
    logits: Tensor, targets: Tensor, first: int, real: int, log_sum_exp: Tensor, factor: Tensor
) -> Tensor:
    """d (factor * sum of losses) / d logits [N, C] of a shard, from the log_sum_exp [N] over the whole vocabulary.

    factor * (softmax over all ranks - onehot(target)), and 0 in rows whose target is IGNORE.
    """
    columns = logits.shape[-1]
    if real < columns:
        logits = logits + Tensor(np.where(np.arange(columns) < real, 0.0, _HIDDEN)[None], logits.dtype)
    held, index = _held(targets, first, columns)
    held = ops.cast(held, logits.dtype)
    counted = ops.cast(targets.reshape(-1, 1) != IGNORE, logits.dtype)
    # softmax over all ranks = the shard's softmax [N, C] * the shard's share of the probability mass [N, 1].
    weights, own = softmax_and_log_sum(logits)
    share = accurate(ops.exp, own - log_sum_exp.reshape(-1, 1))
    target = ops.one_hot(index.reshape(-1), columns, Tensor(1.0, ms.float32), Tensor(0.0, ms.float32))
    return weights * (share * counted * factor) - ops.cast(target, logits.dtype) * (held * factor)


def _held(targets: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """(whether the target is in [first, first + columns); its column, 0 where it is not), both [N, 1]."""
    local = targets.reshape(-1, 1) - first
    held = ops.logical_and(targets.reshape(-1, 1) != IGNORE, ops.logical_and(local >= 0, local < columns))
    return held, ops.cast(local * held, ms.int32)


def adamw(master: Parameter, grad: Tensor, m: Parameter, v: Parameter, step: AdamWStep) -> None:
    """kernels.reference.adamw of flat vectors of one dtype, in place.

    ops.Adam computes lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps): with eps * sqrt(1 - beta2^t) in
    place of eps that is the bias-corrected lr * m_hat / (sqrt(v_hat) + eps). It lacks float64, which plain operators
    compute.
    """
    dtype, beta1, beta2 = master.dtype, step.beta1, step.beta2

    def number(value: float) -> Tensor:
        return Tensor(value, dtype)

    if step.weight_decay:
        master.set_data(master * number(step.decay_factor))
    grad = grad * number(step.grad_scale)
    root = math.sqrt(step.bias_correction2)
    if dtype != ms.float64:
        scalars = (beta1**step.step, beta2**step.step, step.lr, beta1, beta2, step.eps * root)
        ops.Adam()(master, m, v, *map(number, scalars), grad)
        return
    m.set_data(m * number(beta1) + grad * number(1.0 - beta1))
    v.set_data(v * number(beta2) + grad * grad * number(1.0 - beta2))
    rate = number(step.lr * root / step.bias_correction1)
    master.set_data(master - m * rate / (ops.sqrt(v) + number(step.eps * root)))


def total_loss(losses: Tensor, targets: Tensor) -> Tensor:
    """Sum of the token losses [N] whose target is not IGNORE, in their dtype. Not differentiable.

    On the CPU the sum runs on the host, in float64 as in ``total``: every operator of MindSpore 2.9.0 that takes a
    Python number or a dtype besides its tensors (ops.cast, ReduceSum, MatMul, concat) leaks 512 bytes of its pool and
    160 of malloc per call there. docs/reliability.md has the figures.
    """
    if ms.get_context("device_target") != "CPU":
        return total(losses * ops.cast(targets != IGNORE, losses.dtype))
    values = losses.asnumpy()
    return Tensor((values * (targets.asnumpy() != IGNORE)).sum(dtype=np.float64).astype(values.dtype))


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider, the dtypes in which blocks are computed and merged."""
    return x if x.dtype in (ms.float32, ms.float64) else ops.cast(x, ms.float32)


def total(x: Tensor) -> Tensor:
    """Deterministic sum of all elements, in the dtype of x.

    MindSpore's CPU kernel adds one by one: over 4096 token losses its float32 sum is off by 1e-6. There the sum runs in
    float64. Sums longer than _SERIAL_SUM are divided among threads dynamically, in an order that changes from call to
    call; sums over rows of _ROW elements are not.
    """
    if ms.get_context("device_target") != "CPU":
        return ops.ReduceSum()(x)
    flat = ops.cast(x, ms.float64).reshape(-1)
    while flat.shape[0] > _SERIAL_SUM:
        whole = flat.shape[0] // _ROW * _ROW
        rows = ops.ReduceSum()(flat[:whole].reshape(-1, _ROW), 1)
        flat = rows if whole == flat.shape[0] else ops.concat((rows, flat[whole:]))
    return ops.cast(ops.ReduceSum()(flat), x.dtype)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, without calling the operator for an axis of length 1.

    On MindSpore's CPU device (2.9.0) the gradient of a softmax over an axis of length 1 corrupts the kernel's state:
    every later softmax gradient of the process is wrong by tens of percent, without an error.
    """
    return ops.softmax(scores, -1) if scores.shape[-1] > 1 else ops.ones_like(scores)


def operand(x: Tensor, compute: ms.Type) -> Tensor:
    """x rounded to ``compute``, in a dtype that this device can multiply."""
    x = ops.cast(x, compute)
    if compute in (ms.bfloat16, ms.float16) and ms.get_context("device_target") == "CPU":
        return ops.cast(x, ms.float32)
    return x


def _block_scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """q k^T / sqrt(D) [B, K, H/K * S, T]; about -1e30 for masked keys."""
    B, H, S, D = q.shape
    K, T = k.shape[1:3]
    scores = ops.BatchMatMul(transpose_b=True)(q.reshape(B, K, H // K * S, D), k) * Tensor(D**-0.5, q.dtype)
    if hidden is None:
        return scores
    return (scores.reshape(B, K, H // K, S, T) + ops.cast(hidden, q.dtype)).reshape(scores.shape)


def softmax_and_log_sum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and its log_sum_exp [..., 1].

    max(weights) = 1 / sum(exp(score - max)), so log_sum_exp = max(scores) - log(max(weights)) needs no exponential: the
    CPU kernel's exp is a polynomial, off by up to 8e-6, while its softmax is accurate.
    """
    weights = ops.softmax(scores, -1)
    largest = ops.ReduceMax(keep_dims=True)
    return weights, largest(scores, -1) - accurate(ops.log, largest(weights, -1))


def accurate(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` of a small tensor, in float64 on the CPU, whose float32 exp and log have errors of up to 1e-6."""
    if ms.get_context("device_target") != "CPU":
        return function(x)
    return ops.cast(function(ops.cast(x, ms.float64)), x.dtype)
