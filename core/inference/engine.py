"""Inference engine with continuous batching, independent of the backend.

Continuous batching: in every step each running sample gets its next token or a piece of its prompt, samples join and
leave between steps. What a request's tokens are depends on the request alone: its rotary scaling is fixed when it
arrives, its draws are a function of seed, sample and position, and the logits of a row do not depend on the other rows
but for the rounding of sums.

    engine = Engine(runner, tokenizer)
    number = engine.submit(Request(...))         any thread; raises what is wrong with the request
    for event in engine.step(): ...              one thread; until the event with a finish_reason
    engine.cancel(number)                        any thread, any time
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.pages import PagePool
from telechat_twins.core.inference.requests import RESCALES, Event, Request, Sample, check_request
from telechat_twins.core.inference.runner import Runner, Step
from telechat_twins.core.inference.scheduler import Scheduler
from telechat_twins.core.model.position import RotaryRows

if TYPE_CHECKING:
    from telechat_twins.core.data.tokenizer import Tokenizer

STEP_TOKENS = 512
MAX_RUNNING = 64


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """``max_len``: tokens that prompt and answer of a request may reach (None: what the pages hold). ``step_tokens``:
    computed in a step at most, so the longest piece of a prompt. ``max_running``: samples that share a step."""

    max_len: int | None = None
    step_tokens: int = STEP_TOKENS
    max_running: int = MAX_RUNNING


class Engine:
    """Serves requests on one model. ``submit``, ``cancel`` and ``wait`` may be called from any thread, ``step`` from
    one at a time."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        *,
        rescale: str = "request",
        reuse: bool = True,
        limits: EngineLimits | None = None,
    ) -> None:
        """``rescale``: rotary scaling beyond the trained length, fixed per request, or by each token's own length as
        released ("step"). ``reuse``: keys and values of a prompt's beginning are used again by later prompts.

        ValueError for limits that leave a prompt no tokens in a step.
        """
        self.limits = limits or EngineLimits()
        if rescale not in RESCALES:
            raise ValueError(f"rescale: '{rescale}' is not one of {', '.join(RESCALES)}")
        if not 1 <= self.limits.max_running < self.limits.step_tokens:
            raise ValueError(
                f"step_tokens: {self.limits.step_tokens} leave none for prompts beside {self.limits.max_running} "
                "running samples"
            )
        self.runner, self.tokenizer, self.config = runner, tokenizer, runner.config
        self.pool = PagePool(runner.num_pages, runner.page_size)
        self.scheduler = Scheduler(
            self.pool,
            RotaryRows(self.config).scaling,
            self.limits.max_running,
            self.limits.step_tokens,
            reuse,
        )
        self._rescale = rescale
        self._samples: dict[int, list[Sample]] = {}  # of requests that are not finished
        self._orders: list[tuple[int, Request | None]] = []  # not yet seen by a step; None cancels
        self._news = threading.Condition()
        self._numbers = 0
        self._arrivals = 0

    @property
    def max_len(self) -> int:
        """Tokens that prompt and answer of a request may reach together."""
        return min(self.limits.max_len or self.pool.capacity, self.pool.capacity)

    def check(self, request: Request) -> None:
        """UserError for a request that could never be served: what is wrong with it, or that it is too long."""
        check_request(request, self.config.num_tokens, self.tokenizer is not None)
        if request.total > self.max_len:
            what = "the context" if self.max_len < self.pool.capacity else "the cache"
            raise UserError(
                f"max_new_tokens: the prompt's {len(request.prompt_ids)} tokens and {request.max_new_tokens} new ones "
                f"are {request.total}, and {what} has room for {self.max_len}; "
                + (
                    f"give at most {self.max_len - len(request.prompt_ids)}"
                    if len(request.prompt_ids) < self.max_len
                    else f"shorten the prompt to fewer than {self.max_len}"
                )
            )

    def submit(self, request: Request) -> int:
        """Queue a request; its number, which the events of ``step`` carry. UserError at once, from ``check``."""
        self.check(request)
        with self._news:
            number = self._numbers
            self._numbers += 1
            self._orders.append((number, request))
            self._news.notify_all()
        return number

    def cancel(self, number: int) -> None:
        """Stop a request, wherever it is; its samples end with "cancelled" in the next step. One that has finished, or
        was never there, is not an error."""
        with self._news:
            self._orders.append((number, None))
            self._news.notify_all()

    def cancel_all(self) -> None:
        """Stop every request, at once and without events; from the thread that steps."""
        with self._news:
            self._orders.clear()
        for samples in list(self._samples.values()):
            for sample in samples[:]:
                self._retire(sample)

    @property
    def busy(self) -> bool:
        """Whether ``step`` has something to do."""
        return bool(self._orders or self._samples)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there is something to do, or ``timeout`` seconds; whether there is."""
        with self._news:
            return self._news.wait_for(lambda: self.busy, timeout)

    def step(self) -> list[Event]:
        """Serve everything that is running once: what came of it, in the order of arrival."""
        events = self._take_orders()
        plan = self.scheduler.plan()
        if not plan:
            return events
        logits = self.runner.run(self._assembled(plan))
        for sample, count in plan:
            self.scheduler.computed(sample, count)
        ready = [sample for sample, _ in plan if not sample.missing]
        tokens = self.config.num_tokens  # rows beyond pad the vocabulary: no bias or temperature may draw them
        for sample, row in zip(ready, logits[: len(ready)], strict=True):
            try:
                event = sample.take_token(sample.sampler.choose(row[:tokens], len(sample.tokens)))
            except UserError as error:
                self.scheduler.distrust(sample)
                event = sample.end("error", str(error))
            events.append(event)
            if sample.finished:
                self._retire(sample)
        return events

    def _take_orders(self) -> list[Event]:
        with self._news:
            orders, self._orders = self._orders, []
        events = []
        for number, request in orders:
            if request is not None:
                self._arrive(number, request)
                continue
            for sample in self._samples.get(number, [])[:]:
                events.append(sample.end("cancelled"))
                self._retire(sample)
        return events

    def _arrive(self, number: int, request: Request) -> None:
        samples: list[Sample] = []
        for index in range(request.samples):
            sample = Sample(number, request, index, self._arrivals, self.pool.page_size, self._rescale, self.tokenizer)
            self._arrivals += 1
            if index and self.scheduler.reuse:
                sample.leader = samples[0]
            samples.append(sample)
            self.scheduler.add(sample)
        self._samples[number] = samples

    def _retire(self, sample: Sample) -> None:
        self.scheduler.remove(sample)
        others = self._samples[sample.number]
        others.remove(sample)
        if not others:
            del self._samples[sample.number]

    def _assembled(self, plan: list[tuple[Sample, int]]) -> Step:
        size = self.pool.page_size
        counts = np.array([count for _, count in plan])
        starts = np.zeros(len(plan) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        lengths = np.array([sample.computed + count for sample, count in plan], np.int32)
        tables = np.zeros((len(plan), self.pool.pages_for(int(lengths.max()))), np.int32)
        ids: list[int] = []
        scaling = []
        for row, (sample, count) in enumerate(plan):
            first, last = sample.computed, sample.computed + count
            ids += sample.tokens[first:last]
            scaling.append(sample.scaling_lengths(first, last))
            pages = self.pool.pages_for(last)
            tables[row, :pages] = sample.table[:pages]
        owner = np.repeat(np.arange(len(plan)), counts)
        positions = (np.arange(len(owner), dtype=np.int32) + (lengths - starts[1:])[owner]).astype(np.int32)
        ends = [starts[row + 1] - 1 for row, (sample, count) in enumerate(plan) if sample.missing == count]
        return Step(
            ids=np.array(ids, np.int32),
            positions=positions,
            scaling_lengths=np.concatenate(scaling),
            slots=tables[owner, positions // size] * np.int32(size) + positions % size,
            starts=starts,
            lengths=lengths,
            tables=tables,
            wanted=np.array(ends or [len(owner) - 1], np.int32),
        )


def stream(engine: Engine, request: Request) -> Generator[Event, None, None]:
    """The events of one request, on an engine that no other caller steps. Left early, the request is cancelled; never
    begun, it is never there.

    UserError at once, from ``check``.
    """
    engine.check(request)
    return _events(engine, request)


def _events(engine: Engine, request: Request) -> Generator[Event, None, None]:
    number, samples = engine.submit(request), request.samples
    try:
        while samples:
            for event in engine.step():
                if event.request == number:
                    samples -= event.finish_reason is not None
                    yield event
    finally:
        if samples:
            engine.cancel(number)
            engine.step()
