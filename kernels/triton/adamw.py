"""AdamW update of flat float32 masters in place; the same pass writes the copy in the compute dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.triton.launch import check, launch, tiles_for


@triton.jit
def update(
    master_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    copy_ptr,
    scale_ptr,
    count,
    scale,
    keep,
    rate,
    beta1,
    rest1,
    beta2,
    rest2,
    root,
    eps,
    SCALE_THERE: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """master <- keep * master - rate * m / (root * sqrt(v) + eps), one BLOCK of elements at a time.

    keep = 1 - lr * weight_decay, rate = lr / (1 - beta1^step), rest = 1 - beta, root = 1 / sqrt(1 - beta2^step).
    """
    if SCALE_THERE:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        grad = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32) * scale
        m = beta1 * tl.load(m_ptr + at, mask=there, other=0.0) + rest1 * grad
        v = beta2 * tl.load(v_ptr + at, mask=there, other=0.0) + rest2 * grad * grad
        master = tl.load(master_ptr + at, mask=there, other=0.0) * keep - rate * m / (tl.sqrt(v) * root + eps)
        tl.store(m_ptr + at, m, mask=there)
        tl.store(v_ptr + at, v, mask=there)
        tl.store(master_ptr + at, master, mask=there)
        if COPY:
            tl.store(copy_ptr + at, master.to(copy_ptr.dtype.element_ty), mask=there)


def adamw(
    master: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: AdamWStep,
    copy: Tensor | None = None,
    device_scale: Tensor | None = None,
) -> None:
    """kernels.reference.adamw of ``master``, ``m`` and ``v``, float32 of one shape, in place; all tensors contiguous.

    ``grad``: that shape, any float dtype. ``copy``, of that shape, receives the new master, rounded to the dtype of
    ``copy``. ``device_scale``, one element, multiplies ``step.grad_scale``: a clipping factor that stays on the device.
    Raises TypeError or ValueError naming the wrong argument.
    """
    check("master", master, dtypes=(torch.float32,))
    check("grad", grad, master.shape, beside=master)
    for name, x in (("m", m), ("v", v)):
        check(name, x, master.shape, (torch.float32,), beside=master)
    if copy is not None:
        check("copy", copy, master.shape, beside=master)
    for name, x in (("master", master), ("grad", grad), ("m", m), ("v", v), ("copy", copy)):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()}, needs a contiguous tensor")
    if device_scale is not None:
        check("device_scale", device_scale, beside=master)
        if device_scale.numel() != 1:
            raise ValueError(f"device_scale: got shape {tuple(device_scale.shape)}, needs one element")
    arguments = {
        "master_ptr": master,
        "grad_ptr": grad,
        "m_ptr": m,
        "v_ptr": v,
        "copy_ptr": copy,
        "scale_ptr": device_scale,
        "count": master.numel(),
        "scale": float(step.grad_scale),
        "keep": step.decay_factor,
        "rate": step.lr / step.bias_correction1,
        "beta1": float(step.beta1),
        "rest1": 1.0 - step.beta1,
        "beta2": float(step.beta2),
        "rest2": 1.0 - step.beta2,
        "root": step.bias_correction2**-0.5,
        "eps": float(step.eps),
    }
    tiles = tiles_for("adamw", grad)
    work = triton.cdiv(master.numel(), tiles.constants["BLOCK"])
    launch(update, work, tiles, arguments, SCALE_THERE=device_scale is not None, COPY=copy is not None)
