"""Run of lm-evaluation-harness's tasks on a model: one task after another, and their results."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telechat_twins.core.backends import install_command
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.local_data import local_data
from telechat_twins.core.eval.presets import PRESETS, TaskPlan
from telechat_twins.core.eval.task_errors import task_errors, unsafe
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from telechat_twins.core.eval.adapter import EngineModel

BOOTSTRAPS = 1000  # for the standard errors of metrics that are not means
UNSAFE = ("humaneval", "mbpp")  # run the code that the model writes
SENTENCES = ("ifeval", "leaderboard_ifeval", "leaderboard")  # count sentences by NLTK's table, which no package has
_TABLE = "punkt_tab"


@dataclass(frozen=True)
class RunOptions:
    """How tasks are run. ``data``: folder of local data sets; ``limit``: items of each task, all by default; ``chat``:
    in the chat template, ``multiturn`` with examples as earlier turns, ``system`` as its system text; ``unsafe``: tasks
    may execute code that the model wrote; ``quiet``: without the harness's progress bars."""

    data: Path | None = None
    limit: int | None = None
    chat: bool = False
    multiturn: bool = False
    system: str | None = None
    unsafe: bool = False
    quiet: bool = False


def require_harness() -> None:
    """UserError where lm-evaluation-harness is not installed, in another version than the adapter is written for, or
    beside packages that it cannot be imported with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        raise UserError(f"lm-evaluation-harness is not installed; run: {install_command('eval')}") from None
    if found.split(".")[:2] != ["0", "4"]:
        raise UserError(f"lm_eval: must be 0.4, found {found}; run: {install_command('eval')}")
    try:
        import datasets  # noqa: F401  # its pyarrow, where it is newer than the extra's, refuses numpy 1.26
    except ImportError as error:
        raise UserError(f"lm_eval: cannot be used here ({error}); run: {install_command('eval')}") from None
    except OSError as error:
        raise UserError(f"lm_eval: cannot be imported here ({error.strerror or error}); free some space") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def plan_tasks(texts: Sequence[str], shots: int | None) -> list[TaskPlan]:
    """The tasks of names and presets, each once; ``shots`` replaces those of a preset."""
    plans: dict[str, TaskPlan] = {}
    for name in (name for text in texts for name in text.split(",") if name):
        for plan in PRESETS.get(name, (TaskPlan(name),)):
            plans.setdefault(plan.name, plan if shots is None else TaskPlan(plan.name, shots, plan.metric))
    if not plans:
        raise UserError(f"--tasks: names at least one task or preset ({', '.join(PRESETS)})")
    return list(plans.values())


def run_task(plan: TaskPlan, model: EngineModel, manager: TaskManager, options: RunOptions) -> JsonObject:
    """The harness's results of one task or group: ``results``, ``samples``, ``n-shot``, ``versions``.

    UserError for data that the task cannot read, with its place where that is known.
    """
    from lm_eval.evaluator import simple_evaluate

    if any(plan.name.startswith(name) for name in UNSAFE) and not options.unsafe:
        raise UserError(unsafe(plan.name))
    if plan.name in SENTENCES:
        _require_sentences(plan.name, options.data)
    with (
        _bars(options.quiet),
        _no_git(),
        warned(plan.name),
        local_data(options.data) as sets,
        task_errors(plan.name, options.data, sets),
    ):
        found = simple_evaluate(
            model=model,
            tasks=[plan.name],
            num_fewshot=plan.shots,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            system_instruction=options.system,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat and options.multiturn,
            task_manager=manager,
            confirm_run_unsafe_code=options.unsafe,
        )
    assert found is not None  # a model of rank 0
    return dict(found)


@contextlib.contextmanager
def warned(name: str) -> Iterator[None]:
    """What numpy says of the harness's own sums, as a note on the task ``name``, once, in place of its lines of code.

    Choices and texts without a character are divided by their length: such a choice never wins by acc_norm, or always
    does where its log-likelihood is 0, too.
    """
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], file: str, *rest: Any) -> None:
        if not issubclass(category, RuntimeWarning) or "lm_eval" not in Path(file).parts:
            former(message, category, file, *rest)
        elif str(message) not in told:
            told.add(str(message))
            why = "; a choice or text of an item holds no character, so scores by length (acc_norm) mean nothing there"
            print(f"note: {name}: {message}{why * ('divide' in str(message))}", file=sys.stderr)

    former = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]  # its last two are optional
        yield


@contextlib.contextmanager
def _no_git() -> Iterator[None]:
    """Keep the harness from asking git for the commit of the working folder, which git refuses on stderr, once a task,
    where there is none; results.json names versions instead."""
    import lm_eval.evaluator as evaluator

    before = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before


def _require_sentences(name: str, data: Path | None) -> None:
    """UserError before anything is generated where NLTK's table is not at hand: the task reads it as it scores, and
    goes on without it until an item needs it."""
    try:
        import nltk
    except ImportError:
        return  # the task's own import is refused by name
    places, folder = nltk.data.path, None if data is None else data / "nltk_data"
    if folder is not None and str(folder) not in places:
        places.insert(0, str(folder))
    for download in (False, data is None):
        if download:
            nltk.download(_TABLE, quiet=True)
        try:
            nltk.data.find(f"tokenizers/{_TABLE}")
            return
        except LookupError:
            continue
    place = "DIR/nltk_data" if folder is None else str(folder)
    raise UserError(
        f"{name}: counts sentences by NLTK's table {_TABLE}, which is not here; unpack it to "
        f"{place}/tokenizers/{_TABLE}{' and give --data DIR' if folder is None else ''}"
    )


@contextlib.contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    """The harness's own bars, which it has no option for, as they are or not at all; never what it prints of standard
    errors between the results."""
    import lm_eval.api.metrics
    import lm_eval.api.model
    import lm_eval.api.task

    modules = (lm_eval.api.model, lm_eval.api.task)
    before = [module.tqdm for module in modules]

    def silent(rows: Iterable[object], **_: object) -> Iterable[object]:
        return rows

    for module in modules if quiet else ():
        module.tqdm = silent
    lm_eval.api.metrics.print = lambda *_: None  # "bootstrapping for stddev" on stdout
    import datasets

    shown = datasets.is_progress_bar_enabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar
        del lm_eval.api.metrics.print
