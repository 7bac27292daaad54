"""A model that grows in training: Adam's correction by age, the loss across the growth, backends alike afterwards.

The optimizer is judged against AdamW in numpy, float64, with a step count for every entry. Training is the shipped loop
on packed data; `tele grow`'s code makes the checkpoint between the two runs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from telechat_twins.convert.growth.files import grow_checkpoint, plan_checkpoint
from telechat_twins.convert.growth.plan import Options
from telechat_twins.core.backends import load
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.growth import METHODS
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parity.bounds import compare_traces, relative_frobenius
from telechat_twins.core.train import loop
from telechat_twins.core.train.births import born
from telechat_twins.core.train.metrics import MEASURED, read_metrics
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.reference import adamw
from tests.support.frameworks import BACKENDS
from tests.support.growing import strong
from tests.support.packed import write_packed
from tests.unit.convert.test_growth_maps import grown

SEQ_LEN, VOCAB, GROWN_AT, AFTER, ANNEAL = 48, 211, 20, 30, 12
SIZES = {"hidden_size": 96, "ffn_hidden_size": 150, "num_heads": 8, "num_layers": 3, "vocab_size": 224}


def run_config(data: list[dict[str, Any]], model: Any, steps: int, **optim: Any) -> RunConfig:
    return run_config_from_dict(
        {
            "model": model,
            "data": {"sources": data, "seq_len": SEQ_LEN},
            "train": {"steps": steps, "global_batch": 4, "micro_batch": 2, "schedule_steps": GROWN_AT + AFTER},
            "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 5, "beta2": 0.999, "weight_decay": 0.2, **optim},
        }
    )


SMALL = {"preset": "telechat2-tiny", "hidden_size": 64, "ffn_hidden_size": 100, "num_layers": 2, "head_dim": 16} | {
    "vocab_size": VOCAB, "num_kv_heads": 2
}  # fmt: skip


def worst_update(backend: str, precision: str = "fp32", updates: int = 4) -> float:
    """Relative distance of all changes of masters in ``updates`` updates, after two growths, from numpy's; the weights
    that compute must be the masters."""
    small = load_model_config(SMALL)
    middle, first = grown(small, 10, hidden_size=80, num_heads=8, num_layers=3)
    large, second = grown(middle, 13, ffn_hidden_size=120, hidden_size=96)
    history, done = (first, second), 15
    config = run_config([], large.to_dict(), 100)
    config = replace(config, train=replace(config.train, precision=precision))
    table = parameter_table(large)
    initial = strong(large)
    state = {f"{k}.{name}": np.abs(a) * 1e-3 for k in "mv" for name, a in init_weights(large, 9, "strong").items()}
    births = {}
    for name, spec in table.items():
        found = born(history, name, tuple(slice(0, n) for n in spec.shape))
        births[name] = np.zeros(spec.shape, np.int64) if found is None else found
        for k in "mv":
            state[f"{k}.{name}"] = np.where(births[name] == done, 0.0, state[f"{k}.{name}"]).astype(np.float32)
    trainer = load(backend, "train").Trainer(config)
    trainer.optimizer.load_masters(lambda name, box: initial[name][box])
    trainer.optimizer.load_state(lambda name, box: state[name][box], done, history)
    weights = {name: array.astype(np.float64) for name, array in initial.items()}
    m, v = ({name: state[f"{k}.{name}"].astype(np.float64) for name in table} for k in "mv")
    ids = np.random.default_rng(5).integers(0, VOCAB, (4, 24)).astype(np.int32)
    batch = Batch(ids, shift_labels(ids), np.tile(np.arange(24, dtype=np.int32), (4, 1)))
    for update in range(done + 1, done + 1 + updates):
        trainer.gradients(batch, batch.num_targets, 1.0)
        gradients = {p.name: p.array.astype(np.float64) for p in trainer.optimizer.export_gradients()}
        for name, spec in table.items():
            decay = 0.2 if len(spec.shape) == 2 else 0.0
            # numpy's definition takes a step for every entry as readily as one for all.
            scalars = AdamWStep(update - births[name], 1e-3, 0.9, 0.999, 1e-8, decay)  # type: ignore[arg-type]
            weights[name], m[name], v[name] = adamw(weights[name], gradients[name], m[name], v[name], scalars)
        trainer.update(1e-3, 1.0)
    masters = {piece.name: piece.array for piece in trainer.weights()}
    model = load(backend, "model")
    for name, weight in model.named_weights(trainer.stages[0]).items():
        held = model.to_numpy(weight)
        assert np.array_equal(held, masters[name].astype("float32" if precision == "fp32" else bfloat16)), name
    moved = {name: master - initial[name] for name, master in masters.items()}
    joined = [np.concatenate([x[n].reshape(-1) for n in table]) for x in (moved, weights)]
    return relative_frobenius(joined[0], joined[1] - np.concatenate([initial[n].reshape(-1) for n in table]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_correction_follows_the_age_of_every_entry(
    backend: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An update of 1e-3 rounds weights of up to 1 to 6e-8: 6e-5 of it at worst. Measured 2e-5; without ages 0.2.
    right = worst_update(backend, precision)
    print(f"{backend}, {precision}: {right:.1e}")
    assert right <= 1e-4
    monkeypatch.setattr(load(backend, "optim"), "birth_classes", lambda history, pieces, size: None)
    assert worst_update(backend, precision) > 0.05


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_packed(tmp_path_factory.mktemp("data") / "packed", VOCAB, SEQ_LEN))}]


@pytest.fixture(scope="module")
def small(data: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model trained by each backend, one step beyond the growth, so that its next loss is known."""
    runs = {}
    for backend in BACKENDS:
        out = tmp_path_factory.mktemp(backend) / "small"
        config = run_config(data, SMALL, GROWN_AT + 1)
        config = replace(config, checkpoint=replace(config.checkpoint, every=GROWN_AT))
        loop.train(load(backend, "train").Trainer, config, out)
        runs[backend] = out
    return runs


