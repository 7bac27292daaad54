"""A growth plan in words: sizes before and after, where new blocks come from, notes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from telechat_twins.core.model.growth import SIZES
from telechat_twins.core.shown import message_line

if TYPE_CHECKING:
    from telechat_twins.convert.growth.plan import GrowthPlan


def describe(plan: GrowthPlan) -> str:
    """Sizes before and after, where new blocks come from, and what the user may not expect."""
    from telechat_twins.core.model.params import count_parameters

    old, new = plan.source, plan.config
    rows = [(name, getattr(old, name), getattr(new, name)) for name in SIZES]
    before, after = count_parameters(old), count_parameters(new)
    rows.append(("parameters", before, after))
    width = max(len(f"{value:,}") for row in rows for value in row[1:])
    lines = [f"{'':<16}{'before':>{width}}  {'after':>{width}}"]
    lines += [f"{name:<16}{a:>{width},}  {b:>{width},}{'' if a == b else f'  x {b / a:.4g}'}" for name, a, b in rows]
    growth = plan.growth
    if growth.new_layers:
        lines.append(f"blocks          {_blocks(growth.layers, growth.new_layers)}")
    kind = f"masked, c from 0 to 1 in {plan.options.anneal_steps} steps" if growth.method == "masked" else "zero"
    lines.append(f"method          {kind}")
    lines += [f"note: {message_line(note)}" for note in plan.notes]
    return "\n".join(lines)


def _blocks(layers: tuple[int, ...], new: tuple[int, ...]) -> str:
    """``0 0+ 1 1+ 2 *``: old blocks by number, copies with a plus, fresh ones as a star."""
    shown = [("*" if i < 0 else f"{i}+") if n in new else str(i) for n, i in enumerate(layers)]
    if len(shown) > 24:
        shown = [*shown[:12], "...", *shown[-11:]]
    return " ".join(shown) + "  (+ copy, * fresh)"
