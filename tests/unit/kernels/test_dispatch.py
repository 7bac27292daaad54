"""Which implementation serves: the best, the one asked for, or an error; never another one in silence."""

from __future__ import annotations

import dataclasses

import pytest

from telechat_twins.core.config import KERNEL_OPERATORS, KernelsConfig, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.kernels.dispatch import Candidate, choose, describe

FUSED, PLAIN = Candidate("cann"), Candidate("composite")
MISSING = Candidate("cann", "the library is not installed")


def test_the_best_serves() -> None:
    found = choose({"rope": [FUSED, PLAIN], "gelu": [PLAIN]}, {}, "Ascend")
    assert found["rope"].implementation == "cann" and found["gelu"].implementation == "composite"
    assert describe(found) == ["cann: rope (the best on Ascend)", "composite: gelu (the best on Ascend)"]
    assert describe(found, ("cann",))[0] == "composite: rope (cann has no float64)"


def test_a_run_may_ask_for_another() -> None:
    found = choose({"rope": [FUSED, PLAIN]}, {"rope": "composite"}, "Ascend")
    assert found["rope"] == ("rope", "composite", "requested")
    assert choose({"rope": [FUSED, PLAIN]}, {"rope": "auto"}, "Ascend")["rope"].implementation == "cann"


def test_on_an_accelerator_nothing_else_serves_in_silence() -> None:
    with pytest.raises(UserError, match="kernels.rope: cann is unavailable on Ascend: the library.*one of: composite"):
        choose({"rope": [MISSING, PLAIN]}, {}, "Ascend")
    with pytest.raises(UserError, match="kernels.rope: cann is unavailable"):
        choose({"rope": [MISSING, PLAIN]}, {"rope": "cann"}, "Ascend")
    assert choose({"rope": [MISSING, PLAIN]}, {"rope": "composite"}, "Ascend")["rope"].implementation == "composite"


def test_on_the_cpu_the_next_one_serves_and_says_why() -> None:
    found = choose({"rope": [MISSING, PLAIN]}, {}, "CPU")["rope"]
    assert found.implementation == "composite" and found.reason == "cann is unavailable: the library is not installed"


def test_what_does_not_exist_is_refused_with_what_does() -> None:
    with pytest.raises(UserError, match="kernels.rope: 'triton' is not an implementation on CPU; use one of: cann, "):
        choose({"rope": [FUSED, PLAIN]}, {"rope": "triton"}, "CPU")
    with pytest.raises(UserError, match="no implementation is available on CPU"):
        choose({"rope": [MISSING]}, {}, "CPU")


def test_the_configuration_names_operators_and_implementations() -> None:
    assert dataclasses.asdict(KernelsConfig()) == dict.fromkeys(KERNEL_OPERATORS, "auto")
    run = {
        "model": {"preset": "telechat2-tiny"},
        "data": {"sources": [{"path": "x"}], "seq_len": 8},
        "train": {"steps": 2, "global_batch": 1, "micro_batch": 1},
        "optim": {"lr": 1e-3},
    }
    assert run_config_from_dict(run | {"kernels": {"rope": "composite"}}).kernels.rope == "composite"
    with pytest.raises(UserError, match="kernels: unknown key 'ropes'; did you mean 'rope'"):
        run_config_from_dict(run | {"kernels": {"ropes": "composite"}})
    with pytest.raises(UserError, match="kernels.rope: .*'fast'"):
        run_config_from_dict(run | {"kernels": {"rope": "fast"}})


@pytest.mark.parametrize("framework", ["mindspore", "pytorch"])
def test_every_operator_has_a_table_on_the_cpu(framework: str) -> None:
    pytest.importorskip({"mindspore": "mindspore", "pytorch": "torch"}[framework])
    table = __import__(f"telechat_twins.kernels.{framework}.ops", fromlist=["x"])
    device = {"mindspore": "CPU", "pytorch": "cpu"}[framework]
    found = table.candidates(device)
    assert list(found) == list(KERNEL_OPERATORS)
    assert all(any(not c.obstacle for c in candidates) for candidates in found.values())
    with pytest.raises(UserError, match="kernels.rope: 'cann' is not an implementation"):
        table.select({"rope": "cann"}, device)
    table.select()
