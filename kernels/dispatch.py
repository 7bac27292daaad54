"""Selection of the implementation of each operator, with the reason; the same rule for both frameworks.

The candidate table of a framework (kernels/mindspore/ops.py, kernels/pytorch/ops.py) lists the implementations of every
operator on a device, best first, each with what prevents its use. A run can select another one by name (``kernels:`` in
its configuration). There is no silent fallback: on an accelerator, an unavailable best implementation is an error
unless the run selects another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from telechat_twins.core.config import KERNEL_OPERATORS
from telechat_twins.core.errors import UserError


class Candidate(NamedTuple):
    """An implementation of an operator; ``obstacle``: why it is unavailable here, a clause, or empty."""

    implementation: str
    obstacle: str = ""


class Choice(NamedTuple):
    """The selected implementation of an operator; ``reason``: a clause for logs."""

    operator: str
    implementation: str
    reason: str


def choose(candidates: Mapping[str, Sequence[Candidate]], wanted: Mapping[str, str], device: str) -> dict[str, Choice]:
    """The choice for each operator of ``candidates`` (best first). ``wanted``: operator -> implementation or "auto".

    Raises UserError when a selected implementation is unknown or unavailable, and when on an accelerator the best one
    is unavailable and no other was selected. On the CPU the next one is used, and the reason says so.
    """
    return {
        operator: _choose(operator, candidates[operator], wanted.get(operator, "auto"), device)
        for operator in KERNEL_OPERATORS
        if operator in candidates
    }


def _choose(operator: str, candidates: Sequence[Candidate], wanted: str, device: str) -> Choice:
    names = ", ".join(candidate.implementation for candidate in candidates)
    if wanted != "auto":
        for candidate in candidates:
            if candidate.implementation == wanted:
                if candidate.obstacle:
                    raise UserError(f"kernels.{operator}: {wanted} is unavailable on {device}: {candidate.obstacle}")
                return Choice(operator, wanted, "requested")
        raise UserError(f"kernels.{operator}: {wanted!r} is not an implementation on {device}; use one of: {names}")
    best = candidates[0]
    if not best.obstacle:
        return Choice(operator, best.implementation, f"the best on {device}")
    if device != "CPU":
        others = [c.implementation for c in candidates if not c.obstacle]
        remedy = f"; to use a slower one, set it to one of: {', '.join(others)}" if others else ""
        problem = f"{best.implementation} is unavailable on {device}: {best.obstacle}"
        raise UserError(f"kernels.{operator}: {problem}{remedy}")
    for candidate in candidates[1:]:
        if not candidate.obstacle:
            reason = f"{best.implementation} is unavailable: {best.obstacle}"
            return Choice(operator, candidate.implementation, reason)
    raise UserError(f"kernels.{operator}: no implementation is available on {device}: {best.obstacle}")


def describe(choices: Mapping[str, Choice], without_float64: Collection[str] = ()) -> list[str]:
    """One line per implementation: "cpp: rms_norm, rope (the best on CPU)".

    ``without_float64``: for a model in float64, the implementations that lack it; "composite" replaces them.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, chosen, reason in choices.values():
        if chosen in without_float64:
            chosen, reason = "composite", f"{chosen} has no float64"
        groups.setdefault((chosen, reason), []).append(name)
    return [f"{name}: {', '.join(operators)} ({reason})" for (name, reason), operators in groups.items()]
