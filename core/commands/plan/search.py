"""`tele plan --search`: the best legal layout for training a model, or for serving it, on a number of devices."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.planner.amounts import whole

if TYPE_CHECKING:  # what a search needs is imported when there is one
    from telechat_twins.core.config import RunConfig
    from telechat_twins.core.model.config import ModelConfig
    from telechat_twins.core.planner.machine import Machine
    from telechat_twins.core.planner.search.question import Found, Question

TOKENS_A_STEP = 1 << 22  # where neither --global-batch nor a run says so
_FOUND = ("layout", "recompute", "recompute_lists", "micro_batches")
# Of one plan; a search takes attention to be fused.
_OF_ONE_PLAN = ("growth", "trace", "timeline", "tokens", "cost", "budget", "fused_attention")
_OF_TRAINING = ("global_batch", "micro_batch", "seq_len", "precision")
_OF_SERVING = ("prompt_len", "answer_len", "quantize")


def run(args: argparse.Namespace) -> int:
    """Search, and print the result; 1 when nothing fits."""
    from telechat_twins.core.commands.plan.training import model_of, named_model
    from telechat_twins.core.config import load_run_config
    from telechat_twins.core.planner.machine import load_machine
    from telechat_twins.core.planner.search import report
    from telechat_twins.core.planner.search.best import search
    from telechat_twins.core.planner.search.question import RESERVE_GIB
    from telechat_twins.core.planner.time.report import require_forecast

    machine = load_machine(args.machine)
    if args.memory is None and machine.memory.value <= RESERVE_GIB:
        raise UserError(
            f"--machine {machine.name}: memory is {machine.memory.value:g} GiB, of which communicators, kernels and "
            f"driver take {RESERVE_GIB:g}; give --memory with what a plan may use"
        )
    config = None if args.config is None else load_run_config(args.config, model_of=model_of)
    if config is not None:
        require_forecast(args.config, config.lora, config.train.freeze, config.preference)
    model = named_model(args.model) if config is None else config.model
    name = args.model or args.config
    if args.target is not None:
        return _serve(args, model, machine, name)
    question = _question(args, model, machine, config)
    shown = _Progress()
    found = search(question, shown)
    shown.end()
    if args.json:
        print(json.dumps(report.described(question, found), indent=1))
    else:
        print("\n".join(report.text(question, found, name)))
    return 0 if found.plans else 1


def _question(args: argparse.Namespace, model: ModelConfig, machine: Machine, config: RunConfig | None) -> Question:
    from telechat_twins.core.planner.search.question import Question

    seq_len = args.seq_len or (model.max_seqlen if config is None else config.data.seq_len)
    batch = args.global_batch or (max(1, TOKENS_A_STEP // seq_len) if config is None else config.train.global_batch)
    precision = args.precision or ("bf16" if config is None else config.train.precision)
    return Question(
        model,
        machine,
        args.devices,
        seq_len,
        batch,
        precision,
        args.memory,
        args.micro_batch or 16,
        1 + (10 if args.top is None else args.top),
    )


def _serve(args: argparse.Namespace, model: ModelConfig, machine: Machine, name: str) -> int:
    from telechat_twins.core.planner.search import serving

    question = serving.Serving(
        model,
        machine,
        args.devices,
        1024 if args.prompt_len is None else args.prompt_len,
        256 if args.answer_len is None else args.answer_len,
        args.target,
        args.quantize or "none",
        args.memory,
        1 + (10 if args.top is None else args.top),
    )
    plans = serving.search(question)
    found = [serving.described(plan) for plan in plans]
    print(json.dumps(found, indent=1) if args.json else "\n".join(serving.text(question, plans, name)))
    return 0 if plans else 1


class _Progress:
    """A line on a terminal that counts simulated plans, and names the best so far."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def __call__(self, found: Found) -> None:
        if self.shown and found.plans:
            best = found.plans[0]
            counts = f"{found.considered:,} plans, {found.timed:,} simulated"
            line = f"{counts}; best {best.layout.name}, {best.time.seconds:.4g} s"
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Remove the line."""
        if self.shown:
            print(f"\r{'':<100}\r", end="", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the search."""
    parser.add_argument(
        "--search", action="store_true", help="find the best layout for --devices of --machine: docs/parallel.md"
    )
    parser.add_argument("--devices", type=whole, metavar="N", help="with --search: devices to use at most")
    parser.add_argument(
        "--global-batch",
        type=whole,
        metavar="B",
        help="sequences a step (default: the run's; with --search of a model 4 Mi tokens; else as --micro-batches)",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="with --search: memory of a device (default: the machine's less 4)"
    )
    parser.add_argument("--top", type=whole, metavar="N", help="with --search: further plans to explain (default 10)")
    parser.add_argument(
        "--target", choices=("latency", "throughput"), help="with --search: serve instead of train, for this target"
    )
    parser.add_argument("--prompt-len", type=whole, metavar="P", help="with --target: tokens of a prompt (1024)")
    parser.add_argument("--answer-len", type=whole, metavar="A", help="with --target: tokens of an answer (256)")
    parser.add_argument("--quantize", choices=("none", "int8"), help="with --target: weights (default none: bf16)")


def _flag(name: str) -> str:
    """An option as it is written, from its name in the parsed arguments."""
    return f"--{name.replace('_', '-')}"


def check(args: argparse.Namespace) -> None:
    """UserError for options that need another, and for values out of range."""
    if args.global_batch is not None and not args.search:
        other = next((name for name in ("growth", "micro_batches") if getattr(args, name) is not None), None)
        if other is not None:
            raise UserError(f"--global-batch: {_flag(other)} says how many there are; leave one of them out")
    for name in ("devices", "memory", "top", "target"):
        if getattr(args, name) is not None and not args.search:
            raise UserError(f"{_flag(name)}: belongs to --search; add it, or leave it out")
    for name in _OF_SERVING if args.target is None else ():
        if getattr(args, name) is not None:
            raise UserError(
                f"{_flag(name)}: belongs to --search --target, which serves; add it, or leave {_flag(name)} out"
            )
    if not args.search:
        return
    for name in ("machine", "devices"):
        if getattr(args, name) is None:
            raise UserError(f"--search: needs --{name}, e.g. --machine atlas-800t-a2 --devices 512")
    if args.model is None and args.config is None:
        raise UserError("--search: needs --model or --config")
    for name in _FOUND:
        if getattr(args, name) is not None:
            raise UserError(f"{_flag(name)}: cannot be combined with --search, which finds it; leave it out")
    for name in _OF_ONE_PLAN:
        if getattr(args, name) not in (None, False):
            raise UserError(f"{_flag(name)}: is for a plan without --search; leave one of them out")
    for name in _OF_TRAINING if args.target is not None else ():
        if getattr(args, name) is not None:
            raise UserError(f"{_flag(name)}: is of training, and has no meaning with --target; leave it out")
    for name, most in (
        ("devices", 1 << 16),
        ("global_batch", 1 << 20),
        ("prompt_len", 1 << 24),
        ("answer_len", 1 << 24),
    ):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{_flag(name)}: must be from 1 to {most}, found {value}")
    if args.top is not None and not 0 <= args.top <= 100:
        raise UserError(f"--top: must be from 0 to 100, found {args.top}")
    if args.memory is not None and not 0.0 < args.memory < 1e6:
        raise UserError(f"--memory: must be above 0 and below 1e6 GiB, found {args.memory:g}")
