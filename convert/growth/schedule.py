"""A growth schedule: the stages of one training run, each with a size and a layout of its own, checked as a whole.

    stages:
      - name: small
        steps: 600
        model: flm-tiny
      - name: large
        steps: 400
        model: {preset: flm-tiny, hidden_size: 256, num_heads: 8, ffn_hidden_size: 1024}
        grow: {method: masked, anneal_steps: 100}
        parallel: {tp: 2, pp: 2}
        train: {micro_batch: 2}
        optim: {restart_lr: 2e-3, rewarmup_steps: 20}

A stage's ``train``, ``optim``, ``kernels`` and ``checkpoint`` change the run's own, ``parallel`` replaces it. Steps are
counted on from stage to stage, and the learning rate's schedule spans all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.convert.growth.plan import MULTIPLIERS, GrowthPlan, Options, plan_growth
from telechat_twins.core.config import RunConfig, bundled_file, load_run_tree, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.model.growth import METHODS
from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.schema import from_mapping, in_file, load_yaml, option
from telechat_twins.core.types import JsonObject

_CHANGES = ("train", "optim", "kernels", "checkpoint")
_FIXED = {"train": ("steps", "epochs", "schedule_steps", "seed", "init"), "optim": (), "kernels": (), "checkpoint": ()}


@dataclass(frozen=True, kw_only=True)
class GrowConfig:
    """How a stage grows from the one before; convert.growth.plan.Options documents each field."""

    method: str = option("masked", help="how the function is kept", choices=METHODS)
    anneal_steps: int = option(1000, help="steps until the masks are 1", min=1)
    depth: str = option("insert", help="insert, stack, or blocks as 0,0,1,2")
    fresh_layers: bool = option(False, help="new blocks begin random and not as copies")
    multipliers: str = option("keep", help="input_mult and logit_mult", choices=MULTIPLIERS)
    grow_head_dim: bool = option(False, help="allow a larger head size")
    seed: int = option(0, help="of the new entries", min=0)

    def options(self) -> Options:
        return Options(**{**dataclasses.asdict(self), "depth": parse_depth(self.depth)})


@dataclass(frozen=True)
class Stage:
    """Steps ``begin`` + 1 to ``end``, on ``tokens`` tokens. ``target`` is the model asked for, ``plan`` its growth
    (None for the first stage), ``config`` the run with the model that this makes."""

    name: str
    begin: int
    end: int
    config: RunConfig
    target: ModelConfig
    plan: GrowthPlan | None
    tokens: int

    @property
    def parameters(self) -> int:
        return count_parameters(self.config.model)


@dataclass(frozen=True)
class Cost:
    """Arithmetic of a schedule and of training its last size on as many tokens, two ways (floating-point operations).

    ``by_parameters``: 6 * parameters * tokens, the accounting of the FLM-101B paper. ``by_products``: what is
    multiplied, attention included (core.model.flops.flops_per_token).
    """

    by_parameters: float
    by_products: float
    scratch_by_parameters: float
    scratch_by_products: float

    @property
    def saved(self) -> float:
        """Share of the from-scratch arithmetic that growing saves, by parameters."""
        return 1.0 - self.by_parameters / self.scratch_by_parameters


def load_schedule(path: str | Path, run: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of the schedule at ``path`` for the run configured at ``run``; UserError names line and field."""
    path = bundled_file(path, "growth", "--growth")
    try:
        return _stages(path, run, overrides)
    except UserError as error:
        begun, _, said = str(error).partition(f"{path}: ")
        if begun or not said.startswith("stages["):
            raise
        bare = re.sub(r"^(stages\[\d+\]) \([^)]*\)", r"\1", said)  # without the stage's name
        raise UserError(in_file(bare, path).removesuffix(bare) + said) from None


