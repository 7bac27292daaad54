"""Generation and chat over either backend's ``generate.Session``: the loop, the text stream, the conversation.

The backend gives logits; everything that decides about them is here or in core.sampling, so both backends say the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from core.config import ModelConfig
from core.data.chat_template import encode_chat
from core.data.control import BOT, END, START, SYSTEM, USER
from core.data.tokenizer import check_vocabulary
from core.errors import UserError
from core.sampling import SamplingConfig, check_finite, penalise, pick, top2_margin

# Besides the end of an answer: a model that opens the next turn by itself has finished its own.
TURN_TOKENS = (END, USER, START, BOT, SYSTEM)

REPLACEMENT = "\ufffd"  # what the decoder shows for bytes that are not (yet) a character
CONTEXT = 16  # tokens of a prompt: more than a character's 4 bytes and a word before it


class Session(Protocol):
    """What a backend's ``generate.Session`` offers."""

    config: ModelConfig

    def reset(self, total_len: int | None = None) -> None:
        """Forget the cache; ``total_len`` is the planned final length and fixes the rotary base of the request."""

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens to the cache; float32 [V] logits of the last of them."""


class Step(NamedTuple):
    """One generated token and how far ahead of the second it was (penalised logits)."""

    token: int
    margin: float


@dataclass
class GenerationResult:
    """``tokens`` leaves out the stop token, which is in ``stop_token``. ``finish_reason``: stop | length."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_token: int | None = None
    top2_margins: list[float] = field(default_factory=list)  # one a token, the stop token's included


