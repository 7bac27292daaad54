"""Engine service: a thread that steps the engine, and the event loop's side that submits requests and delivers events.

Everything here but the thread's own function runs in the event loop's thread, so nothing needs a lock: ``submit``
records who waits for a request before a step's events can be handed out.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Sequence

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.requests import Event, Request
from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.metrics import Metrics

StepEvents = list[tuple[int, Event]]  # of one step: which of the ticket's requests, and what happened to it

ENGINE_FAILED = "internal engine error while serving this request; see the server log"
NO_SUCH_REQUEST = -1


class Service:
    """Between ``start`` and ``close`` the engine belongs to it."""

    def __init__(self, engine: Engine, max_queue: int) -> None:
        """``max_queue``: answers that may wait beside those that the engine runs at once."""
        self.engine, self.metrics = engine, Metrics()
        self.max_open = engine.limits.max_running + max_queue
        self.draining = False
        self._waiting: dict[int, tuple[Ticket, int]] = {}  # by the engine's number
        self._tickets: dict[Ticket, int] = {}  # that are not over, and how many answers they asked for
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._steps, name="engine")

    def start(self) -> None:
        """From a coroutine: its event loop is the one that events come to."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_answers(self) -> int:
        return sum(self._tickets.values())

    def admit(self, answers: int) -> None:
        """ApiError for so many more answers: 400 when they are more than this server ever makes at once, 429 when too
        many wait, 503 when the server is shutting down."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
        if answers > self.max_open:
            raise ApiError(400, f"n: {answers} answers at once are more than this server takes, {self.max_open}", "n")
        if self.open_answers + answers > self.max_open:
            again = min(60, max(1, math.ceil(self.metrics.whole.mean)))
            raise ApiError(
                429,
                f"{self.open_answers} answers are being made or wait, and {self.max_open} may; try again later",
                code="queue_full",
                headers={"Retry-After": str(again)},
            )

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queue the requests of one client.

        ApiError: 400 for what the engine refuses, otherwise from ``admit``.
        """
        answers = sum(request.samples for request in requests)
        self.admit(answers)
        ticket = Ticket(self, answers)
        try:
            for place, request in enumerate(requests):
                number = self.engine.submit(request)
                ticket.numbers.append(number)
                self._waiting[number] = (ticket, place)
        except UserError as error:
            self._cancel(ticket)
            raise ApiError(400, str(error)) from None
        self._tickets[ticket] = answers
        self._idle.clear()
        return ticket

    def over(self, ticket: Ticket) -> None:
        """A client that has all it asked for, or has left: what is still running for it stops, its pages are freed."""
        self._cancel(ticket)
        if self._tickets.pop(ticket, None) and not self._tickets:
            self._idle.set()

    def _cancel(self, ticket: Ticket) -> None:
        for number in ticket.numbers:
            if self._waiting.pop(number, None) and ticket.left:
                self.engine.cancel(number)

    async def drain(self, grace: float) -> None:
        """Admit nothing any more; let what runs come to its end, and end what has not after ``grace`` seconds."""
        self.draining = True
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            self.end_all()

    def end_all(self) -> None:
        """Tell every client that the server is shutting down."""
        for ticket in list(self._tickets):
            ticket.fail(ApiError(503, "the server is shutting down; the answer is not complete", code="shutting_down"))

    async def close(self) -> None:
        """Stop the thread, after the step that it is in."""
        self._closing = True
        self.engine.cancel(NO_SUCH_REQUEST)  # wakes it
        await asyncio.to_thread(self._thread.join)

    def now(self) -> dict[str, tuple[str, str, float]]:
        """Present values for ``/metrics``: name -> (its kind there, what it is, value)."""
        pool, scheduler = self.engine.pool, self.engine.scheduler
        running = len(scheduler.running)
        pages, free = pool.num_pages - 1, pool.available
        return {
            "running": ("gauge", "Answers that are being made.", running),
            "queue_length": ("gauge", "Answers that wait for their turn.", max(0, self.open_answers - running)),
            "cache_pages_used": ("gauge", "Pages of the cache that running answers hold.", pages - free),
            "cache_pages_free": (
                "gauge",
                "Pages that can be given out, kept contents of earlier prompts included.",
                free,
            ),
            "preemptions_total": ("counter", "Answers that gave their pages to older ones.", scheduler.preemptions),
        }

    def _steps(self) -> None:
        while not self._closing:
            self.engine.wait()
            try:
                events = self.engine.step()
            except Exception:
                # One step's failure is the end of the requests in it, and not of the server.
                traceback.print_exc()
                self.engine.cancel_all()
                self._loop.call_soon_threadsafe(self._fail)
                continue
            if events:
                self._loop.call_soon_threadsafe(self._hand_out, events, time.perf_counter())

    def _fail(self) -> None:
        for ticket in list(self._tickets):
            self._cancel(ticket)  # one that came since is with the engine still
            ticket.fail(ApiError(500, ENGINE_FAILED))

    def _hand_out(self, events: list[Event], made_at: float) -> None:
        batches: dict[Ticket, StepEvents] = {}
        for event in events:
            ticket, place = self._waiting.get(event.request, (None, 0))
            if event.choice is not None:
                self.metrics.generated_tokens += 1
            if ticket is None:
                continue
            batches.setdefault(ticket, []).append((place, event))
            if event.choice is not None:
                before = ticket.last.get((place, event.sample))
                if before is not None:
                    self.metrics.next_token.add(made_at - before)
                elif not ticket.last:
                    self.metrics.first_token.add(made_at - ticket.started)
                ticket.last[place, event.sample] = made_at
            if event.usage is not None:
                self.metrics.computed_tokens += event.usage.prompt - event.usage.cached
                self.metrics.cached_tokens += event.usage.cached
        for ticket, batch in batches.items():
            ticket.take(batch)


class Ticket:
    """What a client waits with. ``left``: answers that have not ended. ``last``: when each got its latest token."""

    def __init__(self, service: Service, answers: int) -> None:
        self.numbers: list[int] = []
        self.started = time.perf_counter()
        self.last: dict[tuple[int, int], float] = {}
        self._service, self.left = service, answers
        self._news: asyncio.Queue[StepEvents | ApiError] = asyncio.Queue()

    def take(self, batch: StepEvents) -> None:
        self._news.put_nowait(batch)

    def fail(self, error: ApiError) -> None:
        self._news.put_nowait(error)

    async def batches(self, deadline: float) -> AsyncGenerator[StepEvents, None]:
        """What happened, step by step, until every answer has ended.

        ApiError when the engine fails on one of them, or the server ends; TimeoutError at the loop's time ``deadline``.
        """
        while self.left:
            async with asyncio.timeout_at(deadline):
                news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            for _, event in news:
                if event.error is not None:
                    raise ApiError(500, event.error)
                self.left -= event.finish_reason is not None
            yield news
        self._service.metrics.whole.add(time.perf_counter() - self.started)

    def close(self) -> None:
        self._service.over(self)
