"""Attention over pages in both frameworks, by every implementation that this machine has, against the definition.

Errors are relative Frobenius norms against the float64 definition; the limit is eight times what float32 costs the
definition itself, and in 16 bits a few roundings of the output (tests/support/cpu_kernel_limits.py).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.inference.runner import Step
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from tests.support.cpu_attention_checks import PAGED
from tests.support.cpu_kernel_limits import FACTOR, UNITS
from tests.support.frameworks import BACKENDS

UNIT = {"float64": 2.0**-52, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SERVED = [("ms", "auto"), ("ms", "composite"), ("pt", "auto"), ("pt", "gathered"), ("pt", "composite")]


def step_of(size: int, sequences: tuple[tuple[int, int], ...], seed: int) -> tuple[Step, int]:
    """A step of (new tokens, keys) and the number of pages, which lie in a mixed order."""
    used = [-(-length // size) for _, length in sequences]
    order = np.random.default_rng(seed).permutation(np.arange(1, sum(used) + 3)).astype(np.int32)
    tables = np.zeros((len(sequences), max(used)), np.int32)
    for row, count in enumerate(used):
        tables[row, :count] = order[sum(used[:row]) : sum(used[: row + 1])]
    starts = np.cumsum([0, *(n for n, _ in sequences)]).astype(np.int32)
    places = np.concatenate([np.arange(length - n, length) for n, length in sequences]).astype(np.int32)
    owner = np.repeat(np.arange(len(sequences)), np.diff(starts))
    lengths = np.array([length for _, length in sequences], np.int32)
    slots = (tables[owner, places // size] * size + places % size).astype(np.int32)
    step = Step(
        ids=places,
        positions=places,
        scaling_lengths=places,
        slots=slots,
        starts=starts,
        lengths=lengths,
        tables=tables,
        wanted=starts[1:] - 1,
        adapters=np.zeros(len(sequences), np.int32),
    )
    return step, len(order) + 1


def run(backend: str, step: Step, arrays: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    """[out, k_pages, v_pages] of the backend's operator on q, k, v, k_pages, v_pages, float64."""
    if backend == "ms":
        ms = pytest.importorskip("mindspore")
        from telechat_twins.telechat_ms import ops

        tensors = [ms.Tensor(a).astype(getattr(ms, dtype)) for a in arrays[:3]]
        tensors += [ms.Tensor(a).astype(ops.page_dtype(getattr(ms, dtype))) for a in arrays[3:]]
        out = ops.paged_attention(*tensors, ops.place_pages(step, arrays[3].shape[1], getattr(ms, dtype)))
        return [t.astype(ms.float32 if dtype == "bfloat16" else ms.float64).asnumpy() for t in (out, *tensors[3:])]
    torch = pytest.importorskip("torch")
    from telechat_twins.pt_reference import ops

    tensors = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in arrays]
    with torch.inference_mode():
        out = ops.paged_attention(*tensors, ops.place_pages(step, arrays[3].shape[1], getattr(torch, dtype)))
    return [t.double().numpy() for t in (out, *tensors[3:])]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let an implementation of attention serve in a backend until the test ends; "gathered" is PyTorch's own without
    the C++ operator, as on a machine without a compiler."""
    chosen = []

    def select(backend: str, implementation: str) -> None:
        if implementation == "gathered":
            torch_paged = pytest.importorskip("telechat_twins.kernels.pytorch.paged")
            monkeypatch.setattr(torch_paged, "reads_pages", lambda *_: False)
            return
        if backend == "ms":
            pytest.importorskip("mindspore")
            from telechat_twins.kernels.mindspore import ops as kernels
        else:
            pytest.importorskip("torch")
            from telechat_twins.kernels.pytorch import ops as kernels
        kernels.select({"attention": implementation})
        chosen.append(kernels)

    yield select
    for kernels in chosen:
        kernels.select({})


def inputs(step: Step, pages: int, size: int, H: int, K: int, D: int, dtype: str) -> list[np.ndarray]:
    """q, k, v, k_pages, v_pages in float64, of values that ``dtype`` has. The blank page is zeros."""
    random, N = np.random.default_rng(5), len(step.ids)
    shapes = (1, N, H, D), (1, N, K, D), (1, N, K, D), (pages, size, K, D), (pages, size, K, D)
    arrays = [random.normal(size=shape) for shape in shapes]
    for room in arrays[3:]:
        room[0] = 0.0
    if dtype == "float64":
        return arrays
    import ml_dtypes

    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return [a.astype(narrow).astype(np.float64) for a in arrays]


def error(backend: str, case: Any, dtype: str) -> tuple[float, float]:
    """The error of a case and its limit; an AssertionError unless the pages hold just what was to be stored."""
    size, H, K, D, sequences = case
    step, pages = step_of(size, sequences, 3)
    arrays = inputs(step, pages, size, H, K, D, dtype)
    places = step.slots, step.starts, step.lengths, step.tables
    exact = [a.copy() for a in arrays]
    truth = reference.paged_attention(*exact, *places)
    plain = reference.paged_attention(*(a.astype(np.float32) for a in arrays), *places)
    out, *kept = run(backend, step, arrays, dtype)
    for got, expected in zip(kept, exact[3:], strict=True):
        np.testing.assert_array_equal(got, expected)
    # In float64 the definition's own rounding is as large.
    cost = 2 * UNITS * UNIT["float64"] if dtype == "float64" else FACTOR * relative_frobenius(plain, truth)
    return relative_frobenius(out, truth), max(cost, UNITS * UNIT[dtype])


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("case", PAGED, ids=lambda case: f"page{case[0]}-{len(case[4])}sequences")
@pytest.mark.parametrize(("backend", "implementation"), SERVED)
def test_paged_attention_is_its_definition(
    choose: Callable[[str, str], None], backend: str, implementation: str, case: Any, dtype: str
) -> None:
    choose(backend, implementation)
    found, limit = error(backend, case, dtype)
    assert found <= limit


def one_key_less(step: Step) -> Step:
    return dataclasses.replace(step, lengths=step.lengths - (step.lengths > np.diff(step.starts)))


def neighbours_pages(step: Step) -> Step:
    return dataclasses.replace(step, tables=np.roll(step.tables, 1, 0))


@pytest.mark.parametrize("fault", [one_key_less, neighbours_pages])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_planted_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch, backend: str, fault: Callable[[Step], Step]
) -> None:
    ops = pytest.importorskip(
        {"ms": "telechat_twins.telechat_ms.ops", "pt": "telechat_twins.pt_reference.ops"}[backend]
    )
    real = ops.place_pages
    monkeypatch.setattr(ops, "place_pages", lambda step, *more: real(fault(step), *more))
    found, limit = error(backend, PAGED[1], "float32")
    assert found > 100 * limit


def test_what_nobody_wrote_reaches_no_other_sequence() -> None:
    """NaN on pages of nobody, and beyond the end of a sequence on its own last page, stay where they are."""
    size, H, K, D, sequences = PAGED[1]
    for backend in BACKENDS:
        step, pages = step_of(size, sequences, 3)
        arrays = inputs(step, pages, size, H, K, D, "float32")
        used = np.zeros(pages * size, bool)
        for length, table in zip(step.lengths, step.tables, strict=True):
            places = np.arange(length)
            used[table[places // size] * size + places % size] = True
        used[:size] = True
        for room in arrays[3:]:
            room.reshape(-1, K, D)[~used] = np.nan
        assert np.isfinite(run(backend, step, arrays, "float32")[0]).all(), backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_gathered_keys_are_linear_in_the_sum_of_lengths(
    choose: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """One long sequence among short ones: few keys are padding, the answers are right, and those of the groups returned
    in the groups' order are found out."""
    choose(backend, {"ms": "composite", "pt": "gathered"}[backend])
    case = 4, 4, 2, 8, ((1, 12), (1, 300), (1, 7), (1, 9), (1, 40), (1, 3), (5, 20))
    step, _ = step_of(4, case[-1], 3)
    twin, dtype = (
        ("telechat_ms", pytest.importorskip("mindspore").float32)
        if backend == "ms"
        else ("pt_reference", pytest.importorskip("torch").float32)
    )
    ops = importlib.import_module(f"telechat_twins.{twin}.ops")
    gathered = sum(int(np.prod(part.slots.shape)) for part in ops.place_pages(step, 4, dtype).parts)
    assert gathered <= 1.2 * step.lengths.sum()
    found, limit = error(backend, case, "float32")
    assert found <= limit
    kind = {"ms": "mindspore", "pt": "pytorch"}[backend]
    paged = importlib.import_module(f"telechat_twins.kernels.{kind}.paged")
    monkeypatch.setattr(paged, "single_order", lambda *_: None)
    found, limit = error(backend, case, "float32")
    assert found > 100 * limit
