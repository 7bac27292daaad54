"""The C++ operators on numpy arrays against their float64 definitions: all checks of the tests and of ``make asan``.

The checks of attention are in cpu_attention_checks.py, the limits in cpu_kernel_limits.py.
"""

# ruff: noqa: B023  (a definition is evaluated by ``judged`` before its loop goes on)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.cpu import ops
from telechat_twins.kernels.cpu.products import adapted, adapted_backward, matmul_add
from tests.support.cpu_attention_checks import attention, pages, ring, stray_nan
from tests.support.cpu_kernel_limits import F32, HALF, UNIT, UNITS, WIDTHS, Finding, judged


def norms(rng: np.random.Generator, dtype: np.dtype = F32) -> Iterator[Finding]:
    for width in WIDTHS:
        for masked in (False, True):
            x, residual, grad, grad_stream = (rng.normal(size=(3, 5, width)).astype(dtype) for _ in range(4))
            weight, bias = (rng.uniform(0.5, 1.5, width).astype(dtype) for _ in range(2))
            mask = rng.choice([0.0, 0.3, 1.0], width).astype(np.float32) if masked else None
            if masked:
                mask[0] = 1.0
            name, eps = f"{width}{' masked' if masked else ''} {dtype}", 1e-5

            def wide(kind: type, *arrays: np.ndarray | None) -> list[Any]:
                return [None if a is None else a.astype(kind) for a in arrays]

            def rms(
                kind: type, which: int, x: Any = x, weight: Any = weight, grad: Any = grad, mask: Any = mask
            ) -> Any:
                x, weight, grad, mask = wide(kind, x, weight, grad, mask)
                if which == 0:
                    return reference.rms_norm(x, weight, kind(eps), mask)
                return reference.rms_norm_backward(grad, x, weight, kind(eps), mask)[which - 1]

            out, rstd = ops.rms_norm(x, weight, eps, dtype, mask)
            dx, dweight = ops.rms_norm_backward(grad, x, weight, rstd, mask)
            yield judged(f"rms_norm {name}", out, lambda kind: rms(kind, 0), dtype)
            yield judged(f"rms_norm dx {name}", dx, lambda kind: rms(kind, 1), dtype)
            yield judged(f"rms_norm dweight {name}", dweight, lambda kind: rms(kind, 2))

            # The stream as it was rounded is what the norm and its backward are of.
            out, stream, rstd = ops.add_rms_norm(x, residual, weight, eps, dtype, mask)
            yield judged(f"stream {name}", stream, lambda kind: wide(kind, x)[0] + wide(kind, residual)[0], dtype)
            yield judged(f"add_rms_norm {name}", out, lambda kind: rms(kind, 0, stream), dtype)
            dx, dweight = ops.add_rms_norm_backward(grad, grad_stream, stream, weight, rstd, mask)
            total = lambda kind: rms(kind, 1, stream) + wide(kind, grad_stream)[0]  # noqa: E731
            yield judged(f"add_rms_norm dx {name}", dx, total, dtype)
            yield judged(f"add_rms_norm dweight {name}", dweight, lambda kind: rms(kind, 2, stream))

            if width == 1:
                continue  # one channel minus its mean is all cancellation

            def layer(kind: type, which: int) -> Any:
                x_, weight_, bias_, grad_, mask_ = wide(kind, x, weight, bias, grad, mask)
                if which == 0:
                    return reference.layer_norm(x_, weight_, bias_, kind(eps), mask_)
                return reference.layer_norm_backward(grad_, x_, weight_, kind(eps), mask_)[which - 1]

            out, mean, rstd = ops.layer_norm(x, weight, bias, eps, dtype, mask)
            yield judged(f"layer_norm {name}", out, lambda kind: layer(kind, 0), dtype)
            for i, d in enumerate(ops.layer_norm_backward(grad, x, weight, mean, rstd, mask)):
                yield judged(
                    f"layer_norm d{i} {name}", d, lambda kind, i=i: layer(kind, i + 1), dtype if i == 0 else F32
                )


