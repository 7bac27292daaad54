"""Requests, events and per-sequence state of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from telechat_twins.core.data.control import TOOL_CALL, TOOL_CALL_END
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.pages import first_name, page_name
from telechat_twins.core.inference.sampling import Sampler, SamplingConfig, TokenChoice
from telechat_twins.core.inference.text_stream import StopText, text_stream

if TYPE_CHECKING:
    from telechat_twins.core.data.tokenizer import Tokenizer

RESCALES = ("request", "step")
TEXTS = ("none", "answer", "tools", "continuation")
MAX_SAMPLES = 128
MAX_BIAS = 100.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to go on from it.

    ``samples``: how many answers. ``stop_ids`` end an answer and are not part of it; so do ``stop_texts``, wherever in
    the text they come together. ``logit_bias`` is added to logits by token id. ``logprobs``: report each token's
    log-probability and those of the N likeliest (None: neither). ``margins``: report how far each token was ahead
    of the next. ``text``: none; "answer", which begins a text of its own; "tools", an answer in which the control
    tokens around tool calls are written out; "continuation", whose first word keeps the space that divides it from the
    prompt. ``cache_salt``: prompts use cached pages again only among those of one salt.
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

    @property
    def total(self) -> int:
        """Tokens that prompt and answer may reach together."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(frozen=True)
class Usage:
    """Tokens of one sample. ``completion``: all that were made, a stop token included. ``cached``: of the prompt, those
    whose keys and values were there already."""

    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True)
