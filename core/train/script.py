"""Command line of the twins' train.py: the run's YAML, its overrides, exit codes."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path

from telechat_twins.core.checkpoint.source import OpenInitial
from telechat_twins.core.cli import Parser
from telechat_twins.core.config import RunConfig, load_run_config, naming_lines
from telechat_twins.core.launch.worker import SelfEnded, run_script
from telechat_twins.core.launch.world import launched_world
from telechat_twins.core.train.health import TrainingStopped
from telechat_twins.core.train.loop import train
from telechat_twins.core.train.run.hooks import OpenHooks
from telechat_twins.core.train.stages import check_stages
from telechat_twins.core.train.start import init_override, model_of_run
from telechat_twins.core.train.stepper import OpenRecorder, Stepper


def parser() -> argparse.ArgumentParser:
    """The arguments of both backends' train.py."""
    made = Parser(prog="train.py", description="Train from one YAML config.")
    made.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    made.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. train.steps=100",
    )
    made.add_argument("--out", metavar="DIR", help="where everything is written (default: runs/<config's name>)")
    made.add_argument("--init", metavar="DIR", help="train.init: begin with the weights of this model")
    made.add_argument(
        "--resume", metavar="auto|DIR", help="auto: --out's latest checkpoint, if any; DIR: that checkpoint"
    )
    return made


def main(
    stepper_factory: Callable[[RunConfig], Stepper],
    argv: list[str] | None = None,
    open_initial: OpenInitial | None = None,
    open_recorder: OpenRecorder | None = None,
    open_hooks: OpenHooks | None = None,
) -> int:
    """What a backend's train.py does: parse ``argv``, train, return the exit code.

    0 done; 2 a mistake of the user's (one line); 130 or 143 interrupted, with a checkpoint (130 by a launcher, whatever
    it was sent). Training that stopped itself leaves through SystemExit with its message, which Python prints before it
    exits with 1.
    """

    def run() -> int:
        args = parser().parse_args(argv)
        out = Path(args.out or Path("runs") / Path(args.config).stem)
        overrides = [*args.set, *init_override(args.init)]
        config = load_run_config(
            args.config, overrides, lambda init: model_of_run(init, out, args.resume, open_initial)
        )
        with naming_lines(args.config, overrides):
            check_stages(config, launched_world()[1])
            try:
                result = train(stepper_factory, config, out, args.resume, open_initial, open_recorder, open_hooks)
            except TrainingStopped as stop:
                raise SelfEnded(str(stop)) from None
        if result.interrupted_by is None:
            return 0
        return 128 + (signal.SIGINT if result.relayed else result.interrupted_by)

    return run_script(run)
