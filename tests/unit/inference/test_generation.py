"""Generation, one request on an engine, and the length note, on a made-up runner: no framework, no weights."""

from __future__ import annotations

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference import generation
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.generation import generate, note_length
from telechat_twins.core.inference.sampling import SamplingConfig, sampling_config
from tests.support.engine_support import CONFIG, PlainRunner, fake_logits


def plain_greedy(prompt, count, penalty):
    """The golden's own description: whole prefix each step, penalty once per id in prompt or output."""
    ids, margins = list(prompt), []
    for _ in range(count):
        logits = fake_logits(ids, CONFIG.vocab_size).astype(np.float64)
        for token in set(ids):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        top = np.sort(logits)
        margins.append(top[-1] - top[-2])
        ids.append(int(np.argmax(logits)))
    return ids[len(prompt) :], margins


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_the_plain_loop(penalty):
    runner = PlainRunner()
    result = generate(Engine(runner), [5, 9, 9, 2], sampling_config(repetition_penalty=penalty), 30)
    tokens, margins = plain_greedy([5, 9, 9, 2], 30, penalty)
    assert result.tokens == tokens
    np.testing.assert_allclose(result.top2_margins, margins, atol=1e-12)
    assert (result.finish_reason, result.stop_token) == ("length", None)
    # The prompt in one piece, then one token a step; the last token made is never fed.
    assert runner.sizes == [[4], *[[1]] * 29]
    assert set(runner.lengths[runner.lengths > 0]) == {34}


def test_stop_token_ends_and_is_left_out():
    tokens = generate(Engine(PlainRunner()), [5], SamplingConfig(), 10).tokens
    stop = tokens[4]
    seen = []
    result = generate(Engine(PlainRunner()), [5], SamplingConfig(), 10, {stop}, seen.append)
    first = tokens.index(stop)
    assert result.tokens == seen == tokens[:first]
    assert (result.finish_reason, result.stop_token) == ("stop", stop)
    assert len(result.top2_margins) == first + 1


def test_sampling_is_a_function_of_seed_and_position():
    config = sampling_config(temperature=1.0, top_k=20, seed=3)
    whole = generate(Engine(PlainRunner()), [5, 6], config, 20).tokens
    assert whole == generate(Engine(PlainRunner()), [5, 6], config, 20).tokens
    # Going on from where a request ended draws what one long request would have drawn.
    assert whole[8:] == generate(Engine(PlainRunner()), [5, 6, *whole[:8]], config, 12).tokens
    assert (
        whole != generate(Engine(PlainRunner()), [5, 6], sampling_config(temperature=1.0, top_k=20, seed=4), 20).tokens
    )


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 3, "prompt: must have at least one token"),
        ([1, 64], 3, "prompt: token id 64 at place 1 is outside the vocabulary of 64"),
        ([-1], 3, "prompt: token id -1 at place 0"),
        ([1], 0, "max_new_tokens: must be at least 1, found 0"),
    ],
)
def test_mistakes_are_found_before_the_first_step(prompt, count, message):
    runner = PlainRunner()
    with pytest.raises(UserError, match=message):
        generate(Engine(runner), prompt, SamplingConfig(), count)
    assert not runner.sizes


def test_logits_that_are_not_finite_stop_the_generation():
    engine = Engine(PlainRunner(logits=lambda ids, size: np.full(size, np.nan, np.float32)))
    with pytest.raises(UserError, match="64 of 64 are not finite at position 1"):
        generate(engine, [1, 2], SamplingConfig(), 3)
    assert not engine.busy


def test_length_note_is_said_once(capsys, monkeypatch):
    monkeypatch.setattr(generation, "_noted", set())
    note_length(CONFIG, CONFIG.max_seqlen)
    assert capsys.readouterr().err == ""
    generate(Engine(PlainRunner()), [1] * 255, SamplingConfig(), 2)
    generate(Engine(PlainRunner()), [1] * 255, SamplingConfig(), 2)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "length 257 is beyond max_seqlen 256" in said.err
    assert said.out == ""
