"""Scheduler of continuous batching: admission, the share of each sample in a step, and preemption.

Every step, samples that have their prompt behind them get one token each; what is left of the step's tokens goes to
prompts, the oldest first, in pieces. A sample is admitted when there are pages for all tokens that it has. When one
that is running needs a page and none is left, the youngest gives all of its pages back, and computes its tokens again
later. So the oldest is never stopped by another, and every sample gets there: that it fits alone was checked at its
arrival.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from operator import attrgetter

from telechat_twins.core.inference.pages import PagePool
from telechat_twins.core.inference.requests import Sample

ORDER = attrgetter("order")


class Scheduler:
    """``reuse``: look for pages of earlier prompts. ``waiting`` and ``running`` are in the order of arrival."""

    def __init__(
        self,
        pool: PagePool,
        scaling: Callable[[int], tuple[float, float]],
        max_samples: int,
        step_tokens: int,
        reuse: bool = True,
    ) -> None:
        """``scaling``: RotaryRows.scaling; ``max_samples`` run at once; ``step_tokens`` are computed in a step."""
        self.pool, self.reuse = pool, reuse
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        self.preemptions = 0
        self._scaling, self._max_samples, self._step_tokens = scaling, max_samples, step_tokens

    def add(self, sample: Sample) -> None:
        """Let a sample wait for its turn."""
        bisect.insort(self.waiting, sample, key=ORDER)

    def remove(self, sample: Sample) -> None:
        """Forget a sample, wherever it is, and free its pages."""
        if sample in self.running:
            self.running.remove(sample)
            self._free(sample)
        else:
            self.waiting.remove(sample)

    def plan(self) -> list[tuple[Sample, int]]:
        """The samples of the next step and how many tokens each gets: those with one token first."""
        stopped = self.preemptions
        for sample in list(self.running):
            while sample in self.running and not self._grow(sample):
                self._preempt(self.running[-1])
        one = [(sample, 1) for sample in self.running if sample.missing == 1]
        left = self._step_tokens - len(one)
        several = []
        for sample in self.running:
            if sample.missing > 1 and left:
                several.append((sample, min(sample.missing, left)))
                left -= several[-1][1]
        while left and len(self.running) < self._max_samples and stopped == self.preemptions:
            first = next((sample for sample in self.waiting if not sample.waits), None)
            if first is None or not self._admit(first):
                break
            count = min(first.missing, left)
            (one if count == 1 else several).append((first, count))
            left -= count
        return one + several

    def computed(self, sample: Sample, count: int) -> None:
        """``count`` more tokens of a sample are in its pages; pages that they filled become known."""
        first, sample.computed = sample.computed, sample.computed + count
        if self.reuse:
            size = self.pool.page_size
            for page in range(first // size, sample.computed // size):
                self.pool.name(int(sample.table[page]), sample.page_name(page, self._scaling))

    def distrust(self, sample: Sample) -> None:
        """The contents of a sample's pages are not to be used again."""
        self.pool.forget(int(page) for page in sample.table[: sample.held])

    def _grow(self, sample: Sample) -> bool:
        """Pages for all of a running sample's tokens, if there are any left."""
        while sample.held < self.pool.pages_for(len(sample.tokens)):
            if not self.pool.available:
                return False
            self._take(sample)
        return True

    def _take(self, sample: Sample) -> None:
        sample.table[sample.held] = self.pool.take()
        sample.held += 1

    def _admit(self, sample: Sample) -> bool:
        """Move a waiting sample to the running ones, with pages for all its tokens; False when they are not there."""
        pool = self.pool
        # The last token is always computed: what comes after it is asked for.
        for page in range((len(sample.tokens) - 1) // pool.page_size if self.reuse else 0):
            found = pool.find(sample.page_name(page, self._scaling))
            if found is None:
                break
            pool.share(found)
            sample.table[sample.held] = found
            sample.held += 1
        found_tokens = sample.held * pool.page_size
        # A page for each of the others, or the next one to need a page would stop this sample again.
        if pool.available < pool.pages_for(len(sample.tokens)) - sample.held + len(self.running):
            self._free(sample)
            return False
        self._grow(sample)
        sample.computed = found_tokens
        if sample.cached is None:
            sample.cached = min(found_tokens, len(sample.request.prompt_ids))
        self.waiting.remove(sample)
        bisect.insort(self.running, sample, key=ORDER)
        return True

    def _preempt(self, sample: Sample) -> None:
        self.preemptions += 1
        self.running.remove(sample)
        self._free(sample)
        self.add(sample)

    def _free(self, sample: Sample) -> None:
        self.pool.give_back(sample.table[: sample.held].tolist())
        sample.held = sample.computed = 0
