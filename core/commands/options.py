"""Command-line options shared by several commands."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core import backends
from telechat_twins.core.data.control import CONTROL_CHOICES
from telechat_twins.core.data.forms.streams import UTF8
from telechat_twins.core.data.kinds.columns import Columns, read_columns
from telechat_twins.core.data.kinds.dataset_info import dataset_columns
from telechat_twins.core.data.kinds.messages import ROLES, Reading
from telechat_twins.core.data.kinds.table import DIALOGUE, OPTION, PREFERENCE
from telechat_twins.core.data.rows import find_inputs, row_files, under_notes
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import message_line, printable
from telechat_twins.core.types import JsonObject

TEMPLATE_HELP = (
    "auto: the folder's own chat template if it has one; builtin: TeleChat2's; thinking: the same for models that "
    "reason in <think> tags first (T1, TeleChat3-Thinking); or a file with a template"
)

# What only models need is imported where they are used: `tele data` shares these options, and would wait for it.
if TYPE_CHECKING:
    from telechat_twins.core.eval.presets import TaskPlan
    from telechat_twins.core.inference.decoding.settings import Settings
    from telechat_twins.core.inference.load import Loaded
    from telechat_twins.core.inference.sampling import SamplingConfig
    from telechat_twins.core.parallel.layout import Layout


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of generate, chat and serve: the model, its backend, how it is read, and how it is prompted."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--chat-template", default="auto", metavar="auto|builtin|thinking|FILE", help=TEMPLATE_HELP)
    parser.add_argument(
        "--rescale",
        default="request",
        choices=("request", "step"),
        help="rotary base beyond the trained length: fixed for a request, or recomputed each step as released",
    )
    parser.add_argument("--add-bos", action="store_true", help="begin with <_start>, as in the 115B release's chat")
    parser.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|none|FILE",
        help="defaults of sampling and length: those of the model's generation_config.json (auto), none, or a file's",
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a model that is computed with: its backend, its files, and its arithmetic."""
    from telechat_twins.core.model.config import PRECISIONS
    from telechat_twins.core.model.quantize import QUANTIZATIONS

    parser.add_argument(
        "--backend", required=True, choices=sorted(backends.BACKENDS), help="ms: MindSpore, pt: PyTorch"
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="released HF folder or canonical checkpoint")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.model, tokenizer.json, vocab.json, or a folder (default: the one beside the checkpoint)",
    )
    parser.add_argument("--control", default="auto", choices=CONTROL_CHOICES, help="which control tokens text may name")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="arithmetic (fp32)")
    parser.add_argument(
        "--quantize",
        default="none",
        choices=QUANTIZATIONS,
        help="int8: linear layers in 8 bits, with a scale for each output channel (none)",
    )
    parser.add_argument("--table-dtype", choices=("float32", "float16"), help="rotary tables; float16 as released")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of sampling; greedy unless a temperature is given, or the model's generation_config.json draws."""
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="above 0 draws tokens (default: as --generation-config, or greedy)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens with this total probability"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the likeliest"
    )
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: less repetition")
    parser.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="R",
        help="subtracted from the logit of each token in the output",
    )
    parser.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="R", help="the same, once for each occurrence"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (0)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token")


def given_sampling(args: argparse.Namespace) -> JsonObject:
    """The fields of SamplingConfig that the options set; UserError where they contradict each other or are out of
    range."""
    from telechat_twins.core.inference.sampling import sampling_config

    if args.greedy and args.temperature:
        raise UserError(f"--greedy: cannot be combined with --temperature {args.temperature}; give one of them")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.greedy:
        given["temperature"] = 0.0
    given |= {name: getattr(args, name) for name in ("presence_penalty", "frequency_penalty", "seed")}
    sampling_config(**given)
    return given


