"""Operators for PyTorch's CPU: its fused kernels where they exist, otherwise passes over blocks of rows in cache.

A composition of operators allocates a tensor per intermediate, and on a CPU most of its time is spent on page faults.
Here blocks of rows are processed in place. Names, shapes and results are those of kernels/pytorch/composite.py, which
handles the rare cases (growth masks).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.pytorch import composite as torch_composite
from telechat_twins.kernels.pytorch import private
from telechat_twins.kernels.pytorch.composite import finite, held_targets, merge_blocks, wide

__all__ = ["merge_blocks"]  # and the functions below

_BLOCK = 1 << 18  # elements of a block of rows: 1 MiB of float32, the size of a core's second-level cache
_SMALL = 1 << 16  # elements up to which the overhead of calls dominates, and the composite form makes fewer calls
_SCORES = 1 << 19  # elements of a block of attention scores, 2 MiB of float32


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if mask is not None or x.numel() <= _SMALL:
        return torch_composite.rms_norm(x, weight, eps, out_dtype, mask)
    rows = x.reshape(-1, x.shape[-1])
    N, E = rows.shape
    statistic = wide(x.dtype)
    out, rstd = x.new_empty((N, E), dtype=out_dtype), x.new_empty((N, 1), dtype=statistic)
    weight = weight.to(out_dtype)
    for first, last in _blocks(N, E):
        values, r = rows[first:last].to(statistic), rstd[first:last]
        torch.linalg.vector_norm(values, dim=-1, keepdim=True, out=r)
        r.square_().div_(E).add_(eps).rsqrt_()
        if out_dtype == statistic:
            torch.mul(values, r, out=out[first:last]).mul_(weight)
        else:
            torch.mul((values * r).to(out_dtype), weight, out=out[first:last])
    return out.view(x.shape), rstd.view(-1)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if mask is not None or x.numel() <= _SMALL:
        return torch_composite.rms_norm_backward(grad, x, weight, rstd, mask)
    return _rms_norm_backward(grad, None, x, weight, rstd)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    stream = residual + x.to(residual.dtype)
    out, rstd = rms_norm(stream, weight, eps, out_dtype, mask)
    return out, stream, rstd


def add_rms_norm_backward(
    grad: Tensor, grad_stream: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if mask is not None or stream.numel() <= _SMALL:
        return torch_composite.add_rms_norm_backward(grad, grad_stream, stream, weight, rstd, mask)
    return _rms_norm_backward(grad, grad_stream, stream, weight, rstd)


def _rms_norm_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx + ``more`` and dweight; per block, in place: d = g n -> dweight, then d = r (g w - n mean(g n w)), where
    n = x r and g is the gradient."""
    E, statistic = x.shape[-1], wide(x.dtype)
    rows, grads = x.reshape(-1, E), grad.reshape(-1, E)
    extra = None if more is None else more.reshape(-1, E)
    dx, dweight = torch.empty_like(rows, memory_format=torch.contiguous_format), rstd.new_zeros(E)
    weight = weight.to(statistic)
    for first, last in _blocks(*rows.shape):
        r = rstd[first:last, None]
        normed, g = rows[first:last].to(statistic) * r, grads[first:last].to(statistic)
        d = dx[first:last] if dx.dtype == statistic else torch.empty_like(normed)
        torch.mul(g, normed, out=d)
        dweight += d.sum(0)
        projection = torch.mv(d, weight).div_(-E)[:, None]
        torch.mul(g, weight, out=d).addcmul_(normed, projection).mul_(r)
        if extra is not None:
            d += extra[first:last]
        if d.dtype != dx.dtype:
            dx[first:last] = d
    return dx.view(x.shape), dweight


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if mask is not None:
        return torch_composite.layer_norm(x, weight, bias, eps, out_dtype, mask)
    statistic = wide(x.dtype)
    out, mean, rstd = torch.native_layer_norm(
        x.to(statistic), (x.shape[-1],), weight.to(statistic), bias.to(statistic), eps
    )
    return out.to(out_dtype), mean.view(-1), rstd.view(-1)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if mask is not None:
        return torch_composite.layer_norm_backward(grad, x, weight, mean, rstd, mask)
    statistic, E = wide(x.dtype), x.shape[-1]
    flat = x.reshape(-1, E).to(statistic)
    weight = weight.to(statistic)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad.reshape(-1, E).to(statistic), flat, (E,), mean[:, None], rstd[:, None], weight, weight, [True] * 3
    )
    return dx.view(x.shape).to(x.dtype), dweight, dbias


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None = None, scale_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _rope(q, *_scaled(cos, sin, scale_q)), _rope(k, *_scaled(cos, sin, scale_k))


