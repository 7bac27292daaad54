"""Chat sessions on an engine, and the ``chat()`` method of the released models.

As in the release, a prompt has at most max_seqlen - max_new_tokens - 1 tokens, and the oldest turns are left out when a
conversation is longer. Texts of users and tools are encoded as text: control tokens written in them stay letters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

from telechat_twins.core.checkpoint.source import WeightSource
from telechat_twins.core.data.chat_layout import BuiltInLayout, ChatLayout, open_layout, require_layout
from telechat_twins.core.data.control import USER
from telechat_twins.core.data.tokenizer import check_vocabulary, load_tokenizer
from telechat_twins.core.data.vocabulary import fit_vocabulary
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.decoding.settings import AUTO, Settings, find_settings
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.generation import answer
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.requests import Event, Request, turn_stops
from telechat_twins.core.inference.runner import Runner
from telechat_twins.core.inference.sampling import SamplingConfig
from telechat_twins.core.inference.text_stream import Thought, ThoughtStream
from telechat_twins.core.inference.tool_calls import AnswerPart, ToolCall, ToolCallStream
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.quantize import quantizing
from telechat_twins.core.model.xpos_range import say_xpos_range
from telechat_twins.core.shown import message_line
from telechat_twins.core.types import JsonObject

Message = JsonObject


class Chat:
    """A conversation with its history, system prompt, tools and token budget.

    ``history``: messages in the form of core.data.chat_template, without the system message. ``finish_reason`` of the
    last answer: stop | length | interrupted. ``calls``: the tool calls of the last answer.
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
        layout: ChatLayout | None = None,
        adapter: int = 0,
        stops: Sequence[str] = (),
        min_new_tokens: int = 0,
    ) -> None:
        """``layout`` None: TeleChat2's, for a tokenizer that can hold it. ``system`` None: the template's default.
        ``max_new_tokens`` None: a quarter of max_seqlen, at most 1024. ``cut_question``: a question that is too long by
        itself loses its beginning, as in the release; otherwise it is an error. ``adapter`` and
        ``min_new_tokens`` as in Request; ``stops``: strings that end an answer.

        UserError when the tokenizer does not fit the model or the layout, or the budget is below 3 tokens.
        """
        if engine.tokenizer is None:
            raise ValueError("engine: a chat needs an engine with a tokenizer, found one without; pass it to Engine")
        check_vocabulary(engine.tokenizer, engine.config)
        self.engine, self.tokenizer, self.config = engine, engine.tokenizer, engine.config
        known = layout or (BuiltInLayout(self.tokenizer) if self.tokenizer.control else None)
        self.layout = require_layout(self.tokenizer, known)
        self.system, self.tools = system, tools
        self.sampling = sampling or SamplingConfig()
        self.max_new_tokens = default_answer_length(self.config) if max_new_tokens is None else max_new_tokens
        self.least = min(min_new_tokens, self.max_new_tokens)
        self.add_bos, self.cut_question, self.adapter = add_bos, cut_question, adapter
        self.history: list[Message] = []
        self.stop_ids, self._stops = turn_stops(self.tokenizer, self.config), tuple(stops)
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
        """The answer's text; with ``stream``, an iterator over its pieces as they are generated, tool calls included,
        and a reasoning model's Thoughts, which join neither the text nor the history.

        The question and its answer, complete or interrupted, are appended to the history. UserError for an empty
        question and for one that is too long for the budget; the history is then unchanged.
        """
        if not question.strip():
            raise UserError("question: must not be empty; type some text")
        return self._turn([{"role": "user", "content": question}], stream)

    def report(self, results: Sequence[str], stream: bool = False) -> str | Iterator[AnswerPart]:
        """The model's answer to the results of its tool calls, given in the order of the calls; otherwise as ``ask``.

        UserError unless there is one result for each call of the last answer.
        """
        if not self.calls or len(results) != len(self.calls):
            raise UserError(
                f"results: must be one for each tool call of the last answer, which has {len(self.calls)}; "
                f"found {len(results)}"
            )
        return self._turn([{"role": "tool", "content": result} for result in results], stream)

    def stop(self) -> None:
        """End the running answer after its current token; safe to call from a signal handler."""
        self._stopped = True

    def reset(self) -> None:
        """Clear the history; the system prompt and the tools are kept."""
        self.history.clear()
        self.calls = []

    def _turn(self, new: list[Message], stream: bool) -> str | Iterator[AnswerPart]:
        request = Request(
            prompt_ids=tuple(self._prompt(new)),
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.least,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            stop_texts=self._stops,
            text="tools" if self.tools else "answer",
            adapter=self.adapter,
        )
        self._stopped = False
        pieces = self._answer(new, answer(self.engine, request))
        if stream:
            return pieces
        return "".join(piece for piece in pieces if isinstance(piece, str) and not isinstance(piece, Thought))

    def _answer(self, new: list[Message], events: Generator[Event, None, None]) -> Iterator[AnswerPart]:
        words: list[str] = []
        calls: list[ToolCall] = []
        parser = ToolCallStream() if self.tools else None
        thoughts = ThoughtStream() if self.layout.thinks() else None
        self.finish_reason = "interrupted"
        failed = False

        def emit(parts: Sequence[AnswerPart]) -> Iterator[AnswerPart]:
            for part in parts:
                if isinstance(part, Thought):
                    pass
                elif isinstance(part, str):
                    words.append(part)
                else:
                    calls.append(part)
                yield part

        try:
            with closing(events):
                for event in events:
                    for text in [event.text] if thoughts is None else thoughts.push(event.text):
                        if isinstance(text, Thought):
                            yield text
                        elif text:
                            yield from emit([text] if parser is None else parser.push(text))
                    if event.finish_reason is not None:
                        self.finish_reason = event.finish_reason
                    elif self._stopped:
                        break
                yield from emit([] if thoughts is None else thoughts.flush())
                if parser is not None:
                    yield from emit(parser.flush())
        except Exception:
            failed = True
            raise
        finally:
            # After the reader stopped or Ctrl-C, too, what was shown joins the history. A failed turn leaves no trace.
            if not failed:
                self.calls = calls
                self.history += [*new, assistant_message("".join(words), calls)]

    def _prompt(self, new: list[Message]) -> list[int]:
        """Token ids of the conversation, with as many of the newest turns as fit the budget."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        first = [self.config.bos_token_id] if self.add_bos else []
        # Results of tool calls need the question and the calls that led to them: these are never left out.
        kept = 0 if new[0]["role"] == "user" else _last_question(self.history)
        turns, newest = self.history[: len(self.history) - kept], [*self.history[len(self.history) - kept :], *new]
        while True:
            ids = self.layout.encode([*system, *turns, *newest], self.tools)
            ids = ids if ids[:1] == first else first + ids  # a template may begin with it as well
            if not turns or len(ids) < self.budget:
                break
            turns = turns[_next_question(turns) :]
        if len(ids) <= self.budget:
            return ids
        if self.cut_question and new[0]["role"] == "user":
            return self._cut(ids)
        raise UserError(
            f"question: must fit into {self.budget} tokens with the system prompt, beside an answer of "
            f"{self.max_new_tokens}; both take {len(ids)}: shorten it, or lower max_new_tokens"
        )

    def _cut(self, ids: list[int]) -> list[int]:
        """``ids`` shortened to the budget by the beginning of the question, which lies between the last two control
        tokens. UserError when the rest of the prompt alone exceeds it."""
        if not isinstance(self.layout, BuiltInLayout):
            raise UserError(f"question: {len(ids)} tokens with the system prompt, and {self.budget} fit; shorten it")
        begin = len(ids) - ids[::-1].index(self.tokenizer.control_id(USER))
        over, length = len(ids) - self.budget, len(ids) - 1 - begin
        if over >= length:
            raise UserError(
                f"system prompt: must leave room for a question in {self.budget} tokens, beside an answer of "
                f"{self.max_new_tokens}; it takes {begin}: shorten it, or lower max_new_tokens"
            )
        print(f"note: question: too long, its last {length - over} of {length} tokens are used", file=sys.stderr)
        return ids[:begin] + ids[begin + over :]


class ChatModel:
    """A checkpoint with the released models' ``chat`` method, opened by a backend's ``chat.open_chat``."""

    def __init__(
        self,
        source: WeightSource,
        make_runner: Callable[..., Runner],
        tokenizer: str | None,
        control: str,
        precision: str,
        quantize: str,
    ) -> None:
        """``source``: from convert.source.open_model; ``make_runner``: a backend's ``generate.Runner``; the others as
        the options of ``tele chat``. UserError for a tokenizer that is missing or does not fit the model."""
        path = tokenizer or source.tokenizer_path
        if path is None:
            raise UserError("tokenizer: there is none beside the checkpoint; give the path of one")
        self.tokenizer = load_tokenizer(path, control=control, in_vocabulary=True)
        added = self.tokenizer.special.described
        self.config, note = fit_vocabulary(source.config, self.tokenizer.vocab_size, tokenizer is None, added, path)
        if note is not None:
            print(f"note: {note}", file=sys.stderr)
        check_vocabulary(self.tokenizer, self.config)
        beside = [] if source.tokenizer_path is None else [source.tokenizer_path.parent]
        self.layout, notes = open_layout(self.tokenizer, folders=beside)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        self.settings = find_settings(AUTO, source.assets, self.config)
        for note in self.settings.note({}, draws=False):
            print(f"note: {message_line(note)}", file=sys.stderr)
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
        """The release's ``chat``: (answer, history), or with ``stream`` an iterator over (new text, history so far).

        ``history``: messages with the roles user and bot (or assistant, tool), as an earlier call returned them; it may
        begin with a system message. The returned history is a new list that ends with this question and its answer,
        which grows while streaming; tool calls are in it as "tool_calls". The prompt is built as by ``tele chat``: chat
        template, oldest turns left out when it is full. As in the release, a question that is too long by itself loses
        its beginning (noted on stderr). ``sampling``: fields of core.inference.sampling.SamplingConfig; those left out,
        and ``max_new_tokens``, are as in the model's generation_config.json, else greedy.

        UserError for an empty question, an invalid message or option, and when ``max_new_tokens`` leaves less than 3
        tokens for the prompt.
        """
        if max_new_tokens is None:
            max_new_tokens = default_answer_length(self.config, self.settings)
        before = [dict(message) for message in history or ()]
        system = before[0]["content"] if before and before[0].get("role") == "system" else None
        talk = Chat(
            self.engine,
            system=system,
            sampling=self.settings.resolve(sampling, draws=False),
            max_new_tokens=default_answer_length(self.config, self.settings)
            if max_new_tokens is None
            else max_new_tokens,
            stops=self.settings.stops,
            min_new_tokens=self.settings.min_new_tokens,
            add_bos=add_bos,
            tools=tools,
            cut_question=True,
            layout=self.layout,
        )
        talk.history = before[1:] if system is not None else before
        pieces = talk.ask(question, stream=True)
        grown = [*before, {"role": "user", "content": question}, {"role": "bot", "content": ""}]
        growing = _growing(pieces, grown)
        if stream:
            return growing
        return "".join(delta for delta, _ in growing if not isinstance(delta, Thought)), grown


def _growing(pieces: Iterator[AnswerPart] | str, history: list[Message]) -> Iterator[tuple[str, list[Message]]]:
    """(piece of text, history) for each piece of the answer, after it was appended to the last message."""
    last = history[-1]
    for piece in pieces:
        if isinstance(piece, Thought):
            yield piece, history
        elif isinstance(piece, ToolCall):
            last.setdefault("tool_calls", []).append(_plain(piece))
            yield "", history
        else:
            last["content"] += piece
            yield piece, history


def assistant_message(words: str, calls: Sequence[ToolCall]) -> Message:
    """An answer's text and its tool calls as a message of the chat template."""
    message: Message = {"role": "assistant", "content": words}
    return {**message, "tool_calls": [_plain(call) for call in calls]} if calls else message


def _plain(call: ToolCall) -> JsonObject:
    return {"name": call.name, "arguments": json.loads(call.arguments)}


def _next_question(turns: Sequence[Message]) -> int:
    """Index of the second question in ``turns``; their number if there is none."""
    return next((n for n, turn in enumerate(turns) if n and turn["role"] == "user"), len(turns))


def _last_question(turns: Sequence[Message]) -> int:
    """Number of messages from the last question on; 0 if there is none."""
    return next((n for n, turn in enumerate(reversed(turns), 1) if turn["role"] == "user"), 0)


def default_answer_length(config: ModelConfig, settings: Settings | None = None) -> int:
    """Default length of a chat answer in tokens: max_new_tokens of ``settings``, at most half of max_seqlen, so that a
    conversation has room; else a quarter of max_seqlen, between 1 and 1024."""
    if settings is not None and settings.max_new_tokens is not None:
        return max(1, min(settings.max_new_tokens, config.max_seqlen // 2))
    return max(1, min(1024, config.max_seqlen // 4))