def sampling_from(args: argparse.Namespace, settings: Settings) -> SamplingConfig:
    """The SamplingConfig of the options and, where they are silent, of the model's settings; what is taken from these
    is noted on stderr. UserError as ``given_sampling``, and for an option without effect on greedy decoding.

    ``args`` then holds what was taken, for the records of a run.
    """
    from telechat_twins.core.inference.sampling import SamplingConfig

    given = given_sampling(args)
    config = settings.resolve(given, draws=False)
    idle = [name for name in ("top_k", "top_p", "min_p") if config.greedy and name in given]
    if idle and (args.greedy or args.temperature is None):
        raise UserError(
            f"--{idle[0].replace('_', '-')}: needs --temperature, since it has no effect on greedy decoding; add e.g. "
            "0.7"
        )
    said = {**given, **{name: True for name in ("max_new_tokens", "stop") if getattr(args, name, None)}}
    for note in settings.note(said, draws=False):
        print(f"note: {message_line(note)}", file=sys.stderr)
    for name in ("temperature", *settings.sampling):
        if getattr(args, name) is None and getattr(config, name) != getattr(SamplingConfig(), name):
            setattr(args, name, getattr(config, name))
    args.repetition_penalty = config.repetition_penalty
    return config


def read_layout(text: str | None, nproc: int | None, timeout: float | None) -> Layout:
    """The layout of the options; by default a single process. UserError where they contradict each other."""
    from telechat_twins.core.parallel.layout import Layout, parse_layout

    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc: must be at least 1, found {nproc}")
    if text is None and nproc not in (None, 1):
        raise UserError(f"--nproc: {nproc} processes need a layout; add e.g. --layout tp{nproc}")
    layout = Layout() if text is None else parse_layout(text)
    if nproc not in (None, layout.world):
        raise UserError(
            f"--nproc: must be {layout.world}, the processes of layout {layout.name}, found {nproc}; leave it out or "
            f"give {layout.world}"
        )
    if timeout is not None and not (math.isfinite(timeout) and timeout >= 0):
        raise UserError(f"--timeout: must be 0 (no limit) or a number of seconds above it, found {timeout:g}")
    return layout


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """The adapter that a model is used with."""
    parser.add_argument(
        "--adapter", metavar="DIR", help="low-rank adapter (LoRA) of this model: trained here, or a PEFT folder"
    )


def add_column_arguments(group: argparse._ActionsContainer, roles: bool = True) -> None:
    """Options for rows under names of their own; ``roles``: the rows may be dialogues, whose speakers have names."""
    messages = ", or of messages --column role=speaker --column content=text" if roles else ""
    group.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=KEY",
        help=f"rows call a part KEY that is read as NAME, e.g. --column question=Q --column answer=A{messages} "
        "(repeatable)",
    )
    if not roles:
        return
    group.add_argument(
        "--role", action="append", default=[], metavar="NAME=ROLE", help="a speaker's own name, e.g. agent=assistant"
    )
    group.add_argument(
        "--dataset-info",
        metavar="FILE",
        help="LLaMA-Factory's dataset_info.json: columns and tags of the entry whose file_name is the input",
    )


def columns_from(args: argparse.Namespace, inputs: Sequence[str], use: str) -> Columns:
    """The rows' own names of their parts. UserError for options and a ``--dataset-info`` that do not fit the rows."""
    given = read_columns(args.column, getattr(args, "role", ()), use, ROLES)
    info = getattr(args, "dataset_info", None)
    if info is None:
        return given
    if given.parts or given.roles:
        raise UserError("--dataset-info: not with --column or --role, which it names itself")
    columns, pairs = dataset_columns(info, row_files(inputs, "rows"))
    if pairs != (use == PREFERENCE):
        raise UserError(
            f"--dataset-info {info}: 'ranking' is {str(pairs).lower()}; pack such rows "
            f"{OPTION[PREFERENCE if pairs else DIALOGUE]}"
        )
    return columns


def columns_unmet(reading: Reading) -> list[str]:
    """A line for each ``--column`` whose key no row had."""
    return [
        f"no row has the key {printable(key, 80)} of --column {name}={printable(key, 80)}"
        for name, key in reading.columns.parts
        if name not in reading.columns_met
    ]


