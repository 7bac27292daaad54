"""C++ operators on the CPU, with argument checks: the same functions for MindSpore tensors and numpy arrays.

Functions without autograd (kernels/mindspore/ops.py records gradients). Dtypes are the framework's. Statistics and sums
are float32 for all inputs. Every function raises TypeError or ValueError naming the argument, its value and what it
must be; the kernels do not check again. B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden,
V vocabulary, N rows, C columns of a vocabulary shard, P pages, R sequences, M pages of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.cpu.checks import (
    FLOATING,
    INTEGER,
    attends,
    channels,
    either,
    floats,
    loss,
    need,
    product,
    same,
    same_shape,
    size_of,
    written,
)
from telechat_twins.kernels.cpu.engine import Array, DType, Spec, engine_of
from telechat_twins.kernels.cpu.pointwise import add as add
from telechat_twins.kernels.cpu.pointwise import add_bias as add_bias
from telechat_twins.kernels.cpu.pointwise import cast as cast


def rms_norm(x: Array, weight: Array, eps: float, out_dtype: DType, mask: Array | None = None) -> tuple[Array, Array]:
    """x [..., E], weight [E], mask [E] or None -> (normed [..., E] in ``out_dtype``, rstd [...] float32)."""
    e = floats(x=x, weight=weight, mask=mask)
    channels(x, weight=weight, mask=mask)
    outputs = ((out_dtype, x.shape), (e.dtypes["float32"], x.shape[:-1]))
    return e.run("rms_norm", (x, weight, either(mask, weight)), outputs, (eps, mask is not None), 0)


def rms_norm_backward(
    grad: Array, x: Array, weight: Array, rstd: Array, mask: Array | None = None
) -> tuple[Array, Array]:
    """(dx in the dtype of x, dweight [E] float32)."""
    return _rms_backward(grad, None, x, weight, rstd, mask)


def add_rms_norm(
    x: Array, residual: Array, weight: Array, eps: float, out_dtype: DType, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """(normed in ``out_dtype``, x + residual in the dtype of ``residual``, rstd)."""
    e = floats(x=x, residual=residual, weight=weight, mask=mask)
    same_shape(x=x, residual=residual)
    channels(x, weight=weight, mask=mask)
    outputs = ((out_dtype, x.shape), (residual.dtype, x.shape), (e.dtypes["float32"], x.shape[:-1]))
    return e.run("add_rms_norm", (x, residual, weight, either(mask, weight)), outputs, (eps, mask is not None), 0)


def add_rms_norm_backward(
    grad: Array, grad_stream: Array, stream: Array, weight: Array, rstd: Array, mask: Array | None = None
) -> tuple[Array, Array]:
    """(dstream, the gradient of both x and residual; dweight)."""
    return _rms_backward(grad, grad_stream, stream, weight, rstd, mask)


def _rms_backward(
    grad: Array, grad_stream: Array | None, x: Array, weight: Array, rstd: Array, mask: Array | None
) -> tuple[Array, Array]:
    e = floats(grad=grad, grad_stream=grad_stream, x=x, weight=weight, mask=mask)
    same_shape(x=x, grad=grad, grad_stream=grad_stream)
    channels(x, weight=weight, mask=mask)
    need("rstd", rstd, ("float32",), x.shape[:-1])
    if grad_stream is not None and grad_stream.dtype != x.dtype:
        raise TypeError(f"grad_stream: {grad_stream.dtype}, needs the dtype of the stream, {x.dtype}")
    outputs = ((x.dtype, x.shape), (e.dtypes["float32"], weight.shape))
    inputs = (grad, x, weight, rstd, either(grad_stream, x), either(mask, weight))
    return e.run("rms_norm_backward", inputs, outputs, (grad_stream is not None, mask is not None), 0)


def layer_norm(
    x: Array, weight: Array, bias: Array, eps: float, out_dtype: DType, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """(normed in ``out_dtype``, mean [...], rstd [...])."""
    e = floats(x=x, weight=weight, bias=bias, mask=mask)
    channels(x, weight=weight, bias=bias, mask=mask)
    f32 = e.dtypes["float32"]
    outputs = ((out_dtype, x.shape), (f32, x.shape[:-1]), (f32, x.shape[:-1]))
    return e.run("layer_norm", (x, weight, bias, either(mask, weight)), outputs, (eps, mask is not None), 0)


def layer_norm_backward(
    grad: Array, x: Array, weight: Array, mean: Array, rstd: Array, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """(dx in the dtype of x, dweight, dbias [E] float32)."""
    e = floats(grad=grad, x=x, weight=weight, mask=mask)
    same_shape(x=x, grad=grad)
    channels(x, weight=weight, mask=mask)
    need("mean", mean, ("float32",), x.shape[:-1])
    need("rstd", rstd, ("float32",), x.shape[:-1])
    f32 = e.dtypes["float32"]
    outputs = ((x.dtype, x.shape), (f32, weight.shape), (f32, weight.shape))
    return e.run(
        "layer_norm_backward", (grad, x, weight, mean, rstd, either(mask, weight)), outputs, (mask is not None,), 0
    )


def rope_qk(
    q: Array,
    k: Array,
    cos: Array,
    sin: Array,
    scale_q: Array | None = None,
    scale_k: Array | None = None,
    sign: float = 1.0,
) -> tuple[Array, Array]:
    """Rotary embedding of q [B, S, H, D] and k [B, S, K, D] by cos, sin [B or 1, S, 1, D/2] float32, each in its dtype.

    ``scale_q``, ``scale_k``, shaped like cos, multiply both halves (xPos). ``sign`` -1: the inverse rotation.
    """
    e = floats(q=q, k=k)
    for name, x in (("q", q), ("k", k)):
        if len(x.shape) != 4 or x.shape[-1] % 2:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs [B, S, heads, D] with an even D")
    if (k.shape[0], k.shape[1], k.shape[3]) != (q.shape[0], q.shape[1], q.shape[3]):
        raise ValueError(f"k: shape {tuple(k.shape)}, needs that of q, {tuple(q.shape)}; only the heads may differ")
    B, S, _, D = q.shape
    for name, table in (("cos", cos), ("sin", sin), ("scale_q", scale_q), ("scale_k", scale_k)):
        if table is not None:
            if tuple(table.shape) not in ((B, S, 1, D // 2), (1, S, 1, D // 2)) or table.shape[0] != cos.shape[0]:
                raise ValueError(f"{name}: shape {tuple(table.shape)}, needs [{B} or 1, {S}, 1, {D // 2}], as cos")
            need(name, table, ("float32",), table.shape)
    outputs = ((q.dtype, q.shape), (k.dtype, k.shape))
    inputs = (e.unit_stride(q), e.unit_stride(k), cos, sin, either(scale_q, cos), either(scale_k, cos))
    return e.run("rope", inputs, outputs, (sign, scale_q is not None, scale_k is not None), 2)


def rope_qk_backward(
    grad_q: Array, grad_k: Array, cos: Array, sin: Array, scale_q: Array | None = None, scale_k: Array | None = None
) -> tuple[Array, Array]:
    """(dq, dk): the inverse rotation, with the same scales."""
    return rope_qk(grad_q, grad_k, cos, sin, scale_q, scale_k, -1.0)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, both of one dtype."""
    e = floats(gate=gate, up=up)
    same(gate=gate, up=up)
    return e.run("swiglu", (gate, up), ((gate.dtype, gate.shape),), (), 0)


