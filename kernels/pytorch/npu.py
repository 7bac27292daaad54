"""Fused operators on Ascend for PyTorch, through torch_npu; the twin of kernels.ascend.ops. Not run on a device.

torch_npu is imported by a call, which raises UserError without it. In the tests every call is checked against the
schemas of kernels.pytorch.npu_signatures and computed by the numpy definitions. Functions, shapes and dtypes are those
of kernels.ascend.ops. Matrix products, embedding lookup and cross-entropy are PyTorch's operators, which torch_npu maps
to CANN. B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.visibility import KeyRanges, causal_ranges
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.ascend import visibility as visibility

LANES = 8  # float32 copies of each softmax statistic that the attention operators read and write
HEAD_STEP = 16  # a head dim of npu_fusion_attention is a multiple of this
HALVES = (torch.float16, torch.bfloat16)
_NO_KEYS = -1.0e30  # log_sum_exp of a query without keys, where -inf would give NaN


def operator(name: str) -> Callable[..., Any]:
    """torch_npu's operator "name" or "name.overload"; raises UserError without torch_npu."""
    try:
        import torch_npu  # noqa: F401  (registers the operators)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"kernels: {name} needs torch_npu, which cannot be imported ({error}); install torch_npu beside CANN on an "
            "Ascend machine, or select another implementation"
        ) from None
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.npu, packet), overload or "default")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out in ``out_dtype``, rstd [N] float32)."""
    dtype = _wider(x.dtype, out_dtype)
    if mask is not None:
        dtype = torch.float32
        before, after = _growth(mask)
        x, weight = x.to(dtype) * before, weight.to(dtype) * after
    out, rstd = operator("npu_rms_norm")(x.to(dtype), weight.to(dtype), epsilon=eps)
    return out.to(out_dtype), rstd.reshape(-1)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx in the dtype of x, dweight [E] float32)."""
    _same_shape("grad", grad, "x", x)
    dtype = _wider(x.dtype, grad.dtype)
    wide = x
    if mask is not None:
        dtype = torch.float32
        before, after = _growth(mask)
        wide, weight = x.to(dtype) * before, weight.to(dtype) * after
    rows = rstd.reshape(*x.shape[:-1], 1)
    dx, dweight = operator("npu_rms_norm_backward")(grad.to(dtype), wide.to(dtype), weight.to(dtype), rows)
    if mask is not None:
        dx, dweight = dx * before, dweight * after
    return dx.to(x.dtype), dweight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm of the stream in ``out_dtype``, stream in the dtype of residual, rstd [N] float32)."""
    _same_shape("x", x, "residual", residual)
    if mask is not None:
        stream = x.to(residual.dtype) + residual
        out, rstd = rms_norm(stream, weight, eps, out_dtype, mask)
        return out, stream, rstd
    dtype = _wider(_wider(x.dtype, residual.dtype), out_dtype)
    normed = operator("npu_add_rms_norm")(x.to(dtype), residual.to(dtype), weight.to(dtype), epsilon=eps)
    out, rstd, stream = normed
    return out.to(out_dtype), stream.to(residual.dtype), rstd.reshape(-1)


def add_rms_norm_backward(
    grad: Tensor, grad_stream: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(d stream in the dtype of stream, dweight [E] float32)."""
    dx, dweight = rms_norm_backward(grad, stream, weight, rstd, mask)
    return dx + grad_stream.to(stream.dtype), dweight


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None = None, scale_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As kernels.ascend.ops.rope_qk. The gradient is the same call with -sin; npu_rotary_mul_backward also computes the
    gradients of the tables."""
    turned = []
    for x, scale in ((q, scale_q), (k, scale_k)):
        tables = (cos, sin) if scale is None else (cos * scale, sin * scale)
        whole = (torch.cat((table, table), -1) for table in tables)
        turned.append(operator("npu_rotary_mul")(x.to(cos.dtype), *whole, rotary_mode="half").to(x.dtype))
    return turned[0], turned[1]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    _same_shape("up", up, "gate", gate)
    return operator("npu_swiglu")(torch.cat((gate, up), -1), dim=-1)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    _same_shape("grad", grad, "gate", gate)
    both = operator("npu_swiglu_backward")(grad.to(gate.dtype), torch.cat((gate, up), -1), dim=-1)
    dgate, dup = both.chunk(2, -1)
    return dgate, dup


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form."""
    return operator("npu_gelu")(x, approximate="tanh")


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    _same_shape("grad", grad, "x", x)
    return operator("npu_gelu_backward")(grad.to(x.dtype), x, approximate="tanh")


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges, scale: float | None = None, out_f32: bool = False
) -> tuple[Tensor, Tensor]:
    """As kernels.ascend.ops.attention; the key ranges are on the host."""
    B, S, H, D = _check(q, k, v, key_ranges)
    if k.shape[1] == 0:
        dtype = torch.float32 if out_f32 else q.dtype
        return torch.zeros_like(q, dtype=dtype), torch.full((B, H, S), -np.inf, device=q.device)
    plan = visibility.plan(key_ranges, B)
    if S == 1 and plan.sparse_mode == visibility.ALL and q.dtype in HALVES:
        out, log_sum_exp = _infer(q, k, v, k.shape[1], scale, True)
        return (out.float() if out_f32 else out), log_sum_exp.reshape(B, H, S)
    results = operator("npu_fusion_attention")(
        *(_laid_out(x, plan.layout) for x in (q, k, v)),
        H,
        plan.layout,
        atten_mask=_mask(plan, q.device),
        scale=D**-0.5 if scale is None else scale,
        **_lengths(plan),
    )
    out, top, total = results[:3]
    out = out.reshape(B, S, H, -1)[..., :D]
    log_sum_exp = top[..., 0] + total[..., 0].log()
    if plan.layout == "TND":
        log_sum_exp = log_sum_exp.reshape(B, S, H).transpose(1, 2)
    if plan.blind is not None:
        blind = torch.from_numpy(plan.blind).to(q.device)
        out = out.masked_fill(blind[:, :, None, None], 0.0)
        log_sum_exp = log_sum_exp.masked_fill(blind[:, None], -np.inf)
    return (out.float() if out_f32 else out), log_sum_exp.contiguous()


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
    """As kernels.ascend.ops.attention_backward."""
    B, S, H, D = _check(q, k, v, key_ranges)
    if out is None:
        if delta is None:
            raise ValueError("delta: got None without out, needs one of the two")
        # The operator computes delta = sum(dO * out) itself: out = dO * delta / sum(dO^2) gives it the same sum.
        wide = grad.float()
        squares = wide.square().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        out = wide * (delta.transpose(1, 2)[..., None] / squares)
    _same_shape("grad", grad, "q", q)
    _same_shape("out", out, "q", q)
    if log_sum_exp.shape != (B, H, S):
        raise ValueError(f"log_sum_exp: {tuple(log_sum_exp.shape)}; needs {(B, H, S)}")
    if k.shape[1] == 0:
        gradients: Sequence[Tensor] = [torch.zeros_like(x) for x in (q, k, v)]
    else:
        plan = visibility.plan(key_ranges, B)
        # P = exp(score - softmax_max) / softmax_sum with softmax_max = log_sum_exp and softmax_sum = 1. A row without
        # keys has 0 in place of -inf: its masked scores then give weights 0.
        top = log_sum_exp.float().masked_fill(log_sum_exp == -np.inf, 0.0)
        if plan.layout == "TND":
            top = top.transpose(1, 2).reshape(B * S, H)
        top = _lanes(top)
        dy, attention_in = (_laid_out(x.to(q.dtype), plan.layout) for x in (grad, out))
        results = operator("npu_fusion_attention_grad")(
            *(_laid_out(x, plan.layout) for x in (q, k, v)),
            dy,
            H,
            plan.layout,
            atten_mask=_mask(plan, q.device),
            softmax_max=top,
            softmax_sum=torch.ones_like(top),
            attention_in=attention_in,
            scale_value=D**-0.5 if scale is None else scale,
            **_lengths(plan),
        )
        whole = zip(results[:3], (q, k, v), strict=True)
        gradients = [d.reshape(*x.shape[:3], -1)[..., :D] for d, x in whole]
    dq, dk, dv = (d.float() for d in gradients) if out_f32 else gradients
    return dq, dk, dv


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """As kernels.ascend.ops.merge_blocks."""
    _same_shape("more", more, "out", out)
    _same_shape("more_lse", more_lse, "log_sum_exp", log_sum_exp)
    B, S, H, D = out.shape
    first, second = (x.transpose(0, 1).reshape(S, B, H * D) for x in (out, more))
    top, other = (_lanes(x.float().clamp(min=_NO_KEYS)) for x in (log_sum_exp, more_lse))
    one = torch.ones_like(top)
    merged, top, total = operator("npu_ring_attention_update")(first, top, one, second, other, one, input_layout="SBH")
    joint = top[..., 0] + total[..., 0].log()
    joint = joint.masked_fill(joint <= 0.5 * _NO_KEYS, -np.inf)
    return merged.reshape(S, B, H, D).transpose(0, 1), joint


