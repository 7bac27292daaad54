"""``tele parity envelope``: how far an equal device's loss and gradient norm may drift in a run, step by step."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from telechat_twins.core.config import RunConfig, load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file


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
    config = _shortened(load_run_config(args.config, args.set, lambda init: open_initial(init).config), args.steps)
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
