"""Frozen and trainable parameters of a run (`train.freeze`).

A frozen parameter takes part in the forward pass and in checkpoints; it has no gradient, no optimizer state and no
weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.near import nearest

T = TypeVar("T")


def trainable(table: Mapping[str, T], config: RunConfig) -> dict[str, T]:
    """The entries of ``table`` (by logical name: a whole model's, or one rank's part) that the optimizer updates.

    ``train.freeze`` holds glob patterns on logical names (`*` also matches dots), e.g. ``embed.weight``,
    ``layers.[0-3].*``, ``*.bias``.
    """
    patterns = config.train.freeze
    return {name: entry for name, entry in table.items() if not is_frozen(name, patterns)}


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Whether a logical name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_freeze(names: Iterable[str], config: RunConfig) -> None:
    """UserError for a pattern that matches none of the model's ``names``, and where nothing is left to train."""
    known = list(names)
    for number, pattern in enumerate(config.train.freeze):
        if not any(fnmatchcase(name, pattern) for name in known):
            near = nearest(pattern, known)
            hint = f"did you mean '{near}'?" if near else "names are listed in docs/checkpoints.md"
            raise UserError(f"train.freeze[{number}]: '{pattern}' matches no parameter of the model; {hint}")
    if known and not trainable(dict.fromkeys(known), config):
        raise UserError("train.freeze: matches every parameter; leave at least one to train")