def grow_run(run: Path, target: Path, method: str) -> Path:
    checkpoint = open_checkpoint(run / f"step-{GROWN_AT:08d}")
    config = load_model_config({**SMALL, **SIZES, "head_dim": 16})
    grow_checkpoint(
        checkpoint, target, plan_checkpoint(checkpoint, config, Options(method=method, anneal_steps=ANNEAL))
    )
    return target


@pytest.fixture(scope="module", params=METHODS)
def large(
    request: pytest.FixtureRequest,
    data: list[dict[str, Any]],
    small: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[tuple[str, str], Path]]:
    """Continued after the growth, by (backend that trained the small model, backend that goes on)."""
    root = tmp_path_factory.mktemp(request.param)
    runs = {}
    for begun in BACKENDS:
        checkpoint = grow_run(small[begun], root / f"grown-{begun}", request.param)
        for backend in BACKENDS:
            out = root / f"{begun}-{backend}"
            model = {"preset": str(checkpoint / "assets" / "model.yaml")}
            config = run_config(data, model, GROWN_AT + AFTER, rewarmup_steps=4)
            config = replace(config, checkpoint=replace(config.checkpoint, every=ANNEAL // 2))
            loop.train(load(backend, "train").Trainer, config, out, resume=str(checkpoint))
            runs[begun, backend] = out
    return request.param, runs


def test_the_loss_does_not_jump(large: Any, small: dict[str, Path]) -> None:
    """The first loss of the large model is the next one of the small, on the same batch."""
    for (begun, _), out in large[1].items():
        before, after = read_metrics(small[begun])[GROWN_AT]["loss"], read_metrics(out)[0]["loss"]
        assert abs(after - before) <= 1e-5 * before


def test_backends_agree_after_the_growth(large: Any) -> None:
    """Thirty steps, whoever trained the small model, through the whole annealing and beyond."""
    for begun in BACKENDS:
        ms, pt = (read_metrics(large[1][begun, backend]) for backend in BACKENDS)
        report = compare_traces(ms, pt)
        print(f"{large[0]}: loss {max(report.loss):.1e}, gradient norm {max(report.grad_norm):.1e}")
        assert len(report.steps) == AFTER
        assert [bound.what for bound in report.bounds if not bound.holds] == []
        assert ms[-1]["loss"] < ms[0]["loss"]


def test_the_mask_is_state_of_the_model(large: Any) -> None:
    method, runs = large
    for (_, backend), out in runs.items():
        rows = read_metrics(out)
        if method == "zero":
            assert not any("mask" in row for row in rows)
            continue
        assert [row.get("mask") for row in rows[: ANNEAL + 1]] == [*(i / ANNEAL for i in range(ANNEAL)), None]
        kept = {path.name for path in out.glob("step-*")}
        assert kept == {f"step-{s:08d}" for s in (GROWN_AT + AFTER, 48)}, backend
        assert open_checkpoint(out).model["config"]["growth"] is None
        assert len(open_checkpoint(out).model["grown"]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_resuming_between_the_sizes_is_bit_equal(
    backend: str, data: list[dict[str, Any]], small: dict[str, Path], tmp_path: Path
) -> None:
    """A run stopped in the middle of the annealing and one that went through write the same rows, ages included."""
    checkpoint = grow_run(small[backend], tmp_path / "grown", "masked")
    model = {"preset": str(checkpoint / "assets" / "model.yaml")}
    trainer = load(backend, "train").Trainer
    for steps, name, resume in ((32, "whole", checkpoint), (26, "half", checkpoint), (32, "rest", tmp_path / "half")):
        loop.train(trainer, run_config(data, model, steps, rewarmup_steps=4), tmp_path / name, resume=str(resume))
    whole, rest = (
        [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "rest")
    )
    assert rest == whole[6:]
    assert rest[0]["mask"] == 0.5
    first, second = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "rest")
    for name in first.names("weights"):
        assert first.read("weights", name).tobytes() == second.read("weights", name).tobytes()