def note_rows(reading: Reading, inputs: Sequence[str], encoding: str | None) -> None:
    """Print a note for each file whose rows are those under a key, and for each ``--column`` whose key no row had."""
    for line in [*under_notes(find_inputs(inputs), encoding or UTF8), *columns_unmet(reading)]:
        print(f"note: {line}", file=sys.stderr)


def add_harness_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every evaluation that the harness runs: the model, its input, and the results."""
    add_checkpoint_arguments(parser)
    for action in parser._actions:
        if action.dest == "backend":
            action.required = False  # or --backends
        elif action.dest == "precision":
            action.default, action.help = (
                None,
                "arithmetic (default: fp32; where two --backends are compared on CPUs, fp64)",
            )
    parser.add_argument(
        "--backends", nargs="+", choices=sorted(backends.BACKENDS), help="several, and their differences item by item"
    )
    add_adapter_argument(parser)
    parser.add_argument("--out", metavar="DIR", help="folder of the results; must be given")
    parser.add_argument("--data", metavar="DIR", help="local data sets instead of the Hugging Face hub; docs say how")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--chat", action="store_true", help="contexts as a user's question in the chat template")
    parser.add_argument("--chat-template", default="auto", metavar="auto|builtin|thinking|FILE", help=TEMPLATE_HELP)
    parser.add_argument("--multiturn", action="store_true", help="with --chat: examples as earlier turns")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: system text")
    parser.add_argument("--add-bos", action="store_true", help="begin every context with <_start>")
    parser.add_argument(
        "--max-len", type=int, metavar="N", help="tokens of context and answer together (default: the trained length)"
    )
    parser.add_argument("--max-running", type=int, default=64, metavar="N", help="sequences computed together (64)")
    parser.add_argument("--cache-tokens", type=int, metavar="N", help="size of the cache (default: 16 full contexts)")
    parser.add_argument("--layout", metavar="TEXT", help="divide the model among processes (tp2, tp2.pp2, ring2)")
    parser.add_argument("--run-unsafe-code", action="store_true", help="let tasks execute code that the model writes")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(rescale="request")


def launch_evaluation(args: argparse.Namespace, plans: Sequence[TaskPlan], include: Sequence[Path]) -> int:
    """Evaluate in the processes of a layout (core.eval.ranks); the launcher's exit code. Their logs are below --out."""
    from telechat_twins.core.eval.ranks import write_job
    from telechat_twins.core.files import ROOT
    from telechat_twins.core.inference.worker import inference_layout
    from telechat_twins.core.launch.launcher import launch

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_job(out / "job.json", args, plans, include)
    world = inference_layout(args.layout).world
    script = ROOT / "convert" / "evaluation_rank.py"  # by its path: it imports this file
    return launch(args.backend, [str(out / "job.json")], world, out / "logs", script=script)


def load_model(
    args: argparse.Namespace,
    need_tokenizer: str | None,
    adapters: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Loaded:
    """core.inference.load.load_model of ``args.checkpoint``: a release, a canonical checkpoint or a run's folder.

    ``adapters``: name -> folder of those that the model is used with. ``verify``: hash the model's files. UserError for
    an adapter of another model.
    """
    from telechat_twins.convert.adapter import open_any_adapter
    from telechat_twins.convert.source import ModelSource, open_model
    from telechat_twins.core.inference import load

    opened: list[ModelSource] = []

    def open_source(path: str) -> ModelSource:
        opened.append(open_model(path, verify))
        return opened[0]

    loaded = load.load_model(args, need_tokenizer, open_source)
    for name, path in (adapters or {}).items():
        adapter = open_any_adapter(path, opened[0])
        for note in adapter.notes:
            print(f"note: {message_line(note)}", file=sys.stderr)
        loaded.adapters[name] = adapter
    return loaded