def _stages(path: Path, run: str | Path, overrides: Sequence[str]) -> list[Stage]:
    base = load_run_tree(run, overrides)
    if isinstance(base.get("train"), dict) and base["train"].get("stages"):
        raise UserError("train.stages: a growth schedule has stages of its own; give the length in `data.seq_len`")
    tree = load_yaml(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), list) or not tree["stages"]:
        raise UserError(f"{path}: expected `stages:` and a list of them")
    if unknown := set(tree) - {"stages"}:
        raise UserError(f"{path}: unknown key '{min(unknown)}'; there is: stages")
    given = [_stage(values, f"{path}: stages[{n}]") for n, values in enumerate(tree["stages"])]
    names = [values["name"] for values in given]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two stages are named '{next(n for n in names if names.count(n) > 1)}'")
    total = sum(values["steps"] for values in given)
    stages: list[Stage] = []
    for number, values in enumerate(given):
        where = f"{path}: stages[{number}] ({values['name']})"
        before = stages[-1] if stages else None
        model = values.get("model", base.get("model"))
        if isinstance(model, (str, dict)):
            try:
                model = load_model_config(_anchored(model, Path(path).parent), f"{where}.model")
            except UserError as error:
                raise UserError(re.sub(r"^model\.", f"{where}.model.", str(error))) from None
        else:
            raise UserError(f"{where}.model: missing; name the size of this stage")
        stages.append(_planned(values, model, before, base, total, where))
    return stages


def cost(stages: Sequence[Stage]) -> Cost:
    """What the schedule computes, and what its last model would from scratch."""

    def both(stage: Stage, tokens: int) -> tuple[float, float]:
        model, seq_len = stage.config.model, stage.config.data.seq_len
        return 6.0 * stage.parameters * tokens, flops_per_token(model, seq_len, causal=True) * tokens

    parts = [both(stage, stage.tokens) for stage in stages]
    scratch = both(stages[-1], sum(stage.tokens for stage in stages))
    return Cost(sum(p for p, _ in parts), sum(p for _, p in parts), *scratch)


def parse_depth(text: str) -> str | tuple[int, ...]:
    """``insert``, ``stack``, or blocks written as 0,0,1,2; UserError for a list that is none."""
    if not text.lstrip("-")[:1].isdigit():
        return text
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"depth: expected insert, stack or blocks such as 0,0,1,2, found {text!r}") from None


def _stage(values: object, where: str) -> JsonObject:
    """One entry of the file, its own fields checked."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping with name, steps and model, found {values!r}")
    known = ("name", "steps", "model", "grow", "parallel", *_CHANGES)
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'; legal keys: {', '.join(known)}")
    name, steps = values.get("name"), values.get("steps")
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_." for c in name):
        raise UserError(f"{where}.name: give a short name of letters, digits, '-' and '_'; it names a folder")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise UserError(f"{where}.steps: must be a whole number of at least 1, found {steps!r}")
    for group in ("grow", "parallel", *_CHANGES):
        if group in values and not isinstance(values[group], dict):
            raise UserError(f"{where}.{group}: expected a mapping, found {values[group]!r}")
    for group, fixed in _FIXED.items():
        for key in fixed:
            if key in values.get(group, {}):
                raise UserError(f"{where}.{group}.{key}: is the same in all stages; leave it out")
    return values


def _planned(
    values: JsonObject, model: ModelConfig, before: Stage | None, base: JsonObject, total: int, where: str
) -> Stage:
    begin = before.end if before else 0
    plan, target = None, model
    if before is not None:
        how = from_mapping(GrowConfig, values.get("grow", {}), f"{where}.grow")
        last = before.plan.options.anneal_steps if before.plan and before.plan.config.growth else 0
        if (steps := before.end - before.begin) < last:
            raise UserError(
                f"{where}: the masks of stage '{before.name}' need {last} steps and it has {steps}; "
                "lower its anneal_steps or give it more steps"
            )
        try:
            plan = plan_growth(before.config.model, model, how.options(), begin, begin)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        model = dataclasses.replace(plan.config, growth=None)
    elif "grow" in values:
        raise UserError(f"{where}.grow: the first stage grows from nothing; leave it out")
    tree = copy.deepcopy(base)
    for group in _CHANGES:
        tree[group] = {**(tree.get(group) or {}), **values.get(group, {})}
    if "parallel" in values:
        tree["parallel"] = values["parallel"]
    tree["model"] = model.to_dict()
    tree["train"] |= {"epochs": None, "steps": begin + values["steps"], "schedule_steps": total}
    try:
        config = run_config_from_dict(tree)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    tokens = values["steps"] * config.train.global_batch * config.data.seq_len
    return Stage(values["name"], begin, begin + values["steps"], config, target, plan, tokens)


def _anchored(model: str | JsonObject, folder: Path) -> str | JsonObject:
    """A model's YAML file counts from the schedule's folder."""
    if isinstance(model, str):
        return str(folder / model) if model.endswith((".yaml", ".yml")) else model
    preset = model.get("preset")
    return {**model, "preset": _anchored(preset, folder)} if isinstance(preset, str) else model