def generate(
    session: Session,
    prompt_ids: Sequence[int],
    sampling: SamplingConfig,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> GenerationResult:
    """Continue ``prompt_ids`` by up to ``max_new_tokens``, ending early at a token of ``stop_ids``.

    ``on_token`` is called with every token as it is made, the stop token excepted. UserError: see ``steps``.
    """
    stops = frozenset(stop_ids)
    result = GenerationResult()
    for step in steps(session, prompt_ids, sampling, max_new_tokens):
        result.top2_margins.append(step.margin)
        if step.token in stops:
            result.stop_token, result.finish_reason = step.token, "stop"
            break
        result.tokens.append(step.token)
        if on_token is not None:
            on_token(step.token)
    return result


def steps(session: Session, prompt_ids: Sequence[int], sampling: SamplingConfig, max_new_tokens: int) -> Iterator[Step]:
    """``max_new_tokens`` steps of generation, made as they are asked for.

    The session is reset for a request of len(prompt) + max_new_tokens, so with ``rescale: request`` one rotary base
    serves it whole. UserError at once on an empty prompt, an id outside the vocabulary, or max_new_tokens below 1; on
    the way, on logits that are not finite.
    """
    prompt = check_ids("prompt", prompt_ids, session.config.vocab_size)
    if not prompt:
        raise UserError("prompt: it has no tokens; give some text, or --add-bos to begin from <_start>")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, found {max_new_tokens}")
    note_length(session.config, len(prompt) + max_new_tokens)
    return _steps(session, prompt, sampling, max_new_tokens)


def _steps(session: Session, prompt: list[int], sampling: SamplingConfig, max_new_tokens: int) -> Iterator[Step]:
    session.reset(total_len=len(prompt) + max_new_tokens)
    seen = np.zeros(session.config.vocab_size, bool)
    seen[prompt] = True
    fresh = prompt
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        logits = session.extend(fresh)
        check_finite(logits, position - 1)
        scores = penalise(logits, seen, sampling.repetition_penalty)
        token = pick(scores, sampling, position)
        yield Step(token, top2_margin(scores))
        seen[token] = True
        fresh = [token]


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    """``ids`` as plain ints; UserError names the first that is not a token of the vocabulary and its place."""
    checked = [int(token) for token in ids]
    for place, token in enumerate(checked):
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: token id {token} at place {place} is outside the vocabulary of {vocab_size}")
    return checked


_noted: set[tuple[int, int, int]] = set()


def note_length(config: ModelConfig, length: int) -> None:
    """Say once on stderr that a length goes beyond what the model was trained for. Not an error: the rotary base and
    the attention scale grow with the length (core.position)."""
    key = (config.max_seqlen, config.training_seqlen, config.base_seqlen)
    if length <= config.max_seqlen or key in _noted:
        return
    _noted.add(key)
    print(
        f"note: length {length} is beyond max_seqlen {config.max_seqlen}, the length the model was trained for; "
        "rotary positions are scaled to it (NTK-aware), and quality may fall",
        file=sys.stderr,
    )


def text_stream(tokenizer: Any, context: Sequence[int] = ()) -> Any:
    """Tokens in (``push``), text out; all pieces with the last (``flush``) add up to the decoding of all the tokens.

    A character of several byte tokens is held back until it is whole; control tokens give no text. With ``context``
    (the prompt's ids, for a continuation of raw text) the first word keeps the space that divides it from the prompt.
    """
    context = list(context)[-CONTEXT:]
    stream = tokenizer.stream(skip_special=True)
    # A prompt that ends inside a character is no context: its half would come out with the continuation.
    if context and not tokenizer.decode(context, skip_special=True).endswith(REPLACEMENT):
        for token in context:
            stream.push(token)
    return stream


class Chat:
    """A conversation: history, system prompt, and a prompt kept within the model's length.

    As the release's chat(): the prompt's budget is max_seqlen - max_new_tokens - 1, and the oldest turns are left out
    of it when it is full. Unlike there, a question too long by itself is an error and not cut silently. What the user
    types is text: it never becomes control tokens.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        *,
        system: str | None = None,
        sampling: SamplingConfig | None = None,
        max_new_tokens: int | None = None,
        add_bos: bool = False,
    ) -> None:
        """``system`` None takes the template's default; ``max_new_tokens`` None a quarter of max_seqlen, at most 1024.

        UserError when the tokenizer does not fit the model or the budget is below 3 tokens.
        """
        check_vocabulary(tokenizer, session.config)
        self.session, self.tokenizer = session, tokenizer
        self.system = system
        self.sampling = sampling or SamplingConfig()
        self.max_new_tokens = default_answer_length(session.config) if max_new_tokens is None else max_new_tokens
        self.add_bos = add_bos
        self.history: list[dict[str, str]] = []
        self.stop_ids = turn_stops(tokenizer, session.config)
        self.finish_reason: str | None = None  # of the last answer: stop | length | interrupted
        self._stopped = False
        limit = session.config.max_seqlen
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: must be at least 1, found {self.max_new_tokens}")
        self.budget = limit - self.max_new_tokens - 1
        if self.budget < 3:
            raise UserError(
                f"max_new_tokens: {self.max_new_tokens} leaves {self.budget} tokens of max_seqlen {limit} for the "
                f"conversation; give at most {limit - 4}"
            )

    def ask(self, question: str, stream: bool = False) -> str | Iterator[str]:
        """The answer; with ``stream`` an iterator of its pieces as they are made.

        The question and the answer, whole or stopped half-way, join the history. UserError on an empty question and on
        one too long for the budget; the history is then as before.
        """
        if not question.strip():
            raise UserError("question: it is empty")
        prompt = self._prompt(question)
        self._stopped = False
        made = steps(self.session, prompt, self.sampling, self.max_new_tokens)
        pieces = self._answer(question, made)
        return pieces if stream else "".join(pieces)

    def stop(self) -> None:
        """End the running answer after the token it is at; safe in a signal handler."""
        self._stopped = True

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.history.clear()

    def _answer(self, question: str, made: Iterator[Step]) -> Iterator[str]:
        text = text_stream(self.tokenizer)
        told: list[str] = []
        self.finish_reason = "interrupted"
        failed = False
        try:
            for step in made:
                if step.token in self.stop_ids:
                    self.finish_reason = "stop"
                    break
                piece = text.push(step.token)
                if piece:
                    told.append(piece)
                    yield piece
                if self._stopped:
                    break
            else:
                self.finish_reason = "length"
            piece = text.flush()
            if piece:
                told.append(piece)
                yield piece
        except Exception:
            failed = True
            raise
        finally:
            # Also when the reader went away or Ctrl-C came: what was said was said. A failure leaves no turn.
            if not failed:
                self.history.append({"role": "user", "content": question})
                self.history.append({"role": "assistant", "content": "".join(told)})

    def _prompt(self, question: str) -> list[int]:
        """Ids of the conversation with as many of the newest turns as the budget holds."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        first = [self.session.config.bos_token_id] if self.add_bos else []
        asked = {"role": "user", "content": question}
        turns = self.history
        while True:
            ids = first + encode_chat(self.tokenizer, [*system, *turns, asked])
            if not turns or len(ids) < self.budget:
                break
            turns = turns[2:]
        if len(ids) > self.budget:
            raise UserError(
                f"question: with the system prompt it takes {len(ids)} tokens, and {self.budget} fit beside an answer "
                f"of {self.max_new_tokens}; shorten it, or lower max_new_tokens"
            )
        return ids


def default_answer_length(config: ModelConfig) -> int:
    """Tokens of a chat answer when the user names none: a quarter of max_seqlen, between 1 and 1024."""
    return max(1, min(1024, config.max_seqlen // 4))


def turn_stops(tokenizer: Any, config: ModelConfig) -> frozenset[int]:
    """Ids that end an answer: the end of text and every control token that opens or closes a turn."""
    return frozenset({config.eos_token_id, *(tokenizer.control[t] for t in TURN_TOKENS if t in tokenizer.control)})
