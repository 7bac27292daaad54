"""Every legal way to divide a model and a batch among devices, by the rules of core.parallel.layout.

Sequence parallelism and ZeRO-1 are always on: without them a rank holds more and sends no less. GPipe keeps every
micro-batch and waits as long as 1F1B, which therefore stands for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from telechat_twins.core.errors import UserError
from telechat_twins.core.parallel.layout import MAX_STAGES, Layout, check_layout
from telechat_twins.core.planner.search.question import Question


class Division(NamedTuple):
    """Axes of a layout, and the samples of a micro-batch; recomputation and interleaving are still open."""

    pp: int
    dp: int
    cp: int
    ulysses: int
    tp: int
    micro_batch: int

    def layout(self, virtual: int = 1) -> Layout:
        """The layout with ``virtual`` chunks a pipeline rank."""
        return Layout(pp=self.pp, dp=self.dp, cp=self.cp, ulysses=self.ulysses, tp=self.tp, virtual=virtual)


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


class Space:
    """The divisions of a question."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._layers: dict[tuple[int, int, int], bool] = {}

    def divisions(self, world: int) -> Iterator[Division]:
        """Those that use exactly ``world`` devices."""
        model, batch = self.question.model, self.question.global_batch
        for tp in divisors(world):
            if not self._splits_layer(1, 1, tp):
                continue
            for cp in divisors(world // tp):
                if cp > self.question.seq_len:
                    break
                for dp in divisors(world // (tp * cp)):
                    pp = world // (tp * cp * dp)
                    if batch % dp or pp > model.num_layers:
                        continue
                    for ulysses in divisors(cp):
                        if self._splits_layer(cp, ulysses, tp):
                            yield from self._micro_batches(Division(pp, dp, cp, ulysses, tp, 1))

    def virtual(self, division: Division) -> list[int]:
        """Legal numbers of chunks a pipeline rank."""
        most = min(self.question.model.num_layers, MAX_STAGES) // division.pp
        if division.pp == 1 or self.micro_batches(division) % division.pp:
            return [1]
        return list(range(1, most + 1))

    def micro_batches(self, division: Division) -> int:
        """Forward passes of a step and rank."""
        return self.question.global_batch // (division.dp * division.micro_batch)

    def _micro_batches(self, division: Division) -> Iterator[Division]:
        share = self.question.global_batch // division.dp
        for size in divisors(min(share, self.question.most_samples)):
            if share % size == 0:
                yield division._replace(micro_batch=size)

    def _splits_layer(self, cp: int, ulysses: int, tp: int) -> bool:
        """Whether the axes that split a layer fit the model."""
        key = cp, ulysses, tp
        if key not in self._layers:
            try:
                check_layout(Layout(cp=cp, ulysses=ulysses, tp=tp), self.question.model)
                self._layers[key] = True
            except UserError:
                self._layers[key] = False
        return self._layers[key]
