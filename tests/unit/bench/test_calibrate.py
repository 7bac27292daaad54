"""Calibration without a clock: rates and host times that made up measurements are found again by both clocks, and the
file is one of a machine."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from pathlib import Path

import pytest
import yaml

from telechat_twins.core.bench import calibrate, rates
from telechat_twins.core.bench.parallel import forecast_of
from telechat_twins.core.bench.probes import (
    DEPTHS,
    NARROW_DEPTHS,
    PROBED,
    SIZES,
    STAGES,
    Times,
    alone_models,
    narrow,
    ring_attention,
    small_models,
)
from telechat_twins.core.bench.report import layouts_to_markdown
from telechat_twins.core.bench.worker import PROCESSOR, bench_config
from telechat_twins.core.planner.fit import with_efficiency
from telechat_twins.core.planner.machine import Machine, load_machine, machine_from
from telechat_twins.core.planner.time.step import step_time
from telechat_twins.core.planner.time.transfers import interpolated
from telechat_twins.core.planner.time.work import work_of
from telechat_twins.core.types import JsonObject

OPERATIONS = {
    op: [200e-6] * 4 + [300e-6, 700e-6, 2200e-6]
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift")
}
TRUE = {"matmul": 0.6, "attention": 0.4, "memory": 0.3, "tile": 24.0}
HOST = {
    "block_forward": 300.0,
    "block_backward": 800.0,
    "ends_forward": 200.0,
    "ends_backward": 250.0,
    "step": 400.0,
    "update": 500.0,
    "tensor_ends_forward": 2000.0,
    "tensor_ends_backward": 700.0,
    "stage_forward": 600.0,
    "stage_backward": 1000.0,
    "exchange": 40.0,
    "ring_forward": 90.0,
    "ring_backward": 150.0,
    "ring_forward_mb": 800.0,
    "ring_backward_mb": 2400.0,
    "update_bandwidth": 8.0,
    "exponent": 0.4,
    "source": "planted",
}


@pytest.fixture(autouse=True)
def yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's product and copy take the same on every machine."""
    monkeypatch.setattr(calibrate, "_best", lambda _: 4e-3)
    machine.cache_clear()


@cache
def machine() -> Machine:
    plain = calibrate.describe("pt", "mine", 2, OPERATIONS)
    return with_efficiency(machine_from({**plain, "host": HOST, "core_exponent": 0.5}, "mine"), TRUE)


