"""Operators of the PyTorch backend: argument checks, gradients, and the selection of their implementations.

    device  implementations, best first
    CPU     amx (products in matrix tiles: tiles.py), cpp (kernels/cpu by address: attention_in_cpp.py, in_cpp.py and,
            where they are the faster ones, products: tiles.py), torch (PyTorch's fused kernels, and blocked passes
            that stay in cache: cpu.py), composite
    GPU     triton, torch (PyTorch's fused operators: native.py), composite
    NPU     cann (npu.py), triton, composite

``select`` is called once per process, before a model is built; the default is the best of the device. float64, the
reference for the other precisions, uses the composite form on accelerators, whose fused kernels lack it.

Shapes: B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden, V vocabulary, N rows, C columns of the
vocabulary. A wrong type or dtype of an argument raises TypeError; a wrong shape, head count or device ValueError.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from telechat_twins.core.config import KERNEL_OPERATORS
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.visibility import Block, KeyRanges
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.dispatch import Candidate, Choice, choose, describe
from telechat_twins.kernels.pytorch import (
    attention_in_cpp,
    in_cpp,
    private,
)
from telechat_twins.kernels.pytorch import (
    autograd as torch_autograd,
)
from telechat_twins.kernels.pytorch import (
    checks as torch_checks,
)
from telechat_twins.kernels.pytorch import (
    composite as torch_composite,
)
from telechat_twins.kernels.pytorch import (
    cpu as torch_cpu,
)
from telechat_twins.kernels.pytorch import (
    native as torch_native,
)
from telechat_twins.kernels.pytorch import (
    tiles as torch_tiles,
)
from telechat_twins.kernels.pytorch import (
    weights as torch_weights,
)

DEVICES = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}
# Operators that PyTorch has fused on a GPU; its matrix product and lookup are used on every accelerator.
_NATIVE = ("rms_norm", "layer_norm", "gelu", "attention", "cross_entropy", "adamw")
_CANN = ("rms_norm", "rope", "swiglu", "gelu", "attention", "merge_blocks", "adamw")
_ALWAYS_TORCH = ("linear", "embedding")
_WITHOUT_FLOAT64 = ("triton", "cann")

_state: dict[str, dict[str, Choice]] = {}  # key "choices", set by ``select``


def select(wanted: Mapping[str, str] | None = None, device: str | None = None) -> dict[str, Choice]:
    """Select the implementations of this process. ``wanted``: operator -> implementation or "auto", the fields of
    core.config.KernelsConfig.

    ``device`` is a device type of PyTorch ("cpu", "cuda", "npu"); default: the accelerator if there is one. Raises
    UserError for an implementation that is unknown or unavailable on the device.
    """
    kind = device or default_device()
    if kind not in DEVICES:
        raise ValueError(f"device: got {kind!r}, needs one of {', '.join(DEVICES)}")
    _state["choices"] = choose(candidates(kind), wanted or {}, DEVICES[kind])
    torch_tiles.choose(_state["choices"]["linear"].implementation)
    return _state["choices"]


def choices() -> dict[str, Choice]:
    """The choices of this process; the best of the device without a call of ``select``."""
    return _state.get("choices") or select()


def described(dtype: torch.dtype = torch.float32) -> list[str]:
    """Implementations of this process for tensors of ``dtype`` with reasons, one line each."""
    found = choices()
    if dtype == torch.float64:
        for name, (_, used, _) in found.items():
            if used in ("cpp", "amx"):
                found = {**found, name: Choice(name, "torch", f"{used} has no float64")}
    return describe(found, _WITHOUT_FLOAT64 if dtype == torch.float64 else ())


def default_device() -> str:
    """Device type of this process's models: the accelerator if there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "npu" if hasattr(torch, "npu") and torch.npu.is_available() else "cpu"


def candidates(kind: str) -> dict[str, list[Candidate]]:
    """Implementations of each operator on a device type, best first."""
    return {operator: _candidates(operator, kind) for operator in KERNEL_OPERATORS}


def _candidates(operator: str, kind: str) -> list[Candidate]:
    composite = Candidate("composite")
    if kind == "cpu":
        without = "" if operator != "linear" or private.has_mkldnn_linear() else "this PyTorch has no oneDNN"
        framework = Candidate("torch", without)
        if operator not in ("attention", "linear", *in_cpp.OPERATORS):
            return [framework, composite]
        compiled = Candidate("cpp", attention_in_cpp.obstacle())
        if operator != "linear":
            return [compiled, framework, composite]
        products = (compiled, framework) if torch_tiles.vectors_lead() else (framework, compiled)
        return [Candidate("amx", torch_tiles.obstacle()), *products, composite]
    if operator in _ALWAYS_TORCH:
        return [Candidate("torch"), composite]
    triton = Candidate("triton", "" if importlib.util.find_spec("triton") else "triton is not installed")
    if kind == "cuda":
        return [triton, *([Candidate("torch")] if operator in _NATIVE else []), composite]
    missing = "" if importlib.util.find_spec("torch_npu") else "torch_npu is not installed"
    return [*([Candidate("cann", missing)] if operator in _CANN else []), triton, composite]


