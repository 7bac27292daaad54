"""The section `eval` of a run: held-out text, tasks and samples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.schema import option


@dataclass(frozen=True, kw_only=True)
class HeldOutSourceConfig:
    path: str = option(help="folder written by `tele data`, of text that is not trained on")
    name: str | None = option(None, help="in the records; default: the folder's name")

    @property
    def label(self) -> str:
        return self.name or Path(self.path).name


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training (core.train.heldout): loss on held-out text; tasks and samples at checkpoints."""

    sources: list[HeldOutSourceConfig] = option([], help="packed folders to evaluate on, each {path, name}")
    every: int = option(0, help="evaluate after every N steps, and always after the last; 0: only there", min=0)
    batches: int = option(8, help="global batches of each source, always the same rows; or all that it has", min=1)
    metric: str = option(
        "loss", help="what keep_best and patience compare: loss, the mean of the sources, or NAME/bits_per_byte of one"
    )
    keep_best: bool = option(False, help="also keep the checkpoint of the best evaluation, which the file best names")
    patience: int = option(0, help="end the run after N evaluations in a row without a better one; 0: never", min=0)
    tasks: list[str] = option([], help="tasks or presets of `tele eval`, scored at every checkpoint")
    task_data: str | None = option(None, help="folder of the tasks' local data sets, as --data of `tele eval`")
    task_include: list[str] = option([], help="folders of further task files")
    task_limit: int | None = option(None, help="items of each task; default: all", min=1)
    task_shots: int | None = option(None, help="examples in the prompt; default: the preset's or task's", min=0)
    task_layout: str | None = option(None, help="processes that a checkpoint is evaluated in, e.g. tp2; default: one")
    samples: list[str] = option([], help="prompts that every checkpoint continues, greedily")
    sample_tokens: int = option(64, help="tokens of a continuation", min=1)

    def __post_init__(self) -> None:
        labels = [source.label for source in self.sources]
        if len(labels) > 16 or not (labels or self.tasks or self.samples):
            raise UserError(f"eval.sources: must be 1 to 16 folders (or give tasks or samples), found {len(labels)}")
        if not labels and (self.every or self.keep_best or self.patience):
            raise UserError("eval.every, keep_best, patience: need held-out text; give eval.sources, or leave them out")
        if not self.tasks and (self.task_data or self.task_include or self.task_layout):
            raise UserError("eval.task_data, task_include, task_layout: belong to eval.tasks; give its tasks")
        for number, label in enumerate(labels):
            if not re.fullmatch(r"[\w.-]{1,40}", label, re.ASCII) or label in labels[:number]:
                raise UserError(
                    f"eval.sources[{number}].name: must be 1 to 40 letters, digits, '.', '-' or '_' and unlike the "
                    f"others' names, found '{label[:60]}'; give it a name"
                )
        metrics = ["loss", *(f"{label}/{kind}" for label in labels for kind in ("loss", "bits_per_byte"))]
        if self.metric not in metrics:
            raise UserError(f"eval.metric: must be one of {', '.join(metrics)}; found '{self.metric}'")
        if (self.keep_best or self.patience) and not self.every:
            raise UserError("eval.every: must be set, since keep_best and patience compare evaluations; e.g. 100")
