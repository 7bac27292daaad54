"""The checks of the suite that planted faults must be seen by. Each gives bounds; a fault is killed by a broken one.

layout L:V   loss, norm, every gradient and weight of a layout (single: one process) against one device and float64
golden       eight AdamW steps against those of the original implementation
rounding     where a bfloat16 norm rounds, against numpy
samples      every sample once a pass
resume V     a resumed run against one that was not interrupted, bit for bit
ages         updates of entries of three ages against AdamW in numpy
growth       a grown model's function and gradients against the smaller one's, in float64
growth run   mask, rate, loss and weights of a run across a growth
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from telechat_twins.convert.growth.files import grow_checkpoint, plan_checkpoint
from telechat_twins.convert.growth.plan import Options
from telechat_twins.convert.initial import open_initial
from telechat_twins.core.backends import load
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.config import DataConfig, DataSourceConfig, RunConfig, run_config_from_dict
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.parity.bounds import Bound, compare_tensors, compare_traces
from telechat_twins.core.parity.layouts import judge_layout
from telechat_twins.core.parity.worker import Outcome, Task, collect, launch_tasks, run_alone
from telechat_twins.core.train import loop, records
from telechat_twins.core.train.metrics import MEASURED, read_metrics
from tests.mutation.fault import Fault, planted
from tests.parity import test_growth, test_growth_training, test_layouts, test_optimizer_trace
from tests.support.frameworks import GOLDENS, golden_arrays
from tests.support.growing import FAMILIES
from tests.support.packed import write_packed, write_pairs

RANK = Path(__file__).with_name("rank.py")
STATE = ("step", "samples", "tokens", "optimizer_steps", "loss_scale", "health")  # of trainer.json
LENGTH, VOCAB, STEPS, SAVED = 32, 128, 6, 3
GROWN_AT, GROWN_STEPS, GROWN_SAVED, ANNEAL, REWARM = 4, 10, 8, 8, 3


@dataclass(frozen=True)
class Case(test_layouts.Case):
    """A layout's case, with more variants: longer (rows beyond the trained length), odd (multipliers that float32 does
    not hold) and fp16. Two updates in one process, too."""

    @property
    def precision(self) -> str:
        return "fp16" if "fp16" in self.words else super().precision

    @property
    def model(self) -> ModelConfig:
        model = super().model
        if "longer" in self.words:
            model = replace(model, training_seqlen=16, base_seqlen=8)
        return replace(model, input_mult=1.1, logit_mult=0.3) if "odd" in self.words else model

    def task(self, optim: Any, batch: str) -> Task:
        return replace(super().task(optim, batch), steps=2)


class Layouts:
    """Layout cases with and without faults: those of one process here, those of several in one launch a backend and
    number of processes. ``folder`` keeps batches and results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launches = folder, test_layouts.Launches(folder)
        self._done: dict[tuple[str, str], tuple[Task, Outcome]] = {}

    def prepare(self, backend: str, faults: Sequence[Fault]) -> None:
        """Launch what needs several processes: the faults of ``faults``, and each of their layouts without one."""
        cases = {fault.name: Case(case_of(fault)) for fault in faults}
        cases |= {case.text: case for case in cases.values()}
        for world in sorted({case.layout.world for case in cases.values()} - {1}):
            tasks = [replace(self._task(c), name=name) for name, c in cases.items() if c.layout.world == world]
            where = self.folder / f"{backend}-{world}"
            launch_tasks(backend, tasks, where, script=RANK, timeout=1500, collective_timeout=120)
            for number, task in enumerate(tasks):
                if len(list((where / str(number)).glob("rank-*.json"))) == world:
                    self._done[backend, task.name] = task, collect(where / str(number), world)

    def bounds(self, backend: str, text: str, fault: Fault | None) -> list[Bound]:
        """Those of one case, with a fault or without."""
        case, name = Case(text), text if fault is None else fault.name
        if case.layout.world == 1 and (backend, name) not in self._done:
            self.launches.references(backend, case)  # made by a process without the fault
            task = self._task(case)
            folder = self.folder / "alone" / backend / str(len(self._done))
            with planted(fault, backend):
                self._done[backend, name] = task, run_alone(backend, task, folder)
        if (backend, name) not in self._done:
            return [Bound("the launch did not reach this task", 1.0, 0.0, f"logs in {self.folder}/{backend}-*/logs")]
        task, outcome = self._done[backend, name]
        task = replace(task, name=text)
        return judge_layout(backend, task, outcome, self.launches.references(backend, case)).bounds

    def _task(self, case: Case) -> Task:
        return case.task(self.launches.exact(case)[1], self.launches.batch(case.batch))


