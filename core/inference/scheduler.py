"""Scheduler of continuous batching: admission, the tokens of each sample in a step, and preemption.

In every step, samples that are decoding get one token each. The rest of the step's token budget goes to prompts in
chunks, the oldest first. A waiting sample is admitted when the pool has pages for all tokens that it has so far. When a
running sample needs a page and none is left, the youngest running sample is preempted: it gives all of its pages back,
waits, and later computes its tokens again. So the oldest sample always advances, and since each was checked on arrival
to fit the cache alone, every sample finishes.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from operator import attrgetter

from telechat_twins.core.inference.pages import PagePool
from telechat_twins.core.inference.requests import Sample

ORDER = attrgetter("order")


class Scheduler:
    """Queues of samples, and the plan of each step.

    ``reuse``: prompts with a common prefix share its pages. ``waiting`` and ``running`` are in order of arrival.
    """

    def __init__(
        self,
        pool: PagePool,
        scaling: Callable[[int], tuple[float, float]],
        max_samples: int,
        step_tokens: int,
        reuse: bool = True,
        rows: int = 512,
    ) -> None:
        """``scaling``: RotaryRows.scaling; ``max_samples``: that run at once; ``step_tokens``: budget of a step;
        ``rows``: of logits in a step, at most, that score tokens of prompts."""
        self.pool, self.reuse = pool, reuse
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        self.preemptions = 0
        self._scaling, self._max_samples, self._step_tokens = scaling, max_samples, step_tokens
        self._rows = rows

    def add(self, sample: Sample) -> None:
        """Queue a sample."""
        bisect.insort(self.waiting, sample, key=ORDER)

    def remove(self, sample: Sample) -> None:
        """Remove a sample, running or waiting, and free its pages."""
        if sample in self.running:
            self.running.remove(sample)
            self._free(sample)
        else:
            self.waiting.remove(sample)

    def plan(self) -> list[tuple[Sample, int]]:
        """The samples of the next step with the number of tokens each computes; those with one token come first."""
        # 1. Pages for the next token of every running sample, the oldest first. While one cannot get its page, preempt
        #    the youngest, which may be that sample itself.
        stopped = self.preemptions
        for sample in list(self.running):
            while sample in self.running and not self._grow(sample):
                self._preempt(self.running[-1])
        # 2. Decoding samples come before prompts: they cost one token each, and their users see the delay. There are
        #    fewer of them than step_tokens (EngineLimits), so prompts always have some budget.
        one = [(sample, 1) for sample in self.running if sample.missing == 1]
        left = self._step_tokens - len(one)
        # 3. The rest of the budget goes to prompts that are being computed, in chunks.
        several: list[tuple[Sample, int]] = []
        rows = self._rows
        for sample in self.running:
            if sample.missing > 1 and left:
                count = chunk(sample, left, rows)
                if count:
                    (one if count == 1 else several).append((sample, count))
                left, rows = left - count, rows - scored(sample, count)
        # 4. What is left admits waiting samples in order of arrival: when the first one does not fit, smaller ones
        #    behind it do not overtake it, or it might wait forever (samples that wait for their leader's prompt are
        #    passed over). None is admitted in a step with a preemption: pages are short already.
        while left and len(self.running) < self._max_samples and stopped == self.preemptions:
            first = next((sample for sample in self.waiting if not sample.waits), None)
            if first is None or not self._admit(first):
                break
            count = chunk(first, left, rows)
            if not count:
                break  # the logits of a step are spent; it computes its prompt from the next step on
            (one if count == 1 else several).append((first, count))
            left, rows = left - count, rows - scored(first, count)
        return one + several

    def computed(self, sample: Sample, count: int) -> None:
        """Record that ``count`` more tokens of a sample are in its pages, and name the pages that they filled."""
        first, sample.computed = sample.computed, sample.computed + count
        if self.reuse:
            size = self.pool.page_size
            for page in range(first // size, sample.computed // size):
                self.pool.name(int(sample.table[page]), sample.page_name(page, self._scaling))

    def distrust(self, sample: Sample) -> None:
        """Exclude a sample's pages from reuse by other samples."""
        self.pool.forget(int(page) for page in sample.table[: sample.held])

    def _grow(self, sample: Sample) -> bool:
        """Take pages for all of a running sample's tokens; False when none are left (those taken are kept)."""
        while sample.held < self.pool.pages_for(len(sample.tokens)):
            if not self.pool.available:
                return False
            self._take(sample)
        return True

    def _take(self, sample: Sample) -> None:
        sample.table[sample.held] = self.pool.take()
        sample.held += 1

    def _admit(self, sample: Sample) -> bool:
        """Move a waiting sample to the running ones, with pages for all its tokens; False when there are too few."""
        found = self._fits(sample)
        if found is None:
            return False
        for page in found:
            self.pool.share(page)
        sample.table[: len(found)] = found
        sample.held = len(found)
        self._grow(sample)
        sample.computed = len(found) * self.pool.page_size
        if sample.cached is None:
            sample.cached = min(sample.computed, len(sample.request.prompt_ids))
        self.waiting.remove(sample)
        bisect.insort(self.running, sample, key=ORDER)
        return True

    def _fits(self, sample: Sample) -> list[int] | None:
        """The pages of the longest cached prefix of a waiting sample, if the pool has pages for the rest of it; else
        None.

        A refused sample is asked about again in every step, so the walk along its prefix is not repeated before it can
        succeed. Let S be the available pages and the found ones that others hold: sharing a page costs S nothing, since
        an idle page is available as well. The sample fits when S reaches its pages and one for each running sample. S
        grows by one with each of the pool's ``gains``, so after a refusal that many are to come first. (By more only
        where the lost beginning of a prefix is named anew; the sample then waits for pages given back.)
        """
        pool = self.pool
        # Beside its own pages, one must be left for each running sample. Otherwise the next of them that needs a page
        # would preempt this one, the youngest, right away.
        wanted = pool.pages_for(len(sample.tokens)) + len(self.running)
        if wanted - sample.fitting > pool.gains:
            return None
        # The page of the last token is left out, or of the first one before a token to score: these must be computed in
        # any case, since their logits are needed.
        found: list[int] = []
        for place in range(sample.first_row // pool.page_size if self.reuse else 0):
            page = pool.find(sample.page_name(place, self._scaling))
            if page is None:
                break
            found.append(page)
        supply = pool.available + sum(pool.holders(page) > 0 for page in found)
        if supply < wanted:
            sample.fitting = supply - pool.gains
            return None
        return found

    def _preempt(self, sample: Sample) -> None:
        self.preemptions += 1
        self.running.remove(sample)
        self._free(sample)
        self.add(sample)

    def _free(self, sample: Sample) -> None:
        self.pool.give_back(sample.table[: sample.held].tolist())
        sample.held = sample.computed = 0


def chunk(sample: Sample, left: int, rows: int) -> int:
    """Tokens that a sample computes in a step with ``left`` tokens and ``rows`` rows of logits for scores."""
    count = min(sample.missing, left)
    if not sample.scoring:
        return count
    # Tokens before the first one to score need no row.
    return min(count, max(sample.first_row - sample.computed, 0) + rows) if sample.missing > 1 else count


def scored(sample: Sample, count: int) -> int:
    """Rows of logits that the scores of the next ``count`` tokens of a sample need."""
    return len(sample.rows(sample.computed, sample.computed + count)) if sample.scoring else 0
