"""Operators replayed alone: every one in both twins against its float64 definition, and the definition against itself.

A definition's gradients are held against differences of its own outputs in float64: <grad, f(x + t d) - f(x - t d)> /
2t is <f'(x)^T grad, d> but for t^2.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.locate.case import Case, check_case, read_case, write_case
from telechat_twins.core.parity.locate.operators import OPERATORS
from telechat_twins.core.parity.locate.shrink import axis_size, shrink, take
from telechat_twins.core.parity.locate.verdict import judge
from telechat_twins.kernels.replay import define
from tests.support.frameworks import BACKENDS
from tests.support.operator_cases import random_case


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp", "fp64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_right_alone(backend: str, precision: str) -> None:
    for operator in OPERATORS:
        for optional in (True, False):
            verdict = judge(random_case(operator, 1, precision, optional), backend)
            assert verdict.holds, verdict.text()
            made = load(backend, "replay").replay(verdict.case).all()
            assert set(made) == set(define(verdict.case).all()), operator


def test_definitions_have_the_gradients_of_their_outputs() -> None:
    t = 1e-5
    for operator, spec in OPERATORS.items():
        for optional in (True, False):
            case = random_case(operator, 2, "fp64", optional)
            case = replace(
                case, inputs={n: a if a.dtype == np.int32 else a.astype(float) for n, a in case.inputs.items()}
            )
            grads = define(case).grads
            for name in (n for n in spec.derived if n in case.inputs):
                d = np.random.default_rng(3).normal(size=case.inputs[name].shape)
                ends = [
                    define(replace(case, inputs={**case.inputs, name: case.inputs[name] + s * t * d})).outputs
                    for s in (1, -1)
                ]
                slope = sum(float((case.grads[n] * (ends[0][n] - ends[1][n])).sum()) for n in case.grads) / (2 * t)
                assert slope == pytest.approx(float((grads[name] * d).sum()), rel=1e-6, abs=1e-7), (operator, name)


def test_a_failing_case_shrinks_to_its_core(tmp_path) -> None:
    """One wrong channel, seen in one row at one position, is all that is left, and the file holds it."""
    case = random_case("rms_norm", 5)

    def fails(candidate: Case) -> bool:
        """The norm ignores a gain of its own: wrong wherever that gain meets a number."""
        gains = candidate.inputs["weight"]
        return bool(
            np.isin(case.inputs["weight"][7], gains) and np.isin(case.inputs["x"][1, 4, 7], candidate.inputs["x"])
        )

    small = shrink(case, fails)
    assert small.inputs["x"].shape == (1, 1, 1) and small.inputs["weight"] == case.inputs["weight"][7]
    write_case(tmp_path / "case.safetensors", small)
    again = read_case(tmp_path / "case.safetensors")
    assert again.settings == small.settings and all((again.inputs[n] == x).all() for n, x in small.inputs.items())


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "adamw"])
def test_every_axis_can_be_cut(operator: str) -> None:
    """The definition of a cut case is right in its own sizes: shapes fit, labels stay in the vocabulary."""
    case = random_case(operator, 6)
    for axis in OPERATORS[operator].axes:
        labels = [] if axis.relabel is None else np.unique(case.inputs[axis.relabel][case.inputs[axis.relabel] >= 0])
        keep = np.union1d(np.arange(0, axis_size(case, axis), 2), labels).astype(int)
        cut = take(case, axis, keep)
        assert cut is not None and axis_size(cut, axis) == len(keep) < axis_size(case, axis) + (
            axis.relabel is not None
        )
        check_case(cut, operator)
        define(cut)
        case = cut


def test_hostile_cases_are_refused(tmp_path) -> None:
    case = random_case("attention", 7)
    broken = [
        replace(case, inputs={n: x for n, x in case.inputs.items() if n != "k"}),
        replace(case, inputs={**case.inputs, "k": case.inputs["k"][:, :-1]}),
        replace(case, inputs={**case.inputs, "q": case.inputs["q"][:, :, :-1]}),
        replace(case, inputs={**case.inputs, "q": case.inputs["q"].astype(np.int32)}),
        replace(case, inputs={**case.inputs, "z": case.inputs["q"]}),
        replace(case, settings={"eps": 1.0}),
        replace(random_case("embedding"), settings={}),
        replace(random_case("embedding"), settings={"multiplier": "1"}),
        replace(
            random_case("embedding"), inputs={**random_case("embedding").inputs, "ids": np.full((2, 9), 99, np.int32)}
        ),
    ]
    for number, one in enumerate(broken):
        path = tmp_path / f"{number}.safetensors"
        write_case(path, one)
        with pytest.raises(UserError, match=str(path)):
            read_case(path)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "0.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_case(tmp_path / "x.safetensors")
