"""Which checkpoints of a run are evaluated, by what is written in them, and whether that has been finished."""

from __future__ import annotations

from pathlib import Path

from telechat_twins.core.types import JsonObject

FOLDER = "evaluations"  # of a run; a folder a step below it
DONE = "finished"  # file of a step's folder, once all of it is in the records


def was_due(trainer: JsonObject) -> bool:
    """Whether the run that wrote a checkpoint was to evaluate it (``eval.tasks``, ``eval.samples``): one at
    ``checkpoint.every``, at the run's end, or of the best evaluation of held-out text, but none that a signal or a
    spike caused."""
    config, step = trainer["config"], trainer["step"]
    given = config.get("eval") or {}
    if not (given.get("tasks") or given.get("samples")):
        return False
    every, best = config["checkpoint"]["every"], trainer.get("held_out", {})
    if (every and step % every == 0) or step == config["train"]["steps"]:
        return True
    if given.get("keep_best") and best.get("value") is not None and best["step"] == step:
        return True
    return 0 < given.get("patience", 0) <= best.get("since", 0)


def unfinished_note(checkpoint: Path, due: bool) -> list[str]:
    """A line where a run goes on in another folder from a checkpoint whose own evaluation is left unfinished."""
    if not due or (checkpoint.parent / FOLDER / checkpoint.name / DONE).is_file():
        return []
    return [
        f"note: the tasks or samples of {checkpoint} were not evaluated to the end; this run begins behind it: "
        f"--resume auto with --out {checkpoint.parent} finishes them"
    ]
