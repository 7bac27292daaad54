"""Operators of the MindSpore backend and the selection of their implementations.

The CPU device uses C++ (kernels/cpu), Ascend uses CANN's fused operators (kernels/ascend/ops.py); where neither is
available, and in float64, the composite form is used (kernels/mindspore/composite.py). ``select`` sets the choice of
the process before models are built. B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden,
V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import mindspore as ms
from mindspore import Tensor, ops

from telechat_twins.core.config import KERNEL_OPERATORS
from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.ascend.rehearsal import rehearsing
from telechat_twins.kernels.dispatch import Candidate, Choice, choose, describe
from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.mindspore import autograd as autograd
from telechat_twins.kernels.mindspore import composite as composite
from telechat_twins.kernels.mindspore.keys import Keys as Keys
from telechat_twins.kernels.mindspore.private import recording

_WITHOUT_FLOAT64 = ("cpp", "amx", "cann")

_choices: dict[str, Choice] = {}
_modules: dict[str, ModuleType | None] = {}


def select(wanted: Mapping[str, str] | None = None, device: str | None = None) -> dict[str, Choice]:
    """Select the implementations of this process. ``wanted``: operator -> implementation or "auto", the best.

    ``device``: "CPU", "Ascend" or "GPU"; default: MindSpore's current device, and Ascend in its rehearsal
    (kernels/ascend/rehearsal.py). Raises UserError for an implementation that is unknown or unavailable there.
    """
    device = device or ("Ascend" if rehearsing() else str(ms.get_context("device_target")))
    found = choose(candidates(device), wanted or {}, device)
    if device == "CPU":
        from telechat_twins.kernels.cpu.engine import choose_split

        choose_split(found["linear"].implementation == "amx")
    _choices.clear()
    _choices.update(found)
    _modules.clear()
    _modules.update({name: _module(choice.implementation) for name, choice in found.items()})
    return dict(found)


def choices() -> dict[str, Choice]:
    """The choices of this process; the best of the device without a call of ``select``."""
    return dict(_choices) if _choices else select()


def described(dtype: ms.Type = ms.float32) -> list[str]:
    """Implementations of this process for tensors of ``dtype`` with reasons, one line each."""
    return describe(choices(), _WITHOUT_FLOAT64 if dtype == ms.float64 else ())


def candidates(device: str) -> dict[str, list[Candidate]]:
    """Implementations of each operator on a device, best first."""
    table: dict[str, list[Candidate]] = {}
    for name in KERNEL_OPERATORS:
        plain = Candidate("composite")
        if device == "CPU":
            cpp = Candidate("cpp", _cpp_obstacle())
            tiles = [Candidate("amx", cpp.obstacle or _tiles_obstacle())] if name == "linear" else []
            table[name] = [*tiles, cpp, plain]
        elif device == "Ascend":
            from telechat_twins.kernels.ascend.ops import CANN_OPERATORS

            table[name] = [Candidate("cann"), plain] if CANN_OPERATORS[name].serves else [plain]
        else:
            table[name] = [plain]
    return table


def _tiles_obstacle() -> str:
    from telechat_twins.kernels.cpu.engine import tiles_obstacle

    return tiles_obstacle("mindspore")


def _cpp_obstacle() -> str:
    from telechat_twins.kernels.cpu.build import BuildError, load_extension

    try:
        load_extension()
    except BuildError as error:
        return str(error)
    return ""


def _module(implementation: str) -> ModuleType | None:
    if implementation in ("cpp", "amx"):
        from telechat_twins.kernels.cpu import ops as cpp

        return cpp
    if implementation == "cann":
        from telechat_twins.kernels.ascend import ops as ascend

        return ascend
    return None


def serving(operator: str, dtype: ms.Type = ms.float32) -> ModuleType | None:
    """The module that implements an operator for tensors of ``dtype``; None: composite."""
    if dtype == ms.float64:
        return None
    if not _choices:
        select()
    return _modules[operator]


def limit_threads(threads: int) -> None:
    """Set the number of threads of this process's C++ operators; other implementations have settings of their own."""
    from telechat_twins.kernels.cpu.engine import limit_threads as limit

    limit(threads)


