"""Search for the layouts with the shortest step that fit a device.

Plans are compared by their axes: of each set of axes the best schedule, micro-batch and recomputation counts. Numbers
of devices come from the largest down, and end when even an ideal step is slower than every plan wanted. Of the rest,
divisions come in the order of a bound on their time (bounds.py); memory is checked before time is simulated. All is
sound: nothing is left out that could be among the plans wanted.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable
from typing import NamedTuple

from telechat_twins.core.parallel.layout import Layout, check_layout, stage_layers
from telechat_twins.core.parallel.schedule import peak_live
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.memory.activations import Kept, block_kept, core_bytes, input_bytes, total
from telechat_twins.core.planner.memory.estimate import RankMemory, rank_memory
from telechat_twins.core.planner.memory.estimate import Work as MemoryWork
from telechat_twins.core.planner.memory.executor import MINDSPORE
from telechat_twins.core.planner.memory.states import Held, Sizes, held_quickly, part_sizes, states_bytes
from telechat_twins.core.planner.search.bounds import Bounds
from telechat_twins.core.planner.search.question import POLICIES, Found, Plan, Question, TooLarge
from telechat_twins.core.planner.search.space import Division, Space
from telechat_twins.core.planner.time.step import step_time
from telechat_twins.core.planner.time.work import Work

LARGE_KEPT = 5  # plans too large that are reported

Watch = Callable[[Found], None]
Axes = tuple[int, int, int, int, int]  # pp, dp, cp, ulysses, tp


class _Candidate(NamedTuple):
    """Something to try, by its bound: a division (``virtual`` 0) before its ways to interleave and recompute."""

    bound: float
    order: int
    division: Division
    virtual: int = 0
    recompute: str = "none"


def search(question: Question, watch: Watch = lambda found: None) -> Found:
    """The best plans of ``question``; none if nothing fits. ``watch`` sees the state after each plan that was timed."""
    return _Search(question, watch).run()


class _Search:
    def __init__(self, question: Question, watch: Watch) -> None:
        self.question, self.watch, self.found = question, watch, Found()
        self.space, self.bounds = Space(question), Bounds(question)
        self.widths = Widths.of(question.precision)
        self.best: dict[Axes, Plan] = {}  # of each set of axes
        self.cutoff = float("inf")  # seconds above which a plan is not wanted
        self._counts: dict[int, list[int]] = {}
        self._sizes: dict[int, Sizes] = {}
        self._kept: dict[tuple[int, int, int], list[Kept]] = {}
        self._sums: dict[tuple[int, int, int], tuple[float, float]] = {}  # of them and of a block's input, bytes

    def run(self) -> Found:
        for world in range(self.question.devices, 0, -1):
            if self.bounds.ideal(world) >= self.cutoff:
                break
            self._consider(world)
        found = self.found
        fastest = found.plans[0].time.seconds if found.plans else float("inf")
        found.large = [one for one in sorted(found.large, key=lambda one: one.bound) if one.bound < fastest]
        del found.large[LARGE_KEPT:]
        return found

    def _consider(self, world: int) -> None:
        """All plans with ``world`` devices, by their bound."""
        heap: list[_Candidate] = []
        stretch = self.bounds.stretch(world)
        for order, division in enumerate(self.space.divisions(world)):
            ways = len(POLICIES) * len(self.space.virtual(division))
            self.found.considered += ways
            parts = self.bounds.parts(division.layout(), division.micro_batch, "none")
            bound = stretch * self.bounds.evenly(division.pp, self.space.micro_batches(division), parts)
            if bound < self.cutoff:
                heap.append(_Candidate(bound, -order, division))
        heapq.heapify(heap)
        while heap:
            candidate = heapq.heappop(heap)
            if candidate.bound >= self.cutoff:
                break
            if not candidate.virtual:
                self._expand(candidate, heap)
            elif candidate.bound < self._wanted(candidate.division):
                self._try(candidate)

    def _wanted(self, division: Division) -> float:
        """Seconds below which a plan of these axes is wanted: it must beat the axes' best, too."""
        own = self.best.get(division[:5])
        return self.cutoff if own is None else min(self.cutoff, own.time.seconds)

    def _expand(self, candidate: _Candidate, heap: list[_Candidate]) -> None:
        """Put a division's ways to interleave and recompute on the heap; none if its states alone do not fit."""
        division, micro_batches = candidate.division, self.space.micro_batches(candidate.division)
        ways = self.space.virtual(division)
        states, stretch = self._states(division.layout()), self.bounds.stretch(division.layout().world)
        if states > self.question.limit:
            self.found.too_large += len(POLICIES) * len(ways)
            self._note(TooLarge(division.layout(), self._work(candidate), states, candidate.bound))
            return
        for virtual in ways:
            layout = division.layout(virtual)
            counts = self._layers(layout)
            update = self.bounds.update(layout, self._first(layout).parameters)
            for recompute in POLICIES:
                parts = self.bounds.parts(layout, division.micro_batch, recompute)
                bound = stretch * (self.bounds.seconds(layout, counts, micro_batches, parts) + update)
                if bound < self._wanted(division):
                    heapq.heappush(heap, _Candidate(bound, len(heap), division, virtual, recompute))

    def _work(self, candidate: _Candidate) -> Work:
        question, division = self.question, candidate.division
        return Work(
            seq_len=question.seq_len,
            micro_batch=division.micro_batch,
            micro_batches=self.space.micro_batches(division),
            precision=question.precision,
            recompute=candidate.recompute,
        )

    def _try(self, candidate: _Candidate) -> None:
        question, found, division = self.question, self.found, candidate.division
        layout, work = division.layout(candidate.virtual), self._work(candidate)
        memory = self._fits(layout, work)
        if isinstance(memory, int):
            found.too_large += 1
            self._note(TooLarge(layout, work, memory, candidate.bound))
            return
        check_layout(layout, question.model, global_batch=question.global_batch, micro_batch=work.micro_batch)
        time = step_time(question.model, layout, work, question.machine)
        found.timed += 1
        if time.seconds < self._wanted(division):
            self.best[division[:5]] = Plan(layout, work, time, memory)
            found.plans = sorted(self.best.values(), key=lambda plan: (plan.time.seconds, plan.memory.total))
            del found.plans[question.top :]
            if len(found.plans) == question.top:
                self.cutoff = found.plans[-1].time.seconds
            self.watch(found)

    def _states(self, layout: Layout) -> int:
        """Bytes that stand during the whole step on the first pipeline rank."""
        return sum(states_bytes(self._first(layout), layout, self.widths, MINDSPORE).values())

    def _first(self, layout: Layout) -> Held:
        """Parameters of the first pipeline rank."""
        tied, layers = self.question.model.tied_embeddings, sum(self._layers(layout)[:: layout.pp])
        return held_quickly(self._part_sizes(layout.tp), tied, layout, 0, layers)

    def _part_sizes(self, tp: int) -> Sizes:
        if tp not in self._sizes:
            self._sizes[tp] = part_sizes(self.question.model, tp)
        return self._sizes[tp]

    def _note(self, large: TooLarge) -> None:
        """Keep the smallest and the fastest of those that are too large, of the fastest one of each layout."""
        if self.found.least is None or large.needed < self.found.least.needed:
            self.found.least = large
        same = [one for one in self.found.large if one.layout.name == large.layout.name]
        if not same or len(self.found.large) < LARGE_KEPT:
            self.found.large.append(large)
            self.found.large.sort(key=lambda one: one.bound)
            del self.found.large[4 * LARGE_KEPT :]

    def _fits(self, layout: Layout, work: Work) -> RankMemory | int:
        """Memory of the fullest rank, or the bytes of the first rank that exceeds the limit."""
        model, limit = self.question.model, self.question.limit
        sizes, counts = self._part_sizes(layout.tp), self._layers(layout)
        key = layout.tp, layout.cp, layout.ulysses
        if key not in self._kept:
            self._kept[key] = kept = block_kept(model, layout, self.widths, MINDSPORE, work.seq_len, True)
            entry = input_bytes(model, layout, self.widths)
            self._sums[key] = total(kept) - core_bytes(kept), entry
        least = self._least(layout, work)
        if least > limit:
            return least
        given = MemoryWork(
            work.seq_len, work.micro_batch, work.micro_batches, work.precision, work.recompute, True, MINDSPORE
        )
        fullest: RankMemory | None = None
        for rank in range(layout.pp):
            layers = counts[rank :: layout.pp]
            held = held_quickly(sizes, model.tied_embeddings, layout, rank, sum(layers))
            here = rank_memory(model, layout, rank, given, held, layers, self._kept[key])
            if here.total > limit:
                return here.total
            if fullest is None or here.total > fullest.total:
                fullest = here
        assert fullest is not None  # a layout has a rank
        return fullest

    def _least(self, layout: Layout, work: Work) -> int:
        """Bytes that the first pipeline rank needs at least: its states, and as many graphs of its smallest chunk as
        are alive together."""
        pp, virtual = layout.pp, layout.virtual
        graphs = peak_live(layout.schedule, pp, virtual, work.micro_batches, 0)
        whole, entry = self._sums[layout.tp, layout.cp, layout.ulysses]
        positions = work.micro_batch * (work.seq_len // layout.cp)
        block = entry if work.recompute == "full" else whole
        return self._states(layout) + int(graphs * min(self._layers(layout)[::pp]) * positions * block)

    def _layers(self, layout: Layout) -> list[int]:
        """Layers of each global stage; balanced, they depend on their number only."""
        if layout.stages not in self._counts:
            plain = dataclasses.replace(layout, pp=layout.stages, virtual=1)
            self._counts[layout.stages] = [len(one) for one in stage_layers(plain, self.question.model)]
        return self._counts[layout.stages]