def phases(options: JsonObject, world: int, planted: Machine | None = None) -> dict[str, float]:
    """What the planted machine takes for the phases of a step; on ``world`` ranks that share the cores. In a pipeline,
    a rank's mean time on processors."""
    config, planted = bench_config(options), planted or machine()
    here = dataclasses.replace(planted, devices_per_node=2 // world)
    step = step_time(config.model, config.parallel, work_of(config), planted if config.parallel.world > 1 else here)
    m = work_of(config).micro_batches
    forward, both = (m * sum(times) / config.parallel.pp for times in (step.forward, step.forward + step.backward))
    beside = HOST["step"] * 1e-6 / (2 // world) ** HOST["exponent"]  # type: ignore[operator]
    tail, agreed = step.tails[0], 200e-6 * (config.parallel.world > 1)  # of the loss, by an all-reduce of one number
    return {
        "forward": forward + beside + agreed,
        "gradients": both + beside + agreed + tail.reduce * (config.parallel.tp > 1),
        "update": tail.update,
    }


def raw(slower: float = 1.0) -> list[JsonObject]:
    """Records of both ranks, with noise that a median takes out; the processors' clock runs ``slower``."""
    rng = random.Random(0)

    def times(found: dict[str, float]) -> Times:
        noise = (1.0, 1.0, 1.0, rng.uniform(1, 9), 0.99)
        noisy = {phase: [seconds * one for one in noise] for phase, seconds in found.items()}
        return noisy | {phase + PROCESSOR: [slower * one for one in row] for phase, row in noisy.items()}

    options = calibrate.OPTIONS
    calls = {op: [[(one, slower * one)] * 3 for one in row] for op, row in OPERATIONS.items()}
    layouts = {
        f"{layout} {layers}": times(phases(narrow(options, layers, 4, layout), 2))
        for layout in PROBED
        for layers in NARROW_DEPTHS
    }
    layouts |= {layout: times(phases(narrow(options, 8, 4, layout), 2)) for layout in STAGES}
    layouts |= {f"ring2 attention {n}": times(phases(ring_attention(options, n), 2)) for n in DEPTHS}
    crowd = {name: times(phases(one, 2)) for name, one in small_models(options).items()}
    alone = {name: times(phases(one, 1)) for name, one in alone_models(options).items()}
    return [{"collectives": calls, "layouts": layouts, "crowd": crowd, "alone": alone}] * 2


def test_planted_rates_and_host_times_are_found(tmp_path: Path) -> None:
    """From phases as a machine of known rates takes them; a file of what is found forecasts layouts as that machine."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(calibrate.fitted("pt", "mine", calibrate.OPTIONS, raw())))
    found = load_machine(str(path))
    assert found.core_exponent == pytest.approx(0.5, abs=0.05) and found.backend == "pt" and found.host is not None
    assert found.host.exponent == pytest.approx(0.4, abs=0.03)
    for name in HOST.keys() - {"ends_forward", "ends_backward", "update_bandwidth", "exponent", "source"}:
        if name.endswith("_mb"):
            continue
        assert getattr(found.host, name) == pytest.approx(HOST[name], rel=0.1, abs=20.0), name
    options = {**calibrate.OPTIONS, "seq_len": 64}
    for text in ("single", "tp2", "pp2", "pp2.vpp2", "ring2", "dp2"):
        true, forecast = (forecast_of(options, text, one)["seconds"] for one in (machine(), found))
        assert forecast == pytest.approx(true, rel=0.06), text
    idle = dataclasses.replace(found, host=dataclasses.replace(found.host, stage_forward=0.0, stage_backward=0.0))
    fast, true = (forecast_of(options, "pp2.vpp2", one)["seconds"] for one in (idle, machine()))
    assert fast < 0.94 * true, "interleaving has more stages, each of which takes time"
    host = dataclasses.replace(found.host, block_backward=2 * found.host.block_backward)
    slow = dataclasses.replace(found, host=host)
    assert forecast_of(options, "tp2", slow)["seconds"] > 1.06 * forecast_of(options, "tp2", machine())["seconds"]


def test_the_host_may_take_less_beside_wide_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a framework hide half of a backward's host time behind operators: the fit finds that share, but not
    when it is made to take the narrow model's time for that of wide ones."""
    assert machine().host is not None
    slow = dataclasses.replace(machine(), host=dataclasses.replace(machine().host, block_backward=6000.0))
    wide = rates.with_host(slow, {"forward": 1.2, "backward": 0.5})
    models = {name: one for name, one in small_models(calibrate.OPTIONS).items() if not name.startswith("narrow")}
    plain = {name: phases(one, 2, wide) for name, one in models.items()}
    measured = {name: (found["forward"], found["gradients"]) for name, found in plain.items()}
    beside = (400e-6, 400e-6)
    factors = rates.fit_rates(slow, calibrate.OPTIONS, measured, 2, beside)[1]
    assert factors["backward"] == pytest.approx(0.5, abs=0.07)
    monkeypatch.setattr(rates, "HOST_WEIGHT", 1e3)
    assert rates.fit_rates(slow, calibrate.OPTIONS, measured, 2, beside)[1]["backward"] > 0.95


def test_the_two_clocks_give_two_machines() -> None:
    wall, processor = calibrate.machines_of("pt", calibrate.OPTIONS, raw(slower=2.0))
    assert wall.host is not None and processor.host is not None
    assert processor.host.block_backward == pytest.approx(2 * wall.host.block_backward, rel=0.01)
    assert processor.node.measured[0].microseconds == [2 * one for one in wall.node.measured[0].microseconds]


def test_collectives_are_read_between_the_sizes_measured() -> None:
    row = calibrate._operation("reduce_scatter", [1e-4, 0.9e-4, *([1e-4] * 4), 1e-4 + (SIZES[-1] - SIZES[0]) / 2e9])
    assert row["latency"] == pytest.approx(100.0) and row["bandwidth"] == pytest.approx(1.0, rel=0.01)
    assert row["microseconds"][1] == 100.0  # a larger message is not the faster one
    sizes, times = [10, 20, 40], [5.0, 6.0, 10.0]
    assert [interpolated(sizes, times, x) for x in (1, 10, 15, 30, 60)] == [5.0, 5.0, 5.5, 8.0, 14.0]


def test_the_table_has_the_forecast_beside_the_measured_times() -> None:
    options = {"model": "telechat2-tiny", "seq_len": 32, "micro_batch": 1, "micro_batches": 4, "precision": "fp32"}
    forecasts = {text: forecast_of(options, text, machine()) for text in ("single", "tp2", "pp2", "dp2", "ring2")}
    assert forecasts["tp2"]["seconds"] > forecasts["dp2"]["seconds"]  # many small messages against a few
    assert forecasts["pp2"]["working"] < forecasts["pp2"]["seconds"]  # a rank waits for the other
    assert forecasts["pp2"]["breakdown"]["pp"] == pytest.approx(4 * 200e-6)  # and is busy with the messages it sends
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
        "processor": [[0.08], [0.05]],
        "forecast": {**forecasts["tp2"], "seconds": 0.12, "working": 0.088},
    }
    other = {**row, "layout": "dp2", "seconds": [[0.05]], "forecast": {**row["forecast"], "seconds": 0.13}}
    about = {"cores": 2, "processor": "a processor", "threads": None}
    text = layouts_to_markdown({"options": options, "machine": about, "parameters": 10, "rows": [row, other]})
    assert "| 100.0 ms | 120.0 ms | +20% | 80.0 ms | +10% |" in text
    assert "fastest first by the forecast: tp2, dp2; measured otherwise: tp2 before dp2." in text
