"""The C++ operators: numbers, bad input, planted faults, and the library's making."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from telechat_twins.core.model.visibility import causal_ranges
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.cpu import build, engine, ops
from tests.support import cpu_kernel_checks as checks

ROOT = Path(__file__).resolve().parents[3]
F32 = np.dtype(np.float32)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler; composite operators serve then")


PRODUCTS_ONLY = ("-mno-amx-tile", "-mno-amx-tile -mno-avx512bf16")
# A fifth of the time that all of them take to compile.
PRODUCTS = tuple(
    f"{name}.cc" for name in ("registry", "pool", "matmul", "thin", "split_matmul", "low_rank", "linear", "attention")
)


@pytest.fixture(scope="module", params=[*PRODUCTS_ONLY, "-mno-avx512f", "as many instructions as there are"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels for this processor, and for lesser ones. The last stay in use to the end of this file."""
    flags = () if request.param.startswith("as") else tuple(request.param.split())
    if flags and "avx512" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512 to do without")
    before = engine.engine_of(np.zeros(1))
    sources = PRODUCTS if request.param in PRODUCTS_ONLY else build.KERNELS
    engine.use_engine("numpy", engine.NumpyEngine(*flags, sources=sources))
    yield request.param
    engine.use_engine("numpy", before)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_kernels_equal_their_definitions(instructions: str, name: str) -> None:
    if instructions in PRODUCTS_ONLY and not name.startswith(("products", "hard products", "attention")):
        pytest.skip("only products and attention use these instructions")
    assert checks.broken(name) == []


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def spoil_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.attention

    def faulty(*args: Any, **options: Any) -> Any:
        out, lse = real(*args, **options)
        return out, lse + np.float32(0.01)

    monkeypatch.setattr(ops, "attention", faulty)


