"""Collective decisions of the training ranks: either all continue, or all raise the same error.

Independent of the framework: ranks exchange numbers through ``agree`` only, whose result is the same on all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

T = TypeVar("T")


class Agreeing(Protocol):
    """The part of core.train.stepper.Stepper that a collective decision needs."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def agree(self, values: list[float], op: str) -> list[float]: ...


def meet(stepper: Agreeing) -> None:
    """A barrier: returns when every rank has called it."""
    stepper.agree([0.0], "max")


def run_on_all(stepper: Agreeing, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank. A UserError on one rank is raised on all, so that all exit with the same message.

    Every path makes the same collective calls: a rank whose action succeeded must still take part in the exchange of
    errors, or a failed rank would wait for it until the timeout.
    """
    try:
        result = action()
    except UserError as error:
        if stepper.world == 1:
            raise
        raise_on_all(stepper, str(error))
        raise
    raise_on_all(stepper, None)
    return result


def raise_on_all(stepper: Agreeing, problem: str | None) -> None:
    """UserError on every rank if any has a ``problem``: the problem of the lowest such rank, broadcast as numbers."""
    world = stepper.world
    # The lowest rank with a problem; ``world`` stands for none. The result is the same on all ranks, so either all
    # return here or all make the calls below.
    speaker = int(stepper.agree([float(world if problem is None else stepper.rank)], "min")[0])
    if speaker == world:
        return
    # A broadcast by sums: every rank but the speaker contributes zeros, so the sum is the speaker's bytes.
    text = (problem or "").encode() if stepper.rank == speaker else b""
    (length,) = stepper.agree([float(len(text))], "max")
    codes = stepper.agree([float(byte) for byte in text.ljust(int(length), b"\0")], "sum")
    raise UserError(bytes(int(code) for code in codes).decode(errors="replace"))


def require_same_on_all(stepper: Agreeing, facts: JsonObject) -> None:
    """UserError on every rank, naming the options and the ranks, unless ``facts`` are equal on all ranks."""
    leaves = dict(_leaves(facts))
    # 1. Compare one digest of everything: it is equal on all ranks exactly if its minimum is its maximum. In the usual
    #    case the check ends here, after two exchanges of nine numbers.
    whole = [float(len(leaves)), *_words(json.dumps(leaves))]
    if stepper.agree(whole, "min") == stepper.agree(whole, "max"):
        return
    # 2. Find the options that differ, by a digest of each. Ranks with different numbers of options (different versions
    #    of this program) could not exchange lists of equal length, so then no option is named.
    names: list[str] = []
    if stepper.agree(whole[:1], "min") == stepper.agree(whole[:1], "max"):
        each = [_words(f"{name}={value}")[0] for name, value in leaves.items()]
        low, high = stepper.agree(each, "min"), stepper.agree(each, "max")
        names = [name for name, a, b in zip(leaves, low, high, strict=True) if a != b]
    # 3. Find the ranks that differ from rank 0: broadcast its digest (by a sum), then gather one flag from each rank.
    reference = stepper.agree(whole if stepper.rank == 0 else [0.0] * len(whole), "sum")
    mine = [float(rank == stepper.rank and whole != reference) for rank in range(stepper.world)]
    others = [str(rank) for rank, differs in enumerate(stepper.agree(mine, "sum")) if differs]
    what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise UserError(
        f"{what or 'config'}: not the same on all ranks: {'rank' if len(others) == 1 else 'ranks'} {', '.join(others)} "
        "differ from rank 0; start every rank with the same config and options"
    )


def _leaves(tree: JsonObject, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from _leaves(tree[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(tree[key])


def _words(text: str) -> list[float]:
    """SHA-256 of ``text`` as numbers of 32 bits, which float64 carries exactly."""
    digest = hashlib.sha256(text.encode()).digest()
    return [float(int.from_bytes(digest[i : i + 4])) for i in range(0, len(digest), 4)]
