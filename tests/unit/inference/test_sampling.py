"""core.inference.sampling against independent implementations: formulas written out again, and torch the way HF writes
them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.sampling import (
    AHEAD,
    GROUPS,
    Draws,
    History,
    Sampler,
    SamplingConfig,
    adjust,
    check_finite,
    draw,
    kept,
    largest,
    log_probabilities,
    sampling_config,
    top2_margin,
    uniform,
)

# Both sides are float64 over the same few hundred values; the order of summation differs.
CLOSE = 1e-12


def logits_of(seed: int, size: int = 97) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * 3).astype(np.float32)


def penalised(logits, config: SamplingConfig, prompt, output=(), bias=None) -> np.ndarray:
    history = History(prompt)
    for token in output:
        history.add(token)
    return adjust(logits, config, history, bias)


def shares_of(scores: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """What is drawn from, as shares of the whole vocabulary."""
    ids, weights = kept(scores, config)
    shares = np.zeros(scores.size)
    shares[slice(None) if ids is None else ids] = weights / weights.sum()
    return shares


def pick(scores: np.ndarray, config: SamplingConfig, position: int, sample: int = 0) -> int:
    return draw(scores, config, uniform(config.seed, position, sample))


def plain_probabilities(logits, seen, *, penalty, temperature, k, p) -> list[float]:
    """The same rules by loops over Python floats: the judge."""
    scores = [float(x) for x in logits]
    for token in set(seen):
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    scores = [x / temperature for x in scores]
    if k:
        floor = sorted(scores, reverse=True)[min(k, len(scores)) - 1]
        scores = [x if x >= floor else -math.inf for x in scores]
    top = max(scores)
    weights = [math.exp(x - top) for x in scores]
    total = math.fsum(weights)
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    below, kept = 0.0, set()
    for i in order:
        below += weights[i] / total
        if p >= 1 or below > 1 - p:
            kept.add(i)
    kept.add(order[-1])
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


@pytest.mark.parametrize("k", [0, 1, 5, 96, 97, 500])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("penalty", "temperature"), [(1.0, 1.0), (1.3, 0.3), (0.8, 2.5)])
def test_distribution_matches_loops(k, p, penalty, temperature):
    logits = logits_of(k + int(100 * p))
    seen_ids = [3, 3, 3, 40, 96]
    config = sampling_config(temperature=temperature, top_k=k, top_p=p, repetition_penalty=penalty)
    ours = shares_of(penalised(logits, config, seen_ids[:2], seen_ids[2:]), config)
    expected = plain_probabilities(logits, seen_ids, penalty=penalty, temperature=temperature, k=k, p=p)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=CLOSE)
    assert set(np.flatnonzero(ours)) == {i for i, share in enumerate(expected) if share}


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3])
def test_distribution_matches_torch_as_hugging_face_writes_it(min_p):
    torch = pytest.importorskip("torch")
    for seed in range(20):
        logits = logits_of(seed, 300)
        prompt = np.random.default_rng(seed).integers(0, 300, 30)
        scores = torch.from_numpy(logits).double()[None]
        ids = torch.from_numpy(prompt)[None]
        score = torch.gather(scores, 1, ids)  # RepetitionPenaltyLogitsProcessor
        scores = scores.scatter(1, ids, torch.where(score < 0, score * 1.2, score / 1.2))
        scores = scores / 0.7  # TemperatureLogitsWarper
        scores = scores.masked_fill(scores < torch.topk(scores, 40)[0][..., -1, None], -math.inf)  # TopKLogitsWarper
        ordered, indices = torch.sort(scores, descending=False)  # TopPLogitsWarper
        remove = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - 0.85)
        remove[..., -1:] = 0
        scores = scores.masked_fill(remove.scatter(1, indices, remove), -math.inf)
        if min_p:  # MinPLogitsWarper
            probs = torch.softmax(scores, dim=-1)
            scores = scores.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -math.inf)
        expected = torch.softmax(scores, dim=-1)[0].numpy()

        config = sampling_config(temperature=0.7, top_k=40, top_p=0.85, min_p=min_p, repetition_penalty=1.2)
        ours = shares_of(penalised(logits, config, prompt), config)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=CLOSE)
        assert (ours > 0).sum() == (expected > 0).sum()


# A vocabulary large enough for the ways that do not sort it, with a rest that is in no group.
WIDE = 5 * GROUPS + 77


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    k=st.sampled_from([0, 1, 2, 50, GROUPS, GROUPS + 1, WIDE - 1, WIDE + 5]),
    p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 0.9999999, 1.0]),
    temperature=st.sampled_from([0.2, 1.0, 30.0]),
    ties=st.booleans(),
)
def test_large_vocabularies_are_drawn_from_as_if_sorted(seed, k, p, temperature, ties):
    logits = logits_of(seed, WIDE)
    if ties:
        logits = np.round(logits)
    config = sampling_config(temperature=temperature, top_k=k, top_p=p)
    ours = shares_of(logits, config)
    expected = plain_probabilities(logits, [], penalty=1.0, temperature=temperature, k=k, p=p)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=CLOSE)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, WIDE + 3), st.booleans())
def test_the_largest_are_those_of_a_sort(seed, k, ties):
    scores = np.round(logits_of(seed, WIDE)) if ties else logits_of(seed, WIDE)
    floor = np.sort(scores)[::-1][min(k, WIDE) - 1]
    np.testing.assert_array_equal(largest(scores, k), np.flatnonzero(scores >= floor))


def test_penalty_counts_once_and_by_sign():
    config = sampling_config(repetition_penalty=2.0)
    np.testing.assert_array_equal(
        penalised(np.float32([2, -2, 0, 2]), config, [0, 0, 1], [2, 2]), [1.0, -4.0, 0.0, 2.0]
    )


def test_presence_and_frequency_count_the_output_alone():
    config = sampling_config(presence_penalty=0.5, frequency_penalty=0.25)
    got = penalised(np.float32([1, 1, 1, 1]), config, [0, 0, 1], [1, 2, 2, 2])
    np.testing.assert_array_equal(got, [1.0, 0.25, -0.25, 1.0])


def test_bias_comes_after_the_penalties():
    config = sampling_config(repetition_penalty=2.0)
    bias = np.array([0, 3]), np.array([-100.0, 5.0])
    np.testing.assert_array_equal(penalised(np.float32([2, 1, 0, 2]), config, [0], bias=bias), [-99.0, 1.0, 0.0, 7.0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 96), max_size=300), st.lists(st.integers(0, 96), max_size=300))
def test_a_history_is_the_count_of_its_tokens(prompt, output):
    history = History(prompt)
    for token in output:
        history.add(token)
    assert dict(zip(history.ids.tolist(), history.made.tolist(), strict=True)) == {
        token: output.count(token) for token in {*prompt, *output}
    }


def test_top_k_keeps_ties():
    config = sampling_config(temperature=1.0, top_k=1)
    assert np.flatnonzero(shares_of(np.array([1.0, 2.0, 2.0, 0.0]), config)).tolist() == [1, 2]


def test_top_p_boundary_goes_as_written():
    # Ascending shares .125 .125 .25 .5: exact in binary, so the comparison with 1 - p is exact too.
    scores = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    for p, left in ((0.75 + 1e-9, 3), (0.75 - 1e-9, 2), (1e-9, 1)):
        assert np.count_nonzero(shares_of(scores, sampling_config(temperature=1.0, top_p=p))) == left


def test_the_likeliest_token_survives_any_top_p():
    # 1 - 1e-20 is 1 in float64: every token would go.
    config = sampling_config(temperature=1.0, top_p=1e-20)
    assert shares_of(np.array([0.0, 9.0, 1.0]), config).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.5, 3), (1.0 - 2.0**-53, 3)])
def test_a_draw_on_a_boundary_is_never_a_token_left_out(u, token):
    scores = np.array([0.0, 9.0, 0.0, 9.0, 0.0])  # top-k 2 leaves shares 0, 1/2, 0, 1/2, 0
    assert draw(scores, sampling_config(temperature=1.0, top_k=2), u) == token


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0 - 2.0**-53])
def test_a_share_of_zero_is_never_drawn(u):
    # Tokens 0 to 299 and 700 on are too unlikely for a float64; the sums of whole blocks are zero at both ends.
    scores = np.full(1000, -1e4)
    scores[300:700] = 0.0
    assert 300 <= draw(scores, sampling_config(temperature=1.0), u) < 700


def test_greedy_takes_the_first_maximum():
    assert Sampler(SamplingConfig(), []).choose(np.float32([0.0, 3.0, 3.0]), 0).token == 1


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    config = sampling_config(temperature=1e-300)
    np.testing.assert_array_equal(shares_of(np.array([-5.0, 80.0, 7.0]), config), [0, 1, 0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_draw_is_the_inverse_of_the_cumulative_distribution(seed, position):
    scores = logits_of(position % 7).astype(np.float64)
    config = sampling_config(temperature=1.0, top_k=9, seed=seed)
    shares = shares_of(scores, config)
    u, token = uniform(seed, position), 0
    assert 0.0 <= u < 1.0
    below = shares[0]
    while below <= u:
        token += 1
        below += shares[token]
    assert pick(scores, config, position) == token
    assert shares[token] > 0


def test_draws_follow_the_distribution():
    scores = np.log(np.array([0.1, 0.2, 0.0001, 0.3, 0.3999]))
    config = sampling_config(temperature=1.0, seed=5)
    count = 4000
    drawn = np.bincount([pick(scores, config, i) for i in range(count)], minlength=5) / count
    # Standard deviation of a share is at most sqrt(.25/4000) = 0.008; four of them.
    np.testing.assert_allclose(drawn, np.exp(scores), atol=0.032)


def philox4x64(key: int, counter: int) -> int:
    """First word of Philox4x64-10 (Salmon et al. 2011), in plain integers."""
    mask = 2**64 - 1
    c = [(counter >> (64 * i)) & mask for i in range(4)]
    k = [key & mask, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & mask, (first >> 64) ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c[0]


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 3), (2**64 - 1, 12345), (1, 2**40)])
def test_random_numbers_are_philox(seed, position):
    # numpy steps the counter before the first block.
    for sample in (0, 3):
        expected = philox4x64(seed, position + 1 + (sample << 64))
        assert uniform(seed, position, sample) == (expected >> 11) * 2.0**-53


def test_random_numbers_do_not_repeat_over_seeds_positions_and_samples():
    values = {uniform(seed, position, sample) for seed in range(12) for position in range(12) for sample in range(12)}
    assert len(values) == 12**3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3 * AHEAD), max_size=20), st.integers(0, 5))
def test_numbers_made_ahead_are_those_made_one_by_one(positions, sample):
    draws = Draws(9, sample)
    assert [draws.at(position) for position in positions] == [uniform(9, position, sample) for position in positions]


def test_log_probabilities_are_of_the_model_and_the_likeliest_come_first():
    logits = np.float32([1.0, 3.0, 3.0, -2.0])
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    logprob, top = log_probabilities(logits, 3, 3)
    assert logprob == pytest.approx(expected[3], abs=CLOSE)
    assert [token for token, _ in top] == [1, 2, 0]
    np.testing.assert_allclose([value for _, value in top], expected[[1, 2, 0]], atol=CLOSE)
    # Penalties, bias and temperature choose the token; what is told is what the model thinks of it.
    sampler = Sampler(sampling_config(temperature=0.5, repetition_penalty=3.0), [1], bias={3: 50.0}, logprobs=0)
    choice = sampler.choose(logits, 5)
    assert (choice.token, choice.top, choice.margin) == (3, (), None)
    assert choice.logprob == pytest.approx(expected[3], abs=CLOSE)


def test_a_sampler_penalises_what_it_chose():
    sampler = Sampler(sampling_config(presence_penalty=2.0), [0])
    logits = np.float32([3.0, 2.5, 2.0, 0.5])
    assert [sampler.choose(logits, position).token for position in range(1, 5)] == [0, 1, 2, 0]
    assert Sampler(SamplingConfig(), [0], bias={0: -1.0}, margins=True).choose(logits, 1)[:2] == (1, 0.5)


def test_margin():
    assert top2_margin(np.array([1.0, 4.0, 2.5])) == 1.5
    assert top2_margin(np.array([4.0, 4.0])) == 0.0
    assert top2_margin(np.array([4.0])) == math.inf


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "sampling.temperature: must be at least 0.0"),
        ({"top_p": 0.0}, "sampling.top_p: must be above 0.0"),
        ({"top_p": 1.5}, "sampling.top_p: must be at most 1.0"),
        ({"min_p": 1.5}, "sampling.min_p: must be at most 1.0"),
        ({"top_k": -1}, "sampling.top_k: must be at least 0"),
        ({"top_k": 2.5}, "sampling.top_k: expected a whole number"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty: must be above 0.0"),
        ({"presence_penalty": 101.0}, "sampling.presence_penalty: must be at most 100"),
        ({"frequency_penalty": math.nan}, "sampling.frequency_penalty: nan is not a number"),
        ({"seed": -1}, "sampling.seed: must be at least 0"),
        ({"temprature": 1.0}, "did you mean 'temperature'?"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_bad_options_are_refused(values, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        sampling_config(**values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(UserError, match="1 of 3 are not finite at position 8"):
        check_finite(np.array([0.0, bad, 1.0]), 8)
