"""The Triton kernels under Triton's interpreter on the CPU, against the definitions in float64.

Whether kernels are interpreted is settled when triton is first imported, so tests/unit/kernels/test_triton.py runs this
file in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/unit/kernels/test_triton.py runs this file in a process of its own", allow_module_level=True)

import torch
from triton.runtime import interpreter

import telechat_twins.kernels.triton.adamw as adamw_module
import telechat_twins.kernels.triton.attention as attention_module
import telechat_twins.kernels.triton.attention_backward as attention_backward_module
import telechat_twins.kernels.triton.cross_entropy as cross_entropy_module
import telechat_twins.kernels.triton.embedding as embedding_module
import telechat_twins.kernels.triton.norm as norm_module
import telechat_twins.kernels.triton.pointwise as pointwise_module
import telechat_twins.kernels.triton.rope as rope_module
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.triton import ops
from tests.support import triton_cases as cases
from tests.support.triton_cases import ATTENTION_LIMITS, EPS, LIMITS, Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _true_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton 3.7's interpreter keeps bfloat16 as integers: it cuts bits off instead of rounding to the nearest, and
    tl.dot multiplies the integers. Here it rounds, and widens before multiplying, as every device does."""
    bfloat16 = interpreter.tl.bfloat16
    plain_dot, plain_cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        def wide(x: Any) -> Any:
            return cast(self, x, interpreter.tl.float32) if x.dtype.scalar == bfloat16 else x

        return plain_dot(self, wide(a), wide(b), *rest)

    def cast(self: Any, x: Any, to: Any) -> Any:
        if to.scalar == bfloat16 and x.dtype.scalar == interpreter.tl.float32:
            return interpreter.TensorHandle(x.data.astype(ml_dtypes.bfloat16).view(np.uint16), bfloat16)
        return plain_cast(self, x, to)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    with np.errstate(over="ignore"):  # 1 / (1 + exp(1e4)) is the 0 that is meant
        yield


def within(found: dict[str, float], limit: float) -> None:
    assert found and all(error <= limit for error in found.values()), found


