"""Evaluation of models.

run        scores on tasks of lm-evaluation-harness; `tele eval --tasks ...` means it, too
iq         scores on the IQ suites of the FLM-101B paper; iq-tasks writes them as a folder of tasks
bpb        bits per byte of texts, by domain and weighted as in the Tele-FLM report
answers    answers to AlignBench's and MT-bench's questions in their formats, and continuations of prompts
teacher    P(true) of propositions and multiple choices with a class token (eFLM): accuracy, log loss, calibration
"""

from __future__ import annotations

import argparse

from telechat_twins.core.commands.eval import answers, bpb, iq, iq_tasks, teacher
from telechat_twins.core.commands.eval import run as harness

ACTIONS = {
    "run": (harness, "scores on tasks of lm-evaluation-harness; the word may be left out"),
    "iq": (iq, "scores on the IQ suites of the FLM-101B paper"),
    "iq-tasks": (iq_tasks, "the IQ suites as a folder of lm-evaluation-harness tasks"),
    "bpb": (bpb, "bits per byte of texts, by domain and weighted"),
    "answers": (answers, "answers to AlignBench's or MT-bench's questions, as their judges read them"),
    "teacher": (teacher, "P(true) of propositions and multiple choices: accuracy, log loss, calibration"),
}
EXAMPLES = """\
examples:
  tele eval --backend pt --checkpoint TeleFLM-52B --tasks open-llm --data datasets --out scores
  tele eval --backends ms pt --checkpoint model --tasks mmlu --limit 100 --out scores
  tele eval teacher --backend pt --checkpoint runs/first propositions.jsonl --out results.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of ``tele eval``, each with its own options."""
    parser.epilog = EXAMPLES
    parser.set_defaults(default_action="run")
    actions = parser.add_subparsers(dest="action", required=True, metavar="{" + ",".join(ACTIONS) + "}")
    for name, (module, summary) in ACTIONS.items():
        module.add_arguments(actions.add_parser(name, help=summary))


def run(args: argparse.Namespace) -> int:
    """The chosen action's exit code."""
    return ACTIONS[args.action][0].run(args)
