"""Whole models on Ascend's code path in a rehearsal: training, growth, generation, cache pages and an optimizer trace.

The rehearsal and its limits are described in test_rehearsal.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.inference.runner import sequence_groups
from telechat_twins.core.parity.bounds import compare_tensors, relative_frobenius
from telechat_twins.kernels.dispatch import Candidate
from tests.parity.test_growth import target_of
from tests.parity.test_optimizer_trace import check_trace, run_trace
from tests.parity.test_paged_attention import error as page_error
from tests.parity.test_paged_attention import step_of
from tests.parity.test_rehearsal import DTYPES, SPACING, tensor
from tests.parity.test_ring_pages import error as ring_error
from tests.parity.test_twins import CONFIG, batch, weights
from tests.support.cpu_attention_checks import PAGED
from tests.support.engine_support import Feed
from tests.support.growing import FAMILIES, grow, strong
from tests.support.growing import batch as batch_of

ms = pytest.importorskip("mindspore")

from telechat_twins.kernels.ascend import ops as ascend  # noqa: E402
from telechat_twins.kernels.ascend import rehearsal  # noqa: E402
from telechat_twins.kernels.mindspore import ops as dispatch  # noqa: E402
from telechat_twins.telechat_ms import forward  # noqa: E402
from telechat_twins.telechat_ms.generate import Runner  # noqa: E402


@contextmanager
def cann() -> Iterator[Any]:
    """A rehearsal in which every operator that CANN has is served by it, and how often each was called."""
    others = {name: "composite" for name, operator in ascend.CANN_OPERATORS.items() if not operator.serves}
    try:
        with rehearsal.rehearsal() as counts:
            choices = dispatch.select(others, "Ascend")
            served = {name: choice.implementation for name, choice in choices.items() if name not in others}
            assert set(served.values()) == {"cann"}, served
            yield counts
    finally:
        dispatch.select({}, None)


@pytest.fixture
def on_cann() -> Iterator[Any]:
    with cann() as counts:
        yield counts


@pytest.fixture(scope="module", params=["one document a row", "documents"])
def truth(request: pytest.FixtureRequest) -> tuple[bool, dict[str, Any]]:
    """Whether documents are isolated, and the run of the CPU's plain operators in float64."""
    isolated = request.param == "documents"
    plain = [name for name, found in dispatch.candidates("CPU").items() if Candidate("composite") in found]
    dispatch.select(dict.fromkeys(plain, "composite"), "CPU")
    expected = forward.run(CONFIG, weights().__getitem__, batch(isolated), "fp64", grads=True)
    dispatch.select({}, None)
    return isolated, expected