# Length 1, prime lengths, hidden sizes beside a multiple of the block (32 of the interpreter's), rows in one tile and
# in several passes (above 64 channels).
SHAPES = [(1, 2), (1, 3, 37), (5, 64), (2, 7, 101)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", [cases.rms_norm, cases.add_rms_norm, cases.layer_norm])
def test_norms(operator: Callable, shape: tuple[int, ...], masked: bool) -> None:
    # Two channels leave a gradient that is the small difference of large terms.
    within(operator(ops, Case(), shape, masked), LIMITS[torch.float32] * (100 if shape[-1] == 2 else 1))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("operator", [cases.rms_norm, cases.add_rms_norm, cases.layer_norm])
def test_norms_in_two_bytes_and_from_views(operator: Callable, dtype: torch.dtype) -> None:
    within(operator(ops, Case(dtype, spaced=True), (3, 37), True), LIMITS[dtype])
    within(operator(ops, Case(dtype), (3, 70), False), LIMITS[dtype])


def test_rms_norm_of_large_and_of_no_channels() -> None:
    within(cases.rms_norm(ops, Case(), (3, 37), scale=1e4), LIMITS[torch.float32])
    out, rstd = ops.rms_norm(torch.ones(2, 5), torch.ones(5), 1e-5, None, torch.zeros(5))
    assert not out.any() and torch.isfinite(rstd).all()
    out, rstd = ops.rms_norm(torch.zeros(0, 5), torch.ones(5), 1e-5)
    assert out.shape == (0, 5) and rstd.shape == (0,)
    assert not ops.rms_norm_backward(torch.zeros(0, 5), torch.zeros(0, 5), torch.ones(5), rstd)[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("xpos", [False, True])
def test_rope(dtype: torch.dtype, xpos: bool) -> None:
    within(cases.rope(ops, Case(dtype), 2, 5, 3, 1, 12, xpos), LIMITS[dtype])
    within(cases.rope(ops, Case(dtype, spaced=True), 1, 1, 2, 2, 2, xpos), LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise(dtype: torch.dtype) -> None:
    for shape in ((1,), (7, 11), (3, 37)):
        within(cases.swiglu(ops, Case(dtype), shape), LIMITS[dtype])
        within(cases.gelu(ops, Case(dtype), shape), LIMITS[dtype])
    within(cases.swiglu(ops, Case(dtype, spaced=True), (2, 3, 37)), LIMITS[dtype])
    within(cases.gelu(ops, Case(dtype, spaced=True), (3, 37)), LIMITS[dtype])
    within(cases.swiglu(ops, Case(dtype), (5, 7), scale=1e4), LIMITS[dtype])
    within(cases.gelu(ops, Case(dtype), (5, 7), scale=1e4), LIMITS[dtype])


ATTENTION = [
    ((1, 2, 2, 1, 1, 2), "causal"),
    ((1, 1, 19, 2, 1, 8), "causal"),  # one new query on a cache
    ((2, 37, 37, 2, 1, 8), "documents"),
    ((1, 31, 43, 4, 4, 8), "causal"),
    ((1, 37, 37, 2, 2, 24), "full"),
    ((1, 23, 37, 8, 1, 8), "ragged"),
    ((2, 21, 18, 2, 1, 8), "empty"),
    ((1, 17, 17, 2, 2, 8), "nothing"),
]


@pytest.mark.parametrize(("sizes", "kind"), ATTENTION)
def test_attention(sizes: tuple, kind: str) -> None:
    within(cases.attention(ops, Case(), sizes, kind), ATTENTION_LIMITS[torch.float32] * (10 if sizes[1] == 2 else 1))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_attention_in_two_bytes_and_from_views(dtype: torch.dtype) -> None:
    sizes = (1, 19, 19, 2, 1, 16)
    within(cases.attention(ops, Case(dtype, spaced=True), sizes, "causal"), ATTENTION_LIMITS[dtype])
    within(cases.attention(ops, Case(dtype), sizes, "ragged", out_f32=True), ATTENTION_LIMITS[dtype])


def test_attention_of_extreme_scores() -> None:
    found = cases.attention(ops, Case(), (1, 19, 19, 2, 1, 8), "causal", scale=1e4)
    # Scores near 1e4 carry an absolute error of 1e4 * 2^-24 = 6e-4, which the exponential turns into a relative one.
    within({name: found[name] for name in ("out", "log_sum_exp", "dv")}, 2e-3)
    # Every row is decided, so the true dq and dk are next to nothing; no NaN is what can be asked.
    assert np.isfinite([found["dq"], found["dk"]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ring_of_two_blocks(dtype: torch.dtype) -> None:
    within(cases.ring(ops, Case(dtype), (1, 21, 2, 1, 8)), ATTENTION_LIMITS[dtype])


def test_merge_of_nothing() -> None:
    out, lse = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), float("-inf"))
    torch.manual_seed(0)
    some, some_lse = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3)
    merged, merged_lse = ops.merge_blocks(out, lse, out, lse)
    assert not merged.any() and torch.isneginf(merged_lse).all()
    merged, merged_lse = ops.merge_blocks(out, lse, some, some_lse)
    torch.testing.assert_close(merged, some, rtol=0, atol=0)
    torch.testing.assert_close(merged_lse, some_lse, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype: torch.dtype) -> None:
    def check(N: int, C: int, **options: Any) -> None:
        found = cases.cross_entropy(ops, Case(dtype, spaced=options.pop("spaced", False)), N, C, **options)
        grad = found.pop("grad")
        within(found, LIMITS[torch.float32])  # log-sum-exp and the picked logit are float32
        assert grad <= 2 * LIMITS[dtype], grad

    check(1, 1)
    check(7, 67, z_loss=1e-2)
    check(6, 64, first=13, real=50, spaced=True)
    check(3, 37, first=64, real=0)
    check(5, 33, scale=1e4)
    check(5, 33, in_place=False)


def test_embedding() -> None:
    for dtype in DTYPES:
        within(cases.embedding(ops, Case(dtype, spaced=True), 23, 37, 11), LIMITS[torch.float32])
    within(cases.embedding(ops, Case(), 1, 1, 1), LIMITS[torch.float32])
    within(cases.embedding(ops, Case(), 19, 33, 3, same=True), LIMITS[torch.float32])
    beside = ops.embedding_backward(torch.ones(3, 4), torch.tensor([-5, 1, 9]), 2)
    assert beside.tolist() == [[0.0] * 4, [1.0] * 4]
    torch.manual_seed(0)
    table, ids = torch.randn(5, 3), torch.tensor([[4, 0], [0, 2]])
    torch.testing.assert_close(ops.embedding(table, ids), table[ids], rtol=0, atol=0)
    assert not ops.embedding_backward(torch.ones(0, 4), torch.zeros(0, dtype=torch.int64), 2).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw(dtype: torch.dtype) -> None:
    for count, step in ((1, 1), (67, 3), (96, 1000)):
        within(cases.adamw(ops, Case(dtype), count, step, scale_tensor=count == 67), LIMITS[torch.float32])


def alter(module: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict, dict], None]) -> None:
    """Launch the kernels of ``module`` with arguments that ``change`` has tampered with."""
    plain = module.launch

    def tampered(kernel: Any, work: int, tiles: Any, arguments: dict, **constants: Any) -> None:
        arguments = dict(arguments)
        change(arguments, constants)
        plain(kernel, work, tiles, arguments, **constants)

    monkeypatch.setattr(module, "launch", tampered)


