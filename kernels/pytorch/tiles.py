"""float32 matrix products of PyTorch's CPU by the C++ operators, forward and gradients: "amx", in matrix tiles
(kernels/cpu/split_matmul.cc), and "cpp", by multiply-adds (kernels/cpu/matmul.cc).

Operands are passed by address and read where they lie, transposed or not. Other dtypes use kernels/pytorch/cpu.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from telechat_twins.kernels.pytorch import cpu as torch_cpu
from telechat_twins.kernels.pytorch.attention_in_cpp import run
from telechat_twins.kernels.pytorch.in_cpp import column_sum
from telechat_twins.kernels.pytorch.room import empty, take_place

_state = {"serves": False}


def obstacle() -> str:
    """Why these products are unavailable here, a clause; empty where they are available."""
    from telechat_twins.kernels.cpu.build import BuildError
    from telechat_twins.kernels.cpu.engine import tiles_obstacle

    try:
        return tiles_obstacle("numpy")
    except BuildError as error:
        return str(error)


@cache
def vectors_lead() -> bool:
    """Whether "cpp" is preferred to PyTorch's own products: measured on AMD's processors with AVX-512, where oneDNN and
    MKL took 1.05 times its time; not measured elsewhere."""
    try:
        facts = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return {"AuthenticAMD", "avx512f"} <= facts


def choose(implementation: str) -> None:
    """Whether this module computes the float32 products of this process: "amx", "cpp", or another, which does."""
    from telechat_twins.kernels.cpu.engine import choose_split

    _state["serves"] = implementation in ("amx", "cpp")
    if _state["serves"]:
        choose_split(implementation == "amx")


def serves(x: Tensor) -> bool:
    """Whether products with x are computed here."""
    return _state["serves"] and x.dtype == torch.float32 and x.is_cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias [out]; all float32, or as torch_cpu.linear."""
    if not _state["serves"] or x.dtype != torch.float32 or not x.numel() or not weight.numel():
        return torch_cpu.linear(x, weight, bias)
    turned = not weight.is_contiguous() and weight.t().is_contiguous()  # read where it lies
    w = weight.t() if turned else weight
    return _product(x.reshape(-1, x.shape[-1]), w, bias, turn_w=turned).view(*x.shape[:-1], weight.shape[0])


def linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, needs: tuple[bool, bool, bool], bias: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias where ``needs`` wants them: dy W, dy^T x and the sum of dy over the rows.

    Those of weight and ``bias`` in their places, if they have any (room.GradientPlace)."""
    if not _state["serves"] or grad.dtype != torch.float32 or not grad.numel() or not weight.numel():
        return torch_cpu.linear_backward(grad, x, weight, needs)
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        _product(rows, weight, turn_w=True).view(*grad.shape[:-1], weight.shape[1]) if needs[0] else None,
        _product(rows, x.reshape(-1, x.shape[-1]), turn_a=True, turn_w=True, out=take_place(weight))
        if needs[1] and x is not None
        else None,
        column_sum(rows, None if bias is None else take_place(bias)) if needs[2] else None,
    )


def added_products(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of dy [..., out] @ weight [out, in] over several pairs, in their order: [..., in]."""
    rows = [grad.reshape(-1, grad.shape[-1]).contiguous() for grad in grads]
    total = _product(rows[0], weights[0], turn_w=True)
    for dy, weight in zip(rows[1:], weights[1:], strict=True):
        run("matmul_add", (total, dy, weight.contiguous()), (), ())
    return total.view(*grads[0].shape[:-1], -1)


def _product(
    a: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    turn_a: bool = False,
    turn_w: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """a [m, k] @ w [n, k]^T + bias [n]; with ``turn_a`` a is [k, m], with ``turn_w`` w is [k, n]. ``out``: where the
    product goes, contiguous float32 [m, n]."""
    a, w = a.contiguous(), w.contiguous()
    (m, k), (n, inner) = a.shape[:: -1 if turn_a else 1], w.shape[:: -1 if turn_w else 1]
    if k != inner or a.dtype != torch.float32 or w.dtype != torch.float32 or not a.is_cpu or not w.is_cpu:
        found = f"{tuple(w.shape)} {w.dtype} on {w.device}"
        raise ValueError(f"weight: {found}, needs inner length {k}, float32 and the CPU")
    if bias is not None:
        bias = bias.contiguous()
        if bias.dtype != torch.float32 or tuple(bias.shape) != (n,):
            raise ValueError(f"bias: {tuple(bias.shape)} {bias.dtype}, needs {(n,)} in float32")
    if out is None:
        out = empty((m, n), torch.float32)
    run("matmul", (a, w, w if bias is None else bias), (out,), (turn_a, turn_w, bias is not None))
    return out
