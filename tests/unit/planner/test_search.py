"""The search: sound against trying everything, monotone in memory and devices, legal, and its command."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from telechat_twins.core import cli
from telechat_twins.core.inference.engine import STEP_TOKENS
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.planner.machine import load_machine
from telechat_twins.core.planner.memory.estimate import Work as MemoryWork
from telechat_twins.core.planner.memory.estimate import ranks_of
from telechat_twins.core.planner.memory.inference import weight_bytes
from telechat_twins.core.planner.search import serving
from telechat_twins.core.planner.search.best import search
from telechat_twins.core.planner.search.bounds import Bounds
from telechat_twins.core.planner.search.question import POLICIES, Plan, Question
from telechat_twins.core.planner.search.serving import Serving
from telechat_twins.core.planner.search.serving import search as serve
from telechat_twins.core.planner.search.space import Space
from telechat_twins.core.planner.time import transfers
from telechat_twins.core.planner.time.step import step_time
from telechat_twins.core.planner.time.work import Work
from tests.campaigns import plan_monotone, plan_table

SMALL = dataclasses.replace(load_model_config("telechat2-7b"), num_layers=6)
QUESTION = Question(SMALL, load_machine("atlas-800t-a2"), 8, 8192, 8, memory_gib=14.0, most_samples=2, top=4)


def everything(question: Question, worlds: list[int]) -> list[tuple[float, str]]:
    """(seconds, axes) of the best plan of each set of axes, by trying every one; bounds are checked on the way."""
    space, bounds, best = Space(question), Bounds(question), dict[tuple[int, ...], tuple[float, str]]()
    for world in worlds:
        for division in space.divisions(world):
            for virtual in space.virtual(division):
                layout, micro_batches = division.layout(virtual), space.micro_batches(division)
                for recompute in POLICIES:
                    given = division.micro_batch, micro_batches, question.precision, recompute
                    ranks = ranks_of(question.model, layout, MemoryWork(question.seq_len, *given))
                    if max(rank.total for rank in ranks) > question.limit:
                        continue
                    work = Work(
                        seq_len=question.seq_len,
                        micro_batch=division.micro_batch,
                        micro_batches=micro_batches,
                        recompute=recompute,
                    )
                    seconds = step_time(question.model, layout, work, question.machine).seconds
                    assert bounds.ideal(world) < seconds, "a bound that is not one rules out plans that could win"
                    parts = bounds.parts(layout, division.micro_batch, recompute)
                    assert bounds.stretch(world) * bounds.evenly(layout.pp, micro_batches, parts) < seconds
                    axes = division[:5]
                    best[axes] = min(best.get(axes, (float("inf"), "")), (seconds, str(axes)))
    return sorted(best.values())


def test_the_search_finds_what_trying_everything_finds() -> None:
    found = search(QUESTION)
    expected = everything(QUESTION, [8, 7, 6, 5])
    assert expected and found.too_large, "the question must have plans, and plans that are too large"
    assert [plan.time.seconds for plan in found.plans] == pytest.approx([one[0] for one in expected[: QUESTION.top]])
    for plan in found.plans:
        assert plan.memory.total <= QUESTION.limit
        given = plan.work.micro_batch, plan.work.micro_batches, plan.work.precision, plan.work.recompute
        ranks = ranks_of(SMALL, plan.layout, MemoryWork(QUESTION.seq_len, *given))
        assert plan.memory.total == max(rank.total for rank in ranks)


def test_more_memory_or_devices_never_make_the_best_plan_worse() -> None:
    best = float("inf")
    for memory in (10.0, 14.0, 24.0, 60.0):
        found = search(dataclasses.replace(QUESTION, memory_gib=memory, top=1))
        seconds = found.plans[0].time.seconds if found.plans else float("inf")
        assert seconds <= best
        best = seconds
    best = float("inf")
    for devices in (3, 4, 5, 7, 8, 11, 16):
        found = search(dataclasses.replace(QUESTION, devices=devices, top=1))
        seconds = found.plans[0].time.seconds if found.plans else float("inf")
        assert seconds <= best, f"{devices} devices"
        best = seconds


def test_what_is_better_is_never_worse_on_random_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some draws of the campaign; a planted link that is slower the more bandwidth it has is found by them."""
    draws = range(4)
    assert not [found for number in draws for found in plan_monotone.violations(number, 3)]
    reached = transfers._reached
    monkeypatch.setattr(transfers, "_reached", lambda link: 1e20 / reached(link))
    found = {one.change for number in draws for one in plan_monotone.violations(number, 3)}
    assert found <= {"node bandwidth", "cluster bandwidth"} and found


