"""Options of ``tele parity`` and of its actions, apart from what carries them out: their imports take half a second."""

from __future__ import annotations

import argparse

from telechat_twins.core import backends
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes, writable_file
from telechat_twins.core.model.config import PRECISIONS
from telechat_twins.core.parity.record.format import MAX_BYTES

BOTH_EXAMPLES = """\
examples:
  tele parity --config F --steps 50
      compare both backends: on one batch, then over 50 training steps
  tele parity --config F --steps 0 --layouts tp2,ring2,pp2,tp2.pp2
      also compare each of these layouts, in each backend, with one device (layouts: see `tele train --help`)
  tele parity --config F --growth flm-replica --steps 20 --layouts tp2
      compare before, at and after every growth of a schedule: the function is preserved, and the backends are equal
"""
RECORD_DESCRIPTION = f"""\
Run the first steps of a training run and record what they compute, in a folder of at most {show_bytes(MAX_BYTES)}.

Of the steps of --at, the record holds norms, extremes and sketches of every activation, its gradient, every parameter
before and after the step, its gradient and its moments; of all steps the metrics. Records taken on different machines,
by different backends, in different layouts and precisions can be compared: tele parity compare A B. With --set
train.precision=fp64 the record is one to judge others by. A run that trains can record itself: train.record_every.
"""
RECORD_EXAMPLES = """\
examples:
  tele parity record --backend ms --config telechat2-tiny --steps 50 --out records/npu
  tele parity record --backend pt --config telechat2-tiny --layout tp2.pp2 --full 'layers.3.*' --out records/tp2.pp2
  tele parity record --backend pt --config telechat2-tiny --set train.precision=fp64 --out records/judge
  tele parity record --backend ms --config telechat2-115b --dry
"""
COMPARE_DESCRIPTION = """\
Compare two records of `tele parity record`, two run folders (metrics.jsonl) or two outputs of `tele forward`. Backends,
layouts, precisions and devices may differ; weights and batch must not. No framework is needed.

Exit code 0 when all bounds hold, 1 when one is broken, 2 when the input is wrong.
"""
COMPARE_EXAMPLES = """\
examples:
  tele parity compare records/npu records/gpu --reference records/fp64
      every quantity against a float64 record
  tele parity compare runs/npu runs/gpu --envelope envelope.json --junit parity.xml
      two long runs, judged by the band in which equal devices stay
  tele parity compare npu.safetensors gpu.safetensors --reference fp64.safetensors
"""
LOCATE_DESCRIPTION = """\
Walk two records of `tele parity record` forward, backward and through the update, and name the first quantity beyond
its budget, with its operator and layer. Where the records hold that operator's whole tensors and a backend is
installed, replay it alone to tell whether the operator or its inputs are wrong, and shrink a failing input to a small
file with a script that runs it again.

Exit code 0 when nothing is beyond its budget, 1 when something is, 2 when the input is wrong.
"""
LOCATE_EXAMPLES = """\
examples:
  tele parity locate records/npu records/gpu --reference records/judge
  tele parity locate records/npu records/gpu --rerun
      make the float64 record here, and the whole tensors where a side's backend is installed
"""
ENVELOPE_DESCRIPTION = """\
Train a run once as it is and K times with rounding noise in every operator's output, and write the band in which an
equal device's loss and gradient norm stay, step by step. Training magnifies rounding; how much depends on the recipe
and on the step, so a fixed limit is too wide early and too narrow late. All runs are made on one device, in this
process, one after another. `tele parity compare --envelope FILE` judges long traces by it.
"""
ENVELOPE_EXAMPLES = """\
examples:
  tele parity envelope --config F --backend pt --steps 300 --out envelope.json
  tele parity envelope --config F --backend ms --runs 12 --set train.precision=bf16 --out envelope.json
"""


