"""The configuration of a model and of a training run: schema, presets, validation.

Both backends read exactly these objects, so a field has one meaning. Shape letters used across the project:
B batch, S sequence, H heads, K kv heads, D head dim, E hidden, F ffn, V vocab, L layers.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import (
    CONFIGS,
    MAX_LENGTH,
    PRECISIONS,
    ModelConfig,
    _beside,
    _nearest_divisor,
    load_model_config,
)
from telechat_twins.core.model.lora import LoraConfig, check_lora
from telechat_twins.core.model.xpos_range import check_xpos_range
from telechat_twins.core.near import near_path, nearest_name
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.schema import blank_keys, from_mapping, in_file, load_yaml, option, set_all
from telechat_twins.core.sections.evaluation import EvalConfig as EvalConfig
from telechat_twins.core.sections.evaluation import HeldOutSourceConfig as HeldOutSourceConfig
from telechat_twins.core.sections.misnamed import check_names
from telechat_twins.core.sections.optim import SCHEDULES as SCHEDULES
from telechat_twins.core.sections.optim import OptimConfig as OptimConfig
from telechat_twins.core.sections.optim import PreferenceConfig as PreferenceConfig
from telechat_twins.core.sections.paths import anchor_paths, check_paths
from telechat_twins.core.types import JsonObject
from telechat_twins.core.watching import TRACKERS, ProfileConfig, check_watching


@dataclass(frozen=True, kw_only=True)
class DataSourceConfig:
    path: str = option(help="folder written by `tele data`")
    weight: float = option(1.0, help="share of samples drawn from this source", above=0.0)
    tokens: int | None = option(
        None, help="tokens that the source will hold, for `tele plan` where the folder is not there yet", min=1
    )
    loss_weight: float = option(1.0, help="factor of the token losses of this source's samples", above=0.0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: list[DataSourceConfig] = option(help="packed folders to blend, each {path, weight}")
    seq_len: int = option(help="S, tokens a sample", min=2, max=MAX_LENGTH)
    isolate_documents: bool = option(False, help="reset positions and block attention between packed documents")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A range of steps with a row length, a batch and sources of its own (core.train.stages)."""

    steps: int = option(help="optimizer steps of this stage", min=1)
    seq_len: int | None = option(None, help="tokens a sample; default: data.seq_len", min=2, max=MAX_LENGTH)
    global_batch: int | None = option(None, help="default: train.global_batch", min=1, max=MAX_LENGTH)
    micro_batch: int | None = option(None, help="default: train.micro_batch", min=1)
    sources: list[DataSourceConfig] | None = option(None, help="default: data.sources")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    init: str | None = option(
        None,
        help="begin with the weights of this model: a released folder, a checkpoint, a run, MindFormers' weights; "
        "`model:` may then be left out",
    )
    # 0, which no file can say: the steps follow from epochs once the data is open (core.train.recipe.with_steps).
    steps: int = option(0, help="optimizer steps in the whole run; or give epochs", min=1)
    epochs: float | None = option(
        None, help="passes over the packed data, in place of steps; may be a part of one", above=0.0, max=1e6
    )
    stages: list[StageConfig] | None = option(
        None, help="changes of length, batch and sources during the run, each {steps, seq_len, ...}; in place of steps"
    )
    schedule_steps: int | None = option(
        None,
        help="steps that the learning rate's schedule spans, where more runs follow this one; default: steps",
        min=1,
    )
    global_batch: int = option(help="sequences an optimizer step", min=1, max=MAX_LENGTH)
    micro_batch: int = option(help="sequences a forward pass on one data-parallel rank; divides global_batch", min=1)
    precision: str = option(
        "fp32", help="fp32 | bf16 (O2) | amp (O1) | fp16 (dynamic loss scale) | fp64 (reference)", choices=PRECISIONS
    )
    recompute: str = option(
        "none", help="activations computed again in the backward", choices=("none", "selective", "full")
    )
    seed: int = option(1234, help="initial weights and data order", min=0)
    freeze: list[str] = option(
        [], help="parameters that stay as they are, as glob patterns on logical names, e.g. embed.weight, *.bias"
    )
    record_every: int = option(
        0, help="steps between records of a step (docs/records.md), in RUN/records; 0: none", min=0
    )
    record_rows: int = option(
        0,
        help="rows of the global batch, from the first, whose activations a record has; 0: as many as cost little",
        min=0,
    )
    profile: ProfileConfig | None = option(
        None, help="{from, steps}: steps that the profiler records, in RUN/profile; default: none"
    )
    peak_tflops: float | None = option(
        None, help="peak TFLOP/s of one device at this precision, of which the MFU is a share", above=0.0
    )
    machine: str | None = option(None, help="in its place: a machine file, or a bundled one's name, e.g. h100-sxm")

    def __post_init__(self) -> None:
        if self.stages is not None:
            self._add_up(self.stages)
        if not self.steps and self.epochs is None:
            raise UserError("train.steps: missing; give the number of optimizer steps, or train.epochs")
        if self.steps and self.epochs is not None:
            raise UserError(
                f"train.epochs: {self.epochs:g} and train.steps {self.steps} both say how long the run is; give one"
            )
        if self.global_batch % self.micro_batch:
            raise UserError(
                f"train.micro_batch: {self.micro_batch} does not divide global_batch {self.global_batch}; "
                f"nearest that does: {_nearest_divisor(self.global_batch, self.micro_batch)}"
            )

    def _add_up(self, stages: list[StageConfig]) -> None:
        """``steps`` is the sum of the stages' steps; UserError for a batch that does not fit."""
        total = sum(stage.steps for stage in stages)
        if not stages:
            raise UserError("train.stages: empty; name at least one stage, or leave it out")
        if self.epochs is not None or self.steps not in (0, total):
            name = "epochs" if self.epochs is not None else f"steps {self.steps}"
            raise UserError(f"train.stages: have {total} steps together; leave train.{name} out")
        object.__setattr__(self, "steps", total)
        for number, stage in enumerate(stages):
            batch, micro = stage.global_batch or self.global_batch, stage.micro_batch or self.micro_batch
            if batch % micro:
                raise UserError(
                    f"train.stages[{number}].micro_batch: {micro} does not divide global_batch {batch}; nearest that "
                    f"does: {_nearest_divisor(batch, micro)}"
                )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = option(0, help="save every N steps; 0 saves only at the end", min=0)
    keep_last: int = option(2, help="checkpoints kept", min=1)
    asynchronous: bool = option(False, help="write in the background while training goes on; costs one copy in memory")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    spike_factor: float = option(10.0, help="a gradient norm this many times the running median is a spike", above=1.0)
    spike_policy: str = option("warn", help="what to do on a spike", choices=("stop", "skip", "warn"))
    window: int = option(50, help="steps in the running median", min=2)


