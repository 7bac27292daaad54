"""The CPU operators with their arguments checked: the same functions for MindSpore tensors and for numpy arrays.

No gradients are recorded here (kernels/mindspore/ops.py does that); a ``_backward`` is a function like any other.
Dtypes are the framework's own. Statistics and sums are float32 whatever the inputs are. Every function raises
TypeError or ValueError that names the argument, what it is and what it must be; the kernels themselves trust their
arguments.
B batch, S queries, T keys, H heads, K kv heads, D head dim, E channels, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.cpu.engine import engine_of

FLOATING = ("float32", "bfloat16", "float16")
INTEGER = ("int32", "int64")


def rms_norm(x: Any, weight: Any, eps: float, out_dtype: Any, mask: Any = None) -> tuple[Any, Any]:
    """x [..., E], weight [E], mask [E] or None -> (normed [..., E] in ``out_dtype``, rstd [...] float32)."""
    e = _floats(x=x, weight=weight, mask=mask)
    _channels(x, weight=weight, mask=mask)
    outputs = ((out_dtype, x.shape), (e.dtypes["float32"], x.shape[:-1]))
    return e.run("rms_norm", (x, weight, _or(mask, weight)), outputs, (eps, mask is not None), 0)


def rms_norm_backward(grad: Any, x: Any, weight: Any, rstd: Any, mask: Any = None) -> tuple[Any, Any]:
    """(dx in the dtype of x, dweight [E] float32)."""
    return _rms_backward(grad, None, x, weight, rstd, mask)


def add_rms_norm(
    x: Any, residual: Any, weight: Any, eps: float, out_dtype: Any, mask: Any = None
) -> tuple[Any, Any, Any]:
    """(normed in ``out_dtype``, x + residual in the dtype of ``residual``, rstd)."""
    e = _floats(x=x, residual=residual, weight=weight, mask=mask)
    _same_shape(x=x, residual=residual)
    _channels(x, weight=weight, mask=mask)
    outputs = ((out_dtype, x.shape), (residual.dtype, x.shape), (e.dtypes["float32"], x.shape[:-1]))
    return e.run("add_rms_norm", (x, residual, weight, _or(mask, weight)), outputs, (eps, mask is not None), 0)


def add_rms_norm_backward(
    grad: Any, grad_stream: Any, stream: Any, weight: Any, rstd: Any, mask: Any = None
) -> tuple[Any, Any]:
    """(gradient of the stream, which is that of x and of the residual; dweight)."""
    return _rms_backward(grad, grad_stream, stream, weight, rstd, mask)


def _rms_backward(grad: Any, grad_stream: Any, x: Any, weight: Any, rstd: Any, mask: Any) -> tuple[Any, Any]:
    e = _floats(grad=grad, grad_stream=grad_stream, x=x, weight=weight, mask=mask)
    _same_shape(x=x, grad=grad, grad_stream=grad_stream)
    _channels(x, weight=weight, mask=mask)
    _is("rstd", rstd, ("float32",), x.shape[:-1])
    if grad_stream is not None and grad_stream.dtype != x.dtype:
        raise TypeError(f"grad_stream: {grad_stream.dtype} for a stream that is {x.dtype}")
    outputs = ((x.dtype, x.shape), (e.dtypes["float32"], weight.shape))
    inputs = (grad, x, weight, rstd, _or(grad_stream, x), _or(mask, weight))
    return e.run("rms_norm_backward", inputs, outputs, (grad_stream is not None, mask is not None), 0)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float, out_dtype: Any, mask: Any = None) -> tuple[Any, Any, Any]:
    """(normed in ``out_dtype``, mean [...], rstd [...])."""
    e = _floats(x=x, weight=weight, bias=bias, mask=mask)
    _channels(x, weight=weight, bias=bias, mask=mask)
    f32 = e.dtypes["float32"]
    outputs = ((out_dtype, x.shape), (f32, x.shape[:-1]), (f32, x.shape[:-1]))
    return e.run("layer_norm", (x, weight, bias, _or(mask, weight)), outputs, (eps, mask is not None), 0)


def layer_norm_backward(grad: Any, x: Any, weight: Any, mean: Any, rstd: Any, mask: Any = None) -> tuple[Any, Any, Any]:
    """(dx in the dtype of x, dweight, dbias [E] float32)."""
    e = _floats(grad=grad, x=x, weight=weight, mask=mask)
    _same_shape(x=x, grad=grad)
    _channels(x, weight=weight, mask=mask)
    _is("mean", mean, ("float32",), x.shape[:-1])
    _is("rstd", rstd, ("float32",), x.shape[:-1])
    f32 = e.dtypes["float32"]
    outputs = ((x.dtype, x.shape), (f32, weight.shape), (f32, weight.shape))
    return e.run(
        "layer_norm_backward", (grad, x, weight, mean, rstd, _or(mask, weight)), outputs, (mask is not None,), 0
    )


def rope_qk(
    q: Any, k: Any, cos: Any, sin: Any, scale_q: Any = None, scale_k: Any = None, sign: float = 1.0
) -> tuple[Any, Any]:
    """q [B, S, H, D] and k [B, S, K, D] rotated by cos, sin [B or 1, S, 1, D/2] float32, each in its dtype.

    ``scale_q``, ``scale_k``, shaped like cos, multiply both halves (xPos). ``sign`` -1 turns back: the gradient.
    """
    e = _floats(q=q, k=k)
    for name, x in (("q", q), ("k", k)):
        if len(x.shape) != 4 or x.shape[-1] % 2:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs [B, S, heads, D] with an even D")
    if (k.shape[0], k.shape[1], k.shape[3]) != (q.shape[0], q.shape[1], q.shape[3]):
        raise ValueError(f"k: shape {tuple(k.shape)} beside q {tuple(q.shape)}; only the heads may differ")
    B, S, _, D = q.shape
    for name, table in (("cos", cos), ("sin", sin), ("scale_q", scale_q), ("scale_k", scale_k)):
        if table is not None:
            if tuple(table.shape) not in ((B, S, 1, D // 2), (1, S, 1, D // 2)) or table.shape[0] != cos.shape[0]:
                raise ValueError(f"{name}: shape {tuple(table.shape)}, needs [{B} or 1, {S}, 1, {D // 2}], as cos")
            _is(name, table, ("float32",), table.shape)
    outputs = ((q.dtype, q.shape), (k.dtype, k.shape))
    inputs = (e.unit_stride(q), e.unit_stride(k), cos, sin, _or(scale_q, cos), _or(scale_k, cos))
    return e.run("rope", inputs, outputs, (sign, scale_q is not None, scale_k is not None), 2)


def rope_qk_backward(
    grad_q: Any, grad_k: Any, cos: Any, sin: Any, scale_q: Any = None, scale_k: Any = None
) -> tuple[Any, Any]:
    """The rotation back, with the same scales."""
    return rope_qk(grad_q, grad_k, cos, sin, scale_q, scale_k, -1.0)


def swiglu(gate: Any, up: Any) -> Any:
    """silu(gate) * up, in their dtype."""
    e = _floats(gate=gate, up=up)
    _same(gate=gate, up=up)
    return e.run("swiglu", (gate, up), ((gate.dtype, gate.shape),), (), 0)


def swiglu_backward(grad: Any, gate: Any, up: Any) -> tuple[Any, Any]:
    """(dgate, dup)."""
    e = _floats(grad=grad, gate=gate, up=up)
    _same(gate=gate, up=up, grad=grad)
    return e.run("swiglu_backward", (grad, gate, up), ((gate.dtype, gate.shape), (up.dtype, up.shape)), (), 0)


def gelu(x: Any) -> Any:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""
    return _floats(x=x).run("gelu", (x,), ((x.dtype, x.shape),), (), 0)


def gelu_backward(grad: Any, x: Any) -> Any:
    """dx."""
    e = _floats(grad=grad, x=x)
    _same(x=x, grad=grad)
    return e.run("gelu_backward", (grad, x), ((x.dtype, x.shape),), (), 0)


def device_ranges(key_ranges: KeyRanges) -> Any:
    """The form of what queries see that ``attention`` takes, as a MindSpore tensor."""
    from mindspore import Tensor

    return Tensor(np.ascontiguousarray(key_ranges.ranges, np.int32))


def attention(
    q: Any, k: Any, v: Any, ranges: Any, scale: float | None = None, out_f32: bool = False
) -> tuple[Any, Any]:
    """q [B, S, H, D], k and v [B, T, K, D], ranges int32 [B or 1, S, 2] (core.model.visibility.KeyRanges).

    Returns out [B, S, H, D] in the dtype of q (float32 with ``out_f32``) and the log-sum-exp [B, H, S] float32; zeros
    and -inf for a query that sees no key. ``scale`` of the scores: 1/sqrt(D) if not given.
    """
    e = _attends(q, k, v, ranges)
    B, S, H, D = q.shape
    outputs = ((e.dtypes["float32"] if out_f32 else q.dtype, q.shape), (e.dtypes["float32"], (B, H, S)))
    inputs = (*map(e.unit_stride, (q, k, v)), ranges)
    return e.run("attention", inputs, outputs, (D**-0.5 if scale is None else scale,), 3)


def attention_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    ranges: Any,
    out: Any,
    log_sum_exp: Any,
    scale: float | None = None,
    delta: Any = None,
    out_f32: bool = False,
) -> tuple[Any, Any, Any]:
    """dq, dk, dv in the dtypes of q, k and v (float32 with ``out_f32``).

    ``out`` and ``log_sum_exp`` may be those of an attention over more keys, of which these are a block, as in a ring;
    ``delta`` [B, H, S], rowsum(grad * out), saves its computation where several blocks share it; then ``out`` is unused
    """
    e = _attends(q, k, v, ranges)
    B, S, H, D = q.shape
    f32 = e.dtypes["float32"]
    _floats(grad=grad)
    _same_shape(q=q, grad=grad)
    _is("log_sum_exp", log_sum_exp, ("float32",), (B, H, S))
    if delta is None:
        delta = attention_delta(grad, out)
    _is("delta", delta, ("float32",), (B, H, S))
    outputs = [(f32 if out_f32 else x.dtype, x.shape) for x in (q, k, v)]
    inputs = (*map(e.unit_stride, (grad, q, k, v)), ranges, log_sum_exp, delta)
    return e.run("attention_backward", inputs, outputs, (D**-0.5 if scale is None else scale,), 4)


def attention_delta(grad: Any, out: Any) -> Any:
    """rowsum(grad * out) [B, H, S] float32 of two [B, S, H, D]."""
    e = _floats(grad=grad, out=out)
    _same_shape(grad=grad, out=out)
    B, S, H, _ = grad.shape
    outputs = ((e.dtypes["float32"], (B, H, S)),)
    return e.run("attention_delta", (e.unit_stride(grad), e.unit_stride(out)), outputs, (), 2)


def merge_blocks(out: Any, log_sum_exp: Any, more: Any, more_lse: Any) -> tuple[Any, Any]:
    """Attention over two sets of keys from attention over each: out [B, S, H, D], log_sum_exp [B, H, S], float32."""
    e = _floats(out=out)
    if len(out.shape) != 4:
        raise ValueError(f"out: shape {tuple(out.shape)}, needs [B, S, H, D]")
    B, S, H, _ = out.shape
    _is("out", out, ("float32",), out.shape)
    _is("more", more, ("float32",), out.shape)
    _is("log_sum_exp", log_sum_exp, ("float32",), (B, H, S))
    _is("more_lse", more_lse, ("float32",), (B, H, S))
    outputs = ((out.dtype, out.shape), (log_sum_exp.dtype, log_sum_exp.shape))
    return e.run("merge_blocks", (out, more, log_sum_exp, more_lse), outputs, (), 0)


def cross_entropy_forward(logits: Any, targets: Any, first: int, real: int) -> tuple[Any, Any]:
    """logits [N, C], the columns [first, first + C) of a vocabulary, of which ``real`` stand for a token.

    Returns (log_sum_exp [N] over the real columns, picked [N]: the target's logit, or 0 where it is not among them).
    """
    e = _loss(logits, targets, first, real)
    rows = ((e.dtypes["float32"], (logits.shape[0],)),) * 2
    return e.run("cross_entropy_forward", (logits, targets), rows, (first, real), 0)


def cross_entropy_backward(
    logits: Any,
    targets: Any,
    first: int,
    real: int,
    log_sum_exp: Any,
    factor: Any,
    z_loss: float = 0.0,
    in_place: bool = True,
) -> Any:
    """Gradient of factor [1] * (sum of losses + z_loss * lse^2); written over the logits unless told otherwise."""
    e = _loss(logits, targets, first, real)
    _is("log_sum_exp", log_sum_exp, ("float32",), (logits.shape[0],))
    _is("factor", factor, ("float32",), None)
    if in_place and e.unit_stride(logits) is not logits:
        raise ValueError("logits: not contiguous, and to be overwritten")
    inputs, scalars = (logits, targets, log_sum_exp, factor), (first, real, z_loss)
    if not in_place:
        return e.run("cross_entropy_backward", inputs, ((logits.dtype, logits.shape),), scalars, 0)
    e.run("cross_entropy_backward_in_place", inputs, (), scalars, 0)
    return logits


def embedding(table: Any, ids: Any) -> Any:
    """Rows of table [V, E] by ids of any shape; ids must lie in [0, V), which is not checked."""
    e = _floats(table=table)
    _is("ids", ids, INTEGER, None)
    return e.run("embedding", (table, ids), ((table.dtype, (*ids.shape, table.shape[-1])),), (), 0)


def embedding_backward(grad: Any, ids: Any, vocab_size: int) -> Any:
    """grad [..., E] summed by id into [V, E] float32, in the order of the rows; ids beyond V count nowhere."""
    e = _floats(grad=grad)
    _is("ids", ids, INTEGER, tuple(grad.shape[:-1]))
    shape = (vocab_size, grad.shape[-1])
    return e.run("embedding_backward", (grad, ids), ((e.dtypes["float32"], shape),), (), 0)


def add(x: Any, y: Any) -> Any:
    """x + y of one shape, in the dtype of x."""
    e = _floats(x=x, y=y)
    _same_shape(x=x, y=y)
    return e.run("add", (x, y), ((x.dtype, x.shape),), (), 0)


def add_bias(x: Any, bias: Any) -> Any:
    """x [..., E] with bias [E] added, in place; returns x."""
    e = _floats(x=x, bias=bias)
    _channels(x, bias=bias)
    e.run("add_bias", (x, bias), (), (), 0)
    return x


def column_sum(x: Any) -> Any:
    """Sum of x [..., E] over all rows, [E] float32."""
    e = _floats(x=x)
    return e.run("column_sum", (x,), ((e.dtypes["float32"], (x.shape[-1],)),), (), 0)


def square_sum(x: Any) -> Any:
    """Sum of the squares of all elements, float64 [1]; the same bits whatever the number of threads."""
    e = _floats(x=x)
    return e.run("square_sum", (x,), ((e.dtypes["float64"], (1,)),), (), 0)


def accumulate(into: Any, x: Any, first: int, add: bool) -> None:
    """into[first : first + size of x] = or += x, in place; ``into`` a float32 vector."""
    e = _floats(into=into, x=x)
    _is("into", into, ("float32",), None)
    size = _size(x)
    if first < 0 or first + size > _size(into):
        raise ValueError(f"first: elements {first} to {first + size} of a vector of {_size(into)}")
    e.run("accumulate", (into, x), (), (first, add), 0)


def matmul(a: Any, w: Any, bias: Any = None, turn_a: bool = False, turn_w: bool = False) -> Any:
    """a [m, k] times w [n, k] transposed, plus bias [n], all float32; ``turn_``: a is [k, m], w is [k, n]."""
    e = _floats(a=a, w=w, bias=bias)
    m, n = _product(a, w, "float32", turn_a, turn_w)
    if bias is not None:
        _is("bias", bias, ("float32",), (n,))
    return e.run("matmul", (a, w, _or(bias, w)), ((a.dtype, (m, n)),), (turn_a, turn_w, bias is not None), 0)


def matmul_bf16(a: Any, w: Any, out_dtype: Any, turn_a: bool = False, turn_w: bool = False) -> Any:
    """The same of bfloat16 operands, without a bias, summed in float32."""
    e = _floats(a=a, w=w)
    m, n = _product(a, w, "bfloat16", turn_a, turn_w)
    return e.run("matmul_bf16", (a, w), ((out_dtype, (m, n)),), (turn_a, turn_w), 0)


def _product(a: Any, w: Any, dtype: str, turn_a: bool, turn_w: bool) -> tuple[int, int]:
    for name, x in (("a", a), ("w", w)):
        _is(name, x, (dtype,), None)
        if len(x.shape) != 2:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs two axes")
    (m, k), (n, inner) = a.shape[:: -1 if turn_a else 1], w.shape[:: -1 if turn_w else 1]
    if k != inner:
        raise ValueError(f"w: inner length {inner} against {k} of a")
    return m, n


FEW = 32  # rows up to which linear_rows is faster than a product that copies the matrix into panels first


def linear_rows(x: Any, weight: Any, bias: Any = None, factors: Any = None) -> Any:
    """x [..., k] @ weight [m, k]^T + bias [m] in the dtype of x, summed in float32, the matrix read once: for few rows.

    ``weight`` has the dtype of x, or is int8 with a float32 factor for each output in ``factors`` [m].
    """
    return several_linear_rows(x, ((weight, bias, factors),))


def several_linear_rows(x: Any, matrices: Sequence[tuple[Any, Any, Any]]) -> Any:
    """linear_rows of one x with up to three (weight, bias, factors): a tuple, the result alone for one."""
    e = _floats(x=x)
    name, columns, leading = e.name_of(x), x.shape[-1], tuple(x.shape[:-1])
    inputs, outputs, scalars = [x], [], []
    for weight, bias, factors in matrices:
        count = weight.shape[0]
        _is("weight", weight, (name if factors is None else "int8",), (count, columns))
        if factors is not None:
            _is("factors", factors, ("float32",), (count,))
        if bias is not None:
            _is("bias", bias, FLOATING, (count,))
        inputs += (weight, _or(factors, x), _or(bias, x))
        outputs.append((x.dtype, (*leading, count)))
        scalars += (factors is not None, bias is not None)
    return e.run(_SEVERAL[len(matrices)], inputs, outputs, scalars, 0)


_SEVERAL = {1: "linear_rows", 2: "linear_rows_2", 3: "linear_rows_3"}


def dequantize(weight: Any, factors: Any, dtype: Any) -> Any:
    """weight int8 [m, k] times factors float32 [m], in ``dtype``."""
    e = engine_of(weight)
    _is("weight", weight, ("int8",), None)
    _is("factors", factors, ("float32",), tuple(weight.shape[:1]))
    return e.run("dequantize", (weight, factors), ((dtype, tuple(weight.shape)),), (), 0)


def paged_attention(
    q: Any,
    k: Any,
    v: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    starts: Any,
    lengths: Any,
    tables: Any,
    singles: int,
    scale: float | None = None,
) -> Any:
    """Stores k and v [1, N, K, D] in pages [P, size, K, D], in place; then kernels.reference.paged_attention of q
    [1, N, H, D].

    All of one dtype; slots [N], starts [R + 1], lengths [R], tables [R, M] int32; the first ``singles`` sequences have
    one query each. Slots and tables must lead to pages that there are, and no starts beyond N, which is not checked.
    """
    e = _floats(q=q, k=k, v=v, k_pages=k_pages, v_pages=v_pages)
    if len(q.shape) != 4 or q.shape[0] != 1 or len(k_pages.shape) != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}, needs [1, N, H, D], with pages [P, size, K, D]")
    (_, N, H, D), (_, _, K, _) = q.shape, k_pages.shape
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != (1, N, K, D):
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs {(1, N, K, D)}")
    if K == 0 or H % K:
        raise ValueError(f"k: {K} kv heads, which do not divide the {H} heads of q")
    _same_shape(k_pages=k_pages, v_pages=v_pages)
    for name, x in (("k", k), ("v", v), ("k_pages", k_pages), ("v_pages", v_pages)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: {e.name_of(x)}, needs the dtype of q, {e.name_of(q)}")
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        if e.unit_stride(x) is not x:
            raise ValueError(f"{name}: not contiguous, and to be written to")
    R = lengths.shape[0]
    for name, x, shape in (("slots", slots, (N,)), ("starts", starts, (R + 1,)), ("lengths", lengths, (R,))):
        _is(name, x, ("int32",), shape)
    _is("tables", tables, ("int32",), (R, tables.shape[-1]))
    if not 0 <= singles <= R:
        raise ValueError(f"singles: {singles} of {R} sequences")
    inputs = (*map(e.unit_stride, (q, k, v)), k_pages, v_pages, slots, starts, lengths, tables)
    return e.run("paged_attention", inputs, ((q.dtype, q.shape),), (D**-0.5 if scale is None else scale, singles), 3)


def store_rows(pages: Any, x: Any, slots: Any) -> None:
    """Rows x [N, K, D] into pages [P, size, K, D] of their dtype, in place: row i at slots[i] = page * size + place,
    int64 [N], which must lead to pages that there are; that is not checked."""
    e = _floats(x=x, pages=pages)
    if len(pages.shape) != 4 or tuple(x.shape[1:]) != tuple(pages.shape[2:]):
        raise ValueError(f"x: shape {tuple(x.shape)}, needs [N, K, D], with pages [P, size, K, D]")
    if pages.dtype != x.dtype:
        raise TypeError(f"pages: {e.name_of(pages)}, needs the dtype of x, {e.name_of(x)}")
    if e.unit_stride(pages) is not pages:
        raise ValueError("pages: not contiguous, and to be written to")
    _is("slots", slots, ("int64",), (x.shape[0],))
    e.run("store_rows", (e.unit_stride(x), pages, slots), (), (), 1)


def adamw(
    master: Any,
    grad: Any,
    m: Any,
    v: Any,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    grad_scale: float = 1.0,
    copy: Any = None,
    first: int = 0,
    grad_first: int = 0,
    count: int | None = None,
) -> None:
    """One update in place: ``count`` elements of the flat float32 master, m and v from ``first`` on.

    ``grad``: its elements from ``grad_first`` on; ``copy``: receives the new weights in its dtype. Formula:
    kernels.reference.adamw.
    """
    e = _floats(master=master, grad=grad, m=m, v=v, copy=copy)
    count = _size(grad) if count is None else count
    for name, x in (("master", master), ("m", m), ("v", v)):
        _is(name, x, ("float32",), tuple(master.shape))
        if first < 0 or first + count > _size(x):
            raise ValueError(f"{name}: elements {first} to {first + count} of {_size(x)}")
    if grad_first < 0 or grad_first + count > _size(grad):
        raise ValueError(f"grad: elements {grad_first} to {grad_first + count} of {_size(grad)}")
    if copy is not None and _size(copy) != count:
        raise ValueError(f"copy: {_size(copy)} elements for {count} new weights")
    correct = 1.0 / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5
    scalars = (
        first,
        lr,
        beta1,
        beta2,
        eps,
        1.0 - lr * decay,
        *correct,
        grad_scale,
        copy is not None,
        grad_first,
        count,
    )
    e.run("adamw", (master, m, v, grad, _or(copy, m)), (), scalars, 0)


def _or(x: Any, other: Any) -> Any:
    """What stands in the place of an argument that is not there; the kernel is told not to look."""
    return other if x is None else x


def _size(x: Any) -> int:
    size = 1
    for n in x.shape:
        size *= n
    return size


def _floats(**tensors: Any) -> Any:
    """The engine of these tensors, all floating point; None is no tensor."""
    engine = None
    for name, x in tensors.items():
        if x is None:
            continue
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(f"{name}: {type(x).__name__}, needs a tensor")
        if engine is None:
            engine = engine_of(x)
        if engine.name_of(x) not in FLOATING:
            raise TypeError(f"{name}: {engine.name_of(x)}, needs one of {', '.join(FLOATING)}")
    return engine


def _is(name: str, x: Any, dtypes: Sequence[str], shape: Sequence[int] | None) -> None:
    found = engine_of(x).name_of(x)
    if found not in dtypes:
        raise TypeError(f"{name}: {found}, needs {' or '.join(dtypes)}")
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(x.shape)}, needs {tuple(shape)}")


def _same_shape(**tensors: Any) -> None:
    (first, reference), *others = [(name, x) for name, x in tensors.items() if x is not None]
    for name, x in others:
        if tuple(x.shape) != tuple(reference.shape):
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs that of {first}, {tuple(reference.shape)}")


def _same(**tensors: Any) -> None:
    _same_shape(**tensors)
    (first, reference), *others = tensors.items()
    for name, x in others:
        if x.dtype != reference.dtype:
            raise TypeError(f"{name}: {x.dtype}, needs the dtype of {first}, {reference.dtype}")


def _channels(x: Any, **vectors: Any) -> None:
    if not x.shape:
        raise ValueError("x: a scalar, needs at least one axis")
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != tuple(x.shape[-1:]):
            raise ValueError(f"{name}: shape {tuple(vector.shape)}, needs {tuple(x.shape[-1:])}, the channels of x")


def _attends(q: Any, k: Any, v: Any, ranges: Any) -> Any:
    e = _floats(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs [B, length, heads, D]")
    (B, S, H, D), (_, T, K, _) = q.shape, k.shape
    if tuple(k.shape) != (B, T, K, D):
        raise ValueError(f"k: shape {tuple(k.shape)} beside q {tuple(q.shape)}; batch and head dim must be the same")
    _same(k=k, v=v)
    if K == 0 or H % K:
        raise ValueError(f"k: {K} kv heads, which do not divide the {H} heads of q")
    _is("ranges", ranges, ("int32",), None)
    if tuple(ranges.shape) not in ((B, S, 2), (1, S, 2)):
        raise ValueError(f"ranges: shape {tuple(ranges.shape)}, needs [{B} or 1, {S}, 2]")
    return e


def _loss(logits: Any, targets: Any, first: int, real: int) -> Any:
    e = _floats(logits=logits)
    if len(logits.shape) != 2:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, needs [N, C]")
    _is("targets", targets, INTEGER, (logits.shape[0],))
    if not 0 <= real <= logits.shape[1]:
        raise ValueError(f"real: {real} columns of {logits.shape[1]} stand for a token")
    if first < 0:
        raise ValueError(f"first: {first}, needs the first column's place in the vocabulary")
    return e