def case_of(fault: Fault) -> str:
    return fault.check.removeprefix("layout ")


def golden(backend: str, around: AbstractContextManager[None]) -> list[Bound]:
    """tests/parity/test_optimizer_trace.py, with its limits."""
    case = test_optimizer_trace.GQA
    with around:
        got = test_optimizer_trace.run_trace(backend, case)
    io = golden_arrays(f"optimizer_trace/{case}/io.safetensors")
    limits = json.loads((GOLDENS / "optimizer_trace" / case / "meta.json").read_text())["tolerance"]
    final = golden_arrays(f"optimizer_trace/{case}/final_weights.safetensors")
    source = "the original implementation's float64 run; limits from its float32 run"
    rate, norm = (
        np.abs(np.array(got[k]) / io[k2] - 1).max() for k, k2 in (("lr", "lr"), ("grad_norm", "fp64.grad_norm"))
    )
    loss = np.abs(np.array(got["loss"]) - io["fp64.loss"]).max()
    weight = max(float(np.abs(got["weights"][name] - array).max()) for name, array in final.items())
    return [
        Bound("learning rate", float(rate), limits["lr_rel"], source),
        Bound("loss", float(loss), limits["loss_abs"], source),
        Bound("gradient norm", float(norm), limits["grad_norm_rel"], source),
        Bound("weight after the last update", weight, limits["final_weight_abs_max"], source),
    ]


@cache
def packed(folder: Path, sequences: int = 60) -> str:
    """A packed data folder."""
    return str(write_packed(folder / f"packed-{sequences}", VOCAB, LENGTH, sequences))


def samples(folder: Path, around: AbstractContextManager[None]) -> list[Bound]:
    """Ten samples in batches of four: twice each in two passes."""
    data = DataConfig(sources=[DataSourceConfig(path=packed(folder, 10))], seq_len=LENGTH)
    blend = open_blend(data, 0, VOCAB, 0)
    with around:
        rows = [row.tobytes() for step in range(5) for row in blend.batch(4 * step, 4).input_ids]
    places = [blend.sources[0].sample(index, LENGTH, 0, False)[0].tobytes() for index in range(10)]
    wrong = sum(rows.count(place) != 2 for place in places)
    return [Bound("samples not drawn once a pass", float(wrong), 0.0, "a pass is a permutation of the samples")]


