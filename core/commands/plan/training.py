"""`tele plan` of one model or run: parameters, memory and arithmetic. Of several layouts: layouts.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.config import RunConfig, load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.model.config import ModelConfig, load_model_config, preset_names
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.parallel.layout import Layout, check_layout, parse_layout, stage_layers
from telechat_twins.core.planner.beside import beside, whole_logits, with_reference
from telechat_twins.core.planner.memory.estimate import estimate
from telechat_twins.core.planner.memory.recompute import RecomputeLists, bundled_lists, load_lists
from telechat_twins.core.train.trainable import constant_names, run_table
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:  # a plan without a machine needs nothing of the forecast
    from telechat_twins.core.planner.time.work import Work


@dataclass(frozen=True)
class Given:
    """What ``--model`` or ``--config`` names; ``run``: None for a bare model."""

    run: RunConfig | None
    model: ModelConfig
    layout: Layout

    @classmethod
    def of(cls, args: argparse.Namespace) -> Given:
        """Read it; UserError for options that contradict each other."""
        if args.recompute_lists is not None:
            if args.recompute is not None:
                raise UserError("--recompute: --recompute-lists stands in its place; leave one of them out")
            if args.machine is not None:
                raise UserError(
                    "--recompute-lists: gives memory, and no time; leave --machine out, or give --recompute"
                )
        if args.config:
            run_config = load_run_config(args.config, model_of=model_of)
            return cls(run_config, run_config.model, run_config.parallel)
        return cls(None, named_model(args.model), Layout())

    def settings(self, args: argparse.Namespace, layout: Layout) -> JsonObject:
        """What memory and time depend on in ``layout``. A run's step has its global batch in every layout, as in `tele
        train`; a bare model's has pp x virtual micro-batches, or ``--global-batch``. UserError where they do not fit.
        """
        check_layout(layout, self.model)
        found: JsonObject = {"seq_len": self.model.max_seqlen} if self.run is None else _settings(self.run)
        batch = args.global_batch or found.pop("global_batch", None)
        names = ("seq_len", "micro_batch", "micro_batches", "precision", "recompute")
        found |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if args.micro_batches is None and batch is not None:
            micro_batch = found.get("micro_batch", 1)
            check_layout(layout, self.model, global_batch=batch, micro_batch=micro_batch)
            found["micro_batches"] = batch // (layout.dp * micro_batch)
        _check_micro_batches(layout, found)
        if args.recompute_lists is not None:
            found["lists"] = _lists(args.recompute_lists, layout, self.model)
        return found


def run(args: argparse.Namespace) -> int:
    """Print the estimate of ``--model`` or ``--config``."""
    given = Given.of(args)
    run_config, config, layout = given.run, given.model, given.layout
    mix = {} if run_config is None else _mix(run_config)
    if args.layout is not None:
        layout = parse_layout(args.layout)
    settings = given.settings(args, layout)
    plan = estimate(config, layout=layout, fused_attention=args.fused_attention, **settings)
    if settings.get("lists") is not None:
        plan["lists_without_effect"] = list(settings["lists"].idle)
    if args.config and settings.get("lists") is None and (name := _name_of(args.config)) in bundled_lists():
        plan["published"] = _published(name, config, layout, settings)
    notes: list[str] = []
    if run_config is not None:
        notes, plan["beside"] = beside(run_config)
        whole = flops_per_token(config, settings["seq_len"], causal=True)
        plan["flops_per_token"] = with_reference(run_config, plan["flops_per_token"], whole)
    plan |= {"data": {**mix, "sources": [{**vars(one), "epochs": one.epochs} for one in mix["sources"]]}} if mix else {}
    text = "\n".join([_text(args.model or args.config, plan), *(["", *notes] if notes else [])])
    if args.cost or args.budget is not None:
        from telechat_twins.core.planner.cost.report import Asked, report

        asked = Asked(args.tokens if args.cost else None, args.languages or (), args.budget)
        more, found = report(asked, config, settings["seq_len"], plan["parameters"]["total"])
        text, plan = "\n".join([text, *more]), plan | found
    if args.machine is not None:
        # Attention is fused, as the time is forecast.
        fused = plan if args.fused_attention else estimate(config, layout=layout, fused_attention=True, **settings)
        needed = fused["memory_bytes"]["total"]
        lines, plan["time"] = _time(args, run_config, config, layout, settings, needed)
        text = "\n".join([text, *lines])
    print(json.dumps(plan, indent=1) if args.json else "\n".join([text, *(_mix_text(mix) if mix else ())]))
    return 0


def _check_micro_batches(layout: Layout, settings: JsonObject) -> None:
    """UserError for a number of micro-batches that interleaving cannot schedule; where none is given, pp x virtual."""
    count = settings.get("micro_batches", layout.stages)
    if layout.virtual > 1 and count % layout.pp:
        near = max(1, round(count / layout.pp)) * layout.pp
        raise UserError(
            f"--micro-batches: {layout.name} needs a multiple of pp {layout.pp} for interleaving, found {count}; "
            f"give {near}"
        )


def _time(
    args: argparse.Namespace,
    run: RunConfig | None,
    model: ModelConfig,
    layout: Layout,
    settings: JsonObject,
    needed: float,
) -> tuple[list[str], JsonObject]:
    """The step's time on ``--machine``, as text and JSON; writes ``--trace`` and ``--timeline``. ``needed``: bytes of
    the fullest rank."""
    from telechat_twins.core.planner.machine import load_machine
    from telechat_twins.core.planner.time import report
    from telechat_twins.core.planner.time.step import step_time

    if run is not None:
        report.require_forecast(args.config, run.lora, run.train.freeze, run.preference)
    machine = load_machine(args.machine)
    work = forecast_work(run, layout, settings)
    step = step_time(model, layout, work, machine)
    title = f"{Path(args.model or args.config).stem}, {layout.name}, on {machine.title}"
    if args.trace is not None or args.timeline is not None:
        from telechat_twins.core.planner.time import timeline

        if args.trace is not None:
            timeline.write_trace(Path(args.trace), layout, work, step, title)
        if args.timeline is not None:
            timeline.draw(Path(args.timeline), layout, work, step, title)
    found = report.report(model, layout, work, machine, step, args.tokens, needed)
    return report.describe(found, machine.title), found


def forecast_work(run: RunConfig | None, layout: Layout, settings: JsonObject) -> Work:
    """The work of a step that is forecast, from ``Given.settings``."""
    from telechat_twins.core.planner.time.work import Work
    from telechat_twins.core.train.recipe import tells_classes_apart

    named = {name: value for name, value in settings.items() if name not in ("lora", "constants", "whole_logits")}
    by_class = run is not None and tells_classes_apart(run.optim)
    return Work(**{"micro_batches": layout.stages, **named}, by_class=by_class)


def _lists(name: str, layout: Layout, config: ModelConfig) -> RecomputeLists:
    return load_lists(name, layout, stage_layers(layout, config))


def _name_of(config: str) -> str:
    """Name under which the recomputation lists of a run's recipe are bundled."""
    return Path(config).stem


def _published(name: str, config: ModelConfig, layout: Layout, settings: JsonObject) -> JsonObject:
    """Memory of the fullest rank as the recipe was published, with lists of operators that `tele train` lacks."""
    given = {**settings, "lists": _lists(name, layout, config)}
    modes = {
        precision: estimate(config, fused_attention=True, layout=layout, **{**given, "precision": precision})
        for precision in ("amp", "bf16")
    }
    return {"lists": name, **{precision: plan["memory_bytes"]["total"] for precision, plan in modes.items()}}


def _settings(config: RunConfig) -> JsonObject:
    """What memory depends on; of a run in stages, that of the stage with the most tokens in a forward pass."""
    from telechat_twins.core.train.stages import plan_stages

    stage = max(plan_stages(config), key=lambda one: one.micro_batch * one.data.seq_len)
    return {
        "seq_len": stage.data.seq_len,
        "micro_batch": stage.micro_batch,
        "global_batch": stage.global_batch,
        "precision": config.train.precision,
        "recompute": config.train.recompute,
        "lora": config.lora,
        "constants": constant_names(run_table(config), config),
        "whole_logits": whole_logits(config),
    }


def named_model(spec: str) -> ModelConfig:
    """The model of ``--model``: of a preset, a YAML file, or a folder with a released model or a checkpoint. A release
    needs no more than its config.json."""
    folder = Path(spec)
    if spec in preset_names() or not folder.is_dir():
        return load_model_config(spec, "--model")
    if (folder / "config.json").is_file():
        from telechat_twins.convert.hf.config import read_config

        file = folder / "config.json"
        return read_config(load_json(file, "a model's configuration"), str(file))[0]
    from telechat_twins.convert.source import open_model

    return open_model(folder, verify=False).config


def model_of(init: str) -> ModelConfig | None:
    """The model of ``train.init``; None where that is not on this machine and `model:` has to name it all."""
    from telechat_twins.convert.initial import open_initial

    return open_initial(init).config if Path(init).exists() else None


def _mix(config: RunConfig) -> JsonObject:
    """Steps and tokens of a run, and what it draws of each source; of a run in stages, by the stage.

    Steps are null where they follow from data that is not packed yet.
    """
    from telechat_twins.core.data.mix import plan_mix, samples_of
    from telechat_twins.core.train.stages import plan_stages

    samples = samples_of(config.data) if config.train.epochs is not None else None
    if samples is not None:
        from telechat_twins.core.train.recipe import with_steps

        config = with_steps(config, samples)[0]
    steps = config.train.steps or None
    stages = plan_stages(config)
    tokens = sum((stage.end - stage.begin) * stage.tokens for stage in stages) if steps else None
    sources = [share for s in stages for share in plan_mix(s.data, (s.end - s.begin) * s.tokens if steps else None)]
    return {"steps": steps, "tokens": tokens, "epochs": config.train.epochs, "sources": sources}


def _mix_text(mix: JsonObject) -> list[str]:
    from telechat_twins.core.data.mix import describe_mix

    if mix["steps"] is None:
        head = f"data: {mix['epochs']:g} passes over the sources; steps follow once they are packed"
    else:
        head = f"data: {mix['steps']:,} steps, {mix['tokens']:,} tokens"
    return ["", head, *describe_mix(mix["sources"])]


def _text(name: str, plan: JsonObject) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in plan["settings"].items())
    ranks = plan["ranks"]
    lines = [f"{name}: estimate, {settings}", "", "parameters"]
    lines += [f"  {kind:<14}{count:>18,}" for kind, count in plan["parameters"].items()]
    if plan["settings"]["layout"] != "single":
        lines += ["", f"by pipeline rank (bubble {plan['bubble']:.1%} of the step)"]
        lines += [
            f"  {r['pipeline_rank']:<4}{r['layers']:>4} layers, {r['parameters']:>14,} parameters on a device, "
            f"{r['graphs']:>3} graphs alive, {sum(r['memory_bytes'].values()) / 2**30:>9.3f} GiB"
            for r in ranks
        ]
    lines += ["", "memory while training" + (", the fullest rank" if len(ranks) > 1 else "")]
    lines += [f"  {use:<14}{size / 2**30:>14.3f} GiB" for use, size in plan["memory_bytes"].items()]
    lines += [f"  {'margin':<14}{plan['margin_bytes'] / 2**30:>14.3f} GiB beside, for fragmentation"]
    if "published" in plan:
        given = plan["published"]
        lines += [
            "",
            f"as published, with MindFormers' lists (--recompute-lists {given['lists']}, fused attention): "
            f"fullest rank {given['amp'] / 1e9:.1f} GB in amp (O1), {given['bf16'] / 1e9:.1f} GB in bf16 (O2)",
        ]
    for idle in plan.get("lists_without_effect", ()):
        lines.append(f"without effect: {idle}")
    lines += ["", "floating-point operations per token, forward and backward"]
    lines += [f"  {part:<14}{count:>18.4g}" for part, count in plan["flops_per_token"].items()]
    return "\n".join(lines)
