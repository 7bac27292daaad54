"""`tele eval answers`: answers to the questions of AlignBench or MT-bench, or continuations of plain prompts."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm

from telechat_twins.core.commands.options import (
    TEMPLATE_HELP,
    add_adapter_argument,
    add_checkpoint_arguments,
    load_model,
)
from telechat_twins.core.data.chat_layout import require_layout
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.answers.formats import FORMATS, Question, read_questions
from telechat_twins.core.eval.answers.run import Asking, answer_all, write_answers
from telechat_twins.core.eval.identity import identity_of
from telechat_twins.core.eval.journal import Journal
from telechat_twins.core.eval.scorer import Scorer
from telechat_twins.core.inference.engine import EngineLimits
from telechat_twins.core.inference.generation import note_length
from telechat_twins.core.inference.load import Loaded
from telechat_twins.core.inference.requests import turn_stops
from telechat_twins.core.launch.run_lock import hold_place

DESCRIPTION = """\
Answers of a model to a file of questions, in the format that the benchmark's own judge reads; judging needs a judge
model and is left to those repositories. alignbench: data/data_release.jsonl of AlignBench, answered in the chat
template; --out goes to its model_answer folder. mt-bench: question.jsonl of FastChat's llm_judge, both turns; --out
goes to data/mt_bench/model_answer. prompts: rows {"prompt": ...} or a text file with a prompt a line, continued as
text. Temperatures are those of each benchmark by category; what is interrupted continues with the same command.
"""
EXAMPLES = """\
examples:
  tele eval answers --backend pt --checkpoint TeleChat2-7B --format alignbench --questions data_release.jsonl \\
    --out model_answer/TeleChat2-7B.jsonl
  tele eval answers --backend ms --checkpoint runs/sft --format mt-bench --questions question.jsonl \\
    --out data/mt_bench/model_answer/sft.jsonl --precision bf16
  tele eval answers --backend pt --checkpoint runs/first --format prompts --questions prompts.txt --out texts.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele eval answers``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_checkpoint_arguments(parser)
    add_adapter_argument(parser)
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the questions and the answers")
    parser.add_argument("--questions", required=True, metavar="FILE", help="the benchmark's questions, JSON lines")
    parser.add_argument(
        "--out", required=True, metavar="F", help="the answer file; judges take its name as the model's"
    )
    parser.add_argument("--model-id", metavar="NAME", help="the model's name in the rows (default: that of --out)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (1024; of a continuation 128)")
    parser.add_argument("--choices", type=int, default=1, metavar="N", help="mt-bench: answers to each question (1)")
    parser.add_argument("--temperature", type=float, metavar="T", help="of every question (default: by category)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first choice; the next has N + 1 (0)")
    parser.add_argument("--system", metavar="TEXT", help="system text of chats (default: the template's own)")
    parser.add_argument("--chat-template", default="auto", metavar="auto|builtin|thinking|FILE", help=TEMPLATE_HELP)
    parser.add_argument("--add-bos", action="store_true", help="begin every prompt with <_start>")
    parser.add_argument(
        "--max-len", type=int, metavar="N", help="tokens of prompt and answer together (default: the trained length)"
    )
    parser.add_argument("--max-running", type=int, default=64, metavar="N", help="questions computed together (64)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(rescale="request")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for options, questions and a model that do not go together."""
    form, out = FORMATS[args.format], Path(args.out)
    _check_options(args)
    model_id = args.model_id or out.stem
    questions = read_questions(Path(args.questions), form, args.limit)
    if not form.chat:
        args.chat_template = None  # no chats, so a template that cannot be used is no obstacle
    model = load_model(args, "a question", {} if args.adapter is None else {"": args.adapter})
    asking = _asking(args, model)
    for question in questions:  # before weights are read
        asking.request(question, (), 0, 0)
    note_length(model.config, asking.max_len)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Judges take every .jsonl in the folder for a model's answers.
    journal_file = out.with_name(f".{out.stem}.journal")
    total = args.choices * sum(len(question.turns) for question in questions)
    with hold_place(args.out, f"--out {args.out}"), Journal(journal_file, identity_of(args, model)) as journal:
        if journal.earlier:
            print(f"note: {journal.earlier} answers of an earlier run are used again", file=sys.stderr)
        limits = EngineLimits(max_len=asking.max_len, max_running=args.max_running)
        engine = model.engine_with(model.pages(asking.max_len, _together(args, questions)), limits)
        scorer = Scorer(engine, len(model.adapters))
        with tqdm(total=total, desc="answers", disable=args.quiet, delay=1.0) as bar:
            made = answer_all(questions, asking, scorer, journal, lambda: bar.update(1))
        write_answers(out, questions, made, form, model_id)
    empty = sum(not text for choices in made for turns in choices for text in turns)
    blank = f"; {empty} of them are empty" if empty else ""
    print(f"{out}: {total} answers to {len(questions)} questions{blank}")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    for name in ("limit", "max_new_tokens", "max_len", "max_running", "choices"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {value}")
    form = FORMATS[args.format]
    if args.choices > 1 and not form.several:
        raise UserError(f"--choices: the format of {form.name} holds one answer a question; leave it out")
    if args.system and not form.chat:
        raise UserError("--system: belongs to chats, and prompts are continued as text; leave it out")
    if args.temperature is not None and not 0 <= args.temperature <= 100:
        raise UserError(f"--temperature: must be from 0 to 100, found {args.temperature:g}")
    if args.seed < 0:
        raise UserError(f"--seed: must be at least 0, found {args.seed}")
    if not re.fullmatch(r"[^/\x00-\x1f]{1,200}", args.model_id or Path(args.out).stem):
        raise UserError("--model-id: must be 1 to 200 characters without '/', found something else; give a name")


def _asking(args: argparse.Namespace, model: Loaded) -> Asking:
    form = FORMATS[args.format]
    assert model.tokenizer is not None  # load_model refuses a checkpoint without one
    return Asking(
        form=form,
        tokenizer=model.tokenizer,
        layout=require_layout(model.tokenizer, model.layout) if form.chat else None,
        max_len=args.max_len or model.config.training_seqlen,
        stop_ids=turn_stops(model.tokenizer, model.config) if form.chat else model.config.stop_ids,
        max_new=args.max_new_tokens or form.max_new,
        bos=model.config.bos_token_id if args.add_bos else None,
        choices=args.choices,
        seed=args.seed,
        temperature=args.temperature,
        system=args.system,
    )


def _together(args: argparse.Namespace, questions: list[Question]) -> int:
    """Full contexts that the cache holds."""
    return max(1, min(16, args.max_running, args.choices * len(questions)))