def serving(operator: str, x: Tensor) -> ModuleType:
    """The module that implements ``operator`` for the dtype and device of ``x``.

    The functions of kernels.pytorch.native are differentiable, those of the other modules have explicit backwards.
    """
    implementation = choices()[operator].implementation
    if x.dtype == torch.float64 and implementation in _WITHOUT_FLOAT64:
        return torch_composite
    if implementation == "triton":
        from telechat_twins.kernels.triton import ops

        return ops
    if implementation == "cann":
        from telechat_twins.kernels.pytorch import npu as torch_npu_ops

        return torch_npu_ops
    if implementation == "composite":
        return torch_composite
    if implementation in ("amx", "cpp") and operator == "linear":
        return torch_tiles
    if implementation == "cpp" and x.dtype in attention_in_cpp.SERVED and x.device.type == "cpu":
        return attention_in_cpp if operator == "attention" else in_cpp
    return torch_cpu if x.device.type == "cpu" else torch_native


def _stat_input(x: Tensor, stat: torch.dtype) -> Tensor:
    """x, in float64 where statistics must be: operators compute them in float32, or in the dtype of a float64 x."""
    return x.to(stat) if stat == torch.float64 else x


def linear(
    x: Tensor,
    weight: torch_weights.Matrix,
    bias: Tensor | None,
    compute: torch.dtype,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias, operands and result in ``compute``, accumulated in float32 or wider.

    ``again`` computes x anew, bit for bit: on a CPU the backward pass calls it where it would otherwise have kept x.
    """
    x, bias = x.to(compute), None if bias is None else bias.to(compute)
    if not isinstance(weight, Tensor):
        return torch_weights.linear(x, weight, bias)
    weight = weight.to(compute)
    torch_checks.linear(x, weight, bias)
    package = serving("linear", x)
    if package in (torch_cpu, torch_tiles):
        if not torch.is_grad_enabled():
            return package.linear(x, weight, bias)
        return torch_autograd.Linear.apply(package, x, weight, bias, again)
    return torch_composite.linear(x, weight, bias)


def linears(
    x: Tensor,
    weights: Sequence[torch_weights.Matrix],
    biases: Sequence[Tensor | None],
    again: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, ...] | None:
    """``linear`` of one x with several weights, for training in float32: by products that add the gradients of x to one
    another; None where those are not selected, or for other dtypes."""
    if not torch.is_grad_enabled() or serving("linear", x) is not torch_tiles or not torch_tiles.serves(x):
        return None
    plain = [weight for weight in weights if isinstance(weight, Tensor) and weight.dtype == x.dtype]
    if len(plain) != len(weights) or not x.numel() or not all(weight.numel() for weight in plain):
        return None
    for weight, bias in zip(plain, biases, strict=True):
        torch_checks.linear(x, weight, bias)
    return torch_autograd.Linears.apply(x, again, len(plain), *plain, *biases)


def add(stream: Tensor, branch: Tensor) -> Tensor:
    """stream + branch, in the dtype of ``stream``; the sum belongs to that of ``add_rms_norm``."""
    if serving("rms_norm", stream) is in_cpp and stream.shape == branch.shape:
        return torch_autograd.Add.apply(stream, branch)
    return stream + branch.to(stream.dtype)


def add_bias(x: Tensor, bias: Tensor, compute: torch.dtype) -> Tensor:
    """x [..., E] + bias [E] rounded to ``compute``, in the dtype of x."""
    return x + bias.to(compute).to(x.dtype)


def embedding(table: Tensor, input_ids: Tensor) -> Tensor:
    """table [V, E], input_ids [B, S] of int32 or int64 -> [B, S, E]."""
    torch_checks.embedding(table, input_ids)
    package = serving("embedding", table)
    package = torch_composite if package is torch_native else package
    if not torch.is_grad_enabled():
        return package.embedding(table, input_ids)
    return torch_autograd.Embedding.apply(package, table, input_ids)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, stat: torch.dtype, compute: torch.dtype, mask: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in ``stat``, cast to ``compute``, then times weight [E]: the released models' order.

    ``mask`` float32 [E]: the growth mask of kernels.reference.rms_norm.
    """
    torch_checks.norm(x, weight, mask)
    x, package = _stat_input(x, stat), serving("rms_norm", x)
    if package is torch_native:
        if mask is None:
            return torch_native.rms_norm(x, weight, eps, compute)
        raise UserError("kernels.rms_norm: torch does not support growth masks; set triton or composite")
    if not torch.is_grad_enabled():
        return package.rms_norm(x, weight, eps, compute, mask)[0]
    return torch_autograd.RmsNorm.apply(package, x, weight, eps, compute, mask)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    stat: torch.dtype,
    compute: torch.dtype,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream residual + x, in the dtype of ``residual``, and its rms_norm: (normed, stream)."""
    torch_checks.norm(x, weight, mask)
    torch_checks.same_shape("residual", residual, "x", x)
    package = serving("rms_norm", residual)
    if package is torch_native:
        stream = residual + x.to(residual.dtype)
        return rms_norm(stream, weight, eps, stat, compute, mask), stream
    if not torch.is_grad_enabled():
        return package.add_rms_norm(x, residual, weight, eps, compute, mask)[:2]
    return torch_autograd.AddRmsNorm.apply(package, x, residual, weight, eps, compute, mask)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stat: torch.dtype,
    compute: torch.dtype,
    mask: Tensor | None = None,
    counted: int | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight [E] + bias [E] in ``stat``, cast to ``compute``.

    One rounding, as in torch.nn.LayerNorm, which released FLM-101B uses; the RMS norm rounds before its weight.
    ``mask`` and ``counted``: kernels.reference.layer_norm; with ``counted`` only the composite form exists.
    """
    torch_checks.norm(x, weight, mask)
    torch_checks.same_shape("bias", bias, "weight", weight)
    if counted is not None:
        return torch_composite.counted_layer_norm(x, weight, bias, eps, stat, compute, mask, counted)
    x, package = _stat_input(x, stat), serving("layer_norm", x)
    if package is torch_native:
        if mask is None:
            return torch_native.layer_norm(x, weight, bias, eps, compute)
        raise UserError("kernels.layer_norm: torch does not support growth masks; set triton or composite")
    if not torch.is_grad_enabled():
        return package.layer_norm(x, weight, bias, eps, compute, mask)[0]
    return torch_autograd.LayerNorm.apply(package, x, weight, bias, eps, compute, mask)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None = None, scale_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary embedding, half rotation, of q [B, S, H, D] and k [B, S, K, D] by cos, sin [B or 1, S, 1, D/2], in the
    tables' dtype. ``scale_q``, ``scale_k``, shaped like the tables, multiply both halves afterwards (xPos)."""
    torch_checks.rope(q, k, cos, sin, scale_q, scale_k)
    package = serving("rope", q)
    if not torch.is_grad_enabled():
        return package.rope_qk(q, k, cos, sin, scale_q, scale_k)
    return torch_autograd.RopeQK.apply(package, q, k, cos, sin, scale_q, scale_k)


def swiglu(gate: Tensor, up: Tensor, stat: torch.dtype) -> Tensor:
    """silu(gate) * up in ``stat``, returned in the dtype of ``gate``."""
    torch_checks.same_shape("up", up, "gate", gate)
    torch_checks.same_dtype("up", up, "gate", gate)
    wide_gate, wide_up = _stat_input(gate, stat), _stat_input(up, stat)
    package = serving("swiglu", wide_gate)
    if not torch.is_grad_enabled():
        return package.swiglu(wide_gate, wide_up).to(gate.dtype)
    return torch_autograd.SwiGLU.apply(package, wide_gate, wide_up).to(gate.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form."""
    package = serving("gelu", x)
    if package is torch_native or not torch.is_grad_enabled():
        return package.gelu(x)
    return torch_autograd.Gelu.apply(package, x)


def takes_blocks() -> bool:
    """Whether attention takes core.model.visibility.Block with masks (PyTorch's on a GPU) instead of key ranges."""
    return choices()["attention"].implementation == "torch" and default_device() != "cpu"


def place_ranges(key_ranges: KeyRanges, device: torch.device) -> KeyRanges:
    """``key_ranges`` in the form that attention takes; placed once per forward pass."""
    if choices()["attention"].implementation == "cann":  # reads the ranges on the host
        return key_ranges
    return key_ranges._replace(ranges=torch.from_numpy(key_ranges.ranges).to(device))


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: KeyRanges | Sequence[Block], scale: float | None = None
) -> Tensor:
    """Softmax attention, softmax in float32 or wider. q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D].

    Query heads j*H/K .. (j+1)*H/K - 1 share kv head j. ``visible`` is from ``place_ranges``, or a list of blocks where
    ``takes_blocks``. ``scale`` multiplies the scores, default 1/sqrt(D). A query without visible keys gives zeros.
    """
    ranges = visible if isinstance(visible, KeyRanges) else None
    torch_checks.attention(q, k, v, ranges)
    if ranges is None:
        return torch_native.attention(q, k, v, visible)  # type: ignore[arg-type]
    package = serving("attention", q)
    if package is torch_cpu and scale is None:
        if ranges.kind == "full":
            return torch_native.full_attention(q, k, v)
        if ranges.kind == "causal" and q.shape[1] == k.shape[1]:
            return torch_native.attention(q, k, v, [Block(0, q.shape[1], k.shape[1], None)])
    return torch_autograd.Attention.apply(_block_package(q), q, k, v, ranges, scale)


def _block_package(q: Tensor) -> ModuleType:
    """The module for attention that returns a log_sum_exp, which PyTorch's own operators do not."""
    package = serving("attention", q)
    return torch_composite if package is torch_native else package


def attention_block(q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges) -> tuple[Tensor, Tensor]:
    """Partial attention over some of the keys, for ``merge_blocks``; not differentiable.

    out [B, S, H, D] and log_sum_exp [B, H, S], both in float32 or wider; zeros and -inf for a query without visible
    keys.
    """
    torch_checks.attention(q, k, v, key_ranges)
    return _block_package(q).attention(q, k, v, key_ranges, out_f32=True)


def attention_block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges,
    out: Tensor | None,
    log_sum_exp: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block in float32 or wider, from the *final* output and log_sum_exp [B, H, S] of all blocks.

    ``delta`` [B, H, S] is sum(out * grad) over D. Only CANN's operator reads ``out``.
    """
    torch_checks.attention(q, k, v, key_ranges)
    package = _block_package(q)
    return package.attention_backward(grad, q, k, v, key_ranges, out, log_sum_exp, delta=delta, out_f32=True)


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from attention over each; [B, S, H, D] and [B, H, S]."""
    torch_checks.same_shape("more", more, "out", out)
    torch_checks.same_shape("more_lse", more_lse, "log_sum_exp", log_sum_exp)
    return serving("merge_blocks", out).merge_blocks(out, log_sum_exp, more, more_lse)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum over positions of -log softmax(logits)[target] + z_loss * log_sum_exp^2, in float32 or wider.

    logits [..., V], targets [...]; IGNORE contributes 0. The backward pass overwrites the logits with their gradient,
    unless they are a leaf of autograd.
    """
    rows, targets = logits.flatten(0, -2), targets.flatten()
    torch_checks.cross_entropy(rows, targets, rows.shape[-1])
    package = serving("cross_entropy", rows)
    if package is torch_native:
        if not z_loss:
            return torch_native.cross_entropy(rows, targets)
        raise UserError("kernels.cross_entropy: torch does not support a z-loss; set triton or composite")
    return torch_autograd.CrossEntropy.apply(package, rows, targets, z_loss, not logits.is_leaf)


def shard_statistics(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Statistics of a vocabulary shard, logits [N, C] of the columns [first, first + C): (log_sum_exp over the ``real``
    first columns, the target's logit, 0 where another rank has it or it is IGNORE), both [N] in float32 or wider."""
    torch_checks.cross_entropy(logits, targets, real)
    return _shard_package(logits).cross_entropy_forward(logits, targets, first, real)


def shard_gradient(
    logits: Tensor, targets: Tensor, first: int, real: int, log_sum_exp: Tensor, factor: Tensor, z_loss: float = 0.0
) -> Tensor:
    """d (factor * sum of losses) / d logits [N, C] of a shard, from the log_sum_exp [N] over all ranks.

    A fused operator overwrites the logits with it.
    """
    torch_checks.cross_entropy(logits, targets, real)
    return _shard_package(logits).cross_entropy_backward(logits, targets, first, real, log_sum_exp, factor, z_loss)


def _shard_package(logits: Tensor) -> ModuleType:
    package = serving("cross_entropy", logits)
    if package is torch_native:
        raise UserError(
            "kernels.cross_entropy: torch does not support a vocabulary divided over ranks; set triton or composite"
        )
    return package


def adder(master_dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """The module with ``accumulate`` and ``square_sum`` of flat gradients in the dtype of the masters; None: PyTorch's
    own operators. It is AdamW's."""
    module = serving("adamw", torch.empty(0, dtype=master_dtype, device=device))
    return module if module is in_cpp else None


def adamw(master: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: AdamWStep, copy: Tensor | None = None) -> None:
    """kernels.reference.adamw of flat vectors of one dtype, in place; ``grad`` may be overwritten.

    ``copy`` receives the new master, rounded to the dtype of ``copy``.
    """
    torch_checks.adamw(master, grad, m, v, copy)
    package = serving("adamw", master)
    with torch.no_grad():
        (torch_cpu if package is torch_native else package).adamw(master, grad, m, v, step, copy)
