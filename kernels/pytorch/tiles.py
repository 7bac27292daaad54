"""float32 matrix products of PyTorch's CPU by the C++ operators, forward and gradients: "amx", in matrix tiles
(kernels/cpu/split_matmul.cc), and "cpp", by multiply-adds (kernels/cpu/matmul.cc).

Operands are passed by address and read where they lie, transposed or not. Other dtypes use kernels/pytorch/cpu.py.
"""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from telechat_twins.kernels.pytorch import cpu as torch_cpu
from telechat_twins.kernels.pytorch.in_cpp import column_sum
from telechat_twins.kernels.pytorch.room import empty

if TYPE_CHECKING:
    from telechat_twins.kernels.cpu.engine import Call

_state = {"serves": False}
_prepared = threading.local()  # its ``calls``: by turn_a, turn_w and whether there is a bias


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias [out]; all float32, or as torch_cpu.linear."""
    if not _state["serves"] or x.dtype != torch.float32 or not x.numel() or not weight.numel():
        return torch_cpu.linear(x, weight, bias)
    turned = not weight.is_contiguous() and weight.t().is_contiguous()  # read where it lies
    w = weight.t() if turned else weight
    return _product(x.reshape(-1, x.shape[-1]), w, bias, turn_w=turned).view(*x.shape[:-1], weight.shape[0])


def linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias where ``needs`` wants them: dy W, dy^T x and the sum of dy over the rows."""
    if not _state["serves"] or grad.dtype != torch.float32 or not grad.numel() or not weight.numel():
        return torch_cpu.linear_backward(grad, x, weight, needs)
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        _product(rows, weight, turn_w=True).view(*grad.shape[:-1], weight.shape[1]) if needs[0] else None,
        _product(rows, x.reshape(-1, x.shape[-1]), turn_a=True, turn_w=True) if needs[1] and x is not None else None,
        column_sum(rows) if needs[2] else None,
    )


def _product(a: Tensor, w: Tensor, bias: Tensor | None = None, turn_a: bool = False, turn_w: bool = False) -> Tensor:
    """a [m, k] @ w [n, k]^T + bias [n]; with ``turn_a`` a is [k, m], with ``turn_w`` w is [k, n]."""
    from telechat_twins.kernels.cpu.engine import describe_view

    a, w = a.detach().contiguous(), w.detach().contiguous()
    (m, k), (n, inner) = a.shape[:: -1 if turn_a else 1], w.shape[:: -1 if turn_w else 1]
    if k != inner or any(x.dtype != torch.float32 or x.device.type != "cpu" for x in (a, w)):
        found = f"{tuple(w.shape)} {w.dtype} on {w.device}"
        raise ValueError(f"weight: {found}, needs inner length {k}, float32 and the CPU")
    call = _call(turn_a, turn_w, bias is not None)
    out = empty((m, n), a.dtype)
    describe_view(call.inputs[0], a.data_ptr(), a.shape, "float32")
    describe_view(call.inputs[1], w.data_ptr(), w.shape, "float32")
    describe_view(call.outputs[0], out.data_ptr(), out.shape, "float32")
    if bias is not None:
        bias = bias.detach().contiguous()
        if bias.dtype != torch.float32 or tuple(bias.shape) != (n,):
            raise ValueError(f"bias: {tuple(bias.shape)} {bias.dtype}, needs {(n,)} in float32")
        describe_view(call.inputs[2], bias.data_ptr(), bias.shape, "float32")
    call.run()
    return out


def _call(turn_a: bool, turn_w: bool, has_bias: bool) -> Call:
    """The prepared call of this thread: views are set before every run, so threads cannot share one."""
    from telechat_twins.kernels.cpu.engine import Call

    calls = _prepared.__dict__
    key = f"{turn_a} {turn_w} {has_bias}"
    if key not in calls:
        calls[key] = Call("matmul", 3, 1, (turn_a, turn_w, has_bias))
    return calls[key]
