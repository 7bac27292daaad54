"""The generation loop, the text stream and the length note, on a made-up session: no framework, no weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import generation
from core.config import load_model_config
from core.data.tokenizer import StreamDecoder
from core.errors import UserError
from core.generation import CONTEXT, generate, note_length, steps, text_stream
from core.sampling import SamplingConfig, sampling_config

CONFIG = load_model_config({"preset": "telechat2-tiny", "vocab_size": 64})


class FakeSession:
    """Logits are a fixed function of all ids so far; remembers how it was used."""

    def __init__(self, config=CONFIG):
        self.config, self.ids, self.calls, self.totals = config, [], [], []

    def reset(self, total_len=None):
        self.ids = []
        self.totals.append(total_len)

    def extend(self, ids):
        self.ids += ids
        self.calls.append(list(ids))
        return fake_logits(self.ids, self.config.vocab_size)


def fake_logits(ids, vocab_size):
    seed = 0
    for token in ids:
        seed = (seed * 1000003 + token + 1) % 2**61
    return (np.random.default_rng(seed).normal(size=vocab_size) * 3).astype(np.float32)


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
    session = FakeSession()
    result = generate(session, [5, 9, 9, 2], sampling_config(repetition_penalty=penalty), 30)
    tokens, margins = plain_greedy([5, 9, 9, 2], 30, penalty)
    assert result.tokens == tokens
    np.testing.assert_allclose(result.top2_margins, margins, atol=1e-12)
    assert (result.finish_reason, result.stop_token) == ("length", None)
    # The prompt in one piece, then one token a step; the last token made is never fed.
    assert session.calls == [[5, 9, 9, 2], *([t] for t in tokens[:-1])]
    assert session.totals == [34]


def test_stop_token_ends_and_is_left_out():
    tokens = generate(FakeSession(), [5], SamplingConfig(), 10).tokens
    stop = tokens[4]
    seen = []
    result = generate(FakeSession(), [5], SamplingConfig(), 10, {stop}, seen.append)
    first = tokens.index(stop)
    assert result.tokens == seen == tokens[:first]
    assert (result.finish_reason, result.stop_token) == ("stop", stop)
    assert len(result.top2_margins) == first + 1


def test_sampling_is_a_function_of_seed_and_position():
    config = sampling_config(temperature=1.0, top_k=20, seed=3)
    whole = generate(FakeSession(), [5, 6], config, 20).tokens
    assert whole == generate(FakeSession(), [5, 6], config, 20).tokens
    # Going on from where a request ended draws what one long request would have drawn.
    assert whole[8:] == generate(FakeSession(), [5, 6, *whole[:8]], config, 12).tokens
    assert whole != generate(FakeSession(), [5, 6], sampling_config(temperature=1.0, top_k=20, seed=4), 20).tokens


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 3, "prompt: it has no tokens"),
        ([1, 64], 3, "prompt: token id 64 at place 1 is outside the vocabulary of 64"),
        ([-1], 3, "prompt: token id -1 at place 0"),
        ([1], 0, "max_new_tokens: must be at least 1, found 0"),
    ],
)
def test_mistakes_are_found_before_the_first_step(prompt, count, message):
    session = FakeSession()
    with pytest.raises(UserError, match=message):
        steps(session, prompt, SamplingConfig(), count)
    assert not session.calls


def test_logits_that_are_not_finite_stop_the_generation():
    session = FakeSession()
    session.extend = lambda ids: np.full(64, np.nan, np.float32)
    with pytest.raises(UserError, match="64 of 64 are not finite at position 1"):
        generate(session, [1, 2], SamplingConfig(), 3)


def test_length_note_is_said_once(capsys, monkeypatch):
    monkeypatch.setattr(generation, "_noted", set())
    note_length(CONFIG, CONFIG.max_seqlen)
    assert capsys.readouterr().err == ""
    generate(FakeSession(), [1] * 255, SamplingConfig(), 2)
    generate(FakeSession(), [1] * 255, SamplingConfig(), 2)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "length 257 is beyond max_seqlen 256" in said.err
    assert said.out == ""


class PieceTokenizer:
    """SentencePiece's decoding rules on a toy inventory: a leading space is dropped, bytes join to characters,
    control tokens are silent."""

    PIECES = ["<a>", "<b>", "\u2581", "\u2581w", "\u2581\u2581x", "y", "\u4f60", "\u597d", "\ufffd"]
    BYTES = len(PIECES)
    path, vocab_size, control = "toy", BYTES + 256, {"<a>": 0, "<b>": 1}

    def stream(self, skip_special=True):
        return StreamDecoder(self, skip_special)

    def decode(self, ids, skip_special=False):
        raw = b""
        for place, token in enumerate(t for t in ids if t not in (0, 1)):
            if token >= self.BYTES:
                raw += bytes([token - self.BYTES])
                continue
            piece = self.PIECES[token]
            raw += (piece[1:] if place == 0 and piece[0] == "\u2581" else piece).replace("\u2581", " ").encode()
        return raw.decode("utf-8", errors="replace")


def stream_text(tokenizer, ids, context=()):
    stream = text_stream(tokenizer, context)
    pieces = [stream.push(token) for token in ids]
    return pieces, "".join(pieces) + stream.flush()


CHINESE_BYTES = [PieceTokenizer.BYTES + b for b in "\u4f60".encode()]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 8), st.sampled_from(CHINESE_BYTES), st.integers(9, 264)), max_size=40))
def test_pieces_add_up_to_the_whole_text(ids):
    tokenizer = PieceTokenizer()
    assert stream_text(tokenizer, ids)[1] == tokenizer.decode(ids, skip_special=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=30), st.lists(st.integers(0, 264), max_size=20))
def test_continuation_adds_up_to_prompt_and_answer(prompt, ids):
    tokenizer = PieceTokenizer()
    whole = tokenizer.decode(prompt + ids, skip_special=True)
    silent_context = not tokenizer.decode(prompt[-CONTEXT:], skip_special=True)
    text = tokenizer.decode(prompt, skip_special=True) + stream_text(tokenizer, ids, prompt)[1]
    assert text == whole or (silent_context and text.replace(" ", "") == whole.replace(" ", ""))


def test_half_a_character_is_held_back():
    pieces, text = stream_text(PieceTokenizer(), [5, *CHINESE_BYTES, 5])
    assert pieces == ["y", "", "", "\u4f60", "y"]
    assert text == "y\u4f60y"


def test_bytes_that_never_become_a_character_come_out_at_the_end():
    pieces, text = stream_text(PieceTokenizer(), [5, *CHINESE_BYTES[:2]])
    assert pieces == ["y", "", ""]
    assert text == "y\ufffd"


def test_a_word_after_a_control_token_keeps_its_space():
    assert stream_text(PieceTokenizer(), [3, 0, 3, 1, 0, 3])[1] == "w w w"


def test_a_prompt_ending_inside_a_character_does_not_swallow_text():
    assert stream_text(PieceTokenizer(), [5], context=[5, *CHINESE_BYTES[:1]])[1] == "y"


def test_a_step_decodes_a_bounded_window():
    longest = 0

    class Counting(PieceTokenizer):
        def decode(self, ids, skip_special=False):
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids, skip_special)

    stream_text(Counting(), [3, 5] * 500)
    assert longest <= 4
