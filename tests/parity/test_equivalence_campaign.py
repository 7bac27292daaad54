"""A sample of the random equivalence campaign, and its judge: the own decoder's gradients against complex steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from telechat_twins.core import backends
from tests.campaigns import equivalence
from tests.campaigns.equivalence import Trial, campaign, compare, judge, summary
from tests.campaigns.equivalence_cases import FAMILIES, make_case
from tests.campaigns.float64_decoder import FAULTS, read_release
from tests.campaigns.float64_run import run

TRIALS = 6
# Small models; among these six every family and every planted fault, grouped and tied heads, shards, packed documents.
SEED = 223


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    args = argparse.Namespace(trials=TRIALS, seed=SEED, backends=["ms", "pt"], fp64=["ms", "pt"], layouts=0)
    return campaign(args, tmp_path_factory.mktemp("equivalence"))


def test_both_backends_are_the_independent_decoder(trials: list[Trial]) -> None:
    assert [trial.problems for trial in trials] == [[]] * TRIALS
    assert all(set(trial.shares) == {"ms fp32", "pt fp32", "ms fp64", "pt fp64"} for trial in trials)
    assert f"{TRIALS} cases, 0 with a broken bound" in summary(trials)


def test_the_sample_covers_what_models_differ_in(trials: list[Trial]) -> None:
    assert {trial.case.family for trial in trials} == set(FAMILIES)
    shapes, inputs = [trial.shape for trial in trials], [trial.case.inputs for trial in trials]
    assert any(1 < s.K < s.H for s in shapes) and any(s.tied for s in shapes)
    assert any(i.docs is not None for i in inputs) and any(i.counted is not None for i in inputs)
    folders = [trial.case.folder for trial in trials]
    assert {(folder / "model.safetensors").exists() for folder in folders} == {True, False}  # one file, and shards


def test_every_planted_fault_is_seen(trials: list[Trial]) -> None:
    """In each case that it changes: by ten times the limit at least, and most of them by thousands."""
    seen = {fault: min(t.faults[fault] for t in trials if fault in t.faults) for t in trials for fault in t.faults}
    assert set(seen) == set(FAULTS)
    assert min(seen.values()) > 10.0, seen


def test_a_fault_of_the_product_is_a_broken_bound(trials: list[Trial]) -> None:
    """A gradient a millionth off, one that is missing, and a backend that fails."""
    trial = trials[0]

    def broken(grads: dict[str, np.ndarray]) -> str:
        again = Trial(trial.case, trial.shape, trial.weights, trial.exact, trial.moved)
        compare(again, "x", trial.exact | {"grads": grads}, "fp64")
        return "; ".join(again.problems)

    exact = trial.exact["grads"]
    name = next(iter(exact))
    assert broken(dict(exact)) == ""
    assert f"x: {name} is off by 1.00e-06" in broken(exact | {name: exact[name] * (1 + 1e-6)})
    assert f"{name} is off by nan" in broken(exact | {name: exact[name] * np.nan})
    assert "other names or shapes" in broken({key: value for key, value in exact.items() if key != name})


def test_a_run_that_fails_is_a_problem_of_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise FloatingPointError("here")

    monkeypatch.setattr(backends, "load", lambda *_: SimpleNamespace(run=fails))
    trial = judge(SEED, 1, tmp_path / "case")
    assert equivalence.run_single(trial, "pt", "fp32") is None
    assert trial.problems == ["pt fp32: FloatingPointError: here"]


def test_the_exit_code_is_the_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def found(args: argparse.Namespace, top: Path) -> list[Trial]:
        trial = judge(args.seed, 2, top / "case")
        trial.shares["pt fp32"], trial.places["pt fp32"] = 0.5, "loss"
        if args.seed:
            trial.problems.append("broken")
        return [trial]

    monkeypatch.setattr(equivalence, "campaign", found)
    assert equivalence.main(["--seed", "0", "--out", str(tmp_path / "report.json")]) == 0
    assert "1 cases, 0 with a broken bound" in capsys.readouterr().out
    assert equivalence.main(["--seed", "1"]) == 1
    assert '"pt fp32": 0.5' in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize("number", range(10))
def test_the_judge_differentiates_rightly(number: int, tmp_path: Path) -> None:
    """The derivative along a random direction of all weights, from an imaginary step of 1e-30 (exact to rounding, there
    is no difference to cancel) and from the backward. Measured: 1.5e-14."""
    case = make_case(1, number, tmp_path / "case")
    shape, weights = read_release(case.folder)
    gradients = run(shape, weights, case.inputs)["grads"]
    assert {name: g.shape for name, g in gradients.items()} == {name: w.shape for name, w in weights.items()}
    random = np.random.default_rng(number)
    along = {name: random.standard_normal(w.shape) for name, w in weights.items()}
    stepped = {name: w + 1e-30j * along[name] for name, w in weights.items()}
    slope = run(shape, stepped, case.inputs, grads=False)["loss"].imag / 1e-30
    size = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    assert abs(slope - sum(np.sum(g * along[name]) for name, g in gradients.items())) < 1e-12 * size


def test_the_judge_shares_no_code(tmp_path: Path) -> None:
    """Its two files, and the generator of cases, import numpy, the standard library and each other."""
    folder = Path(equivalence.__file__).parent
    for name in ("float64_decoder", "float64_run", "equivalence_cases"):
        lines = (folder / f"{name}.py").read_text(encoding="utf-8").splitlines()
        imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
        ours = [module for module in imports if module.split(".")[0] in ("telechat_twins", "tests")]
        assert all(module.startswith("tests.campaigns.") for module in ours), (name, ours)
        assert not {"torch", "mindspore"} & {module.split(".")[0] for module in imports}