def cached_attention(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float | None = None) -> Tensor:
    """As kernels.ascend.ops.cached_attention."""
    B, S, H, D = q.shape
    if not S <= length <= k.shape[1]:
        raise ValueError(f"length: {length}; needs {S} to {k.shape[1]}, the queries and the capacity of the cache")
    if q.dtype not in HALVES or (S > 1 and D % HEAD_STEP):
        return attention(q, k[:, :length], v[:, :length], causal_ranges(S, length), scale)[0]
    _check(q, k, v, None)
    return _infer(q, k, v, length, scale, False)[0]


def adamw(master: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: AdamWStep, copy: Tensor | None = None) -> None:
    """As kernels.ascend.ops.adamw."""
    for name, x in (("master", master), ("m", m), ("v", v)):
        if x.dtype != torch.float32:
            raise TypeError(f"{name}: {x.dtype}; needs torch.float32")
    _same_shape("grad", grad, "master", master)
    grad = grad.float()
    if step.grad_scale != 1.0:
        grad = grad * step.grad_scale
    # beta^(t-1): the operator multiplies by beta once more before the bias correction.
    powers = (step.beta1 ** (step.step - 1), step.beta2 ** (step.step - 1))
    rates = (step.lr, step.weight_decay, step.beta1, step.beta2, step.eps)
    operator("npu_apply_adam_w.out")(*powers, *rates, grad, None, False, False, var=master, m=m, v=v)
    if copy is not None:
        copy.copy_(master)


