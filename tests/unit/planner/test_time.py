"""The forecast of a step: schedule, bytes, monotony, and held-out published runs; planted faults turn each red."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.parallel import schedule
from telechat_twins.core.parallel.layout import Layout, parse_layout, stage_layers
from telechat_twins.core.parallel.traffic import Traffic, expected_traffic, pipeline_bytes
from telechat_twins.core.planner.fit import FAMILIES, fit
from telechat_twins.core.planner.machine import OPERATIONS, Machine, load_machine, machine_names
from telechat_twins.core.planner.published import Forecast, forecast, published_runs
from telechat_twins.core.planner.time import pipeline, timeline, traffic
from telechat_twins.core.planner.time.gradients import held
from telechat_twins.core.planner.time.operators import Shape
from telechat_twins.core.planner.time.step import step_time
from telechat_twins.core.planner.time.work import OURS, Work
from telechat_twins.core.planner.validation import table
from tests.house import ROOT
from tests.support.traces import check_trace

TINY = load_model_config("telechat2-tiny")
ATLAS = load_machine("atlas-800t-a2")
SHAPES = [
    ("gpipe", 3, 1, 7),
    ("1f1b", 1, 1, 5),
    ("1f1b", 4, 1, 3),
    ("1f1b", 4, 1, 40),
    ("1f1b", 4, 3, 24),
    ("1f1b", 5, 2, 10),
]
LAYOUTS = ["single", "tp2", "tp4.nosp", "pp2.dp2.nozero", "pp2.vpp2.tp2", "ring2.tp2", "ring4.dp2", "ulysses2"]
LAYOUTS += ["ring2.ulysses2.dp2", "pp4", "dp4.gpipe", "pp2.gpipe.tp2"]


@cache
def forecasts() -> tuple[Forecast, ...]:
    return tuple(forecast(run) for run in published_runs())


def stages(rng: random.Random, count: int) -> list[float]:
    return [rng.uniform(0.5, 2.0) for _ in range(count)]


def test_the_schedule_played_is_the_one_executed() -> None:
    """Order, times and idle share, for uneven stages; a step too long to play whole is extrapolated exactly."""
    rng = random.Random(1)
    for shape in SHAPES:
        kind, pp, virtual, micro = shape
        forward, backward = stages(rng, pp * virtual), stages(rng, pp * virtual)
        exact = schedule.simulate(*shape, forward, backward)
        found = pipeline.spans(*shape, forward, backward)
        for rank in range(pp):
            assert [span.action for span in found[rank]] == schedule.actions(*shape, rank)
            assert [span.end for span in found[rank]] == pytest.approx([span.end for span in exact[rank]])
        played = pipeline.play(*shape, forward, backward)
        assert played.seconds == pytest.approx(max(spans[-1].end for spans in exact))
        assert played.bubble == pytest.approx(schedule.bubble(*shape, forward, backward))


@pytest.mark.parametrize("shape", [("1f1b", 4, 1, 90), ("1f1b", 4, 2, 88), ("gpipe", 2, 1, 50), ("1f1b", 3, 3, 81)])
def test_a_long_step_is_extrapolated(shape: tuple[str, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    forward, backward = stages(rng, shape[1] * shape[2]), stages(rng, shape[1] * shape[2])
    whole = pipeline.play(*shape, forward, backward, 0.3)
    monkeypatch.setattr(pipeline, "_MOST_ACTIONS", 1)
    short = pipeline.play(*shape, forward, backward, 0.3)
    assert short.ends == pytest.approx(whole.ends, rel=1e-9)
    assert short.bubble == pytest.approx(whole.bubble, rel=1e-9)


def test_the_bubble_of_equal_stages_is_the_formula() -> None:
    """(p - 1)/m of the work without and (p - 1)/(v m) with interleaving."""
    for pp, virtual, micro in ((2, 1, 8), (4, 1, 12), (8, 1, 64), (4, 3, 8), (2, 2, 4)):
        shape = "1f1b", pp, virtual, micro
        equal = [1.0] * (pp * virtual)
        played = pipeline.play(*shape, equal, [2.0 * one for one in equal])
        assert played.bubble == pytest.approx(schedule.bubble_formula(*shape))
        work = 3.0 * virtual * micro
        assert played.seconds / work - 1.0 == pytest.approx((pp - 1) / (virtual * micro))


def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the forecast plays GPipe where the backends execute 1F1B."""
    true = pipeline.simulate
    monkeypatch.setattr(pipeline, "simulate", lambda kind, *shape: true("gpipe", *shape))
    pipeline._plan.cache_clear()
    found = pipeline.spans("1f1b", 4, 1, 6, [1.0] * 4, [2.0] * 4)
    pipeline._plan.cache_clear()
    assert [span.action for span in found[0]] != schedule.actions("1f1b", 4, 1, 6, 0)


