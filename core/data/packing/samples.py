"""What is trained of a dialogue: one sequence, or one for each answer where a chat shows earlier answers otherwise."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from telechat_twins.core.data.chat_layout import ChatLayout
from telechat_twins.core.data.control import THINK, THINK_END
from telechat_twins.core.data.kinds.messages import ANSWERS
from telechat_twins.core.data.tokenizer import Allow, Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

Sample = tuple[list[int], list[int]]  # ids, and a mask that is 1 where they are targets
AnySample = Sample | tuple[np.ndarray, np.ndarray]


def encode_samples(
    layout: ChatLayout, messages: Sequence[JsonObject], tools: Sequence[object] | None = None, allow: Allow = False
) -> list[Sample]:
    """The whole conversation, where it begins with the prompt of every answer to learn; else a sequence for each such
    answer, behind its own prompt: models that reason leave the reasoning of earlier answers out.

    UserError where the layout cannot promise that an answer stands behind the prompt of a chat.
    """
    learnt = [n for n, one in enumerate(messages) if one["role"] in ANSWERS and one.get("weight") != 0]
    try:
        return [layout.encode_answers(messages, tools, allow)]
    except UserError:
        if learnt in ([], [len(messages) - 1]):
            raise
    return [layout.encode_answers([*_context(messages[:n]), messages[n]], tools, allow) for n in learnt]


def with_reasoning(
    messages: Sequence[JsonObject], reads: Collection[str], tokenizer: Tokenizer, name: str
) -> list[JsonObject]:
    """Messages for a chat template that mentions the names ``reads``: as the server gives it the reasoning of answers,
    apart where it reads that, else in front of the answer. UserError where the marks of reasoning are control tokens,
    which contents do not hold."""
    if not any(message.get("thought") for message in messages):
        return list(messages)
    if "reasoning_content" not in reads and THINK in tokenizer.silent:
        raise UserError(f"reasoning_content: has no known place in {name}; give --reasoning leave-out")
    return [_apart(message) if "reasoning_content" in reads else message for message in messages]


def _apart(message: JsonObject) -> JsonObject:
    if not message.get("thought"):
        return message
    thought, _, content = message["content"].removeprefix(THINK).partition(THINK_END)
    return {**message, "content": content.removeprefix("\n\n"), "reasoning_content": thought.strip("\n")}


def _context(messages: Sequence[JsonObject]) -> list[JsonObject]:
    return [{**message, "weight": 0} if message["role"] in ANSWERS else message for message in messages]
