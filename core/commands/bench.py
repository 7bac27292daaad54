"""Benchmarks. Contestants run in processes of their own and take turns, so that ratios are valid on a shared machine.

step      a training step in MindSpore, in PyTorch and, with `--backends ms pt eager`, of the released PyTorch code;
          with `--peers hf hf-compile` also of transformers' Llama of the same shapes, plain and through torch.compile.
memory    peak memory of a training step above that of the imports, of each contestant in a process of its own, beside
          the estimate of `tele plan`; `--peers hf` adds transformers with its fused AdamW.
decode    tokens generated one by one, for one sequence and for several at once; also with Hugging Face's generate, on
          a model of the same shapes, if transformers is installed; with `--peers llama.cpp` also with llama.cpp.
serve     1, 8 and 32 concurrent clients of ``tele serve``: tokens/s, time to the first text, cache in use; also with
          Hugging Face's generate, as for decode.
kernels   every operator, forward and backward, against the machine's limits: bytes moved against the measured copy
          bandwidth, floating-point operations against the measured rate of a matrix product.
grow      `tele grow` on a checkpoint of 2 GB, against writing as many bytes to the disk of the working folder.
save      saving and verified loading of a checkpoint of --megabytes, against safetensors' save_file and load_file, on
          the disk of the working folder; and how long an asynchronous save holds training up.
parallel  layouts (see ``tele train --help``) in turns, and in every round a single process with the same batch. Also
          bytes passed to collectives against the formula, the pipeline's bubble against theory, the balance of the
          ring, and the optimizer states on a rank.
Examples:
  tele bench step --model telechat2-mini --seq-len 1024 --micro-batch 1 --backends ms pt eager
  tele bench memory --model telechat2-mini --seq-len 1024 --peers hf
  tele bench decode --model telechat2-mini
  tele bench serve --model telechat2-mini --backends ms pt --out serve.json
  tele bench kernels --operators rms_norm swiglu --sizes mini
  tele bench grow
  tele bench save --megabytes 1000 --steps 3
  tele bench parallel --layouts tp2,pp2,dp2,dp2.nozero --backends pt --steps 10
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.bench.decode import decode_to_markdown, measure_decode
from telechat_twins.core.bench.grow import growth_to_markdown, measure_growth
from telechat_twins.core.bench.kernels import OPERATORS, SIZES, kernels_to_markdown, measure_kernels
from telechat_twins.core.bench.memory import measure_memory, memory_to_markdown
from telechat_twins.core.bench.report import layouts_to_markdown
from telechat_twins.core.bench.save import measure_saving, saving_to_markdown
from telechat_twins.core.bench.serve import measure_serving, serving_to_markdown, write_model
from telechat_twins.core.bench.step import facts, measure, to_markdown
from telechat_twins.core.bench.worker import EAGER, HF_STEP, LLAMA_CPP, bench_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.model.config import PRECISIONS, preset_names
from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.model.quantize import QUANTIZATIONS
from telechat_twins.core.planner.machine import Machine, load_machine
from telechat_twins.core.types import JsonObject

LAYOUTS = "single,tp2,pp2,ring2,ulysses2,dp2"
# Defaults that differ between the benchmarks.
DEFAULTS: dict[str, JsonObject] = {
    "step": {"micro_batch": 4, "micro_batches": 1, "steps": 30, "block": 5},
    "memory": {"micro_batch": 1, "micro_batches": 1, "steps": 3, "block": 1},
    "decode": {"micro_batch": 1, "micro_batches": 1, "steps": 200, "block": 20},
    "serve": {"micro_batch": 1, "micro_batches": 1, "steps": 1, "block": 1},
    "kernels": {"micro_batch": 1, "micro_batches": 1, "steps": 15, "block": 5},
    "parallel": {"micro_batch": 2, "micro_batches": 4, "steps": 10, "block": 2},
    "grow": {"micro_batch": 1, "micro_batches": 1, "steps": 3, "block": 1},
    "save": {"micro_batch": 1, "micro_batches": 1, "steps": 3, "block": 1},
}
# Options that only some benchmarks have.
ONLY: dict[str, tuple[str, ...]] = {
    "layouts": ("parallel",),
    "prompt": ("decode", "serve"),
    "rows": ("decode",),
    "quantize": ("decode", "serve"),
    "clients": ("serve",),
    "new": ("serve",),
    "checkpoint": ("serve",),
    "operators": ("kernels",),
    "sizes": ("kernels",),
    "compile": ("kernels",),
    "peers": ("step", "memory", "decode"),
    "megabytes": ("save",),
    "machine": ("parallel",),
    "calibrate": ("parallel",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele bench``."""
    parser.add_argument("what", choices=tuple(DEFAULTS), help="what to measure, as above")
    parser.add_argument(
        "--model",
        default="telechat2-tiny",
        metavar="PRESET",
        help=f"one of {', '.join(preset_names())}, or a YAML file of a model",
    )
    parser.add_argument("--seq-len", type=int, default=128, metavar="S", help="tokens per sequence (128)")
    parser.add_argument("--micro-batch", type=int, metavar="B", help="sequences per forward pass (step 4, parallel 2)")
    parser.add_argument(
        "--micro-batches",
        type=int,
        metavar="M",
        help="forward passes per optimizer step, divided among data-parallel ranks (step 1, parallel 4)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps, tokens, calls or rounds measured (step 30, decode 200, kernels 15, parallel 10, others 3)",
    )
    parser.add_argument(
        "--block",
        type=int,
        metavar="K",
        help="of these, how many in one turn (step 5, decode 20, kernels 5, parallel 2)",
    )
    parser.add_argument(
        "--precision", default="fp32", choices=PRECISIONS, help="arithmetic; of kernels the dtype of tensors (fp32)"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=sorted((*backends.BACKENDS, EAGER)),
        default=["ms", "pt"],
        help=f"contestants (ms pt); for step also {EAGER}: the operators of the released PyTorch code",
    )
    _add_special(parser)
    parser.add_argument("--layouts", nargs="+", metavar="L", help=f"parallel: with commas or spaces ({LAYOUTS})")
    parser.add_argument(
        "--machine",
        nargs="+",
        metavar="M",
        help="parallel: machine files of `tele plan --calibrate`; the forecast stands beside each backend's times",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        default=None,
        help="parallel: measure this machine in turns with the layouts, and print the forecast beside the times",
    )
    parser.add_argument("--out", metavar="FILE", help="also write all measurements as JSON")


