"""The first quantity of two records that is beyond its budget, in execution order, and the operators that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from telechat_twins.core.parity.locate.budget import Budget, Excess
from telechat_twins.core.parity.locate.walk import Check, Suspect, checks
from telechat_twins.core.parity.record.format import Record, quantity_key
from telechat_twins.core.parity.record.sites import Site

GRADIENT_SUM = "gradient_sum"
SAME = 1e-3  # relative
MOST = 0.5  # share of the gradients beyond which their sum is the first suspect


@dataclass(frozen=True)
class Found:
    """The first quantity beyond its budget. ``looked_at``: quantities within their budget before it; ``largest`` of
    their errors over their limits."""

    check: Check
    excess: Excess
    looked_at: int
    largest: float

    @property
    def suspect(self) -> Suspect:
        return self.check.suspects[0]

    @property
    def side(self) -> str:
        """A or B; "A or B" where both, or where no float64 record says which."""
        return self.excess.sides[0] if self.excess.sides in (["A"], ["B"]) else "A or B"


@dataclass(frozen=True)
class Walk:
    """The result of looking at every quantity. ``found``: None when all are within their budgets. ``missing``: keys
    that only one of the two records has."""

    found: Found | None
    looked_at: int
    largest: float
    missing: list[str]


def locate(a: Record, b: Record, reference: Record | None, sites: Sequence[Site], num_layers: int) -> Walk:
    """Walk two records of the same batch and weights until a quantity is beyond its budget."""
    budget = Budget(a, b, reference, num_layers)
    steps = sorted(set(a.header.steps) & set(b.header.steps))
    missing = sorted(key for key in a.quantities.keys() ^ b.quantities.keys() if int(key.rpartition("@")[2]) in steps)
    looked_at, largest = 0, 0.0
    for check in checks(sites, _parameters(a), steps):
        excess = budget.judge(check.kind, check.name, check.step)
        if excess is None:
            continue
        if excess.sides:
            check = _reordered(_widened(check, budget, sites, a), budget, sites)
            return Walk(Found(check, excess, looked_at, largest), looked_at, largest, missing)
        looked_at, largest = looked_at + 1, max(largest, excess.margin)
    return Walk(None, looked_at, largest, missing)


def _widened(check: Check, budget: Budget, sites: Sequence[Site], record: Record) -> Check:
    """The check with what is common to all gradients as the first suspect, where most of them are beyond their budgets
    although every gradient of an activation is within its own: the sum over micro-batches and ranks."""
    if check.kind != "gradient":
        return check
    beyond = dict[str, list[bool]]()
    for other in checks(sites, _parameters(record), [check.step]):
        if other.kind in ("gradient", "activation_grad"):
            excess = budget.judge(other.kind, other.name, other.step)
            if excess is not None:
                beyond.setdefault(other.kind, []).append(bool(excess.sides))
    gradients = beyond["gradient"]
    if any(beyond.get("activation_grad", ())) or sum(gradients) <= len(gradients) * MOST:
        return check
    return replace(check, suspects=(Suspect(GRADIENT_SUM, check.name, check.suspects[0].direction), *check.suspects))


def _reordered(check: Check, budget: Budget, sites: Sequence[Site]) -> Check:
    """The check with a sum as the first suspect, where what a gradient lacks, or has too much, is what the sum passes
    on: the sums of their elements are equal to a thousandth."""
    branches = {site.name: site.inputs[1] for site in sites if site.operator == "add"}
    if check.kind != "activation_grad" or len(check.suspects) < 2:
        return check
    key = check.key
    exact = (budget.reference or budget.sides["B"]).quantities.get(key)
    for suspect in (one for one in check.suspects if one.site in branches):
        for record in budget.sides.values():
            found = record.quantities.get(key)
            passed = record.quantities.get(quantity_key("activation_grad", branches[suspect.site], check.step))
            if found is None or passed is None or exact is None or not passed.sum:
                continue
            if min(abs((found.sum - exact.sum) / passed.sum - times) for times in (-1.0, 1.0)) < SAME:
                return replace(check, suspects=(suspect, *(one for one in check.suspects if one != suspect)))
    return check


def _parameters(record: Record) -> list[str]:
    kinds = ("weight_before", "gradient", "weight_after", "moment1", "moment2")
    return list(dict.fromkeys(q.name for q in record.quantities.values() if q.kind in kinds))
