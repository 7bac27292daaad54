"""Prompts repeated before their completions (``echo``), with the log-probabilities of their tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from telechat_twins.core.inference.requests import PromptScores
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.serve.job import Served
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.core.data.tokenizer import Tokenizer

_ALIGNED = 1_000  # characters between the first and the last change that are compared one by one, in quadratic time
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
    if not isinstance(prompt, str):
        return EchoedPrompt(text, tuple(ids), tuple(offsets))
    if len(prompt) != len(text):
        offsets = list(map(partial(_place, _alignment(text, prompt)), offsets))
    return EchoedPrompt(prompt, tuple(ids), tuple(offsets))


def _alignment(text: str, prompt: str) -> list[tuple[int, int, int]]:
    """Pieces that follow one another: (begin in ``text``, begin in ``prompt``, end there). ``text`` is what the tokens
    of ``prompt`` decode to where the tokenizer changes it first: composes characters, drops spaces, lowers letters."""
    same = next((n for n, (mine, theirs) in enumerate(zip(text, prompt, strict=False)) if mine != theirs), None)
    same = min(len(text), len(prompt)) if same is None else same
    left = min(len(text), len(prompt)) - same
    tail = next((n for n in range(left) if text[-1 - n] != prompt[-1 - n]), left)
    ends = len(text) - tail, len(prompt) - tail
    pieces = [(0, 0, same)]
    if max(ends) - same <= _ALIGNED:
        blocks = SequenceMatcher(None, text[same : ends[0]], prompt[same : ends[1]], autojunk=False).get_opcodes()
        pieces += [(same + begin, same + first, same + last) for _, begin, _, first, last in blocks]
    else:
        pieces.append((same, same, ends[1]))
    return [*pieces, (*ends, len(prompt))]


def _place(alignment: Sequence[tuple[int, int, int]], offset: int) -> int:
    """An offset in the text of an ``_alignment`` as one in the prompt."""
    begin, first, last = alignment[bisect_right(alignment, offset, key=lambda piece: piece[0]) - 1]
    return min(first + offset - begin, last)


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