def test_serving() -> None:
    """Weights by hand; more devices and shorter answers never take longer; published speeds are near."""
    model, machine = load_model_config("telechat2-115b"), load_machine("atlas-800t-a2")
    assert weight_bytes(model, 1, 1) == 2 * 113_282_916_352 - 2 * 8192  # all parameters but the final norm
    assert weight_bytes(model, 1, 1, "int8") < 0.52 * weight_bytes(model, 1, 1)
    last = float("inf")
    for devices in (4, 8, 16):
        plans = serve(Serving(model, machine, devices, 1024, 256, "latency"))
        latency = plans[0].latency if plans else float("inf")
        assert latency <= last
        last = latency
    # MindFormers' README: predicted tokens a second of one request, on 1, 2 and 8 devices.
    for name, devices, published in (("7b", 1, 54.1), ("35b", 2, 27.7), ("115b", 8, 26.5)):
        plan = serve(Serving(load_model_config(f"telechat2-{name}"), machine, devices, 64, 128, "latency"))[0]
        assert (plan.tp, plan.pp) == (devices, 1)
        assert 0.75 < 128 / plan.latency / published < 1.3, name
    # A pass with one token reads as many weights as one with many, so short prompts share it.
    assert serving.STEP_TOKENS == STEP_TOKENS
    short, long = (serve(Serving(model, machine, 8, prompt, 1, "throughput"))[0] for prompt in (1, 512))
    assert short.throughput > 20 * long.throughput and short.first_token < long.first_token
    most = serve(Serving(model, machine, 16, 1024, 256, "throughput"))[0]
    assert most.throughput > 20 / last and most.sequences > 1
    # What the table counts on and `tele serve` does not do is said below it.
    question = Serving(model, machine, 16, 2048, 256, "throughput", "int8")
    piped = serve(question)[0]
    said = [line for line in serving.text(question, [piped], "M") if line.startswith("tele serve runs")]
    assert piped.pp > 1 and said and f"about {piped.throughput / piped.pp:,.0f} tokens/s" in said[0]


SEARCH = ["plan", "--search", "--machine", "atlas-800t-a2", "--model", "telechat2-7b", "--seq-len", "8192"]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SEARCH, "--devices", "8", "--global-batch", "8", "--top", "2"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "why the others lose" in text and "tele train --config F --layout" in text
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best, *others = found["plans"]
    assert len(others) == 2 and all(other["loses"] for other in others)
    assert parse_layout(best["layout"]).world == best["devices"] <= 8
    for wrong, message in (
        (["--layout", "tp2"], "cannot be combined with --search"),
        (["--memory", "0"], "above 0"),
        (["--budget", "1e20"], "without --search"),
        (["--tokens", "1e12"], "--tokens: is for a plan without --search"),
        (["--cost", "--tokens", "1e12"], "is for a plan without --search"),
        (["--fused-attention"], "without --search"),
        (["--quantize", "int8"], "--quantize: belongs to --search --target"),
        (["--target", "latency"], "--global-batch: is of training"),
    ):
        assert cli.main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["plan", "--model", "telechat2-7b", "--devices", "8"]) == 2
    assert "belongs to --search" in capsys.readouterr().err
    assert cli.main([*SEARCH, "--devices", "0"]) == 2
    assert "--devices: must be from 1" in capsys.readouterr().err
    assert cli.main([*SEARCH, "--devices", "1", "--memory", "4"]) == 1
    assert "none fits" in capsys.readouterr().out


CELL = re.compile(r"`(?P<layout>[^`]+)`(?: x(?P<samples>\d+))?(?: (?P<again>[sf]))?, \d+%, \d+ GiB")


def planned(name: str, seq_len: int, devices: int, written: re.Match[str]) -> Plan:
    """The plan that a cell of the tables names, estimated anew."""
    model, layout = load_model_config(name), parse_layout(written["layout"])
    samples, rows = int(written["samples"] or 1), max(1, plan_table.TOKENS[devices] // seq_len)
    recompute = {None: "none", "s": "selective", "f": "full"}[written["again"]]
    micro_batches = rows // (layout.dp * samples)
    work = Work(seq_len=seq_len, micro_batch=samples, micro_batches=micro_batches, recompute=recompute)
    memory = MemoryWork(seq_len, samples, micro_batches, "bf16", recompute)
    fullest = max(ranks_of(model, layout, memory), key=lambda rank: rank.total)
    return Plan(layout, work, step_time(model, layout, work, load_machine(plan_table.MACHINE)), fullest)


def test_tables_of_best_layouts_in_the_docs_are_current() -> None:
    page = plan_table.PAGES[0].read_text(encoding="utf-8")
    questions = [(n, s, d) for n, s, _ in plan_table.MODELS for d in plan_table.DEVICES]
    questions += [(n, s, 512) for n, s in plan_table.LONG]
    cells = [c.strip() for row in page.splitlines() if re.match(r"\| (tele|flm)", row) for c in row.split("|")[3:]]
    cells = [cell for cell in cells if CELL.fullmatch(cell) or cell == "does not fit"]
    assert len(cells) == len(questions)
    for question, cell in zip(questions, cells, strict=True):
        if written := CELL.fullmatch(cell):
            assert plan_table.cell(planned(*question, written)) == cell, f"{question}: run `make plan-table`"
    assert plan_table.cell(plan_table.best("telechat2-7b", 8192, 8)) == cells[0], "run `make plan-table`"