def drop_tail(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = getattr(ops, name)

    def faulty(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        whole = out if isinstance(out, np.ndarray) else out[0]
        whole[..., whole.shape[-1] // 16 * 16 :] = 0
        return out

    monkeypatch.setattr(ops, name, faulty)


def swap_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.rope_qk

    def faulty(q: np.ndarray, *args: Any, **options: Any) -> Any:
        return real(np.roll(q, q.shape[-1] // 2, -1), *args, **options)

    monkeypatch.setattr(ops, "rope_qk", faulty)


def shift_range(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.attention

    def faulty(q: np.ndarray, k: np.ndarray, v: np.ndarray, ranges: np.ndarray, **options: Any) -> Any:
        several = ranges[..., 1:] - ranges[..., :1] > 1
        return real(q, k, v, (ranges - several * np.array([0, 1])).astype(np.int32), **options)

    monkeypatch.setattr(ops, "attention", faulty)


def two_parts_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of 16 bits: what a product of float32 in bfloat16 parts would compute without the third part."""
    real = ops.attention

    def faulty(q: np.ndarray, *args: Any, **options: Any) -> Any:
        short = (np.ascontiguousarray(q, np.float32).view(np.int32) & ~0xFF).view(np.float32)
        return real(short.astype(q.dtype), *args, **options)

    monkeypatch.setattr(ops, "attention", faulty)


def forget_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.rms_norm_backward
    monkeypatch.setattr(ops, "rms_norm_backward", lambda grad, x, w, rstd, mask=None: real(grad, x, w, rstd))


def forget_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.cross_entropy_backward
    monkeypatch.setattr(
        ops,
        "cross_entropy_backward",
        lambda a, b, c, d, e, f, z=0.0, in_place=True: real(a, b, c, d, e, f, 0.0, in_place),
    )


def mix_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.paged_attention
    monkeypatch.setattr(ops, "paged_attention", lambda *a, **o: real(*a[:8], np.roll(a[8], 1, 0), *a[9:], **o))


def forget_to_store(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.paged_attention
    monkeypatch.setattr(ops, "paged_attention", lambda q, k, v, *a, **o: real(q, k, v * 0, *a, **o))


def one_factor_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.linear_rows

    def faulty(x: Any, weight: Any, bias: Any = None, factors: Any = None) -> Any:
        return real(x, weight, bias, None if factors is None else np.full_like(factors, factors.mean()))

    monkeypatch.setattr(ops, "linear_rows", faulty)


def one_scale_for_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.linear_rows

    def faulty(x: Any, weight: Any, bias: Any = None, factors: Any = None) -> Any:
        scale = np.abs(x).max() / 127 if factors is not None else 0
        return real((np.rint(x / scale) * scale).astype(x.dtype) if scale else x, weight, bias, factors)

    monkeypatch.setattr(ops, "linear_rows", faulty)


def drop_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the product of the second bfloat16 part of a and the first of w."""
    real = ops.matmul

    def faulty(a: Any, w: Any, bias: Any = None, turn_a: bool = False, turn_w: bool = False) -> Any:
        a = np.where(np.isfinite(a), a, 0.0).astype(F32)
        rounded = a.astype(ml_dtypes.bfloat16).astype(F32)
        second, first = ((x.astype(ml_dtypes.bfloat16).astype(F32)) for x in (a - rounded, w))
        return real(a, w, bias, turn_a, turn_w) - real(second, first, None, turn_a, turn_w)

    monkeypatch.setattr(ops, "matmul", faulty)


FAULTS = {
    "a dropped term of a product in parts": ("hard products", drop_term),
    "a wrong log-sum-exp": ("attention", spoil_lse),
    "a wrong log-sum-exp in a ring": ("ring", spoil_lse),
    "a range one short": ("attention", shift_range),
    "two parts of three": ("attention", two_parts_of_three),
    "a dropped tail of a norm": ("norms", lambda m: drop_tail(m, "rms_norm")),
    "a dropped tail of swiglu": ("pointwise", lambda m: drop_tail(m, "swiglu")),
    "a dropped tail of gelu": ("pointwise", lambda m: drop_tail(m, "gelu")),
    "a dropped tail of a product": ("products", lambda m: drop_tail(m, "matmul")),
    "a dropped tail of a bfloat16 product": ("products", lambda m: drop_tail(m, "matmul_bf16")),
    "a dropped tail of the embedding's gradient": ("rows and updates", lambda m: drop_tail(m, "embedding_backward")),
    "swapped halves": ("rotation", swap_halves),
    "a growth mask forgotten": ("norms", forget_mask),
    "a z-loss forgotten": ("loss", forget_scale),
    "a dropped tail of few rows": ("few rows", lambda m: drop_tail(m, "linear_rows")),
    "one factor for all outputs": ("few rows", one_factor_for_all),
    "rows rounded with one scale for all": ("few rows", one_scale_for_the_row),
    "another sequence's pages": ("pages", mix_tables),
    "values not stored": ("pages", forget_to_store),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    check, plant = FAULTS[fault]
    plant(monkeypatch)
    try:
        found = checks.broken(check)
    except AssertionError:  # one that compares bits
        return
    assert found and max(error / limit for _, error, limit in found) > 3


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    """Of products and sums over rows: what a run at another number of cores must not change."""
    x, ids = random(1000, 70), np.random.default_rng(0).integers(0, 50, 1000).astype(np.int32)
    grad = random(1000, 300)

    pages = [random(300, 16, 2, 64) for _ in "kv"]
    q, k = x[:8, :64].reshape(1, 1, 8, 64), x[:2, :64].reshape(1, 1, 2, 64)
    place = np.array([1599], np.int32), np.array([0, 1], np.int32), np.array([1600], np.int32)
    table = np.arange(100, dtype=np.int32)[None]
    narrow = [a.astype(ml_dtypes.bfloat16) for a in (x[:, :70], grad[:, :100])]
    keys, ranges = random(1, 1100, 1, 64), causal_ranges(70, 1100).ranges

    def sums() -> list[np.ndarray]:
        attended = ops.paged_attention(q, k, k, *pages, *place, table, 1)
        queries = np.ascontiguousarray(grad[:70, :128]).reshape(1, 70, 2, 64)
        out, lse = ops.attention(queries, keys, keys, ranges)
        gradients = ops.attention_backward(out, queries, keys, keys, ranges, out, lse)
        rows = ops.linear_rows(x[:7], grad[:70].T.copy()[:90, :70])
        made = [ops.matmul(x, grad, None, True, True), ops.matmul_bf16(*narrow, F32, True, True)]  # sums over k = 1,000
        return [
            ops.column_sum(x),
            ops.square_sum(x),
            ops.embedding_backward(grad, ids, 50),
            attended,
            rows,
            *made,
            *gradients,
        ]

    found = []
    for threads in (1, 2, 3):
        engine.engine_of(x).set_threads(threads)
        found.append(sums())
    engine.engine_of(x).set_threads(0)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_rounding_does_not_grow_with_the_keys() -> None:
    """32,768 keys of about equal weight and values of one sign: sums of 96 at a time are 4e-7 from float64 here, one
    running sum was 4e-6, and so is numpy's."""
    (q, k, v), T = (0.5 * random(1, n, h, 32) for n, h in ((64, 2), (32768, 1), (32768, 1))), 32768
    v = 2.0 * v + np.float32(0.5)
    ranges = np.tile(np.array([0, T], np.int32), (1, 64, 1))
    wide = (x.astype(np.float64) for x in (q, k, v))
    expected, _ = reference.attention(*wide, reference.visible_keys(ranges, T))
    out, _ = ops.attention(q, k, v, ranges)
    assert relative_frobenius(out, expected) < 1e-6


def test_nan_is_not_hidden() -> None:
    """A NaN that went in comes out, where health checks can see it."""
    x = random(2, 70)
    x[0, 3] = np.nan
    targets = np.zeros(2, np.int32)
    assert np.isnan(ops.swiglu(x, x)[0, 3]) and np.isnan(ops.gelu(x)[0, 3])
    assert np.isnan(ops.rms_norm(x, np.ones(70, np.float32), 1e-5, F32)[0][0]).all()
    assert np.isnan(ops.cross_entropy_forward(x, targets, 0, 70)[0]).tolist() == [True, False]
    assert np.isnan(ops.square_sum(x)[0])
    q = random(1, 20, 2, 16)
    lse = random(1, 2, 20)
    lse[0, 1, 7] = np.nan
    for given in ((q, lse, q, -abs(random(1, 2, 20))), (q, -abs(random(1, 2, 20)), q, lse)):
        merged, joint = ops.merge_blocks(*given)
        assert np.isnan(joint).sum() == 1 and np.isnan(joint[0, 1, 7])
        assert np.isnan(merged).sum() == 16 and np.isnan(merged[0, 7, 1]).all()
    v = q.copy()
    v[0, 0, 0, 0] = np.nan
    assert np.isnan(ops.attention(q, q, v, causal_ranges(20, 20).ranges)[0][0, :, 0, 0]).all()
    assert np.isnan(ops.linear_rows(x, random(3, 70))).tolist() == [[True] * 3, [False] * 3]
    one = {"q": Q[:1, :1], "k": K[:1, :1] * np.nan, "v": K[:1, :1], "slots": np.array([4], np.int32)}
    assert np.isnan(paged(**one, starts=np.array([0, 1], np.int32), lengths=np.array([1], np.int32), singles=1)).all()


THREADS = """
import os, sys, threading, numpy as np
from telechat_twins.kernels.cpu import ops
from telechat_twins.kernels.cpu.engine import limit_threads
limit_threads(4)
x, w = (np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate(((9, 512), (2000, 512))))
truth, wrong = ops.linear_rows(x, w), []

def hammer():
    for _ in range(60):
        if not np.array_equal(ops.linear_rows(x, w), truth):
            wrong.append(1)

threads = [threading.Thread(target=hammer) for _ in range(3)]
for t in threads: t.start()
hammer()
for t in threads: t.join()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(ops.linear_rows(x, w), truth) else 3)
assert os.waitpid(child, 0)[1] == 0, "a forked process"
assert not wrong and np.array_equal(ops.linear_rows(x, w), truth)
print("ok")
"""


def test_kernels_may_be_called_from_several_threads_and_after_a_fork() -> None:
    """Four threads, more than this process may have processors, share one pool; whoever finds it busy works alone."""
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


def test_memory_of_attention_grows_with_the_length_only() -> None:
    """Scores of 4096 x 4096 would take 64 MiB a head; a process may take 24 MiB beyond inputs and outputs."""
    code = """
import resource
import numpy as np
from telechat_twins.core.model.visibility import causal_ranges
from telechat_twins.kernels.cpu import ops
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
q = np.ones((1, 4096, 2, 64), np.float32)
ranges = causal_ranges(4096, 4096).ranges
ops.attention(q[:, :64], q[:, :64], q[:, :64], ranges[:, :64])
before = peak()
out, lse = ops.attention(q, q, q, ranges)
gradients = ops.attention_backward(q, q, q, q, ranges, out, lse)
kept = (out.nbytes + lse.nbytes + sum(g.nbytes for g in gradients)) / 2**20
print(peak() - before - kept)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) < 24


Q, K = np.zeros((2, 5, 4, 8), np.float32), np.zeros((2, 5, 2, 8), np.float32)
RANGES = causal_ranges(5, 5).ranges
FIRST_STEP = AdamWStep(1, 0.1, 0.9, 0.9, 1e-8, 0.0)
ROWS, WIDE = np.zeros((3, 8), np.float32), np.zeros((3, 9), np.float32)


def paged(**changes: Any) -> Any:
    """A call that is right but for ``changes``: one sequence of five tokens."""
    k_pages, v_pages = (np.zeros((3, 4, 2, 8), np.float32) for _ in "kv")
    arguments = {
        **{"q": Q[:1], "k": K[:1], "v": K[:1], "k_pages": k_pages, "v_pages": v_pages},
        **{"slots": np.arange(4, 9, dtype=np.int32), "starts": np.array([0, 5], np.int32)},
        **{"lengths": np.array([5], np.int32), "tables": np.array([[1, 2]], np.int32), "singles": 0},
    }
    return ops.paged_attention(**{**arguments, **changes})


MISTAKES = {
    "k: 3 kv heads": lambda: ops.attention(Q, K[:, :, [0, 0, 1]], K[:, :, [0, 0, 1]], RANGES),
    r"k: shape \(2, 5, 2, 7\)": lambda: ops.attention(Q, K[..., :7], K[..., :7], RANGES),
    "v: shape": lambda: ops.attention(Q, K, K[:, :4], RANGES),
    "v: float16, needs the dtype of k": lambda: ops.attention(Q, K, K.astype(np.float16), RANGES),
    "q: float64": lambda: ops.attention(Q.astype(np.float64), K, K, RANGES),
    "ranges: int64, needs int32": lambda: ops.attention(Q, K, K, RANGES.astype(np.int64)),
    r"ranges: shape \(1, 4, 2\)": lambda: ops.attention(Q, K, K, RANGES[:, :4]),
    "log_sum_exp: shape": lambda: ops.attention_backward(Q, Q, K, K, RANGES, Q, np.zeros((2, 5, 4), np.float32)),
    "grad: shape": lambda: ops.attention_backward(K, Q, K, K, RANGES, Q, np.zeros((2, 4, 5), np.float32)),
    r"weight: shape \(9,\), needs \(8,\)": lambda: ops.rms_norm(ROWS, WIDE[0], 1e-5, F32),
    "residual: shape": lambda: ops.add_rms_norm(ROWS, WIDE, ROWS[0], 1e-5, F32),
    r"rstd: shape \(8,\)": lambda: ops.rms_norm_backward(ROWS, ROWS, ROWS[0], ROWS[0]),
    "mask: shape": lambda: ops.layer_norm(ROWS, ROWS[0], ROWS[0], 1e-5, F32, WIDE[0]),
    "up: shape": lambda: ops.swiglu(ROWS, WIDE),
    "up: float16": lambda: ops.swiglu(ROWS, ROWS.astype(np.float16)),
    "k: shape .* only the heads may differ": lambda: ops.rope_qk(Q, K[:, :4], Q, Q),
    "cos: shape": lambda: ops.rope_qk(Q, K, Q, Q),
    "even D": lambda: ops.rope_qk(Q[..., :7], K[..., :7], Q, Q),
    "targets: float32": lambda: ops.cross_entropy_forward(ROWS, ROWS[:, 0], 0, 8),
    "targets: shape": lambda: ops.cross_entropy_forward(ROWS, np.zeros(4, np.int32), 0, 8),
    "real: 9, needs 0 to the 8 columns": lambda: ops.cross_entropy_forward(ROWS, np.zeros(3, np.int32), 0, 9),
    "ids: float32": lambda: ops.embedding(ROWS, ROWS[0]),
    r"copy: 9 elements, needs 8": lambda: ops.adamw(*[ROWS[0]] * 4, FIRST_STEP, copy=WIDE[0]),
    "master: elements 4 to 12, needs a range inside its 8": lambda: ops.adamw(*[ROWS[0]] * 4, FIRST_STEP, first=4),
    "first: elements 1 to 9, needs a range inside the 8 of into": lambda: ops.accumulate(ROWS[0], ROWS[1], 1, True),
    "w: inner length 9, needs 8, that of a": lambda: ops.matmul(ROWS, WIDE),
    "bias: shape": lambda: ops.matmul(ROWS, ROWS, ROWS[0]),
    r"weight: shape \(3, 9\), needs \(3, 8\)": lambda: ops.linear_rows(ROWS, WIDE),
    "weight: float16, needs float32": lambda: ops.linear_rows(ROWS, ROWS.astype(np.float16)),
    "weight: float32, needs int8": lambda: ops.linear_rows(ROWS, ROWS, factors=ROWS[:, 0]),
    "factors: shape": lambda: ops.linear_rows(ROWS, ROWS.astype(np.int8), factors=ROWS[0]),
    r"bias: shape \(8,\), needs \(3,\)": lambda: ops.linear_rows(ROWS, ROWS, ROWS[0]),
    "factors: float16": lambda: ops.dequantize(ROWS.astype(np.int8), ROWS[:, 0].astype(np.float16), F32),
    r"k: shape \(1, 4, 2, 8\), needs \(1, 5, 2, 8\)": lambda: paged(k=K[:1, :4]),
    "v: float16, needs the dtype of q": lambda: paged(v=K[:1].astype(np.float16)),
    "v_pages: shape": lambda: paged(v_pages=np.zeros((2, 4, 2, 8), np.float32)),
    "k_pages: not contiguous": lambda: paged(k_pages=np.zeros((3, 4, 2, 16), np.float32)[..., ::2]),
    "k: 3 kv heads, needs a divisor of the 4 heads of q": lambda: paged(
        k=Q[:1, :, :3], v=Q[:1, :, :3], k_pages=Q[:, :, :3], v_pages=Q[:, :, :3]
    ),
    "slots: int64": lambda: paged(slots=np.zeros(5, np.int64)),
    r"starts: shape \(1,\), needs \(2,\)": lambda: paged(starts=np.zeros(1, np.int32)),
    r"tables: shape \(2, 2\)": lambda: paged(tables=np.zeros((2, 2), np.int32)),
    "singles: 2, needs 0 to 1": lambda: paged(singles=2),
    r"x: shape \(5, 2, 8\), needs \[N, K, D\]": lambda: ops.store_rows(Q, K[0], np.zeros(5, np.int64)),
    "pages: float16, needs the dtype of x": lambda: ops.store_rows(K.astype(np.float16), K[0], np.zeros(5, np.int64)),
    "pages: not contiguous": lambda: ops.store_rows(Q[..., ::2], Q[0, :, :, :4], np.zeros(5, np.int64)),
    "slots: int32, needs int64": lambda: ops.store_rows(K, K[0], np.zeros(5, np.int32)),
    "a: float32, needs bfloat16": lambda: ops.matmul_bf16(ROWS, ROWS, F32),
    "x: list, needs a tensor": lambda: ops.gelu([1.0]),
    "out: shape .*, needs .B, S, H, D.": lambda: ops.merge_blocks(ROWS, ROWS, ROWS, ROWS),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_bad_input_is_named(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MISTAKES[message]()


def test_targets_and_ids_beyond_the_vocabulary_touch_nothing() -> None:
    """What Python does not look at, the kernels must survive."""
    targets = np.array([8, 2**30, -7], np.int32)
    assert ops.cross_entropy_forward(ROWS, targets, 0, 8)[1].tolist() == [0, 0, 0]
    table = ops.embedding_backward(ROWS + 1, np.array([0, 99, -5], np.int32), 4)
    np.testing.assert_array_equal(table, reference.embedding_backward(ROWS[:1] + 1, np.array([0]), 4))


@pytest.mark.parametrize("shift", [0, 1, 4, 15])
@pytest.mark.parametrize("vocab_size", [3, 3000])
def test_a_gradient_of_few_ids_is_zero_elsewhere_and_nothing_beside_it_is_touched(vocab_size: int, shift: int) -> None:
    """Of 1,001 columns, so that rows begin anywhere in a line; the larger one is written past the caches."""
    random, columns = np.random.default_rng(0), 1001
    grad, ids = random.standard_normal((40, columns), np.float32), random.integers(0, vocab_size, 40).astype(np.int32)
    ids[:2] = 0, vocab_size - 1
    room = np.full(vocab_size * columns + 64, np.nan, np.float32)
    first = 16 - room.ctypes.data % 64 // 4 + shift
    call = engine.Call("embedding_backward", 2, 1, ())
    for view, array, dtype in ((call.inputs[0], grad, "float32"), (call.inputs[1], ids, "int32")):
        engine.describe_view(view, array.ctypes.data, array.shape, dtype)
    engine.describe_view(call.outputs[0], room[first:].ctypes.data, (vocab_size, columns), "float32")
    call.run()
    end = first + vocab_size * columns
    assert np.isnan(room[:first]).all() and np.isnan(room[end:]).all()
    wanted = reference.embedding_backward(grad.astype(np.float64), ids, vocab_size)
    found = room[first:end].reshape(vocab_size, columns)
    assert relative_frobenius(found, wanted) <= 1e-6
    assert not found[np.setdiff1d(np.arange(vocab_size), ids)].any()


BUILD = """
import sys
from pathlib import Path
from telechat_twins.kernels.cpu import build
build.cache_folder = lambda: Path(sys.argv[1])
print(build.build("small", ("registry.cc",), ["-std=c++17", "-fPIC", "-pthread"], ["-shared", "-pthread"], ""))
"""


def start_build(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_processes_that_build_at_once_build_once(tmp_path: Path) -> None:
    told = [process.communicate() for process in [start_build(tmp_path) for _ in range(4)]]
    paths = {out.strip() for out, _ in told}
    assert len(paths) == 1 and Path(paths.pop()).exists()
    assert sum("building" in err for _, err in told) == 1
    out, err = start_build(tmp_path).communicate()
    assert err == "" and Path(out.strip()).exists()
    assert [p.suffix for p in Path(out.strip()).parent.iterdir() if p.name != "lock"] == [".so"]


def test_a_killed_build_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    process = start_build(tmp_path)
    assert process.stderr is not None and "building" in process.stderr.readline()
    process.kill()
    process.wait()
    out, _ = start_build(tmp_path).communicate()
    assert Path(out.strip()).stat().st_size > 0


def test_a_changed_source_or_flag_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    given: Any = ("small", ("registry.cc",), ["-std=c++17", "-fPIC", "-pthread"], ["-shared", "-pthread"])
    first = build.build(*given, "")
    assert build.build(*given, "") == first
    assert build.build(*given, "another version") != first


@pytest.mark.parametrize("what", ["no compiler", "a compiler that fails"])
def test_without_a_library_plain_operators_serve_and_say_why(tmp_path: Path, what: str) -> None:
    """In a process of its own: a framework loads the library once."""
    pytest.importorskip("mindspore")
    folder = tmp_path / "bin"
    folder.mkdir()
    if what != "no compiler":
        (folder / "g++").write_text("#!/bin/sh\necho 'g++: fatal error: no room left' >&2\nexit 4\n")
        (folder / "g++").chmod(0o755)
    code = """
import sys
import telechat_twins.telechat_ms.ops as ops, numpy as np
from mindspore import Tensor
print(chr(10).join(ops.described()))
print(ops.swiglu(Tensor(np.ones(3, np.float32)), Tensor(np.ones(3, np.float32)), __import__("mindspore").float32))
"""
    env = {**os.environ, "PATH": str(folder) if what == "no compiler" else f"{folder}:/usr/bin:/bin"}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    reason = "no C++ compiler found" if what == "no compiler" else "no room left"
    assert "composite: " in done.stdout and reason in done.stdout and "0.731" in done.stdout
