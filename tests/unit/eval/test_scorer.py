"""Log-likelihoods on an engine: the definition, whatever requests have in common; and what that saves."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.scorer import Likelihood, Pair, Scorer, rolling_windows, truncated
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.requests import Request
from tests.support.engine_support import CONFIG, PlainRunner, fake_logits

V = CONFIG.vocab_size


def defined(pair: Pair) -> Likelihood:
    total, greedy = 0.0, True
    ids = pair.context + pair.continuation
    for place in range(len(pair.context), len(ids)):
        logits = fake_logits(ids[:place], V).astype(np.float64)
        total += logits[ids[place]] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        greedy = greedy and int(logits.argmax()) == ids[place]
    return Likelihood(total, greedy)


def continued(context: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The greedy continuation."""
    made: list[int] = []
    for _ in range(count):
        made.append(int(fake_logits((*context, *made), V).argmax()))
    return tuple(made)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_likelihoods_are_those_of_the_definition(seed: int) -> None:
    rng = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(V), k=rng.randint(1, most)))

    contexts = [ids(15) for _ in range(3)]
    pairs = []
    for _ in range(rng.randint(1, 12)):
        context = rng.choice(contexts)
        whole = rng.choice([ids(5), continued(context, rng.randint(1, 3)), (*ids(2), rng.randrange(V))])
        # Also cut where another pair's context ends later.
        cut = rng.randint(1, len(context)) if rng.random() < 0.3 else len(context)
        pairs.append(Pair(context[:cut], context[cut:] + whole))
    pairs += pairs[:2]
    limits = EngineLimits(step_tokens=rng.choice([7, 30]), max_running=rng.choice([1, 4]))
    runner = PlainRunner(num_pages=rng.choice([12, 200]), page_size=rng.choice([2, 4]))
    seen: dict[int, Likelihood] = {}
    found = Scorer(Engine(runner, limits=limits)).likelihoods(pairs, seen.__setitem__)
    for place, pair in enumerate(pairs):
        expected = defined(pair)
        assert found[place].logprob == pytest.approx(expected.logprob, abs=1e-9)
        assert found[place].greedy == expected.greedy
    assert [seen[place] for place in range(len(pairs))] == found


def test_what_requests_have_in_common_is_computed_once() -> None:
    runner = PlainRunner(num_pages=400)
    context = tuple(random.Random(1).choices(range(V), k=40))
    # Four one-token choices are one sequence; of longer ones only the pages behind the context are computed again.
    Scorer(Engine(runner)).likelihoods([Pair(context, (token,)) for token in range(4)])
    assert runner.sizes == [[40]]
    runner.sizes.clear()
    Scorer(Engine(runner)).likelihoods([Pair(context, (token, 5, 6)) for token in range(4)])
    assert runner.sizes == [[42], [6, 6, 6]]  # 36 of 40 tokens are whole pages before the first logits


def test_an_answer_is_text_of_its_own_and_adapters_go_along() -> None:
    asked: list[Request] = []
    engine = Engine(PlainRunner(), adapters=1)
    submit = engine.submit
    engine.submit = lambda request: asked.append(request) or submit(request)  # type: ignore[method-assign]
    scorer = Scorer(engine, 1)
    scorer.likelihoods([Pair((1, 2), (3,))])
    texts = scorer.generate([Request(prompt_ids=(1, 2), max_new_tokens=3, adapter=1)])
    assert texts == [""] and {request.adapter for request in asked} == {1}


def test_logits_that_are_not_finite_are_an_error() -> None:
    engine = Engine(PlainRunner(logits=lambda prefix, size: np.full(size, np.nan, np.float32)))
    with pytest.raises(UserError, match="not finite"):
        Scorer(engine).likelihoods([Pair((1, 2), (3, 4))])
    with pytest.raises(UserError, match="not finite"):
        Scorer(engine).generate([Request(prompt_ids=(1, 2), max_new_tokens=3)])


@pytest.mark.parametrize(("count", "length"), [(1, 4), (4, 4), (5, 4), (11, 4), (12, 5), (0, 4)])
def test_windows_score_each_token_once_after_all_that_fits(count: int, length: int) -> None:
    ids = list(range(10, 10 + count))
    windows = rolling_windows(ids, 7, length)
    assert [token for window in windows for token in window.continuation] == ids
    done = 0
    for window in windows:
        # Full, but for the first: the harness's windows (utils.get_rolling_token_windows, make_disjoint_window).
        whole = [7, *ids][: done + len(window.continuation) + 1]
        assert list(window.context + window.continuation) == whole[-(length + 1) :]
        done += len(window.continuation)


def test_what_is_too_long_is_cut_from_the_left() -> None:
    assert truncated(Pair((1, 2, 3), (4, 5)), 4) == Pair((1, 2, 3), (4, 5))
    assert truncated(Pair((1, 2, 3), (4, 5)), 3) == Pair((2, 3), (4, 5))
    assert truncated(Pair((1, 2, 3), (4, 5)), 2) == Pair((3,), (4, 5))
    with pytest.raises(UserError, match="a continuation of 2 tokens does not fit the context of 1"):
        truncated(Pair((1, 2, 3), (4, 5)), 1)
