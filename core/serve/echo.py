"""Prompts repeated before their completions (``echo``), with the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from telechat_twins.core.inference.requests import PromptScores
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.serve.job import Served
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.core.data.tokenizer import Tokenizer

Named = Callable[[int], str]
"""How a response writes a token, by its id."""


class EchoedPrompt(NamedTuple):
    """A prompt as the response repeats it: its text, and the text and the place in it of each token."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[int, ...]

    def entry(self, index: int, named: Named, scores: PromptScores | None) -> JsonObject:
        """The entry of ``choices`` that comes before the completion's own; the first token has no log-probability."""
        logprobs = None
        if scores is not None:
            tops = [top_texts(named, choice.token, choice.logprob, choice.top) for choice in scores.tokens]
            logprobs = {
                "tokens": [named(token) for token in self.ids],
                "token_logprobs": [None, *(choice.logprob for choice in scores.tokens)],
                "top_logprobs": [None, *tops],
                "text_offset": list(self.offsets),
            }
        return {"text": self.text, "index": index, "logprobs": logprobs, "finish_reason": None}


def echoed(prompt: str | list[int], ids: Sequence[int], served: Served) -> EchoedPrompt:
    """The prompt of a request, whose tokens are ``ids``."""
    stream, text, offsets = served.tokenizer.stream(), "", []
    for token in ids:
        text += stream.push(token)
        offsets.append(stream.start)
    text += stream.flush()
    return EchoedPrompt(prompt if isinstance(prompt, str) else text, tuple(ids), tuple(offsets))


def read_named(fields: Fields, tokenizer: Tokenizer) -> Named:
    """How tokens are written: as text, or where vLLM's ``return_tokens_as_token_ids`` is true as ``token_id:5``, by
    which tokens of equal text are told apart."""
    return "token_id:{}".format if fields.boolean("return_tokens_as_token_ids") else partial(token_text, tokenizer)


def top_texts(
    named: Named, token: int, logprob: float | None, top: Sequence[tuple[int, float]]
) -> dict[str, float | None]:
    """Log-probabilities by text, of the likeliest tokens and of ``token``. Of tokens with the same text it has
    ``token``, else the likeliest."""
    tops: dict[str, float | None] = {}
    for other, value in top:
        tops.setdefault(named(other), value)
    tops[named(token)] = logprob
    return tops


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one whose bytes are not whole characters as ``bytes:\\\\xe4``, as in the OpenAI API."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
