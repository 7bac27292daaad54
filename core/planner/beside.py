"""What a run does beside its steps, as `tele plan --config` says it: counted, or named as not counted."""

from __future__ import annotations

from telechat_twins.core.config import EvalConfig, RunConfig
from telechat_twins.core.types import JsonObject


def whole_logits(run: RunConfig) -> bool:
    """Whether the loss reads all logits at once or weighs tokens, so that a frozen head's is not computed by rows."""
    sources = [*run.data.sources, *(one for stage in run.train.stages or () for one in stage.sources or ())]
    return run.preference is not None or any(one.loss_weight != 1.0 for one in sources)


def with_reference(run: RunConfig, flops: JsonObject, whole: float) -> JsonObject:
    """``flops`` a token with those of a reference model that runs in every step: a forward pass of the base, a third of
    the ``whole`` operations of training it."""
    if run.preference is None or run.preference.reference != "live":
        return flops
    total = flops["total"] + whole / 3.0
    return {**{name: size for name, size in flops.items() if name != "total"}, "reference": whole / 3.0, "total": total}


def beside(run: RunConfig) -> tuple[list[str], JsonObject]:
    """Lines and JSON of what a run does beside its steps. What is counted needs no more memory at once than a step."""
    lines: list[str] = []
    found: JsonObject = {}
    if run.preference is not None:
        found["reference"] = run.preference.reference
        when = {
            "live": "a forward pass of the base in every step",
            "once": "one forward pass of all pairs before step 1",
        }
        lines.append(f"preference: two rows a pair; the reference is {when[run.preference.reference]}")
    evaluation = run.eval
    if evaluation is not None and evaluation.sources:
        found["evaluation"] = _evaluation(evaluation, run.train.steps)
        rounds, share = found["evaluation"]["rounds"], found["evaluation"]["share_of_the_steps_operations"]
        often = "time and again" if rounds is None else f"{rounds:,} time{'s' if rounds > 1 else ''}"
        more = "" if share is None else f", {share:.2%} of the steps' operations beside them"
        lines.append(
            f"eval.sources: forward passes of at most {found['evaluation']['global_batches']:,} global batches, "
            f"{often}{more}"
        )
    given = {
        "eval.tasks": evaluation and evaluation.tasks,
        "eval.samples": evaluation and evaluation.samples,
        "train.record_every": run.train.record_every,
        "train.profile": run.train.profile,
        "checkpoint.every": run.checkpoint.every,
    }
    found["not_counted"] = left = [name for name, value in given.items() if value]
    if left:
        lines.append(f"not counted, neither time nor the host's memory: {', '.join(left)}")
    return lines, found


def _evaluation(evaluation: EvalConfig, steps: int) -> JsonObject:
    """``steps``: 0 where they follow from data that is not packed yet."""
    every = evaluation.every
    rounds = 1 if not every else -(-steps // every) if steps else None
    batches = evaluation.batches * len(evaluation.sources)
    share = rounds * batches / (3.0 * steps) if rounds is not None and steps else None  # forward is a third of a step
    return {"rounds": rounds, "global_batches": batches, "share_of_the_steps_operations": share}