def _add_special(parser: argparse.ArgumentParser) -> None:
    """The options of single benchmarks."""
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=sorted((*HF_STEP, LLAMA_CPP)),
        help="step, memory: further contestants, from the transformers library if installed (hf-compile takes a "
        "minute); decode: llama.cpp, on one sequence, with F32, BF16 or Q8_0 weights as --precision and --quantize say",
    )
    parser.add_argument(
        "--megabytes", type=int, metavar="M", help="save: size of the checkpoint, a third of it weights (1000)"
    )
    parser.add_argument(
        "--prompt",
        type=int,
        metavar="P",
        help="decode: tokens before the measured ones (16); serve: of the longest prompt (64)",
    )
    parser.add_argument("--rows", type=int, nargs="+", metavar="R", help="decode: sequences that share a step (1 8)")
    parser.add_argument(
        "--quantize", choices=QUANTIZATIONS, metavar="Q", help="decode, serve: weights of the backends in int8 (none)"
    )
    parser.add_argument("--clients", type=int, nargs="+", metavar="C", help="serve: concurrent clients (1 8 32)")
    parser.add_argument("--new", type=int, metavar="N", help="serve: tokens of the longest answer (32)")
    parser.add_argument("--checkpoint", metavar="DIR", help="serve: measure this model in place of a random --model")
    parser.add_argument(
        "--operators", nargs="+", choices=sorted(OPERATORS), metavar="O", help="kernels: some of " + " ".join(OPERATORS)
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=sorted(SIZES), metavar="Z", help=f"kernels: {' '.join(SIZES)} (mini large)"
    )
    parser.add_argument(
        "--compile", action="store_true", default=None, help="kernels: also torch.compile, which takes minutes to start"
    )


def run(args: argparse.Namespace) -> int:
    """Run a benchmark and print Markdown; 1 when counted traffic differs from the formula."""
    _settle(args)
    names = _backends(args)
    options = {name: getattr(args, name) for name in ("model", "seq_len", "micro_batch", "micro_batches", "precision")}
    if options["model"].endswith((".yaml", ".yml")):
        options["model"] = str(Path(options["model"]).resolve())  # workers start in another folder
    bench_config(options)  # an invalid option is reported here, once, instead of by every worker
    layouts = checked_layouts(args.layouts or [LAYOUTS], options) if args.what == "parallel" else []
    if args.out:
        writable_file(args.out, "--out")
    result, text = _measured(args, options, layouts, names)
    print(text)
    if args.out:
        write_text(Path(args.out), json.dumps(result, indent=1) + "\n")
    return 1 if any(row.get("traffic", {}).get("differs") for row in result.get("rows", ())) else 0