IMPLEMENTATIONS = ("auto", "composite", "cpp", "amx", "triton", "cann", "torch")


def _kernel(what: str) -> str:
    choice: str = option("auto", help=what, choices=IMPLEMENTATIONS)
    return choice


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation serves an operator; "auto" takes the best of the device (kernels/dispatch.py).

    composite: the framework's plain operators; cpp: kernels/cpu; amx: kernels/cpu with float32 products in matrix
    tiles; triton: kernels/triton; cann: Ascend's own; torch: PyTorch's own fused operators.
    """

    linear: str = _kernel("matrix products with their biases")
    embedding: str = _kernel("token lookup and its gradient")
    rms_norm: str = _kernel("norm over channels, alone or with the residual sum before it")
    layer_norm: str = _kernel("norm with mean and bias")
    rope: str = _kernel("rotation of queries and keys")
    swiglu: str = _kernel("gated activation")
    gelu: str = _kernel("tanh form of gelu")
    attention: str = _kernel("attention, whole and in blocks of a ring")
    merge_blocks: str = _kernel("union of two blocks of attention")
    cross_entropy: str = _kernel("loss over the vocabulary or a part of it")
    adamw: str = _kernel("optimizer update")


KERNEL_OPERATORS = tuple(field.name for field in dataclasses.fields(KernelsConfig))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything `tele train` needs, as read from one YAML file."""

    model: ModelConfig = option(help="a preset's name, or a mapping with `preset` and overrides, or a full mapping")
    data: DataConfig = option(help="what to train on")
    train: TrainConfig = option(help="how long and in which precision")
    optim: OptimConfig = option(help="AdamW and its schedule")
    lora: LoraConfig | None = option(None, help="train low-rank adapters of a frozen base; default: the whole model")
    parallel: Layout = option(Layout(), help="how the work is split over processes; default: one process")
    kernels: KernelsConfig = option(
        KernelsConfig(), help="which implementation serves each operator; default: the best"
    )
    preference: PreferenceConfig | None = option(None, help="train on preference pairs; default: on next tokens")
    eval: EvalConfig | None = option(None, help="loss on held-out text while training; default: none")
    checkpoint: CheckpointConfig = option(CheckpointConfig(), help="saving")
    health: HealthConfig = option(HealthConfig(), help="what to do when training goes wrong")
    track: list[str] = option(["tensorboard"], help="where the metrics go besides metrics.jsonl", choices=TRACKERS)

    def __post_init__(self) -> None:
        lengths = {"data.seq_len": self.data.seq_len}
        for number, stage in enumerate(self.train.stages or []):
            if stage.seq_len is not None:
                lengths[f"train.stages[{number}].seq_len"] = stage.seq_len
        for name, length in lengths.items():
            if length > self.model.max_seqlen:
                raise UserError(
                    f"{name}: {length} is above the model's max_seqlen {self.model.max_seqlen}; "
                    "train at most at that length, or raise model.max_seqlen"
                )
        check_xpos_range(self.model, self.train.precision, max(lengths.values()))
        if self.preference is not None:
            self._check_preference()
        if self.lora is not None:
            check_lora(self.model, self.lora)
        check_watching(self.track, self.train.peak_tflops, self.train.machine)
        if self.train.steps:
            self._check_schedule(self.train.schedule_steps or self.train.steps)

    def _check_schedule(self, steps: int) -> None:
        optim, warmup = self.optim, self.optim.warmup(steps)
        if warmup >= self.train.steps and warmup:
            name = "warmup_steps" if optim.warmup_ratio is None else "warmup_ratio"
            raise UserError(
                f"optim.{name}: {getattr(optim, name)} leaves no step after warm-up of train.steps {self.train.steps}"
            )
        if optim.schedule == "wsd" and warmup + optim.decay(steps) > steps:
            raise UserError(
                f"optim.decay_steps: a decay of {optim.decay(steps)} steps does not fit after the {warmup} of warm-up "
                f"into the schedule's {steps}; shorten one of them"
            )

    def _check_preference(self) -> None:
        if self.preference is not None and self.preference.reference == "live" and self.lora is None:
            raise UserError(
                "preference.reference: live needs a base that training does not change; add a `lora:` section, or use "
                "once"
            )
        if self.train.stages:
            raise UserError("train.stages: preference pairs are trained at one length; leave the stages out")
        if self.train.micro_batch % 2:
            raise UserError(
                f"train.micro_batch: {self.train.micro_batch} is odd, and a preference pair is two neighbouring "
                f"sequences; give {self.train.micro_batch + 1}"
            )
        for n, source in enumerate(self.data.sources):
            if source.loss_weight != 1.0:
                raise UserError(
                    f"data.sources[{n}].loss_weight: {source.loss_weight} has no meaning in preference training; "
                    "leave it out, and use weight for the share of samples"
                )

    def to_dict(self) -> JsonObject:
        """The mapping as JSON gives it back."""
        values = {**dataclasses.asdict(self), "model": self.model.to_dict()}
        if (profile := values["train"]["profile"]) is not None:
            values["train"]["profile"] = {"from": profile.pop("from_"), **profile}
        if not self.train.steps:
            del values["train"]["steps"]
        return values


