"""``tele parity envelope``: how far an equal device's loss and gradient norm may drift in a run, step by step."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig, load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file

DESCRIPTION = """\
Train a run once as it is and K times with rounding noise in every operator's output, and write the band in which an
equal device's loss and gradient norm stay, step by step. Training magnifies rounding; how much depends on the recipe
and on the step, so a fixed limit is too wide early and too narrow late. All runs are made on one device, in this
process, one after another. `tele parity compare --envelope FILE` judges long traces by it.
"""
EXAMPLES = """\
examples:
  tele parity envelope --config F --backend pt --steps 300 --out envelope.json
  tele parity envelope --config F --backend ms --runs 12 --set train.precision=bf16 --out envelope.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity envelope``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config", required=True, metavar="F", help="YAML file of a training run, or the name of a bundled one"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. train.precision=bf16"
    )
    parser.add_argument(
        "--backend", required=True, choices=sorted(backends.BACKENDS), help="ms: MindSpore, pt: PyTorch"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="only the first N steps, on the whole run's schedule (train.steps)"
    )
    parser.add_argument("--runs", type=int, default=8, metavar="K", help="noisy runs, 2 to 100 (8)")
    parser.add_argument("--noise-seed", type=int, default=1, metavar="S", help="of the first noisy run's noise (1)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the envelope, JSON; FILE.png shows it")


def run(args: argparse.Namespace) -> int:
    """Measure, write the file and its plot, print the widest limits."""
    from telechat_twins.convert.initial import open_initial
    from telechat_twins.core.parity.envelope import measure, write_envelope
    from telechat_twins.core.parity.envelope_plot import plot_envelope

    if not 2 <= args.runs <= 100:
        raise UserError(f"--runs: must be from 2 to 100, found {args.runs}")
    if not 0 <= args.noise_seed < 2**32:
        raise UserError(f"--noise-seed: must be from 0 to {2**32 - 1}, found {args.noise_seed}")
    writable_file(args.out, "--out")
    config = _shortened(load_run_config(args.config, args.set), args.steps)
    envelope = measure(args.backend, config, args.runs, args.noise_seed, open_initial, print)
    out = Path(args.out)
    write_envelope(envelope, out)
    picture = plot_envelope(envelope, {}, out.with_name(out.name + ".png"))
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        limits = envelope.limits[key]
        print(f"{name}: within {limits[0]:.1e} at step {envelope.steps[0]}, {max(limits):.1e} at the widest")
    print(f"envelope: {out}; plot: {picture}")
    return 0


def _shortened(config: RunConfig, steps: int | None) -> RunConfig:
    """The run's first ``steps`` steps, on the schedule of the whole run."""
    if steps is None:
        return config
    whole = config.train.steps
    if steps < 1 or (whole and steps > whole):
        raise UserError(f"--steps: must be from 1 to the run's train.steps {whole or ''}, found {steps}")
    schedule = config.train.schedule_steps or whole or None
    return replace(config, train=replace(config.train, steps=steps, epochs=None, schedule_steps=schedule))