def swiglu_backward(grad: Array, gate: Array, up: Array, in_place: bool = False) -> tuple[Array, Array]:
    """(dgate, dup), which overwrite gate and up if ``in_place``. ValueError for one that is not contiguous then."""
    e = floats(grad=grad, gate=gate, up=up)
    same(gate=gate, up=up, grad=grad)
    if in_place:
        written(gate=gate, up=up)
        e.run("swiglu_backward_in_place", (grad, gate, up), (), (), 0)
        return gate, up
    return e.run("swiglu_backward", (grad, gate, up), ((gate.dtype, gate.shape), (up.dtype, up.shape)), (), 0)


def gelu(x: Array) -> Array:
    """GELU, tanh form: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""
    return floats(x=x).run("gelu", (x,), ((x.dtype, x.shape),), (), 0)


def gelu_backward(grad: Array, x: Array) -> Array:
    """dx."""
    e = floats(grad=grad, x=x)
    same(x=x, grad=grad)
    return e.run("gelu_backward", (grad, x), ((x.dtype, x.shape),), (), 0)


def device_ranges(key_ranges: KeyRanges) -> Array:
    """The key ranges as a MindSpore tensor, in the form that ``attention`` takes."""
    from mindspore import Tensor

    return Tensor(np.ascontiguousarray(key_ranges.ranges, np.int32))


def attention(
    q: Array, k: Array, v: Array, ranges: Array, scale: float | None = None, out_f32: bool = False
) -> tuple[Array, Array]:
    """Softmax attention: q [B, S, H, D], k and v [B, T, K, D], ranges int32 [B or 1, S, 2] (KeyRanges).

    Returns out [B, S, H, D] in the dtype of q (float32 with ``out_f32``) and log_sum_exp [B, H, S] float32; zeros and
    -inf for a query without visible keys. ``scale`` of the scores defaults to 1/sqrt(D).
    """
    e = attends(q, k, v, ranges)
    B, S, H, D = q.shape
    outputs = ((e.dtypes["float32"] if out_f32 else q.dtype, q.shape), (e.dtypes["float32"], (B, H, S)))
    inputs = (*map(e.unit_stride, (q, k, v)), ranges)
    return e.run("attention", inputs, outputs, (D**-0.5 if scale is None else scale,), 3)


def attention_backward(
    grad: Array,
    q: Array,
    k: Array,
    v: Array,
    ranges: Array,
    out: Array,
    log_sum_exp: Array,
    scale: float | None = None,
    delta: Array | None = None,
    out_f32: bool = False,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv in the dtypes of q, k and v (float32 with ``out_f32``).

    ``out`` and ``log_sum_exp`` [B, H, S] may be those of attention over more keys, of which these are a block (a ring).
    ``delta`` [B, H, S] = rowsum(grad * out) avoids its recomputation for each block; ``out`` is then unused.
    """
    e = attends(q, k, v, ranges)
    B, S, H, D = q.shape
    f32 = e.dtypes["float32"]
    floats(grad=grad)
    same_shape(q=q, grad=grad)
    need("log_sum_exp", log_sum_exp, ("float32",), (B, H, S))
    if delta is None:
        delta = attention_delta(grad, out)
    need("delta", delta, ("float32",), (B, H, S))
    outputs = [(f32 if out_f32 else x.dtype, x.shape) for x in (q, k, v)]
    inputs = (*map(e.unit_stride, (grad, q, k, v)), ranges, log_sum_exp, delta)
    return e.run("attention_backward", inputs, outputs, (D**-0.5 if scale is None else scale,), 4)