def _scaled(cos: Tensor, sin: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return (cos, sin) if scale is None else (cos * scale, sin * scale)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    values = x.to(cos.dtype)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    (a, b), (p, q) = values.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=p).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=q).addcmul_(a, sin)
    return out.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    statistic = wide(gate.dtype)
    if gate.dtype != statistic:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for o, g, u in _pieces(out, gate, up):
            o.copy_(F.silu(g.to(statistic)).mul_(u))
        return out
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """(dgate, dup), which overwrite gate and up if ``in_place`` and they are contiguous."""
    if gate.numel() <= _SMALL:
        return torch_composite.swiglu_backward(grad, gate, up)
    statistic = wide(gate.dtype)
    dgate, dup = (
        x if in_place and x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (gate, up)
    )
    for dg, du, d, g, u in _pieces(dgate, dup, grad, gate, up):
        if dg.dtype == du.dtype == statistic:
            product = d * u
            torch.ops.aten.silu.out(g, out=du).mul_(d)
            torch.ops.aten.silu_backward.grad_input(product, g, grad_input=dg)
        else:
            d, g = d.to(statistic), g.to(statistic)
            product = d * u
            du.copy_(F.silu(g).mul_(d))
            dg.copy_(torch.ops.aten.silu_backward(product, g))
    return dgate, dup


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x.to(wide(x.dtype)), approximate="tanh").to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    statistic = wide(x.dtype)
    return torch.ops.aten.gelu_backward(grad.to(statistic), x.to(statistic), approximate="tanh").to(x.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges, scale: float | None = None, out_f32: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of kernels.pytorch.composite by kv head and block of queries, over the range of keys visible to the
    block: memory is linear in the sequence length, and keys outside the range cost no time."""
    B, S, H, D = q.shape
    K, statistic = k.shape[2], wide(q.dtype)
    scale = D**-0.5 if scale is None else scale
    out = q.new_zeros((B, S, H, D), dtype=statistic if out_f32 else q.dtype)
    log_sum_exp = q.new_full((B, H, S), -torch.inf, dtype=statistic)
    # G = H / K query heads per kv head, s = last - first queries, t keys of the range.
    for b, first, last, run, hidden in _query_blocks(key_ranges, B, S, H // K):
        for head, group in _head_groups(H, K):
            rows = _grouped(q[b, first:last, group], statistic).mul_(scale)  # [G * s, D]
            scores = torch.mm(rows, k[b, run, head].t().to(statistic)).view(H // K, last - first, -1)  # [G, s, t]
            _hide(scores, hidden, -torch.inf)
            # Softmax over all visible keys at once: max, exp in place, sum; division by the sum after the product
            # with V, [G, s, D] instead of [G, s, t]. A row without keys has max 0, weights 0 and sum 0.
            top = finite(scores.amax(-1, keepdim=True))
            total = scores.sub_(top).exp_().sum(-1, keepdim=True)
            log_sum_exp[b, group, first:last] = (top + total.log())[..., 0]
            block = torch.mm(scores.view(len(rows), -1), v[b, run, head].to(statistic)).view(H // K, -1, D)
            out[b, first:last, group] = block.div_(total.masked_fill_(total == 0.0, 1.0)).transpose(0, 1)
    return out, log_sum_exp


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
    B, S, H, D = q.shape
    T, K, statistic = k.shape[1], k.shape[2], wide(q.dtype)
    scale = D**-0.5 if scale is None else scale
    if delta is None:
        assert out is not None
        delta = (grad.to(statistic) * out).sum(-1).transpose(1, 2)
    dq = q.new_zeros((B, S, H, D), dtype=statistic if out_f32 else q.dtype)
    dk, dv = (q.new_zeros((B, K, T, D), dtype=statistic) for _ in "kv")
    for b, first, last, run, hidden in _query_blocks(key_ranges, B, S, 2 * (H // K)):
        for head, group in _head_groups(H, K):
            rows = _grouped(q[b, first:last, group], statistic).mul_(scale)  # [G * s, D]
            dout = _grouped(grad[b, first:last, group], statistic)  # [G * s, D]
            keys, values = k[b, run, head].to(statistic), v[b, run, head].to(statistic)  # [t, D]
            # P = exp(scale q k - log_sum_exp) [G * s, t]; dv and dk sum over the heads of the group and over blocks.
            weights = torch.mm(rows, keys.t())
            weights.sub_(finite(log_sum_exp[b, group, first:last]).reshape(-1, 1)).exp_()
            _hide(weights.view(H // K, last - first, -1), hidden, 0.0)
            dv[b, head, run].addmm_(weights.t(), dout)
            # dS = P (dO V^T - delta); scale is in ``rows`` for dk, and multiplies dq.
            dscores = torch.mm(dout, values.t())
            dscores.sub_(delta[b, group, first:last].reshape(-1, 1)).mul_(weights)
            dk[b, head, run].addmm_(dscores.t(), rows)
            dq[b, first:last, group] = torch.mm(dscores, keys).mul_(scale).view(H // K, -1, D).transpose(0, 1)
    dk, dv = (d.transpose(1, 2) for d in (dk, dv))
    return dq, *((dk, dv) if out_f32 else (dk.to(k.dtype), dv.to(v.dtype)))


def cross_entropy_forward(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    statistic = wide(logits.dtype)
    local, held = held_targets(targets, first, real)
    picked = logits.gather(1, local[:, None])[:, 0].to(statistic).masked_fill_(~held, 0.0)
    log_sum_exp = torch.full_like(picked, -torch.inf)
    if real:
        for begin, end in _blocks(*logits.shape):
            log_sum_exp[begin:end] = torch.logsumexp(logits[begin:end, :real].to(statistic), -1)
    return log_sum_exp, picked


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
    """factor * d(sum of losses)/d logits [N, C], which overwrites the logits if ``in_place``."""
    local, held = held_targets(targets, first, real)
    counted = (targets != IGNORE)[:, None]
    lse = log_sum_exp[:, None]
    # d = factor * (1 + 2 z lse) * exp(logit - lse) - factor * onehot(target); exp(logit - lse) is the softmax over all
    # ranks, lse being theirs.
    weight = factor * (1.0 + 2.0 * z_loss * lse)
    weight = weight.expand_as(lse) if isinstance(weight, Tensor) else torch.full_like(lse, weight)
    pick = -(held[:, None] * factor).to(lse.dtype)
    out = logits if in_place else torch.empty_like(logits)
    for begin, end in _blocks(*logits.shape):
        rows = slice(begin, end)
        values = out[rows] if out.dtype == lse.dtype else torch.empty_like(out[rows], dtype=lse.dtype)
        torch.sub(logits[rows], lse[rows], out=values).exp_().mul_(weight[rows])
        values[:, real:] = 0.0
        values.scatter_add_(1, local[rows, None], pick[rows])
        values.masked_fill_(~counted[rows], 0.0)
        if values.dtype != out.dtype:
            out[rows] = values
    return out


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, table)


def embedding_backward(grad: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    grad = grad.to(wide(grad.dtype))
    return torch.ops.aten.embedding_dense_backward(grad, ids, vocab_size, -1, False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias. float32 uses oneDNN: measured 1.2 times as fast as F.linear's BLAS on an
    AMD processor."""
    if x.dtype != torch.float32 or not x.numel():
        return F.linear(x, weight, bias)
    return private.mkldnn_linear(x, weight, bias)


def linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        linear(grad, weight.t()) if needs[0] else None,
        torch.mm(rows.t(), x.reshape(-1, x.shape[-1])) if needs[1] and x is not None else None,
        rows.sum(0) if needs[2] else None,
    )


