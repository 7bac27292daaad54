"""`python -m tests.size_report`: lines of each source file beside its budget, which is a guideline."""

from __future__ import annotations

from tests.house import ROOT, sizes


def report(rows: list[tuple[str, int, int]], shown: int = 15) -> str:
    """The fullest files as a table, a mark on those over budget, and the totals by folder."""
    width = max((len(where) for where, _, _ in rows[:shown]), default=4)
    lines = ["size budget: model 399 lines, parallel strategy 300, any other file 500, a test 700"]
    for place, (where, count, budget) in enumerate(rows):
        if place < shown or count > budget:
            lines.append(f"  {where:<{width}} {count:>5} / {budget}{'  OVER' if count > budget else ''}")
    totals: dict[str, int] = {}
    for where, count, _ in rows:
        top = where.partition("/")[0]
        totals[top] = totals.get(top, 0) + count
    lines.append("  " + ", ".join(f"{top} {count:,}" for top, count in sorted(totals.items())))
    over = sum(count > budget for _, count, budget in rows)
    lines.append(f"  {len(rows)} files, {sum(c for _, c, _ in rows):,} lines, {over} over budget")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(sizes(ROOT)))