def both_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity``."""
    parser.epilog = BOTH_EXAMPLES
    parser.add_argument(
        "--config",
        metavar="F",
        help="YAML file of a training run, or the name of a bundled one; its model, data and recipe are used",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. train.precision=bf16"
    )
    parser.add_argument(
        "--growth", metavar="G", help="growth schedule: compare before, at and after each of its growths"
    )
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="training steps to compare; 0: one batch only (50)"
    )
    parser.add_argument(
        "--out",
        default="parity",
        metavar="DIR",
        help="folder for report.html, report.md, report.json and traces.png (parity)",
    )
    parser.add_argument("--junit", metavar="FILE", help="also write JUnit XML, a test case for every bound")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=sorted(backends.BACKENDS),
        default=["ms", "pt"],
        help="backends to compare (ms pt)",
    )
    parser.add_argument(
        "--weights",
        choices=("strong", "normal"),
        default="strong",
        help="weights of the one-batch comparison: strong (large, random biases and gains) or as initialised",
    )
    parser.add_argument(
        "--layouts", nargs="+", default=[], metavar="L,...", help="compare these with one device, e.g. tp2,pp2,tp2.pp2"
    )
    parser.add_argument(
        "--layout-steps", type=int, default=2, metavar="N", help="optimizer updates in each layout, 0 to 100 (2)"
    )


def record_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity record``."""
    parser.description, parser.epilog = RECORD_DESCRIPTION, RECORD_EXAMPLES
    parser.add_argument(
        "--backend", required=True, choices=sorted(backends.BACKENDS), help="ms: MindSpore, pt: PyTorch"
    )
    parser.add_argument(
        "--config", required=True, metavar="F", help="YAML file of a training run, or the name of a bundled one"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. train.precision=bf16"
    )
    parser.add_argument("--layout", metavar="L", help="parallel layout, e.g. tp2.pp2 (default: the config's)")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="steps to run; the trace has them all (1)")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[1], metavar="STEP", help="steps whose tensors are recorded (1)"
    )
    parser.add_argument(
        "--full",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="also keep these tensors whole, e.g. 'layers.3.*' or 'gradient:embed.weight@1'",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        metavar="B",
        help="record the activations of the first B rows of the global batch (default: as many as cost little)",
    )
    parser.add_argument("--resume", metavar="DIR", help="begin with this checkpoint, its optimizer included")
    parser.add_argument("--out", default="record", metavar="REC", help="folder of the record (record)")
    parser.add_argument("--force", action="store_true", help="replace a record that is there")
    parser.add_argument("--dry", action="store_true", help="only print the sizes; needs neither weights nor data")


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity compare``."""
    parser.description, parser.epilog = COMPARE_DESCRIPTION, COMPARE_EXAMPLES
    parser.add_argument("one", metavar="A", help="a record, a run folder, or an output of `tele forward`")
    parser.add_argument("other", metavar="B", help="another of the same kind")
    parser.add_argument("--reference", metavar="R", help="a third, of higher precision (fp64), that judges both")
    parser.add_argument(
        "--envelope",
        metavar="E",
        help="file of `tele parity envelope`: judges loss and gradient norm of every step of long traces",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of run folders and outputs of `tele forward` (fp32); a record holds its own",
    )
    parser.add_argument("--out", default="compare", metavar="DIR", help="folder for the report (compare)")
    parser.add_argument("--junit", metavar="FILE", help="also write JUnit XML, a test case for every bound")


def locate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity locate``."""
    parser.description, parser.epilog = LOCATE_DESCRIPTION, LOCATE_EXAMPLES
    parser.add_argument("one", metavar="A", help="a record")
    parser.add_argument("other", metavar="B", help="a record of the same weights and batch")
    parser.add_argument("--reference", metavar="R", help="their float64 record, from which the budgets come")
    parser.add_argument(
        "--rerun", action="store_true", help="run the records' config again here for what is missing; needs its data"
    )
    parser.add_argument(
        "--out", default="locate", metavar="DIR", help="folder for locate.json and a failing input (locate)"
    )


def envelope_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity envelope``."""
    parser.description, parser.epilog = ENVELOPE_DESCRIPTION, ENVELOPE_EXAMPLES
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


def check_both(args: argparse.Namespace) -> None:
    """UserError for numbers of steps that make no sense, and for a file that cannot be written."""
    if args.steps < 0:
        raise UserError(f"--steps: must be at least 0, found {args.steps}")
    if args.junit is not None:
        writable_file(args.junit, "--junit")
    if not 0 <= args.layout_steps <= 100:
        raise UserError(f"--layout-steps: must be from 0 to 100, found {args.layout_steps}")
