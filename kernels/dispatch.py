"""Which implementation serves each operator, and why: one rule for both frameworks.

A framework's table (kernels/mindspore/ops.py, kernels/pytorch/ops.py) lists for every operator what could serve it on
the device at hand, best first, and what stands in the way of each. A run may ask for another by name (``kernels:`` of
a run configuration). Nothing falls back in silence: on an accelerator an operator whose own implementation is missing
is an error, unless the run asked for the other one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from telechat_twins.core.config import KERNEL_OPERATORS
from telechat_twins.core.errors import UserError


class Candidate(NamedTuple):
    """``implementation`` could serve; ``obstacle`` says in a clause why it cannot here, or is empty."""

    implementation: str
    obstacle: str = ""


class Choice(NamedTuple):
    operator: str
    implementation: str
    reason: str


def choose(candidates: Mapping[str, Sequence[Candidate]], wanted: Mapping[str, str], device: str) -> dict[str, Choice]:
    """The choice for each operator of ``candidates`` (best first). ``wanted``: operator -> implementation or "auto".

    Raises UserError when a wanted implementation is not there or cannot serve, and when on an accelerator the best one
    cannot and nothing else was asked for. On the CPU the next one serves, and the reason says so.
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
                    raise UserError(f"kernels.{operator}: {wanted} cannot serve on {device}: {candidate.obstacle}")
                return Choice(operator, wanted, "asked for")
        raise UserError(f"kernels.{operator}: {wanted!r} does not exist on {device}; there: {names}")
    best = candidates[0]
    if not best.obstacle:
        return Choice(operator, best.implementation, f"the best on {device}")
    if device != "CPU":
        others = [c.implementation for c in candidates if not c.obstacle]
        way_out = f"; to go on with a slower one, set it to one of: {', '.join(others)}" if others else ""
        raise UserError(f"kernels.{operator}: {best.implementation} cannot serve on {device}: {best.obstacle}{way_out}")
    for candidate in candidates[1:]:
        if not candidate.obstacle:
            return Choice(operator, candidate.implementation, f"{best.implementation} cannot: {best.obstacle}")
    raise UserError(f"kernels.{operator}: nothing can serve on {device}: {best.obstacle}")


def describe(choices: Mapping[str, Choice], without_float64: Collection[str] = ()) -> list[str]:
    """One line an implementation: "cpp: rms_norm, rope (the best on CPU)".

    ``without_float64``: of a model in float64, the implementations that have no such operators; "composite" serves.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, chosen, reason in choices.values():
        if chosen in without_float64:
            chosen, reason = "composite", f"{chosen} has no float64"
        groups.setdefault((chosen, reason), []).append(name)
    return [f"{name}: {', '.join(operators)} ({reason})" for (name, reason), operators in groups.items()]
