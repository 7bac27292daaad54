"""Synchronous generation: one request at a time on an engine.

Backends compute logits; sampling and stopping are in core, so both backends choose the same tokens from equal logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.engine import Engine, stream
from telechat_twins.core.inference.requests import Event, Request
from telechat_twins.core.inference.sampling import SamplingConfig
from telechat_twins.core.model.config import ModelConfig

if TYPE_CHECKING:
    pass


@dataclass
class GenerationResult:
    """Generated tokens without the stop token, which is in ``stop_token``. ``finish_reason``: stop | length."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_token: int | None = None
    top2_margins: list[float] = field(default_factory=list)  # one for each token, the stop token included


def generate(
    engine: Engine,
    prompt_ids: Sequence[int],
    sampling: SamplingConfig,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> GenerationResult:
    """Continue ``prompt_ids`` by up to ``max_new_tokens``, ending early at a token of ``stop_ids``.

    ``on_token`` is called with every token as it is generated, except the stop token. UserError for what the engine
    refuses and for logits that are not finite.
    """
    request = Request(
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=frozenset(stop_ids),
        margins=True,
    )
    result = GenerationResult()
    for event in answer(engine, request):
        assert event.choice is not None and event.choice.margin is not None
        result.top2_margins.append(event.choice.margin)
        if event.finish_reason == "stop":
            result.stop_token, result.finish_reason = event.choice.token, "stop"
            break
        result.tokens.append(event.choice.token)
        if on_token is not None:
            on_token(event.choice.token)
    return result


def answer(engine: Engine, request: Request) -> Generator[Event, None, None]:
    """The events of one request on an engine that serves no other; closing the iterator early cancels the request.

    A length beyond the trained one is noted on stderr. UserError at once for what the engine refuses, and from the
    iterator when the model's logits are not finite.
    """
    events = stream(engine, request)
    note_length(engine.config, request.total)
    return _without_errors(events)


def _without_errors(events: Generator[Event, None, None]) -> Generator[Event, None, None]:
    with closing(events):
        for event in events:
            if event.error is not None:
                raise UserError(event.error)
            yield event


_noted: set[tuple[int, int, int]] = set()


def note_length(config: ModelConfig, length: int) -> None:
    """Print a note, once for a model, that a length exceeds the trained one. This is not an error: the rotary base and
    the attention scale grow with the length (core.model.position)."""
    key = (config.max_seqlen, config.training_seqlen, config.base_seqlen)
    if length <= config.max_seqlen or key in _noted:
        return
    _noted.add(key)
    print(
        f"note: length {length} is beyond max_seqlen {config.max_seqlen}, the length the model was trained for; "
        "rotary positions are scaled to it (NTK-aware), and quality may fall",
        file=sys.stderr,
    )
