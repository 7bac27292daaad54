"""The two names of lm-evaluation-harness that core.eval.adapter imports, for installations without the extra ``eval``.

The interface is that of version 0.4.13: a TemplateLM turns the texts of a request into ids and leaves the rest to its
subclass. Where the package is installed, the tests use the real one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass
class Instance:
    """A request: its kind, the task's row, its arguments, and its number among those of the row."""

    request_type: str
    doc: dict[str, Any]
    arguments: tuple[Any, ...]
    idx: int

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


class TemplateLM:
    """Log-likelihoods of (context, continuation) texts by a subclass's ``tok_encode`` and ``_loglikelihood_tokens``."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        kept = context.rstrip()  # the space between both belongs to the continuation's first word
        continuation = context[len(kept) :] + continuation
        first: list[int] = self.tok_encode(kept)  # type: ignore[attr-defined]
        return first, self.tok_encode(kept + continuation)[len(first) :]  # type: ignore[attr-defined]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        found = []
        for request in requests:
            context, continuation = request.args
            if context:
                ids = self._encode_pair(context, continuation)
            else:
                prefix = [self.prefix_token_id]  # type: ignore[attr-defined]
                ids = prefix, self.tok_encode(continuation, add_special_tokens=False)  # type: ignore[attr-defined]
            found.append(((context, continuation), *ids))
        return self._loglikelihood_tokens(found)  # type: ignore[attr-defined]


@contextmanager
def harness_modules() -> Iterator[type]:
    """The class Instance, while core.eval.adapter can be imported: the real package's, or this file's."""
    if importlib.util.find_spec("lm_eval") is not None:
        from lm_eval.api.instance import Instance as Real

        yield Real
        return
    made = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance", "lm_eval.api.model")}
    made["lm_eval.api.instance"].Instance = Instance  # type: ignore[attr-defined]
    made["lm_eval.api.model"].TemplateLM = TemplateLM  # type: ignore[attr-defined]
    adapter = "telechat_twins.core.eval.adapter"
    sys.modules.update(made)
    try:
        yield Instance
    finally:
        for name in (*made, adapter):
            sys.modules.pop(name, None)
