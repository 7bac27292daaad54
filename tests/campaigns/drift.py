"""`python -m tests.campaigns.drift`: what a drift envelope sees that "losses within 2 %" does not, and the reverse.

One recipe with a high learning rate is trained by PyTorch with noise (the envelope), by MindSpore (a right port), and
by PyTorch with single planted faults (wrong ports). Kept for each port: the largest distances from the centre run, at
which step it first leaves the envelope, and whether "losses within 2 %" and "1e-4" pass it. docs/mutation.md shows the
result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.parity.envelope import COLUMNS, Envelope, measure, noisy_rows, read_envelope, write_envelope
from telechat_twins.core.parity.envelope_plot import plot_envelope
from telechat_twins.core.train.metrics import Row, column
from tests.mutation.catalogue import FAULTS
from tests.mutation.fault import planted
from tests.support.packed import write_packed

VOCAB, LENGTH = 512, 64
RULES = {"2 %": 0.02, "1e-4": 1e-4}
RIGHT = "MindSpore, a right port"
WRONG = (
    "attention output bias missed",
    "eps of another release",
    "gains and biases decay",
    "updates counted from two",
    "statistics as constants",
)


def recipe(folder: Path, steps: int, lr: float) -> RunConfig:
    """A small model on data of tests/support/packed.py."""
    data = folder / "packed"
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_heads": 4, "num_kv_heads": 2}
    return run_config_from_dict(
        {
            "model": {"preset": "telechat2-tiny", "vocab_size": VOCAB, "head_dim": 16, **sizes},
            "data": {
                "sources": [{"path": str(data if data.exists() else write_packed(data, VOCAB, LENGTH))}],
                "seq_len": LENGTH,
            },
            "train": {"steps": steps, "global_batch": 4, "micro_batch": 4},
            "optim": {"lr": lr, "min_lr": lr / 10, "warmup_steps": min(20, steps - 1)},
        }
    )


def apart(envelope: Envelope, rows: Sequence[Row], key: str) -> list[float]:
    """Relative distances from the centre."""
    pairs = zip(column(rows, key), envelope.centre[key], strict=True)
    return [abs(a - b) / abs(b) for a, b in pairs]


def judged(envelope: Envelope, rows: Sequence[Row]) -> dict[str, Any]:
    """What each rule says of a port."""
    found: dict[str, Any] = {f"largest {key}": max(apart(envelope, rows, key)) for key in COLUMNS}
    for name, limit in RULES.items():
        found[f"losses within {name}"] = found["largest loss"] <= limit
    outside = [
        step
        for key in COLUMNS
        for step, far, limit in zip(envelope.steps, apart(envelope, rows, key), envelope.limits[key], strict=True)
        if far > limit
    ]
    found["first step outside"] = min(outside, default=None)
    found["share of the envelope"] = max(bound.value for bound in envelope.bounds(rows)[1:])
    return found


def draw(folders: Sequence[Path], titles: Sequence[str], labels: Sequence[str], path: Path) -> None:
    """The distances of losses of two recipes side by side, with their envelopes and the 2 % line; ``labels``: which
    ports."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(11, 4.6), layout="constrained")
    for axis, folder, title in zip(axes, folders, titles, strict=True):
        envelope, runs = read_envelope(folder / "envelope.json"), json.loads((folder / "runs.json").read_text())
        limits = envelope.limits["loss"]
        axis.fill_between(envelope.steps, 1e-8, limits, color="0.85", linewidth=0, label="envelope of equal devices")
        for number, label in enumerate(labels):
            far = [max(1e-8, x) for x in apart(envelope, runs[label], "loss")]
            axis.plot(envelope.steps, far, color=f"C{number}", linewidth=1.2, label=label)
        axis.axhline(RULES["2 %"], color="black", linestyle=":", linewidth=1.2, label="2 %")
        axis.set_yscale("log")
        axis.set_ylim(1e-8, 1.0)
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss: relative distance from the centre run")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.drift", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of each run (300)")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate (6e-3)")
    parser.add_argument("--runs", type=int, default=6, help="noisy runs, K (6)")
    parser.add_argument("--wrong", nargs="*", default=list(WRONG), metavar="FAULT", help="wrong ports (five)")
    parser.add_argument("--out", type=Path, default=Path("drift"), help="folder: envelope.json, runs.json, drift.png")
    parser.add_argument(
        "--draw", nargs=2, type=Path, metavar=("COOL", "HOT"), help="only draw --out/drift.png of these"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.draw:
        titles = (
            "a wrong port stays below 2 %, and leaves the envelope",
            "a right port exceeds 2 %, within the envelope",
        )
        draw(args.draw, titles, (RIGHT, "eps of another release", "gains and biases decay"), args.out / "drift.png")
        return 0
    with tempfile.TemporaryDirectory(prefix="tele-drift-") as folder:
        config = recipe(Path(folder), args.steps, args.lr)
        kept = args.out / "envelope.json"
        if not kept.exists():
            write_envelope(measure("pt", config, args.runs, 1, say=lambda line: print(line, flush=True)), kept)
        envelope, file = read_envelope(kept), args.out / "runs.json"
        runs: dict[str, list[Row]] = json.loads(file.read_text()) if file.exists() else {}
        for label in (RIGHT, *args.wrong):
            if label in runs:
                continue
            if label == RIGHT:
                runs[label] = noisy_rows("ms", config, None)
            else:
                name = next(name for name in FAULTS if label in name)
                with planted(FAULTS[name], "pt"):
                    runs[label] = noisy_rows("pt", config, None)
            file.write_text(json.dumps(runs), encoding="utf-8")
            print(label, json.dumps(judged(envelope, runs[label])), flush=True)
    plot_envelope(envelope, runs, args.out / "drift.png", RULES["2 %"])
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
