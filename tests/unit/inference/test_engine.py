"""The engine and its scheduler on runners without a model: whatever else is going on, a request gets its own tokens,
and every page comes back."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference import requests as requests_module
from telechat_twins.core.inference.engine import Engine, EngineLimits, stream
from telechat_twins.core.inference.pages import PagePool
from telechat_twins.core.inference.requests import Request, Sample
from telechat_twins.core.inference.sampling import Draws, SamplingConfig, sampling_config
from telechat_twins.core.inference.scheduler import Scheduler
from tests.support.engine_support import CONFIG, PlainRunner, fake_logits, finish, tokens_of

DRAWN = sampling_config(temperature=1.0, top_k=20, seed=3)
PENALISED = sampling_config(temperature=0.9, top_p=0.8, presence_penalty=0.5, repetition_penalty=1.2, seed=8)


def ids(seed: int, count: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(CONFIG.vocab_size), k=count))


def request(seed: int = 1, prompt: int = 5, new: int = 6, **options) -> Request:
    return Request(prompt_ids=ids(seed, prompt), max_new_tokens=new, **options)


def alone(asked: Request, **options) -> list[list[int]]:
    """The tokens of a request that nobody shares the engine with, computed in one piece, by sample."""
    engine = Engine(PlainRunner(num_pages=2000), limits=EngineLimits(step_tokens=4096), reuse=False, **options)
    engine.submit(asked)
    (events,) = finish(engine).values()
    return [tokens_of(events, sample) for sample in range(asked.samples)]


def test_a_request_alone_is_the_plain_loop():
    tokens = list(ids(1, 5))
    for _ in range(6):
        tokens.append(int(np.argmax(fake_logits(tokens, CONFIG.vocab_size))))
    assert alone(request()) == [tokens[5:]]


def test_events_tell_the_token_the_end_and_what_it_cost():
    engine = Engine(PlainRunner())
    number = engine.submit(request(prompt=9, new=3))
    events = finish(engine)[number]
    assert [event.finish_reason for event in events] == [None, None, "length"]
    usage = events[-1].usage
    assert (usage.prompt, usage.completion, usage.cached) == (9, 3, 0)
    again = engine.submit(request(prompt=9, new=3))
    assert finish(engine)[again][-1].usage.cached == 8


def test_requests_join_and_leave_between_steps():
    runner = PlainRunner()
    engine = Engine(runner)
    first = engine.submit(request(1, new=4))
    assert [event.request for event in engine.step()] == [first]
    second = engine.submit(request(2, new=2))
    assert [event.request for event in engine.step()] == [first, second]
    assert [event.finish_reason for event in engine.step()] == [None, "length"]
    assert [event.finish_reason for event in engine.step()] == ["length"]
    assert engine.step() == [] and not engine.busy
    assert runner.sizes == [[5], [1, 5], [1, 1], [1]]


def test_a_long_prompt_comes_in_pieces_and_the_others_go_on():
    runner = PlainRunner()
    engine = Engine(runner, limits=EngineLimits(step_tokens=10, max_running=4))
    short = engine.submit(request(1, new=12))
    engine.step()
    long = engine.submit(request(2, prompt=23, new=2))
    found = finish(engine)
    assert runner.sizes[1:4] == [[1, 9], [1, 9], [1, 5]]
    assert tokens_of(found[long]) == alone(request(2, prompt=23, new=2))[0]
    assert len(found[short]) == 11


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), rescale=st.sampled_from(["request", "step"]), reuse=st.booleans())
def test_random_company_changes_no_tokens_and_every_page_comes_back(seed, rescale, reuse):
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4, 16])
    longest = 40
    # From barely room for the longest request to room for all.
    runner = PlainRunner(num_pages=longest // size + rng.choice([2, 4, 10, 80]), page_size=size)
    limits = EngineLimits(step_tokens=rng.choice([6, 9, 64]), max_running=rng.choice([1, 3, 5]))
    engine = Engine(runner, rescale=rescale, reuse=reuse, limits=limits)
    beginning = ids(99, 12)  # that some prompts share
    asked, cancelled, found = {}, set(), {}
    for _ in range(rng.randint(1, 8)):
        prompt = rng.choice([beginning[: rng.randint(0, 12)], ()]) + ids(rng.randrange(50), rng.randint(1, 12))
        sampling = rng.choice([SamplingConfig(), DRAWN, PENALISED])
        new = Request(
            prompt_ids=prompt, max_new_tokens=rng.randint(1, 16), sampling=sampling, samples=rng.choice([1, 1, 2, 3])
        )
        asked[engine.submit(new)] = new
        for _ in range(rng.randint(0, 6)):
            for event in engine.step():
                found.setdefault(event.request, []).append(event)
            engine.pool.check()
        if rng.random() < 0.2:
            cancelled.add(rng.choice(list(asked)))
            engine.cancel(max(cancelled))
    for number, events in finish(engine, 3000).items():  # nobody starves
        found.setdefault(number, []).extend(events)
    engine.pool.check()
    assert engine.pool.available == runner.num_pages - 1
    for number, new in asked.items():
        expected = alone(new, rescale=rescale)
        for sample in range(new.samples):
            got = tokens_of(found[number], sample)
            last = next(event for event in reversed(found[number]) if event.sample == sample)
            assert last.finish_reason in ("length", *(["cancelled"] if number in cancelled else []))
            assert got == expected[sample][: len(got)]
            assert last.finish_reason == "cancelled" or len(got) == new.max_new_tokens


def crowded(rescale: str = "request") -> tuple[Engine, dict[int, Request]]:
    """More than the pages hold at once, with a beginning that all share."""
    engine = Engine(PlainRunner(num_pages=14), rescale=rescale, limits=EngineLimits(step_tokens=16, max_running=6))
    asked = {}
    for seed in range(6):
        new = Request(prompt_ids=ids(99, 9) + ids(seed, 5), max_new_tokens=20, sampling=DRAWN)
        asked[engine.submit(new)] = new
    return engine, asked


@pytest.mark.parametrize("rescale", ["request", "step"])
def test_who_has_to_give_way_goes_on_later_with_the_same_tokens(rescale):
    engine, asked = crowded(rescale)
    found = finish(engine)
    assert engine.scheduler.preemptions > 3
    for number, new in asked.items():
        assert tokens_of(found[number]) == alone(new, rescale=rescale)[0]
    # The first to come is never the one to give way.
    ends = {number: events[-1] for number, events in found.items()}
    assert list(ends)[0] == 0
    engine.pool.check()
    assert engine.pool.available == 13


def test_waiting_requests_are_served_in_their_order():
    engine, asked = crowded()
    firsts = []
    while engine.busy:
        for event in engine.step():
            if event.request not in firsts:
                firsts.append(event.request)
    assert firsts == list(asked)


# What prompts have in common


def test_a_request_that_waits_for_pages_costs_nothing_in_each_step(monkeypatch: pytest.MonkeyPatch):
    counts = {"find": 0, "share": 0, "give_back": 0}

    def count(name: str) -> None:
        real = getattr(PagePool, name)

        def counted(*args):
            counts[name] += 1
            return real(*args)

        monkeypatch.setattr(PagePool, name, counted)

    for name in counts:
        count(name)
    engine = Engine(PlainRunner(num_pages=41))
    first = request(seed=1, prompt=100, new=60)
    running = engine.submit(first)
    engine.step()
    # 12 of its 38 pages are found in the cache; of the 40 in all, the other request leaves 15 and fewer.
    second = replace(first, prompt_ids=first.prompt_ids[:50] + ids(2, 100), max_new_tokens=10)
    waiting = engine.submit(second)
    events: list = []
    while not any(event.request == running and event.finish_reason for event in events):
        assert counts["share"] == 0 and counts["give_back"] == 0
        events += engine.step()
    assert 0 < counts["find"] <= 3 * 13, "its prefix is walked along in every step"
    assert [tokens_of(finish(engine)[waiting])] == alone(second)
    assert counts["share"] == 12


def test_a_shared_beginning_is_computed_once():
    runner = PlainRunner()
    engine = Engine(runner)
    system = ids(7, 21)
    for seed in range(3):
        engine.submit(Request(prompt_ids=system + ids(seed, 3), max_new_tokens=2))
        finish(engine)
    assert [sizes for sizes in runner.sizes if sizes != [1]] == [[24], [4], [4]]


def test_an_answer_is_found_again_in_the_next_turn():
    engine = Engine(PlainRunner())
    asked = request(prompt=6, new=7)
    made = alone(asked)[0]
    engine.submit(asked)
    finish(engine)
    follow = Request(prompt_ids=(*asked.prompt_ids, *made, 5), max_new_tokens=2)
    number = engine.submit(follow)
    events = finish(engine)[number]
    assert events[-1].usage.cached == 12  # of 14, in pages of 4; the last token made was never computed
    assert tokens_of(events) == alone(follow)[0]


def test_several_samples_share_their_prompt():
    runner = PlainRunner()
    engine = Engine(runner)
    new = request(prompt=18, new=5, sampling=DRAWN, samples=3)
    number = engine.submit(new)
    events = finish(engine)[number]
    assert runner.sizes[:2] == [[18], [1, 2, 2]]
    tokens = [tokens_of(events, sample) for sample in range(3)]
    assert tokens == alone(new)
    assert len({tuple(t) for t in tokens}) == 3
    assert tokens[0] == alone(replace(new, samples=1))[0]


def test_scaled_prompts_are_not_mixed_up():
    """Beyond the trained length keys depend on the planned one: the same prompt with another plan is another prompt."""
    engine = Engine(PlainRunner(num_pages=400))
    prompt = ids(3, 280)
    cached = []
    for new in (4, 4, 5, 300):
        number = engine.submit(Request(prompt_ids=prompt, max_new_tokens=new))
        cached.append(finish(engine)[number][-1].usage.cached)
    assert cached == [0, 276, 0, 0]


def test_step_scaling_reuses_what_came_in_at_the_same_length():
    engine = Engine(PlainRunner(num_pages=400), rescale="step")
    first, longer = ids(3, 280), ids(3, 280) + ids(4, 20)
    cached = []
    for prompt in (first, first, longer):
        number = engine.submit(Request(prompt_ids=prompt, max_new_tokens=4))
        cached.append(finish(engine)[number][-1].usage.cached)
    assert cached == [0, 276, 0]
    short = Engine(PlainRunner(), rescale="step")  # within the trained length nothing depends on it
    cached = []
    for prompt in (first[:20], first[:40]):
        number = short.submit(Request(prompt_ids=prompt, max_new_tokens=4))
        cached.append(finish(short)[number][-1].usage.cached)
    assert cached == [0, 20]


def test_step_scaling_is_by_prompt_and_then_by_token():
    runner = PlainRunner()
    engine = Engine(runner, rescale="step", limits=EngineLimits(step_tokens=4, max_running=2))
    engine.submit(request(prompt=6, new=3))
    finish(engine)
    assert runner.lengths[4:12].tolist() == [6, 6, 6, 6, 6, 6, 7, 8]


# Ends


def test_a_stop_token_ends_an_answer():
    made = alone(request(new=10))[0]
    engine = Engine(PlainRunner())
    number = engine.submit(request(new=10, stop_ids=frozenset({made[4]})))
    events = finish(engine)[number]
    assert tokens_of(events) == made[: made.index(made[4]) + 1]
    assert (events[-1].finish_reason, events[-1].stop) == ("stop", made[4])


class Letters:
    """A tokenizer of one letter a token."""

    control: dict[str, int] = {}
    silent: dict[str, int] = {}
    anchor = 0

    def decode(self, ids, skip_special=False):
        return "".join(chr(ord("A") + i) for i in ids)

    def stream(self):
        from telechat_twins.core.data.detokenizer import StreamDecoder

        return StreamDecoder(self)

    def is_silent(self, index):
        return False

    def byte_of(self, index):
        return None


def test_a_stop_string_ends_an_answer_and_is_never_shown():
    text = Letters().decode(alone(request(new=10))[0])
    for stop in (text[3:5], text[6:9], text[0]):
        engine = Engine(PlainRunner(), Letters())
        number = engine.submit(request(new=10, stop_texts=(stop, "no such text"), text="answer"))
        events = finish(engine)[number]
        at = text.index(stop)
        assert "".join(event.text for event in events) == text[:at]
        assert (events[-1].finish_reason, events[-1].stop) == ("stop", stop)
        assert len(events) == at + len(stop)


def test_text_held_back_comes_with_the_last_token():
    text = Letters().decode(alone(request(new=5))[0])
    engine = Engine(PlainRunner(), Letters())
    number = engine.submit(request(new=5, stop_texts=(text[3:] + "more",), text="answer"))
    events = finish(engine)[number]
    assert [event.text for event in events] == [*text[:3], "", text[3:]]
    assert events[-1].finish_reason == "length"


def test_log_probabilities_and_margins_come_with_their_token():
    engine = Engine(PlainRunner())
    number = engine.submit(request(new=3, logprobs=2, margins=True))
    events = finish(engine)[number]
    prefix = list(ids(1, 5))
    for event in events:
        logits = fake_logits(prefix, CONFIG.vocab_size).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        (first, top), (_, second) = event.choice.top
        assert first == event.choice.token and top == pytest.approx(event.choice.logprob)
        assert top == pytest.approx(expected.max())
        assert event.choice.margin == pytest.approx(top - second)
        prefix.append(event.choice.token)


def test_a_bias_changes_the_choice():
    engine = Engine(PlainRunner())
    number = engine.submit(request(new=3, logit_bias={7: 100.0}))
    assert tokens_of(finish(engine)[number]) == [7, 7, 7]


def test_a_cancelled_request_frees_its_pages_wherever_it_is():
    engine = Engine(PlainRunner(num_pages=12), limits=EngineLimits(step_tokens=8, max_running=2))
    running, reading, waiting = (engine.submit(request(seed, prompt=14, new=8)) for seed in range(3))
    for _ in range(3):
        engine.step()
    for number in (reading, waiting, running):
        engine.cancel(number)
        (event,) = engine.step()[:1]
        assert (event.request, event.finish_reason) == (number, "cancelled")
        engine.pool.check()
    engine.cancel(running)
    engine.cancel(77)
    assert engine.step() == [] and not engine.busy
    assert engine.pool.available == 11


def test_a_stream_left_early_is_cancelled():
    engine = Engine(PlainRunner())
    events = stream(engine, request(new=50))
    next(events), next(events)
    events.close()
    assert not engine.busy and engine.pool.available == 199


def test_one_request_that_fails_leaves_the_others_alone():
    def logits(prefix, size):
        return (
            np.full(size, np.nan, np.float32)
            if prefix[:5] == list(ids(2, 5)) and len(prefix) > 14
            else fake_logits(prefix, size)
        )

    engine = Engine(PlainRunner(logits=logits))
    good, bad = engine.submit(request(1, new=20)), engine.submit(request(2, new=20))
    found = finish(engine)
    assert tokens_of(found[good]) == alone(request(1, new=20))[0]
    last = found[bad][-1]
    assert (
        last.finish_reason == "error" and "are not finite at position 14" in last.error and last.usage.completion == 10
    )
    # What it computed is not trusted again.
    again = engine.submit(request(2, new=20))
    assert finish(engine)[again][-1].usage.cached == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(prompt=0), "prompt: must have at least one token"),
        (request(new=0), "max_new_tokens: must be at least 1, found 0"),
        (request(samples=0), "samples: must be 1 to 128, found 0"),
        (request(logprobs=65), "logprobs: must be 0 to 64"),
        (request(stop_texts=("",)), "stop: must not be an empty string"),
        (request(stop_texts=("x",)), "stop: stop strings and text output need a tokenizer, found none"),
        (request(text="prose"), "text: 'prose' is not one of none, answer, tools, continuation"),
        (request(logit_bias={64: 1.0}), "logit_bias: token id 64 at place 0 is outside the vocabulary"),
        (request(logit_bias={3: float("inf")}), "logit_bias: token 3 has inf; must be from -100 to 100"),
        (
            request(prompt=30, new=20),
            "prompt's 30 tokens and 20 new ones are 50, and the cache has room for 40; give at most 10",
        ),
        (request(prompt=40, new=1), "the cache has room for 40; shorten the prompt to fewer than 40"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(asked, message):
    engine = Engine(PlainRunner(num_pages=11))
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        engine.submit(asked)
    assert "\n" not in str(caught.value) and not engine.busy


def test_a_context_shorter_than_the_cache_is_named():
    engine = Engine(PlainRunner(), limits=EngineLimits(max_len=20))
    with pytest.raises(UserError, match="are 24, and the context has room for 20; give at most 8"):
        engine.submit(request(prompt=12, new=12))
    assert engine.max_len == 20


def test_limits_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="step_tokens: must exceed max_running"):
        Engine(PlainRunner(), limits=EngineLimits(step_tokens=8, max_running=8))
    with pytest.raises(ValueError, match="rescale: 'never' is not one of request, step"):
        Engine(PlainRunner(), rescale="never")


def test_requests_come_from_other_threads():
    engine = Engine(PlainRunner())
    asked: dict[int, Request] = {}
    lock = threading.Lock()

    def client(seed: int) -> None:
        for number in range(5):
            new = request(10 * seed + number, prompt=3 + seed, new=6)
            with lock:
                asked[engine.submit(new)] = new

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    found: dict[int, list] = {}
    while any(thread.is_alive() for thread in threads) or engine.busy:
        engine.wait(0.01)
        for event in engine.step():
            found.setdefault(event.request, []).append(event)
    assert len(asked) == 20 and not engine.wait(0.0)
    for number, new in asked.items():
        assert tokens_of(found[number]) == alone(new)[0]


# The tests above must be able to fail


def forgets_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagePool, "give_back", lambda self, pages: None)


def names_without_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    real = requests_module.page_name
    monkeypatch.setattr(requests_module, "page_name", lambda before, ids, scaling: real(before, ids, scaling * 0))


def names_without_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    real = requests_module.page_name
    monkeypatch.setattr(requests_module, "page_name", lambda before, ids, scaling: real(b"", ids, scaling))


def draws_by_order_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**6))
    real = Draws.at
    monkeypatch.setattr(Draws, "at", lambda self, position: real(self, next(calls)))


def preempts_without_computing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Scheduler._preempt

    def faulty(self: Scheduler, sample: Sample) -> None:
        computed = sample.computed
        real(self, sample)
        monkeypatch.setattr(
            type(sample), "missing", property(lambda s: max(1, len(s.tokens) - max(s.computed, computed)))
        )

    monkeypatch.setattr(Scheduler, "_preempt", faulty)


def reuses_the_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Scheduler._admit

    def faulty(self: Scheduler, sample: Sample) -> bool:
        done = real(self, sample)
        if done and sample.computed:
            sample.computed += 1
        return done

    monkeypatch.setattr(Scheduler, "_admit", faulty)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "pages are not freed": (forgets_to_free, lambda: test_a_stream_left_early_is_cancelled()),
    "names without scaling": (names_without_scaling, lambda: test_scaled_prompts_are_not_mixed_up()),
    "names without what came before": (
        names_without_what_came_before,
        lambda: test_random_company_changes_no_tokens_and_every_page_comes_back(),
    ),
    "draws by order of asking": (
        draws_by_order_of_asking,
        lambda: test_random_company_changes_no_tokens_and_every_page_comes_back(),
    ),
    "preempted without computing again": (
        preempts_without_computing_again,
        lambda: test_who_has_to_give_way_goes_on_later_with_the_same_tokens("request"),
    ),
    "a token of a reused prompt is skipped": (
        reuses_the_whole_prompt,
        lambda: test_a_shared_beginning_is_computed_once(),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check()