def bundled_names(kind: str) -> list[str]:
    """Names of the bundled files of one kind: "train" (runs), "growth" (schedules) or "mup" (searches)."""
    return sorted(file.stem for file in (CONFIGS / kind).glob("*.yaml"))


def is_bundled_name(spec: str | Path) -> bool:
    """Whether ``spec`` is to be looked up among the bundled files: one word, no suffix, and not a file here."""
    text = str(spec)
    return "/" not in text and not text.endswith((".yaml", ".yml")) and not Path(text).is_file()


def bundled_file(spec: str | Path, kind: str, where: str) -> Path:
    """The file that ``spec`` stands for: a path itself, or a name in configs/``kind``; UserError if unknown."""
    if not is_bundled_name(spec):
        path = Path(spec)
        if (path / "run.yaml").is_file():
            raise UserError(f"{where}: {spec} is a folder; the config of that run is {path / 'run.yaml'}")
        if not path.exists() and path.stem in bundled_names(kind):
            raise UserError(f"{where}: no such file {spec}; the bundled config goes by its name alone: {path.stem}")
        return path
    names = bundled_names(kind)
    if str(spec) not in names:
        near = nearest_name(str(spec), names)
        hint = (f"did you mean '{near}'? There" if near else "there") + f" are: {', '.join(names)}; or give a YAML file"
        raise UserError(f"{where}: no file and no bundled config '{spec}'; {hint}")
    return CONFIGS / kind / f"{spec}.yaml"


