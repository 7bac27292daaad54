"""What a rehearsal refuses: wrong layout strings, dtypes, head counts, modes, masks and lengths turn red.

Some are caught by MindSpore's own checks on the CPU, the others by the documented constraints in the definitions; a
test does not care which, but each fault must be an error that is not "no kernel".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.config import KERNEL_OPERATORS
from telechat_twins.core.model.visibility import KeyRanges, causal_ranges
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.ascend import visibility as visibility

ms = pytest.importorskip("mindspore")
# On a CPU the pipeline of asynchronous launches spins while it waits; where it is on, the rehearsal copes with it.
ms.runtime.launch_blocking()

from telechat_twins.kernels.ascend import calls as cann  # noqa: E402
from telechat_twins.kernels.ascend import ops as ascend  # noqa: E402
from telechat_twins.kernels.ascend import rehearsal  # noqa: E402
from telechat_twins.kernels.ascend.attention import triangle  # noqa: E402


@pytest.fixture
def calls() -> Iterator[Any]:
    with rehearsal.rehearsal() as counts:
        yield counts


def ones(*shape: int, dtype: str = "float16") -> Any:
    return ms.Tensor(np.ones(shape, np.float32)).astype(getattr(ms, dtype))


def whole(*shape: int) -> Any:
    return ones(*shape, dtype="float32")


def attention(**changed: Any) -> dict[str, Any]:
    """A right call of flash attention, with what ``changed`` plants."""
    q, kv = ones(2, 5, 4, 16), ones(2, 5, 2, 16)
    right = {"query": q, "key": kv, "value": kv, "attn_mask": triangle(), "actual_seq_qlen": None}
    right |= {"actual_seq_kvlen": None, "head_num": 4, "scale_value": 0.25, "input_layout": "BSND", "sparse_mode": 3}
    return right | changed


def packed(**changed: Any) -> dict[str, Any]:
    q, kv = ones(10, 4, 16), ones(10, 2, 16)
    lengths = {"actual_seq_qlen": (3, 10), "actual_seq_kvlen": (3, 10)}
    return attention(query=q, key=kv, value=kv, input_layout="TND", **lengths) | changed


def gradient(**changed: Any) -> dict[str, Any]:
    q, statistic = ones(2, 5, 4, 16), whole(2, 4, 5, 8)
    return attention(dy=q, softmax_max=statistic, softmax_sum=statistic, attention_in=q) | changed


def inference(**changed: Any) -> dict[str, Any]:
    kv = ones(1, 32, 2, 16)
    right = {"query": ones(1, 1, 4, 16), "key": kv, "value": kv, "atten_mask": None, "actual_seq_lengths": [1]}
    right |= {"actual_seq_lengths_kv": [7], "num_heads": 4, "scale": 0.25, "input_layout": "BSND"}
    return right | {"num_key_value_heads": 2, "sparse_mode": 0, "softmax_lse_flag": False} | changed


def union(**changed: Any) -> dict[str, Any]:
    out, statistic = whole(5, 2, 64), whole(2, 4, 5, 8)
    right = {"prev_attn_out": out, "prev_softmax_max": statistic, "prev_softmax_sum": statistic}
    right |= {"cur_attn_out": out, "cur_softmax_max": statistic, "cur_softmax_sum": statistic, "layout": "SBH"}
    return right | changed


def rotation(**changed: Any) -> dict[str, Any]:
    table = whole(1, 5, 1, 16)
    return {"x": whole(2, 5, 4, 16), "cos": table, "sin": table, "mode": 0} | changed


def norm(**changed: Any) -> dict[str, Any]:
    return {"x": whole(2, 5, 8), "gamma": whole(8), "epsilon": 1e-5} | changed


def norm_gradient(**changed: Any) -> dict[str, Any]:
    x = whole(2, 5, 8)
    return {"dy": x, "x": x, "rstd": whole(2, 5, 1), "gamma": whole(8)} | changed


def update(**changed: Any) -> dict[str, Any]:
    state = {name: whole(6) for name in ("var", "m", "v", "gradient")} | {"step": ms.Tensor([0], ms.float32)}
    return state | {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "decay": 0.1, "eps": 1e-8} | changed


def activation(**changed: Any) -> dict[str, Any]:
    return {"input": whole(3, 8), "dim": -1} | changed


RIGHT: list[tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = [
    (cann.flash_attention, attention),
    (cann.flash_attention, packed),
    (cann.flash_attention_grad, gradient),
    (cann.fused_infer_attention, inference),
    (cann.ring_attention_update, union),
    (cann.rotary, rotation),
    (cann.rms_norm, norm),
    (cann.rms_norm_grad, norm_gradient),
    (cann.adamw, update),
    (cann.swiglu, activation),
]


@pytest.mark.parametrize(("operator", "arguments"), RIGHT)
def test_a_right_call_is_answered(calls: Any, operator: Any, arguments: Any) -> None:
    operator(**arguments())
    assert sum(calls.values()) == 1


square = np.zeros((5, 5), bool)
FAULTS: list[tuple[Any, Any, dict[str, Callable[[], Any]], str]] = [
    (cann.flash_attention, attention, {"input_layout": lambda: "BSDN"}, "layout"),
    (cann.flash_attention, attention, {"input_layout": lambda: "BNSD"}, "head_num"),
    (cann.flash_attention, attention, {"input_layout": lambda: "BSH"}, ""),
    (cann.flash_attention, attention, {"head_num": lambda: 8}, "head_num"),
    (cann.flash_attention, attention, {"key": lambda: ones(2, 5, 3, 16), "value": lambda: ones(2, 5, 3, 16)}, "head"),
    (cann.flash_attention, attention, {"key": lambda: ones(2, 5, 2, 16, dtype="bfloat16")}, "key"),
    (cann.flash_attention, attention, {"query": lambda: whole(2, 5, 4, 16)}, "key"),
    (cann.flash_attention, attention, {"value": lambda: ones(2, 6, 2, 16)}, "value"),
    (cann.flash_attention, attention, {"sparse_mode": lambda: 9}, "sparse_mode"),
    (cann.flash_attention, attention, {"sparse_mode": lambda: 1}, "attn_mask"),
    (cann.flash_attention, attention, {"attn_mask": lambda: None}, "attn_mask"),
    (cann.flash_attention, attention, {"attn_mask": lambda: ms.Tensor(square)}, "attn_mask"),
    (cann.flash_attention, attention, {"attn_mask": lambda: ms.Tensor(~visibility.triangle())}, "attn_mask"),
    (cann.flash_attention, attention, {"attn_mask": lambda: triangle().astype(ms.float16)}, "attn_mask"),
    (
        cann.flash_attention,
        attention,
        {"sparse_mode": lambda: 0, "attn_mask": lambda: ms.Tensor(np.zeros((5, 6), bool))},
        "attn_mask",
    ),
    (cann.flash_attention, attention, {"actual_seq_qlen": lambda: (5, 5)}, "actual_seq_qlen"),
    (cann.flash_attention, attention, {"query": lambda: ones(2, 5, 4, 8)}, ""),
    (cann.flash_attention, packed, {"actual_seq_qlen": lambda: (3, 9)}, "actual_seq_qlen"),
    (cann.flash_attention, packed, {"actual_seq_qlen": lambda: (7, 3, 10)}, "actual_seq_qlen"),
    (cann.flash_attention, packed, {"actual_seq_qlen": lambda: None}, "actual_seq_qlen"),
    (cann.flash_attention, packed, {"actual_seq_kvlen": lambda: (10, 10)}, "actual_seq_kvlen"),
    (cann.flash_attention, packed, {"sparse_mode": lambda: 0}, "sparse_mode"),
    (cann.flash_attention_grad, gradient, {"input_layout": lambda: "SBND"}, "layout"),
    (cann.flash_attention_grad, gradient, {"head_num": lambda: 2}, "head_num"),
    (cann.flash_attention_grad, gradient, {"softmax_max": lambda: whole(2, 4, 5, 1)}, "softmax_max"),
    (cann.flash_attention_grad, gradient, {"softmax_sum": lambda: ones(2, 4, 5, 8)}, "softmax_sum"),
    (cann.flash_attention_grad, gradient, {"softmax_max": lambda: whole(2, 5, 4, 8)}, "softmax_max"),
    (cann.flash_attention_grad, gradient, {"dy": lambda: ones(2, 5, 3, 16)}, "dy"),
    (cann.flash_attention_grad, gradient, {"attention_in": lambda: whole(2, 5, 4, 16)}, "attention_in"),
    (cann.fused_infer_attention, inference, {"input_layout": lambda: "BSDN"}, "layout"),
    (cann.fused_infer_attention, inference, {"input_layout": lambda: "BSH"}, ""),
    (cann.fused_infer_attention, inference, {"num_heads": lambda: 3}, "num_heads"),
    (cann.fused_infer_attention, inference, {"num_key_value_heads": lambda: 4}, "num_key_value_heads"),
    (cann.fused_infer_attention, inference, {"actual_seq_lengths_kv": lambda: [33]}, "actual_seq_lengths_kv"),
    (cann.fused_infer_attention, inference, {"query": lambda: whole(1, 1, 4, 16)}, ""),
    (
        cann.fused_infer_attention,
        inference,
        {"query": lambda: ones(1, 3, 4, 16), "actual_seq_lengths": lambda: [3]},
        "sparse_mode",
    ),
    (cann.ring_attention_update, union, {"layout": lambda: "BSH"}, "layout"),
    (cann.ring_attention_update, union, {"prev_softmax_max": lambda: whole(2, 4, 5, 1)}, ""),
    (cann.ring_attention_update, union, {"prev_attn_out": lambda: whole(5, 2, 4, 16)}, ""),
    (cann.ring_attention_update, union, {"cur_attn_out": lambda: ones(5, 2, 64)}, "cur_attn_out"),
    (
        cann.ring_attention_update,
        union,
        {name: lambda: whole(2, 5, 4, 8) for name in union() if "softmax" in name},
        "",
    ),
    (cann.ring_attention_update, union, {"cur_softmax_max": lambda: whole(2, 4, 5, 8) * -np.inf}, "cur_softmax_max"),
    (cann.rotary, rotation, {"cos": lambda: whole(1, 5, 1, 8), "sin": lambda: whole(1, 5, 1, 8)}, "cos"),
    (cann.rotary, rotation, {"x": lambda: ones(2, 5, 4, 16)}, "cos"),
    (cann.rotary, rotation, {"mode": lambda: 1}, "mode"),
    (cann.rms_norm, norm, {"gamma": lambda: whole(7)}, "gamma"),
    (cann.rms_norm, norm, {"gamma": lambda: ones(8)}, "gamma"),
    (cann.rms_norm, norm, {"x": lambda: ms.Tensor(np.ones((2, 8)))}, "x"),
    (cann.rms_norm, norm, {"epsilon": lambda: 0.0}, "epsilon"),
    (cann.rms_norm, norm, {"epsilon": lambda: "1e-5"}, ""),
    (cann.rms_norm_grad, norm_gradient, {"rstd": lambda: whole(10)}, ""),
    (cann.rms_norm_grad, norm_gradient, {"dy": lambda: ones(2, 5, 8)}, "x"),
    (cann.adamw, update, {"gradient": lambda: whole(5)}, ""),
    (cann.adamw, update, {"m": lambda: ones(6)}, "m"),
    (cann.swiglu, activation, {"input": lambda: whole(3, 7)}, ""),
    (cann.swiglu, activation, {"input": lambda: ms.Tensor(np.ones((3, 8)))}, "input"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0].__name__}-{'-'.join(f[2])}-{f[3]}")
def test_a_planted_fault_turns_red(calls: Any, fault: Any) -> None:
    operator, arguments, planted, names = fault
    with pytest.raises((TypeError, ValueError, RuntimeError), match=names or ".") as caught:
        operator(**arguments(**{name: make() for name, make in planted.items()}))
    assert "unregistered" not in str(caught.value)
    assert not calls
    operator(**arguments())  # and leaves nothing behind: the next right call is answered
    assert sum(calls.values()) == 1


def test_an_operator_that_runs_is_not_a_rehearsal(calls: Any) -> None:
    def gamma(x: Any, gamma: Any, epsilon: float) -> Any:
        return x * gamma

    with pytest.raises(RuntimeError, match="ran on the CPU"):
        rehearsal.call("RmsNorm", gamma, whole(2, 8), whole(8), 1e-5)


def test_the_refusal_of_another_operator_is_not_this_ones(calls: Any) -> None:
    def other(x: Any, gamma: Any, epsilon: float) -> Any:
        return ms.ops.swiglu(x, -1)

    with pytest.raises(RuntimeError, match="Swiglu unregistered"):
        rehearsal.call("RmsNorm", other, whole(2, 8), whole(8), 1e-5)


def test_outside_a_rehearsal_the_operator_is_called_itself() -> None:
    assert not rehearsal.rehearsing()
    assert rehearsal.call("anything", lambda a, b: a - b, 5, b=3) == 2
    with rehearsal.rehearsal() as counts:
        assert rehearsal.rehearsing() and not counts
        with pytest.raises(RuntimeError, match="already"), rehearsal.rehearsal():
            pass
    assert not rehearsal.rehearsing()


def test_every_operator_is_served_or_says_why_not() -> None:
    assert set(ascend.CANN_OPERATORS) == set(KERNEL_OPERATORS)
    others = {name: operator.reason for name, operator in ascend.CANN_OPERATORS.items() if not operator.serves}
    assert list(others) == ["linear", "cross_entropy"] and all(others.values())


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (
            lambda q, k: ascend.attention(q, ones(2, 5, 3, 16), ones(2, 5, 3, 16), causal_ranges(5, 5)),
            ValueError,
            "q: 4",
        ),
        (lambda q, k: ascend.attention(q, whole(2, 5, 2, 16), k, causal_ranges(5, 5)), TypeError, "k: Float32"),
        (lambda q, k: ascend.attention(q, k, ones(2, 4, 2, 16), causal_ranges(5, 5)), ValueError, "v: "),
        (lambda q, k: ascend.attention(q, k, k, causal_ranges(5, 6)), ValueError, "key_ranges: "),
        (lambda q, k: ascend.attention_backward(q, q, k, k, causal_ranges(5, 5), None, k), ValueError, "delta: "),
        (lambda q, k: ascend.cached_attention(q, k, k, 6), ValueError, "length: 6"),
        (lambda q, k: ascend.rms_norm(q, ms.Tensor(np.ones(16)), 1e-5, ms.float64), TypeError, "float"),
        (lambda q, k: ascend.rms_norm_backward(k, q, whole(16), whole(40)), ValueError, "grad: "),
        (lambda q, k: ascend.swiglu(q, k), ValueError, "up: "),
        (lambda q, k: ascend.adamw(q, q, q, q, AdamWStep(1, 1e-3, 0.9, 0.95, 1e-8, 0.1)), TypeError, "master: "),
        (lambda q, k: ascend.merge_blocks(q, k, k, k), ValueError, "more: "),
    ],
)
def test_mistakes_are_named(call: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=f"(?i){names}"):
        call(ones(2, 5, 4, 16), ones(2, 5, 2, 16))


DOCUMENTS = np.array([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2, 3]])


def test_plan_of_documents() -> None:
    plan = visibility.plan(causal_ranges(7, 7, DOCUMENTS), 2)
    assert (plan.layout, plan.sparse_mode) == ("TND", 3)
    assert plan.query_ends == plan.key_ends == (2, 5, 7, 8, 11, 13, 14)
    # The last three queries: the first document of row 0 has none, two of row 1 have none.
    plan = visibility.plan(causal_ranges(3, 7, DOCUMENTS), 2)
    assert plan.query_ends == (0, 1, 3, 3, 5, 6)
    assert plan.key_ends == (2, 5, 7, 11, 13, 14)


def test_more_documents_than_one_call_takes_are_told_by_a_mask() -> None:
    doc_ids = np.arange(1500)[None] // 1
    plan = visibility.plan(causal_ranges(1500, 1500, doc_ids), 1)
    assert plan.layout == "BSND" and plan.mask is not None and plan.blind is None
    np.testing.assert_array_equal(plan.mask[0], ~np.eye(1500, dtype=bool))


def test_plan_of_runs_names_the_queries_without_keys() -> None:
    plan = visibility.plan(KeyRanges(np.int32([[[0, 2], [1, 3], [2, 2]]]), 3, "ranges"), 2)
    assert plan.blind is not None and plan.mask is not None
    np.testing.assert_array_equal(plan.blind, [[False, False, True]])
    np.testing.assert_array_equal(plan.mask[0], [[False, False, True], [True, False, False], [True] * 3])
    with pytest.raises(ValueError, match="key_ranges: 2 rows"):
        visibility.plan(causal_ranges(7, 7, DOCUMENTS), 3)


def test_statistic_order_is_head_by_head_inside_a_document() -> None:
    order = visibility.statistic_order((2, 5), 2)
    stored = np.array(["d0h0q0", "d0h0q1", "d0h1q0", "d0h1q1", *(f"d1h{h}q{q}" for h in (0, 1) for q in (2, 3, 4))])
    wanted = [f"d{int(q > 1)}h{h}q{q}" for q in range(5) for h in (0, 1)]
    np.testing.assert_array_equal(stored[order], wanted)
