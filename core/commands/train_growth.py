"""`tele train --growth`: trains the stages of a growth schedule one after another, with growth between them.

In the run's folder, stage N has a run folder of its own, ``N-name``, and the grown checkpoint that it starts from,
``N-grown``. Beside them are metrics.jsonl and loss.png of the whole run, and report.md and report.json, which are
rewritten after every stage. The state is derived from these files, so a run that was stopped at any moment continues
with --resume auto.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from telechat_twins.core.checkpoint.retention import latest_save, saved_step
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.launch.run_lock import NAME, RELEASE_WAIT_S, hold_folder, require_free
from telechat_twins.core.train.metrics import Row, plot_losses, read_metrics, row_lines
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.convert.growth.schedule import Stage

_WAIT_S = 2.0  # between two checks for node 0's grown checkpoint
_SHOWN = 20  # steps over which a loss in the report is averaged: single batches scatter more than growth changes it


def run(args: argparse.Namespace) -> int:
    """Train all unfinished stages. Returns 0, or the launcher's code of the first that fails or is interrupted."""
    from telechat_twins.convert.growth.schedule import load_schedule
    from telechat_twins.core.data.blend import open_blend
    from telechat_twins.core.launch.command import check_nodes
    from telechat_twins.core.parallel.layout import check_layout
    from telechat_twins.core.train.start import init_override

    if args.layout is not None or args.nproc is not None:
        option = "--layout" if args.layout is not None else "--nproc"
        raise UserError(
            f"{option}: cannot be combined with --growth, whose stages have layouts of their own; set `parallel:` in "
            f"{args.growth}"
        )
    if args.resume not in (None, "auto"):
        raise UserError("--resume: must be 'auto' with --growth, which continues the run in --out")
    check_nodes(1, args.nnodes, args.node_rank, args.master)
    stages = load_schedule(args.growth, args.config, [*args.set, *init_override(args.init)])
    for stage in stages:
        config = stage.config
        check_layout(
            config.parallel,
            config.model,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            seq_len=config.data.seq_len,
        )
        if config.parallel.world % args.nnodes:
            raise UserError(
                f"--nnodes: must divide the {config.parallel.world} ranks of stage '{stage.name}', found {args.nnodes}"
                "; give another number of machines"
            )
    first = stages[0].config
    open_blend(first.data, first.train.seed, first.model.num_tokens, first.model.filler_id)
    out = Path(args.out or Path("runs") / f"{Path(args.growth).stem}-{args.backend}")
    what, name = f"--out {out}", f"{NAME}-node{args.node_rank}" if args.node_rank else NAME
    require_free(out, what, name)
    held = any(not entry.name.startswith(NAME) for entry in out.iterdir()) if out.is_dir() else out.exists()
    if args.resume is None and held:
        raise UserError(f"{what}: already has a run; give another folder, or --resume auto to continue it")
    with hold_folder(out, what, name):
        return _run(stages, out, args)


def _run(stages: Sequence[Stage], out: Path, args: argparse.Namespace) -> int:
    for number in range(1, len(stages) + 1):
        code = _train(stages, number, out, args)
        if args.node_rank == 0:
            _tell(stages[:number], out, args.backend, whole=number == len(stages))
        if code:
            return code
    return 0


def folders(out: Path, number: int, stage: Stage) -> tuple[Path, Path]:
    """(run folder of the stage, grown checkpoint that it starts from)."""
    return out / f"{number}-{stage.name}", out / f"{number}-grown"


def _train(stages: Sequence[Stage], number: int, out: Path, args: argparse.Namespace) -> int:
    """Train stage ``number`` from its start or its last checkpoint; the launcher's exit code."""
    from telechat_twins.core.launch.command import node_logs
    from telechat_twins.core.launch.launcher import COLLECTIVE_TIMEOUT_S, launch
    from telechat_twins.core.launch.restarts import launch_with_restarts
    from telechat_twins.core.launch.worker import STOPPED

    stage = stages[number - 1]
    run, grown = folders(out, number, stage)
    if saved_step(run) >= stage.end:
        # Nothing opens this stage again, so the lock files that a killed launch left in it are taken away here.
        for folder in (node_logs(run / "logs", args.node_rank), *([] if args.node_rank else [run])):
            require_free(folder, f"--out {out}", patience=RELEASE_WAIT_S)
        return 0
    if stage.plan is not None and not (grown / "manifest.json").is_file():
        _grow(stage, folders(out, number - 1, stages[number - 2])[0], grown, args.node_rank)
    tree = stage.config.to_dict()
    if stage.plan is not None:
        tree["model"] = {"preset": str((grown / "assets" / "model.yaml").resolve())}
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", yaml.safe_dump(tree, sort_keys=False))
    begun = (run / "latest").exists()
    print(
        f"\n== stage {number}, {stage.name}: steps {stage.begin + 1} to {stage.end}, {stage.config.parallel.name}",
        flush=True,
    )
    logs = run / "logs"

    def start(resume: str | None) -> int:
        return launch(
            args.backend,
            ["--config", str(run / "config.yaml"), "--out", str(run), "--resume", resume or "auto"],
            stage.config.parallel.world // args.nnodes,
            logs,
            nnodes=args.nnodes,
            node_rank=args.node_rank,
            master=args.master,
            collective_timeout=COLLECTIVE_TIMEOUT_S if args.timeout is None else args.timeout,
            stopped=STOPPED,
        )

    return launch_with_restarts(
        start,
        args.restarts,
        "auto" if begun or stage.plan is None else str(grown),
        node_logs(logs, args.node_rank),
        lambda: latest_save(run),
    )


