"""Inference engine with continuous batching, independent of the backend.

Continuous batching: in every step each running sample gets its next token or a chunk of its prompt; samples join and
leave between steps. The tokens of an answer depend on its request alone: the rotary scaling is fixed when the request
arrives, a random draw is a function of seed, sample and position, and the logits of a row depend on the other rows only
by the rounding of sums.

    engine = Engine(runner, tokenizer)
    number = engine.submit(Request(...))         any thread; UserError for an invalid request
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
from telechat_twins.core.inference.decoding.grammar import Grammars
from telechat_twins.core.inference.pages import PagePool
from telechat_twins.core.inference.requests import RESCALES, Event, Request, Sample, check_request, turn_stops
from telechat_twins.core.inference.runner import Runner, Step
from telechat_twins.core.inference.scheduler import Scheduler
from telechat_twins.core.model.position import RotaryRows

if TYPE_CHECKING:
    from telechat_twins.core.data.tokenizer import Tokenizer

STEP_TOKENS = 512
MAX_RUNNING = 64
SCORED_BYTES = 64 << 20  # of the float32 logits of prompts' tokens in a step


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Limits of an engine, all in tokens or samples.

    ``max_len``: tokens of a request's prompt and answer together (None: as many as the pages hold). ``step_tokens``:
    tokens computed in one step, which also bounds the chunk of a prompt. ``max_running``: samples that share a step.
    """

    max_len: int | None = None
    step_tokens: int = STEP_TOKENS
    max_running: int = MAX_RUNNING


