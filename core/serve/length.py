"""Prompt length check by characters, before tokenization.

Tokenizing takes about a second for a million characters, and refusing a prompt for its length should be cheap. A token
stands for at most ``longest`` characters, so a text of more than ``tokens * longest`` characters is refused without
tokenizing it. For shorter texts, growing prefixes are tokenized until one has twice the tokens that fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.job import Served

CHARACTERS_PER_TOKEN = 4  # of ordinary text; also the factor by which prefixes grow


def check_length(served: Served, texts: Sequence[str], param: str) -> None:
    """ApiError 400 when the prompt made of ``texts`` is certainly too long. One that passes may still be too long, by
    less than a factor of two."""
    tokens = min(served.max_prompt, served.context - 1)
    characters = sum(map(len, texts))
    if characters > max_characters(served):
        raise too_long(served, param, f"resulted in {characters} characters")
    size = CHARACTERS_PER_TOKEN * tokens
    while size < characters:
        found = sum(len(served.tokenizer.encode(text)) for text in _beginning(texts, size))
        if found > 2 * tokens:
            raise too_long(served, param, f"resulted in more than {found} tokens")
        size *= CHARACTERS_PER_TOKEN


def max_characters(served: Served) -> int:
    """Characters of the longest prompt that may fit."""
    return min(served.max_prompt, served.context - 1) * served.tokenizer.longest_piece


def _beginning(texts: Sequence[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        yield text[:size]
        size -= len(text)


def too_long(served: Served, param: str, finding: str) -> ApiError:
    """The error for a prompt that is refused before its tokens are counted; ``finding``: what shows that."""
    return ApiError(
        400,
        f"{served.prompt_limit}, and no token has more than {served.tokenizer.longest_piece} characters. However, your "
        f"{param} {finding}. Please reduce the length of the {param}.",
        param,
        "context_length_exceeded",
    )