def _grow(stage: Stage, before: Path, grown: Path, node_rank: int) -> None:
    """Create the checkpoint that a stage starts from, on node 0; other nodes wait for it."""
    from telechat_twins.convert.growth.files import grow_checkpoint, grown_bytes, plan_checkpoint
    from telechat_twins.convert.growth.report import describe
    from telechat_twins.core.checkpoint.read import open_checkpoint

    if node_rank:
        print(f"waiting for node 0 to grow {before} into {grown}", flush=True)
        while not (grown / "manifest.json").is_file():
            time.sleep(_WAIT_S)
        return
    assert stage.plan is not None
    checkpoint = open_checkpoint(before, verify=False)
    plan = plan_checkpoint(checkpoint, stage.target, stage.plan.options)
    print(f"\n== growing {checkpoint.path} into {grown}\n{describe(plan)}", flush=True)
    started = time.monotonic()
    grow_checkpoint(checkpoint, grown, plan)
    print(f"{sum(grown_bytes(checkpoint, plan)) / 1e6:.1f} MB in {time.monotonic() - started:.1f} s", flush=True)


def _tell(stages: Sequence[Stage], out: Path, backend: str, whole: bool) -> None:
    """Write metrics, plot and reports of the whole run as far as it has come."""
    rows: list[list[Row]] = []
    for number, stage in enumerate(stages, 1):
        run, _ = folders(out, number, stage)
        rows.append(read_metrics(run) if (run / "metrics.jsonl").exists() else [])
    joined = [row for part in rows for row in part]
    if not joined:
        return
    write_text(out / "metrics.jsonl", "".join(row_lines(row).decode() for row in joined))
    marks = {stage.begin: f"{stage.name}\n {stage.parameters / 1e6:.3g} M" for stage in stages}
    plot_losses({out.name: joined}, out / "loss.png", f"Growth: {out.name}", marks)
    report = summary(stages, rows)
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "report.md", to_markdown(report, backend))
    if whole:
        print(f"\n{to_markdown(report, backend)}\nreport {out / 'report.md'}, plot {out / 'loss.png'}")


def summary(stages: Sequence[Stage], rows: Sequence[Sequence[Row]]) -> JsonObject:
    """The stages as trained, and the cost of training the last size on all tokens.

    Times are measured: the sum of all steps, and for the last size the median time of its own steps without masks,
    applied to all tokens.
    """
    from telechat_twins.convert.growth.schedule import cost

    trained = []
    for stage, part in zip(stages, rows, strict=True):
        plain = [row["step_ms"] for row in part if "mask" not in row] or [row["step_ms"] for row in part]
        trained.append(
            {
                "name": stage.name,
                "parameters": stage.parameters,
                "layout": stage.config.parallel.name,
                "steps": [stage.begin, stage.end],
                "tokens": stage.tokens,
                "flops": 6.0 * stage.parameters * stage.tokens,
                "seconds": sum(row["step_ms"] for row in part) / 1000,
                "step_ms": statistics.median(plain) if plain else None,
                "first_loss": _mean_loss(part[:_SHOWN]),
                "last_loss": _mean_loss(part[-_SHOWN:]),
            }
        )
    arithmetic = cost(stages)
    last = stages[-1]
    step_ms = trained[-1]["step_ms"]
    seconds_per_token = step_ms / 1000 / (last.tokens / (last.end - last.begin)) if step_ms else None
    tokens = sum(stage.tokens for stage in stages)
    return {
        "stages": trained,
        "flops": arithmetic.by_parameters,
        "flops_from_scratch": arithmetic.scratch_by_parameters,
        "flops_saved": arithmetic.saved,
        "products_saved": 1.0 - arithmetic.by_products / arithmetic.scratch_by_products,
        "seconds": sum(stage["seconds"] for stage in trained),
        "seconds_from_scratch": seconds_per_token * tokens if seconds_per_token else None,
    }


def _mean_loss(rows: Sequence[Row]) -> float | None:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    return statistics.fmean(losses) if losses else None


def to_markdown(report: JsonObject, backend: str) -> str:
    """Markdown report of the whole run."""
    titles = {"ms": "MindSpore", "pt": "PyTorch"}
    lines = [
        f"# Growth with {titles[backend]}",
        "",
        f"| stage | parameters | layout | steps | tokens | FLOPs | seconds | loss: first {_SHOWN} | last {_SHOWN} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in report["stages"]:
        losses = [f"{stage[k]:.4f}" if stage[k] is not None else "-" for k in ("first_loss", "last_loss")]
        cells = [
            stage["name"],
            f"{stage['parameters']:,}",
            stage["layout"],
            f"{stage['steps'][0] + 1} to {stage['steps'][1]}",
            f"{stage['tokens']:,}",
            f"{stage['flops']:.3g}",
            f"{stage['seconds']:.0f}",
            *losses,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    scratch = report["seconds_from_scratch"]
    lines += [
        "",
        f"FLOPs by 6 x parameters x tokens, as the FLM-101B paper counts: {report['flops']:.4g} here, "
        f"{report['flops_from_scratch']:.4g} for the last size on all tokens: {report['flops_saved']:.1%} saved. "
        f"Counting matrix products only, attention included: {report['products_saved']:.1%}.",
    ]
    if scratch:
        lines.append(
            f"Time of steps: {report['seconds']:.0f} s here; the last size would take {scratch:.0f} s for all tokens "
            f"at its own speed: {1 - report['seconds'] / scratch:.1%} saved."
        )
    return "\n".join(lines) + "\n"