def step_traffic(layout: Layout, work: Work, rank: int, model: ModelConfig) -> Traffic:
    """The forecast's parts of the messages of ``rank``, put together: a step without recomputation."""
    shape, coord = Shape.of(model, layout, work, OURS), layout.coord(rank)
    block = traffic.block_traffic(model, layout, work, shape)
    counts = [len(layers) for layers in stage_layers(layout, model)]
    parts: list[tuple[Traffic, int]] = [
        (pipeline_bytes(layout, work.micro_batches, coord.pp, traffic.message_bytes(model, shape)), 1),
        (held(model, layout, counts, coord.pp, work.precision, work.by_class, coord.tp).traffic, 1),
    ]
    for stage in range(coord.pp, layout.stages, layout.pp):
        parts += [(part, counts[stage] * work.micro_batches) for part in (block.tensor, block.ulysses, block.ring)]
        parts.append((traffic.ends_traffic(model, layout, shape, stage), work.micro_batches))
    total: Traffic = {}
    for part, times in parts:
        for key, (calls, payload) in part.items():
            before = total.get(key, [0, 0])
            total[key] = [before[0] + calls * times, before[1] + payload * times]
    return total


def differs(name: str, precision: str, model: ModelConfig = TINY) -> list[str]:
    layout = parse_layout(name)
    work = Work(seq_len=50, micro_batch=2, micro_batches=4, precision=precision)
    wrong = []
    for rank in range(layout.world):
        exact = expected_traffic(
            model, layout, seq_len=50, micro_batch=2, micro_batches=4, rank=rank, precision=precision
        )
        found = step_traffic(layout, work, rank, model)
        wrong += [f"{name} {key}" for key in exact.keys() | found.keys() if exact.get(key) != found.get(key)]
    return wrong


def test_bytes_are_those_of_the_traffic_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank, by operation and group, in calls and bytes; without the ring's last hop it would not be so."""
    assert [line for name in LAYOUTS for precision in ("fp32", "amp") for line in differs(name, precision)] == []
    # Of a model with biases, tensor rank 0 has a bucket less than the others.
    biased = dataclasses.replace(load_model_config("flm-16b"), num_layers=8)
    assert differs("dp2.tp2.nosp.nozero", "fp32", biased) == differs("pp2.dp2.tp4.nosp", "bf16", biased) == []
    monkeypatch.setattr(traffic, "ring_bytes", lambda ring, elements, width: {("shift", "ring"): [3 * ring - 3, 1]})
    assert differs("ring2.tp2", "fp32")


def faster(machine: Machine, rng: random.Random) -> Machine:
    """``machine`` with one figure better."""
    part = rng.choice(["peak", "memory", "node", "cluster", "node latency", "cluster latency", "efficiency"])
    better = rng.uniform(1.0, 4.0)

    def more(figure: str, holder: object, factor: float) -> object:
        old = getattr(holder, figure)
        return dataclasses.replace(holder, **{figure: dataclasses.replace(old, value=old.value * factor)})

    if part == "peak":
        return more("peak_bf16", machine, better)
    if part == "memory":
        return more("memory_bandwidth", machine, better)
    if part == "efficiency":
        values = dataclasses.replace(machine.efficiency, launch=machine.efficiency.launch / better)
        return dataclasses.replace(machine, efficiency=values)
    name, *late = part.split()
    link = getattr(machine, name)
    link = more("latency", link, 1.0 / better) if late else more("bandwidth", link, better)
    return dataclasses.replace(machine, **{name: link})