def attention_delta(grad: Array, out: Array) -> Array:
    """rowsum(grad * out) [B, H, S] float32 of two [B, S, H, D]."""
    e = floats(grad=grad, out=out)
    same_shape(grad=grad, out=out)
    B, S, H, _ = grad.shape
    outputs = ((e.dtypes["float32"], (B, H, S)),)
    return e.run("attention_delta", (e.unit_stride(grad), e.unit_stride(out)), outputs, (), 2)


def merge_blocks(out: Array, log_sum_exp: Array, more: Array, more_lse: Array) -> tuple[Array, Array]:
    """Attention over the union of two sets of keys: out, more [B, S, H, D], log-sum-exps [B, H, S], all float32."""
    e = floats(out=out)
    if len(out.shape) != 4:
        raise ValueError(f"out: shape {tuple(out.shape)}, needs [B, S, H, D]")
    B, S, H, _ = out.shape
    need("out", out, ("float32",), out.shape)
    need("more", more, ("float32",), out.shape)
    need("log_sum_exp", log_sum_exp, ("float32",), (B, H, S))
    need("more_lse", more_lse, ("float32",), (B, H, S))
    outputs = ((out.dtype, out.shape), (log_sum_exp.dtype, log_sum_exp.shape))
    return e.run("merge_blocks", (out, more, log_sum_exp, more_lse), outputs, (), 0)


