"""Composite operators in PyTorch: primitive operators of the framework, on any device and in float64.

Explicit forward and backward without autograd, as defined in kernels/reference.py. Statistics are float32, float64 for
float64 inputs. B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden, N rows, C columns of the
vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.adamw import AdamWStep


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., E], weight [E] -> out [..., E] in ``out_dtype`` and 1/sqrt(mean(x^2) + eps) [N].

    The normalised x is rounded to ``out_dtype`` before the product with the weight: the released models' order.
    """
    statistic = wide(x.dtype)
    values = x.to(statistic)
    rstd = torch.rsqrt(_mean(values.square(), mask) + eps)
    out = (values * rstd).to(out_dtype) * weight.to(out_dtype)
    return out if mask is None else out * mask.to(out_dtype), rstd.reshape(-1)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx [..., E] in the dtype of x, dweight [E] in the statistics' dtype)."""
    statistic = wide(x.dtype)
    r = rstd.view(*x.shape[:-1], 1)
    grad = grad.to(statistic) if mask is None else grad.to(statistic) * mask
    normed = x.to(statistic) * r
    g = grad * weight.to(statistic)
    dx = r * (g - normed * _share(x, mask) * (g * normed).sum(-1, keepdim=True))
    return dx.to(x.dtype), (grad * normed).reshape(-1, x.shape[-1]).sum(0)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rms_norm of x + residual, that sum in the dtype of ``residual``, rstd [N])."""
    stream = residual + x.to(residual.dtype)
    out, rstd = rms_norm(stream, weight, eps, out_dtype, mask)
    return out, stream, rstd


def add_rms_norm_backward(
    grad: Tensor, grad_stream: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dstream, the gradient of both x and residual; dweight)."""
    dx, dweight = rms_norm_backward(grad, stream, weight, rstd, mask)
    return dx + grad_stream, dweight


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., E] -> out in ``out_dtype``, mean [N], 1/sqrt(var + eps) [N]."""
    statistic = wide(x.dtype)
    values = x.to(statistic)
    mean = _mean(values, mask)
    rstd = torch.rsqrt(_mean((values - mean).square(), mask) + eps)
    out = (values - mean) * rstd * weight.to(statistic) + bias.to(statistic)
    return (out if mask is None else out * mask).to(out_dtype), mean.reshape(-1), rstd.reshape(-1)


def counted_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stat: torch.dtype,
    out_dtype: torch.dtype,
    mask: Tensor | None,
    counted: int,
) -> Tensor:
    """Layer norm with the mean and variance of the first ``counted`` channels, differentiated by autograd."""
    x = x.to(stat)
    x = x - x[..., :counted].mean(-1, keepdim=True)
    rstd = torch.rsqrt(x[..., :counted].square().mean(-1, keepdim=True) + eps)
    out = x * rstd * weight.to(stat) + bias.to(stat)
    return (out if mask is None else out * mask).to(out_dtype)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in the dtype of x, dweight [E], dbias [E])."""
    statistic = wide(x.dtype)
    r = rstd.view(*x.shape[:-1], 1)
    grad = grad.to(statistic) if mask is None else grad.to(statistic) * mask
    normed = (x.to(statistic) - mean.view_as(r)) * r
    g, share = grad * weight.to(statistic), _share(x, mask)
    dx = r * (g - share * g.sum(-1, keepdim=True) - normed * share * (g * normed).sum(-1, keepdim=True))
    rows = (-1, x.shape[-1])
    return dx.to(x.dtype), (grad * normed).reshape(rows).sum(0), grad.reshape(rows).sum(0)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None = None, scale_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Half rotation of q [B, S, H, D] and k [B, S, K, D] by cos, sin [B or 1, S, 1, D/2], then the xPos scales."""
    return _rope(q, cos, sin, scale_q), _rope(k, cos, sin, scale_k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the dtype of ``gate``."""
    statistic = wide(gate.dtype)
    return (F.silu(gate.to(statistic)) * up.to(statistic)).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    statistic = wide(gate.dtype)
    grad, values = grad.to(statistic), gate.to(statistic)
    s = torch.sigmoid(values)
    dgate = grad * up.to(statistic) * s * (1.0 + values * (1.0 - s))
    return dgate.to(gate.dtype), (grad * values * s).to(up.dtype)