def adamw(master: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: AdamWStep, copy: Tensor | None = None) -> None:
    """PyTorch's fused AdamW, on every device that has it. ``grad`` is scaled in place."""
    scale = None
    if step.grad_scale != 1.0:
        if grad.dtype == torch.float32:  # the kernel divides by a float32 loss scale
            scale = torch.tensor(1.0 / step.grad_scale, device=grad.device)
        else:
            grad.mul_(step.grad_scale)
    done = torch.tensor(float(step.step - 1), device=master.device)  # the kernel adds 1 before the bias correction
    torch_adamw(
        [master],
        [grad],
        [m],
        [v],
        [],
        [done],
        fused=True,
        grad_scale=scale,
        amsgrad=False,
        beta1=step.beta1,
        beta2=step.beta2,
        lr=step.lr,
        weight_decay=step.weight_decay,
        eps=step.eps,
        maximize=False,
    )
    if copy is not None:
        copy.copy_(master)


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of rows with about _BLOCK elements."""
    size = max(1, _BLOCK // max(width, 1))
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of _BLOCK elements of tensors of one shape, flattened; those to be written must be contiguous."""
    flat = [t.reshape(-1) for t in tensors]
    for first in range(0, flat[0].numel(), _BLOCK):
        yield tuple(t[first : first + _BLOCK] for t in flat)


