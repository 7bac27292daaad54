"""Device functions of the norm kernels: channel weights of a mean, the residual sum, and scaling with its rounding."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def share_of(mask_ptr, columns, inside, total, MASKED: tl.constexpr):
    """Weight of each channel in a mean [1, BLOCK]: 1/E, or mask / sum(mask); 0 outside the row."""
    if MASKED:
        share = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32) / total
    else:
        share = tl.where(inside, 1.0 / total, 0.0)
    return share[None, :]


@triton.jit
def channels(mask_ptr, E, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Number of channels: E, or sum(mask), with 1 in place of 0 as a divisor."""
    if MASKED:
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, E, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            sums += tl.load(mask_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)
        total = tl.sum(sums, 0)
        total = tl.where(total == 0.0, 1.0, total)
    else:
        total = E * 1.0
    return total


@triton.jit
def stream_of(x_ptr, residual_ptr, x_at, residual_at, seen, RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to the residual's dtype, so that the stored stream is the one that is normalised."""
    x = tl.load(x_ptr + x_at, mask=seen, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + residual_at, mask=seen, other=0.0).to(tl.float32)
        x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def scaled(
    normed, out_ptr, weight_ptr, bias_ptr, mask_ptr, columns, inside, CENTRED: tl.constexpr, MASKED: tl.constexpr
):
    """(normed [ROWS, BLOCK] * weight + bias) * mask in float32, rounded once when stored.

    The RMS norm, without bias, rounds each step to the output's dtype, as TeleChat2's released code does.
    """
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        out = normed * weight[None, :] + tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        out = rounded(normed, out_ptr) * rounded(weight, out_ptr)[None, :]
    if MASKED:
        mask = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            out *= mask[None, :]
        else:
            out = rounded(out, out_ptr) * rounded(mask, out_ptr)[None, :]
    return out


@triton.jit
def rounded(x, out_ptr):
    """x rounded to the dtype of ``out_ptr``, as float32."""
    return x.to(out_ptr.dtype.element_ty).to(tl.float32)
