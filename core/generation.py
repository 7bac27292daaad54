"""Generation and chat on an engine: one request at a time, waited for; the conversation.

The backend gives logits; everything that decides about them is in core, so both backends say the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from core.config import ModelConfig
from core.data.chat_template import encode_chat
from core.data.control import BOT, END, START, SYSTEM, USER
from core.data.tokenizer import check_vocabulary
from core.engine import Engine, stream
from core.errors import UserError
from core.requests import Event, Request
from core.sampling import SamplingConfig

# Besides the end of an answer: a model that opens the next turn by itself has finished its own.
TURN_TOKENS = (END, USER, START, BOT, SYSTEM)


@dataclass
class GenerationResult:
    """``tokens`` leaves out the stop token, which is in ``stop_token``. ``finish_reason``: stop | length."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_token: int | None = None
    top2_margins: list[float] = field(default_factory=list)  # one a token, the stop token's included


def generate(
    engine: Engine,
    prompt_ids: Sequence[int],
    sampling: SamplingConfig,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> GenerationResult:
    """Continue ``prompt_ids`` by up to ``max_new_tokens``, ending early at a token of ``stop_ids``.

    ``on_token`` is called with every token as it is made, the stop token excepted. UserError on what the engine refuses
    and on logits that are not finite.
    """
    request = Request(
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=frozenset(stop_ids),
        margins=True,
    )
    result = GenerationResult()
    for event in answer(engine, request):
        assert event.choice is not None and event.choice.margin is not None
        result.top2_margins.append(event.choice.margin)
        if event.finish_reason == "stop":
            result.stop_token, result.finish_reason = event.choice.token, "stop"
            break
        result.tokens.append(event.choice.token)
        if on_token is not None:
            on_token(event.choice.token)
    return result


def answer(engine: Engine, request: Request) -> Generator[Event, None, None]:
    """The events of one request on an engine that serves nobody else; the iterator left early cancels it.

    A length beyond the trained one is said on stderr. UserError at once on what the engine refuses, and on the way when
    the model fails.
    """
    events = stream(engine, request)
    note_length(engine.config, request.total)
    return _without_errors(events)


def _without_errors(events: Generator[Event, None, None]) -> Generator[Event, None, None]:
    with closing(events):
        for event in events:
            if event.error is not None:
                raise UserError(event.error)
            yield event


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


class Chat:
    """A conversation: history, system prompt, and a prompt kept within the model's length.

    As the release's chat(): the prompt's budget is max_seqlen - max_new_tokens - 1, and the oldest turns are left out
    of it when it is full. Unlike there, a question too long by itself is an error and not cut silently. What the user
    types is text: it never becomes control tokens.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        sampling: SamplingConfig | None = None,
        max_new_tokens: int | None = None,
        add_bos: bool = False,
    ) -> None:
        """``system`` None takes the template's default; ``max_new_tokens`` None a quarter of max_seqlen, at most 1024.

        UserError when the tokenizer does not fit the model or the budget is below 3 tokens.
        """
        check_vocabulary(engine.tokenizer, engine.config)
        self.engine, self.tokenizer, self.config = engine, engine.tokenizer, engine.config
        self.system = system
        self.sampling = sampling or SamplingConfig()
        self.max_new_tokens = default_answer_length(self.config) if max_new_tokens is None else max_new_tokens
        self.add_bos = add_bos
        self.history: list[dict[str, str]] = []
        self.stop_ids = turn_stops(self.tokenizer, self.config)
        self.finish_reason: str | None = None  # of the last answer: stop | length | interrupted
        self._stopped = False
        limit = self.config.max_seqlen
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
        request = Request(
            prompt_ids=tuple(prompt),
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            text="answer",
        )
        pieces = self._answer(question, answer(self.engine, request))
        return pieces if stream else "".join(pieces)

    def stop(self) -> None:
        """End the running answer after the token it is at; safe in a signal handler."""
        self._stopped = True

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.history.clear()

    def _answer(self, question: str, events: Generator[Event, None, None]) -> Iterator[str]:
        told: list[str] = []
        self.finish_reason = "interrupted"
        failed = False
        try:
            with closing(events):
                for event in events:
                    if event.text:
                        told.append(event.text)
                        yield event.text
                    if event.finish_reason is not None:
                        self.finish_reason = event.finish_reason
                    elif self._stopped:
                        break
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
        first = [self.config.bos_token_id] if self.add_bos else []
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
