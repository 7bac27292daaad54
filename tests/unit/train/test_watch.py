"""What a run shows of itself: utilisation, memory, its configuration and versions, the plot of a run that goes on."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

from telechat_twins.core.config import load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.launch import heartbeat
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.train import loop, records
from telechat_twins.core.train.metrics import MEASURED, MetricsLog, read_metrics
from telechat_twins.core.train.progress import format_row
from telechat_twins.core.train.watch import refresh
from telechat_twins.core.train.watch.environment import read_environment
from telechat_twins.core.train.watch.meter import GIB
from telechat_twins.core.train.watch.peak import peak_flops
from tests.support.numpy_stepper import SEQ_LEN, Cluster, MemoryBlend, NumpyStepper, run_config
from tests.support.traces import check_trace

MACHINE = "name: ours\npeak_bf16: {value: 312, source: a data sheet}\npeak_fp32: {value: 156, source: a data sheet}\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(loop, "open_blend", lambda data, seed, vocab_size, pad_token_id: MemoryBlend(seed))
    monkeypatch.setattr(records, "plot_losses", lambda runs, path, title, marks: path)


def test_the_mfu_is_a_share_of_the_peak_that_is_given(tmp_path):
    config = run_config(train__steps=3, train__peak_tflops=0.5)
    loop.train(NumpyStepper, config, tmp_path / "out")
    for row in read_metrics(tmp_path / "out"):
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops_per_token(config.model, SEQ_LEN) / 0.5e12)
        assert 0 < row["data_share"] < 1 and row["host_peak_gib"] > 0.01
    assert read_metrics(tmp_path / "out")[-1]["eta_s"] == 0.0
    (tmp_path / "ours.yaml").write_text(MACHINE)
    at = {"train__machine": str(tmp_path / "ours.yaml")}
    found = [peak_flops(run_config(train__precision=name, **at)) for name in ("bf16", "amp", "fp16", "fp32")]
    assert found == [312e12] * 3 + [156e12]
    with pytest.raises(UserError, match="has no peak_fp32 for precision fp64"):
        peak_flops(run_config(train__precision="fp64", **at))
    with pytest.raises(UserError, match="train.machine: no machine file .*nothing.yaml"):
        peak_flops(run_config(train__machine="nothing"))
    with pytest.raises(UserError, match="both give the peak"):
        run_config(train__peak_tflops=1.0, **at)


class Devices(NumpyStepper):
    """Rank r's accelerator holds r + 1 GiB."""

    def device_peak(self):
        return int((self.rank + 1) * GIB)


def test_memory_is_that_of_the_fullest_rank(tmp_path, monkeypatch):
    """As of the step before, without an exchange of its own: rank 0's first row has only its own."""
    monkeypatch.setattr("telechat_twins.core.train.watch.meter.open_heartbeat", lambda: Beat(tmp_path / "beat"))
    cluster = Cluster(2)
    config = run_config(train__steps=3, parallel={"dp": 2})
    results = cluster.run(lambda rank: loop.train(lambda c: Devices(c, None, cluster, rank), config, tmp_path / "out"))
    assert [result.step for result in results] == [3, 3]
    rows = read_metrics(tmp_path / "out")
    assert [row["device_peak_gib"] for row in rows[1:]] == [2.0, 2.0]
    for row in rows:
        assert row["tokens_per_s_device"] == row["tokens_per_s"] / 2 and row["comm_share"] >= 0
    line = format_row({**rows[-1], "mfu": 0.4123, "comm_share": 0.071, "data_share": 0.4, "step_ms": 30.0}, 3, 0.0)
    assert line.endswith("eta 0:00  mfu 41.2%  mem 2.0 GiB  comm 7%  data 40%")


class Beat(heartbeat.Heartbeat):
    """One for each rank's thread, in a file of its own."""

    def __init__(self, path):
        super().__init__(path.with_suffix(f".{time.perf_counter_ns()}"))


def test_waits_in_collectives_are_summed(tmp_path):
    beat = heartbeat.Heartbeat(tmp_path / "beat")
    began = time.perf_counter()
    for _ in range(2):
        beat.enter("all_reduce", "tp", (0, 1))
        beat.enter("all_reduce", "tp", (0, 1))  # nested: counted once
        time.sleep(0.02)
        beat.leave()
        beat.leave()
        inside = time.perf_counter() - began
        time.sleep(0.02)
    assert 0.04 <= beat.waited_s <= inside - 0.02