def levels(rng: np.random.Generator) -> Iterator[Finding]:
    """What the single passes of layer_norm and cross-entropy assume of a row, and do again where it does not hold."""
    for name, first, rest in (("beginning far off", 1e3, 0.0), ("mean far from zero", 1e3, 1e3), ("one far off", 0, 0)):
        x = rng.normal(size=(5, 700)) + rest
        x[:, :16] += first - rest
        x[:, 300] += 1e4 if name.startswith("one") else 0
        x, ones = x.astype(np.float32), np.ones(700, np.float32)

        def normed(kind: type) -> Any:
            weight = ones.astype(kind)
            return reference.layer_norm(x.astype(kind), weight, 0 * weight, kind(1e-5))

        yield judged(f"layer_norm, {name}", ops.layer_norm(x, ones, 0 * ones, 1e-5, F32)[0], normed)
    rising = np.linspace(-300, 300, 5000) + rng.normal(size=(3, 5000))
    for name, logits in (("rising", rising), ("falling", rising[:, ::-1]), ("nothing at first", np.abs(rising) - 400)):
        logits = logits.astype(np.float32)
        if name == "nothing at first":
            logits[:, :1100] = -np.inf
        targets = np.full(3, 4000, np.int32)
        shard = lambda kind: reference.cross_entropy_shard(logits.astype(kind), targets, 0, 5000)[0]  # noqa: E731
        yield judged(f"log_sum, {name}", ops.cross_entropy_forward(logits, targets, 0, 5000)[0], shard)


def far(rng: np.random.Generator, dtype: np.dtype = F32) -> Iterator[Finding]:
    """Outputs larger than the caches are written past them, in vectors that begin a line: the same bits as in parts,
    wherever the rows lie in memory."""
    rows, width = 2100 * 4 // dtype.itemsize, 1009
    x, y, z = (rng.normal(size=(rows, width)).astype(dtype) for _ in range(3))
    for shift in (0, 1, 3):  # inputs that do not lie as the output does
        room = np.zeros(x.size + shift, dtype)
        room[shift:] = x.ravel()
        x = room[shift:].reshape(x.shape)
        weight, mask = rng.uniform(0.5, 1.5, width).astype(dtype), rng.choice([0.3, 1.0], width).astype(np.float32)
        targets, factor = rng.integers(0, width, rows).astype(np.int32), np.full(1, 0.25, np.float32)
        lse, table = np.full(rows, 8.0, np.float32), rng.normal(size=(50, width)).astype(dtype)
        ones = np.ones(rows, np.float32)
        calls: dict[str, Callable[[slice], Any]] = {
            "rms_norm": lambda at: ops.rms_norm(x[at], weight, 1e-5, dtype, mask)[0],
            "add_rms_norm": lambda at: np.stack(ops.add_rms_norm(x[at], y[at], weight, 1e-5, dtype)[:2], 1),
            "rms_norm dx": lambda at: ops.rms_norm_backward(y[at], x[at], weight, ones[at])[0],
            "layer_norm": lambda at: ops.layer_norm(x[at], weight, weight, 1e-5, dtype)[0],
            "layer_norm dx": lambda at: ops.layer_norm_backward(y[at], x[at], weight, ones[at], ones[at])[0],
            "swiglu": lambda at: ops.swiglu(x[at], y[at]),
            "swiglu backward": lambda at: np.stack(ops.swiglu_backward(z[at], x[at], y[at]), 1),
            "swiglu backward in place": lambda at: np.stack(
                ops.swiglu_backward(z[at], x[at].copy(), y[at].copy(), in_place=True), 1
            ),
            "gelu": lambda at: ops.gelu(x[at]),
            "gelu backward": lambda at: ops.gelu_backward(y[at], x[at]),
            "add": lambda at: ops.add(x[at], y[at]),
            "dlogits": lambda at: ops.cross_entropy_backward(
                x[at], targets[at], 0, width - 20, lse[at], factor, 1e-3, in_place=False
            ),
            "embedding": lambda at: ops.embedding(table, targets[at] % 50),
        }
        for name, call in calls.items():
            whole = call(slice(0, rows))
            parts = np.concatenate([call(slice(i, i + 100)) for i in range(0, rows, 100)])
            wrong = int((whole.view(np.uint8) != parts.view(np.uint8)).sum())
            yield f"{name}: bytes of {dtype} that differ, inputs {shift} elements on", float(wrong), 0.0
    ids = rng.integers(0, 2500, 400).astype(np.int32)
    got = ops.embedding_backward(x[:400], ids, 2500)
    expected = reference.embedding_backward(x[:400].astype(np.float64), ids, 2500)
    yield "embedding_backward", relative_frobenius(got, expected), UNITS * UNIT[F32]
    out, lse = (rng.normal(size=(2, 100, 107, 101)).astype(np.float32) for _ in "ab"), rng.normal(size=(4, 107, 100))
    (a, b), (la, lb) = out, lse.astype(np.float32).reshape(2, 2, 107, 100)
    merged, joint = ops.merge_blocks(a, la, b, lb)
    weight = np.exp(la.astype(np.float64) - np.logaddexp(la, lb, dtype=np.float64)).transpose(0, 2, 1)[..., None]
    yield "merged", relative_frobenius(merged, weight * a + (1 - weight) * b), UNITS * UNIT[F32]
    yield "merged lse", relative_frobenius(joint, np.logaddexp(la, lb, dtype=np.float64)), UNITS * UNIT[F32]


