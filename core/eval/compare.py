"""Comparison of two evaluations item by item: log-likelihoods, choices and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

SHOWN = 20  # flips and different texts that are listed for a task
# How far a backend's float32 log-likelihood may be from exact arithmetic, in nats and as a share of its size
# (docs/evaluation.md, "How exact").
ROUNDING, RELATIVE_ROUNDING = 1e-5, 1e-6
SETTLED = "--precision fp64 (with another --out) tells which choice exact arithmetic makes"


def compare_items(first: Sequence[JsonObject], second: Sequence[JsonObject]) -> JsonObject:
    """By task: number of items, largest and mean difference of log-likelihoods, flipped choices with the margin by
    which each side chose and how many rounding does not explain, different texts, and items of which a metric differs.

    UserError where the two did not evaluate the same items.
    """
    left, right = _by_item(first), _by_item(second)
    if left.keys() != right.keys():
        apart = sorted(left.keys() ^ right.keys())[0]
        raise UserError(f"the two evaluations have different items, e.g. {apart[0]} item {apart[1]}; repeat both")
    tasks: dict[str, JsonObject] = {}
    for key, row in left.items():
        entry = tasks.setdefault(row["task"], _empty())
        _add(entry, row, right[key])
    for entry in tasks.values():
        apart = entry.pop("differences")
        entry["likelihoods"] = len(apart)
        entry["largest_difference"] = max(apart, default=None)
        entry["mean_difference"] = float(np.mean(apart)) if apart else None
    return tasks


def _empty() -> JsonObject:
    counts = dict.fromkeys(("items", "flipped", "beyond_rounding", "different_texts", "metrics"), 0)
    return {**counts, "differences": [], "flips": [], "texts": []}


def _by_item(rows: Sequence[JsonObject]) -> dict[tuple[str, int, str, str], JsonObject]:
    return {(row["task"], row["item"], row["filter"], row["hash"]): row for row in rows}


def _add(entry: JsonObject, left: JsonObject, right: JsonObject) -> None:
    entry["items"] += 1
    entry["metrics"] += left["metrics"] != right["metrics"]
    sides = [[_likelihood(answer) for answer in row["answers"]] for row in (left, right)]
    ours, theirs = ([value for value in side if value is not None] for side in sides)
    if len(ours) == len(left["answers"]):
        entry["differences"] += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        if len(ours) > 1 and int(np.argmax(ours)) != int(np.argmax(theirs)):
            entry["flipped"] += 1
            entry["beyond_rounding"] += not by_rounding(ours, theirs)
            flip = {"item": left["item"], "choices": [int(np.argmax(ours)), int(np.argmax(theirs))]}
            flip |= {"margins": [margin(ours), margin(theirs)], "by_rounding": by_rounding(ours, theirs)}
            _listed(entry["flips"], flip)
    elif left["answers"] != right["answers"]:
        entry["different_texts"] += 1
        _listed(entry["texts"], {"item": left["item"], "answers": [left["answers"], right["answers"]]})


def is_close(answers: Sequence[object]) -> bool:
    """Whether two choices of an item are ahead of all others and apart by less than float32's rounding of both, but not
    equal: what is read twice is equal in any precision."""
    values = [value for answer in answers if (value := _likelihood(answer)) is not None]
    if len(values) < 2 or len(values) < len(answers):
        return False
    first, second = sorted(values)[:-3:-1]
    return 0 < first - second <= sum(max(ROUNDING, RELATIVE_ROUNDING * abs(x)) for x in (first, second))


def _listed(found: list[JsonObject], entry: JsonObject) -> None:
    if len(found) < SHOWN:
        found.append(entry)


def margin(values: Sequence[float]) -> float:
    """The largest minus the second largest: by how much a choice was ahead."""
    ordered = sorted(values)
    return ordered[-1] - ordered[-2]


def by_rounding(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether float32's rounding explains a flip from choice a to b: what both sides together are ahead by, (ours[a] -
    ours[b]) + (theirs[b] - theirs[a]), consists of four log-likelihoods' distances from exact arithmetic."""
    a, b = int(np.argmax(ours)), int(np.argmax(theirs))
    four = (ours[a], ours[b], theirs[a], theirs[b])
    return four[0] - four[1] + four[3] - four[2] <= sum(max(ROUNDING, RELATIVE_ROUNDING * abs(x)) for x in four)


def _likelihood(answer: object) -> float | None:
    """The log-likelihood in an answer: [log-likelihood, greedy], or a number; None in a text."""
    if isinstance(answer, list) and answer and isinstance(answer[0], (int, float)):
        return float(answer[0])
    return float(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else None


def lines(names: tuple[str, str], tasks: Mapping[str, JsonObject], precision: str = "fp64") -> list[str]:
    """The lines of the console. ``precision``: of both evaluations."""
    found = [f"{' against '.join(names)}, item by item:"]
    for name, entry in tasks.items():
        parts = [f"{entry['items']} items"]
        if entry["likelihoods"]:
            parts.append(f"log-likelihoods differ by at most {entry['largest_difference']:.2e}")
            more = f", {entry['beyond_rounding']} of them by more than float32 rounds" if entry["flipped"] else ""
            parts.append(f"{entry['flipped']} choices flipped{more}")
        if entry["different_texts"] or not entry["likelihoods"]:
            parts.append(f"{entry['different_texts']} different texts")
        found.append(f"  {name}: " + ", ".join(parts))
        for flip in entry["flips"]:
            found.append(
                f"    item {flip['item']}: choice {flip['choices'][0]} by {flip['margins'][0]:.2e}, "
                f"{flip['choices'][1]} by {flip['margins'][1]:.2e}"
            )
    if precision != "fp64" and any(entry["flipped"] for entry in tasks.values()):
        found.append(f"  {SETTLED}")
    return found