def test_a_run_keeps_its_configuration_and_what_it_was_made_with(tmp_path):
    config = run_config(train__steps=2, optim__warmup_steps=1, train__profile={"from": 2, "steps": 1})
    loop.train(NumpyStepper, config, tmp_path)
    assert load_run_config(tmp_path / "run.yaml").train == config.train
    longer = run_config(train__steps=3, train__peak_tflops=1.0, optim__warmup_steps=1, track=[])
    loop.train(NumpyStepper, longer, tmp_path, resume="auto")
    kept = load_run_config(tmp_path / "run.yaml")
    assert kept == dataclasses.replace(longer, data=kept.data)  # whose relative path counts from the file's folder
    first, second = read_environment(tmp_path)
    assert (first["step"], second["step"]) == (0, 2)
    assert first["backend"] == "numpy" and first["layout"] == "single" and first["versions"]["numpy"] == "1.26.4"
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # the second had no tracker
    assert json.loads((tmp_path / "profile" / "step-00000002" / "rank-0.json").read_text())["steps"] == [1]


def test_what_only_observes_is_no_change_of_a_run(tmp_path, capsys):
    loop.train(NumpyStepper, run_config(train__steps=2, optim__warmup_steps=1), tmp_path)
    capsys.readouterr()
    changes = {
        "train__steps": 3,
        "train__schedule_steps": 2,
        "track": [],
        "optim__warmup_steps": 1,
        "train__profile": {"from": 3},
    }
    loop.train(NumpyStepper, run_config(**changes), tmp_path, resume="auto")
    shown = capsys.readouterr().err
    assert "profiled steps 3 to 3" not in shown and "train.profile" not in shown and "track" not in shown
    loop.train(NumpyStepper, run_config(**changes | {"train__steps": 4}), tmp_path, resume="auto")
    assert "train.profile.from: step 3 was made before this start, so nothing is profiled" in capsys.readouterr().err
    with pytest.raises(UserError, match="train.profile.from: 9 is after the last step, 5"):
        loop.train(
            lambda config: pytest.fail("the model is built before the refusal"),
            run_config(train__steps=5, optim__warmup_steps=1, train__profile={"from": 9}),
            tmp_path,
            resume="auto",
        )


def test_the_plot_is_drawn_while_the_run_goes_on(tmp_path, monkeypatch):
    """By a process of its own: `look` returns at once."""
    monkeypatch.setattr(refresh, "FIRST_S", 0.0)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 4):
            log.append({"step": step, "loss": 1.0 / step, "grad_norm": 1.0, "lr": 1e-3})
        plot = refresh.PlotRefresher(tmp_path, {2: "a stage"})
        began = time.perf_counter()
        plot.look()
        assert time.perf_counter() - began < 1.0 and not (tmp_path / "loss.png").exists()
        monkeypatch.setattr(refresh, "LEAVE_S", 400.0)  # at the lowest priority, on a machine that may be busy
        plot.close()
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_the_columns_of_the_machine_are_listed(tmp_path):
    """Two equal runs differ in nothing else, which every comparison of runs relies on."""
    for name in ("a", "b"):
        loop.train(NumpyStepper, run_config(train__steps=3, train__peak_tflops=1.0), tmp_path / name)
    a, b = (read_metrics(tmp_path / name) for name in ("a", "b"))
    assert [{k: v for k, v in row.items() if k not in MEASURED} for row in a] == [
        {k: v for k, v in row.items() if k not in MEASURED} for row in b
    ]


SLICE = {"ph": "X", "name": "Linear", "ts": 10.5, "dur": 4, "pid": 1, "tid": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"ts": "10.5"},
        {"dur": None},
        {"dur": -1},
        {"ph": "Z"},
        {"pid": -1},
        {"name": 3},
        {"ts": 12.0},  # ends after the slice that it begins in
        {"ts": float("nan")},
        {"ph": "E"},
        {"ph": "i", "s": "q"},
        {"ph": "s", "id": "no number"},
        {"ph": "C", "args": {"bytes": "many"}},
        {"ph": "b"},
    ],
)
def test_the_judge_of_traces_sees(wrong, tmp_path):
    path = tmp_path / "trace.json"
    inner = {**SLICE, "ts": 11, "dur": 2}
    path.write_text(json.dumps({"traceEvents": [SLICE, inner]}))
    assert check_trace(path) == [SLICE, inner]
    path.write_text(json.dumps({"traceEvents": [SLICE, {**SLICE, **wrong}]}))
    with pytest.raises((AssertionError, ValueError)):
        check_trace(path)