def pointwise(rng: np.random.Generator, dtype: np.dtype = F32) -> Iterator[Finding]:
    for width in WIDTHS:
        gate, up, grad = (s * rng.normal(size=(2, 3, width)) for s in (5.0, 1.0, 1.0))
        gate.flat[:3] = (-1e4, 1e4, 0.0)
        gate, up, grad = (a.astype(dtype) for a in (gate, up, grad))

        def define(kind: type, which: int) -> Any:
            g, u, d = (a.astype(kind) for a in (gate, up, grad))
            return (reference.swiglu(g, u), *reference.swiglu_backward(d, g, u))[which]

        for i, got in enumerate((ops.swiglu(gate, up), *ops.swiglu_backward(grad, gate, up))):
            yield judged(f"swiglu {i} {width} {dtype}", got, lambda kind, i=i: define(kind, i), dtype)
        x = np.clip(gate.astype(np.float64), -30, 30).astype(dtype)  # the definition's x^3 overflows float16 beyond
        yield judged(f"gelu {width} {dtype}", ops.gelu(x), lambda kind: reference.gelu(x.astype(kind)), dtype)
        backward = lambda kind: reference.gelu_backward(grad.astype(kind), x.astype(kind))  # noqa: E731
        yield judged(f"gelu backward {width} {dtype}", ops.gelu_backward(grad, x), backward, dtype)
        rows = rng.normal(size=(7, width)).astype(dtype)
        yield judged(f"column_sum {width}", ops.column_sum(rows), lambda kind: rows.astype(kind).sum(0))
        yield judged(
            f"square_sum {width}",
            ops.square_sum(rows),
            lambda _: [(rows.astype(np.float64) ** 2).sum()],
        )
        biased = ops.add_bias(rows.copy(), up[0, 0])
        yield judged(f"add_bias {width}", biased, lambda kind: rows.astype(kind) + up[0, 0].astype(kind), dtype)
        for other in (F32, dtype):
            wide = rows.astype(F32) * np.float32(1.001)
            np.testing.assert_array_equal(ops.cast(wide, other), wide.astype(other))
            np.testing.assert_array_equal(ops.cast(rows, other), rows.astype(other))
        summed = ops.add(rows, rows[::-1])
        yield judged(f"add {width}", summed, lambda kind: rows.astype(kind) + rows[::-1].astype(kind), dtype)
        into = np.ones(width + 5, np.float32)
        ops.accumulate(into, rows[0], 2, True)
        ops.accumulate(into, rows[1], 2, True)
        expected = np.ones(width + 5)
        expected[2 : 2 + width] += rows[:2].astype(np.float64).sum(0)
        yield judged(f"accumulate {width}", into, lambda _: expected)


