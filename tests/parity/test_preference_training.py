"""Runs on preference pairs, by the shipped loop: both twins alike, the reference fixed, interrupted and resumed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telechat_twins.convert.initial import open_initial
from telechat_twins.core.backends import load
from telechat_twins.core.config import OptimConfig, PreferenceConfig, RunConfig, run_config_from_dict
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.parity.bounds import compare_traces
from telechat_twins.core.train import loop, reference
from telechat_twins.core.train.metrics import MEASURED, read_metrics
from telechat_twins.core.train.preference import PairObjective
from tests.support.frameworks import BACKENDS
from tests.support.packed import write_pairs

LENGTH, STEPS, SAVED = 32, 12, 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("pairs")
    sources = [write_pairs(folder / name, 128, LENGTH, pairs, pairs) for name, pairs in (("a", 14), ("b", 9))]
    return run_config_from_dict(
        {
            "model": {"preset": "telechat2-tiny", "vocab_size": 128, "num_layers": 1, "hidden_size": 64},
            "data": {"sources": [{"path": str(path)} for path in sources], "seq_len": LENGTH},
            "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 4},
            "optim": {"lr": 1e-3},
            "checkpoint": {"every": SAVED, "keep_last": 9},
            "preference": {"beta": 0.5},
        }
    )


@pytest.fixture(scope="module")
def runs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for backend in BACKENDS:
        loop.train(trainer(backend), config, root / backend)
    return {backend: root / backend for backend in BACKENDS}


@cache
def trainer(backend: str) -> Any:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    return load(backend, "train").Trainer


def numbers(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in read_metrics(out)]


def values(out: Path) -> np.ndarray:
    return np.frombuffer((out / reference.VALUES).read_bytes(), "<f8")


def test_the_twins_learn_the_preference_alike(runs: dict[str, Path]) -> None:
    report = compare_traces(read_metrics(runs["ms"]), read_metrics(runs["pt"]))
    assert len(report.steps) == STEPS and [bound for bound in report.bounds if not bound.holds] == []
    for out in runs.values():
        first, *_, last = read_metrics(out)
        assert first["loss"] == pytest.approx(np.log(2.0), abs=1e-5), "the model is its own reference"
        assert abs(first["reward_margin"]) < 1e-4
        assert last["loss"] < 0.4 and last["reward_margin"] > 1.0 and last["reward_accuracy"] == 1.0
    np.testing.assert_allclose(values(runs["ms"]), values(runs["pt"]), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_is_the_initial_model(backend: str, runs: dict[str, Path], config: RunConfig) -> None:
    """Of every stored sequence, in order; that of the trained weights is far away."""
    blend = open_blend(config.data, config.train.seed, config.model.num_tokens, config.model.filler_id)
    places = [(0, n) for n in range(28)] + [(1, n) for n in range(18)]
    made = trainer(backend)(config)
    found = np.concatenate([made.log_probs(blend.sequences(places[i : i + 2])) for i in range(0, 46, 2)])
    np.testing.assert_allclose(values(runs[backend]), found, rtol=1e-6)
    made.load(loop.checkpoint_to_resume(runs[backend], "auto", verify=False), optimizer=False)
    assert abs(values(runs[backend])[:2] / made.log_probs(blend.sequences(places[:2])) - 1).max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_reads_the_reference(
    backend: str, runs: dict[str, Path], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own, bit for bit as if it had not been interrupted; without the files it refuses."""
    run = runs[backend]
    shutil.copytree(run, tmp_path / "run")
    step = tmp_path / "run" / f"step-{SAVED:08d}"
    monkeypatch.setattr(reference.Reference, "compute", lambda *_: pytest.fail("the weights have moved"))
    loop.train(trainer(backend), config, tmp_path / "again", resume=str(step))
    assert numbers(tmp_path / "again") == numbers(run)[SAVED:]
    assert (tmp_path / "again" / reference.VALUES).read_bytes() == (run / reference.VALUES).read_bytes()
    (tmp_path / "run" / reference.VALUES).unlink()
    with pytest.raises(UserError, match="has no complete reference.bin for this data and these initial weights"):
        loop.train(trainer(backend), config, tmp_path / "third", resume=str(step))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_with_a_live_reference(backend: str, runs: dict[str, Path], config: RunConfig, tmp_path: Path) -> None:
    """Of a model that was trained before: it is the base and the reference, and computing that once is the same run."""
    train = replace(config.train, steps=4, init=str(runs["pt"] / "step-00000005"))
    run = replace(config, lora=LoraConfig(rank=2, alpha=4.0, dropout=0.1), train=train, optim=OptimConfig(lr=0.02))
    loop.train(trainer(backend), run, tmp_path / "once", open_initial=open_initial)
    live = replace(run, preference=PreferenceConfig(beta=0.5, reference="live"))
    loop.train(trainer(backend), live, tmp_path / "live", open_initial=open_initial)
    assert not (tmp_path / "live" / reference.VALUES).exists()
    report = compare_traces(read_metrics(tmp_path / "live"), read_metrics(tmp_path / "once"))
    assert [bound for bound in report.bounds if not bound.holds] == []
    first, *_, last = read_metrics(tmp_path / "live")
    assert abs(first["reward_margin"]) < 1e-4 and first["loss"] == pytest.approx(np.log(2.0), abs=1e-4)
    assert last["loss"] < np.log(2.0) - 1e-3 and last["reward_margin"] > 1e-3


def test_an_interrupted_pass_goes_on(runs: dict[str, Path], config: RunConfig, tmp_path: Path) -> None:
    """From what was written, less a torn number; of other data or another seed nothing is taken."""
    blend = open_blend(config.data, config.train.seed, config.model.num_tokens, config.model.filler_id)
    made, calls = trainer("pt")(config), list[int]()
    right = made.log_probs
    made.log_probs = lambda batch: calls.append(len(batch.input_ids)) or right(batch)

    def begin(origin: dict[str, Any]) -> reference.Reference:
        return reference.Reference(tmp_path, blend, origin)

    stops = iter([False, False, True])
    assert not begin({"seed": 1}).compute(made, 8, lambda: next(stops))
    with open(tmp_path / reference.VALUES, "ab") as file:
        file.write(b"torn")
    assert begin({"seed": 1}).load(tmp_path) == 16
    assert begin({"seed": 1}).compute(made, 8, lambda: False)
    assert calls == [8] * 6, "46 sequences, none of them twice"
    assert values(tmp_path).tobytes() == values(runs["pt"]).tobytes()
    assert begin({"seed": 2}).load(tmp_path) == 0
    data = bytearray((tmp_path / reference.VALUES).read_bytes())
    data[3] ^= 1
    (tmp_path / reference.VALUES).write_bytes(data)
    with pytest.raises(UserError, match="reference.bin: altered"):
        begin({"seed": 1}).load(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_moving_reference_is_seen(
    backend: str, runs: dict[str, Path], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: log-probabilities of the present weights in the place of the reference's."""
    right = PairObjective.__call__
    monkeypatch.setattr(PairObjective, "__call__", lambda self, now, _: right(self, now, now))
    short = replace(config, train=replace(config.train, steps=4, schedule_steps=STEPS))
    loop.train(trainer(backend), short, tmp_path)
    report = compare_traces(read_metrics(tmp_path), read_metrics(runs[backend])[:4])
    assert [bound.what for bound in report.bounds if not bound.holds]
    assert all(row["loss"] == pytest.approx(np.log(2.0)) for row in read_metrics(tmp_path))