class Runs:
    """Runs of a tiny model by the shipped loop, in this process, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: dict[tuple[str, str], Path] = {}
        records.plot_losses = lambda *args, **rest: None  # type: ignore[assignment]  # nothing looks at these plots

    def config(self, variant: str) -> RunConfig:
        """The training run of a variant: plain, bf16, fp16, lora, grown, pairs."""
        tree: dict[str, Any] = {
            "model": {"preset": "telechat2-tiny", "vocab_size": VOCAB, "num_layers": 1, "hidden_size": 64}
            | {"ffn_hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
            "data": {"sources": [{"path": packed(self.folder)}], "seq_len": LENGTH},
            "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "schedule_steps": 20},
            "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2, "beta2": 0.999},
            "checkpoint": {"every": SAVED, "keep_last": 9},
        }
        if variant in ("bf16", "fp16"):
            tree["train"]["precision"] = variant
        if variant == "pairs":
            pairs = self.folder / "pairs"
            tree["data"]["sources"] = [{"path": str(pairs if pairs.exists() else write_pairs(pairs, VOCAB, LENGTH))}]
            tree["preference"] = {"beta": 0.5}
        config = run_config_from_dict(tree)
        if variant == "lora":
            base = self.whole("pt", "plain") / f"step-{SAVED:08d}"
            lora = LoraConfig(rank=2, alpha=4.0, dropout=0.2)
            config = replace(config, lora=lora, train=replace(config.train, init=str(base)))
        if variant == "small":
            checkpoint = replace(config.checkpoint, every=GROWN_AT)
            return replace(config, train=replace(config.train, steps=GROWN_AT + 1), checkpoint=checkpoint)
        return config

    def grown(self) -> tuple[RunConfig, Path]:
        """The run across a growth: its configuration, and the grown checkpoint that it begins with."""
        target, small = self.folder / "grown", self.config("small")
        if not target.exists():
            checkpoint = open_checkpoint(self.whole("pt", "small") / f"step-{GROWN_AT:08d}")
            sizes = {"hidden_size": 96, "ffn_hidden_size": 150, "num_heads": 8, "num_layers": 2}
            large = load_model_config({**small.model.to_dict(), **sizes})
            options = Options(method="masked", anneal_steps=ANNEAL)
            grow_checkpoint(checkpoint, target, plan_checkpoint(checkpoint, large, options))
        model = load_model_config(str(target / "assets" / "model.yaml"))
        train = replace(small.train, steps=GROWN_STEPS)
        optim = replace(small.optim, rewarmup_steps=REWARM)
        checkpoints = replace(small.checkpoint, every=GROWN_SAVED)
        return replace(small, model=model, train=train, optim=optim, checkpoint=checkpoints), target

    def whole(self, backend: str, variant: str) -> Path:
        """A run that was not interrupted, without a fault."""
        key = backend, variant
        if key not in self._whole:
            out = self.folder / f"{variant}-{backend}"
            config, start = self.grown() if variant == "grown" else (self.config(variant), None)
            train(backend, config, out, start)
            self._whole[key] = out
        return self._whole[key]

    def resume(self, backend: str, variant: str, around: AbstractContextManager[None]) -> list[Bound]:
        """A run resumed in its middle, under ``around``, against the whole one."""
        whole = self.whole(backend, variant)
        config = self.grown()[0] if variant == "grown" else self.config(variant)
        saved = GROWN_SAVED if variant == "grown" else SAVED
        out = self.folder / "resumed" / str(len(list((self.folder / "resumed").glob("*"))))
        with around:
            train(backend, config, out, whole / f"step-{saved:08d}")
        rows, expected = numbers(out), [row for row in numbers(whole) if row["step"] > saved]
        first, second = open_checkpoint(whole), open_checkpoint(out)
        differing = [
            key
            for kind in ("weights", "optimizer")
            for key in first.names(kind)
            if first.read(kind, key).tobytes() != second.read(kind, key).tobytes()
        ]
        states = [{key: c.trainer[key] for key in STATE} for c in (first, second) if c.trainer is not None]
        source = "a resumed run equals one that was not interrupted, bit for bit"
        apart = sum(a != b for a, b in zip(rows, expected, strict=False)) + abs(len(rows) - len(expected))
        return [
            Bound("rows of metrics that differ", float(apart), 0.0, source),
            Bound("tensors that differ", float(len(differing)), 0.0, source),
            Bound("numbers of the run's state that differ", float(states[0] != states[1]), 0.0, source),
        ]

    def growth(self, backend: str, around: AbstractContextManager[None]) -> list[Bound]:
        """A run across a growth, against formulas written here and the other twin's run."""
        config, start = self.grown()
        other = self.whole("ms" if backend == "pt" else "pt", "grown")
        out = self.folder / "across" / str(len(list((self.folder / "across").glob("*"))))
        with around:
            train(backend, config, out, start)
        rows, right = read_metrics(out), read_metrics(other)
        before = read_metrics(self.whole("pt", "small"))[GROWN_AT]["loss"]
        steps = range(GROWN_AT, GROWN_STEPS)
        mask = [min(1.0, (step - GROWN_AT) / ANNEAL) for step in steps]
        rate = [_cosine(step) * min(1.0, (step - GROWN_AT + 1) / REWARM) for step in steps]
        far = {
            "mask": max(abs((row.get("mask") or 0.0) - c) for row, c in zip(rows, mask, strict=True)),
            "rate": max(abs(row["lr"] / r - 1) for row, r in zip(rows, rate, strict=True)),
        }
        ours, theirs = (final_weights(path) for path in (out, other))
        return [
            Bound("mask", far["mask"], 0.0, "step / anneal_steps"),
            Bound("learning rate", far["rate"], 1e-12, "the cosine, times the second warm-up"),
            Bound("loss across the growth", abs(rows[0]["loss"] / before - 1), 1e-5, "growth keeps the function"),
            Bound("tensors after the last step", compare_tensors(ours, theirs).worst(), 1e-4, "the other twin's"),
            *compare_traces(rows, right).bounds,
        ]


def train(backend: str, config: RunConfig, out: Path, resume: Path | None = None) -> None:
    """A run by the shipped loop."""
    trainer = load(backend, "train").Trainer
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        loop.train(trainer, config, out, resume=None if resume is None else str(resume), open_initial=open_initial)