def load_run_config(
    path: str | Path, overrides: Sequence[str] = (), model_of: Callable[[str], ModelConfig | None] | None = None
) -> RunConfig:
    """Read a run's YAML, or a bundled run by name; apply ``--set`` overrides, validate.

    ``model_of`` returns the model of a folder (None: unknown): where ``train.init`` is set, it gives the fields that
    ``model:`` does not name. UserError names the file and the line of a key, too.
    Relative paths of data, of tasks' folders and of ``train.init`` count from the file's folder, or where a bundled run
    was found by name as if its configs/ were in the working folder: ../../data/tiny is ./data/tiny.
    """
    tree = load_run_tree(path, overrides)
    train = tree.get("train")
    init = train.get("init") if isinstance(train, dict) else None
    with naming_lines(path, overrides):
        base = model_of(init) if model_of is not None and isinstance(init, str) else None
        return run_config_from_dict(tree, base)


def load_run_tree(path: str | Path, overrides: Sequence[str] = ()) -> JsonObject:
    """What load_run_config validates: the file's mapping with paths made whole and overrides applied."""
    file = bundled_file(path, "train", "--config")
    tree = load_yaml(file)
    _refuse_blanks(file, overrides)
    if not isinstance(tree, dict):
        raise UserError(f"{file}: expected a mapping with model, data, train and optim")
    if isinstance(tree.get("model"), str):
        tree["model"] = {"preset": tree["model"]}
    folder = file.resolve().parent
    if isinstance(tree.get("model"), dict) and isinstance(tree["model"].get("preset"), str):
        tree["model"]["preset"] = _beside(os.path.expanduser(tree["model"]["preset"]), folder)
    bundled = is_bundled_name(path)
    anchor_paths(tree, Path.cwd() / "configs" / "train" if bundled else folder, normalise=bundled)
    set_all(tree, overrides)
    with naming_lines(path, overrides):
        check_paths(tree)
        preset = tree["model"].get("preset") if isinstance(tree.get("model"), dict) else None
        if isinstance(preset, str) and preset.endswith((".yaml", ".yml")) and not Path(preset).exists():
            raise UserError(f"model.preset: {preset}: no such file{near_path(preset)}")
    return tree


def _refuse_blanks(file: Path, overrides: Sequence[str]) -> None:
    """UserError for a key with nothing behind it, unless an override sets it: it would mean the default, unsaid."""
    given = [override.partition("=")[0] for override in overrides]
    for key, line in blank_keys(file):
        if not any(key == name or name.startswith(f"{key}.") for name in given):
            raise UserError(
                f"{file}:{line}: {key}: nothing stands behind it; give a value, write null for none, or take it out"
            )


@contextmanager
def naming_lines(path: str | Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Put the file, and the line, in front of an error that begins with a key of a run, as in the YAML ``path``; not of
    one that begins with another file's path, such as "data/tiny: ..."."""
    try:
        yield
    except UserError as error:
        first = re.match(r"\w+(?![\w/-])", str(error))
        if first is None or first[0] not in {"config", *(field.name for field in dataclasses.fields(RunConfig))}:
            raise
        raise UserError(in_file(str(error), bundled_file(path, "train", "--config"), overrides)) from None


def run_config_from_dict(tree: JsonObject, base: ModelConfig | None = None) -> RunConfig:
    """Validate a run's mapping; ``model`` may name a preset. ``base``: a model for the fields that it does not name."""
    check_names(RunConfig, tree)
    values = dict(tree)
    if "model" in values or base is not None:
        values["model"] = load_model_config(values.get("model", {}), base=base).to_dict()
    return from_mapping(RunConfig, values, "")