_A, _B = math.sqrt(2.0 / math.pi), 0.044715


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form."""
    values = x.to(wide(x.dtype))
    return (0.5 * values * (1.0 + torch.tanh(_A * (values + _B * values**3)))).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    values = x.to(wide(x.dtype))
    t = torch.tanh(_A * (values + _B * values**3))
    slope = 0.5 * (1.0 + t) + 0.5 * values * (1.0 - t * t) * _A * (1.0 + 3.0 * _B * values * values)
    return (grad.to(values.dtype) * slope).to(x.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges, scale: float | None = None, out_f32: bool = False
) -> tuple[Tensor, Tensor]:
    """q [B, S, H, D], k and v [B, T, K, D] -> out [B, S, H, D] in the dtype of q, log_sum_exp [B, H, S].

    ``key_ranges`` holds a tensor. All scores exist at once. A query without visible keys gives zeros and -inf.
    ``out_f32``: the output in the statistics' dtype, for merging.
    """
    B, S, H, D = q.shape
    statistic = wide(q.dtype)
    scores_BKRT = _scores(q, k, key_ranges, scale)
    log_sum_exp = torch.logsumexp(scores_BKRT, -1, keepdim=True)  # [B, K, R, 1]
    weights_BKRT = torch.exp(scores_BKRT - finite(log_sum_exp))  # a row without keys: exp(-inf - 0) = 0
    v_BKTD = v.to(statistic).transpose(1, 2)
    out = torch.matmul(weights_BKRT, v_BKTD).view(B, H, S, D).transpose(1, 2)
    return out.to(statistic if out_f32 else q.dtype), log_sum_exp.view(B, H, S)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges,
    out: Tensor | None,
    log_sum_exp: Tensor,
    scale: float | None = None,
    delta: Tensor | None = None,
    out_f32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. ``log_sum_exp`` [B, H, S] and ``out`` may cover more keys than these (the final ones of a ring).

    ``delta`` [B, H, S] = sum(grad * out) over D; ``out`` is not read when it is given. Formulas:
    kernels.reference.attention_backward.
    """
    B, S, H, D = q.shape
    K, statistic = k.shape[2], wide(q.dtype)
    rows = (B, K, H // K * S, -1)
    if delta is None:
        assert out is not None
        delta = (grad.to(statistic) * out.to(statistic)).sum(-1).transpose(1, 2)
    # R = H/K * S: the query heads of a kv head are stacked along the queries, so that dk and dv sum over them.
    dout_BKRD = grad.to(statistic).transpose(1, 2).reshape(rows)
    weights_BKRT = torch.exp(_scores(q, k, key_ranges, scale) - finite(log_sum_exp).reshape(rows))
    dv = torch.matmul(weights_BKRT.transpose(-1, -2), dout_BKRD)
    dweights_BKRT = torch.matmul(dout_BKRD, v.to(statistic).permute(0, 2, 3, 1))
    dscores_BKRT = weights_BKRT * (dweights_BKRT - delta.reshape(rows)) * (D**-0.5 if scale is None else scale)
    dq = torch.matmul(dscores_BKRT, k.to(statistic).transpose(1, 2)).view(B, H, S, D)
    dk = torch.matmul(dscores_BKRT.transpose(-1, -2), q.to(statistic).transpose(1, 2).reshape(rows))
    return tuple(d.transpose(1, 2).to(statistic if out_f32 else x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))  # type: ignore[return-value]


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys; out, more [B, S, H, D], log-sum-exps a, b [B, H, S].

    (e^a out + e^b more) / (e^a + e^b) = out - sigmoid(b - a) * (out - more), exact where one side has no keys (-inf).
    """
    apart = torch.where(more_lse == -torch.inf, -torch.inf, more_lse - log_sum_exp)
    share = torch.sigmoid(apart).transpose(1, 2)[..., None]
    return out - share * (out - more), torch.logaddexp(log_sum_exp, more_lse)


def cross_entropy_forward(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Statistics of a vocabulary shard, logits [N, C] of the columns [first, first + C): (log_sum_exp over the ``real``
    first columns, the target's logit, 0 where another rank has it or it is IGNORE), both [N], float32 or wider."""
    values = logits.to(wide(logits.dtype))
    local, held = held_targets(targets, first, real)
    picked = values.gather(1, local[:, None])[:, 0].masked_fill(~held, 0.0)
    if not real:
        return torch.full_like(picked, -torch.inf), picked
    return torch.logsumexp(values[:, :real], -1), picked


def cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    first: int,
    real: int,
    log_sum_exp: Tensor,
    factor: Tensor | float,
    z_loss: float = 0.0,
    in_place: bool = True,
) -> Tensor:
    """factor * d(sum of losses)/d logits [N, C], a new tensor whatever ``in_place``; ``log_sum_exp`` is over all ranks.

    softmax * (1 + 2 z_loss log_sum_exp) - onehot(target), 0 in padding columns and in rows with target IGNORE.
    """
    local, held = held_targets(targets, first, real)
    lse = log_sum_exp[:, None]
    grad = torch.exp(logits.to(log_sum_exp.dtype) - lse) * (1.0 + 2.0 * z_loss * lse)
    grad[:, real:] = 0.0
    grad.scatter_add_(1, local[:, None], -held[:, None].to(grad.dtype))
    return torch.where((targets != IGNORE)[:, None], grad * factor, 0.0).to(logits.dtype)