def cross_entropy_forward(logits: Array, targets: Array, first: int, real: int) -> tuple[Array, Array]:
    """Statistics of a vocabulary shard: logits [N, C] of the columns [first, first + C), of which ``real`` are tokens.

    Returns (log_sum_exp over the real columns; the target's logit, 0 where another rank has it or it is IGNORE), [N].
    """
    e = loss(logits, targets, first, real)
    rows = ((e.dtypes["float32"], (logits.shape[0],)),) * 2
    return e.run("cross_entropy_forward", (logits, targets), rows, (first, real), 0)


def cross_entropy_backward(
    logits: Array,
    targets: Array,
    first: int,
    real: int,
    log_sum_exp: Array,
    factor: Array,
    z_loss: float = 0.0,
    in_place: bool = True,
) -> Array:
    """d (factor [1] * sum of (losses + z_loss * log_sum_exp^2)) / d logits; overwrites the logits if ``in_place``."""
    e = loss(logits, targets, first, real)
    need("log_sum_exp", log_sum_exp, ("float32",), (logits.shape[0],))
    need("factor", factor, ("float32",), None)
    inputs, scalars = (logits, targets, log_sum_exp, factor), (first, real, z_loss)
    if not in_place:
        return e.run("cross_entropy_backward", inputs, ((logits.dtype, logits.shape),), scalars, 0)
    written(logits=logits)
    e.run("cross_entropy_backward_in_place", inputs, (), scalars, 0)
    return logits


def head_gradient(dlogits: Array, x: Array, total: Array | None) -> Array:
    """dlogits [N, V]^T x [N, E] in float32, added to ``total`` [V, E] in place unless that is None; operands of one
    dtype, float32 or bfloat16. ValueError for a total that is not contiguous."""
    f32 = floats(dlogits=dlogits, x=x, total=total).dtypes["float32"]
    if dlogits.dtype != f32:
        more = matmul_bf16(dlogits, x, f32, turn_a=True, turn_w=True)
    elif total is None:
        more = matmul(dlogits, x, turn_a=True, turn_w=True)
    if total is None:
        return more
    need("total", total, ("float32",), (dlogits.shape[1], x.shape[1]))
    written(total=total)
    if dlogits.dtype != f32:
        accumulate(total, more, 0, True)
        return total
    product(dlogits, x, "float32", True, True)
    engine_of(total).run("head_gradient", (total, dlogits, x), (), (), 0)
    return total


def embedding(table: Array, ids: Array) -> Array:
    """Rows of table [V, E] by ids [...]; ids in [0, V), which is not checked."""
    e = floats(table=table)
    need("ids", ids, INTEGER, None)
    return e.run("embedding", (table, ids), ((table.dtype, (*ids.shape, table.shape[-1])),), (), 0)


def embedding_backward(grad: Array, ids: Array, vocab_size: int, dtype: DType | None = None) -> Array:
    """grad [..., E] summed by id into [V, E], in float32 and the order of the rows; ids outside [0, V) are ignored.
    The sums are rounded to ``dtype``, default float32."""
    e = floats(grad=grad)
    need("ids", ids, INTEGER, tuple(grad.shape[:-1]))
    shape = (vocab_size, grad.shape[-1])
    return e.run("embedding_backward", (grad, ids), ((dtype or e.dtypes["float32"], shape),), (), 0)


def column_sum(x: Array) -> Array:
    """Sum of x [..., E] over all rows, [E] float32."""
    e = floats(x=x)
    return e.run("column_sum", (x,), ((e.dtypes["float32"], (x.shape[-1],)),), (), 0)


def square_sum(x: Array) -> Array:
    """Sum of the squares of all elements, float64 [1]; its bits do not depend on the number of threads."""
    e = floats(x=x)
    return e.run("square_sum", (x,), ((e.dtypes["float64"], (1,)),), (), 0)