def numbers(out: Path) -> list[dict[str, Any]]:
    """A run's rows of metrics, without its clock."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in read_metrics(out)]


def final_weights(out: Path) -> Mapping[str, np.ndarray]:
    """Of the last checkpoint."""
    checkpoint = open_checkpoint(out)
    return {name: checkpoint.read("weights", name) for name in checkpoint.names("weights")}


def _cosine(step: int) -> float:
    """The rate of Runs.config, by the formula: warm-up of 2 steps to 3e-3, then a cosine to 3e-4 at step 20."""
    if step < 2:
        return 3e-3 * (step + 1) / 2
    return 3e-4 + 0.5 * (3e-3 - 3e-4) * (1 + math.cos(math.pi * (step - 2) / 18))


def rounding(backend: str, around: AbstractContextManager[None]) -> list[Bound]:
    """tests/parity/test_rounding.py: where the RMS norm of a bfloat16 run rounds."""
    rng, model, ops = np.random.default_rng(5), load(backend, "model"), load(backend, "ops")
    x, weight = (rng.normal(size=size).astype(bfloat16) for size in ((1, 256, 192), 192))
    exact = x.astype(np.float64) / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 1e-5)
    expected = (exact.astype(bfloat16).astype(np.float32) * weight.astype(np.float32)).astype(bfloat16)
    given = [model.to_tensor(array) for array in (x, weight)]
    with around:
        found = ops.rms_norm(*given, 1e-5, model.Dtypes("bf16").stat, given[0].dtype)
    changed = model.to_numpy(found).astype(np.float32) != expected.astype(np.float32)
    return [
        Bound("values of a norm that round elsewhere", float(changed.mean()), 1 / 500, "ties of float32 statistics")
    ]


def ages(backend: str, around: AbstractContextManager[None]) -> list[Bound]:
    """tests/parity/test_growth_training.py: four updates of a model that grew twice."""
    with around:
        far = test_growth_training.worst_update(backend)
    return [Bound("updates of entries of three ages", far, 1e-4, "AdamW in numpy with a step count for every entry")]


def growth(backend: str, around: AbstractContextManager[None]) -> list[Bound]:
    """tests/parity/test_growth.py: the function and the old gradients of a model grown in every size."""
    source = FAMILIES["telechat2"]
    with around:
        far = test_growth.compare(source, test_growth.target_of(source, "all"), backend, "fp64")
    new = far.pop("new gradient")
    said = "growth keeps the function; rounding of float64"
    return [
        *(Bound(f"{what} of the grown model", value, test_growth.EXACT, said) for what, value in far.items()),
        Bound("gradient of what is new", new, 0.0, "masks are 0"),
    ]


@dataclass(frozen=True)
class Verdict:
    """What a check said of a fault in one twin: the bounds that broke, worst first. ``loss``: how far, relative, the
    fault moved the loss of the first step, where the check measures that."""

    broken: list[Bound]
    loss: float | None = None

    @property
    def margin(self) -> float:
        """Value over limit of the worst; inf where the limit is 0 or the value no number."""
        worst = self.broken[0]
        return worst.value / worst.limit if worst.limit and math.isfinite(worst.value) else math.inf


def share(bound: Bound) -> float:
    """How far a bound is broken, for sorting: finite margins before those without a scale."""
    if math.isnan(bound.value) or bound.limit == 0.0:
        return 0.0
    return bound.value / bound.limit


class Checks:
    """All checks, with what they share, under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.layouts, self.runs, self.folder = Layouts(folder / "layouts"), Runs(folder / "runs"), folder
        (folder / "layouts").mkdir(parents=True, exist_ok=True)

    def bounds(self, backend: str, check: str, fault: Fault | None) -> list[Bound]:
        """The bounds of a check in one twin, with a fault or without. An error that the product raises is one, too."""
        kind, _, variant = check.partition(" ")
        if kind == "layout":
            return self._tried(lambda _: self.layouts.bounds(backend, variant, fault), nullcontext())
        table: dict[str, Callable[[AbstractContextManager[None]], list[Bound]]] = {
            "golden": lambda around: golden(backend, around),
            "samples": lambda around: samples(self.folder, around),
            "resume": lambda around: self.runs.resume(backend, variant, around),
            "rounding": lambda around: rounding(backend, around),
            "ages": lambda around: ages(backend, around),
            "growth": lambda around: self.runs.growth(backend, around) if variant == "run" else growth(backend, around),
        }
        return self._tried(table[kind], planted(fault, backend))

    def _tried(
        self, check: Callable[[AbstractContextManager[None]], list[Bound]], around: AbstractContextManager[None]
    ) -> list[Bound]:
        try:
            return check(around)
        except Exception as error:  # whatever the product refuses a fault with
            return [Bound(f"refused ({type(error).__name__}: {error})", 1.0, 0.0, "the product's own check")]

    def verdict(self, backend: str, fault: Fault) -> Verdict:
        """Which bounds a fault breaks."""
        bounds = self.bounds(backend, fault.check, fault)
        moved = [bound.value for bound in bounds if bound.what == "loss against one device"]
        broken = sorted((bound for bound in bounds if not bound.holds), key=share, reverse=True)
        return Verdict(broken, moved[0] if moved else None)
