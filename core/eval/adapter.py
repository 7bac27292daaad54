"""The engine as a model of lm-evaluation-harness. Needs the extra ``eval``; import it where that is known to be there.

The harness's interface is lm_eval.api.model.TemplateLM of version 0.4.13. Where its own ``hf`` model makes a choice
(windows of a rolling likelihood, truncation from the left, the first token of an empty context) the same is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from telechat_twins.core.data.chat_layout import ChatLayout
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.journal import Journal, digest_of
from telechat_twins.core.eval.scorer import Likelihood, Pair, Scorer, rolling_windows, truncated
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.inference.sampling import SamplingConfig, sampling_config
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

MAX_NEW = 256  # tokens of an answer, where a task does not say; the harness's own number
NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Bar(Protocol):
    """A progress bar."""

    def update(self, n: int = 1, /) -> object: ...


OpenBar = Callable[[str, int], AbstractContextManager[Bar]]  # (description, total)


@dataclass(frozen=True)
class Served:
    """What the adapter needs of a model. ``max_len``: tokens of context and continuation together."""

    config: ModelConfig
    tokenizer: Tokenizer
    max_len: int
    stop_ids: frozenset[int]
    layout: ChatLayout | None = None
    add_bos: bool = False


class EngineModel(TemplateLM):
    """lm_eval's model interface over a Scorer, whose answers go through ``journal``."""

    backend = "causal"

    def __init__(self, served: Served, scorer: Scorer, journal: Journal, bar: OpenBar) -> None:
        super().__init__()
        self._served, self._scorer, self._journal, self._bar = served, scorer, journal, bar
        self._rendered: dict[str, list[int]] = {}  # conversations in the chat template, with their ids
        self.cut = 0  # requests that were cut from the left
        self.crossed = 0  # requests with a token over the border of context and continuation

    @property
    def eot_token_id(self) -> int:
        return self._served.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one of a text without context: the model's first token."""
        return self._served.config.bos_token_id

    @property
    def max_length(self) -> int:
        return self._served.max_len

    @property
    def tokenizer_name(self) -> str:
        return f"{self._served.tokenizer.file_name}-{self._served.tokenizer.sha256[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text. Of a rendered conversation they are the template's own: names of control tokens inside a
        message stay text."""
        for size in sorted({len(text) for text in self._rendered}, reverse=True):
            if string[:size] in self._rendered:
                rest = string[size:]
                return self._rendered[string[:size]] + (self._served.tokenizer.encode(rest) if rest else [])
        add_bos = self._served.add_bos and add_special_tokens is not False
        return self._served.tokenizer.encode(string, add_bos=add_bos)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._layout().name if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[JsonObject], add_generation_prompt: bool = True) -> str:
        """A conversation as text, whose ids ``tok_encode`` knows."""
        ids = self._layout().encode(chat_history, add_generation_prompt=add_generation_prompt)
        text = self._served.tokenizer.decode(ids)
        self._rendered[text] = ids
        return text

    def _layout(self) -> ChatLayout:
        if self._served.layout is None:
            raise UserError("--chat: this model has no chat template; give --chat-template FILE, or leave --chat out")
        return self._served.layout

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both as the harness divides them: the ids of the context, and of the whole text those behind as many.

        Where a token lies over the border, these are not the whole text's: a part of the continuation is not scored, or
        is read twice. The harness's scores are defined so; such requests are counted.
        """
        first, second = super()._encode_pair(context, continuation)
        self.crossed += self.tok_encode(context + continuation)[: len(first)] != first
        return first, second

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        pairs = []
        for asked, context, continuation in requests:
            if not continuation:
                raise UserError(f"the continuation of {str(asked)[-80:]} has no token of its own; give it some text")
            pairs.append(self._fitted(Pair(tuple(context), tuple(continuation))))
        return [(found.logprob, found.greedy) for found in self._scored(pairs, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, the first token after ``prefix_token_id``."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            (text,) = request.args
            made = rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)
            windows += made
            counts.append(len(made))
        found = iter(self._scored(windows, "rolling"))
        return [sum(next(found).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each answer, which ends before a stop string."""
        asked = [self._generation(*request.args) for request in requests]
        keys = [digest_of("generate", _facts(request)) for request in asked]
        missing = _first_places(keys, self._journal)
        with self._bar("answers", len(requests)) as bar:
            bar.update(len(requests) - len(missing))

            def done(number: int, text: str) -> None:
                self._journal.put(keys[missing[number]], text)
                bar.update(1)

            self._scorer.generate([asked[place] for place in missing], done)
        return [str(self._journal.found[key]) for key in keys]

    def _scored(self, pairs: Sequence[Pair], what: str) -> list[Likelihood]:
        keys = [digest_of("likelihood", pair.context, pair.continuation) for pair in pairs]
        missing = _first_places(keys, self._journal)
        with self._bar(what, len(pairs)) as bar:
            bar.update(len(pairs) - len(missing))

            def done(number: int, found: Likelihood) -> None:
                self._journal.put(keys[missing[number]], list(found))
                bar.update(1)

            self._scorer.likelihoods([pairs[place] for place in missing], done)
        return [_likelihood(self._journal.found[key]) for key in keys]

    def _fitted(self, pair: Pair) -> Pair:
        try:
            kept = truncated(pair, self.max_length)
        except UserError as error:
            text = self._served.tokenizer.decode(list(pair.continuation[:20]))
            raise UserError(f"{shown(text)} ...: {error}") from None
        self.cut += kept.context != pair.context
        return kept

    def _generation(self, context: str, options: JsonObject) -> Request:
        """The engine's request for a context and a task's generation options."""
        given = dict(options)
        until = given.pop("until", None) or []
        stops = list(until) if isinstance(until, (list, tuple)) else [until]
        if not all(isinstance(stop, str) for stop in stops if stop):
            raise UserError(f"until: must be texts, found {shown(until)}; correct the task's generation_kwargs")
        new = next((given.pop(name) for name in NAMES if given.get(name) is not None), MAX_NEW)
        for name in NAMES:
            given.pop(name, None)
        sampling = _sampling(given)
        try:
            new = int(new)
        except (TypeError, ValueError):
            raise UserError(
                f"max_gen_toks: must be a whole number, found {shown(new)}; correct the task's generation_kwargs"
            ) from None
        if not 0 < new < self.max_length:
            raise UserError(
                f"max_gen_toks: must be 1 to {self.max_length - 1}, found {new}; give a larger --max-len, or the task "
                "fewer tokens in its generation_kwargs"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(ids) > self.max_length - new
        return Request(
            prompt_ids=tuple(ids[-(self.max_length - new) :]),
            max_new_tokens=new,
            sampling=sampling,
            stop_ids=self._served.stop_ids,
            stop_texts=tuple(stop for stop in stops if stop),
            text="answer",
            adapter=self._scorer.adapter,
        )


def _sampling(given: JsonObject) -> SamplingConfig:
    """The sampling of a task's options, of which nothing else may be left. As the harness has it, temperature 0 unless
    the task draws."""
    draws = given.pop("do_sample", None)
    values = {name: given.pop(name) for name in SAMPLING if name in given}
    if given:
        raise UserError(f"generation_kwargs: {', '.join(sorted(given))} cannot be honoured here; leave them out")
    if draws is False or not float(values.get("temperature", 0.0)):
        kept = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        values = {name: value for name, value in values.items() if name in kept}
    return sampling_config(**{name: int(v) if name == "top_k" else float(v) for name, v in values.items()})


def _facts(request: Request) -> list[object]:
    sampling = request.sampling
    options = [getattr(sampling, name) for name in (*SAMPLING, "seed")]
    return [request.prompt_ids, request.max_new_tokens, request.stop_texts, sorted(request.stop_ids), options]


def _first_places(keys: Sequence[str], journal: Journal) -> list[int]:
    """Places of requests that the journal cannot answer, the first of equal ones."""
    seen: set[str] = set()
    places = []
    for place, key in enumerate(keys):
        if key not in journal.found and key not in seen:
            seen.add(key)
            places.append(place)
    return places


def _likelihood(answer: object) -> Likelihood:
    assert isinstance(answer, list)
    return Likelihood(float(answer[0]), bool(answer[1]))