def accumulate(into: Array, x: Array, first: int, add: bool) -> None:
    """into[first : first + size of x] = or += x, in place; ``into`` a float32 vector."""
    e = floats(into=into, x=x)
    need("into", into, ("float32",), None)
    size = size_of(x)
    if first < 0 or first + size > size_of(into):
        raise ValueError(f"first: elements {first} to {first + size}, needs a range inside the {size_of(into)} of into")
    e.run("accumulate", (into, x), (), (first, add), 0)


def matmul(a: Array, w: Array, bias: Array | None = None, turn_a: bool = False, turn_w: bool = False) -> Array:
    """a [m, k] @ w [n, k]^T + bias [n], all float32; with ``turn_a`` a is [k, m], with ``turn_w`` w is [k, n]."""
    e = floats(a=a, w=w, bias=bias)
    m, n = product(a, w, "float32", turn_a, turn_w)
    if bias is not None:
        need("bias", bias, ("float32",), (n,))
    return e.run("matmul", (a, w, either(bias, w)), ((a.dtype, (m, n)),), (turn_a, turn_w, bias is not None), 0)


def matmul_bf16(a: Array, w: Array, out_dtype: DType, turn_a: bool = False, turn_w: bool = False) -> Array:
    """``matmul`` of bfloat16 operands without a bias, accumulated in float32."""
    e = floats(a=a, w=w)
    m, n = product(a, w, "bfloat16", turn_a, turn_w)
    return e.run("matmul_bf16", (a, w), ((out_dtype, (m, n)),), (turn_a, turn_w), 0)


FEW = 32  # rows up to which linear_rows is faster than a product that packs the matrix into panels


def linear_rows(x: Array, weight: Array, bias: Array | None = None, factors: Array | None = None) -> Array:
    """x [..., k] @ weight [m, k]^T + bias [m] in the dtype of x, accumulated in float32, for few rows.

    ``weight``, read once, has the dtype of x, or is int8 with a float32 factor per output in ``factors`` [m]; x is then
    rounded to 8 bits (kernels.reference.quantized_rows), and any number of rows is served well.
    """
    return several_linear_rows(x, ((weight, bias, factors),))


def several_linear_rows(x: Array, matrices: Sequence[tuple[Array, Array | None, Array | None]]) -> Array:
    """``linear_rows`` of one x with up to three (weight, bias, factors): a tuple of results, or the only result."""
    e = floats(x=x)
    name, columns, leading = e.name_of(x), x.shape[-1], tuple(x.shape[:-1])
    inputs: list[Array] = [x]
    outputs: list[Spec] = []
    scalars: list[float] = []
    for weight, bias, factors in matrices:
        count = weight.shape[0]
        need("weight", weight, (name if factors is None else "int8",), (count, columns))
        if factors is not None:
            need("factors", factors, ("float32",), (count,))
        if bias is not None:
            need("bias", bias, FLOATING, (count,))
        inputs += (weight, either(factors, x), either(bias, x))
        outputs.append((x.dtype, (*leading, count)))
        scalars += (factors is not None, bias is not None)
    return e.run(_SEVERAL[len(matrices)], inputs, outputs, scalars, 0)


_SEVERAL = {1: "linear_rows", 2: "linear_rows_2", 3: "linear_rows_3"}


