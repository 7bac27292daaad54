"""Scores of tasks and continued prompts at a run's checkpoints (``eval.tasks``, ``eval.samples``).

Each checkpoint is evaluated by processes of its own, `tele eval` and `tele eval answers`, which read it from the disk:
so an evaluation may use any task and layout, cannot damage the run, and is what the command gives later. Training waits
meanwhile. The other ranks wait outside of collectives, so that no rank counts as hung, and all of them agree every
moment whether rank 0 has finished. An evaluation that fails is a warning: training goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from telechat_twins.core.backends import install_command
from telechat_twins.core.config import EvalConfig, RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.launch.command import RANK_VARIABLES
from telechat_twins.core.shown import printable
from telechat_twins.core.train.heldout.due import DONE, FOLDER
from telechat_twins.core.train.metrics import TASKS, Row
from telechat_twins.core.train.run.hooks import Hook, Note
from telechat_twins.core.train.stepper import Stepper
from telechat_twins.core.types import JsonObject

SAMPLES = "samples.jsonl"
GIVEN = "given.json"  # file of a step's folder: what its evaluation was begun with
BACKENDS = {"mindspore": "ms", "pytorch": "pt"}
MOMENT_S = 0.5  # between two looks at an evaluation
SHOWN = 160  # characters of a continuation on the console
Command = Callable[[list[str]], list[str]]  # words of `tele` -> command line


# No preexec_fn: the ranks of a run have many threads, after whose fork no Python should run before an exec.
_BOUND = """\
import sys
from telechat_twins.core.launch.worker import die_with_parent
die_with_parent(int(sys.argv.pop(1)))
from telechat_twins.core.cli import main
sys.exit(main())
"""


def tele(words: list[str]) -> list[str]:
    """The command line of `tele` in this installation, which ends when this process does, even by SIGKILL."""
    return [sys.executable, "-c", _BOUND, str(os.getpid()), *words]


def check_folders(config: RunConfig) -> None:
    """UserError for a folder of ``eval.task_data`` or ``eval.task_include`` that is not there."""
    given = config.eval
    if given is None:
        return
    for key, folders in (("task_data", [given.task_data]), ("task_include", given.task_include)):
        for folder in folders:
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"eval.{key}: {folder}: no such folder; give one that every node sees")


def open_scores(config: RunConfig, out: Path, stepper: Stepper, command: Command = tele) -> list[Hook]:
    """The hook of a run that has tasks or samples to evaluate. UserError where the harness is not installed."""
    given = config.eval
    if given is None or not (given.tasks or given.samples):
        return []
    if given.tasks and command is tele and importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"eval.tasks: lm-evaluation-harness is not installed; run: {install_command('eval')}")
    return [CheckpointScores(config, given, out / FOLDER, stepper, command)]


class CheckpointScores(Hook):
    """Evaluation of every checkpoint of a run, in processes that rank 0 starts."""

    judges = True

    def __init__(self, config: RunConfig, given: EvalConfig, folder: Path, stepper: Stepper, command: Command) -> None:
        self._config, self._eval, self._folder, self._stepper, self._command = config, given, folder, stepper, command
        self._failed = False  # whether a part of the last evaluation did

    def unfinished(self, step: int, due: bool) -> bool:
        folder = self._of(step)
        return self._stepper.rank == 0 and (due or folder.is_dir()) and not (folder / DONE).is_file()

    def judge(self, step: int, checkpoint: Path, note: Note, stopped: Callable[[], bool]) -> Row:
        row: Row = {}
        self._failed = False
        unmade = self._begin(step, checkpoint) if self._stepper.rank == 0 else None
        jobs = [("tasks", self._task_words), ("samples", self._sample_words)]
        for name, words in jobs:
            if not getattr(self._eval, name):
                continue
            problem = self._run(step, name, functools.partial(words, step, checkpoint), stopped, unmade)
            if stopped():
                return row
            if self._stepper.rank == 0:
                read = self._scores if name == "tasks" else self._texts
                try:
                    row |= read(step, note) if problem is None else {}
                except (OSError, ValueError, KeyError) as error:
                    problem = f"{type(error).__name__}: {error}"
                if problem is not None:
                    self._failed = True
                    note(f"warning: step {step}: eval.{name} could not be evaluated ({problem}); training goes on")
        return row

    def _begin(self, step: int, checkpoint: Path) -> str | None:
        """Make the step's folder; the reason where it cannot be made. What `tele eval` would refuse to go on with is
        removed: a part of an evaluation by another backend or other options, as of a run that was resumed with those,
        and a finished one, of a step that a run resumed further back passes again."""
        folder = self._of(step)
        given = json.dumps([self._model_words(checkpoint), dataclasses.asdict(self._eval)], ensure_ascii=False) + "\n"
        before = folder / GIVEN
        try:
            begun = before.is_file() and before.read_text(encoding="utf-8") == given
            if folder.is_dir() and (not begun or (folder / DONE).is_file()):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(before, given)
        except (OSError, UserError) as error:
            return _reason(error)
        return None

    def judged(self, step: int) -> None:
        # What has failed, as on a full disk, is tried again by a run that goes on from here.
        if self._stepper.rank == 0 and not self._failed:
            with contextlib.suppress(OSError, UserError):
                write_text(self._of(step) / DONE, "")

    def _of(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _run(
        self, step: int, name: str, words: Callable[[], list[str]], stopped: Callable[[], bool], problem: str | None
    ) -> str | None:
        """Run one command to its end, on rank 0, unless a ``problem`` keeps it from it; the reason if it fails. All
        ranks return at the same time."""
        log = self._of(step) / f"{name}.log"
        process: subprocess.Popen[bytes] | None = None
        if self._stepper.rank == 0 and problem is None:
            env = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
            try:
                command = self._command(words())
                with open(log, "wb") as file:
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env
                    )
            except (OSError, UserError) as error:
                problem = _reason(error)
        wait = 0.01
        while True:
            running = process is not None and process.poll() is None
            if not self._stepper.agree([float(running)], "max")[0]:
                break
            if stopped():
                break
            time.sleep(wait)
            wait = min(2 * wait, MOMENT_S)
        if process is None:
            return problem
        if process.poll() is None:
            process.terminate()
        code = process.wait()
        return None if code == 0 else f"exit code {code}: {_last_line(log)}; log: {log}"

    def _model_words(self, checkpoint: Path) -> list[str]:
        backend = BACKENDS[self._stepper.implementation().get("backend", "").split()[0].lower()]
        train = self._config.train
        adapter = self._config.lora is not None  # its checkpoint holds the adapter alone
        model = ["--checkpoint", str(train.init), "--adapter", str(checkpoint)] if adapter else ["--checkpoint"]
        model += [] if adapter else [str(checkpoint)]
        return ["--backend", backend, *model, "--precision", train.precision, "--quiet"]

    def _task_words(self, step: int, checkpoint: Path) -> list[str]:
        given = self._eval
        words = ["eval", *self._model_words(checkpoint), "--out", str(self._of(step) / "tasks")]
        options: Sequence[tuple[str, Sequence[object]]] = (
            ("--tasks", given.tasks),
            ("--data", [given.task_data]),
            ("--include", given.task_include),
            ("--limit", [given.task_limit]),
            ("--shots", [given.task_shots]),
            ("--layout", [given.task_layout]),
        )
        for option, values in options:
            kept = [str(value) for value in values if value is not None]
            words += [option, *kept] if kept else []
        return words

    def _sample_words(self, step: int, checkpoint: Path) -> list[str]:
        questions, out = self._of(step) / "prompts.jsonl", self._of(step) / SAMPLES
        rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in self._eval.samples]
        write_text(questions, "".join(rows))
        words = [
            "eval",
            "answers",
            *self._model_words(checkpoint),
            "--format",
            "prompts",
            "--questions",
            str(questions),
        ]
        return [*words, "--out", str(out), "--max-new-tokens", str(self._eval.sample_tokens)]

    def _scores(self, step: int, note: Note) -> Row:
        """The columns of a finished evaluation: each task's score, and its standard error where it has one."""
        results: JsonObject = json.loads((self._of(step) / "tasks" / "results.json").read_text(encoding="utf-8"))
        row: Row = {}
        parts = []
        for name, task in results["tasks"].items():
            if task["score"] is None:
                continue
            metric = str(task["metric"]).partition(",")[0]
            row[f"{TASKS}{name}/{metric}"] = float(task["score"])
            error = task["stderr"]
            if error is not None:
                row[f"{TASKS}{name}/stderr"] = float(error)
            spread = "" if error is None else f" ± {error:.4f}"
            parts.append(f"{name} {metric} {task['score']:.4f}{spread}")
        note(f"tasks after step {step}: " + "; ".join(parts))
        return row

    def _texts(self, step: int, note: Note) -> Row:
        """The continuations, as texts by the number of their prompt; the console shows their beginnings."""
        rows = samples_of(self._of(step))
        for row in rows:
            text = row["text"] if len(row["text"]) <= SHOWN else row["text"][:SHOWN] + " ..."
            note(f"sample after step {step}: {printable(row['prompt'], SHOWN)} -> {printable(text)}")
        return {f"samples/{number}": row["prompt"] + row["text"] for number, row in enumerate(rows)}


def samples_of(folder: Path) -> list[JsonObject]:
    """The rows of a step's continuations, each with ``prompt`` and ``text``; none where there are none."""
    file = folder / SAMPLES
    if not file.is_file():
        return []
    # Not splitlines: a text may hold the line ends of Unicode (U+0085, U+2028), which JSON leaves as they are.
    return [json.loads(line) for line in file.read_bytes().split(b"\n") if line]


def _reason(error: Exception) -> str:
    """An error of a file as a part of a warning."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _last_line(log: Path) -> str:
    """The last line of a log that says something."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        said = [line for line in lines if line]
        if said:
            return printable(said[-1], 300)
    return "it says nothing"
