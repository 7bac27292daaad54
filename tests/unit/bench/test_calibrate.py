"""Calibration without a clock: rates that made up measurements are found again, and the file is one of a machine."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import yaml

from telechat_twins.core.bench import calibrate
from telechat_twins.core.bench.parallel import forecast_of
from telechat_twins.core.bench.report import layouts_to_markdown
from telechat_twins.core.planner.fit import with_efficiency
from telechat_twins.core.planner.machine import Machine, load_machine, machine_from

OPERATIONS = {
    op: [200e-6, 300e-6, 2200e-6] for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift")
}
TRUE = {"matmul": 0.6, "attention": 0.6, "memory": 0.3, "launch": 15.0}


@cache
def machine() -> Machine:
    return with_efficiency(machine_from(calibrate.describe("pt", "mine", 2, OPERATIONS), "mine"), TRUE)


def test_planted_rates_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps as a machine of known rates takes them; a file of what is found forecasts them."""
    truth = dataclasses.replace(machine(), core_exponent=0.5)
    steps = {
        world: {point: seconds for point, (seconds, _) in zip(calibrate.STEPS, pairs, strict=True)}
        for world in (1, 2)
        for pairs in [calibrate._forecasts(truth, dict.fromkeys(calibrate.STEPS, 1.0), world)]
    }
    monkeypatch.setattr(calibrate, "measure_steps", lambda *_: (steps[2], steps[1]))
    monkeypatch.setattr(calibrate, "measure_collectives", lambda *_: OPERATIONS)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(calibrate.calibrate("pt", "mine")))
    found = load_machine(str(path))
    assert found.core_exponent == pytest.approx(0.5, abs=0.05) and found.backend == "pt"
    for world in (1, 2):
        for forecast, seconds in calibrate._forecasts(found, steps[world], world):
            assert forecast == pytest.approx(seconds, rel=0.05)
    slow = with_efficiency(found, {"matmul": 0.7 * found.efficiency.matmul})
    assert any(a > 1.05 * b for a, b in calibrate._forecasts(slow, steps[2], 2))  # a planted fault


def test_operations_are_a_latency_and_a_bandwidth() -> None:
    row = calibrate._operation("reduce_scatter", [1e-4, 1e-4, 1e-4 + (calibrate.SIZES[-1] - calibrate.SIZES[0]) / 2e9])
    assert row["latency"] == pytest.approx(100.0) and row["bandwidth"] == pytest.approx(1.0)


def test_the_table_has_the_forecast_beside_the_measured_times() -> None:
    options = {"model": "telechat2-tiny", "seq_len": 32, "micro_batch": 1, "micro_batches": 4, "precision": "fp32"}
    forecasts = {text: forecast_of(options, text, machine()) for text in ("single", "tp2", "pp2", "dp2", "ring2")}
    assert forecasts["tp2"]["seconds"] > forecasts["dp2"]["seconds"]  # many small messages against a few
    row = {
        "backend": "pt",
        "layout": "tp2",
        "world": 2,
        "device": "cpu",
        "seconds": [[0.1]],
        "ratios": [1.0],
        "loss_difference": 0.0,
        "traffic": {"counted": [1], "formula": [1], "wire": [1], "differs": []},
        "states": {"held": [1], "formula": [1]},
        "pipeline": None,
        "ring": None,
        "forecast": {**forecasts["tp2"], "seconds": 0.12},
    }
    about = {"cores": 2, "processor": "a processor", "threads": None}
    text = layouts_to_markdown({"options": options, "machine": about, "parameters": 10, "rows": [row]})
    assert "| 100.0 ms | 120.0 ms | +20% |" in text