class Engine:
    """Engine that generates for many requests on one model. ``submit``, ``cancel`` and ``wait`` may be called from any
    thread, ``step`` from one thread at a time."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        *,
        rescale: str = "request",
        reuse: bool = True,
        limits: EngineLimits | None = None,
        adapters: int = 0,
    ) -> None:
        """``rescale``: rotary scaling beyond the trained length, fixed for a request ("request") or, as in the released
        code, by the length at which each token is computed ("step"). ``reuse``: prompts with a common prefix share its
        cached keys and values. ``adapters``: number of adapters that the runner has.

        ValueError for limits that leave no tokens of a step for prompts.
        """
        self.limits = limits or EngineLimits()
        if rescale not in RESCALES:
            raise ValueError(f"rescale: '{rescale}' is not one of {', '.join(RESCALES)}")
        if not 1 <= self.limits.max_running < self.limits.step_tokens:
            raise ValueError(
                f"step_tokens: must exceed max_running {self.limits.max_running}, or no token of a step is left for "
                f"prompts; found {self.limits.step_tokens}"
            )
        self.adapters = adapters
        self.runner, self.tokenizer, self.config = runner, tokenizer, runner.config
        self.pool = PagePool(runner.num_pages, runner.page_size)
        self.scheduler = Scheduler(
            self.pool,
            RotaryRows(self.config).scaling,
            self.limits.max_running,
            self.limits.step_tokens,
            reuse,
            rows=max(1, SCORED_BYTES // (4 * self.config.vocab_size)),
        )
        ends = self.config.stop_ids if tokenizer is None else turn_stops(tokenizer, self.config)
        self.grammars = Grammars(tokenizer, self.config.num_tokens, ends)
        self._rescale = rescale
        self._samples: dict[int, list[Sample]] = {}  # unfinished samples by request number
        # Submissions and cancellations (None) from other threads, in their order; the next step takes them.
        self._orders: list[tuple[int, Request | None]] = []
        self._news = threading.Condition()
        self._numbers = 0
        self._arrivals = 0

    @property
    def max_len(self) -> int:
        """Tokens of a request's prompt and answer together, at most."""
        return min(self.limits.max_len or self.pool.capacity, self.pool.capacity)

    def check(self, request: Request) -> None:
        """UserError for a request that is invalid, or too long for the context or the cache."""
        check_request(request, self.config.num_tokens, self.tokenizer is not None)
        if not 0 <= request.adapter <= self.adapters:
            raise UserError(f"adapter: there is no adapter {request.adapter}; this model is used with {self.adapters}")
        if request.grammar is not None:
            self.grammars.check(request.grammar)
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
        """Queue a request. Returns its number, which the events of ``step`` carry. UserError as ``check``."""
        self.check(request)
        with self._news:
            number = self._numbers
            self._numbers += 1
            self._orders.append((number, request))
            self._news.notify_all()
        return number

    def cancel(self, number: int) -> None:
        """Stop a request, queued or running; its samples end with "cancelled" in the next step. Numbers of finished or
        unknown requests are ignored."""
        with self._news:
            self._orders.append((number, None))
            self._news.notify_all()

    def cancel_all(self) -> None:
        """Drop every request at once, without events; only for the thread that calls ``step``."""
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
        """Block until ``step`` has something to do, at most ``timeout`` seconds; whether it has."""
        with self._news:
            return self._news.wait_for(lambda: self.busy, timeout)

    def step(self) -> list[Event]:
        """Run one step: admit and cancel, one forward pass, sample. Returns the events in order of arrival."""
        # 1. Take what other threads have submitted or cancelled since the last step.
        events = self._take_orders()
        # 2. Decide which samples compute how many tokens: one each while decoding, more for chunks of prompts.
        plan = self.scheduler.plan()
        if not plan:
            return events
        # 3. One forward pass over all these tokens. Their keys and values go into the samples' pages.
        step, places = self._assembled(plan)
        logits = self.runner.run(step)  # [W, V]
        for sample, count in plan:
            self.scheduler.computed(sample, count)
        # 4. Choose a token for every sample that has no token left to compute. A sample in the middle of its prompt has
        #    a row of logits only where tokens of the prompt are scored. The rows are in the plan's order.
        tokens = self.config.num_tokens  # logits beyond pad the vocabulary: no bias or temperature may draw them
        first = 0
        for (sample, _), wanted in zip(plan, places, strict=True):
            rows = logits[first : first + len(wanted), :tokens]
            first += len(wanted)
            event = self._advanced(sample, rows, wanted)
            if event is not None:
                events.append(event)
            if sample.finished:
                self._retire(sample)
        return events

    def _advanced(self, sample: Sample, rows: np.ndarray, places: list[int]) -> Event | None:
        """The event of a sample that has computed tokens, from the logits ``rows`` [W, V] at ``places``, if it has
        one."""
        try:
            for row, place in zip(rows, places, strict=True):
                sample.take_score(row, place)
            if sample.missing:
                return None
            if not sample.request.max_new_tokens:
                return sample.end("length")
            return sample.take_token(sample.sampler.choose(rows[-1], len(sample.tokens)))
        except UserError as error:  # logits that are not finite: its keys and values may be damaged, too
            self.scheduler.distrust(sample)
            return sample.end("error", str(error))

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
            constraint = None
            if request.grammar is not None:
                constraint = self.grammars.constraint(request.grammar, request.stop_ids)
            sample = Sample(
                number, request, index, self._arrivals, self.pool.page_size, self._rescale, self.tokenizer, constraint
            )
            self._arrivals += 1
            if index and self.scheduler.reuse:
                sample.leader = samples[0]  # computes the prompt; this sample waits and then shares its pages
            samples.append(sample)
            self.scheduler.add(sample)
        self._samples[number] = samples

    def _retire(self, sample: Sample) -> None:
        self.scheduler.remove(sample)
        others = self._samples[sample.number]
        others.remove(sample)
        if not others:
            del self._samples[sample.number]

    def _assembled(self, plan: list[tuple[Sample, int]]) -> tuple[Step, list[list[int]]]:
        """The runner's input for a plan of R samples with N tokens in all, and the places of each sample whose logits
        are wanted."""
        size = self.pool.page_size
        counts = np.array([count for _, count in plan])  # [R]
        starts = np.zeros(len(plan) + 1, np.int32)  # [R + 1]: sample r has the tokens starts[r] .. starts[r + 1] - 1
        np.cumsum(counts, out=starts[1:])
        # [R]: keys of a sample after this step
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
        owner = np.repeat(np.arange(len(plan)), counts)  # [N]: the sample of each token
        # A token's position: its place in the step, moved so that the sample's last token gets position lengths - 1.
        positions = (np.arange(len(owner), dtype=np.int32) + (lengths - starts[1:])[owner]).astype(np.int32)
        # Logits are wanted after the last token of each sample that is complete with this step, and before each token
        # of a prompt that is to be scored.
        places = [sample.rows(sample.computed, sample.computed + count) for sample, count in plan]
        wanted = [
            starts[row] + place - sample.computed for row, (sample, _) in enumerate(plan) for place in places[row]
        ]
        step = Step(
            ids=np.array(ids, np.int32),
            positions=positions,
            scaling_lengths=np.concatenate(scaling),
            slots=tables[owner, positions // size] * np.int32(size) + positions % size,
            starts=starts,
            lengths=lengths,
            tables=tables,
            wanted=np.array(wanted or [len(owner) - 1], np.int32),  # never empty: runners need one row at least
            adapters=np.array([sample.request.adapter for sample, _ in plan], np.int32),
        )
        return step, places


def stream(engine: Engine, request: Request) -> Generator[Event, None, None]:
    """The events of one request, on an engine that no other caller steps. The request is submitted when the first event
    is asked for, and cancelled when the iterator is closed early.

    UserError at once, as ``check``.
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