def _infer(
    q: Tensor, k: Tensor, v: Tensor, length: int, scale: float | None, log_sum_exp: bool
) -> tuple[Tensor, Tensor]:
    B, S, H, D = q.shape
    out, lse = operator("npu_fused_infer_attention_score")(
        *(x.contiguous() for x in (q, k, v)),
        atten_mask=None if S == 1 else triangle(q.device),
        actual_seq_lengths=[S] * B,
        actual_seq_lengths_kv=[length] * B,
        num_heads=H,
        scale=D**-0.5 if scale is None else scale,
        input_layout="BSND",
        num_key_value_heads=k.shape[2],
        sparse_mode=visibility.ALL if S == 1 else visibility.LAST_SEES_LAST,
        inner_precise=0,
        softmax_lse_flag=log_sum_exp,
    )
    return out, lse


@cache
def triangle(device: torch.device) -> Tensor:
    """The compressed causal mask, 4 MiB, made once per process and device."""
    return torch.from_numpy(visibility.triangle()).to(device)


def _mask(plan: visibility.Plan, device: torch.device) -> Tensor | None:
    if plan.sparse_mode == visibility.LAST_SEES_LAST:
        return triangle(device)
    if plan.mask is None:
        return None
    return torch.from_numpy(plan.mask[0] if len(plan.mask) == 1 else plan.mask[:, None]).to(device)


def _lengths(plan: visibility.Plan) -> dict[str, int | str | list[int]]:
    """Arguments given by layout and sparse mode. ``softmax_layout`` "TND": statistics are [T, H, 8] in memory."""
    if plan.query_ends is None or plan.key_ends is None:
        return {"sparse_mode": plan.sparse_mode}
    return {
        "sparse_mode": plan.sparse_mode,
        "actual_seq_qlen": list(plan.query_ends),
        "actual_seq_kvlen": list(plan.key_ends),
        "softmax_layout": "TND",
    }


def _laid_out(x: Tensor, layout: str) -> Tensor:
    rest = -x.shape[3] % HEAD_STEP
    if rest:
        x = torch.nn.functional.pad(x, (0, rest))
    return x.contiguous() if layout == "BSND" else x.reshape(-1, *x.shape[2:])


def _lanes(x: Tensor) -> Tensor:
    return x[..., None].expand(*x.shape, LANES).contiguous()


def _growth(mask: Tensor) -> tuple[Tensor, Tensor]:
    share = mask.sum() / mask.shape[0]
    return (mask / share).sqrt(), (mask * share).sqrt()


def _wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    for dtype in (first, second):
        if dtype not in (*HALVES, torch.float32):
            raise TypeError(f"x: {dtype}; needs float16, bfloat16 or float32")
    return first if first == second else torch.float32


def _same_shape(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name}: {tuple(x.shape)}; needs the shape of {other}, {tuple(y.shape)}")


def _check(q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges | None) -> tuple[int, int, int, int]:
    if q.dtype not in (*HALVES, torch.float32):
        raise TypeError(f"q: {q.dtype}; needs float16, bfloat16 or float32")
    B, S, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: {x.dtype}; needs the dtype of q, {q.dtype}")
        if x.ndim != 4 or x.shape != k.shape or (x.shape[0], x.shape[3]) != (B, D):
            raise ValueError(f"{name}: {tuple(x.shape)}; needs [B, T, K, D] with B and D of q {tuple(q.shape)}")
    if H % k.shape[2]:
        raise ValueError(f"q: {H} heads; needs a multiple of the {k.shape[2]} heads of k")
    if key_ranges is not None and (key_ranges.ranges.shape[1], key_ranges.num_keys) != (S, k.shape[1]):
        found = (key_ranges.ranges.shape[1], key_ranges.num_keys)
        raise ValueError(f"key_ranges: for {found} queries and keys; needs {(S, k.shape[1])}")
    return B, S, H, D
