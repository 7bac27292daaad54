"""The tables of best plans in docs/parallel.md, by the search of `tele plan --search`: `make plan-table`.

Without options the tables are written into the page, between their marks; with ``--print`` to the terminal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_twins.core.files import ROOT
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.planner.machine import load_machine
from telechat_twins.core.planner.search.best import search
from telechat_twins.core.planner.search.question import Plan, Question

PAGES = ROOT / "docs" / "parallel.md", ROOT / "docs" / "parallel.zh.md"
MACHINE = "atlas-800t-a2"
BEGIN, END = "<!-- plan-table {} -->", "<!-- end of plan-table -->"
# (model, sequence, published layout)
MODELS = (
    ("telechat2-7b", 8192, "dp8"),
    ("telechat2-35b", 8192, "tp4.pp4"),
    ("teleflm-52b", 4096, "tp4.pp2.dp112"),
    ("flm-101b", 2048, "tp4.pp4.dp12"),
    ("telechat2-115b", 8192, "tp8.pp8.dp8.vpp3"),
    ("teleflm-1t", 4096, "-"),
)
DEVICES = (8, 64, 512)
LONG = (("telechat2-7b", 131072), ("telechat2-7b", 1048576), ("telechat2-115b", 131072), ("telechat2-115b", 1048576))
CHINESE = {
    "model, sequence": "模型，序列",
    "published": "公开的",
    "does not fit": "放不下",
    "| model |": "| 模型 |",
    "sequence |": "序列 |",
    "best on 512 devices": "512 个设备上最佳",
    "waits for cp": "等待 cp",
    "| step |": "| 一步 |",
}
TOKENS = {8: 1 << 19, 64: 1 << 22, 512: 1 << 22}  # of a step


def best(name: str, seq_len: int, devices: int) -> Plan | None:
    """The fastest plan, if any fits."""
    model, batch = load_model_config(name), max(1, TOKENS[devices] // seq_len)
    found = search(Question(model, load_machine(MACHINE), devices, seq_len, batch, top=1))
    return found.plans[0] if found.plans else None


def cell(plan: Plan | None) -> str:
    """Layout, micro-batch, recomputation, MFU and memory of a plan."""
    if plan is None:
        return "does not fit"
    again = {"none": "", "selective": " s", "full": " f"}[plan.work.recompute]
    micro = f" x{plan.work.micro_batch}" if plan.work.micro_batch > 1 else ""
    return f"`{plan.layout.name}`{micro}{again}, {plan.time.mfu:.0%}, {plan.memory.total / 2**30:.0f} GiB"


def layouts() -> list[str]:
    """Best plans of each model on each number of devices, as Markdown."""
    lines = [
        "| model, sequence | published | " + " | ".join(map(str, DEVICES)) + " |",
        "|---|---|" + "---|" * len(DEVICES),
    ]
    for name, seq_len, published in MODELS:
        cells = [cell(best(name, seq_len, devices)) for devices in DEVICES]
        lines.append(f"| {name}, {seq_len} | {published} | " + " | ".join(cells) + " |")
    return lines


def contexts() -> list[str]:
    """Best plans of long sequences on 512 devices, as Markdown."""
    lines = ["| model | sequence | best on 512 devices | waits for cp | step |", "|---|---|---|---|---|"]
    for name, seq_len in LONG:
        plan = best(name, seq_len, 512)
        rest = (
            "- | -"
            if plan is None
            else f"{plan.time.exposed['cp'] / plan.time.seconds:.1%} | {plan.time.seconds:.3g} s"
        )
        lines.append(f"| {name} | {seq_len:,} | {cell(plan)} | {rest} |")
    return lines


def placed(page: str, table: str, lines: list[str]) -> str:
    """A page with a table between its marks."""
    head, _, rest = page.partition(BEGIN.format(table))
    _, _, tail = rest.partition(END)
    return "\n".join([head + BEGIN.format(table), *lines, END]) + tail


def translated(lines: list[str]) -> list[str]:
    """A table with its words in Chinese."""
    for word, chinese in CHINESE.items():
        lines = [line.replace(word, chinese) for line in lines]
    return lines


def main() -> int:
    """Make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="do not write the page")
    args = parser.parse_args()
    tables = {"layouts": layouts(), "contexts": contexts()}
    for name, lines in tables.items():
        print(f"{name}\n" + "\n".join(lines))
    for path in [] if args.print else PAGES:
        if Path(path).exists():
            page = path.read_text(encoding="utf-8")
            for name, lines in tables.items():
                page = placed(page, name, translated(lines) if path.name.endswith(".zh.md") else lines)
            path.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