def test_a_dropped_tail_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row, column or element is left out, in every operator. What is not written is poisoned."""
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        x = empty(*args, **options)
        return x.fill_(3.0) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    modules = {
        "N": (norm_module, cross_entropy_module),
        "positions": (rope_module,),
        "columns": (pointwise_module,),
        "V": (embedding_module,),
        "count": (adamw_module,),
        "T": (attention_module, attention_backward_module),
    }

    def shorten(arguments: dict, constants: dict) -> None:
        for name in modules:
            if name in arguments:
                arguments[name] -= 1

    for name in modules:
        for module in modules[name]:
            alter(module, monkeypatch, shorten)
    wrong = {
        "rms_norm": cases.rms_norm(ops, Case(), (3, 37)),
        "layer_norm": cases.layer_norm(ops, Case(), (2, 101)),
        "rope": cases.rope(ops, Case(), 1, 5, 2, 1, 8),
        "swiglu": cases.swiglu(ops, Case(), (1, 37)),
        "gelu": cases.gelu(ops, Case(), (1, 37)),
        "attention": cases.attention(ops, Case(), (1, 19, 19, 2, 1, 8), "full"),
        "cross_entropy": cases.cross_entropy(ops, Case(), 7, 37),
        "embedding": cases.embedding(ops, Case(), 19, 33, 3),
        "adamw": cases.adamw(ops, Case(), 67),
    }
    for name, found in wrong.items():
        assert max(found.values()) > 100 * LIMITS[torch.float32], (name, found)


def test_swapped_halves_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(arguments: dict, constants: dict) -> None:
        a, b = arguments["q_ptr"].chunk(2, -1)
        arguments["q_ptr"] = torch.cat((b, a), -1)

    alter(rope_module, monkeypatch, swap)
    found = cases.rope(ops, Case(), 1, 5, 2, 1, 8)
    assert min(found["q"], found["dq"]) > 0.1 and max(found["k"], found["dk"]) <= LIMITS[torch.float32]


def test_a_wrong_sign_of_the_backward_rotation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    alter(rope_module, monkeypatch, lambda arguments, constants: constants.update(INVERSE=False))
    found = cases.rope(ops, Case(), 1, 5, 2, 1, 8)
    assert min(found["dq"], found["dk"]) > 0.1 and max(found["q"], found["k"]) <= LIMITS[torch.float32]


def test_a_missing_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def show_all(arguments: dict, constants: dict) -> None:
        shown = arguments["ranges_ptr"].clone() if "ranges_ptr" in arguments else None
        if shown is not None:
            shown[..., 0], shown[..., 1] = 0, arguments["T"]
            arguments["ranges_ptr"] = shown

    with monkeypatch.context() as patch:
        alter(attention_module, patch, show_all)
        assert min(cases.attention(ops, Case(), (1, 19, 19, 2, 1, 8), "causal").values()) > 1e-2
    with monkeypatch.context() as patch:
        alter(attention_backward_module, patch, show_all)
        found = cases.attention(ops, Case(), (1, 19, 19, 2, 1, 8), "causal")
        assert min(found["dq"], found["dk"], found["dv"]) > 1e-2 and found["out"] <= ATTENTION_LIMITS[torch.float32]
    with monkeypatch.context() as patch:
        alter(norm_module, patch, lambda arguments, constants: constants.update(MASKED=False))
        assert min(cases.rms_norm(ops, Case(), (3, 37), True).values()) > 1e-2


def test_a_wrong_log_sum_exp_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cases.ring(ops, Case(), (1, 21, 2, 1, 8), own_lse=True)
    assert min(found["dq"], found["dk"], found["dv"]) > 1e-2 and found["out"] <= ATTENTION_LIMITS[torch.float32]

    def shift(arguments: dict, constants: dict) -> None:
        if "factor" in arguments:  # the backward
            arguments["lse_ptr"] = arguments["lse_ptr"] + 0.01

    alter(cross_entropy_module, monkeypatch, shift)
    found = cases.cross_entropy(ops, Case(), 7, 37)
    assert found["grad"] > 1e-3 and found["log_sum_exp"] <= LIMITS[torch.float32]


def test_kv_heads_of_another_group_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(arguments: dict, constants: dict) -> None:
        arguments["k_ptr"] = arguments["k_ptr"].roll(1, 2)

    alter(attention_module, monkeypatch, other)
    found = cases.attention(ops, Case(), (1, 19, 19, 4, 2, 8), "causal")
    assert min(found["out"], found["log_sum_exp"]) > 1e-2


Q, KV = torch.zeros(2, 5, 4, 8), torch.zeros(2, 6, 2, 8)
SEEN = cases.on_device(cases.ranges("causal", 2, 5, 6), 6, Case())
ROWS, CHANNELS = torch.zeros(3, 8), torch.zeros(8)
LOGITS, TARGETS = torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64)
TABLE = torch.zeros(1, 5, 1, 4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ops.rms_norm(ROWS.numpy(), CHANNELS, EPS), TypeError, "x: got ndarray, needs a torch tensor"),
        (lambda: ops.rms_norm(ROWS.double(), CHANNELS, EPS), TypeError, "x: got dtype torch.float64, needs"),
        (lambda: ops.rms_norm(ROWS, CHANNELS[1:], EPS), ValueError, r"weight: got shape \(7,\), needs \(8\)"),
        (lambda: ops.rms_norm(ROWS, CHANNELS.to("meta"), EPS), ValueError, "weight: got a tensor on meta, needs"),
        (lambda: ops.rms_norm(ROWS, CHANNELS, EPS, torch.int8), TypeError, "out_dtype: got torch.int8"),
        (lambda: ops.rms_norm(ROWS, CHANNELS, EPS, mask=ROWS), ValueError, r"mask: got shape \(3, 8\)"),
        (lambda: ops.rms_norm(ROWS[:, :0], CHANNELS[:0], EPS), ValueError, "x: got shape .* at least one channel"),
        (lambda: ops.add_rms_norm(ROWS, ROWS[:2], CHANNELS, EPS), ValueError, "residual: got shape"),
        (lambda: ops.layer_norm(ROWS, CHANNELS, ROWS, EPS), ValueError, "bias: got shape"),
        (lambda: ops.rms_norm_backward(ROWS, ROWS, CHANNELS, CHANNELS), ValueError, r"rstd: got .* needs \(3\)"),
        (lambda: ops.rope_qk(Q[..., :7], Q[..., :7], TABLE, TABLE), ValueError, "q: got head dim 7"),
        (lambda: ops.rope_qk(Q, KV, TABLE, TABLE), ValueError, "k: got shape"),
        (lambda: ops.rope_qk(Q, Q, TABLE, TABLE.half()), TypeError, "sin: got dtype torch.float16"),
        (lambda: ops.rope_qk(Q, Q, TABLE.expand(3, 5, 1, 4), TABLE), ValueError, "sin: got shape"),
        (lambda: ops.swiglu(ROWS, ROWS[:2]), ValueError, "up: got shape"),
        (lambda: ops.gelu_backward(LOGITS, ROWS), ValueError, "grad: got shape"),
        (lambda: ops.attention(Q, KV[:, :, :, :6], KV, SEEN), ValueError, "k: got shape"),
        (lambda: ops.attention(Q[:, :, :3], KV, KV, SEEN), ValueError, "k: got 2 kv heads, needs a divisor of the 3"),
        (lambda: ops.attention(Q, KV.half(), KV, SEEN), TypeError, "k: got dtype torch.float16, needs torch.float32"),
        (lambda: ops.attention(Q, KV, KV[:, :5], SEEN), ValueError, "v: got shape"),
        (lambda: ops.attention(Q, KV[:, :5], KV[:, :5], SEEN), ValueError, "key_ranges.num_keys: got 6, needs 5"),
        (lambda: ops.attention(Q[:, :4], KV, KV, SEEN), ValueError, "key_ranges.ranges: got shape"),
        (lambda: ops.attention_backward(Q, Q, KV, KV, SEEN, None, Q[..., 0]), ValueError, "log_sum_exp: got shape"),
        (
            lambda: ops.attention_backward(Q, Q, KV, KV, SEEN, None, torch.zeros(2, 4, 5)),
            ValueError,
            "out: got None",
        ),
        (lambda: ops.merge_blocks(Q, Q, Q, Q), ValueError, "log_sum_exp: got shape"),
        (lambda: ops.cross_entropy_forward(LOGITS, TARGETS.float(), 0, 7), TypeError, "targets: got dtype"),
        (lambda: ops.cross_entropy_forward(LOGITS, TARGETS, 0, 8), ValueError, "real: got 8, needs 0 to 7"),
        (
            lambda: ops.cross_entropy_backward(LOGITS.T.contiguous().T, TARGETS, 0, 7, CHANNELS[:3]),
            ValueError,
            "logits: got strides",
        ),
        (lambda: ops.embedding_backward(ROWS, TARGETS[:2], 4), ValueError, r"ids: got shape \(2,\)"),
        (
            lambda: ops.adamw(CHANNELS, ROWS, CHANNELS, CHANNELS, AdamWStep(1, 0.1, 0.9, 0.9, 0.1, 0.1)),
            ValueError,
            "grad: got shape",
        ),
        (
            lambda: ops.adamw(*[CHANNELS] * 4, AdamWStep(1, 0.1, 0.9, 0.9, 0.1, 0.1), None, CHANNELS),
            ValueError,
            "device_scale: got shape",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