def rotation(rng: np.random.Generator, dtype: np.dtype = F32) -> Iterator[Finding]:
    for B, S, H, K, D in ((1, 1, 1, 1, 2), (2, 7, 4, 2, 6), (1, 13, 3, 1, 64), (2, 5, 2, 2, 128)):
        for scaled in (False, True):
            q, k = rng.normal(size=(B, H, S, D)).astype(dtype), rng.normal(size=(B, S, K + 1, D)).astype(dtype)
            q, k = q.transpose(0, 2, 1, 3), k[:, :, 1:]  # as they come out of views: not contiguous
            angle = rng.uniform(0, 6, (B if scaled else 1, S, 1, D // 2))
            cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
            scale = rng.uniform(0.5, 2, angle.shape).astype(np.float32) if scaled else None
            other = None if scale is None else 1 / scale

            def define(kind: type, which: int, back: bool = False) -> Any:
                tables = [None if t is None else t.astype(kind) for t in (cos, sin, scale, other)]
                run = reference.rope_qk_backward if back else reference.rope_qk
                return run(q.astype(kind), k.astype(kind), *tables)[which]

            name = f"{(B, S, H, K, D)} {dtype}"
            for i, got in enumerate(ops.rope_qk(q, k, cos, sin, scale, other)):
                yield judged(f"rope {i} {name}", got, lambda kind, i=i: define(kind, i), dtype)
            for i, got in enumerate(ops.rope_qk_backward(q, k, cos, sin, scale, other)):
                yield judged(f"rope back {i} {name}", got, lambda kind, i=i: define(kind, i, True), dtype)


def loss(rng: np.random.Generator, dtype: np.dtype = F32) -> Iterator[Finding]:
    for rows, columns, spread in ((1, 1, 1.0), (5, 7, 3.0), (13, 131, 3.0), (3, 5003, 1.0), (4, 37, 1e4)):
        logits = (spread * rng.normal(size=(rows, columns))).astype(dtype)
        first = 11
        for real in {columns, columns // 2}:
            targets = rng.integers(0, first + columns + 9, rows).astype(np.int32)
            targets[0], targets[-1] = IGNORE, first
            lse, picked = ops.cross_entropy_forward(logits, targets, first, real)
            name = f"{rows}x{columns} {real} {dtype}"
            if not real:
                assert np.isneginf(lse).all(), f"{name}: a shard without a token has no probability"
                continue
            shard = lambda kind: reference.cross_entropy_shard(logits.astype(kind), targets, first, real)  # noqa: E731
            yield judged(f"log_sum {name}", lse, lambda kind: shard(kind)[0])
            yield judged(f"picked {name}", picked, lambda kind: shard(kind)[1])
            z, factor = 1e-3, np.full(1, 0.25, np.float32)

            def define(kind: type) -> Any:
                given = logits.astype(kind), targets, first, real, lse.astype(kind), z
                return 0.25 * reference.cross_entropy_shard_backward(*given)

            apart = ops.cross_entropy_backward(logits, targets, first, real, lse, factor, z, in_place=False)
            yield judged(f"dlogits {name}", apart, define, dtype)
            over = logits.copy()
            ops.cross_entropy_backward(over, targets, first, real, lse, factor, z)
            np.testing.assert_array_equal(over, apart)


def rows_and_updates(rng: np.random.Generator, dtype: np.dtype = F32) -> Iterator[Finding]:
    for width in WIDTHS:
        table, ids = rng.normal(size=(19, width)).astype(dtype), rng.integers(0, 19, (2, 9)).astype(np.int32)
        np.testing.assert_array_equal(ops.embedding(table, ids), table[ids])
        grad = rng.normal(size=(2, 9, width)).astype(dtype)
        define = lambda kind: reference.embedding_backward(grad.astype(kind), ids, 19)  # noqa: E731
        yield judged(f"embedding_backward {width}", ops.embedding_backward(grad, ids, 19), define)
        rounded = ops.embedding_backward(grad, ids, 19, dtype)
        np.testing.assert_array_equal(rounded, ops.embedding_backward(grad, ids, 19).astype(dtype))
        master, m, v = (rng.normal(size=width + 8).astype(np.float32) for _ in range(3))
        g, v = rng.normal(size=width + 3).astype(dtype), abs(v)
        scalars = AdamWStep(3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5)
        before = [a.copy() for a in (master, m, v)]
        copy = np.zeros(width, dtype)
        ops.adamw(master, g, m, v, scalars, copy=copy, first=4, grad_first=2, count=width)
        inside = slice(4, 4 + width)
        for i, (name, got) in enumerate((("master", master), ("m", m), ("v", v))):

            def updated(kind: type, i: int = i) -> Any:
                parts = [a[inside].astype(kind) for a in before]
                steps = (parts[0], g[2 : 2 + width].astype(kind), *parts[1:], scalars)
                expected = before[i].astype(kind)
                expected[inside] = reference.adamw(*steps)[i]
                return expected

            yield judged(f"adamw {name} {width} {dtype}", got, updated)
        np.testing.assert_array_equal(copy, master[inside].astype(dtype))


def products(rng: np.random.Generator) -> Iterator[Finding]:
    """In float32, and of bfloat16 operands, which are rounded before and summed in float32."""
    shapes = (1, 1, 1), (3, 5, 7), (64, 32, 64), (67, 131, 33), (9, 64, 129), (200, 70, 500), (13, 300, 193)
    for m, n, k in (*shapes, (230, 90, 1100), (100, 73, 2200)):
        for dtype in (F32, HALF["bfloat16"]):
            a, w = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(n, k)).astype(dtype)
            bias = rng.normal(size=n).astype(np.float32)
            for turn_a in (False, True):
                for turn_w in (False, True):
                    given = [np.ascontiguousarray(x.T) if turn else x for x, turn in ((a, turn_a), (w, turn_w))]
                    name = f"product {(m, n, k)} {turn_a} {turn_w} {dtype}"
                    plain = lambda kind: a.astype(kind) @ w.astype(kind).T  # noqa: E731
                    if dtype == F32:
                        yield judged(name, ops.matmul(*given, None, turn_a, turn_w), plain)
                        added = lambda kind: plain(kind) + bias.astype(kind)  # noqa: E731
                        yield judged(f"{name} bias", ops.matmul(*given, bias, turn_a, turn_w), added)
                        if turn_w and not turn_a:
                            total = np.broadcast_to(bias, (m, n)).copy()
                            matmul_add(total, *given)
                            yield judged(f"{name} to a matrix", total, added)
                    else:
                        yield judged(name, ops.matmul_bf16(*given, F32, turn_a, turn_w), plain)


def hard_products(rng: np.random.Generator) -> Iterator[Finding]:
    """float32 products element by element, relative to |a| |w|: rows of scales far apart, sums that cancel, the largest
    numbers, long sums, a row that is not finite, and a product added to a matrix."""
    for m, n, k, turned in ((40, 70, 100, False), (73, 75, 2200, True)):
        a, w = (rng.normal(size=(rows, k)) * 10.0 ** rng.uniform(-14, 14, (rows, 1)) for rows in (m, n))
        half = k // 2
        a[::2, half:], w[::2, half:] = -a[::2, :half], w[::2, :half] * (1 + 2.0**-16)
        a[1, ::3], a[2] = 3.4e38, np.inf
        w[1] = rng.normal(size=k) * 1e-6
        a, w, c = a.astype(np.float32), w.astype(np.float32), rng.normal(size=(m, n)).astype(np.float32)
        given = [np.ascontiguousarray(x.T) for x in (a, w)] if turned else [a, w]
        got, added = ops.matmul(*given, None, turned, turned), c.copy()
        silent = [np.zeros(shape, np.float32) for shape in ((m, n), (m, 1), (1, n), (k, 1))]  # an adapter that is 0
        read, low, lora_a, lora_b = silent
        adapted_backward(a, read, low, np.ascontiguousarray(w.T), lora_a, lora_b, 1.0, added)
        assert not np.isfinite(got[2]).any(), "a row with infinities: finite"
        rows = [i for i in range(m) if i != 2]
        wide_a, wide_w = a[rows].astype(np.float64), w.astype(np.float64)
        truth, size = wide_a @ wide_w.T, abs(wide_a) @ abs(wide_w).T
        seen = size < 1e38  # the others are beyond float32
        # Adding to a matrix rounds at the matrix's size with every term.
        wide_c, limit = c[rows].astype(np.float64), UNITS * UNIT[F32]
        for name, result, begin, most in (("", got, 0.0, limit), (" added", added, wide_c, limit * k**0.5 / 2)):
            error = abs(result[rows] - (truth + begin))[seen] / (size + abs(begin))[seen]
            yield f"hard product {(m, n, k)}{name}", float(np.nan_to_num(error, nan=np.inf).max()), most


def adapter_products(rng: np.random.Generator) -> Iterator[Finding]:
    """Layers with low-rank adapters, r above and below what registers hold, and their gradients, added and written, of
    an adapter that reads x and of one that reads other rows."""
    for m, k, n, r in ((150, 96, 70, 8), (37, 45, 33, 3), (1, 7, 5, 1), (66, 32, 64, 11), (300, 200, 96, 40)):
        shapes = {"x": (m, k), "read": (m, k), "w": (n, k), "a": (r, k), "b": (n, r), "dy": (m, n), "into": (m, k)}
        held = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (*shapes.items(), ("bias", n))}
        x, read, w, a, b, dy, into, bias = held.values()
        scale = 1.75
        out, low = adapted(x, read, w, bias, a, b, scale)
        plain, _ = adapted(x, read, w, None, a, b, scale)
        both, dx, dread, only = into.copy(), into.copy(), np.empty_like(into), np.empty_like(into)
        grads = [
            adapted_backward(dy, read, low, w, a, b, scale, *given)
            for given in ((both, both), (dx, None), (None, dread, False), (only, None, False), ())
        ]
        assert all(np.array_equal(grads[0][i], other[i]) for other in grads for i in (0, 1)), "gradients differ"

        def truth(kind: type, held: dict[str, np.ndarray] = held, scale: float = scale) -> dict[str, np.ndarray]:
            x, read, w, a, b, dy, into, bias = (value.astype(kind) for value in held.values())
            low, dlow, dx = kind(scale) * (read @ a.T), kind(scale) * (dy @ b), dy @ w
            found = {"low": low, "plain": x @ w.T + low @ b.T, "out": x @ w.T + bias + low @ b.T, "da": dlow.T @ read}
            found |= {"db": dy.T @ low, "both": into + dx + dlow @ a, "dx": into + dx, "dread": dlow @ a, "only": dx}
            return found

        got = {"low": low, "plain": plain, "out": out, "da": grads[0][0], "db": grads[0][1]}
        for name, value in (got | {"both": both, "dx": dx, "dread": dread, "only": only}).items():
            exact = lambda kind, name=name, truth=truth: truth(kind)[name]  # noqa: E731
            yield judged(f"low rank {(m, k, n, r)} {name}", value, exact)


def few_rows(rng: np.random.Generator, dtype: np.dtype = F32) -> Iterator[Finding]:
    """Products of few rows: the matrix in their dtype; in int8 with a factor for each output, and the rows rounded."""
    sizes = ((1, 1, 1), (2, 3, 5), (3, 16, 16), (5, 33, 17), (8, 70, 131), (13, 100, 512), (32, 31, 200))
    for m, n, k in sizes:
        x, w, bias = (rng.normal(size=s).astype(dtype) for s in ((m, k), (n, k), n))
        w8, factors = rng.integers(-127, 128, (n, k)).astype(np.int8), rng.uniform(0.001, 0.1, n).astype(np.float32)
        for b in (None, bias):
            cases = {
                "rows": (ops.linear_rows(x, w, b), lambda kind: (x.astype(kind), w.astype(kind))),
                "int8 rows": (
                    ops.linear_rows(x, w8, b, factors),
                    lambda kind: (
                        reference.quantized_rows(x.astype(kind)),
                        w8.astype(kind) * factors.astype(kind)[:, None],
                    ),
                ),
            }
            for name, (got, operands) in cases.items():
                define = lambda kind, operands=operands: reference.linear(  # noqa: E731
                    *operands(kind), None if b is None else b.astype(kind)
                )
                yield judged(f"{name} {(m, n, k)} {dtype}", got, define, dtype)
        got = ops.dequantize(w8, factors, dtype)
        yield judged(f"dequantize {n}", got, lambda kind: w8.astype(kind) * factors.astype(kind)[:, None], dtype)
        # A row's bits are its own.
        for matrix in ((w, bias), (w8, bias, factors)):
            whole = ops.linear_rows(x, *matrix)
            alone = np.concatenate([ops.linear_rows(x[i : i + 1], *matrix) for i in range(m)])
            np.testing.assert_array_equal(whole.view(np.uint8), alone.view(np.uint8))


CHECKS: dict[str, Callable[[np.random.Generator], Iterator[Finding]]] = {
    "norms": norms,
    "levels": levels,
    "far": far,
    "far in bfloat16": lambda rng: far(rng, HALF["bfloat16"]),
    "pointwise": pointwise,
    "rotation": rotation,
    "attention": attention,
    "attention, scores of 1e4": lambda rng: attention(rng, spread=30.0),
    "attention after a NaN": stray_nan,
    "ring": ring,
    "loss": loss,
    "rows and updates": rows_and_updates,
    "products": products,
    "hard products": hard_products,
    "adapter products": adapter_products,
    "few rows": few_rows,
    "pages": pages,
    **{
        f"{name} in {half}": lambda rng, check=check, half=half: check(rng, HALF[half])
        for half in HALF
        for name, check in (
            ("norms", norms),
            ("pointwise", pointwise),
            ("rotation", rotation),
            ("attention", attention),
            ("loss", loss),
            ("rows and updates", rows_and_updates),
            ("few rows", few_rows),
            ("pages", pages),
        )
    },
}


def broken(name: str) -> list[Finding]:
    """The findings of a check that are beyond their limit."""
    return [finding for finding in CHECKS[name](np.random.default_rng(3)) if not finding[1] <= finding[2]]


def main() -> int:
    """Every check with the address sanitizer's build; 1 when a number is wrong (a bad access ends the process)."""
    from telechat_twins.kernels.cpu.engine import NumpyEngine, use_engine

    # With every optimisation the instrumented code takes many minutes to compile; its accesses are the same.
    use_engine("numpy", NumpyEngine("-fsanitize=address", "-fno-omit-frame-pointer", "-g1", "-O1"))
    wrong = 0
    for name in CHECKS:
        found = broken(name)
        wrong += len(found)
        print(f"{name}: {found or 'ok'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
