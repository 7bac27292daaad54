"""Schedules of relay runs: reproducible, complete, printed as commands, and made smaller while they fail."""

from __future__ import annotations

import pytest

from telechat_twins.core.parallel.layout import parse_layout
from tests.campaigns.relay_schedule import (
    LAYOUTS,
    PLANS,
    Schedule,
    Segment,
    commands,
    draw,
    overrides,
    shrink,
    unswapped,
)


def test_schedules_are_functions_of_seed_and_number() -> None:
    """Each cuts every leg of its plan into whole steps; all plans, layouts and frameworks come up."""
    made = [draw(1, number, ("ms", "pt"), 0.3) for number in range(60)]
    assert made == [draw(1, number, ("ms", "pt"), 0.3) for number in range(60)]
    assert made != [draw(2, number, ("ms", "pt"), 0.3) for number in range(60)]
    for schedule in made:
        legs = zip(PLANS[schedule.plan], schedule.legs, strict=True)
        assert all(sum(segment.steps for segment in segments) == leg.steps for leg, segments in legs)
    segments = [segment for schedule in made for segment in schedule.segments]
    assert {schedule.plan for schedule in made} == set(PLANS)
    assert {segment.layout for segment in segments} == {"single", *LAYOUTS}
    assert {segment.backend for segment in segments} == {"ms", "pt"}
    assert all(parse_layout(layout).world == 2 for layout in LAYOUTS)


def test_commands() -> None:
    """A growth and adapters on it, as a reader would type them."""
    schedule = Schedule(
        "growth and adapters",
        (
            (Segment(3), Segment(1, "ms", "tp2", ("train.recompute=full",))),
            (Segment(5),),
            (Segment(2), Segment(4, "ms")),
        ),
    )
    assert commands(schedule) == [
        "tele train --backend pt --config leg-0.yaml --out run-0 --resume auto --set train.steps=3",
        "tele train --backend ms --config leg-0.yaml --out run-0 --resume auto --layout tp2 "
        "--set train.steps=4 train.recompute=full",
        "tele grow run-0 grown-1 --set hidden_size=96 ffn_hidden_size=144 num_heads=8 num_layers=3 --method masked "
        "--anneal-steps 4",
        "tele train --backend pt --config leg-1.yaml --out run-1 --resume grown-1 --set train.steps=9",
        "tele train --backend pt --config leg-2.yaml --out run-2 --resume auto --set train.steps=2",
        "tele train --backend ms --config leg-2.yaml --out run-2 --resume auto --set train.steps=6",
    ]
    assert overrides(PLANS["lengths"][0], Segment(2), 8)[0] == (
        'train.stages=[{"steps": 6, "seq_len": 32, "global_batch": 4}, {"steps": 2, "seq_len": 64, "global_batch": 2}]'
    )


@pytest.mark.parametrize("number", range(20))
def test_a_failing_schedule_is_made_smaller(number: int) -> None:
    """To the one swap that fails: everything else is as in the unswapped run, joined where it can be."""
    schedule = draw(3, number, ("ms", "pt"), 0.5)

    def fails(one: Schedule) -> bool:
        return any(segment.layout == "tp2" and segment.backend == "ms" for segment in one.segments)

    if not fails(schedule):
        assert shrink(unswapped(schedule.plan), fails)[0] == unswapped(schedule.plan)
        return
    small, tried = shrink(schedule, fails, most=500)
    assert fails(small) and tried < 500
    odd = [segment for segment in small.segments if not segment.plain]
    assert odd == [Segment(odd[0].steps, "ms", "tp2")]
    assert len(small.segments) <= len(small.legs) + 2


def test_making_smaller_ends() -> None:
    """After as many tries as allowed, whatever still fails."""
    schedule = draw(1, 0, ("ms", "pt"), 0.5)
    assert shrink(schedule, lambda one: False, most=3) == (schedule, 3)