def held_targets(targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """(column of each target in this shard, 0 where it is not in it; whether it is), both [N]."""
    local = targets.long() - first
    held = (targets != IGNORE) & (local >= 0) & (local < real)
    return local * held, held


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """table [V, E], ids [...] -> [..., E]."""
    return table.index_select(0, ids.reshape(-1)).view(*ids.shape, -1)


def embedding_backward(grad: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """grad [N, E] summed by id into [V, E], in the statistics' dtype."""
    table = torch.zeros((vocab_size, grad.shape[-1]), dtype=wide(grad.dtype), device=grad.device)
    return table.index_add_(0, ids, grad.to(table.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias [out]."""
    return F.linear(x, weight, bias)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), None where ``needs`` is false."""
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        torch.matmul(grad, weight) if needs[0] else None,
        torch.mm(rows.t(), x.reshape(-1, x.shape[-1])) if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )


def adamw(master: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: AdamWStep, copy: Tensor | None = None) -> None:
    """kernels.reference.adamw of flat vectors of one dtype, in place; ``copy`` receives the new master, rounded to the
    dtype of ``copy``. ``grad`` is unchanged."""
    grad = grad * step.grad_scale
    m.mul_(step.beta1).add_(grad, alpha=1.0 - step.beta1)
    v.mul_(step.beta2).addcmul_(grad, grad, value=1.0 - step.beta2)
    root = (v / step.bias_correction2).sqrt() + step.eps
    master.mul_(step.decay_factor).addcdiv_(m, root, value=-step.lr / step.bias_correction1)
    if copy is not None:
        copy.copy_(master)


def finite(log_sum_exp: Tensor) -> Tensor:
    """log_sum_exp with 0 in place of -inf, so that score - log_sum_exp is -inf and not NaN for a row without keys."""
    return log_sum_exp.masked_fill(log_sum_exp == -torch.inf, 0.0)


def visible_keys(key_ranges: KeyRanges, first: int = 0, last: int | None = None) -> Tensor:
    """bool [B or 1, last - first, T] of the queries [first, last)."""
    ranges: Tensor = key_ranges.ranges[:, first:last]
    keys = torch.arange(key_ranges.num_keys, dtype=torch.int32, device=ranges.device)
    return (keys >= ranges[..., :1]) & (keys < ranges[..., 1:])


def _scores(q: Tensor, k: Tensor, key_ranges: KeyRanges, scale: float | None) -> Tensor:
    """Scores [B, K, R, T], R = H/K * S, in the statistics' dtype, -inf for hidden keys."""
    B, S, H, D = q.shape
    K, statistic = k.shape[2], wide(q.dtype)
    q_BKRD, k_BKDT = q.to(statistic).transpose(1, 2).reshape(B, K, H // K * S, D), k.to(statistic).permute(0, 2, 3, 1)
    scores = torch.matmul(q_BKRD, k_BKDT) * (D**-0.5 if scale is None else scale)
    if key_ranges.kind == "full":
        return scores
    hidden = ~visible_keys(key_ranges)[:, None, None]
    return scores.view(B, K, H // K, S, -1).masked_fill(hidden, -torch.inf).view(scores.shape)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, -1)
    first, second = first * cos - second * sin, second * cos + first * sin
    if scale is not None:
        first, second = first * scale, second * scale
    return torch.cat((first, second), -1).to(x.dtype)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.mean(-1, keepdim=True) if mask is None else (x * mask).sum(-1, keepdim=True) / mask.sum()


def _share(x: Tensor, mask: Tensor | None) -> Tensor | float:
    """Weight of each channel in a mean: 1/E, or mask / sum(mask) [E]."""
    return 1.0 / x.shape[-1] if mask is None else mask / mask.sum()
