"""Requests, events and per-sequence state of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from telechat_twins.core.data.control import (
    BOT,
    END,
    START,
    SYSTEM,
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
    USER,
)
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.pages import first_name, page_name
from telechat_twins.core.inference.sampling import Sampler, SamplingConfig, TokenChoice, check_finite, log_probabilities
from telechat_twins.core.inference.text_stream import StopText, text_stream
from telechat_twins.core.inference.tool_calls import FirstCall

if TYPE_CHECKING:
    from telechat_twins.core.data.tokenizer import Tokenizer
    from telechat_twins.core.inference.decoding.grammar import Constraint
    from telechat_twins.core.model.config import ModelConfig

RESCALES = ("request", "step")
TEXTS = ("none", "answer", "tools", "continuation")
# Control tokens that end an answer: beside <_end>, those that open a turn, since a model that opens the next turn has
# finished its own.
TURN_TOKENS = (END, USER, START, BOT, SYSTEM)
MAX_SAMPLES = 128
MAX_BIAS = 100.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with its sampling options, stop conditions and output options.

    ``samples``: number of answers. ``stop_ids`` end an answer and are not part of it; so do ``stop_texts``, also when
    one is spread over several tokens. ``logit_bias`` is added to logits, by token id. ``logprobs``: report each token's
    log-probability and those of the N likeliest (None: neither). ``margins``: report the difference of the two largest
    scores. ``text``: "none"; "answer", a text of its own; "tools", an answer in which the control tokens around tool
    calls are written out; "continuation", whose first word keeps the space between it and the prompt. ``cache_salt``:
    only prompts with the same salt share cached pages. ``adapter``: number of the adapter in use, 0 for none; only
    prompts with the same adapter share cached pages. ``grammar``: which answers are possible (core.inference.decoding.
    grammar); one that is complete ends.

    ``min_new_tokens``: before so many, no stop token is chosen and no stop string looked for; a grammar that allows
    nothing else ends an answer all the same. ``one_call``: an answer of the text "tools" ends behind its first call,
    with ``thinking`` behind the first after the reasoning that it begins with.

    ``prompt_logprobs``: report the log-probability of each token of the prompt from place ``scored_from`` on, and those
    of the N likeliest in its place (None: neither). ``next_ids``: with it, report those of these tokens after the whole
    prompt, too. With it ``max_new_tokens`` may be 0.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingConfig = SamplingConfig()
    samples: int = 1
    stop_ids: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    margins: bool = False
    text: str = "none"
    cache_salt: str = ""
    adapter: int = 0
    prompt_logprobs: int | None = None
    scored_from: int = 1
    next_ids: tuple[int, ...] = ()
    grammar: str | None = None
    min_new_tokens: int = 0
    one_call: bool = False
    thinking: bool = False

    @property
    def total(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(frozen=True)
class Usage:
    """Token counts of one sample. ``completion``: generated tokens, a stop token included. ``cached``: tokens of the
    prompt whose keys and values came from the cache."""

    prompt: int
    completion: int
    cached: int


class PromptScores(NamedTuple):
    """Log-probabilities of a prompt: ``tokens``, from place ``scored_from`` on; ``next``, of Request.next_ids after the
    prompt, and ``next_top`` of the likeliest there."""

    tokens: tuple[TokenChoice, ...]
    next: tuple[float, ...] = ()
    next_top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """A generated token, or the end, of one sample of a request.

    ``choice``: the generated token, None when the sample ends without one. ``text``: the new text that may be shown; a
    character of several tokens comes with the last of them, and what may become a stop string is held back. ``offset``:
    characters of decoded text before the token's own, shown or not. The last event of a sample has ``usage`` and a
    ``finish_reason``: "stop" (``stop``: the stop token or string, which is not part of the text; None at the end of a
    grammar), "length", "cancelled"
    or "error" (``error``: the message). ``scores``: with the first event of a request's first sample, where asked for.
    """

    request: int
    sample: int
    choice: TokenChoice | None = None
    text: str = ""
    finish_reason: str | None = None
    stop: int | str | None = None
    error: str | None = None
    usage: Usage | None = None
    offset: int = 0
    scores: PromptScores | None = None


def check_request(request: Request, vocab_size: int, has_tokenizer: bool) -> None:
    """UserError, naming the field, for a request that no engine can serve. Its length is checked by Engine.check."""
    if not request.prompt_ids:
        raise UserError("prompt: must have at least one token; give some text, or --add-bos to begin from <_start>")
    check_ids("prompt", request.prompt_ids, vocab_size)
    least = 1 if request.prompt_logprobs is None else 0
    if request.max_new_tokens < least:
        raise UserError(f"max_new_tokens: must be at least {least}, found {request.max_new_tokens}")
    if not 0 <= request.min_new_tokens <= request.max_new_tokens:
        limit = f"0 to max_new_tokens, {request.max_new_tokens}"
        raise UserError(f"min_new_tokens: must be {limit}, found {request.min_new_tokens}")
    if not 1 <= request.samples <= MAX_SAMPLES:
        raise UserError(f"samples: must be 1 to {MAX_SAMPLES}, found {request.samples}")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(request, name)
        if count is not None and not 0 <= count <= vocab_size:
            raise UserError(f"{name}: must be 0 to {vocab_size}, the vocabulary, found {count}")
    if not 1 <= request.scored_from <= len(request.prompt_ids):
        raise UserError(f"scored_from: must be 1 to {len(request.prompt_ids)}, found {request.scored_from}")
    check_ids("next_ids", request.next_ids, vocab_size)
    if not all(request.stop_texts):
        raise UserError("stop: must not be an empty string, which would end every answer; leave it out")
    check_ids("logit_bias", request.logit_bias, vocab_size)
    for token, value in request.logit_bias.items():
        if not (math.isfinite(value) and abs(value) <= MAX_BIAS):
            raise UserError(f"logit_bias: token {token} has {value}; must be from -{MAX_BIAS:g} to {MAX_BIAS:g}")
    if request.text not in TEXTS:
        raise UserError(f"text: '{request.text}' is not one of {', '.join(TEXTS)}")
    if not has_tokenizer and (request.text != "none" or request.stop_texts):
        raise UserError("stop: stop strings and text output need a tokenizer, found none; give --tokenizer")


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> list[int]:
    """``ids`` as plain ints; UserError names the first id outside the vocabulary and its place."""
    checked = [int(token) for token in ids]
    for place, token in enumerate(checked):
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: token id {token} at place {place} is outside the vocabulary of {vocab_size}")
    return checked


def turn_stops(tokenizer: Tokenizer, config: ModelConfig) -> frozenset[int]:
    """Ids that end an answer: the end of text and every control token that opens or closes a turn."""
    return frozenset({*config.stop_ids, *(tokenizer.control[t] for t in TURN_TOKENS if t in tokenizer.control)})


def shown_marks(tokenizer: Tokenizer, text: str) -> dict[int, str] | None:
    """The control tokens that an answer shows, by id: around reasoning and, in one with tools, around tool calls."""
    names = {"answer": (THINK, THINK_END), "tools": (THINK, THINK_END, TOOL_CALL, TOOL_CALL_END)}.get(text, ())
    silent = {**tokenizer.silent, **tokenizer.control} if names else {}
    return {silent[name]: name for name in names if name in silent} or None


class Sample:
    """State of one answer to a request, from its arrival to its end.

    ``tokens``: prompt and answer so far; the keys and values of the first ``computed`` are in the pages
    ``table[:held]``. ``order``: rank of its arrival, kept when it is preempted. ``leader``: the first sample of the
    request, whose pages of the prompt the others share once they are computed.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        index: int,
        order: int,
        page_size: int,
        rescale: str,
        tokenizer: Tokenizer | None,
        constraint: Constraint | None = None,
    ) -> None:
        self.number, self.request, self.index, self.order = number, request, index, order
        self.tokens = list(request.prompt_ids)
        self.computed, self.held = 0, 0
        self.table = np.zeros(-(-request.total // page_size), np.int32)
        self.cached: int | None = None
        self.fitting: float = math.inf  # Scheduler._fits: no supply of pages beyond this plus the pool's gains
        self.leader: Sample | None = None
        self.finished = False
        self._scores: list[TokenChoice] = []
        self._next: tuple[tuple[float, ...], tuple[tuple[int, float], ...]] = ((), ())
        self._reported = not self.scoring
        self._page_size, self._by_step = page_size, rescale == "step"
        self._names: list[bytes] = []
        self.sampler = Sampler(
            request.sampling,
            self.tokens,
            index,
            request.logit_bias,
            request.margins,
            request.logprobs,
            constraint,
            request.stop_ids if request.min_new_tokens else (),
            request.min_new_tokens + len(request.prompt_ids),
        )
        self._stops = StopText(request.stop_texts)
        self._calls = FirstCall(request.thinking) if request.one_call and request.text == "tools" else None
        self._text = None
        if request.text != "none" or request.stop_texts:
            assert tokenizer is not None  # check_request refuses text and stop strings without one
            context = self.tokens if request.text == "continuation" else ()
            self._text = text_stream(tokenizer, context, shown_marks(tokenizer, request.text))

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are still to be computed. At 0 the next token can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are wanted. A request's first sample alone reports them."""
        return self.request.prompt_logprobs is not None and self.index == 0

    @property
    def first_row(self) -> int:
        """The first place whose logits are still needed: that before the next token to score, else the last one."""
        last = len(self.tokens) - 1
        return min(last, self.request.scored_from + len(self._scores) - 1) if self.scoring else last

    def rows(self, first: int, last: int) -> list[int]:
        """The places among [first, last) whose logits are needed."""
        scored = range(max(first, self.first_row), min(last, len(self.request.prompt_ids) - 1)) if self.scoring else ()
        return [*scored, *([last - 1] if last == len(self.tokens) else [])]

    def take_score(self, logits: np.ndarray, place: int) -> None:
        """Record the log-probability of the prompt's token after ``place`` from the logits [V] there; after the whole
        prompt, those of ``next_ids``. UserError for logits that are not finite."""
        request = self.request
        if place >= len(request.prompt_ids) or not self.scoring or self._reported:
            return
        check_finite(logits, place)
        top = request.prompt_logprobs or 0
        if place < len(request.prompt_ids) - 1:
            token = request.prompt_ids[place + 1]
            self._scores.append(TokenChoice(token, None, *log_probabilities(logits, token, top)))
        elif request.next_ids:
            found = [log_probabilities(logits, token, top if n == 0 else 0) for n, token in enumerate(request.next_ids)]
            self._next = tuple(logprob for logprob, _ in found), found[0][1]

    @property
    def made(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def waits(self) -> bool:
        """Whether the leader is still computing the prompt that both have."""
        leader = self.leader
        return leader is not None and not leader.finished and leader.computed < len(self.request.prompt_ids)

    def scaling_lengths(self, first: int, last: int) -> np.ndarray:
        """The length that decides the rotary scaling of each of the tokens [first, last), int32.

        It is ``request.total`` for all tokens of a request. With ``rescale`` "step", as in the released code, it is the
        length at which a token is computed: the prompt's length for all of the prompt, which the release computes in
        one pass, and after it a token's own position + 1.
        """
        if not self._by_step:
            return np.full(last - first, self.request.total, np.int32)
        return np.maximum(np.arange(first + 1, last + 1, dtype=np.int32), np.int32(len(self.request.prompt_ids)))

    def page_name(self, page: int, scaling: Callable[[int], tuple[float, float]]) -> bytes:
        """Name (core.inference.pages.page_name) of the sample's full page ``page``; ``scaling``: RotaryRows.scaling."""
        while len(self._names) <= page:
            first = len(self._names) * self._page_size
            last = first + self._page_size
            scales = [scaling(int(length)) for length in self.scaling_lengths(first, last)]
            before = self._names[-1] if self._names else first_name(self.request.cache_salt, self.request.adapter)
            self._names.append(page_name(before, self.tokens[first:last], np.array(scales)))
        return self._names[page]

    def take_token(self, choice: TokenChoice) -> Event:
        """Append a chosen token. Returns its event; ``finished`` is set when it is the last."""
        self.tokens.append(choice.token)
        reason: str | None = None
        stop: int | str | None = None
        text, offset = "", 0
        if choice.token in self.request.stop_ids:
            reason, stop = "stop", choice.token
        elif self._text is not None:
            text = self._shown(self._text.push(choice.token))
            offset = self._text.start
        if self._called:
            return self._last(choice, text, "stop", None, offset=offset)
        if reason is None and self._stops.found is None:
            if self.sampler.complete:
                reason = "stop"
            elif self.made == self.request.max_new_tokens:
                reason = "length"
        # At the end the decoder's held-back bytes come out, which may complete a stop string: then that is the reason.
        if reason is not None and self._text is not None:
            text += self._shown(self._text.flush(), last=True)
        if self._stops.found is not None:
            reason, stop = "stop", self._stops.found
        if reason is None:
            return Event(self.number, self.index, choice, text, offset=offset, scores=self._report())
        return self._last(choice, text, reason, stop, offset=offset)

    def _shown(self, text: str, last: bool = False) -> str:
        """What of new text may be shown, as far as the answer has not ended inside it; ``last``: no more comes."""
        if self.made > self.request.min_new_tokens:
            text = self._stops.push(text)
        if last and self._stops.found is None:
            text += self._stops.flush()
        return text if self._calls is None else self._calls.push(text)

    @property
    def _called(self) -> bool:
        return self._calls is not None and self._calls.found

    def end(self, reason: str, error: str | None = None) -> Event:
        """End the sample without a further token. Returns its event, with the text that was held back."""
        text = ""
        if self._text is not None:
            text = self._shown(self._text.flush(), last=True)
        return self._last(None, text, reason, None, error)

    def _last(
        self,
        choice: TokenChoice | None,
        text: str,
        reason: str,
        stop: int | str | None,
        error: str | None = None,
        offset: int = 0,
    ) -> Event:
        self.finished = True
        usage = Usage(len(self.request.prompt_ids), self.made, self.cached or 0)
        return Event(self.number, self.index, choice, text, reason, stop, error, usage, offset, self._report())

    def _report(self) -> PromptScores | None:
        if self._reported:
            return None
        self._reported = True
        return PromptScores(tuple(self._scores), *self._next)
