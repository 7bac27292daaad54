"""RMS norm, RMS norm of a residual sum, and layer norm, with an optional growth mask, forward and backward.

A row that fits in a tile is read once and held by its program (WHOLE); a wider one is processed in blocks of columns
and read once per statistic. The weight's gradient is summed by each program over its rows and then over programs, in an
order fixed by sizes and device, hence deterministic. N rows, E channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from telechat_twins.kernels.triton.launch import FLOATS, check, check_last_axis, launch, programs_of, rows_of, tiles_for
from telechat_twins.kernels.triton.norm_parts import channels, scaled, share_of, stream_of


@triton.jit
def norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    stream_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    E,
    x_stride,
    residual_stride,
    eps,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    total = channels(mask_ptr, E, MASKED, BLOCK)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        there = rows < N
        x_rows = rows.to(tl.int64)[:, None] * x_stride
        residual_rows = rows.to(tl.int64)[:, None] * residual_stride
        out_rows = rows.to(tl.int64)[:, None] * E
        if WHOLE:
            columns = tl.arange(0, BLOCK)
            inside = columns < E
            seen = there[:, None] & inside[None, :]
            share = share_of(mask_ptr, columns, inside, total, MASKED)
            x = stream_of(
                x_ptr, residual_ptr, x_rows + columns[None, :], residual_rows + columns[None, :], seen, RESIDUAL
            )
            if RESIDUAL:
                tl.store(stream_ptr + out_rows + columns[None, :], x.to(stream_ptr.dtype.element_ty), mask=seen)
            if CENTRED:
                mean = tl.sum(x * share, 1)
                tl.store(mean_ptr + rows, mean, mask=there)
                x = x - mean[:, None]
            rstd = 1.0 / tl.sqrt(tl.sum(x * x * share, 1) + eps)
            out = scaled(x * rstd[:, None], out_ptr, weight_ptr, bias_ptr, mask_ptr, columns, inside, CENTRED, MASKED)
            tl.store(out_ptr + out_rows + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=seen)
        else:
            mean = tl.zeros((ROWS,), tl.float32)
            if CENTRED:
                for start in range(0, E, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    inside = columns < E
                    seen = there[:, None] & inside[None, :]
                    x = tl.load(x_ptr + x_rows + columns[None, :], mask=seen, other=0.0).to(tl.float32)
                    mean += tl.sum(x * share_of(mask_ptr, columns, inside, total, MASKED), 1)
                tl.store(mean_ptr + rows, mean, mask=there)
            square = tl.zeros((ROWS,), tl.float32)
            for start in range(0, E, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < E
                seen = there[:, None] & inside[None, :]
                x = stream_of(
                    x_ptr, residual_ptr, x_rows + columns[None, :], residual_rows + columns[None, :], seen, RESIDUAL
                )
                if RESIDUAL:
                    tl.store(stream_ptr + out_rows + columns[None, :], x.to(stream_ptr.dtype.element_ty), mask=seen)
                x = x - mean[:, None]
                square += tl.sum(x * x * share_of(mask_ptr, columns, inside, total, MASKED), 1)
            rstd = 1.0 / tl.sqrt(square + eps)
            for start in range(0, E, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < E
                seen = there[:, None] & inside[None, :]
                x = stream_of(
                    x_ptr, residual_ptr, x_rows + columns[None, :], residual_rows + columns[None, :], seen, RESIDUAL
                )
                normed = (x - mean[:, None]) * rstd[:, None]
                out = scaled(normed, out_ptr, weight_ptr, bias_ptr, mask_ptr, columns, inside, CENTRED, MASKED)
                tl.store(out_ptr + out_rows + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=seen)
        tl.store(rstd_ptr + rows, rstd, mask=there)


@triton.jit
def _vectors(weight_ptr, mask_ptr, columns, inside, MASKED: tl.constexpr):
    """Weight and growth mask [1, BLOCK] of a block of columns; the mask is 1 if absent."""
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    growth = 1.0
    if MASKED:
        growth = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return weight, growth


@triton.jit
def _gradients(grad_at, x_at, seen, weight, growth, mean, rstd, CENTRED: tl.constexpr, MASKED: tl.constexpr):
    """(grad * mask, grad * mask * weight, the normalised input) of a tile, 0 outside."""
    grad = tl.load(grad_at, mask=seen, other=0.0).to(tl.float32)
    x = tl.load(x_at, mask=seen, other=0.0).to(tl.float32)
    if MASKED:
        grad *= growth
    if CENTRED:
        x = tl.where(seen, x - mean[:, None], 0.0)
    return grad, grad * weight, x * rstd[:, None]


@triton.jit
def norm_backward(
    grad_ptr,
    stream_grad_ptr,
    x_ptr,
    weight_ptr,
    mask_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    N,
    E,
    grad_stride,
    stream_grad_stride,
    x_stride,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # With n = (x - mean) * rstd, g = grad * mask * weight and c the channel weights of a mean:
    # dx = rstd * (g - c * sum(g) - n * c * sum(g * n)), dweight = sum over rows of grad * mask * n. Without mean, the
    # RMS norm, the term in sum(g) is absent.
    total = channels(mask_ptr, E, MASKED, BLOCK)
    if WHOLE:
        columns = tl.arange(0, BLOCK)
        inside = columns < E
        weight, growth = _vectors(weight_ptr, mask_ptr, columns, inside, MASKED)
        share = share_of(mask_ptr, columns, inside, total, MASKED)
        dweight = tl.zeros((ROWS, BLOCK), tl.float32)
        if CENTRED:
            dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        there = rows < N
        grad_rows = grad_ptr + rows.to(tl.int64)[:, None] * grad_stride
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
        dx_rows = dx_ptr + rows.to(tl.int64)[:, None] * E
        rstd = tl.load(rstd_ptr + rows, mask=there, other=0.0)
        mean = tl.zeros((ROWS,), tl.float32)
        if CENTRED:
            mean = tl.load(mean_ptr + rows, mask=there, other=0.0)
        along = tl.zeros((ROWS,), tl.float32)  # sum(g * n): the component along the input
        level = tl.zeros((ROWS,), tl.float32)  # sum(g): the component along the mean
        if WHOLE:
            seen = there[:, None] & inside[None, :]
            grad, weighted, normed = _gradients(
                grad_rows + columns[None, :], x_rows + columns[None, :], seen, weight, growth, mean, rstd,
                CENTRED, MASKED,
            )  # fmt: skip
            along = tl.sum(weighted * normed, 1)
            dweight += grad * normed
            if CENTRED:
                level = tl.sum(weighted, 1)
                dbias += grad
            dx = rstd[:, None] * (weighted - share * (level[:, None] + normed * along[:, None]))
            if RESIDUAL:
                at = stream_grad_ptr + rows.to(tl.int64)[:, None] * stream_grad_stride + columns[None, :]
                dx += tl.load(at, mask=seen, other=0.0).to(tl.float32)
            tl.store(dx_rows + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=seen)
        else:
            for start in range(0, E, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < E
                weight, growth = _vectors(weight_ptr, mask_ptr, columns, inside, MASKED)
                grad, weighted, normed = _gradients(
                    grad_rows + columns[None, :], x_rows + columns[None, :], there[:, None] & inside[None, :],
                    weight, growth, mean, rstd, CENTRED, MASKED,
                )  # fmt: skip
                along += tl.sum(weighted * normed, 1)
                if CENTRED:
                    level += tl.sum(weighted, 1)
            for start in range(0, E, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < E
                seen = there[:, None] & inside[None, :]
                weight, growth = _vectors(weight_ptr, mask_ptr, columns, inside, MASKED)
                grad, weighted, normed = _gradients(
                    grad_rows + columns[None, :], x_rows + columns[None, :], seen, weight, growth, mean, rstd,
                    CENTRED, MASKED,
                )  # fmt: skip
                share = share_of(mask_ptr, columns, inside, total, MASKED)
                dx = rstd[:, None] * (weighted - share * (level[:, None] + normed * along[:, None]))
                if RESIDUAL:
                    at = stream_grad_ptr + rows.to(tl.int64)[:, None] * stream_grad_stride + columns[None, :]
                    dx += tl.load(at, mask=seen, other=0.0).to(tl.float32)
                tl.store(dx_rows + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=seen)
    if WHOLE:
        columns = tl.arange(0, BLOCK)
        at = tl.program_id(0) * E + columns
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=columns < E)
        if CENTRED:
            tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=columns < E)


@triton.jit
def norm_weight(
    grad_ptr,
    x_ptr,
    mask_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    N,
    E,
    grad_stride,
    x_stride,
    parts,
    CENTRED: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dweight and dbias [parts, E] for rows wider than a tile: a program sums a block of columns over every parts-th
    tile of rows."""
    part = tl.program_id(0) % parts
    columns = tl.program_id(0) // parts * BLOCK + tl.arange(0, BLOCK)
    inside = columns < E
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(part, tl.cdiv(N, ROWS), parts):
        rows = tile * ROWS + tl.arange(0, ROWS)
        there = rows < N
        seen = there[:, None] & inside[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=there, other=0.0)
        grad_at = rows.to(tl.int64)[:, None] * grad_stride + columns[None, :]
        grad = tl.load(grad_ptr + grad_at, mask=seen, other=0.0).to(tl.float32)
        x_at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
        x = tl.load(x_ptr + x_at, mask=seen, other=0.0).to(tl.float32)
        if CENTRED:
            x = x - tl.load(mean_ptr + rows, mask=there, other=0.0)[:, None]
            dbias += grad
        dweight += grad * x * rstd[:, None]
    if MASKED:
        growth = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        dweight *= growth[None, :]
        dbias *= growth[None, :]
    tl.store(dweight_ptr + part * E + columns, tl.sum(dweight, 0), mask=inside)
    if CENTRED:
        tl.store(dbias_ptr + part * E + columns, tl.sum(dbias, 0), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """kernels.reference.rms_norm of x [..., E]: (out in ``out_dtype``, default that of x; rstd [N] float32).

    weight [E], mask [E]. Statistics in float32. Raises TypeError or ValueError naming the wrong argument.
    """
    out, _, _, rstd = _forward(x, None, weight, None, eps, out_dtype, mask)
    return out, rstd


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual and its rms_norm: (out, stream in the residual's dtype, rstd [N] float32).

    The norm is taken of the stream rounded to its dtype, the values that the backward reads.
    """
    check("residual", residual, x.shape if isinstance(x, Tensor) else None, beside=x)
    out, stream, _, rstd = _forward(x, residual, weight, None, eps, out_dtype, mask)
    assert stream is not None
    return out, stream, rstd


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels.reference.layer_norm of x [..., E]: (out, mean [N] float32, rstd [N] float32)."""
    check_last_axis("x", x)
    check("bias", bias, (x.shape[-1],), beside=x)
    out, _, mean, rstd = _forward(x, None, weight, bias, eps, out_dtype, mask)
    assert mean is not None
    return out, mean, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From the gradient of out [..., E]: (dx in the dtype of x, dweight [E] float32)."""
    dx, dweight, _ = _backward(grad, None, x, weight, None, rstd, mask)
    return dx, dweight


def add_rms_norm_backward(
    grad: Tensor, grad_stream: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From the gradients of out and of the stream: (dstream, the gradient of x and residual; dweight float32)."""
    check("grad_stream", grad_stream, stream.shape if isinstance(stream, Tensor) else None, beside=stream)
    dstream, dweight, _ = _backward(grad, grad_stream, stream, weight, None, rstd, mask)
    return dstream, dweight


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of out [..., E]: (dx in the dtype of x, dweight [E] and dbias [E] float32)."""
    dx, dweight, dbias = _backward(grad, None, x, weight, mean, rstd, mask)
    assert dbias is not None
    return dx, dweight, dbias


def _check(x: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    check_last_axis("x", x)
    check("weight", weight, (x.shape[-1],), beside=x)
    if mask is not None:
        check("mask", mask, (x.shape[-1],), beside=x)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    _check(x, weight, mask)
    if out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(f"out_dtype: got {out_dtype}, needs {' or '.join(str(d) for d in FLOATS)}")
    rows = rows_of(x)
    N, E = rows.shape
    residual_rows = None if residual is None else rows_of(residual)
    out = torch.empty((N, E), dtype=out_dtype or x.dtype, device=x.device)
    stream = None if residual is None else torch.empty((N, E), dtype=residual.dtype, device=x.device)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    mean = None if bias is None else torch.empty_like(rstd)
    tiles = tiles_for("norm_forward", _widest(x, residual, out), E=E, residual=int(residual is not None))
    arguments = {
        "x_ptr": rows,
        "residual_ptr": residual_rows,
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "mask_ptr": None if mask is None else mask.contiguous(),
        "out_ptr": out,
        "stream_ptr": stream,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "N": N,
        "E": E,
        "x_stride": rows.stride(0),
        "residual_stride": 0 if residual_rows is None else residual_rows.stride(0),
        "eps": float(eps),
    }
    flags = {"CENTRED": bias is not None, "RESIDUAL": residual is not None, "MASKED": mask is not None}
    launch(norm_forward, triton.cdiv(N, tiles.constants["ROWS"]), tiles, arguments, **flags)
    return out.view(x.shape), None if stream is None else stream.view(x.shape), mean, rstd


def _backward(
    grad: Tensor,
    grad_stream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    _check(x, weight, mask)
    check("grad", grad, x.shape, beside=x)
    x_rows, grad_rows = rows_of(x), rows_of(grad)
    N, E = x_rows.shape
    check("rstd", rstd, (N,), (torch.float32,), beside=x)
    if mean is not None:
        check("mean", mean, (N,), (torch.float32,), beside=x)
    stream_rows = None if grad_stream is None else rows_of(grad_stream)
    dx = torch.empty((N, E), dtype=x.dtype, device=x.device)
    tiles = tiles_for("norm_backward", _widest(x, grad, grad_stream), E=E, residual=int(grad_stream is not None))
    whole, work = bool(tiles.constants["WHOLE"]), triton.cdiv(N, tiles.constants["ROWS"])
    wide = tiles_for("norm_weight", _widest(x, grad), E=E)
    blocks = triton.cdiv(E, wide.constants["BLOCK"])
    column_parts = max(1, min(triton.cdiv(N, wide.constants["ROWS"]), triton.cdiv(4 * tiles.max_programs, blocks)))
    parts = programs_of(work, tiles) if whole else column_parts
    dweight = torch.empty((parts, E), dtype=torch.float32, device=x.device)
    dbias = None if mean is None else torch.empty_like(dweight)
    vectors = {
        "mask_ptr": None if mask is None else mask.contiguous(),
        "mean_ptr": None if mean is None else mean.contiguous(),
        "rstd_ptr": rstd.contiguous(),
    }
    arguments = {
        "grad_ptr": grad_rows,
        "stream_grad_ptr": stream_rows,
        "x_ptr": x_rows,
        "weight_ptr": weight.contiguous(),
        **vectors,
        "dx_ptr": dx,
        "dweight_ptr": dweight,
        "dbias_ptr": dbias,
        "N": N,
        "E": E,
        "grad_stride": grad_rows.stride(0),
        "stream_grad_stride": 0 if stream_rows is None else stream_rows.stride(0),
        "x_stride": x_rows.stride(0),
    }
    flags = {"CENTRED": mean is not None, "MASKED": mask is not None}
    launch(norm_backward, work, tiles, arguments, RESIDUAL=grad_stream is not None, STAGES=tiles.stages, **flags)
    if not whole:
        arguments = {
            "grad_ptr": grad_rows,
            "x_ptr": x_rows,
            **vectors,
            "dweight_ptr": dweight,
            "dbias_ptr": dbias,
            "N": N,
            "E": E,
            "grad_stride": grad_rows.stride(0),
            "x_stride": x_rows.stride(0),
            "parts": parts,
        }
        launch(norm_weight, blocks * parts, wide, arguments, **flags)
    return dx.view(x.shape), dweight.sum(0), None if dbias is None else dbias.sum(0)


def _widest(*tensors: Tensor | None) -> Tensor:
    return max((t for t in tensors if t is not None), key=lambda t: t.element_size())