def linear(
    x: Tensor,
    weight: Tensor | Int8,
    bias: Tensor | None,
    compute: ms.Type,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias, operands and result in ``compute``, accumulated in float32 or wider.

    ``again`` computes x anew, bit for bit: on a CPU the backward pass calls it where it would otherwise have kept x.
    """
    if isinstance(weight, Int8):
        x = ops.cast(x, compute)
    few = few_rows(x, [(weight, bias)], compute)
    if few is not None:
        return few[0]
    cpp = serving("linear", compute)
    if isinstance(weight, Int8):
        weight = composite.dequantize(*weight, compute) if cpp is None else cpp.dequantize(*weight, compute)
    if cpp is None:
        return composite.linear(x, weight, bias, compute)
    if compute == ms.float16:
        return composite.linear(x, weight, bias, compute)
    flat = x.reshape(-1, x.shape[-1])
    return autograd.Linear.apply(flat, weight, bias, compute, cpp, again).reshape(*x.shape[:-1], weight.shape[0])


def few_rows(
    x: Tensor, matrices: Sequence[tuple[Tensor | Int8, Tensor | None]], compute: ms.Type
) -> tuple[Tensor, ...] | None:
    """``linear`` of one x with up to three (weight, bias) in one call; None where the fused operator for few rows is
    unavailable, x has too many rows for a matrix that is not int8, or a gradient is recorded."""
    cpp = serving("linear", compute)
    if cpp is None or x.dtype != compute or recording():
        return None
    # The operator rounds rows that meet int8 matrices; a row must not depend on how many others there are.
    if x.size > cpp.FEW * x.shape[-1] and not all(isinstance(weight, Int8) for weight, _ in matrices):
        return None
    given = []
    for weight, bias in matrices:
        values, factors = weight if isinstance(weight, Int8) else (weight, None)
        if factors is None and values.dtype != compute:
            return None
        given.append((values, bias, factors))
    found = cpp.several_linear_rows(x, given)
    return found if len(given) > 1 else (found,)


def embedding(table: Tensor, input_ids: Tensor) -> Tensor:
    """table [V, E], input_ids [B, S] -> [B, S, E]."""
    module = serving("embedding", table.dtype)
    if module is None:
        return composite.embedding(table, input_ids)
    return autograd.Embedding.apply(table, input_ids, module) if recording() else module.embedding(table, input_ids)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, stat: ms.Type, compute: ms.Type, mask: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in ``stat``, cast to ``compute``, then times weight [E]: the released models' order.

    ``mask`` float32 [E]: the growth mask of kernels.reference.rms_norm.
    """
    module = serving("rms_norm", stat)
    if module is None:
        return composite.rms_norm(x, weight, eps, stat, compute, mask)
    if not recording():
        return module.rms_norm(x, weight, eps, compute, mask)[0]
    return autograd.RmsNorm.apply(x, weight, eps, compute, mask, module)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    stat: ms.Type,
    compute: ms.Type,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream residual + x, in the dtype of ``residual``, and its rms_norm: (normed, stream)."""
    module = serving("rms_norm", stat)
    if module is None:
        stream = residual + ops.cast(x, residual.dtype)
        return composite.rms_norm(stream, weight, eps, stat, compute, mask), stream
    if not recording():
        return module.add_rms_norm(x, residual, weight, eps, compute, mask)[:2]
    return autograd.AddRmsNorm.apply(x, residual, weight, eps, compute, mask, module)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stat: ms.Type,
    compute: ms.Type,
    mask: Tensor | None = None,
    counted: int | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight [E] + bias [E] in ``stat``, cast to ``compute``.

    One rounding, as in torch.nn.LayerNorm, which released FLM-101B uses; the RMS norm rounds before its weight.
    ``mask`` and ``counted``: kernels.reference.layer_norm; with ``counted`` only the composite form exists.
    """
    if counted is not None:
        return composite.layer_norm(x, weight, bias, eps, stat, compute, mask, counted)
    module = serving("layer_norm", stat)
    if module is None:
        return composite.layer_norm(x, weight, bias, eps, stat, compute, mask)
    if not recording():
        return module.layer_norm(x, weight, bias, eps, compute, mask)[0]
    return autograd.LayerNorm.apply(x, weight, bias, eps, compute, mask, module)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None = None, scale_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary embedding, half rotation, of q [B, S, H, D] and k [B, S, K, D] by cos, sin [B or 1, S, 1, D/2], in the
    tables' dtype. ``scale_q``, ``scale_k``, shaped like the tables, multiply both halves afterwards (xPos)."""
    module = serving("rope", cos.dtype)
    if module is None:
        return composite.rope(q, cos, sin, scale_q), composite.rope(k, cos, sin, scale_k)
    if not recording():
        return module.rope_qk(q, k, cos, sin, scale_q, scale_k)
    return autograd.Rope.apply(q, k, cos, sin, scale_q, scale_k, module)


def swiglu(gate: Tensor, up: Tensor, stat: ms.Type) -> Tensor:
    """silu(gate) * up in ``stat``, returned in the dtype of ``gate``."""
    module = serving("swiglu", stat)
    if module is None:
        return composite.swiglu(gate, up, stat)
    return autograd.Swiglu.apply(gate, up, module) if recording() else module.swiglu(gate, up)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form."""
    module = serving("gelu", x.dtype)
    if module is None:
        return composite.gelu(x)
    return autograd.Gelu.apply(x, module) if recording() else module.gelu(x)


def add(stream: Tensor, branch: Tensor) -> Tensor:
    """stream + branch, in the dtype of ``stream``."""
    module = _adding(stream)
    if module is None:
        return stream + ops.cast(branch, stream.dtype)
    return autograd.Add.apply(stream, branch, module) if recording() else module.add(stream, branch)


def shared(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """x for ``count`` readers in the forward pass, where this saves the engine's sums of their gradients."""
    module = _adding(x)
    if count == 1 or module is None or not recording():
        return (x,) * count
    return autograd.Shared.apply(x, count, module)


def _adding(x: Tensor) -> ModuleType | None:
    """The module with an operator that adds tensors like x; the residual sum belongs to add_rms_norm's."""
    module = serving("rms_norm", x.dtype)
    return module if hasattr(module, "add") else None


def loss_logits(logits: Tensor, stat: ms.Type) -> Tensor:
    """Logits in the dtype of the loss, ``stat``; as they are where they are differentiated and the operators of the
    loss read and write their dtype themselves, which gives the same bits."""
    if logits.dtype == stat or (recording() and _takes_narrow(logits)):
        return logits  # a view, of which astype would make a copy even in its own dtype
    return logits.astype(stat)


def _takes_narrow(logits: Tensor) -> bool:
    module = serving("cross_entropy", logits.dtype)
    return module is not None and logits.dtype in (ms.bfloat16, ms.float16)


def keys_on_device(key_ranges: KeyRanges) -> Keys | None:
    """Visible keys for ``attention``, once per forward pass; None for composite attention, which takes masks."""
    module = serving("attention")
    return None if module is None else Keys(module.device_ranges(key_ranges), module, key_ranges)


def attention(q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> Tensor:
    """Softmax attention, scale 1/sqrt(D): q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]."""
    return autograd.Attention.apply(q, k, v, keys)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum over positions of -log softmax(logits)[target] + z_loss * log_sum_exp^2; IGNORE contributes 0.

    logits [B, S, V] in the loss dtype, targets [B, S]. The backward pass of a fused operator overwrites the logits.
    """
    module = serving("cross_entropy", logits.dtype)
    if module is None:
        return composite.cross_entropy(logits, targets, z_loss)
    return autograd.CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), z_loss, module)
