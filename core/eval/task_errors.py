"""Errors of a task over data of another schema, as one line that names file, line and field.

A task's templates and functions run inside the harness, which lets their exceptions through. Which row they were about
is in the frames of the traceback: the harness and its tasks call a row ``doc``.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.local_data import LocalSets
from telechat_twins.core.types import JsonObject

_OURS = "telechat_twins."  # an error inside the model is not the data's
_TOO_FEW = re.compile(r"samples requested exceeds the \d+|[Ss]ample larger than population|no documents available for")
_MARKED_UNSAFE = "which is marked as unsafe"  # the harness's words for a task file with `unsafe_code: true`
_EVALUATOR = "lm_eval.evaluator"
_TASK, _FACTORY = "lm_eval.api.task", "lm_eval.tasks._factory"
_STEPS = ("doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "process_results")


class _OutOfRange(logging.Handler):
    """Refusal of a right answer that is not among the choices: the harness only warns, and counts the item as wrong."""

    def emit(self, record: logging.LogRecord) -> None:
        if "Label index was not" in record.getMessage():
            raise ValueError("the right answer is not among the choices")


@contextlib.contextmanager
def _labels_judged() -> Iterator[None]:
    logger, handler = logging.getLogger("lm_eval.api.task"), _OutOfRange(logging.WARNING)
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextlib.contextmanager
def task_errors(name: str, data: Path | None, sets: LocalSets) -> Iterator[None]:
    """UserError in place of what a task raises over data of another schema, or over a data set that is not there."""
    try:
        with _labels_judged():
            yield
    except UserError:
        raise
    except ImportError as error:
        if "(from YAML in " in str(error):  # the harness's words for a !function whose file it cannot import
            raise UserError(f"{name}: {str(error)[:300]}; put that .py file beside the task file") from None
        raise UserError(
            f"{name}: needs a Python module that is not installed ({error}); install it, or the extra of lm_eval that "
            "has it, e.g. lm_eval[ifeval]"
        ) from None
    except (ConnectionError, FileNotFoundError) as error:
        where = "" if data is None else f" below --data {data}"
        raise UserError(
            f"{name}: its data set or metric cannot be read{where} ({str(error)[:120]}); give local copies with --data"
        ) from None
    except Exception as error:
        if _MARKED_UNSAFE in str(error):
            raise UserError(unsafe(name)) from None
        if _TOO_FEW.search(str(error)):
            raise UserError(
                f"{name}: there are fewer rows to give as examples than the task wants; give a smaller --shots, or "
                "more rows in the split that it takes them from"
            ) from None
        found = _row_of(error.__traceback__, sets)
        if found is None and _inside(error.__traceback__, _FACTORY):
            what = _said(error)
            raise UserError(f"{name}: the harness cannot make a task of its file ({what}); correct the file") from None
        inside = [_inside(error.__traceback__, module) for module in (_EVALUATOR, _OURS + "core.eval.adapter")]
        if found is None and inside == [True, False]:
            raise UserError(
                f"{name}: the harness cannot run it ({_said(error)}); correct its file, functions or filters"
            ) from None
        if found is None:
            raise
        doc, place, step, template = found
        problem = _problem(error, doc, step, template)
        if "not among the choices" in problem and re.search(r"\.[ct]sv(\.\w+)?:\d+$", place or ""):
            problem += "; cells of such a table are texts, write .jsonl with whole numbers"
        raise UserError(f"{place or name}: {problem} (task {name})") from None


def unsafe(name: str) -> str:
    """What is said of a task that needs --run-unsafe-code."""
    return f"{name}: executes code that the model writes; in a sandbox, add --run-unsafe-code"


def _row_of(trace: TracebackType | None, sets: LocalSets) -> tuple[JsonObject, str | None, str, str] | None:
    """The row in the innermost frame that has one, with its place, the task's step and that step's template."""
    found: tuple[JsonObject, str | None] | None = None
    step = template = ""
    while trace is not None:
        frame = trace.tb_frame
        inside = frame.f_globals.get("__name__", "")
        if inside.startswith(_OURS + "core.eval.adapter"):
            return None
        # With its first row the harness tries a task's templates out as it builds the task.
        doc = frame.f_locals.get("test_doc" if inside == _TASK else "doc", frame.f_locals.get("doc"))
        if isinstance(doc, Mapping) and inside != "lm_eval.evaluator":
            row = dict(doc)
            place = sets.place_of(row)
            if place is not None or found is None or found[1] is None:
                found = row, place
        if frame.f_code.co_name in _STEPS:
            step = frame.f_code.co_name
            template = str(getattr(getattr(frame.f_locals.get("self"), "config", None), step, None) or "")
        trace = trace.tb_next
    return None if found is None else (*found, step, template)


def _said(error: Exception) -> str:
    """What is wrong with a task's file. Of an unknown metric the harness says no name."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    metric = trace.tb_frame.f_locals.get("metric_name") if trace is not None else None
    if isinstance(error, KeyError) and error.args == (None,) and metric:
        return f"it knows no metric '{metric}'"
    if isinstance(error, IndexError) and "out of bounds for size 0" in str(error):
        return "no row is left of its split; see process_docs"
    return f"{type(error).__name__}: {str(error.args[0] if isinstance(error, KeyError) else error)[:200]}"


def _inside(trace: TracebackType | None, module: str) -> bool:
    """Whether an error passed through a module, such as _FACTORY, which makes a task of its file."""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == module:
            return True
        trace = trace.tb_next
    return False


def _problem(error: Exception, doc: JsonObject, step: str, template: str) -> str:
    """What does not fit, with the field."""
    has = ", ".join(map(str, doc))[:120]
    missing = re.match(r"'(.+?)' is undefined|'.*' has no attribute '(.+?)'", str(error))
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return f"lacks the field '{error.args[0]}', which the task uses; the row has {has}"
    if missing is not None:
        return f"lacks the field '{missing[1] or missing[2]}', which the task uses; the row has {has}"
    used = [name for name in map(str, doc) if re.search(rf"\b{re.escape(name)}\b", template)] or list(map(str, doc))
    values = ", ".join(f"{name} = {str(doc[name])[:40]!r}" for name in used[:4])
    return f"its {step or 'row'} does not fit the task ({str(error)[:120] or type(error).__name__}); it has {values}"
