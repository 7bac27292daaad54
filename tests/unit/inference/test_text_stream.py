"""Text as it is made: whole characters, words with their spaces, and stop strings that are held back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.data.detokenizer import StreamDecoder
from telechat_twins.core.inference.text_stream import CONTEXT_TOKENS, StopText, text_stream


class PieceTokenizer:
    """SentencePiece's decoding rules on a toy inventory: a leading space is dropped, bytes join to characters,
    control tokens are silent."""

    PIECES = ["<a>", "<b>", "\u2581", "\u2581w", "\u2581\u2581x", "y", "\u4f60", "\u597d", "\ufffd"]
    BYTES = len(PIECES)
    path, vocab_size, control, anchor = "toy", BYTES + 256, {"<a>": 0, "<b>": 1}, 5

    def stream(self):
        return StreamDecoder(self)

    def is_silent(self, index):
        return index < 2

    def byte_of(self, index):
        return index - self.BYTES if index >= self.BYTES else None

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
    silent_context = not tokenizer.decode(prompt[-CONTEXT_TOKENS:], skip_special=True)
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


@pytest.mark.parametrize(
    "run",
    [
        [0, 1],  # control tokens
        [PieceTokenizer.BYTES + 0x80],  # bytes that are no character
        [*CHINESE_BYTES, 8],
        [2],  # spaces
        CHINESE_BYTES[:2],
    ],
)
def test_a_long_run_of_any_kind_is_decoded_in_small_windows(run):
    """Whatever a run is made of: a window that grows with it would take quadratic time."""
    sizes = []

    class Counting(PieceTokenizer):
        def decode(self, ids, skip_special=False):
            sizes.append(len(ids))
            return super().decode(ids, skip_special)

    stream = text_stream(Counting())
    ids = [*run * (600 // len(run)), 5]
    text = "".join([*map(stream.push, ids), stream.flush()])
    assert max(sizes) <= 6
    assert len(text) == stream.length and (len(text) == 0 or text == PieceTokenizer().decode(ids))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 8), st.sampled_from(CHINESE_BYTES)), max_size=30))
def test_where_a_token_begins_is_never_before_the_one_in_front_of_it(ids):
    stream, shown, starts = StreamDecoder(PieceTokenizer()), "", []
    for token in ids:
        shown += stream.push(token)
        assert stream.length == len(shown)
        starts.append(stream.start)
    shown += stream.flush()
    assert starts == sorted(starts) and all(start <= len(shown) for start in starts)
    for token, start in zip(ids, starts, strict=True):
        if 3 <= token <= 7:  # pieces of visible text; the first of a text loses its space
            written = PieceTokenizer.PIECES[token].replace("\u2581", " ")
            assert shown[start:].startswith(written) or (start == 0 and shown.startswith(written[1:]))


def test_written_out_control_tokens_count():
    stream = text_stream(PieceTokenizer(), shown={0: "<a>"})
    starts = []
    for token in (3, 0, 3, 5, 0):
        stream.push(token)
        starts.append(stream.start)
    assert starts == [0, 1, 4, 5, 6] and stream.length == 9


def through(stops, pieces):
    """What is shown of a text that comes in pieces, and what ended it."""
    watch, shown = StopText(stops), []
    for piece in pieces:
        shown.append(watch.push(piece))
        if watch.found is not None:
            return "".join(shown), watch.found
    return "".join(shown) + watch.flush(), None


def plainly(stops, text):
    """The whole text cut before the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=3)


@settings(max_examples=1000, deadline=None)
@given(stops=STOPS, pieces=st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12))
def test_a_text_ends_before_its_stop_string_however_it_is_cut(stops, pieces):
    assert through(stops, pieces) == plainly(stops, "".join(pieces))


@settings(max_examples=300, deadline=None)
@given(stops=STOPS, text=st.text(alphabet="ab\n", max_size=20))
def test_no_more_is_held_back_than_could_become_a_stop_string(stops, text):
    watch, shown = StopText(stops), ""
    for at, letter in enumerate(text):
        shown += watch.push(letter)
        if watch.found is not None:
            return
        held = text[len(shown) : at + 1]
        assert held == "" or any(len(held) < len(stop) and stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["###"], ["a#", "#", "b##", "#c"], "a##b", "###"),
        (["abcd", "bc"], ["xabcd"], "xa", "bc"),  # complete before the one that begins earlier
        (["b", "ab"], ["ab"], "", "ab"),  # complete together: the longer one
        (["stop"], ["do not sto"], "do not sto", None),
        ([], ["any", "thing"], "anything", None),
    ],
)
def test_stop_strings(stops, pieces, shown, found):
    assert through(stops, pieces) == (shown, found)