def _settle(args: argparse.Namespace) -> None:
    """Fill in the benchmark's defaults; UserError for an option that it does not have or a number out of range."""
    for name, owners in ONLY.items():
        if getattr(args, name) is not None and args.what not in owners:
            raise UserError(
                f"--{name}: is an option of `tele bench {' and '.join(owners)}`, not of `tele bench {args.what}`; "
                "leave it out"
            )
    if args.calibrate and args.machine:
        raise UserError("--calibrate: measures the machine in place of --machine's file; leave one of them out")
    for name, value in DEFAULTS[args.what].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.prompt = {"serve": 64}.get(args.what, 16) if args.prompt is None else args.prompt
    args.new = 32 if args.new is None else args.new
    args.megabytes = 1000 if args.megabytes is None else args.megabytes
    args.clients = list(dict.fromkeys(args.clients or [1, 8, 32]))
    args.rows = list(dict.fromkeys(args.rows or [1, 8]))
    for name in ("seq_len", "micro_batch", "micro_batches", "steps", "block", "prompt", "new", "megabytes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {getattr(args, name)}")
    for name in ("rows", "clients"):
        if min(getattr(args, name)) < 1:
            raise UserError(f"--{name}: must be at least 1, found {min(getattr(args, name))}")
    if args.what == "decode":
        args.seq_len = args.prompt + max(args.block, 1)
    elif args.what == "serve":
        args.seq_len = args.prompt + args.new


def _backends(args: argparse.Namespace) -> list[str]:
    """The contestants, each once; UserError for the released composition where it cannot take part."""
    names = list(dict.fromkeys(args.backends))
    if EAGER in names and args.what != "step":
        raise UserError(f"--backends {EAGER}: is available for `tele bench step` only; give ms, pt or both")
    if EAGER in names and args.precision != "fp32":
        raise UserError(
            f"--precision: must be fp32 for the {EAGER} composition, found {args.precision}; leave {EAGER} out of "
            "--backends, or take fp32"
        )
    if args.peers and args.precision not in ("fp32", "bf16"):
        raise UserError(f"--peers: need --precision fp32 or bf16, found {args.precision}; take one of these")
    _check_peers(args)
    return [*names, *dict.fromkeys(args.peers or [])]


def _check_peers(args: argparse.Namespace) -> None:
    """UserError for a peer that the benchmark does not have, or whose packages are not installed."""
    offered = ("hf", LLAMA_CPP) if args.what == "decode" else tuple(HF_STEP)
    for name in args.peers or ():
        if name not in offered:
            raise UserError(f"--peers {name}: `tele bench {args.what}` has {' and '.join(offered)}; take one of these")
    needed = ["transformers"] if set(args.peers or ()) & set(HF_STEP) else []
    if LLAMA_CPP in (args.peers or ()):
        needed += ["xllamacpp", "gguf"]
        if 1 not in args.rows:
            raise UserError(f"--peers {LLAMA_CPP}: is measured with one sequence; add 1 to --rows")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--peers: needs {' and '.join(missing)}, not installed here; pip install {' '.join(missing)}")


def _measured(
    args: argparse.Namespace, options: JsonObject, layouts: list[str], names: list[str]
) -> tuple[JsonObject, str]:
    """Run the chosen benchmark. Returns its results, and its report as Markdown."""
    if args.what == "grow":
        result = measure_growth(args.steps)
        text = growth_to_markdown(result)
    elif args.what == "save":
        result = measure_saving(args.megabytes * 1_000_000, args.steps)
        text = saving_to_markdown(result)
    elif args.what == "memory":
        result = measure_memory(options, names, args.steps)
        text = memory_to_markdown(result)
    elif args.what == "parallel":
        machines = [load_machine(name) for name in args.machine or ()]
        for machine in machines:
            if machine.backend not in (None, *names):
                raise UserError(
                    f"--machine: {machine.name} was measured with {machine.backend}, which is not among --backends "
                    f"{' '.join(names)}; leave it out, or add the backend"
                )
        result = measure_layouts(options, layouts, names, args.steps, args.block, machines, bool(args.calibrate))
        text = layouts_to_markdown(result)
    elif args.what == "decode":
        options["quantize"] = args.quantize or "none"
        result = measure_decode(options, names, args.rows, args.prompt, args.steps, args.block)
        text = decode_to_markdown(result)
    elif args.what == "serve":
        options["quantize"] = args.quantize or "none"
        result = served(args, options, names)
        text = serving_to_markdown(result)
    elif args.what == "kernels":
        result = measure_kernels(
            names,
            args.operators or list(OPERATORS),
            args.sizes or ["mini", "large"],
            args.precision,
            args.steps,
            args.block,
            bool(args.compile),
        )
        text = kernels_to_markdown(result)
    else:
        result = measure(options, names, args.steps, args.block)
        text = to_markdown(result)
    return result, text


