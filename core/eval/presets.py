"""Suites of the founding documents: tasks with their shots and metrics, and the published scores.

Sources: the Open LLM and OpenCompass tables of the Tele-FLM release, and the table of the TeleChat2 release. Shots of
C-Eval, CMMLU, C3, CHID and CSL are ours, since the documents do not say; those of MBPP and IFEval are the harness's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskPlan:
    """A task of the harness. ``shots`` None: as the task's own file has them; ``metric``: which of its metrics is the
    score; ``published``: scores in per cent by model."""

    name: str
    shots: int | None = None
    metric: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)


def _flm(score: float) -> Mapping[str, float]:
    return {"Tele-FLM": score}


def _telechat(score: float) -> Mapping[str, float]:
    return {"TeleChat2-115B": score}


PRESETS: dict[str, tuple[TaskPlan, ...]] = {
    "open-llm": (
        TaskPlan("arc_challenge", 25, "acc_norm", _flm(59.47)),
        TaskPlan("hellaswag", 10, "acc_norm", _flm(82.25)),
        TaskPlan("mmlu", 5, "acc", _flm(64.00)),
        TaskPlan("truthfulqa_mc2", 0, "acc", _flm(43.09)),
        TaskPlan("winogrande", 5, "acc", _flm(79.40)),
        TaskPlan("gsm8k", 5, "exact_match", _flm(45.19)),
        TaskPlan("humaneval", 0, "pass@1", _flm(34.76)),
        TaskPlan("bbh", 3, "exact_match", _flm(44.60)),
    ),
    "telechat2": (
        TaskPlan("ceval-valid", 5, "acc", _telechat(86.9)),
        TaskPlan("mmlu", 5, "acc", _telechat(80.9)),
        TaskPlan("cmmlu", 5, "acc", _telechat(89.94)),
        TaskPlan("gsm8k", 5, "exact_match", _telechat(92.2)),
        TaskPlan("humaneval", 0, "pass@1", _telechat(75.0)),
        TaskPlan("bbh", 3, "exact_match", _telechat(89.04)),
        TaskPlan("mbpp", None, "pass_at_1", _telechat(78.0)),
        TaskPlan("ifeval", None, "prompt_level_strict_acc", _telechat(82.81)),
    ),
    "teleflm-zh": (
        TaskPlan("ceval-valid", 5, "acc", _flm(65.48)),
        TaskPlan("cmmlu", 5, "acc", _flm(66.98)),
        TaskPlan("c3", 0, "acc", _flm(66.25)),
        TaskPlan("chid", 0, "acc", _flm(92.57)),
        TaskPlan("csl", 0, "acc", _flm(64.38)),
    ),
}