def test_a_better_machine_is_never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random layouts and figures; and more data-parallel devices never give fewer tokens/s."""
    rng = random.Random(3)
    model = load_model_config("telechat2-7b")
    names = ["dp8", "tp8.pp2", "tp2.pp4.vpp2.dp4", "ring4.tp2", "ulysses2.tp4.dp2", "ring2.ulysses2.tp2.pp2"]

    def counter_examples(forecast: Callable = step_time) -> list[str]:
        found = []
        for _ in range(60):
            layout = parse_layout(rng.choice(names))
            work = Work(seq_len=8192, micro_batches=8, recompute=rng.choice(["none", "selective", "full"]))
            machine = faster(ATLAS, rng)
            slow, fast = (forecast(model, layout, work, one).seconds for one in (ATLAS, machine))
            if fast > slow * (1 + 1e-12):
                found.append(f"{layout.name} {work.recompute}")
            wide = dataclasses.replace(layout, dp=2 * layout.dp)
            if forecast(model, wide, work, ATLAS).tokens_per_s < forecast(model, layout, work, ATLAS).tokens_per_s:
                found.append(f"{layout.name} wider")
        return found

    assert counter_examples() == []

    def backwards(model: object, layout: object, work: object, machine: Machine) -> object:
        found = step_time(model, layout, work, machine)  # type: ignore[arg-type]
        return dataclasses.replace(found, seconds=found.seconds * machine.peak_bf16.value)

    assert counter_examples(backwards)


def test_held_out_runs_are_within_the_stated_bound() -> None:
    """12 % for all but the one that docs/planning.md names: by every count O2 has less to do than O1."""
    errors = {}
    for one in (found for found in forecasts() if found.run.use == "held-out"):
        efficiency = load_machine(one.run.machine).efficiency
        assert -efficiency.faster - 5e-4 <= one.error <= efficiency.slower + 5e-4 and one.run.source
        errors[one.run.name] = abs(one.error)
    assert {name for name, error in errors.items() if error > 0.12} == {"TeleChat2-115B, O2"}
    run, machine = next(one for one in published_runs() if one.name == "FLM-101B"), load_machine("a800-80g-sxm")
    slow = dataclasses.replace(machine, efficiency=dataclasses.replace(machine.efficiency, matmul=0.6))
    assert abs(forecast(run, slow).error) > 0.12


@pytest.mark.parametrize("family", ["ampere", "hopper"])
def test_stored_efficiencies_are_those_that_fit(family: str) -> None:
    found = fit(family)
    for name in FAMILIES[family].machines:
        for field, value in found.values.items():
            assert getattr(load_machine(name).efficiency, field) == pytest.approx(value, abs=2e-3)
    assert not {one.run.name for one in found.fitted} & {one.run.name for one in found.held_out}


def test_the_page_shows_the_forecasts_of_today() -> None:
    lines = table(forecasts())
    for page in ("planning.md", "planning.zh.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert text.partition("<!-- table -->\n")[2].partition("\n<!-- end -->")[0].splitlines() == lines


def test_the_breakdown_adds_up_and_the_trace_holds_the_schedule(tmp_path: Path) -> None:
    layout, work = parse_layout("tp2.pp4.vpp2.dp4"), Work(seq_len=8192, micro_batches=8, recompute="full")
    step = step_time(load_model_config("telechat2-7b"), layout, work, ATLAS)
    assert sum(step.breakdown.values()) == pytest.approx(step.seconds)
    assert min(step.breakdown.values()) >= 0.0 and step.low < step.seconds < step.high
    timeline.write_trace(tmp_path / "t.json", layout, work, step, "a step")
    rows = check_trace(tmp_path / "t.json")
    for rank in range(4):
        names = [row["name"] for row in rows if row["tid"] == rank and "args" in row]
        words = {"F": "forward", "B": "backward"}
        assert names == [f"{words[a.kind]} {a.micro} chunk {a.chunk}" for a in schedule.actions("1f1b", 4, 2, 8, rank)]
    end = max(row["ts"] + row["dur"] for row in rows)
    assert end * 1e-6 <= step.seconds


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["plan", "--config", "configs/train/telechat2-115b.yaml", "--machine", "atlas-800t-a2", "--tokens", "1e12"]
    assert cli.main([*argv, "--json", "--timeline", str(tmp_path / "t.png")]) == 0
    found = json.loads(capsys.readouterr().out)["time"]
    assert found["interval"][0] < found["seconds"] < found["interval"][1] and found["peak_tflops"] == 313
    assert found["budget"]["days"] == pytest.approx(1e12 / found["tokens_per_s"] / 86400)
    rate = found["tokens_per_s_per_device"] * found["model_flops_per_token"]
    assert rate == pytest.approx(found["tflops_per_device"] * 1e12)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert found["memory"]["fits"] and found["memory"]["device_bytes"] == 64 * 2**30
    assert cli.main([*argv, "--recompute", "selective"]) == 0
    text = capsys.readouterr().out
    assert "MFU" in text and "DOES NOT FIT: the fullest rank needs 73." in text
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" not in text and "of the device's 64.0 GiB" in text


def test_a_stage_that_does_not_fit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--config", "teleflm-52b", "--growth", "teleflm-1t", "--machine"]
    assert cli.main([*argv, "atlas-800t-a2"]) == 0
    assert [line[:25] for line in capsys.readouterr().out.splitlines() if "NOT FIT" in line] == [
        "stage 52b DOES NOT FIT: i",
        "stage 102b DOES NOT FIT: ",
    ]
    assert cli.main([*argv, "a800-80g-sxm", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["time"]["stages"]
    assert [row["fits"] for row in rows] == [True, True, True]


@pytest.mark.parametrize("backend", ["pt", "ms"])
def test_the_bundled_calibrations_of_a_cpu(backend: str) -> None:
    """They are of the backend they name, have each collective measured, and rank layouts as two cores must."""
    name = f"cpu-epyc-{backend}"
    machine = load_machine(name)
    assert (machine.backend, machine.shared_cores, machine.devices_per_node) == (backend, True, 2)
    assert {one.op for one in machine.node.measured} == {op for op in OPERATIONS if op != "send"}
    assert machine.host is not None and machine.host.block_backward > machine.host.block_forward > 0.0
    assert "tele plan --calibrate" in machine.efficiency.source
    work = Work(seq_len=128, micro_batch=2, micro_batches=4, precision="fp32")
    half = dataclasses.replace(work, micro_batches=2)
    alone, data, pipe, tensor = (
        step_time(TINY, parse_layout(layout), given, machine).seconds
        for layout, given in (("single", work), ("dp2", half), ("pp2", work), ("tp2", work))
    )
    assert alone / 2 < data < alone and data < tensor and alone / 2 < pipe


@pytest.mark.parametrize(
    "words, unneeded",
    [
        ("--model telechat2-7b", ["telechat_twins.core.planner.time"]),
        ("--config telechat2-115b --machine atlas-800t-a2 --tokens 10T", ["telechat_twins.core.planner.search.best"]),
    ],
)
def test_a_plan_loads_nothing_that_it_does_not_need(words: str, unneeded: list[str]) -> None:
    """It stays under 0.4 s of processor time, of which most is the interpreter: numpy alone would take 0.07."""
    heavy = ["matplotlib", "torch", "mindspore", "numpy", "psutil", *unneeded]
    code = (
        f"import sys; from telechat_twins.core.cli import main; main(['plan', *{words.split()}]); "
        f"sys.exit(','.join(name for name in {heavy} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'atlas-800t-a2'"):
        load_machine("atlas-800t-a3")
    text = (Path("configs/machines") / "h100-sxm.yaml").read_text().replace("matmul:", "matmull:")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match="did you mean 'matmul'"):
        load_machine(str(tmp_path / "mine.yaml"))
    for words, hint in (
        (["--model", "telechat2-7b", "--tokens", "1e12"], "needs --machine"),
        (["--model", "telechat2-7b", "--fit"], "belongs to --validate"),
        (["--config", "configs/train/telechat2-7b-lora.yaml", "--machine", "h100-sxm"], "without lora"),
        (["--model", "telechat2-7b", "--layout", "pp2.vpp2", "--micro-batches", "3"], "multiple of pp 2"),
        (["--model", "telechat2-7b", "--layout", ""], "unknown part"),
        (["--model", "telechat2-7b", "--recompute", "full", "--recompute-lists", "x"], "stands in its place"),
    ):
        assert cli.main(["plan", *words]) == 2
        assert hint in capsys.readouterr().err
    assert all(load_machine(name).name == name for name in machine_names())
