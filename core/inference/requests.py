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
    """A prompt with its sampling options, stop conditions and output options.

    ``samples``: number of answers. ``stop_ids`` end an answer and are not part of it; so do ``stop_texts``, also when
    one is spread over several tokens. ``logit_bias`` is added to logits, by token id. ``logprobs``: report each token's
    log-probability and those of the N likeliest (None: neither). ``margins``: report the difference of the two largest
    scores. ``text``: "none"; "answer", a text of its own; "tools", an answer in which the control tokens around tool
    calls are written out; "continuation", whose first word keeps the space between it and the prompt. ``cache_salt``:
    only prompts with the same salt share cached pages. ``adapter``: number of the adapter in use, 0 for none; only
    prompts with the same adapter share cached pages.
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


@dataclass(frozen=True)
class Event:
    """A generated token, or the end, of one sample of a request.

    ``choice``: the generated token, None when the sample ends without one. ``text``: the new text that may be shown; a
    character of several tokens comes with the last of them, and what may become a stop string is held back. ``offset``:
    characters of decoded text before the token's own, shown or not. The last event of a sample has ``usage`` and a
    ``finish_reason``: "stop" (``stop``: the stop token or string, which is not part of the text), "length", "cancelled"
    or "error" (``error``: the message).
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
    """UserError, naming the field, for a request that no engine can serve. Its length is checked by Engine.check."""
    if not request.prompt_ids:
        raise UserError("prompt: must have at least one token; give some text, or --add-bos to begin from <_start>")
    check_ids("prompt", request.prompt_ids, vocab_size)
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, found {request.max_new_tokens}")
    if not 1 <= request.samples <= MAX_SAMPLES:
        raise UserError(f"samples: must be 1 to {MAX_SAMPLES}, found {request.samples}")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocab_size:
        raise UserError(f"logprobs: must be 0 to {vocab_size}, the vocabulary, found {request.logprobs}")
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


def call_marks(tokenizer: Tokenizer) -> dict[int, str]:
    """The control tokens around a tool call, by id; none where the tokenizer has none."""
    silent = {**tokenizer.silent, **tokenizer.control}
    return {silent[name]: name for name in (TOOL_CALL, TOOL_CALL_END) if name in silent}


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
        """Tokens whose keys and values are still to be computed. At 0 the next token can be chosen."""
        return len(self.tokens) - self.computed

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
            text = self._stops.push(self._text.push(choice.token))
            offset = self._text.start
        if reason is None and self._stops.found is None and self.made == self.request.max_new_tokens:
            reason = "length"
        # At the end the decoder's held-back bytes come out, which may complete a stop string: then that is the reason.
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
        """End the sample without a further token. Returns its event, with the text that was held back."""
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
