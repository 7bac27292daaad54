"""Norms, rotary embedding, activations, loss and AdamW of PyTorch's CPU by the C++ operators of kernels/cpu: "cpp" of
them. They share one pool of threads with the products: PyTorch's own threads would wait for a processor that a thread
of the pool still holds.

Names, shapes and results are those of kernels/pytorch/composite.py; statistics are float32. float32, bfloat16 and
float16 are served.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.pytorch.attention_in_cpp import run, unit_stride
from telechat_twins.kernels.pytorch.room import empty, take_place

OPERATORS = ("rms_norm", "layer_norm", "rope", "swiglu", "gelu", "cross_entropy", "embedding", "adamw")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    out, rstd = empty(x.shape, out_dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    inputs = (x.contiguous(), weight.contiguous(), _either(mask, weight))
    run("rms_norm", inputs, (out, rstd), (eps, mask is not None))
    return out, rstd.view(-1)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _rms_norm_backward(grad, None, x, weight, rstd, mask)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    out, stream = empty(x.shape, out_dtype), empty(x.shape, residual.dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    inputs = (x.contiguous(), residual.contiguous(), weight.contiguous(), _either(mask, weight))
    run("add_rms_norm", inputs, (out, stream, rstd), (eps, mask is not None))
    return out, stream, rstd.view(-1)


def add_rms_norm_backward(
    grad: Tensor, grad_stream: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _rms_norm_backward(grad, grad_stream.to(stream.dtype), stream, weight, rstd, mask)


def _rms_norm_backward(
    grad: Tensor, more: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx + ``more`` and dweight."""
    x = x.contiguous()
    dx, dweight = empty(x.shape, x.dtype), _gradient(weight)
    inputs = (grad.contiguous(), x, weight.contiguous(), rstd.contiguous(), _either(more, x), _either(mask, weight))
    run("rms_norm_backward", inputs, (dx, dweight), (more is not None, mask is not None))
    return dx, dweight


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    out = empty(x.shape, out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    inputs = (x.contiguous(), weight.contiguous(), bias.contiguous(), _either(mask, weight))
    run("layer_norm", inputs, (out, mean, rstd), (eps, mask is not None))
    return out, mean.view(-1), rstd.view(-1)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    dx, dweight, dbias = empty(x.shape, x.dtype), _gradient(weight), x.new_empty(weight.shape, dtype=torch.float32)
    inputs = (grad.contiguous(), x, weight.contiguous(), mean.contiguous(), rstd.contiguous(), _either(mask, weight))
    run("layer_norm_backward", inputs, (dx, dweight, dbias), (mask is not None,))
    return dx, dweight, dbias


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    sign: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``sign`` -1 turns the other way."""
    out = tuple(empty(x.shape, x.dtype) for x in (q, k))
    tables = (cos, sin, cos if scale_q is None else scale_q, cos if scale_k is None else scale_k)
    if any(table.shape != cos.shape for table in tables):
        tables = torch.broadcast_tensors(*tables)
    tables = tuple(t.to(torch.float32).contiguous() for t in tables)
    run("rope", (unit_stride(q), unit_stride(k), *tables), out, (sign, scale_q is not None, scale_k is not None))
    return out[0], out[1]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.contiguous()
    out = empty(gate.shape, gate.dtype)
    run("swiglu", (gate, up.contiguous()), (out,), ())
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """(dgate, dup), which overwrite gate and up if ``in_place`` and they are contiguous: the kernel reads an element of
    each before it writes either."""
    gate, up = gate.contiguous(), up.contiguous()
    dgate, dup = (gate, up) if in_place else (empty(gate.shape, gate.dtype), empty(up.shape, up.dtype))
    run("swiglu_backward", (grad.contiguous(), gate, up), (dgate, dup), ())
    return dgate, dup


def gelu(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = empty(x.shape, x.dtype)
    run("gelu", (x,), (out,), ())
    return out


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    x = x.contiguous()
    dx = empty(x.shape, x.dtype)
    run("gelu_backward", (grad.contiguous(), x), (dx,), ())
    return dx


def cross_entropy_forward(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    log_sum_exp, picked = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    run("cross_entropy_forward", (logits.contiguous(), targets.contiguous()), (log_sum_exp, picked), (first, real))
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
    """factor * d(sum of losses)/d logits [N, C], which overwrites contiguous logits if ``in_place``."""
    factor = torch.as_tensor(factor, dtype=torch.float32).reshape(1)
    scalars, rows = (first, real, z_loss), logits.contiguous()
    inputs = (rows, targets.contiguous(), log_sum_exp.to(torch.float32).contiguous(), factor)
    if in_place:
        run("cross_entropy_backward_in_place", inputs, (), scalars)
        return rows
    out = torch.empty_like(rows)
    run("cross_entropy_backward", inputs, (out,), scalars)
    return out


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, table)  # PyTorch's, which refuses an id outside the table


def embedding_backward(grad: Tensor, ids: Tensor, vocab_size: int, out: Tensor | None = None) -> Tensor:
    """``out``: where the gradient goes, contiguous float32 [vocab_size, E]."""
    if out is None:
        out = empty((vocab_size, grad.shape[1]), torch.float32)
    run("embedding_backward", (grad.contiguous(), ids.contiguous()), (out,), ())
    return out


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y of one shape, in the dtype of x."""
    out = empty(x.shape, x.dtype)
    run("add", (x.contiguous(), y.contiguous()), (out,), ())
    return out


def column_sum(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The sums of x [N, C] over its rows, [C] in float32; ``out``: where they go."""
    if out is None:
        out = x.new_empty(x.shape[1], dtype=torch.float32)
    run("column_sum", (x.contiguous(),), (out,), ())
    return out


def square_sum(x: Tensor) -> Tensor:
    """Sum of the squares of a contiguous vector, float64 []; squared and added in float64."""
    out = torch.empty(1, dtype=torch.float64)
    run("square_sum", (x,), (out,), ())
    return out[0]


def accumulate(into: Tensor, x: Tensor, add: bool) -> None:
    """into += x, or without ``add`` into = x; ``into`` contiguous float32, x of its size."""
    run("accumulate", (into, x.contiguous()), (), (0, add))


def adamw(master: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: AdamWStep, copy: Tensor | None = None) -> None:
    inputs = (master, m, v, grad, master if copy is None else copy)
    run("adamw", inputs, (), (0, *step.scalars(), copy is not None, 0, grad.numel()))


def _gradient(weight: Tensor) -> Tensor:
    """Uninitialised, for the gradient of ``weight``: its place, or a tensor of its own in float32."""
    place = take_place(weight) if weight.dtype == torch.float32 else None
    return weight.new_empty(weight.shape, dtype=torch.float32) if place is None else place


def _either(x: Tensor | None, other: Tensor) -> Tensor:
    """x, or ``other`` in the place of an argument that a kernel then does not read."""
    return (other if x is None else x).contiguous()
