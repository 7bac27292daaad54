"""Ascend's operators in a rehearsal, against their float64 definitions. Whole models: test_rehearsal_model.py.

In a rehearsal the operators are answered in float64 and rounded to the dtype of their results, so what is left is the
rounding of operands and results. Limits, relative Frobenius norm: a rounding to a dtype with spacing ``u`` costs at
most u / 2 an element and about u / 3.5 in the norm; results here are rounded once or twice, gradients of attention read
a rounded output and a rounded log-sum-exp. Every limit is 2 u, and 1e-6 where MindSpore's CPU takes a logarithm, whose
float32 form is only good to that (telechat_ms/ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.model.visibility import KeyRanges, causal_ranges
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep

ms = pytest.importorskip("mindspore")
# On a CPU the pipeline of asynchronous launches spins while it waits; where it is on, the rehearsal copes with it.
ms.runtime.launch_blocking()

from telechat_twins.kernels.ascend import attention as ascend_attention  # noqa: E402
from telechat_twins.kernels.ascend import ops as ascend  # noqa: E402
from telechat_twins.kernels.ascend import rehearsal  # noqa: E402
from telechat_twins.telechat_ms.autograd import Function  # noqa: E402
from telechat_twins.telechat_ms.weights import to_numpy  # noqa: E402

SPACING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
DTYPES = list(SPACING)
LOGARITHM = 1e-6
Arrays = dict[str, np.ndarray]


@pytest.fixture
def calls() -> Iterator[Any]:
    """A rehearsal, and how often each operator was called."""
    with rehearsal.rehearsal() as counts:
        yield counts


def tensor(x: np.ndarray, dtype: str = "float32") -> Any:
    return ms.Tensor(np.ascontiguousarray(x, np.float32)).astype(getattr(ms, dtype))


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """The values that a tensor of ``dtype`` holds, in float64: what the definition is given, too."""
    return to_numpy(tensor(x, dtype)).astype(np.float64)


def worst(got: Arrays, truth: Arrays) -> float:
    """The largest relative error; infinite where a value is not finite in one of the two only."""
    errors = []
    for name, expected in truth.items():
        same = np.isfinite(got[name]) == np.isfinite(expected)
        finite = np.isfinite(expected)
        found, wanted = np.where(finite, got[name], 0.0), np.where(finite, expected, 0.0)
        error = relative_frobenius(found, wanted) if np.any(wanted) else float(np.abs(found).max(initial=0.0))
        errors.append(error if same.all() else np.inf)
    return max(errors)


def arrays(results: Any, *names: str) -> Arrays:
    results = results if isinstance(results, tuple | list) else (results,)
    return {name: to_numpy(x).astype(np.float64) for name, x in zip(names, results, strict=True)}


SHAPES = [(1, 1, 24), (2, 5, 7), (3, 61)]  # one row, odd width, prime rows


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(calls: Any, shape: tuple[int, ...], dtype: str, masked: bool) -> None:
    rng = np.random.default_rng(1)
    E, eps = shape[-1], 1e-5
    x, more, grad = (rounded(rng.normal(size=shape), dtype) for _ in range(3))
    weight = rounded(rng.uniform(0.5, 1.5, E), dtype)
    mask = np.clip(np.linspace(1.5, -0.5, E), 0.0, 1.0).astype(np.float32) if masked else None
    held = None if mask is None else tensor(mask)
    wide = None if mask is None else mask.astype(np.float64)
    xt, mt, gt, wt = (tensor(a, dtype) for a in (x, more, grad, weight))

    out, rstd = ascend.rms_norm(xt, wt, eps, gt.dtype, held)
    backward = ascend.rms_norm_backward(gt, xt, wt, rstd, held)
    assert rstd.shape == (int(np.prod(shape[:-1])),) and rstd.dtype == ms.float32
    assert out.dtype == gt.dtype and backward[0].dtype == xt.dtype and backward[1].dtype == ms.float32
    got = {**arrays(out, "out"), **arrays(backward, "dx", "dw")}
    truth = {"out": reference.rms_norm(x, weight, eps, wide)}
    truth |= dict(zip(("dx", "dw"), reference.rms_norm_backward(grad, x, weight, eps, wide), strict=True))
    assert worst(got, truth) <= 2 * SPACING[dtype]

    out, stream, rstd = ascend.add_rms_norm(xt, mt, wt, eps, gt.dtype, held)
    backward = ascend.add_rms_norm_backward(gt, mt, stream, wt, rstd, held)
    summed = to_numpy(stream).astype(np.float64)  # the norm and its gradient see the stream as it was rounded
    truth = {"out": reference.rms_norm(x + more, weight, eps, wide), "stream": x + more}
    expected = reference.add_rms_norm_backward(grad, more, summed, weight, eps, wide)
    truth |= dict(zip(("dstream", "dw"), expected, strict=True))
    got = {**arrays((out, stream), "out", "stream"), **arrays(backward, "dstream", "dw")}
    assert worst(got, truth) <= 2 * SPACING[dtype]
    assert calls["RmsNormGrad"] == 2 and calls["RmsNorm"] == (2 if masked else 1)
    assert calls["AddRmsNorm"] == (0 if masked else 1)


def test_rms_norm_of_a_float32_stream_for_a_bfloat16_model(calls: Any) -> None:
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(3, 5, 16)), rounded(rng.uniform(0.5, 1.5, 16), "bfloat16")
    x = rounded(x, "float32")
    out, rstd = ascend.rms_norm(tensor(x), tensor(weight, "bfloat16"), 1e-5, ms.bfloat16)
    grad = rounded(rng.normal(size=x.shape), "bfloat16")
    dx, dw = ascend.rms_norm_backward(tensor(grad, "bfloat16"), tensor(x), tensor(weight, "bfloat16"), rstd)
    assert (out.dtype, dx.dtype, dw.dtype) == (ms.bfloat16, ms.float32, ms.float32)
    truth = dict(zip(("dx", "dw"), reference.rms_norm_backward(grad, x, weight, 1e-5), strict=True))
    assert worst(arrays((dx, dw), "dx", "dw"), truth) <= 2 * SPACING["float32"]
    assert worst(arrays(out, "out"), {"out": reference.rms_norm(x, weight, 1e-5)}) <= SPACING["bfloat16"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(calls: Any, shape: tuple[int, ...], masked: bool) -> None:
    rng = np.random.default_rng(3)
    E, eps = shape[-1], 1e-5
    x, grad = (rounded(rng.normal(size=shape), "float32") for _ in range(2))
    weight, bias = (rounded(rng.normal(size=E), "float32") for _ in range(2))
    mask = np.clip(np.linspace(1.5, -0.5, E), 0.0, 1.0).astype(np.float32) if masked else None
    held, wide = (None, None) if mask is None else (tensor(mask), mask.astype(np.float64))
    out, mean, rstd = ascend.layer_norm(tensor(x), tensor(weight), tensor(bias), eps, ms.float32, held)
    backward = ascend.layer_norm_backward(tensor(grad), tensor(x), tensor(weight), mean, rstd, held)
    got = {**arrays(out, "out"), **arrays(backward, "dx", "dw", "db")}
    truth = {"out": reference.layer_norm(x, weight, bias, eps, wide)}
    expected = reference.layer_norm_backward(grad, x, weight, eps, wide)
    truth |= dict(zip(("dx", "dw", "db"), expected, strict=True))
    # The masked form is made of plain float32 operators of MindSpore's CPU device, which round at every step.
    assert worst(got, truth) <= (20 if masked else 4) * SPACING["float32"]
    assert calls["LayerNormExt"] == calls["LayerNormGradExt"] == (0 if masked else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_gelu(calls: Any, shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(4)
    gate, up, grad = (rounded(3 * rng.normal(size=shape), dtype) for _ in range(3))
    gt, ut, dt = (tensor(a, dtype) for a in (gate, up, grad))
    got = {**arrays(ascend.swiglu(gt, ut), "out"), **arrays(ascend.swiglu_backward(dt, gt, ut), "dgate", "dup")}
    truth = {"out": reference.swiglu(gate, up)}
    truth |= dict(zip(("dgate", "dup"), reference.swiglu_backward(grad, gate, up), strict=True))
    assert worst(got, truth) <= 2 * SPACING[dtype]
    got = {**arrays(ascend.gelu(gt), "out"), **arrays(ascend.gelu_backward(dt, gt), "dx")}
    truth = {"out": reference.gelu(gate), "dx": reference.gelu_backward(grad, gate)}
    assert worst(got, truth) <= 2 * SPACING[dtype]
    assert set(calls) == {"Swiglu", "SwigluGrad", "GeluExt", "GeluGradExt"}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2, 1, 8), (2, 7, 6, 2, 20)])
def test_rope(calls: Any, shape: tuple[int, ...], dtype: str, scaled: bool) -> None:
    B, S, H, K, D = shape
    rng = np.random.default_rng(5)
    q, k = rounded(rng.normal(size=(B, S, H, D)), dtype), rounded(rng.normal(size=(B, S, K, D)), dtype)
    angle = rng.uniform(0, 6, (1, S, 1, D // 2))
    cos, sin = rounded(np.cos(angle), "float32"), rounded(np.sin(angle), "float32")
    scales = [rounded(rng.uniform(0.5, 2, cos.shape), "float32") for _ in range(2)] if scaled else [None, None]
    held = [None if s is None else tensor(s) for s in scales]
    qt, kt, ct, st = tensor(q, dtype), tensor(k, dtype), tensor(cos), tensor(sin)
    truth = dict(zip("qk", reference.rope_qk(q, k, cos, sin, *scales), strict=True))
    assert worst(arrays(ascend.rope_qk(qt, kt, ct, st, *held), "q", "k"), truth) <= 2 * SPACING[dtype]
    truth = dict(zip("qk", reference.rope_qk_backward(q, k, cos, sin, *scales), strict=True))
    assert worst(arrays(ascend.rope_qk_backward(qt, kt, ct, st, *held), "q", "k"), truth) <= 2 * SPACING[dtype]
    assert worst(arrays(ascend.rope_qk(qt, kt, ct, -st, *held), "q", "k"), truth) <= 2 * SPACING[dtype]
    assert calls["RotaryPositionEmbedding"] == 4 and calls["RotaryPositionEmbeddingGrad"] == 2


DOCUMENTS = np.array([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2, 3]])


def some_ranges() -> KeyRanges:
    """Runs of keys that begin and end anywhere, some empty, others in each row of the batch."""
    rng = np.random.default_rng(6)
    bounds = np.sort(rng.integers(0, 9, (2, 7, 2)), -1).astype(np.int32)
    bounds[0, 2], bounds[1, 6] = (4, 4), (0, 0)
    return KeyRanges(bounds, 8, "ranges")


RANGES: dict[str, Callable[[], KeyRanges]] = {
    "one query": lambda: causal_ranges(1, 6),
    "alone": lambda: causal_ranges(1, 1),
    "causal": lambda: causal_ranges(7, 7),
    "last of more keys": lambda: causal_ranges(3, 7),
    "documents": lambda: causal_ranges(7, 7, DOCUMENTS),
    "last of documents": lambda: causal_ranges(3, 7, DOCUMENTS),
    "full": lambda: KeyRanges(np.broadcast_to(np.int32([0, 5]), (1, 3, 2)), 5, "full"),
    "runs": some_ranges,
    "one run for all": lambda: KeyRanges(np.int32([[[0, 2], [1, 3], [2, 2]]]), 3, "ranges"),
    "no keys": lambda: KeyRanges(np.zeros((1, 3, 2), np.int32), 0, "ranges"),
}


def attention_inputs(key_ranges: KeyRanges, D: int, dtype: str, size: float = 1.0) -> Arrays:
    rng = np.random.default_rng(7)
    S, T = key_ranges.ranges.shape[1], key_ranges.num_keys
    shapes = {"q": (2, S, 4, D), "k": (2, T, 2, D), "v": (2, T, 2, D), "grad": (2, S, 4, D)}
    return {name: rounded(size * rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def decodes(key_ranges: KeyRanges, dtype: str) -> bool:
    return key_ranges.ranges.shape[1] == 1 and dtype != "float32"


def attend(given: Arrays, key_ranges: KeyRanges, dtype: str) -> Arrays:
    q, k, v, grad = (tensor(given[name], dtype) for name in ("q", "k", "v", "grad"))
    device = ascend.device_ranges(key_ranges)
    out, lse = ascend.attention(q, k, v, device)
    assert out.dtype == q.dtype and lse.dtype == ms.float32
    gradients = ascend.attention_backward(grad, q, k, v, device, out, lse)
    return arrays((out, lse, *gradients), "out", "lse", "dq", "dk", "dv")


def defined(given: Arrays, key_ranges: KeyRanges, out: np.ndarray | None = None) -> Arrays:
    """``out``: the rounded output that the gradient reads."""
    q, k, v, grad = given["q"], given["k"], given["v"], given["grad"]
    if key_ranges.num_keys == 0:
        zeros = {"out": np.zeros_like(q), "dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
        return {**zeros, "lse": np.full((q.shape[0], q.shape[2], q.shape[1]), -np.inf)}
    visible = reference.visible_keys(key_ranges.ranges, key_ranges.num_keys)
    truth, lse = reference.attention(q, k, v, visible)
    gradients = reference.attention_backward(grad, q, k, v, visible, truth if out is None else out, lse)
    return {"out": truth, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


@pytest.mark.parametrize("D", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", RANGES)
def test_attention(calls: Any, what: str, dtype: str, D: int) -> None:
    key_ranges = RANGES[what]()
    given = attention_inputs(key_ranges, D, dtype)
    got = attend(given, key_ranges, dtype)
    assert worst(got, defined(given, key_ranges, got["out"])) <= max(2 * SPACING[dtype], LOGARITHM)
    forward = "FusedInferAttentionScore" if decodes(key_ranges, dtype) else "FlashAttentionScore"
    assert dict(calls) == ({} if what == "no keys" else {forward: 1, "FlashAttentionScoreGrad": 1})


def test_attention_with_extreme_scores(calls: Any) -> None:
    key_ranges = RANGES["causal"]()
    given = attention_inputs(key_ranges, 16, "float32", size=100.0)  # scores up to 1e4
    got, truth = attend(given, key_ranges, "float32"), defined(given, key_ranges)
    assert all(np.isfinite(x).all() for x in got.values())
    # A log-sum-exp near 1e4 is known to half its own spacing, and the gradient's weights are exp(score - it).
    assert worst(got, truth) <= np.abs(truth["lse"]).max() * SPACING["float32"]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_ring_of_blocks(calls: Any, blocks: int) -> None:
    """Causal attention from blocks of keys that are merged, and its gradient from the final log-sum-exp.

    2e-6: ten times what a float32 emulation of a ring measures, as in tests/parity/test_attention_blocks.py.
    """
    S, size = 6, 6 // blocks
    whole = causal_ranges(S, S)
    given = attention_inputs(whole, 16, "float32")
    q, k, v, grad = (tensor(given[name]) for name in ("q", "k", "v", "grad"))
    parts = []
    for begin in range(0, S, size):
        bounds = np.clip(whole.ranges - begin, 0, size).astype(np.int32)
        keys = slice(begin, begin + size)
        parts.append((keys, ascend.device_ranges(KeyRanges(bounds, size, "ranges"))))
    out = lse = None
    for keys, ranges in reversed(parts):
        part = ascend.attention(q, k[:, keys], v[:, keys], ranges, out_f32=True)
        assert part[0].dtype == ms.float32
        out, lse = part if out is None else ascend.merge_blocks(out, lse, *part)
    gradients = [
        ascend.attention_backward(grad, q, k[:, keys], v[:, keys], ranges, out, lse, out_f32=True)
        for keys, ranges in parts
    ]
    delta = ms.ops.transpose((grad * out).sum(-1), (0, 2, 1))
    keys, ranges = parts[0]
    from_delta = ascend.attention_backward(
        grad, q, k[:, keys], v[:, keys], ranges, None, lse, delta=delta, out_f32=True
    )
    assert worst(arrays(from_delta, *"qkv"), arrays(gradients[0], *"qkv")) <= 2e-6
    got = arrays((out, lse), "out", "lse")
    got["dq"] = sum(to_numpy(g[0]).astype(np.float64) for g in gradients)
    got |= {name: np.concatenate([to_numpy(g[i]) for g in gradients], 1) for i, name in ((1, "dk"), (2, "dv"))}
    assert worst(got, defined(given, whole)) <= 2e-6
    assert calls["RingAttentionUpdate"] == blocks - 1


def test_merging_nothing_with_nothing(calls: Any) -> None:
    nothing = (tensor(np.zeros((1, 3, 2, 4))), tensor(np.full((1, 2, 3), -np.inf)))
    out, lse = ascend.merge_blocks(*nothing, *nothing)
    np.testing.assert_array_equal(to_numpy(out), 0.0)
    np.testing.assert_array_equal(to_numpy(lse), -np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "D"), [(1, 16), (1, 8), (4, 16), (4, 8)])
def test_attention_over_a_cache(calls: Any, S: int, D: int, dtype: str) -> None:
    """Positions beyond the length hold NaN: nothing may read them."""
    length, capacity = 6, 11
    given = attention_inputs(causal_ranges(S, length), D, dtype)
    cached = {name: np.full((2, capacity, 2, D), np.nan) for name in "kv"}
    for name, cache in cached.items():
        cache[:, :length] = given[name]
    k, v = (tensor(cached[name], dtype) for name in "kv")
    out = ascend.cached_attention(tensor(given["q"], dtype), k, v, length)
    truth = defined(given, causal_ranges(S, length))["out"]
    assert worst(arrays(out, "out"), {"out": truth}) <= 2 * SPACING[dtype]
    fused = dtype != "float32" and (S == 1 or D == 16)
    assert dict(calls) == {"FusedInferAttentionScore" if fused else "FlashAttentionScore": 1}


def test_embedding_gradient(calls: Any) -> None:
    rng = np.random.default_rng(8)
    grad, ids = rounded(rng.normal(size=(9, 5)), "bfloat16"), rng.integers(0, 4, 9)
    table = ascend.embedding_backward(tensor(grad, "bfloat16"), ms.Tensor(ids.astype(np.int32)), 7)
    assert table.dtype == ms.float32
    assert worst(arrays(table, "table"), {"table": reference.embedding_backward(grad, ids, 7)}) <= SPACING["float32"]


@pytest.mark.parametrize("step", [1, 7])
def test_adamw_updates_in_place(calls: Any, step: int) -> None:
    rng = np.random.default_rng(9)
    master, grad, m, v = (rounded(rng.normal(size=11), "float32") for _ in range(4))
    v = np.abs(v)
    held = [tensor(x) for x in (master, grad, m, v)]
    copy = tensor(np.zeros(11), "bfloat16")
    scalars = AdamWStep(step, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=0.25)
    ascend.adamw(*held, scalars, copy=copy)
    expected = reference.adamw(master, grad, m, v, scalars)
    got = arrays((held[0], held[2], held[3], copy), "master", "m", "v", "copy")
    truth = dict(zip(("master", "m", "v"), expected, strict=True))
    truth["copy"] = rounded(got["master"], "bfloat16")
    assert worst(got, truth) <= 2 * SPACING["float32"]


class Normed(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        out, rstd = ascend.rms_norm(x, weight, 1e-5, x.dtype)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return ascend.rms_norm_backward(grad, *ctx.saved_tensors)


def test_inside_autograd(calls: Any) -> None:
    """A refused operator leaves no trace in the graph that is being recorded."""
    rng = np.random.default_rng(10)
    x, weight = rounded(rng.normal(size=(3, 8)), "float32"), rounded(rng.normal(size=8), "float32")
    run = ms.value_and_grad(lambda x, w: (Normed.apply(x * 2, w) * Normed.apply(x, w)).sum(), (0, 1))
    _, gradients = run(tensor(x), tensor(weight))
    first, second = reference.rms_norm(2 * x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    one, two = (
        reference.rms_norm_backward(second, 2 * x, weight, 1e-5),
        reference.rms_norm_backward(first, x, weight, 1e-5),
    )
    truth = {"x": 2 * one[0] + two[0], "w": one[1] + two[1]}
    # x's gradient is nearly zero, the norm hides the scale of x: compare with what the two parts are.
    scale = np.abs(2 * one[0]).max() / np.abs(truth["x"]).max()
    assert worst(arrays(gradients, "x", "w"), truth) <= 4 * max(scale, 1.0) * SPACING["float32"]
    assert calls == {"RmsNorm": 2, "RmsNormGrad": 2}


# Faults, seen by the same comparisons.


def test_a_wrong_log_sum_exp_is_seen(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key_ranges = RANGES["documents"]()
    given = attention_inputs(key_ranges, 16, "float32")
    honest = ascend_attention.visibility.statistic_order
    # The statistics of TND taken for [T, N, 8] in memory, as they are said to be.
    monkeypatch.setattr(
        ascend_attention.visibility, "statistic_order", lambda ends, heads: np.arange(len(honest(ends, heads)))
    )
    got = attend(given, key_ranges, "float32")
    truth = defined(given, key_ranges)
    assert worst({"lse": got["lse"]}, {"lse": truth["lse"]}) > 0.05
    assert worst({"out": got["out"]}, {"out": truth["out"]}) <= 2 * SPACING["float32"]


def test_causal_from_the_wrong_corner_is_seen(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key_ranges = RANGES["last of more keys"]()
    given = attention_inputs(key_ranges, 16, "float32")
    honest = ascend_attention._options
    wrong = {"sparse_mode": 2}
    monkeypatch.setattr(ascend_attention, "_options", lambda *args: {**honest(*args), **wrong})
    assert worst(attend(given, key_ranges, "float32"), defined(given, key_ranges)) > 0.1


def test_swapped_halves_are_seen(calls: Any) -> None:
    rng = np.random.default_rng(11)
    gate, up = (rounded(rng.normal(size=(3, 8)), "float32") for _ in range(2))
    swapped = arrays(ascend.swiglu(tensor(up), tensor(gate)), "out")
    assert worst(swapped, {"out": reference.swiglu(gate, up)}) > 0.1
