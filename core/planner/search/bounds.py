"""Lower bounds on the time of a step, which let a search leave out what cannot win.

A block, the embedding and the head cost what core.planner.time says, transfers along tp and cp included; they do not
depend on dp, pp or the schedule. A pipeline rank computes all micro-batches through its stages; before its first
forward a micro-batch passes all earlier stages, and after its last backward it passes them back:
    T >= sum over g < r of (F_g + B_g)  +  M * sum over the stages g of rank r of (F_g + B_g)
Then the first rank updates its part of the weights, and the ranks that hold the same ones gather them. Messages and
gradient sums come on top, so the bound is sound. ``stretch`` multiplies it all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.search.question import Question
from telechat_twins.core.planner.time.gradients import updated_bytes
from telechat_twins.core.planner.time.operators import Rates, Shape
from telechat_twins.core.planner.time.step import stage_costs, stretch
from telechat_twins.core.planner.time.transfers import Way, Ways
from telechat_twins.core.planner.time.work import OURS, Work


class Parts(NamedTuple):
    """Seconds of a micro-batch forward and backward: through a block, the embedding, and the head with its loss."""

    block: float
    first: float
    last: float


class Bounds:
    """The bounds of one question; costs are worked out once for each way to split a layer."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._three = dataclasses.replace(question.model, num_layers=3, growth=None)
        self._parts: dict[tuple[object, ...], Parts] = {}
        self._replicas: dict[tuple[int, int], Way] = {}

    def ideal(self, world: int) -> float:
        """Seconds of a step on ``world`` devices that only multiply, at their best rate and without a wait."""
        question, model = self.question, self.question.model
        rates = Rates.of(question.machine, question.precision, world)
        S, HD = question.seq_len, model.num_heads * model.head_dim
        keys = model.num_kv_heads * model.head_dim
        inputs = 3 if model.activation == "swiglu" else 2
        rows = model.num_layers * (2 * HD + 2 * keys + inputs * model.ffn_hidden_size) + model.vocab_size
        products = 6.0 * S * rows * model.hidden_size / rates.products
        attention = 3.0 * 2.0 * S * S * HD * model.num_layers / rates.attention
        return self.stretch(world) * question.global_batch * (products + attention) / world

    def stretch(self, world: int) -> float:
        """Factor of a bound for what ``world`` devices wait for the slowest of them."""
        return stretch(self.question.machine, world)

    def parts(self, layout: Layout, micro_batch: int, recompute: str) -> Parts:
        """Costs of a block and of the ends, for the axes of ``layout`` that split a layer."""
        world = layout.world if self.question.machine.shared_cores else 0
        key = layout.tp, layout.cp, layout.ulysses, micro_batch, recompute, world
        if key not in self._parts:
            self._parts[key] = self._measured(layout, micro_batch, recompute)
        return self._parts[key]

    def _measured(self, layout: Layout, micro_batch: int, recompute: str) -> Parts:
        question, three = self.question, self._three
        work = Work(
            seq_len=question.seq_len,
            micro_batch=micro_batch,
            precision=question.precision,
            recompute=recompute,
        )
        small = Layout(pp=3, cp=layout.cp, ulysses=layout.ulysses, tp=layout.tp)
        ways = Ways(three, small, question.machine)
        rates = Rates.of(question.machine, question.precision, layout.world)
        shape = Shape.of(three, small, work, OURS)
        stages = stage_costs(three, small, work, question.machine, OURS, ways, rates, shape, [1, 1, 1])
        first, block, last = (sum(stage.seconds) for stage in stages)
        return Parts(block, first - block, last - block)

    def evenly(self, pp: int, micro_batches: int, parts: Parts) -> float:
        """A bound for a pipeline of ``pp`` ranks, however layers are divided: one rank is as busy as the mean."""
        whole = self.question.model.num_layers * parts.block + parts.first + parts.last
        return micro_batches * whole / pp

    def update(self, layout: Layout, elements: int) -> float:
        """Seconds in which a rank with ``elements`` parameters updates its part of them and gathers the others."""
        widths, parts = Widths.of(self.question.precision), layout.dp * layout.cp
        rates = Rates.of(self.question.machine, self.question.precision, layout.world)
        key = layout.tp, parts
        if key not in self._replicas:
            self._replicas[key] = Ways(self.question.model, layout, self.question.machine).ways["replicas"]
        gather = self._replicas[key].seconds("all_gather", 1, elements / parts * widths.weight)
        return rates.update(updated_bytes(elements, parts, widths)) + gather

    def seconds(self, layout: Layout, counts: Sequence[int], micro_batches: int, parts: Parts) -> float:
        """A bound on the passes through a pipeline whose global stages have ``counts`` layers."""
        costs = [parts.block * count for count in counts]
        costs[0] += parts.first
        costs[-1] += parts.last
        pp, before, longest = layout.pp, 0.0, 0.0
        for rank in range(pp):
            longest = max(longest, before + micro_batches * sum(costs[rank::pp]))
            before += costs[rank]
        return longest
