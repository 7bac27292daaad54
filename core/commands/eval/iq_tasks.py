"""`tele eval iq-tasks`: the IQ suites of the FLM-101B paper as a folder of lm-evaluation-harness tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.iq.items import LANGUAGES, IQOptions
from telechat_twins.core.eval.iq.tasks import write_tasks

DESCRIPTION = "Writes the IQ suites as a folder of lm-evaluation-harness tasks, with the SHA-256 of every item."
EXAMPLES = """\
examples:
  tele eval iq-tasks --out iq-tasks --seed 7
  lm-eval run --include_path iq-tasks --tasks iq --model hf --model_args pretrained=DIR
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele eval iq-tasks``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    add_generator_arguments(parser)


def add_generator_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the generated items."""
    default = IQOptions()
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="of the items (0)")
    parser.add_argument("--size", type=int, metavar="N", help="items of each task (default: the paper's 100 or 300)")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES), help="default: en zh")
    parser.add_argument(
        "--rows", metavar="DIR", help="folder with boolq.jsonl, wic.jsonl, rte.jsonl and others for symbolic mapping"
    )
    parser.add_argument(
        "--shots-a-label", type=int, default=default.shots_a_label, metavar="N", help="of symbolic mapping (2, ours)"
    )
    parser.add_argument(
        "--letters", default=default.letters, metavar="TEXT", help="alphabet of random strings (a to z)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for options and rows that do not make items."""
    names = written(args, Path(args.out))
    print(f"{len(names)} tasks in {args.out}: {', '.join(names)}")
    return 0


def written(args: argparse.Namespace, folder: Path) -> list[str]:
    """Write the folder of the options; the names of its tasks."""
    if args.size is not None and args.size < 1:
        raise UserError(f"--size: must be at least 1, found {args.size}")
    if args.shots_a_label < 1:
        raise UserError(f"--shots-a-label: must be at least 1, found {args.shots_a_label}")
    alone = len(set(args.letters)) == len(args.letters) > 1
    if not alone or any(letter.isspace() for letter in args.letters):
        raise UserError(
            f"--letters: must be two characters or more, each once and none of them a space; found '{args.letters}'"
        )
    options = IQOptions(seed=args.seed, letters=args.letters, shots_a_label=args.shots_a_label)
    return write_tasks(folder, options, args.size, args.languages, Path(args.rows) if args.rows else None)
