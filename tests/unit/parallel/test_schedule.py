"""Pipeline schedules: complete, free of deadlock, as idle and as hungry for memory as promised, messages in order."""

from __future__ import annotations

import itertools
from collections import deque

import pytest

from telechat_twins.core.parallel import schedule
from telechat_twins.core.parallel.schedule import (
    Action,
    actions,
    bubble,
    bubble_formula,
    peak_live,
    play,
    simulate,
)


def cases():
    """Every schedule of up to 6 ranks, 4 chunks and 12 micro-batches."""
    for pp, micro_batches in itertools.product(range(1, 7), range(1, 13)):
        yield "gpipe", pp, 1, micro_batches
        yield "1f1b", pp, 1, micro_batches
        if pp > 1 and micro_batches % pp == 0:
            yield from (("1f1b", pp, virtual, micro_batches) for virtual in (2, 3, 4))


CASES = list(cases())


def deliver(plans, virtual, links):
    """Run the plans with messages matched in order: a receiver takes from its link until it has what it needs, keeping
    early ones. Returns the most it held at once; AssertionError when a message is not the one that
    ``links[kind][rank]`` told the receiver to expect, or when nobody can go on."""
    pp, stages = len(plans), len(plans) * virtual
    wires = {(kind, rank): deque() for kind in "FB" for rank in range(pp)}
    expected = {(kind, rank): deque(links[kind][rank]) for kind in "FB" for rank in range(pp)}
    mailbox = {key: set() for key in wires}
    position, most, moved = [0] * pp, 0, True
    while moved:
        moved = False
        for rank, plan in enumerate(plans):
            while position[rank] < len(plan):
                kind, micro, chunk = plan[position[rank]]
                stage = chunk * pp + rank
                entry = 0 if kind == "F" else stages - 1
                if stage != entry and pp > 1:
                    key = (kind, rank)
                    while (micro, chunk) not in mailbox[key] and wires[key]:
                        sent, told = wires[key].popleft(), expected[key].popleft()
                        assert sent == told, f"rank {rank} was told {told} and got {sent}"
                        mailbox[key].add(sent)
                    if (micro, chunk) not in mailbox[key]:
                        break
                    most = max(most, len(mailbox[key]))
                    mailbox[key].remove((micro, chunk))
                target = stage + (1 if kind == "F" else -1)
                if 0 <= target < stages and pp > 1:
                    wires[kind, target % pp].append((micro, target // pp))
                position[rank] += 1
                moved = True
    assert position == [len(plan) for plan in plans], "somebody waits for ever"
    assert not any(wires.values()) and not any(mailbox.values()) and not any(expected.values())
    return most


def incoming(kind, schedule, pp, virtual, micro_batches, rank):
    """(micro, own chunk) of every message that ``rank`` receives over one link, in the order of sending.

    ``kind`` "F": activations from the previous rank; "B": gradients from the next rank. Ranks form a ring, since the
    last rank's chunk is followed by the first rank's next chunk.
    """
    step = {"F": 1, "B": -1}[kind]
    sender = (rank - step) % pp
    messages = []
    for action in actions(schedule, pp, virtual, micro_batches, sender):
        stage = action.chunk * pp + sender + step  # where the result goes; the ends of the pipeline send nothing
        if action.kind == kind and 0 <= stage < pp * virtual and pp > 1:
            messages.append((action.micro, stage // pp))
    return messages


def links_of(case):
    return {kind: [incoming(kind, *case, rank) for rank in range(case[1])] for kind in "FB"}


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_every_forward_and_backward_once_and_in_order(name):
    for case in (case for case in CASES if case[0] == name):
        _, pp, virtual, micro_batches = case
        graphs = list(itertools.product(range(micro_batches), range(virtual)))
        for rank in range(pp):
            plan = actions(*case, rank)
            place = {action: i for i, action in enumerate(plan)}
            assert len(place) == len(plan) == 2 * len(graphs)
            assert all(place[Action("F", *graph)] < place[Action("B", *graph)] for graph in graphs), case
            for kind, chunk in itertools.product("FB", range(virtual)):
                micros = [action.micro for action in plan if action.kind == kind and action.chunk == chunk]
                assert micros == list(range(micro_batches)), "gradients must add up in the same order on all ranks"


def test_no_deadlock_and_the_promised_bubble():
    for case in CASES:
        assert abs(bubble(*case) - bubble_formula(*case)) < 1e-12, case
        assert abs(bubble(*case, 3.0, 3.0) - bubble_formula(*case)) < 1e-12, case


def test_bubble_by_hand():
    assert bubble_formula("1f1b", 4, 1, 8) == 3 / 11
    assert bubble_formula("1f1b", 4, 2, 8) == 3 / 19
    assert bubble_formula("1f1b", 1, 1, 8) == 0.0
    # F0 takes 1 on the first stage, the second is then busy for 2 * (2 + 4), then B1 takes 2: 15 in all, 18 of 30 busy.
    assert bubble("1f1b", 2, 1, 2, [1.0, 2.0], [2.0, 4.0]) == pytest.approx(1 - 18 / (2 * 15), abs=1e-12)


def test_the_promised_memory():
    for case in CASES:
        name, pp, virtual, micro_batches = case
        for rank in range(pp):
            if name == "gpipe":
                promise = micro_batches
            elif virtual == 1:
                promise = min(micro_batches, pp - rank)
            else:
                promise = min(micro_batches * virtual, (pp - rank - 1) * 2 + (virtual - 1) * pp + 1)
            assert peak_live(*case, rank) == promise, (case, rank)


def short(plan):
    return " ".join(f"{kind}{micro}{'ab'[chunk]}" for kind, micro, chunk in plan)


def test_known_plans():
    assert short(actions("1f1b", 3, 1, 4, 0)) == "F0a F1a F2a B0a F3a B1a B2a B3a"
    assert short(actions("1f1b", 3, 1, 4, 2)) == "F0a B0a F1a B1a F2a B2a F3a B3a"
    assert short(actions("gpipe", 3, 1, 2, 1)) == "F0a F1a B0a B1a"
    # Megatron-LM's order for 2 ranks, 2 chunks, 4 micro-batches: rank 0 has 2 + 2 forwards ahead, rank 1 has 2.
    assert short(actions("1f1b", 2, 2, 4, 0)) == "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a"
    assert short(actions("1f1b", 2, 2, 4, 1)) == "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a"


def test_messages_arrive_in_the_order_told():
    """That order is also the one in which they are needed, so that nothing has to be kept."""
    for case in CASES:
        plans = [actions(*case, rank) for rank in range(case[1])]
        assert deliver(plans, case[2], links_of(case)) <= 1, case


def test_messages_by_hand():
    case = ("1f1b", 4, 2, 8)
    assert incoming("F", *case, 0) == [(micro, 1) for micro in range(8)]
    assert incoming("F", *case, 1)[:5] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert incoming("B", *case, 3) == [(micro, 0) for micro in range(8)]
    assert incoming("B", *case, 0)[:5] == [(0, 1), (1, 1), (2, 1), (3, 1), (0, 0)]
    assert incoming("F", "1f1b", 4, 1, 8, 0) == [] == incoming("B", "1f1b", 4, 1, 8, 3)
    assert incoming("F", "gpipe", 1, 1, 8, 0) == []


def swapped_turn(k, pp, virtual, kind):
    """The planted fault: chunks in the reverse order."""
    group, place = divmod(k, pp * virtual)
    chunk, micro = divmod(place, pp)
    return group * pp + micro, virtual - 1 - chunk if kind == "F" else chunk


def test_swapped_chunks_are_seen(monkeypatch):
    case = ("1f1b", 2, 2, 4)
    assert simulate(*case)
    links = links_of(case)
    monkeypatch.setattr(schedule, "_turn", swapped_turn)
    with pytest.raises(RuntimeError, match="deadlock in the pipeline schedule: rank 0 at F0 chunk 1"):
        simulate(*case)
    monkeypatch.undo()
    # A rank that swaps two forwards whose inputs are both there can go on, but its messages are not those told.
    plans = [list(actions(*case, rank)) for rank in range(2)]
    a, b = plans[0].index(Action("F", 2, 0)), plans[0].index(Action("F", 1, 1))
    plans[0][a], plans[0][b] = plans[0][b], plans[0][a]
    play(plans, 2)
    with pytest.raises(AssertionError, match="was told"):
        deliver(plans, 2, links)


def test_timeline_respects_dependencies():
    """Checked from the spans alone: nobody does two things at once, nothing starts before its input is there."""
    pp, virtual, micro_batches = 3, 2, 6
    timeline = simulate("1f1b", pp, virtual, micro_batches, [1.0, 2.0, 1.0, 3.0, 1.0, 2.5], 2.0)
    spans = {(s.action.kind, s.action.micro, s.action.chunk * pp + r): s for r, row in enumerate(timeline) for s in row}
    assert len(spans) == 2 * pp * virtual * micro_batches
    for row in timeline:
        assert all(before.end <= after.start for before, after in itertools.pairwise(row))
    last = pp * virtual - 1
    for (kind, micro, stage), span in spans.items():
        if kind == "F" and stage > 0:
            assert span.start >= spans["F", micro, stage - 1].end
        if kind == "B":
            assert span.start >= spans["F", micro, stage].end
            assert stage == last or span.start >= spans["B", micro, stage + 1].end


@pytest.mark.parametrize(
    "numbers",
    [
        ("zb", 2, 1, 4, 0),
        ("1f1b", 2, 1, 4, 2),
        ("1f1b", 2, 1, 0, 0),
        ("1f1b", 1, 2, 4, 0),
        ("1f1b", 2, 2, 3, 0),
        ("gpipe", 2, 2, 4, 0),
    ],
)
def test_numbers_that_make_no_schedule(numbers):
    with pytest.raises(ValueError):
        actions(*numbers)
