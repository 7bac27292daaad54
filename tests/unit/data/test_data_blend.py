"""The order of samples: a bijection each pass, exact shares, the same from any starting point."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.config import DataConfig, DataSourceConfig
from telechat_twins.core.data.blend import MAX_PERIOD, SourceSchedule, open_blend
from telechat_twins.core.data.packed import PackedWriter
from telechat_twins.core.data.permute import Permutation
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import IGNORE
from tests.support.data_support import VOCAB_SIZE, reseal, tiny_tokenizer

PAD = 3
PINNED = [1, 4, 7, 3, 8, 0, 9, 6, 5, 2]
PINNED_LARGE = [110518307534, 373275265389, 503842459929]


def packed(path, tokens, docs=1):
    """A text folder of ids 20, 21, ... in ``docs`` equal documents."""
    with PackedWriter(path, tiny_tokenizer(), "text") as writer:
        for part in np.array_split(20 + np.arange(tokens) % (VOCAB_SIZE - 20), docs):
            writer.start_document()
            writer.add_tokens(part)
        writer.finish()
    return path


def config(*sources, seq_len=8, isolate=False):
    given = [DataSourceConfig(path=str(path), weight=weight) for path, weight in sources]
    return DataConfig(sources=given, seq_len=seq_len, isolate_documents=isolate)


def blend(*sources, seed=1, **options):
    return open_blend(config(*sources, **options), seed, VOCAB_SIZE, PAD)


# ---- permutation


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**63), st.integers(0, 5))
def test_permutation_is_a_bijection(n, seed, epoch):
    places = [Permutation(n, seed, 0, epoch)(i) for i in range(n)]
    assert sorted(places) == list(range(n))


def test_permutation_is_fixed_for_good():
    # These numbers must never change: a run resumed with another order would see samples twice.
    assert [Permutation(10, 1234, 0, 0)(i) for i in range(10)] == PINNED
    assert [Permutation(10**12, 7, 1, 3)(i) for i in range(3)] == PINNED_LARGE


def test_permutation_needs_no_memory_and_depends_on_every_key_part():
    n = 10**15
    seen = {tuple(Permutation(n, *key)(i) for i in range(4)) for key in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]}
    assert len(seen) == 4
    with pytest.raises(IndexError):
        Permutation(5, 0)(5)


def test_permutation_mixes():
    n, runs = 16, 4000
    counts = np.zeros((n, n))
    for seed in range(runs):
        order = Permutation(n, seed)
        for i in range(n):
            counts[i, order(i)] += 1
    # Each cell is Binomial(runs, 1/n): mean 250, standard deviation 15.3; 6 deviations over 256 cells.
    assert np.abs(counts - runs / n).max() < 6 * np.sqrt(runs / n)


# ---- weights


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), st.integers(1, 3000))
def test_each_source_stays_within_one_of_its_share(weights, start):
    schedule = SourceSchedule(weights)
    assert sum(schedule.weights) == 1
    total = sum(Fraction(repr(w)) for w in weights)
    for given_weight, share in zip(weights, schedule.weights, strict=True):
        assert abs(share - Fraction(repr(given_weight)) / total) <= Fraction(len(weights), MAX_PERIOD)
    counts = [0] * len(weights)
    shares = [int(share * schedule.period) for share in schedule.weights]
    for n in range(400):
        source, served = schedule(n)
        assert served == counts[source]
        counts[source] += 1
        for k, share in enumerate(shares):
            assert abs(counts[k] * schedule.period - (n + 1) * share) < schedule.period
    # Far on, without counting: what was served before is within one of the share as well.
    source, served = schedule(start * 10**6)
    assert abs(served - start * 10**6 * schedule.weights[source]) <= 1


def test_weights_repeat_exactly():
    schedule = SourceSchedule([0.7, 0.2, 0.1])
    assert schedule.weights == [Fraction(7, 10), Fraction(1, 5), Fraction(1, 10)]
    assert schedule.period == 10
    assert np.bincount([schedule(n)[0] for n in range(1000)]).tolist() == [700, 200, 100]


# ---- blend


def test_every_pass_takes_every_sample_once(tmp_path):
    mixed = blend((packed(tmp_path / "a", 100), 1.0), (packed(tmp_path / "b", 300), 3.0))
    assert mixed.num_samples == [13, 38]
    seen = {0: [], 1: []}
    for number in range(400):
        place = mixed.locate(number)
        seen[place.source].append((place.epoch, place.index))
    for source, samples in enumerate(mixed.num_samples):
        whole = len(seen[source]) // samples
        for epoch in range(whole):
            part = seen[source][epoch * samples : (epoch + 1) * samples]
            assert sorted(part) == [(epoch, i) for i in range(samples)]
        orders = {tuple(i for e, i in seen[source] if e == epoch) for epoch in range(whole)}
        assert len(orders) == whole > 1


def test_any_sample_can_be_the_next(tmp_path):
    sources = [(packed(tmp_path / "a", 200), 0.3), (packed(tmp_path / "b", 90), 0.7)]
    whole = blend(*sources, isolate=True).batch(0, 120)
    for first in (1, 37, 119):
        part = blend(*sources, isolate=True).batch(first, 120 - first)
        for name in ("input_ids", "targets", "positions", "doc_ids"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[first:])
            assert getattr(part, name).dtype == np.int32
    other = blend(*sources, isolate=True, seed=2).batch(0, 120)
    assert not np.array_equal(other.input_ids, whole.input_ids)


def test_targets_cover_the_stream_once(tmp_path):
    mixed = blend((packed(tmp_path / "a", 100), 1.0))
    batch = mixed.batch(0, mixed.num_samples[0])
    assert batch.doc_ids is None
    np.testing.assert_array_equal(batch.positions, np.tile(np.arange(8), (13, 1)))
    assert sorted(batch.targets[batch.targets != IGNORE]) == [20 + n for n in range(1, 100)]


def test_digest_names_the_data(tmp_path):
    a, b = packed(tmp_path / "a", 100), packed(tmp_path / "b", 101)
    base = blend((a, 1.0), (b, 1.0)).digest()
    assert base == blend((a, 2.0), (b, 2.0), seed=9).digest()
    others = [
        blend((b, 1.0), (a, 1.0)), blend((a, 1.0)), blend((a, 1.0), (b, 2.0)),
        blend((a, 1.0), (b, 1.0), seq_len=9), blend((a, 1.0), (b, 1.0), isolate=True),
    ]  # fmt: skip
    assert len({base, *(o.digest() for o in others)}) == 6
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    assert blend((moved, 1.0), (b, 1.0)).digest() == base


def test_refusals(tmp_path):
    path = packed(tmp_path / "a", 100)
    with pytest.raises(UserError, match="data.sources: empty"):
        open_blend(config(), 1, VOCAB_SIZE, PAD)
    with pytest.raises(UserError, match="no such packed folder"):
        blend((tmp_path / "nowhere", 1.0))
    with pytest.raises(UserError, match=f"{VOCAB_SIZE} pieces but model.vocab_size is 1024"):
        open_blend(config((path, 1.0)), 1, 1024, PAD)
    with pytest.raises(UserError, match="pad_token_id"):
        open_blend(config((path, 1.0)), 1, VOCAB_SIZE, VOCAB_SIZE)
    assert open_blend(config((path, 1.0)), 1, VOCAB_SIZE + 40, PAD).vocab_size == VOCAB_SIZE  # padding, perhaps
    reseal(path, largest_id=600)
    with pytest.raises(UserError, match="token id 600, outside the vocabulary"):
        blend((path, 1.0))


def test_the_tokenizer_of_a_run_is_the_one_that_was_verified(tmp_path):
    """What goes into checkpoints is not what the file holds by then."""
    path = packed(tmp_path / "a", 100)
    opened = blend((path, 1.0))
    damaged = bytearray(tiny_tokenizer().model_bytes)
    damaged[100] ^= 1
    (path / "tokenizer.model").write_bytes(damaged)
    assert opened.tokenizer() == tiny_tokenizer().model_bytes
    with pytest.raises(UserError, match="tokenizer.model: altered"):
        blend((path, 1.0))
    (path / "tokenizer.model").write_bytes(opened.tokenizer())
    reseal(path, tokenizer={"sha256": "0" * 64, "control": "chat"})
    with pytest.raises(UserError, match="hash of the tokenizer"):
        blend((path, 1.0))
