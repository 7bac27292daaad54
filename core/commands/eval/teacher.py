"""`tele eval teacher`: how well a model tells true propositions from false ones."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from telechat_twins.core.commands.options import (
    add_adapter_argument,
    add_checkpoint_arguments,
    add_column_arguments,
    columns_from,
    load_model,
    note_rows,
)
from telechat_twins.core.data.forms.streams import UTF8, check_encoding
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.table import KINDS, TEACHER
from telechat_twins.core.data.packing.teacher import FALSE_PIECE, TRUE_PIECE, class_tokens
from telechat_twins.core.data.prepare import noticed, progress_bar
from telechat_twins.core.data.rows import row_files, skipped_inputs, total_bytes
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.inference.engine import EngineLimits
from telechat_twins.core.inference.generation import note_length
from telechat_twins.core.inference.teacher import class_odds, pages_needed, read_teacher_rows, teacher_report
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

DESCRIPTION = """\
Probability that a model gives the class token of what is true, against that of what is false, after each proposition
(eFLM, FLM-101B paper section 2.2): P(true) = softmax over the logits of the two class tokens.

FILES are those of `tele data --teacher`. A proposition is right when P(true) is above 0.5 just where it is true; a
multiple choice when its true choice has the highest P(true) (a tie is wrong).
"""
EXAMPLES = """\
examples:
  tele eval teacher --backend pt --checkpoint runs/first propositions.jsonl --out results.json
  tele eval teacher --backend ms --checkpoint model --adapter runs/teacher-lora 'tests/*.csv' --kind choice
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele eval teacher``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "files", nargs="+", metavar="FILES", help="files, folders or quoted patterns of rows, as for `tele data`"
    )
    add_checkpoint_arguments(parser)
    add_adapter_argument(parser)
    parser.add_argument(
        "--true-token", default=TRUE_PIECE, metavar="PIECE", help=f"class token of what is true ({TRUE_PIECE})"
    )
    parser.add_argument(
        "--false-token", default=FALSE_PIECE, metavar="PIECE", help=f"class token of what is false ({FALSE_PIECE})"
    )
    kinds = [name for name, kind in KINDS.items() if kind.use == TEACHER]
    parser.add_argument("--kind", choices=kinds, help="what every row is (default: judged by the keys of each row)")
    add_column_arguments(parser, roles=False)
    parser.add_argument("--encoding", default=UTF8, metavar="NAME", help="of text files, e.g. gb18030 (default: utf-8)")
    parser.add_argument(
        "--ignore-key", action="append", default=[], metavar="NAME", help="leave this key of rows out (repeatable)"
    )
    parser.add_argument("--out", metavar="F", help="write all figures, P(true) of every row among them, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    # A proposition is a plain text: no chat layout is read, and its length is known before it is computed.
    parser.set_defaults(chat_template=None, rescale="request")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for options, files and a model that do not go together."""
    check_encoding(args.encoding)
    if args.out is not None:
        writable_file(args.out, "--out")
    for note in skipped_inputs(args.files, rows=True):
        print(f"note: {note}", file=sys.stderr)
    files = row_files(args.files, "propositions")
    columns = columns_from(args, args.files, TEACHER)
    model = load_model(args, "a proposition", {} if args.adapter is None else {"": args.adapter})
    assert model.tokenizer is not None  # load_model refuses a checkpoint without one
    tokens = class_tokens(model.tokenizer, args.true_token, args.false_token)
    reading = Reading(frozenset(args.ignore_key), kind=args.kind, columns=columns)
    with progress_bar("reading", total_bytes(files), args.quiet) as bar:
        rows = read_teacher_rows(files, model.tokenizer, reading, args.encoding, bar.update)
    note_rows(reading, args.files, args.encoding)
    if reading.left_out:
        names = printable(", ".join(sorted(reading.left_out)), 400)
        print(f"note: keys that hold no proposition are left out: {names}", file=sys.stderr)
    sequences = list(chain.from_iterable(row.ids for row in rows))
    longest = max(map(len, sequences)) + 1
    note_length(model.config, longest)
    engine = model.engine_with(pages_needed(sequences), EngineLimits(max_len=longest))
    with tqdm(total=len(sequences), desc="evaluating", unit="text", disable=args.quiet, delay=1.0) as bar:
        odds = class_odds(engine.runner, sequences, tokens, len(model.adapters), bar.update)
    report = teacher_report(rows, odds)
    print(
        f"class tokens: true {tokens.true_piece} = {tokens.true}, false {tokens.false_piece} = {tokens.false}",
        *table(report),
        sep="\n",
    )
    if args.out is not None:
        settings = ("backend", "checkpoint", "adapter", "precision", "quantize")
        pieces = [tokens.true_piece, tokens.false_piece]
        facts = {
            **{name: getattr(args, name) for name in settings},
            "files": [str(file) for file in files],
            "class_tokens": {"true": tokens.true, "false": tokens.false, "pieces": pieces},
            **noticed(reading),
        }
        write_text(Path(args.out), json.dumps({**facts, **report}, ensure_ascii=False, indent=2) + "\n")
    return 0


def table(report: JsonObject) -> list[str]:
    """The lines of a report: accuracy and log loss, then the bins of the calibration that are not empty."""
    lines = [f"{'':<20}{'rows':>8}{'accuracy':>10}{'log loss':>10}"]
    for title, name in (
        ("propositions", "propositions"),
        ("multiple choices", "choices"),
        ("all as propositions", "all"),
    ):
        part = report[name]
        if part["rows"]:
            chance = f"   (by chance {part['chance']:.4f})" if "chance" in part else ""
            lines.append(f"{title:<20}{part['rows']:>8}{part['accuracy']:>10.4f}{part['log_loss']:>10.4f}{chance}")
    lines.append(
        f"{'P(true)':<20}{'rows':>8}{'mean':>10}{'true':>10}   (calibration error "
        f"{report['all']['calibration_error']:.4f})"
    )
    for one in report["all"]["calibration"]:
        if one["rows"]:
            span = f"{one['low']:.1f} to {one['high']:.1f}"
            lines.append(f"{span:<20}{one['rows']:>8}{one['p_true']:>10.4f}{one['share_true']:>10.4f}")
    return lines