def served(args: argparse.Namespace, options: JsonObject, names: list[str]) -> JsonObject:
    """``tele bench serve`` on a checkpoint, or on random weights of --model."""
    from telechat_twins.convert.source import open_model

    with tempfile.TemporaryDirectory(prefix="tele-bench-") as folder:
        checkpoint = Path(args.checkpoint or write_model(Path(folder), bench_config(options).model))
        config = open_model(checkpoint).config
        found = measure_serving(options, names, args.clients, args.prompt, args.new, checkpoint, config)
    if args.checkpoint:
        found["options"]["model"], found["parameters"] = checkpoint.name, count_parameters(config)
    return found


def checked_layouts(words: Sequence[str], options: JsonObject) -> list[str]:
    """The layouts in ``words``, each once; UserError for one that the model or the batch does not fit."""
    from telechat_twins.core.parallel.layout import check_layout, parse_layout

    found: dict[str, str] = {}
    for text in (part for word in words for part in word.split(",") if part):
        layout = parse_layout(text)
        config = bench_config(options)
        if options["micro_batches"] % layout.dp:
            raise UserError(
                f"--layouts {text}: --micro-batches must be a multiple of dp {layout.dp}, found "
                f"{options['micro_batches']}; give {-(-options['micro_batches'] // layout.dp) * layout.dp}"
            )
        try:
            check_layout(
                layout,
                config.model,
                global_batch=config.train.global_batch,
                micro_batch=config.train.micro_batch,
                seq_len=config.data.seq_len,
            )
        except UserError as error:
            raise UserError(f"--layouts {text}: {error}") from None
        found.setdefault(layout.name, text)  # shown as the user wrote it
    if not found:
        raise UserError(f"--layouts: must name at least one layout, found none; give e.g. {LAYOUTS}")
    return list(found.values())


def measure_layouts(
    options: JsonObject,
    layouts: list[str],
    names: list[str],
    steps: int,
    block: int,
    machines: Sequence[Machine] = (),
    calibrate: bool = False,
) -> JsonObject:
    """Measure all layouts: one launch for each backend and number of processes, in which its layouts take turns.

    ``machines``: forecast each layout on the first of these that was measured with its backend, or with none.
    ``calibrate``: on this machine as it was measured in the layout's own launch.
    """
    from telechat_twins.core.bench.calibrate import machines_of
    from telechat_twins.core.bench.parallel import RankRecord, forecasts_of, summarise, worlds

    rows, made = [], {}
    calibrations: dict[str, list[JsonObject]] = {}
    groups = worlds(layouts)
    for name in names:
        for world, texts in groups.items():
            title = f"{backends.TITLES[name]}, {world} process{'es' if world > 1 else ''}"
            print(f"{title}: {', '.join(texts)}", file=sys.stderr, flush=True)
            ranks = _launched(name, world, options, texts, steps, block, calibrate)
            single, made[name] = ranks[0]["single"], ranks[0]["implementation"]
            own = next((machine for machine in machines if machine.backend in (None, name)), None)
            measured: tuple[Machine | None, Machine | None] = own, None
            if calibrate:
                calibrations[f"{name} {world}"] = found = [rank["calibration"] for rank in ranks]
                measured = machines_of(name, options, found)
            for text in texts:
                records = [RankRecord(**rank["layouts"][text]) for rank in ranks]
                row = summarise(options, text, records, single)
                row["forecast"] = forecasts_of(options, text, *measured)
                rows.append({"backend": name, "device": made[name]["device"], "single": single, **row})
    order = {text: number for number, text in enumerate(layouts)}
    rows.sort(key=lambda row: (names.index(row["backend"]), order[row["layout"]]))
    about = facts(options)
    about["machine"]["threads"] = os.environ.get("OMP_NUM_THREADS")
    return {**about, "implementations": made, "rows": rows, "calibrations": calibrations}


def _launched(
    name: str, world: int, options: JsonObject, layouts: list[str], steps: int, block: int, calibrate: bool = False
) -> list[JsonObject]:
    """Run core/bench/parallel.py in ``world`` processes. Returns the ranks' records."""
    from telechat_twins.core.bench import parallel as bench_parallel
    from telechat_twins.core.launch.launcher import launch

    folder = Path(tempfile.mkdtemp(prefix="tele-bench-"))
    plan = {
        "options": options,
        "layouts": layouts,
        "steps": steps,
        "block": block,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "calibrate": calibrate,
    }
    bench_parallel.plan_path(folder).write_text(json.dumps(plan), encoding="utf-8")
    code = launch(name, [name, str(folder)], world, folder / "logs", script=bench_parallel.__file__)
    if code:
        # The launch has printed the reason; the folder with its logs is kept.
        raise SystemExit(code)
    found = [json.loads(bench_parallel.rank_path(folder, rank).read_text(encoding="utf-8")) for rank in range(world)]
    shutil.rmtree(folder)
    return found
