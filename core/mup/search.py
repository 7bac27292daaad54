"""Hyper-parameter search on small models: the trials of a search, and their results on disk.

A trial is one combination of hyper-parameters at one width with one seed, trained as an ordinary run in its own folder.
Its result.json is written atomically when it ends; a trial without one is started, or resumed from its last checkpoint.
So a search that was killed at any moment continues when it is started again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.config import RunConfig, bundled_file, is_bundled_name, load_run_config
from telechat_twins.core.errors import UserError, tells_of_full_disk
from telechat_twins.core.files.atomic import remove_folder, write_text
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.launch.launcher import launch
from telechat_twins.core.launch.worker import read_status
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.mup.transfer import at_width, transfer
from telechat_twins.core.schema import from_mapping, load_yaml, option
from telechat_twins.core.types import JsonObject

DONE, DIVERGED, FAILED = "done", "diverged", "failed"
STOPPED = "training stopped at step"  # start of core.train.loop's message about losses that are not finite
MAX_TRIALS = 2_000
SAME = 1e-12  # relative difference that may come from the order of floating-point operations alone
STEP_COST = 2e9  # fixed cost of a step in floating-point operations, for estimates of the remaining time


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Values of the seven hyper-parameters at the config's width; None stands for the config's own value."""

    lr: float | None = option(None, help="peak rate of vector-like parameters", above=0.0)
    matrix_lr: float | None = option(None, help="peak rate of matrix-like parameters", above=0.0)
    min_lr_ratio: float | None = option(None, help="rate at the end over the peak", min=0.0, max=1.0)
    init_std: float | None = option(None, help="standard deviation of embedding and head", above=0.0)
    matrix_init_std: float | None = option(None, help="standard deviation of matrix-like parameters", above=0.0)
    input_mult: float | None = option(None, help="multiplier of the embedding's output", above=0.0)
    logit_mult: float | None = option(None, help="multiplier of the logits", above=0.0)

    @property
    def label(self) -> str:
        """Folder name made of the given values, e.g. ``lr0.003-matrix_lr0.002``; "config" if none is given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return "-".join(f"{name}{value:.6g}" for name, value in given.items()) or "config"


NAMES = tuple(field.name for field in dataclasses.fields(Numbers))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values of each hyper-parameter, whose combinations are all tried; the fields are those of Numbers."""

    lr: list[float] = option([], help="values of lr", above=0.0)
    matrix_lr: list[float] = option([], help="values of matrix_lr", above=0.0)
    min_lr_ratio: list[float] = option([], help="values of min_lr_ratio", min=0.0, max=1.0)
    init_std: list[float] = option([], help="values of init_std", above=0.0)
    matrix_init_std: list[float] = option([], help="values of matrix_init_std", above=0.0)
    input_mult: list[float] = option([], help="values of input_mult", above=0.0)
    logit_mult: list[float] = option([], help="values of logit_mult", above=0.0)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Description of a search, read from its YAML file."""

    config: str = option(help="run of the narrow model; a path relative to this file's folder")
    set: list[str] = option([], help="overrides of its options, as after --set: [train.steps=200]")
    grid: Grid = option(Grid(), help="values whose combinations are all tried")
    trials: list[Numbers] = option([], help="further single combinations")
    widths: list[int] = option([], help="widths to which combinations are transferred by muP; default: config's", min=1)
    seeds: list[int] = option([], help="seeds with which each combination is run; default: the config's", min=0)
    window: int = option(20, help="steps over which losses are averaged", min=2)

    def combinations(self) -> list[Numbers]:
        """Distinct combinations: the grid's, then the trials'. Without either, the config's own values."""
        axes = {name: values for name, values in vars(self.grid).items() if values}
        runs = math.prod([*map(len, axes.values()), max(1, len(self.widths)), max(1, len(self.seeds))])
        if runs > MAX_TRIALS:
            raise UserError(f"grid: must make at most {MAX_TRIALS} runs with all widths and seeds, found {runs}")
        found = [Numbers(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
        return list(dict.fromkeys([*(found if axes else []), *self.trials] or [Numbers()]))


@dataclass(frozen=True)
class Trial:
    """One combination at one width with one seed: a complete run config and its folder."""

    numbers: Numbers
    width: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """Name of its folder: ``place``, followed by the seed unless it is the config's own."""
        return self.folder.name

    @property
    def place(self) -> str:
        """Width and combination, common to the trials of all seeds, e.g. ``w128-lr0.003``."""
        return f"w{self.width}-{self.numbers.label}"

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        train = self.config.train
        return self.config.optim.warmup(train.schedule_steps or train.steps)

    @property
    def work(self) -> float:
        """Floating-point operations of the whole run, for estimates of the remaining time."""
        train, seq_len = self.config.train, self.config.data.seq_len
        step = flops_per_token(self.config.model, seq_len, causal=True) * train.global_batch * seq_len
        return train.steps * (step + STEP_COST)


@dataclass(frozen=True)
class TrialResult:
    """Outcome of a trial; ``reason``: cause of a failure in one line."""

    state: str
    reason: str = ""


def read_search(path: str | Path) -> SearchConfig:
    """The search in a YAML file; UserError names the invalid field."""
    path = bundled_file(path, "mup", "SEARCH")
    tree = load_yaml(path)
    try:
        search = from_mapping(SearchConfig, tree, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    beside = path.resolve().parent / search.config
    if is_bundled_name(search.config) and not beside.is_file():
        return search
    return dataclasses.replace(search, config=str(beside))


def plan(search: SearchConfig, out: Path) -> list[Trial]:
    """All trials in order of width, with the seeds of a combination next to each other. UserError for a width or a
    value that a run cannot have.

    Folder names leave out the config's own seed, so a search keeps its trials when further seeds are added.
    """
    base = load_run_config(search.config, search.set)
    if not base.train.steps:
        raise UserError("train.epochs: trials are compared at equal steps; give train.steps in its place")
    narrow = base.model.hidden_size
    made = []
    for width in sorted(set(search.widths or [narrow])):
        for numbers in search.combinations():
            config = applied(base, numbers)
            try:
                shape = at_width(config.model, width)
            except UserError as error:
                raise UserError(f"widths: {error}") from None
            model, optim = transfer(config.model, config.optim, shape)
            load_model_config(model.to_dict())  # transferred values may be out of range
            for seed in dict.fromkeys(search.seeds or [base.train.seed]):
                train = dataclasses.replace(config.train, seed=seed)
                whole = dataclasses.replace(config, model=model, optim=optim, train=train)
                name = f"w{width}-{numbers.label}" + (f"-seed{seed}" if seed != base.train.seed else "")
                made.append(Trial(numbers, width, whole, out / name))
    if any(trial.config.train.steps < 2 * search.window for trial in made):
        raise UserError(
            f"window: must be at most half of the {base.train.steps} steps of a trial, found {search.window}"
        )
    return made


def applied(config: RunConfig, numbers: Numbers) -> RunConfig:
    """``config`` with the combination's values, at the config's own width."""
    optim = config.optim
    lr = optim.lr if numbers.lr is None else numbers.lr
    ratio = optim.min_lr / optim.lr if numbers.min_lr_ratio is None else numbers.min_lr_ratio
    rates: JsonObject = {"lr": lr, "min_lr": min(lr, lr * ratio)}
    if numbers.matrix_lr is not None:
        rates["matrix_lr"] = numbers.matrix_lr
    names = ("init_std", "matrix_init_std", "input_mult", "logit_mult")
    model = {name: getattr(numbers, name) for name in names if getattr(numbers, name) is not None}
    return dataclasses.replace(
        config, optim=dataclasses.replace(optim, **rates), model=dataclasses.replace(config.model, **model)
    )


def prepare(trials: Sequence[Trial], backend: str) -> None:
    """Create every trial's folder with its run.yaml. UserError when a folder has a run with other values."""
    for trial in trials:
        wanted = {"backend": backend, **trial.config.to_dict()}
        file = trial.folder / "trial.json"
        if file.exists():
            differing = _differences(load_json(file, "the description of a trial"), wanted)
            if differing:
                raise UserError(
                    f"--out: {trial.folder} has a trial with other values ({'; '.join(differing[:3])}); "
                    "give another folder, or remove that one"
                )
            continue
        trial.folder.mkdir(parents=True, exist_ok=True)
        write_text(trial.folder / "run.yaml", json.dumps(trial.config.to_dict(), indent=1) + "\n")  # JSON is YAML
        write_text(file, json.dumps(wanted, indent=1) + "\n")


def result_of(trial: Trial) -> TrialResult | None:
    """The outcome of a trial; None while it has not ended."""
    file = trial.folder / "result.json"
    if not file.exists():
        return None
    try:
        return TrialResult(**load_json(file, "the result of a trial"))
    except TypeError:
        raise UserError(f"{file}: damaged, not the result of a trial; remove the file to run the trial again") from None


def run_trial(backend: str, trial: Trial, look: Callable[[], None]) -> TrialResult | None:
    """Train a trial to its end, from its last checkpoint if it has one; None when interrupted.

    ``look`` is called many times a second meanwhile. The launch says on stderr why a trial failed; a full disk is not
    recorded. The checkpoints are removed after the result has been written: the search needs metrics.jsonl only.
    """
    folder = trial.folder
    words = ["--config", str(folder / "run.yaml"), "--out", str(folder), "--resume", "auto"]
    code = launch(backend, words, trial.config.parallel.world, folder / "logs", instead=look)
    if code == 130:
        return None
    result = TrialResult(DONE)
    if code:
        errors = [status["error"] for rank in range(trial.config.parallel.world) if (status := _failed(folder, rank))]
        stopped = next((line for line in errors if line.startswith(STOPPED)), None)
        reason = stopped or (errors[0] if errors else f"the launch ended with code {code}")
        result = TrialResult(DIVERGED if stopped else FAILED, reason.splitlines()[0])
        if tells_of_full_disk(result.reason):
            return result  # which could not be written either
    write_text(folder / "result.json", json.dumps(dataclasses.asdict(result)) + "\n")
    if result.state != FAILED:
        forget_checkpoints(folder)
    return result


def forget_checkpoints(folder: Path) -> None:
    """Remove a run's checkpoints and ``latest``."""
    (folder / "latest").unlink(missing_ok=True)
    for checkpoint in folder.glob("step-*"):
        remove_folder(checkpoint)


def _failed(folder: Path, rank: int) -> JsonObject | None:
    status = read_status(folder / "logs", rank)
    return status if status is not None and status["state"] == "failed" and status["error"] else None


def _differences(old: JsonObject, new: JsonObject, prefix: str = "") -> list[str]:
    """``path: old -> new`` for every leaf of ``new`` that has another value in ``old``; options unknown to ``old`` are
    ignored."""
    lines = []
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            lines += _differences(old[key], value, f"{prefix}{key}.")
        elif key in old and not _same(old[key], value):
            lines.append(f"{prefix}{key}: {old[key]} -> {value}")
    return lines


def _same(old: object, new: object) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=SAME)
    return bool(old == new)