def dequantize(weight: Array, factors: Array, dtype: DType) -> Array:
    """weight int8 [m, k] * factors float32 [m], in ``dtype``."""
    e = engine_of(weight)
    need("weight", weight, ("int8",), None)
    need("factors", factors, ("float32",), tuple(weight.shape[:1]))
    return e.run("dequantize", (weight, factors), ((dtype, tuple(weight.shape)),), (), 0)


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    k_pages: Array,
    v_pages: Array,
    slots: Array,
    starts: Array,
    lengths: Array,
    tables: Array,
    singles: int,
    scale: float | None = None,
) -> Array:
    """kernels.reference.paged_attention: writes k and v [1, N, K, D] to pages [P, size, K, D] in place, then attention
    of q [1, N, H, D].

    All of one dtype; slots [N], starts [R + 1], lengths [R], tables [R, M] int32; the first ``singles`` sequences have
    one query each. That slots and tables are inside the pages and starts inside N is not checked.
    """
    e = floats(q=q, k=k, v=v, k_pages=k_pages, v_pages=v_pages)
    if len(q.shape) != 4 or q.shape[0] != 1 or len(k_pages.shape) != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}, needs [1, N, H, D], with pages [P, size, K, D]")
    (_, N, H, D), (_, _, K, _) = q.shape, k_pages.shape
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != (1, N, K, D):
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs {(1, N, K, D)}")
    if K == 0 or H % K:
        raise ValueError(f"k: {K} kv heads, needs a divisor of the {H} heads of q")
    same_shape(k_pages=k_pages, v_pages=v_pages)
    for name, x in (("k", k), ("v", v), ("k_pages", k_pages), ("v_pages", v_pages)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: {e.name_of(x)}, needs the dtype of q, {e.name_of(q)}")
    written(k_pages=k_pages, v_pages=v_pages)
    R = lengths.shape[0]
    for name, x, shape in (("slots", slots, (N,)), ("starts", starts, (R + 1,)), ("lengths", lengths, (R,))):
        need(name, x, ("int32",), shape)
    need("tables", tables, ("int32",), (R, tables.shape[-1]))
    if not 0 <= singles <= R:
        raise ValueError(f"singles: {singles}, needs 0 to {R}, the number of sequences")
    inputs = (*map(e.unit_stride, (q, k, v)), k_pages, v_pages, slots, starts, lengths, tables)
    return e.run("paged_attention", inputs, ((q.dtype, q.shape),), (D**-0.5 if scale is None else scale, singles), 3)


def store_rows(pages: Array, x: Array, slots: Array) -> None:
    """Write rows x [N, K, D] to pages [P, size, K, D] of their dtype, in place.

    Row i goes to slots[i] = page * size + place, int64 [N]. That slots are inside the pages is not checked.
    """
    e = floats(x=x, pages=pages)
    if len(pages.shape) != 4 or tuple(x.shape[1:]) != tuple(pages.shape[2:]):
        raise ValueError(f"x: shape {tuple(x.shape)}, needs [N, K, D], with pages [P, size, K, D]")
    if pages.dtype != x.dtype:
        raise TypeError(f"pages: {e.name_of(pages)}, needs the dtype of x, {e.name_of(x)}")
    written(pages=pages)
    need("slots", slots, ("int64",), (x.shape[0],))
    e.run("store_rows", (e.unit_stride(x), pages, slots), (), (), 1)


def adamw(
    master: Array,
    grad: Array,
    m: Array,
    v: Array,
    step: AdamWStep,
    copy: Array | None = None,
    first: int = 0,
    grad_first: int = 0,
    count: int | None = None,
) -> None:
    """kernels.reference.adamw of ``count`` elements of the flat float32 master, m and v from ``first`` on, in place.

    The gradients are ``count`` elements of ``grad`` from ``grad_first`` on; ``copy``, of ``count`` elements, receives
    the new master, rounded to the dtype of ``copy``. ``count`` defaults to the size of ``grad``.
    """
    e = floats(master=master, grad=grad, m=m, v=v, copy=copy)
    count = size_of(grad) if count is None else count
    for name, x in (("master", master), ("m", m), ("v", v)):
        need(name, x, ("float32",), tuple(master.shape))
        if first < 0 or first + count > size_of(x):
            raise ValueError(f"{name}: elements {first} to {first + count}, needs a range inside its {size_of(x)}")
    if grad_first < 0 or grad_first + count > size_of(grad):
        found = f"elements {grad_first} to {grad_first + count}"
        raise ValueError(f"grad: {found}, needs a range inside its {size_of(grad)}")
    if copy is not None and size_of(copy) != count:
        raise ValueError(f"copy: {size_of(copy)} elements, needs {count}")
    scalars = (first, *step.scalars(), copy is not None, grad_first, count)
    e.run("adamw", (master, m, v, grad, either(copy, m)), (), scalars, 0)
