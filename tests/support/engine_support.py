"""Runners without a model: what is in their pages are the tokens themselves, so a page mixed up is another answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from telechat_twins.core.data.control import TOOL_CALL, TOOL_CALL_END
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.requests import Event
from telechat_twins.core.inference.runner import Runner, Step
from telechat_twins.core.model.config import ModelConfig, load_model_config
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer

CONFIG = load_model_config({"preset": "telechat2-tiny", "vocab_size": 64})
CONTEXT = 2048  # the template with tools takes 550 tokens of the tiny tokenizer
CHAT_CONFIG = load_model_config(
    {"preset": "telechat2-tiny", "vocab_size": VOCAB_SIZE, "max_seqlen": CONTEXT, "training_seqlen": CONTEXT}
)


def fake_logits(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """A fixed function of all ids so far, float32 [V]."""
    seed = 0
    for token in ids:
        seed = (seed * 1000003 + int(token) + 1) % 2**61
    return (np.random.default_rng(seed).normal(size=vocab_size) * 3).astype(np.float32)


class PlainRunner:
    """Keeps every token with its position and scaling length at its slot; reads them back through the page tables.

    An AssertionError when a table leads anywhere but to the sequence's own positions 0, 1, 2, ...; ``sizes`` are the
    tokens of each sequence in each step, ``prompts`` the prefixes that logits were asked for.
    """

    def __init__(
        self,
        config: ModelConfig = CONFIG,
        num_pages: int = 200,
        page_size: int = 4,
        logits: Callable[[Sequence[int], int], np.ndarray] = fake_logits,
    ) -> None:
        self.config, self.num_pages, self.page_size, self.logits = config, num_pages, page_size, logits
        self.ids, self.places, self.lengths = (np.full(num_pages * page_size, -1) for _ in range(3))
        self.sizes: list[list[int]] = []
        self.prefixes: list[list[int]] = []

    def run(self, step: Step) -> np.ndarray:
        assert step.slots.min() >= self.page_size, "something was written to the blank page"
        assert len(set(step.slots.tolist())) == len(step.slots), "two tokens went to one place"
        self.sizes.append(np.diff(step.starts).tolist())
        assert self.sizes[-1][: step.singles] == [1] * step.singles and 1 not in self.sizes[-1][step.singles :]
        self.ids[step.slots], self.places[step.slots] = step.ids, step.positions
        self.lengths[step.slots] = step.scaling_lengths
        rows = np.searchsorted(step.starts, step.wanted, side="right") - 1
        out = []
        for token, row in zip(step.wanted.tolist(), rows.tolist(), strict=True):
            length = step.positions[token] + 1
            assert length == step.lengths[row] - (step.starts[row + 1] - 1 - token)
            places = np.arange(length)
            slots = step.tables[row][places // self.page_size] * self.page_size + places % self.page_size
            np.testing.assert_array_equal(self.places[slots], places)
            self.prefixes.append(self.ids[slots].tolist())
            out.append(self.answer(self.prefixes[-1], self.lengths[slots]))
        return np.stack(out)

    def answer(self, prefix: list[int], lengths: np.ndarray) -> np.ndarray:
        """Logits [V] after a prefix whose tokens were scaled by ``lengths``."""
        return self.logits(prefix, self.config.vocab_size)


class Speller(PlainRunner):
    """Says the given answers, one a request, each followed by ``end``; ``prompts`` are what they were answers to."""

    def __init__(self, config: ModelConfig, *answers: Sequence[int], end: int | None = 2) -> None:
        super().__init__(config, num_pages=-(-config.max_seqlen // 16) + 1, page_size=16)
        self.answers, self.end = [list(answer) for answer in answers], end
        self.prompts: list[list[int]] = []
        self._expected: list[int] | None = None
        self._queue: list[int] = []

    def answer(self, prefix: list[int], lengths: np.ndarray) -> np.ndarray:
        if prefix != self._expected:  # another request than the one before
            self.prompts.append(prefix)
            self._queue = self.answers.pop(0) + ([] if self.end is None else [self.end])
        token = self._queue.pop(0)
        self._expected = [*prefix, token]
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[token] = 9.0
        return logits


class Replier(PlainRunner):
    """Answers the last question of a chat with ``reply(question)``, token for token, and an end; anything that is no
    chat with the fixed pseudo-random continuation of PlainRunner. Every step takes ``pause`` seconds."""

    def __init__(
        self, reply: Callable[[str], str], pause: float = 0.0, num_pages: int = 513, thinking: bool = False
    ) -> None:
        """``thinking``: the prompt opens <think>, and the reply goes on from there."""
        super().__init__(CHAT_CONFIG, num_pages=num_pages, page_size=16)
        self.reply, self.pause = reply, pause
        self.tokenizer = tiny_tokenizer(in_vocabulary=True)
        self.opening = len(self.tokenizer.encode("<think>\n")) if thinking else 0
        self.failing: list[Exception] = []  # what the next steps raise

    def run(self, step: Step) -> np.ndarray:
        time.sleep(self.pause)
        if self.failing:
            raise self.failing.pop()
        return super().run(step)

    def answer(self, prefix: list[int], lengths: np.ndarray) -> np.ndarray:
        control = self.tokenizer.control
        if prefix[0] != control["<_system>"] or control["<_bot>"] not in prefix:  # a draw may be any control token
            return super().answer(prefix, lengths)
        begin = len(prefix) - prefix[::-1].index(control["<_bot>"])
        asked = prefix[: begin - 1]
        begin += self.opening
        question = asked[len(asked) - asked[::-1].index(control["<_user>"]) :]
        text = self.reply(self.tokenizer.decode(question, skip_special=False))
        said = [*self.tokenizer.encode(text, allow_control=(TOOL_CALL, TOOL_CALL_END)), control["<_end>"]]
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[said[len(prefix) - begin]] = 20.0
        return logits


def finish(engine: Engine, most: int = 10_000) -> dict[int, list[Event]]:
    """Step an engine until nothing is left to do; the events by request."""
    found: dict[int, list[Event]] = {}
    for _ in range(most):
        if not engine.busy:
            return found
        for event in engine.step():
            found.setdefault(event.request, []).append(event)
    raise AssertionError(f"still at work after {most} steps")


def tokens_of(events: Sequence[Event], sample: int = 0) -> list[int]:
    return [event.choice.token for event in events if event.sample == sample and event.choice is not None]


class Feed:
    """Given tokens through a runner's pages, as the engine would put them there; logits of the last of each piece.

    The pages are taken in a mixed order, so that neighbours in a sequence are none in memory.
    """

    def __init__(self, runner: Runner, total: int, by_step: bool = False, seed: int = 0, adapter: int = 0) -> None:
        """``total`` and ``by_step`` decide the rotary scaling, as Sample.scaling_lengths has it: ``total`` is the
        planned end, or by step the prompt's length."""
        self.runner, self.total, self.by_step = runner, total, by_step
        pages = np.random.default_rng(seed).permutation(np.arange(1, runner.num_pages)).astype(np.int32)
        self.table, self.length, self.adapter = pages, 0, adapter

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [V] after ``ids``."""
        return feed([self], [ids])[0]


def feed(feeds: Sequence[Feed], pieces: Sequence[Sequence[int]]) -> np.ndarray:
    """One step of several sequences on one runner, whose tables must not meet; logits [R, V] after each piece. Single
    tokens come first, as Step wants it."""
    size = feeds[0].runner.page_size
    starts = np.cumsum([0, *(len(piece) for piece in pieces)]).astype(np.int32)
    lengths = np.array([f.length + len(piece) for f, piece in zip(feeds, pieces, strict=True)], np.int32)
    tables = np.zeros((len(feeds), -(-int(lengths.max()) // size)), np.int32)
    positions, scaling = [], []
    for row, (f, piece) in enumerate(zip(feeds, pieces, strict=True)):
        used = -(-int(lengths[row]) // size)
        tables[row, :used] = f.table[:used]
        places = np.arange(f.length, f.length + len(piece), dtype=np.int32)
        positions.append(places)
        scaling.append(np.maximum(places + 1, f.total) if f.by_step else np.full_like(places, f.total))
        f.length += len(piece)
    where = np.concatenate(positions)
    owner = np.repeat(np.arange(len(feeds)), np.diff(starts))
    step = Step(
        ids=np.concatenate([np.asarray(piece, np.int32) for piece in pieces]),
        positions=where,
        scaling_lengths=np.concatenate(scaling).astype(np.int32),
        slots=tables[owner, where // size] * np.int32(size) + where % size,
        starts=starts,
        lengths=lengths,
        tables=tables,
        wanted=starts[1:] - 1,
        adapters=np.array([f.adapter for f in feeds], np.int32),
    )
    return feeds[0].runner.run(step)
