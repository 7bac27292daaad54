"""A search's result as JSON and text: the best plan, why the others lose, and the configuration that trains it."""

from __future__ import annotations

import dataclasses

from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.planner.search.question import Found, Plan, Question, TooLarge
from telechat_twins.core.types import JsonObject

GIB = 2**30


def described(question: Question, found: Found) -> JsonObject:
    """The result as JSON."""
    return {
        "devices": question.devices,
        "machine": question.machine.name,
        "seq_len": question.seq_len,
        "global_batch": question.global_batch,
        "precision": question.precision,
        "limit_bytes": question.limit,
        "considered": found.considered,
        "timed": found.timed,
        "too_large": found.too_large,
        "plans": [_plan(plan, found.plans[0]) for plan in found.plans],
        "faster_but_too_large": [_large(one) for one in found.large],
    }


def text(question: Question, found: Found, model: str) -> list[str]:
    """The result in lines."""
    lines = [
        f"{model} on at most {counted(question.devices, 'device')} of {question.machine.title}: "
        f"{counted(question.global_batch, 'sequence')} of {question.seq_len:,} tokens a step, {question.precision}",
        f"{found.considered:,} legal plans; {found.timed:,} simulated, the rest ruled out by bounds on time, or by an "
        f"estimate of memory above {question.limit / GIB:.1f} GiB",
        "",
    ]
    if not found.plans:
        return [*lines, *_none(found), *_large_lines(found, "too large")]
    best = found.plans[0]
    titles = ("plan", "devices", "micro", "recompute", "s a step", "MFU", "bubble", "waits", "GiB")
    lines.append("  " + _ROW.format(*titles))
    for plan in found.plans:
        lines.append("  " + _row(plan))
    if len(found.plans) > 1:
        lines += ["", f"why the others lose to {best.layout.name}, in seconds of a step"]
        lines += [f"  {plan.layout.name:<34}{', '.join(reasons(plan, best))}" for plan in found.plans[1:]]
    return [*lines, *_large_lines(found, "perhaps faster, but too large"), "", *snippet(question, best)]


def counted(number: int, noun: str) -> str:
    """ "1 device", "2 devices"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def reasons(plan: Plan, best: Plan) -> list[str]:
    """Where a plan spends more than the best, the largest first; where it spends less is left out."""
    mine, theirs = _spent(plan), _spent(best)
    more = {name: mine[name] - theirs[name] for name in mine}
    least = 5e-4 * best.time.seconds
    largest = sorted(more.items(), key=lambda one: -one[1])
    found = [f"{name} +{extra:.3g}" for name, extra in largest if extra > least]
    if plan.layout.world < best.layout.world:
        fewer = best.layout.world - plan.layout.world
        found.append(f"{counted(fewer, 'device')} fewer")
    return [f"{plan.time.seconds - best.time.seconds:+.3g} in all", *found]


def snippet(question: Question, plan: Plan) -> list[str]:
    """The configuration of a plan as the YAML of a run, and the options that give it to `tele train`."""
    work, layout = plan.work, plan.layout
    default = Layout()
    axes = {
        field.name: getattr(layout, field.name)
        for field in dataclasses.fields(Layout)
        if getattr(layout, field.name) != getattr(default, field.name)
    }
    return [
        "in a run's YAML",
        f"  data: {{seq_len: {work.seq_len}}}",
        f"  train: {{global_batch: {question.global_batch}, micro_batch: {work.micro_batch}, "
        f"precision: {work.precision}, recompute: {work.recompute}}}",
        f"  parallel: {{{', '.join(f'{name}: {value}' for name, value in axes.items())}}}",
        f"or: tele train --config F --layout {layout.name} --set data.seq_len={work.seq_len} "
        f"train.global_batch={question.global_batch} train.micro_batch={work.micro_batch} "
        f"train.precision={work.precision} train.recompute={work.recompute}",
    ]


_ROW = "{:<34}{:>8}{:>7}{:>11}{:>10}{:>8}{:>8}{:>8}{:>7}"


def _row(plan: Plan) -> str:
    time, work = plan.time, plan.work
    return _ROW.format(
        plan.layout.name,
        plan.layout.world,
        work.micro_batch,
        work.recompute,
        f"{time.seconds:.4g}",
        f"{time.mfu:.1%}",
        f"{time.bubble:.1%}",
        f"{sum(time.exposed.values()) / time.seconds:.1%}",
        f"{plan.memory.total / GIB:.1f}",
    )


def _spent(plan: Plan) -> dict[str, float]:
    """Seconds of a step by what they go to."""
    parts = plan.time.breakdown
    return {
        "products and attention": parts["matmul"] + parts["attention"],
        "elementwise": parts["elementwise"],
        "waiting for tp": parts["tp"],
        "waiting for cp": parts["cp"],
        "waiting for dp": parts["dp"],
        "pipeline (bubble, messages)": parts["pipeline"] + parts["pp"],
        "optimizer": parts["optimizer"],
    }


def _plan(plan: Plan, best: Plan) -> JsonObject:
    time = plan.time
    return {
        "layout": plan.layout.name,
        "parallel": dataclasses.asdict(plan.layout),
        "devices": plan.layout.world,
        "micro_batch": plan.work.micro_batch,
        "micro_batches": plan.work.micro_batches,
        "recompute": plan.work.recompute,
        "seconds": time.seconds,
        "interval": [time.low, time.high],
        "tokens_per_s": time.tokens_per_s,
        "tokens_per_s_per_device": time.tokens_per_s_per_device,
        "mfu": time.mfu,
        "bubble": time.bubble,
        "exposed_seconds": dict(time.exposed),
        "memory_bytes": {**plan.memory.uses, "total": plan.memory.total},
        "loses": [] if plan is best else reasons(plan, best),
    }


def _large(one: TooLarge) -> JsonObject:
    return {
        "layout": one.layout.name,
        "micro_batch": one.work.micro_batch,
        "recompute": one.work.recompute,
        "at_least_seconds": one.bound,
        "at_least_bytes": one.needed,
    }


def _none(found: Found) -> list[str]:
    """What to do where no plan fits."""
    if found.least is None:
        return ["none is legal: give more --devices, or a --global-batch with more divisors"]
    least = found.least
    return [
        f"none fits; the smallest, {least.layout.name} with recompute {least.work.recompute}, needs at least "
        f"{least.needed / GIB:.1f} GiB: give more --devices, a shorter --seq-len, or a machine with more memory"
    ]


def _large_lines(found: Found, title: str) -> list[str]:
    if not found.large:
        return []
    lines = ["", title]
    for one in found.large:
        lines.append(
            f"  {one.layout.name:<34}micro-batch {one.work.micro_batch}, recompute {one.work.recompute}: at least "
            f"{one.needed / GIB:.1f} GiB, at least {one.bound:.4g} s"
        )
    return lines
