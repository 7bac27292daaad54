"""Log-likelihoods of continuations on an engine, with the work that requests have in common done once.

A continuation's last token needs no forward pass of its own: its log-probability is read from the logits before it. So
requests with the same context and the same continuation but for its last token are one sequence for the engine, as the
four one-token choices of a question are. Sequences that share a context share its cached pages: the first of them is
computed alone, the others after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.requests import Event, PromptScores, Request

Ids = tuple[int, ...]


class Pair(NamedTuple):
    """Token ids of a context and of the continuation that is scored, each at least one."""

    context: Ids
    continuation: Ids


class Likelihood(NamedTuple):
    """Log-likelihood (nats) of a continuation, and whether each of its tokens is the likeliest, the lower id among
    equals."""

    logprob: float
    greedy: bool


@dataclass
class _Sequence:
    """One prompt of the engine, and the pairs that it answers: their places, and where their continuations begin."""

    ids: Ids
    first: int
    places: list[int] = field(default_factory=list)

    def request(self, pairs: Sequence[Pair], adapter: int) -> Request:
        return Request(
            prompt_ids=self.ids,
            max_new_tokens=0,
            adapter=adapter,
            prompt_logprobs=1,
            scored_from=self.first,
            next_ids=tuple(pairs[place].continuation[-1] for place in self.places),
        )

    def answers(self, pairs: Sequence[Pair], scores: PromptScores) -> Iterator[tuple[int, Likelihood]]:
        for place, last in zip(self.places, scores.next, strict=True):
            pair = pairs[place]
            before = scores.tokens[len(scores.tokens) - len(pair.continuation) + 1 :]
            greedy = scores.next_top[0][0] == pair.continuation[-1]
            likeliest = all(choice.top[0][0] == choice.token for choice in before)
            yield place, Likelihood(sum(float(choice.logprob or 0.0) for choice in before) + last, likeliest and greedy)


class Scorer:
    """Scorer of many requests on an engine that no other caller steps. ``adapter``: its number, 0 for none."""

    def __init__(self, engine: Engine, adapter: int = 0) -> None:
        self.engine, self.adapter = engine, adapter
        self._ahead = 2 * engine.limits.max_running  # requests that the engine has at once

    def likelihoods(
        self, pairs: Sequence[Pair], on_done: Callable[[int, Likelihood], object] | None = None
    ) -> list[Likelihood]:
        """Of each pair, in their order. ``on_done(place, likelihood)`` is called for each as soon as it is known.

        UserError for a pair longer than the context, and for logits that are not finite.
        """
        found: dict[int, Likelihood] = {}
        running: dict[int, tuple[_Sequence, list[_Sequence]]] = {}
        waiting: deque[list[_Sequence]] = deque(_families(pairs))
        ready: deque[_Sequence] = deque()  # their context is in the cache
        while waiting or ready or running:
            while (ready or waiting) and len(running) < self._ahead:
                # What follows a context comes before the next context, while its pages are still there.
                sequence, others = (ready.popleft(), []) if ready else _split(waiting.popleft())
                running[self.engine.submit(sequence.request(pairs, self.adapter))] = sequence, others
            for event in self.engine.step():
                sequence, others = running.pop(event.request)
                ready.extend(others)
                for place, likelihood in sequence.answers(pairs, scores_of(event)):
                    found[place] = likelihood
                    if on_done is not None:
                        on_done(place, likelihood)
        return [found[place] for place in range(len(pairs))]

    def generate(self, requests: Sequence[Request], on_done: Callable[[int, str], object] | None = None) -> list[str]:
        """The text of each request's answer. UserError as ``likelihoods``."""
        texts = [""] * len(requests)
        running: dict[int, int] = {}
        waiting = deque(range(len(requests)))
        while waiting or running:
            while waiting and len(running) < self._ahead:
                place = waiting.popleft()
                running[self.engine.submit(requests[place])] = place
            for event in self.engine.step():
                place = running[event.request]
                if event.error is not None:
                    raise UserError(event.error)
                texts[place] += event.text
                if event.finish_reason is not None:
                    del running[event.request]
                    if on_done is not None:
                        on_done(place, texts[place])
        return texts


def scores_of(event: Event) -> PromptScores:
    """The scores of a request's only event; UserError where it failed."""
    if event.scores is None or event.error is not None:
        raise UserError(event.error or f"a request ended with '{event.finish_reason}' before it was computed")
    return event.scores


def _split(family: list[_Sequence]) -> tuple[_Sequence, list[_Sequence]]:
    return family[0], family[1:]


def _families(pairs: Sequence[Pair]) -> Iterable[list[_Sequence]]:
    """Sequences by context, contexts in the order of their tokens, so that shared beginnings are neighbours."""
    sequences: dict[Ids, _Sequence] = {}
    families: dict[Ids, list[_Sequence]] = {}
    for place, pair in enumerate(pairs):
        if not pair.context or not pair.continuation:
            raise ValueError(f"pair {place}: context and continuation need a token each")
        ids = pair.context + pair.continuation[:-1]
        if ids not in sequences:
            sequences[ids] = _Sequence(ids, len(pair.context))
            families.setdefault(pair.context, []).append(sequences[ids])
        sequences[ids].places.append(place)
        sequences[ids].first = min(sequences[ids].first, len(pair.context))
    return [families[context] for context in sorted(families)]


def rolling_windows(ids: Sequence[int], prefix: int, length: int) -> list[Pair]:
    """A text of n tokens in windows of at most ``length`` + 1 tokens, each token scored once, after as much of the text
    before it as fits: the windows that lm-evaluation-harness makes with a context of one token.

    The first token follows ``prefix``. The last window reaches back to be full, so only its end is scored.
    """
    windows: list[Pair] = []
    done = 0
    while done < len(ids):
        count = min(length, len(ids) - done)
        before = [prefix] if done == 0 else list(ids[max(0, done - 1 - (length - count)) : done])
        windows.append(Pair(tuple(before), tuple(ids[done : done + count])))
        done += count
    return windows


def truncated(pair: Pair, length: int) -> Pair:
    """A pair cut from the left so that at most ``length`` tokens are computed; UserError for a continuation that does
    not fit."""
    if len(pair.continuation) > length:
        raise UserError(
            f"a continuation of {len(pair.continuation)} tokens does not fit the context of {length}; "
            "use a model or an option with more room, e.g. --max-len"
        )
    kept = (pair.context + pair.continuation)[-(length + 1) :]
    return Pair(kept[: len(kept) - len(pair.continuation)], pair.continuation)
