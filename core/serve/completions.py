"""``/v1/completions``: continuation of raw text or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from telechat_twins.core.inference.requests import Event, PromptScores, Request
from telechat_twins.core.inference.sampling import TokenChoice
from telechat_twins.core.serve.constraint import ToolUse, grammar_of, read_format
from telechat_twins.core.serve.echo import EchoedPrompt, Named, echoed, read_named, top_texts
from telechat_twins.core.serve.errors import shown
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.serve.frames import ChoicesFrame
from telechat_twins.core.serve.job import (
    MAX_LOGPROBS,
    AnswerJob,
    Draft,
    Served,
    read_options,
    read_samples,
    read_stream,
    room,
)
from telechat_twins.core.serve.length import check_length
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    pass

DEFAULT_NEW = 16  # tokens; the OpenAI API's default
MAX_PROMPTS = 128


def read_completion(body: JsonObject, served: Served, tenant: str = "") -> Draft:
    """Draft of the completion request in ``body``; ApiError names the invalid field. ``tenant``: from check_key."""
    fields = Fields(body)
    options = read_options(fields, served, tenant)
    stream, include_usage = read_stream(fields)
    echo = fields.boolean("echo")
    samples, asked = read_samples(fields), fields.integer("max_tokens", 0 if echo else 1, None)
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    named = read_named(fields, served.tokenizer)
    schema = read_format(fields)
    fields.absent(
        ("best_of", "suffix"), "is not supported by this server; leave it out", {"best_of": samples, "suffix": ""}
    )
    found = fields.any("prompt")
    fields.done()
    prompts = read_prompts(fields, found, served)

    def encode() -> AnswerJob:
        grammar = grammar_of(served, schema, ToolUse(), continues=True)
        encoded = [_encode(prompt, served) for prompt in prompts]
        new = room(served, encoded, asked, DEFAULT_NEW, "prompt")
        requests = tuple(
            Request(
                prompt_ids=tuple(ids),
                max_new_tokens=new,
                min_new_tokens=options.least_of(new),
                sampling=options.sampling,
                samples=samples,
                stop_ids=options.stop_ids(served.config.stop_ids),
                stop_texts=options.stops,
                logit_bias=options.bias,
                logprobs=logprobs,
                text="continuation",
                cache_salt=options.salt,
                adapter=options.adapter,
                grammar=grammar,
                # A prompt that is repeated without an answer is computed all the same, as one without scores.
                prompt_logprobs=(logprobs or 0) if echo and (logprobs is not None or new == 0) else None,
                scored_from=len(ids) if echo and logprobs is None else 1,
            )
            for ids in encoded
        )
        repeated = [echoed(*pair, served) for pair in zip(prompts, encoded, strict=True)] if echo else []
        writer = CompletionWriter(named, repeated, samples, logprobs is not None)
        return AnswerJob(requests, partial(ChoicesFrame, writer, include_usage), stream)

    return Draft(len(prompts) * samples, encode)


def _encode(prompt: str | list[int], served: Served) -> list[int]:
    """Token ids of one prompt. ApiError when it is too long, so that the prompts after it are not tokenized."""
    if not isinstance(prompt, str):
        return prompt
    check_length(served, [prompt], "prompt")
    ids = served.tokenizer.encode(prompt)
    ids = [served.config.bos_token_id, *ids] if served.add_bos else ids
    room(served, [ids], None, DEFAULT_NEW, "prompt")
    return ids


def read_prompts(fields: Fields, found: object, served: Served) -> list[str | list[int]]:
    """The prompts in a string, a list of strings, token ids, or a list of lists of token ids. Strings are plain text:
    the name of a control token in one does not become that token."""
    if found is None:
        fields.refuse("prompt", "is missing", "missing_required_parameter")
    several = found if isinstance(found, list) and found and not _is_id(found[0]) else [found]
    if len(several) > MAX_PROMPTS:
        fields.refuse("prompt", f"must have at most {MAX_PROMPTS} prompts, found {len(several)}", "invalid_value")
    prompts: list[str | list[int]] = []
    for place, prompt in enumerate(several):
        where = f"prompt[{place}] " if several is found else ""
        if not isinstance(prompt, str):
            if isinstance(prompt, list):
                room(served, [prompt], None, DEFAULT_NEW, "prompt")  # its length first: checking ids one by one is slow
            _check_ids(fields, where, prompt, served.config.num_tokens)
        if not (prompt or (isinstance(prompt, str) and served.add_bos)):
            fields.refuse("prompt", f"{where}must have at least one token", "invalid_value")
        prompts.append(prompt)
    return prompts


def _check_ids(fields: Fields, where: str, prompt: object, vocab_size: int) -> None:
    if not isinstance(prompt, list) or not all(map(_is_id, prompt)):
        fields.refuse(
            "prompt",
            f"{where}expected a string, a list of strings, token ids, or lists of them, found {shown(prompt)}",
            "invalid_type",
        )
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        message = f"{where}token id {shown(wrong)} is outside the vocabulary of {vocab_size}"
        fields.refuse("prompt", message, "invalid_value")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class CompletionWriter:
    """Writer (core.serve.frames.Writer) of completions. ``repeated``: the prompts, if they are to come before their
    ``samples`` answers each, with their tokens' log-probabilities where ``scored``."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"
    reasoned = None

    def __init__(
        self, named: Named, repeated: Sequence[EchoedPrompt] = (), samples: int = 1, scored: bool = False
    ) -> None:
        self._named, self._repeated, self._samples, self._scored = named, repeated, samples, scored
        self._scores: dict[int, PromptScores] = {}  # by prompt; with the first event of its first sample
        self._entries: dict[int, list[JsonObject]] = {}  # by answer

    def opening(self, index: int) -> list[JsonObject]:
        return []

    def push(self, index: int, event: Event) -> list[JsonObject]:
        place, before, length = index // self._samples, [], 0
        if self._repeated:
            length = len(self._repeated[place].text)
            if event.scores is not None:
                self._scores[place] = event.scores
            if index not in self._entries:
                scores = self._scores.get(place) if self._scored else None
                before = [self._repeated[place].entry(index, self._named, scores)]
        logprobs = None
        # A stop token is not part of the answer, but beside a prompt's tokens each generated one is listed: clients
        # count them from the end.
        hidden = isinstance(event.stop, int) and not self._repeated
        if event.choice is not None and event.choice.logprob is not None and not hidden:
            logprobs = self._logprobs(event.choice, length + event.offset)
        made = before
        if event.text or logprobs or event.finish_reason:
            entry = {"text": event.text, "index": index, "logprobs": logprobs, "finish_reason": event.finish_reason}
            made = [*before, entry]
        if made:
            self._entries.setdefault(index, []).extend(made)
        return made

    def whole(self) -> list[JsonObject]:
        choices = []
        for index, entries in sorted(self._entries.items()):
            with_logprobs = [entry["logprobs"] for entry in entries if entry["logprobs"]]
            logprobs = None
            if with_logprobs:
                logprobs = {name: [value for one in with_logprobs for value in one[name]] for name in with_logprobs[0]}
            choices.append(
                {
                    "text": "".join(entry["text"] for entry in entries),
                    "index": index,
                    "logprobs": logprobs,
                    "finish_reason": entries[-1]["finish_reason"],
                }
            )
        return choices

    def _logprobs(self, choice: TokenChoice, offset: int) -> JsonObject:
        """Log-probabilities of one token. ``top_logprobs`` always has the drawn token, so it may have one entry more
        than requested."""
        return {
            "tokens": [self._named(choice.token)],
            "token_logprobs": [choice.logprob],
            "top_logprobs": [top_texts(self._named, choice.token, choice.logprob, choice.top)],
            "text_offset": [offset],
        }
