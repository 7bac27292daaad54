"""Engine service: a thread that steps the engine, and methods of the event loop that submit requests and deliver
events.

Everything here except the thread's own function runs in the event loop's thread, so no lock is needed: ``submit``
registers the ticket of a request before the events of a step can be delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.requests import Event, Request
from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.metrics import Metrics

StepEvents = list[tuple[int, Event]]  # events of one step, with the index of the request in its ticket

ENGINE_FAILED = "internal engine error while serving this request; see the server log"
NO_SUCH_REQUEST = -1
IDLE_S = 20.0  # without a request, before other ranks are told so; far below the limit of a collective


class Service:
    """Service of one engine, which nothing else may step between ``start`` and ``close``."""

    def __init__(self, engine: Engine, max_queue: int, idle: Callable[[], None] | None = None) -> None:
        """``max_queue``: answers that may wait, beside those that the engine runs at once. ``idle`` is called by the
        engine's thread after every IDLE_S seconds without a request."""
        self.engine, self.metrics = engine, Metrics()
        self.max_open = engine.limits.max_running + max_queue
        self.draining = False
        self._waiting: dict[int, tuple[Ticket, int]] = {}  # ticket and index in it, by the engine's request number
        self._tickets: dict[Ticket, int] = {}  # open tickets, with the number of answers they asked for
        self._arriving: set[asyncio.Timeout] = set()  # of requests whose bodies are being read; they end with ``drain``
        self._closing, self._when_idle = False, idle
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._steps, name="engine")

    def start(self) -> None:
        """Start the thread. Call from a coroutine: events are delivered in its event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_answers(self) -> int:
        return sum(self._tickets.values())

    @contextlib.asynccontextmanager
    async def arrival(self, reading: asyncio.Timeout) -> AsyncGenerator[None, None]:
        """While a body is read under the time limit ``reading``, which ``drain`` brings to its end."""
        self._arriving.add(reading)
        try:
            yield
        finally:
            self._arriving.discard(reading)

    def check_open(self) -> None:
        """ApiError 503 when the server is shutting down."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})

    def admit(self, answers: int) -> None:
        """Check that ``answers`` more may be queued. ApiError 400 when they exceed what this server takes at once, 429
        when the queue is full, 503 when the server is shutting down."""
        self.check_open()
        if answers > self.max_open:
            message = f"n: this server takes at most {self.max_open} answers at once, found {answers}; ask for fewer"
            raise ApiError(400, message, "n")
        if self.open_answers + answers > self.max_open:
            again = min(60, max(1, math.ceil(self.metrics.whole.mean)))
            raise ApiError(
                429,
                f"the queue is full: {self.open_answers} of at most {self.max_open} answers are running or waiting; "
                "try again later",
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
        """Close the ticket of a client that has its answers or has disconnected, and cancel what still runs for it."""
        self._cancel(ticket)
        if self._tickets.pop(ticket, None) and not self._tickets:
            self._idle.set()

    def _cancel(self, ticket: Ticket) -> None:
        for number in ticket.numbers:
            if self._waiting.pop(number, None) and ticket.left:
                self.engine.cancel(number)

    async def drain(self, grace: float) -> None:
        """Admit no more requests, and wait for the running ones; after ``grace`` seconds, end what is left."""
        self.draining = True
        for reading in self._arriving:
            if not reading.expired():
                reading.reschedule(self._loop.time())
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            self.end_all()

    def end_all(self) -> None:
        """End every open ticket with the error that the server is shutting down."""
        for ticket in list(self._tickets):
            ticket.fail(ApiError(503, "the server is shutting down; the answer is not complete", code="shutting_down"))

    async def close(self) -> None:
        """Stop the thread after its current step."""
        self._closing = True
        self.engine.cancel(NO_SUCH_REQUEST)  # wakes the thread from ``wait``
        await asyncio.to_thread(self._thread.join)

    def now(self) -> dict[str, tuple[str, str, float]]:
        """Current values for ``/metrics``: name -> (metric kind, help text, value)."""
        pool, scheduler = self.engine.pool, self.engine.scheduler
        running = len(scheduler.running)
        pages, free = pool.num_pages - 1, pool.available
        return {
            "running": ("gauge", "Answers being generated.", running),
            "queue_length": ("gauge", "Answers waiting in the queue.", max(0, self.open_answers - running)),
            "cache_pages_used": ("gauge", "Cache pages held by running answers.", pages - free),
            "cache_pages_free": ("gauge", "Cache pages available, reusable ones of earlier prompts included.", free),
            "preemptions_total": ("counter", "Answers preempted in favour of older ones.", scheduler.preemptions),
        }

    def _steps(self) -> None:
        while not self._closing:
            busy = self.engine.wait(None if self._when_idle is None else IDLE_S)
            try:
                if not busy and self._when_idle is not None:
                    self._when_idle()
                events = self.engine.step()
            except Exception:
                # A failed step ends its requests, but not the server.
                traceback.print_exc()
                self.engine.cancel_all()
                self._loop.call_soon_threadsafe(self._fail)
                continue
            if events:
                self._loop.call_soon_threadsafe(self._hand_out, events, time.perf_counter())

    def _fail(self) -> None:
        for ticket in list(self._tickets):
            self._cancel(ticket)  # requests submitted after cancel_all are still with the engine
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
    """Open answers of one client, whose events it waits for.

    ``left``: answers that have not ended. ``last``: time of the latest token, by (request index, sample).
    """

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
        """The events of each step, until every answer has ended.

        ApiError when an answer fails or the server shuts down; TimeoutError at the event loop's time ``deadline``.
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
