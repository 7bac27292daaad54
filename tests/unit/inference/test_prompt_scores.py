"""Log-probabilities of prompts: the definition in float64, whatever company, chunks, cached pages and preemption."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference import engine as engine_module
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.requests import PromptScores, Request
from telechat_twins.core.inference.worker import read_events, write_events
from tests.support.engine_support import CONFIG, PlainRunner, fake_logits, finish, tokens_of

V = CONFIG.vocab_size


def ids(seed: int, count: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(V), k=count))


def log_softmax(prefix: Sequence[int]) -> np.ndarray:
    """Float64 log-probabilities [V] after a prefix."""
    logits = fake_logits(prefix, V).astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def check_scores(scores: PromptScores, asked: Request) -> None:
    """The scores of a request against the definition."""
    prompt, top = asked.prompt_ids, asked.prompt_logprobs
    places = range(asked.scored_from, len(prompt))
    assert [choice.token for choice in scores.tokens] == [prompt[place] for place in places]
    for place, choice in zip(places, scores.tokens, strict=True):
        expected = log_softmax(prompt[:place])
        assert choice.logprob == pytest.approx(expected[prompt[place]], abs=1e-12)
        assert [token for token, _ in choice.top] == np.argsort(-expected, kind="stable")[:top].tolist()
    after = log_softmax(prompt)
    assert scores.next == pytest.approx([after[token] for token in asked.next_ids], abs=1e-12)
    assert [token for token, _ in scores.next_top] == np.argsort(-after)[: top if asked.next_ids else 0].tolist()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), reuse=st.booleans())
def test_company_chunks_pages_and_preemption_change_no_score(seed, reuse):
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4, 16])
    runner = PlainRunner(num_pages=40 // size + rng.choice([2, 4, 10, 80]), page_size=size)
    limits = EngineLimits(step_tokens=rng.choice([6, 9, 64]), max_running=rng.choice([1, 3, 5]))
    engine = Engine(runner, reuse=reuse, limits=limits)
    engine.scheduler._rows = rng.choice([1, 3, 100])
    beginning = ids(99, 12)
    asked, found = {}, {}
    for _ in range(rng.randint(1, 8)):
        prompt = rng.choice([beginning[: rng.randint(0, 12)], ()]) + ids(rng.randrange(50), rng.randint(1, 12))
        scored = rng.random() < 0.7
        new = Request(
            prompt_ids=prompt,
            max_new_tokens=rng.choice([0, 0, 1, 7]) if scored else rng.randint(1, 16),
            samples=rng.choice([1, 1, 2]),
            prompt_logprobs=rng.choice([0, 1, 4]) if scored else None,
            scored_from=rng.randint(1, len(prompt)) if scored else 1,
            next_ids=ids(seed, rng.choice([0, 3])) if scored else (),
        )
        asked[engine.submit(new)] = new
        for _ in range(rng.randint(0, 6)):
            for event in engine.step():
                found.setdefault(event.request, []).append(event)
            engine.pool.check()
    for number, events in finish(engine, 3000).items():
        found.setdefault(number, []).extend(events)
    engine.pool.check()
    assert engine.pool.available == runner.num_pages - 1
    for number, new in asked.items():
        for sample in range(new.samples):
            assert len(tokens_of(found[number], sample)) == new.max_new_tokens
        reported = [event.scores for event in found[number] if event.scores is not None]
        assert len(reported) == (new.prompt_logprobs is not None)
        for scores in reported:
            check_scores(scores, new)


def test_no_step_has_more_rows_of_logits_than_their_bytes_allow(monkeypatch):
    monkeypatch.setattr(engine_module, "SCORED_BYTES", 4 * V * 5)
    runner = PlainRunner()
    engine = Engine(runner, limits=EngineLimits(step_tokens=64, max_running=4))
    rows: list[int] = []
    run = runner.run
    runner.run = lambda step: rows.append(len(step.wanted)) or run(step)
    for n in range(4):
        engine.submit(Request(prompt_ids=ids(n, 30), max_new_tokens=0, prompt_logprobs=0))
    finish(engine)
    assert max(rows) <= 5 + 4 and sum(rows) >= 4 * 29
    # Tokens before the first scored one need no row: they come in one piece.
    runner.sizes.clear()
    engine.submit(Request(prompt_ids=ids(9, 60), max_new_tokens=0, prompt_logprobs=0, scored_from=58))
    finish(engine)
    assert runner.sizes == [[60]]


def test_cached_pages_end_before_the_first_scored_token():
    engine = Engine(PlainRunner())
    prompt = ids(1, 21)
    engine.submit(Request(prompt_ids=prompt, max_new_tokens=1))
    finish(engine)
    for first, cached in ((1, 0), (9, 8), (12, 8), (21, 20)):
        number = engine.submit(Request(prompt_ids=prompt, max_new_tokens=0, prompt_logprobs=1, scored_from=first))
        (event,) = finish(engine)[number]
        assert event.usage.cached == cached and event.finish_reason == "length" and event.choice is None
        check_scores(event.scores, Request(prompt_ids=prompt, max_new_tokens=0, prompt_logprobs=1, scored_from=first))


def test_logits_that_are_not_finite_end_a_scored_prompt():
    def damaged(prefix: Sequence[int], size: int) -> np.ndarray:
        return fake_logits(prefix, size) * (np.nan if len(prefix) == 3 else 1.0)

    engine = Engine(PlainRunner(logits=damaged))
    number = engine.submit(Request(prompt_ids=ids(1, 9), max_new_tokens=2, prompt_logprobs=0))
    (event,) = finish(engine)[number]
    assert event.finish_reason == "error" and "at position 2" in event.error
    assert engine.pool.available == 199


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, found 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs: must be 0 to 64"),
        ({"prompt_logprobs": 0, "scored_from": 4}, "scored_from: must be 1 to 3, found 4"),
        ({"prompt_logprobs": 0, "next_ids": (64,)}, "next_ids: token id 64 at place 0"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Engine(PlainRunner()).submit(Request(**{"prompt_ids": (1, 2, 3), "max_new_tokens": 1, **options}))


def test_events_with_scores_survive_the_file(tmp_path):
    engine = Engine(PlainRunner())
    engine.submit(Request(prompt_ids=ids(1, 4), max_new_tokens=1, prompt_logprobs=2, next_ids=(5,)))
    (events,) = finish(engine).values()
    write_events(tmp_path / "events.json", events, 0.25)
    assert read_events(tmp_path / "events.json") == (events, 0.25)
