"""Length stages in both backends: the steps on both sides of a switch against float64 runs at one length, and resume.

The model is trained to 32 tokens; at 64 the rotary base grows and attention is scaled (core.model.position).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.convert.initial import open_initial
from telechat_twins.core import backends
from telechat_twins.core.checkpoint.read import open_checkpoint, write_checkpoint
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.train import loop
from telechat_twins.core.train.metrics import MEASURED, Row, read_metrics
from tests.support.packed import write_packed

BATCH = {"global_batch": 8, "micro_batch": 4, "seed": 7}
SHORT, LONG, SWITCH, STEPS, SEED = 32, 64, 3, 6, 7
MODEL = {"preset": "telechat2-tiny", "num_layers": 2, "training_seqlen": SHORT, "base_seqlen": SHORT}


@pytest.fixture(scope="module")
def trainers() -> dict[str, type]:
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    return {name: backends.load(name, "train").Trainer for name in ("ms", "pt")}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    root = tmp_path_factory.mktemp("packed")
    model = load_model_config(MODEL)
    weights = init_weights(model, SEED, "strong").items()  # attention that a rotation changes visibly
    write_checkpoint(root / "strong", 0, model={"config": model.to_dict()}, weights=weights)
    return {length: str(write_packed(root / str(length), 2048, length, 60)) for length in (SHORT, LONG)}


def config(packed: dict[int, str], model: dict | None = None, data: dict | None = None, **train: object) -> RunConfig:
    return run_config_from_dict(
        {
            "model": {**MODEL, **(model or {})},
            "data": {"sources": [{"path": packed[SHORT]}], "seq_len": SHORT, **(data or {})},
            "train": {"init": str(Path(packed[SHORT]).parent / "strong"), **BATCH, **train},
            "optim": {"lr": 1e-3, "schedule": "constant"},
            "checkpoint": {"every": 1, "keep_last": 9},
        }
    )


def staged(packed: dict[int, str], **train: object) -> RunConfig:
    long = {"steps": STEPS - SWITCH, "seq_len": LONG, "global_batch": 4, "micro_batch": 1}
    return config(packed, stages=[{"steps": SWITCH}, {**long, "sources": [{"path": packed[LONG]}]}], **train)


def numbers(out: Path) -> list[Row]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(out)]


@pytest.fixture(scope="module", params=["ms", "pt"])
def run(
    request: pytest.FixtureRequest, trainers: dict[str, type], packed: dict[int, str], tmp_path_factory
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "run"
    loop.train(trainers[request.param], staged(packed), out, open_initial=open_initial)
    return request.param, out


def apart(row: Row, judge: Row) -> float:
    return max(abs(row[name] / judge[name] - 1) for name in ("loss", "grad_norm"))


def test_both_sides_of_the_switch_agree_with_float64(
    run: tuple[str, Path], trainers: dict[str, type], packed: dict[int, str], tmp_path: Path
) -> None:
    backend, out = run
    rows = read_metrics(out)
    assert [(row["step"], row["stage"], row["seq_len"]) for row in rows] == [
        *((step, 1, SHORT) for step in range(1, SWITCH + 1)),
        *((step, 2, LONG) for step in range(SWITCH + 1, STEPS + 1)),
    ]
    assert rows[-1]["tokens"] == SWITCH * 8 * SHORT + (STEPS - SWITCH) * 4 * LONG
    loop.train(
        trainers[backend], config(packed, steps=SWITCH, precision="fp64"), tmp_path / "short", open_initial=open_initial
    )
    before = read_metrics(tmp_path / "short")
    # 2e-5: float32 after updates that float64 makes too; the trace bound of the twins is 1e-4.
    short = max(apart(a, b) for a, b in zip(rows[:SWITCH], before, strict=True))
    # The first step at the new length, from the weights at the switch, in a run that knows no other length.
    long = {"sources": [{"path": packed[LONG]}], "seq_len": LONG}
    at_switch = {"init": str(out / f"step-{SWITCH:08d}"), "steps": 1, "precision": "fp64", "seed": SEED + 1}
    at_switch |= {"global_batch": 4, "micro_batch": 2}
    losses = {}
    for name, model in {"own": {}, "without": {"training_seqlen": LONG, "base_seqlen": LONG}}.items():
        judge = config(packed, model, long, **at_switch)
        # The other model's weights fit as well: only the lengths of its position rule differ.
        trainer = trainers[backend](judge)
        trainer.load_weights(open_initial(at_switch["init"]).read)
        batch = loop.open_blend(judge.data, SEED + 1, 2048, 3).batch(0, 4)
        loss = trainer.gradients(batch, batch.num_targets, 1.0)
        losses[name] = {"loss": loss, "grad_norm": trainer.grad_norm(1.0)}
    own, without = (apart(rows[SWITCH], losses[name]) for name in ("own", "without"))
    print(f"{backend}: before the switch {short:.1e}, after it {own:.1e}, without length scaling {without:.1e}")
    assert short < 2e-5 and own < 1e-5
    assert without > 1e-3, "without NTK and attention scaling the comparison goes red"


def test_resume_inside_a_later_stage_is_bit_equal(
    run: tuple[str, Path], trainers: dict[str, type], packed: dict[int, str], tmp_path: Path
) -> None:
    backend, out = run
    for saved in (SWITCH, SWITCH + 1):  # at the switch, and behind it
        again = tmp_path / str(saved)
        loop.train(trainers[backend], staged(packed), again, resume=str(out / f"step-{saved:08d}"))
        assert numbers(again) == numbers(out)[saved:]
        a, b = (open_checkpoint(folder) for folder in (out, again))
        assert all(a.read(k, n).tobytes() == b.read(k, n).tobytes() for k in ("weights",) for n in a.names(k))


def test_other_stages_before_the_checkpoint_are_refused(
    run: tuple[str, Path], trainers: dict[str, type], packed: dict[int, str], tmp_path: Path
) -> None:
    backend, out = run
    other = config(packed, stages=[{"steps": 1, "global_batch": 4}, {"steps": STEPS - 1}])
    with pytest.raises(UserError, match="has drawn 24 samples in 3 steps, these stages draw 20"):
        loop.train(trainers[backend], other, tmp_path / "x", resume=str(out / f"step-{SWITCH:08d}"))
