"""Checks of what a run will evaluate at its checkpoints (``eval.tasks``, ``eval.samples``), before it is launched: the
first checkpoint may be hours away."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from telechat_twins.core.config import RunConfig
from telechat_twins.core.data.blend import Blend
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files import IMPORT_ROOT
from telechat_twins.core.inference.worker import inference_layout

MODULE = "telechat_twins.core.eval.beforehand"
OPTIONS = {"--tasks: ": "eval.tasks: ", "--include ": "eval.task_include: ", "--layout: ": "eval.task_layout: "}


def check_evaluations(config: RunConfig, blend: Blend) -> None:
    """UserError, naming the key, for a layout, a task or a prompt with which every evaluation would fail.

    ``blend``: the data that is trained on, whose tokenizer the checkpoints get."""
    given = config.eval
    if given is None:
        return
    if given.task_layout is not None:
        try:
            inference_layout(given.task_layout)
        except UserError as error:
            raise UserError(f"eval.task_layout: {_by_keys(str(error))}") from None
    if given.samples:
        _check_samples(given.samples, config.model.training_seqlen, blend)
    if given.tasks and importlib.util.find_spec("lm_eval") is not None:  # the ranks say that it is missing
        _check_tasks(given.tasks, given.task_include)


def _check_samples(samples: list[str], longest: int, blend: Blend) -> None:
    tokenizer = load_tokenizer(blend.sources[0].path / blend.tokenizer_name, control="none")
    for number, text in enumerate(samples):
        count = len(tokenizer.encode(text))
        if not 1 <= count < longest:
            raise UserError(
                f"eval.samples[{number}]: must have 1 to {longest - 1} tokens, since the model reads "
                f"model.training_seqlen {longest} with the continuation, found {count}; give another prompt"
            )


def _check_tasks(tasks: list[str], include: list[str]) -> None:
    """In a process of its own: the harness takes hundreds of megabytes, and a launcher stays as long as its run."""
    words = [sys.executable, "-m", MODULE, json.dumps([tasks, [str(Path(folder).resolve()) for folder in include]])]
    done = subprocess.run(words, cwd=IMPORT_ROOT, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode == 2:
        raise UserError(_by_keys(done.stderr.strip().splitlines()[-1]))


def _by_keys(text: str) -> str:
    """A message of `tele eval` with the run's keys in place of the options."""
    for option, key in OPTIONS.items():
        if text.startswith(option):
            return key + text.removeprefix(option)
    return text


def _main(tasks: list[str], include: list[str]) -> int:
    """Exit code 2, with a line on stderr, for tasks that are not known. Whatever else goes wrong is for the evaluation
    to say."""
    from telechat_twins.core.eval.harness import plan_tasks
    from telechat_twins.core.eval.task_index import open_tasks

    try:
        open_tasks(plan_tasks(tasks, None), [Path(folder) for folder in include])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(*json.loads(sys.argv[1])))