def _head_groups(num_heads: int, num_kv_heads: int) -> Iterator[tuple[int, slice]]:
    """Each kv head with the slice of query heads that share it."""
    size = num_heads // num_kv_heads
    for head in range(num_kv_heads):
        yield head, slice(head * size, (head + 1) * size)


def _grouped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[s, G, D] -> a copy [G * s, D], head by head."""
    return x.transpose(0, 1).to(dtype, copy=True, memory_format=torch.contiguous_format).view(-1, x.shape[2])


Hidden = list[tuple[slice, Tensor]]  # slices of a key range, each with a mask bool [s, keys], true where hidden


def _query_blocks(
    key_ranges: KeyRanges, batch: int, num_queries: int, heads: int
) -> Iterator[tuple[int, int, int, slice, Hidden]]:
    """Blocks of queries with about _SCORES scores in ``heads`` heads: (row, first, last, run, hidden).

    Queries [first, last) of batch row ``row``; ``run``: the union of their key ranges; ``hidden``: masks of the parts
    of it that are not visible to all of them. Blocks without visible keys are skipped.
    """
    ranges = key_ranges.ranges
    size = min(max(_SCORES // (heads * max(key_ranges.num_keys, 1)), 16), 256)
    for row in range(batch):
        begins, ends = ranges[row if len(ranges) > 1 else 0].unbind(-1)
        for first in range(0, num_queries, size):
            last = min(first + size, num_queries)
            begin, end = begins[first:last], ends[first:last]
            seen = end > begin
            if not bool(seen.any()):
                continue
            # Keys [low, high) are visible to some query of the block, keys [sure_low, sure_high) to every one.
            low, high = int(begin[seen].min()), int(end[seen].max())
            sure_low, sure_high = int(begin.max()), int(end.min())
            if sure_low >= sure_high or not bool(seen.all()):
                doubtful = [slice(low, high)]
            else:
                doubtful = [slice(a, b) for a, b in ((low, sure_low), (sure_high, high)) if a < b]
            hidden = []
            for part in doubtful:
                keys = torch.arange(part.start, part.stop, dtype=ranges.dtype)
                outside = (keys < begin[:, None]) | (keys >= end[:, None])
                hidden.append((slice(part.start - low, part.stop - low), outside))
            yield row, first, last, slice(low, high), hidden


def _hide(scores: Tensor, hidden: Hidden, value: float) -> None:
    for keys, outside in hidden:
        scores[..., keys].masked_fill_(outside, value)
