"""Chat sessions on an engine, and the release's ``chat()``.

The prompt is kept within the model's length as the release does it: its budget is max_seqlen - max_new_tokens - 1, and
the oldest turns are left out of it when it is full. What users and tools say is text: it never becomes control tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

from telechat_twins.core.checkpoint.source import WeightSource
from telechat_twins.core.data.chat_template import encode_chat
from telechat_twins.core.data.control import USER
from telechat_twins.core.data.tokenizer import check_vocabulary, load_tokenizer
from telechat_twins.core.data.vocabulary import fit_vocabulary
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.generation import answer, turn_stops
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.requests import Event, Request
from telechat_twins.core.inference.runner import Runner
from telechat_twins.core.inference.sampling import SamplingConfig, sampling_config
from telechat_twins.core.inference.tool_calls import AnswerPart, ToolCall, ToolCallStream
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.quantize import quantizing
from telechat_twins.core.model.xpos_range import say_xpos_range
from telechat_twins.core.types import JsonObject

Message = JsonObject


class Chat:
    """A conversation: history, system prompt, tools, and a prompt that fits.

    ``history``: messages as core.data.chat_template has them, without the system's. ``finish_reason`` of the last
    answer: stop | length | interrupted; ``calls``: the tool calls in it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        sampling: SamplingConfig | None = None,
        max_new_tokens: int | None = None,
        add_bos: bool = False,
        tools: Sequence[JsonObject] | None = None,
        cut_question: bool = False,
    ) -> None:
        """``system`` None takes the template's default; ``max_new_tokens`` None a quarter of max_seqlen, at most 1024.
        ``cut_question``: one that is too long by itself loses its beginning, as in the release, which is not an error.

        UserError when the tokenizer does not fit the model or the budget is below 3 tokens.
        """
        if engine.tokenizer is None:
            raise ValueError("engine: a chat needs an engine with a tokenizer, found one without; pass it to Engine")
        check_vocabulary(engine.tokenizer, engine.config)
        self.engine, self.tokenizer, self.config = engine, engine.tokenizer, engine.config
        self.system, self.tools = system, tools
        self.sampling = sampling or SamplingConfig()
        self.max_new_tokens = default_answer_length(self.config) if max_new_tokens is None else max_new_tokens
        self.add_bos, self.cut_question = add_bos, cut_question
        self.history: list[Message] = []
        self.stop_ids = turn_stops(self.tokenizer, self.config)
        self.finish_reason: str | None = None
        self.calls: list[ToolCall] = []
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

    def ask(self, question: str, stream: bool = False) -> str | Iterator[AnswerPart]:
        """The answer's text; with ``stream`` an iterator of its pieces as they are made, tool calls among them.

        The question and the answer, whole or stopped half-way, join the history. UserError on an empty question and on
        one too long for the budget; the history is then as before.
        """
        if not question.strip():
            raise UserError("question: must not be empty; type some text")
        return self._turn([{"role": "user", "content": question}], stream)

    def report(self, results: Sequence[str], stream: bool = False) -> str | Iterator[AnswerPart]:
        """The model's answer to the results of its tool calls, in their order; otherwise as ``ask``.

        UserError unless there is one for each call of the last answer.
        """
        if not self.calls or len(results) != len(self.calls):
            raise UserError(f"results: {len(results)} given, and the last answer has {len(self.calls)} tool calls")
        return self._turn([{"role": "tool", "content": result} for result in results], stream)

    def stop(self) -> None:
        """End the running answer after the token it is at; safe in a signal handler."""
        self._stopped = True

    def reset(self) -> None:
        """Forget the turns; the system prompt and the tools stay."""
        self.history.clear()
        self.calls = []

    def _turn(self, new: list[Message], stream: bool) -> str | Iterator[AnswerPart]:
        request = Request(
            prompt_ids=tuple(self._prompt(new)),
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            text="tools" if self.tools else "answer",
        )
        self._stopped = False
        pieces = self._answer(new, answer(self.engine, request))
        return pieces if stream else "".join(piece for piece in pieces if isinstance(piece, str))

    def _answer(self, new: list[Message], events: Generator[Event, None, None]) -> Iterator[AnswerPart]:
        words: list[str] = []
        calls: list[ToolCall] = []
        parser = ToolCallStream() if self.tools else None
        self.finish_reason = "interrupted"
        failed = False

        def emit(parts: Sequence[AnswerPart]) -> Iterator[AnswerPart]:
            for part in parts:
                if isinstance(part, str):
                    words.append(part)
                else:
                    calls.append(part)
                yield part

        try:
            with closing(events):
                for event in events:
                    if event.text:
                        yield from emit([event.text] if parser is None else parser.push(event.text))
                    if event.finish_reason is not None:
                        self.finish_reason = event.finish_reason
                    elif self._stopped:
                        break
                if parser is not None:
                    yield from emit(parser.flush())
        except Exception:
            failed = True
            raise
        finally:
            # Also when the reader stopped or Ctrl-C came: what was shown joins the history. A failure leaves no turn.
            if not failed:
                self.calls = calls
                self.history += [*new, _assistant("".join(words), calls)]

    def _prompt(self, new: list[Message]) -> list[int]:
        """Ids of the conversation with as many of the newest turns as the budget holds."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        first = [self.config.bos_token_id] if self.add_bos else []
        # A tool's result belongs to the question before it.
        kept = 0 if new[0]["role"] == "user" else _last_question(self.history)
        turns, newest = self.history[: len(self.history) - kept], [*self.history[len(self.history) - kept :], *new]
        while True:
            ids = first + encode_chat(self.tokenizer, [*system, *turns, *newest], self.tools)
            if not turns or len(ids) < self.budget:
                break
            turns = turns[_next_question(turns) :]
        if len(ids) <= self.budget:
            return ids
        if self.cut_question and new[0]["role"] == "user":
            return self._cut(ids)
        raise UserError(
            f"question: with the system prompt it takes {len(ids)} tokens, and {self.budget} fit beside an answer "
            f"of {self.max_new_tokens}; shorten it, or lower max_new_tokens"
        )

    def _cut(self, ids: list[int]) -> list[int]:
        """``ids`` without the beginning of the question, which lies between the last two control tokens."""
        begin = len(ids) - ids[::-1].index(self.tokenizer.control_id(USER))
        over, length = len(ids) - self.budget, len(ids) - 1 - begin
        if over >= length:
            raise UserError(
                f"question: the system prompt alone takes {begin} tokens, and {self.budget} fit beside an answer of "
                f"{self.max_new_tokens}; shorten it, or lower max_new_tokens"
            )
        print(f"note: question: of its {length} tokens the last {length - over} fit and are asked", file=sys.stderr)
        return ids[:begin] + ids[begin + over :]


class ChatModel:
    """A checkpoint to talk to from Python: ``pt_reference.chat.open_chat`` and ``telechat_ms.chat.open_chat``."""

    def __init__(
        self,
        source: WeightSource,
        make_runner: Callable[..., Runner],
        tokenizer: str | None,
        control: str,
        precision: str,
        quantize: str,
    ) -> None:
        """``source``: what convert.source.open_model gives; ``make_runner``: a backend's ``generate.Runner``; the rest
        as the options of ``tele chat``. UserError on a tokenizer that is missing or does not fit."""
        path = tokenizer or source.tokenizer_path
        if path is None:
            raise UserError("tokenizer: none lies beside the checkpoint; give the path of a tokenizer.model")
        self.tokenizer = load_tokenizer(path, control=control, in_vocabulary=True)
        self.config, note = fit_vocabulary(source.config, self.tokenizer.vocab_size, own=tokenizer is None)
        if note is not None:
            print(f"note: {note}", file=sys.stderr)
        check_vocabulary(self.tokenizer, self.config)
        say_xpos_range(self.config, precision, self.config.max_seqlen)
        get = quantizing(self.config, source.tensor) if quantize == "int8" else source.tensor
        self.engine = Engine(
            make_runner(self.config, get, pool_size(self.config.max_seqlen), precision), self.tokenizer
        )

    def chat(
        self,
        question: str,
        history: Sequence[JsonObject] | None = None,
        stream: bool = False,
        *,
        max_new_tokens: int | None = None,
        add_bos: bool = False,
        tools: Sequence[JsonObject] | None = None,
        **sampling: object,
    ) -> tuple[str, list[Message]] | Iterator[tuple[str, list[Message]]]:
        """The release's ``chat``: (answer, history), or with ``stream`` an iterator of (new text, history so far).

        ``history``: messages with roles user and bot (or assistant, tool), as a call before returned it; it may begin
        with a system message. The one that is returned is a new list with this question and its answer, whose last
        message grows while streaming; tool calls are in it as "tool_calls". The prompt is that of ``tele chat``: the
        chat template, the oldest turns left out when it is full, and as in the release a question too long by itself
        loses its beginning (noted on stderr). ``sampling``: as core.inference.sampling.SamplingConfig; greedy by
        default.

        UserError on an empty question, a message or an option that is wrong, and an answer that leaves less than 3
        tokens for the prompt.
        """
        before = [dict(message) for message in history or ()]
        system = before[0]["content"] if before and before[0].get("role") == "system" else None
        talk = Chat(
            self.engine,
            system=system,
            sampling=sampling_config(**sampling),
            max_new_tokens=max_new_tokens,
            add_bos=add_bos,
            tools=tools,
            cut_question=True,
        )
        talk.history = before[1:] if system is not None else before
        pieces = talk.ask(question, stream=True)
        grown = [*before, {"role": "user", "content": question}, {"role": "bot", "content": ""}]
        growing = _growing(pieces, grown)
        if stream:
            return growing
        return "".join(delta for delta, _ in growing), grown


def _growing(pieces: Iterator[AnswerPart] | str, history: list[Message]) -> Iterator[tuple[str, list[Message]]]:
    """Each piece of text with the history, whose last message it has joined."""
    last = history[-1]
    for piece in pieces:
        if isinstance(piece, ToolCall):
            last.setdefault("tool_calls", []).append(_plain(piece))
            yield "", history
        else:
            last["content"] += piece
            yield piece, history


def _assistant(words: str, calls: Sequence[ToolCall]) -> Message:
    message: Message = {"role": "assistant", "content": words}
    return {**message, "tool_calls": [_plain(call) for call in calls]} if calls else message


def _plain(call: ToolCall) -> JsonObject:
    return {"name": call.name, "arguments": json.loads(call.arguments)}


def _next_question(turns: Sequence[Message]) -> int:
    """Where the second question of ``turns`` begins."""
    return next((n for n, turn in enumerate(turns) if n and turn["role"] == "user"), len(turns))


def _last_question(turns: Sequence[Message]) -> int:
    """Messages from the last question on."""
    return next((n for n, turn in enumerate(reversed(turns), 1) if turn["role"] == "user"), 0)


def default_answer_length(config: ModelConfig) -> int:
    """Tokens of a chat answer when the user names none: a quarter of max_seqlen, between 1 and 1024."""
    return max(1, min(1024, config.max_seqlen // 4))
