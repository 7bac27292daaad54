"""`tele eval iq`: the IQ suites of the FLM-101B paper, generated and scored."""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_twins.core.commands.eval.iq_tasks import add_generator_arguments, written
from telechat_twins.core.commands.options import add_harness_arguments, launch_evaluation, load_model
from telechat_twins.core.eval.harness import require_harness
from telechat_twins.core.eval.iq.tasks import plans
from telechat_twins.core.eval.session import check_options, evaluate, require_out

DESCRIPTION = """\
The IQ suites of the FLM-101B paper (section 5): counting, two replacements, head and tail, full repeating, head
slicing, key retrieval, bAbI 1 and 2, and with --rows symbolic mapping over SuperGLUE and CLUE. Items are generated
from --seed, the same on every machine; what the paper leaves open has defaults of ours.
"""
EXAMPLES = """\
examples:
  tele eval iq --backend pt --checkpoint runs/first --out scores-iq
  tele eval iq --backends ms pt --checkpoint model --languages en --size 50 --rows clue-and-superglue --out scores-iq
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele eval iq``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_harness_arguments(parser)
    add_generator_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError as ``tele eval``. The tasks are written to --out once, and used again where it goes on."""
    names = check_options(args)
    require_harness()
    require_out(args)
    folder = Path(args.out) / "iq-tasks"
    written(args, folder)
    tasks = [file.stem for file in sorted(folder.glob("iq_*.yaml"))]
    return evaluate(args, names, plans(tasks), [folder], load_model, launch_evaluation)
