"""Loss at a change of training length, with and without NTK scaling of the rotary base and attention scaling.

    python -m tests.campaigns.length_stages --out build/length-stages

One run of telechat2-tiny in PyTorch, on the demo's texts: rows of 128 tokens, then of 512 (`train.stages`). The
variants resume at the switch with that run's weights, optimizer and data, and parts of the length rule switched off.
Writes length-stages.png and prints how far each variant's loss lies above that run's, on the same batches.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from telechat_twins.core import backends
from telechat_twins.core.commands.demo import prepare
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model import position
from telechat_twins.core.train import loop
from telechat_twins.core.train.metrics import Row, read_metrics

SHORT, LONG = 128, 512
NO_NTK: tuple[str, Callable[..., float]] = ("scaled_base", lambda config, seq_len: config.rope_theta)
NO_SCALE: tuple[str, Callable[..., float]] = ("attention_scale", lambda config, seq_len: 1.0)
VARIANTS: dict[str, Sequence[tuple[str, Callable[..., float]]]] = {
    "NTK base and attention scaling": (),
    "NTK base only": (NO_SCALE,),
    "attention scaling only": (NO_NTK,),
    "neither": (NO_NTK, NO_SCALE),
}
SHOWN = 10  # steps of a mean


def run_config(out: Path, before: int, after: int) -> RunConfig:
    tokenizer, sources = prepare(None, None, out)
    lengths = {"training_seqlen": SHORT, "base_seqlen": SHORT, "max_seqlen": LONG}
    return run_config_from_dict(
        {
            "model": {"preset": "telechat2-tiny", "vocab_size": tokenizer.vocab_size, **lengths},
            "data": {"sources": sources, "seq_len": SHORT},
            "train": {
                "global_batch": 16,
                "micro_batch": 16,
                "stages": [{"steps": before}, {"steps": after, "seq_len": LONG, "global_batch": 4, "micro_batch": 4}],
            },
            "optim": {"lr": 2e-3, "schedule": "constant", "warmup_steps": 20},
            "checkpoint": {"every": before, "keep_last": 2},
        }
    )


def draw(curves: dict[str, list[Row]], switch: int, path: Path) -> None:
    """The whole run on the left; on the right how far each variant's loss lies above it, on the same batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, near) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    first, *others = curves
    exact = [row["loss"] for row in curves[first]]
    whole.plot(range(1, len(exact) + 1), means(exact), linewidth=1.6)
    for index, name in enumerate(others, 1):
        above = [row["loss"] - loss for row, loss in zip(curves[name][switch:], exact[switch:], strict=True)]
        steps = range(1, len(above) + 1)
        near.plot(steps, above, ".", color=f"C{index}", alpha=0.35, markersize=4)
        near.plot(steps, means(above), color=f"C{index}", linewidth=1.6, label=name)
    whole.axvline(switch + 0.5, color="0.5", linestyle=":", linewidth=1)
    whole.set_xlabel("step")
    whole.set_ylabel(f"loss, mean of {SHOWN} steps (nats per token)")
    whole.set_title(f"{first}: rows of {SHORT} tokens, then of {LONG}", fontsize=11)
    near.axhline(0.0, color="0.5", linewidth=1)
    near.set_xlabel("steps after the switch")
    near.set_ylabel("loss above that run's (nats per token)")
    near.set_title(f"parts of the length rule left out (lines: means of {SHOWN} steps)", fontsize=11)
    near.legend()
    for axis in (whole, near):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def means(values: Sequence[float]) -> list[float]:
    """Of each value and those up to SHOWN - 1 before it."""
    return [statistics.fmean(values[max(0, n - SHOWN + 1) : n + 1]) for n in range(len(values))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/length-stages"))
    parser.add_argument("--before", type=int, default=600, help="steps before the switch")
    parser.add_argument("--after", type=int, default=120, help="steps after it")
    args = parser.parse_args()
    trainer = backends.load("pt", "train").Trainer
    config = run_config(args.out, args.before, args.after)
    first, *others = VARIANTS
    curves: dict[str, list[Row]] = {}
    loop.train(trainer, config, args.out / "run", resume="auto")
    curves[first] = read_metrics(args.out / "run")
    for number, name in enumerate(others, 1):
        with ExitStack() as patched:
            for function, other in VARIANTS[name]:
                patched.enter_context(mock.patch.object(position, function, other))
            folder, switch = args.out / f"variant-{number}", args.out / "run" / f"step-{args.before:08d}"
            loop.train(trainer, config, folder, resume="auto" if (folder / "latest").exists() else str(switch))
        curves[name] = curves[first][: args.before] + read_metrics(folder)
    draw(curves, args.before, args.out / "length-stages.png")
    exact = [row["loss"] for row in curves[first][args.before :]]
    for name, rows in curves.items():
        later = [row["loss"] for row in rows[args.before :]]
        above = [loss - best for loss, best in zip(later, exact, strict=True)]
        begin, end = statistics.fmean(above[:SHOWN]), statistics.fmean(above[-SHOWN:])
        print(f"{name:<32} loss above: {begin:+.4f} in the first {SHOWN} steps, {end:+.4f} in the last")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