class Event:
    """What happened to one sample of one request.

    ``choice`` is a token that was made, None when the sample ended without one. ``text`` is what may be shown because
    of it: a character of several tokens comes with its last, and what could become a stop string is held back.
    ``offset``: characters of decoded text in front of the token's own, whether they could be shown yet or not. The last
    event of a sample has ``usage`` and a ``finish_reason``: "stop" (``stop``: the token or the string, neither of which
    is in the text), "length", "cancelled" or "error" (``error`` has the message).
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


def check_request(request: Request, vocab_size: int, has_tokenizer: bool) -> None:
    """UserError on what no engine can do, naming the field; lengths, the engine checks against its own."""
    if not request.prompt_ids:
        raise UserError("prompt: it has no tokens; give some text, or --add-bos to begin from <_start>")
    check_ids("prompt", request.prompt_ids, vocab_size)
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, found {request.max_new_tokens}")
    if not 1 <= request.samples <= MAX_SAMPLES:
        raise UserError(f"samples: must be 1 to {MAX_SAMPLES}, found {request.samples}")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocab_size:
        raise UserError(f"logprobs: must be 0 to {vocab_size}, the vocabulary, found {request.logprobs}")
    if not all(request.stop_texts):
        raise UserError("stop: an empty string would end every answer; leave it out")
    check_ids("logit_bias", request.logit_bias, vocab_size)
    for token, value in request.logit_bias.items():
        if not (math.isfinite(value) and abs(value) <= MAX_BIAS):
            raise UserError(f"logit_bias: token {token} has {value}; must be from -{MAX_BIAS:g} to {MAX_BIAS:g}")
    if request.text not in TEXTS:
        raise UserError(f"text: '{request.text}' is not one of {', '.join(TEXTS)}")
    if not has_tokenizer and (request.text != "none" or request.stop_texts):
        raise UserError("stop: stop strings and text need a tokenizer, found none; give --tokenizer, or token ids")


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> list[int]:
    """``ids`` as plain ints; UserError names the first that is not a token of the vocabulary and its place."""
    checked = [int(token) for token in ids]
    for place, token in enumerate(checked):
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: token id {token} at place {place} is outside the vocabulary of {vocab_size}")
    return checked


def call_marks(tokenizer: Tokenizer) -> dict[int, str]:
    """The control tokens around a tool call, by id; none where the tokenizer has none."""
    return {tokenizer.control[name]: name for name in (TOOL_CALL, TOOL_CALL_END) if name in tokenizer.control}


class Sample:
    """One of the answers to a request, from its arrival to its end.

    ``tokens``: prompt and answer so far, of which the keys and values of the first ``computed`` are in the pages
    ``table[:held]``. ``order`` is the place in the queue, which it never loses. ``leader``: the request's first sample,
    whose prompt the others want to use again.
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
    ) -> None:
        self.number, self.request, self.index, self.order = number, request, index, order
        self.tokens = list(request.prompt_ids)
        self.computed, self.held = 0, 0
        self.table = np.zeros(-(-request.total // page_size), np.int32)
        self.cached: int | None = None
        self.leader: Sample | None = None
        self.finished = False
        self._page_size, self._by_step = page_size, rescale == "step"
        self._names: list[bytes] = []
        self.sampler = Sampler(
            request.sampling, self.tokens, index, request.logit_bias, request.margins, request.logprobs
        )
        self._stops = StopText(request.stop_texts)
        self._text = None
        if request.text != "none" or request.stop_texts:
            assert tokenizer is not None  # check_request refuses text and stop strings without one
            context = self.tokens if request.text == "continuation" else ()
            self._text = text_stream(tokenizer, context, call_marks(tokenizer) if request.text == "tools" else None)

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are still to be computed; after the last of them a token can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def waits(self) -> bool:
        """For the leader, which is computing the prompt that both have."""
        leader = self.leader
        return leader is not None and not leader.finished and leader.computed < len(self.request.prompt_ids)

    def scaling_lengths(self, first: int, last: int) -> np.ndarray:
        """The length that decides the rotary scaling of each of the tokens [first, last), int32.

        The planned end of the request; by ``rescale: step`` the length at which a token came in, as released: that of
        the prompt for all of the prompt, which the release takes in one piece.
        """
        if not self._by_step:
            return np.full(last - first, self.request.total, np.int32)
        return np.maximum(np.arange(first + 1, last + 1, dtype=np.int32), np.int32(len(self.request.prompt_ids)))

    def page_name(self, page: int, scaling: Callable[[int], tuple[float, float]]) -> bytes:
        """The name of the sample's full page number ``page``; ``scaling`` is RotaryRows.scaling."""
        while len(self._names) <= page:
            first = len(self._names) * self._page_size
            last = first + self._page_size
            scales = [scaling(int(length)) for length in self.scaling_lengths(first, last)]
            before = self._names[-1] if self._names else first_name(self.request.cache_salt)
            self._names.append(page_name(before, self.tokens[first:last], np.array(scales)))
        return self._names[page]

    def take_token(self, choice: TokenChoice) -> Event:
        """The event of a token that was chosen; ``finished`` is set when it is the last."""
        self.tokens.append(choice.token)
        reason: str | None = None
        stop: int | str | None = None
        text, offset = "", 0
        if choice.token in self.request.stop_ids:
            reason, stop = "stop", choice.token
        elif self._text is not None:
            text = self._stops.push(self._text.push(choice.token))
            offset = self._text.start
        if reason is None and self._stops.found is None and self.made == self.request.max_new_tokens:
            reason = "length"
        if reason is not None and self._text is not None:
            text += self._stops.push(self._text.flush())
        if self._stops.found is not None:
            reason, stop = "stop", self._stops.found
        elif reason is not None:
            text += self._stops.flush()
        if reason is None:
            return Event(self.number, self.index, choice, text, offset=offset)
        return self._last(choice, text, reason, stop, offset=offset)

    def end(self, reason: str, error: str | None = None) -> Event:
        """The event of a sample that ends without a further token; text that was held back is in it."""
        text = ""
        if self._text is not None:
            text = self._stops.push(self._text.flush()) + self._stops.flush()
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
        return Event(self.number, self.index, choice, text, reason, stop, error, usage, offset)