def test_training_on_ascends_code_path(truth: tuple[bool, dict[str, Any]], on_cann: Any) -> None:
    """Loss and gradients in float32; the limits are those of tests/parity/test_twins.py for float32 on the CPU."""
    isolated, expected = truth
    got = forward.run(CONFIG, weights().__getitem__, batch(isolated), "fp32", grads=True)
    assert abs(got["loss"] - expected["loss"]) <= 1e-6 * abs(expected["loss"])
    assert relative_frobenius(got["logits"], expected["logits"]) <= 2e-6
    assert compare_tensors(got["grads"], expected["grads"]).worst() <= 1e-5
    layers = CONFIG.num_layers
    assert on_cann["FlashAttentionScore"] == on_cann["FlashAttentionScoreGrad"] == layers
    assert on_cann["Swiglu"] == on_cann["SwigluGrad"] == layers
    assert on_cann["RmsNorm"] + on_cann["AddRmsNorm"] == on_cann["RmsNormGrad"] == 2 * layers + 1
    assert on_cann["RotaryPositionEmbedding"] + on_cann["RotaryPositionEmbeddingGrad"] == 4 * layers
    assert on_cann["EmbeddingDenseBackward"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_growing_model_on_ascends_code_path(family: str) -> None:
    """Half-way between two sizes, where every kind of mask counts, against the CPU's plain operators in float64."""
    source = FAMILIES[family]
    plan, grown = grow(source, target_of(source, "all"), strong(source))
    assert plan.config.growth is not None
    half = replace(plan.config, growth=replace(plan.config.growth, mask=0.5))
    given = batch_of(half)
    plain = [name for name, found in dispatch.candidates("CPU").items() if Candidate("composite") in found]
    dispatch.select(dict.fromkeys(plain, "composite"), "CPU")
    expected = forward.run(half, grown.__getitem__, given, "fp64", grads=True)
    with cann() as counts:
        got = forward.run(half, grown.__getitem__, given, "fp32", grads=True)
    assert relative_frobenius(got["logits"], expected["logits"]) <= 2e-6
    assert compare_tensors(got["grads"], expected["grads"]).worst() <= 1e-5
    assert counts["FlashAttentionScore"] == counts["FlashAttentionScoreGrad"] == half.num_layers
    # A mask weights the statistics of a norm, and CANN adds to the stream only before a norm that has none.
    assert counts["AddRmsNorm"] == 0
    norms = 2 * half.num_layers + 1
    assert counts["RmsNorm"] == counts["RmsNormGrad"] == (norms if half.norm == "rmsnorm" else 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_generation_on_ascends_code_path(on_cann: Any, precision: str) -> None:
    """A prompt and steps with the cache against the same on the CPU's own path."""
    prompt, steps = [5, 9, 200, 31, 7], [11, 300, 2]

    def logits() -> np.ndarray:
        fed = Feed(Runner(CONFIG, weights().__getitem__, 3, precision), 16)
        return np.stack([fed.extend(prompt), *(fed.extend([token]) for token in steps)])

    got = logits()
    attended = on_cann["FlashAttentionScore"] + on_cann["FusedInferAttentionScore"]
    assert on_cann["InplaceIndexCopy"] == 2 * (1 + len(steps)) * CONFIG.num_layers
    assert attended == (1 + len(steps)) * CONFIG.num_layers
    assert precision == "fp32" or on_cann["FusedInferAttentionScore"] > 0
    dispatch.select({}, None)
    # Two paths of float16 round at different places: each is within a few roundings of the other.
    assert relative_frobenius(got, logits()) <= (2e-6 if precision == "fp32" else 4 * SPACING["float16"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_on_ascends_code_path(on_cann: Any, dtype: str) -> None:
    """Single queries by CANN's block tables in 16 bits; in float32, and for pieces of prompts, by gathered keys in
    groups of similar length; stored in place."""
    for case in (case for case in PAGED if case[0] % 16 == 0):
        before = on_cann.copy()
        found, limit = page_error("ms", case, dtype)
        assert found <= limit
        called = on_cann - before
        singles = sum(n == 1 for n, _ in case[4])
        assert called["InplaceIndexCopy"] == 2
        in_place = dtype != "float32" and singles > 0
        groups = len(sequence_groups(step_of(case[0], case[4], 0)[0]))
        assert called["FusedInferAttentionScore"] == in_place
        assert called["FlashAttentionScore"] == (len(case[4]) - singles if in_place else groups)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_of_a_ring_on_ascends_code_path(on_cann: Any, dtype: str) -> None:
    """Every rank's keys by CANN's attention, merged by its own operator; a blank page stays blank."""
    for case in (case for case in PAGED if case[0] % 16 == 0):
        before = on_cann.copy()
        found, limit = ring_error("ms", case, dtype)
        assert found <= limit
        called = on_cann - before
        assert called["InplaceIndexCopy"] and called["FlashAttentionScore"] and called["RingAttentionUpdate"]


def test_pages_of_a_size_that_cann_refuses_are_gathered(on_cann: Any) -> None:
    assert page_error("ms", PAGED[0], "float16")[0] <= page_error("ms", PAGED[0], "float16")[1]
    with pytest.raises(ValueError, match="block_size: 4; needs a multiple of 16"):
        queries, pages = tensor(np.zeros((1, 1, 2, 16)), "float16"), tensor(np.zeros((3, 4, 2, 16)), "float16")
        ascend.single_queries(queries, pages, pages, [1], ms.Tensor(np.ones((1, 1), np.int32)))


def test_an_optimizer_trace_on_ascends_code_path(on_cann: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of the production trainer with clipping and schedule, held to the golden's own tolerances."""
    select = dispatch.select  # the trainer asks for the device that MindSpore computes on, which is the CPU
    monkeypatch.setattr(dispatch, "select", lambda wanted=None, device="Ascend": select(wanted, device))
    check_trace(run_trace("ms"))
    assert {choice.implementation for choice in dispatch.choices().values()} == {"cann", "composite"}
    assert on_cann["AdamW"] > 0 and on_cann["FlashAttentionScoreGrad"] > 0
