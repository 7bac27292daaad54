"""Published training runs, and how near the forecast of each is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import CONFIGS, ModelConfig, load_model_config
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.parallel.layout import Layout, check_layout, parse_layout
from telechat_twins.core.planner.machine import Machine, load_machine
from telechat_twins.core.planner.time.step import StepTime, step_time
from telechat_twins.core.planner.time.work import Practice, Work
from telechat_twins.core.schema import from_mapping, load_yaml, option
from telechat_twins.core.types import JsonObject

PUBLISHED = CONFIGS / "planner" / "published.yaml"

# Megatron-LM sums bf16 activations in bf16 and adds gradients to the accumulator inside the product. MindFormers sums
# in bf16 too, and casts the embeddings' output to the dtype of products; its selective recomputation names the
# activation. FLM's training program is unpublished, a modification of Megatron-LM; its released model rotates with xPos
# in plain operators: for each element 7 passes of 2 and 4 bytes, 52 bytes in all. Its FlashAttention of 2023 was the
# first, half as fast as the second (arXiv 2307.08691), which the machine file describes.
PRACTICES = {
    "megatron-flm": Practice(
        name="Megatron-FLM",
        sum_bytes=2,
        fused_accumulation=True,
        selective="attention",
        rotary_bytes=52.0,
        attention=0.5,
    ),
    "megatron": Practice(name="Megatron-LM", sum_bytes=2, fused_accumulation=True, selective="attention"),
    "mindformers": Practice(name="MindFormers", sum_bytes=2, selective="activation", stream_in_compute=True),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One published run; exactly one of ``tokens_per_s``, ``seconds`` and ``tflops`` was measured."""

    name: str = option(help="model, and what tells it from other runs of it")
    machine: str = option(help="a machine file's name")
    use: str = option(help="fit or held-out", choices=("fit", "held-out"))
    model: JsonObject = option({}, help="a preset with overrides, as in a run")
    layout: str = option(help="as for --layout")
    stage_layers: list[int] = option([], help="layers of each global stage", min=1)
    seq_len: int = option(help="tokens a sample", min=1)
    micro_batch: int = option(1, help="samples a forward pass", min=1)
    micro_batches: int = option(1, help="forward passes a step and data-parallel rank", min=1)
    precision: str = option("bf16", help="as in train.precision")
    recompute: str = option("none", help="as in train.recompute", choices=("none", "selective", "full"))
    recompute_share: float = option(1.0, help="share of the layers that recompute", min=0.0, max=1.0)
    gathers_again: float = option(0.0, help="share of the layers whose gathers are repeated", min=0.0, max=1.0)
    fused_attention: bool = option(True, help="whether attention is one operator")
    tp_overlap: float = option(0.0, help="share of tensor-parallel transfers beside computation", min=0.0, max=1.0)
    practice: str = option(help="the program that ran it", choices=tuple(PRACTICES))
    tokens_per_s: float | None = option(None, help="measured, of a device", above=0.0)
    seconds: float | None = option(None, help="measured, of a step", above=0.0)
    tflops: float | None = option(None, help="measured, model TFLOP/s of a device", above=0.0)
    source: str = option(help="where all this is from")
    assumed: str = option("", help="what the source does not give")


@dataclass(frozen=True)
class Forecast:
    """A run with the measured and the predicted tokens/s of a device, and the details of the prediction."""

    run: Run
    measured: float
    predicted: float
    detail: StepTime

    @property
    def error(self) -> float:
        """Predicted over measured throughput, minus 1."""
        return self.predicted / self.measured - 1.0


@lru_cache(maxsize=1)
def published_runs() -> tuple[Run, ...]:
    """All runs of configs/planner/published.yaml, in its order."""
    rows = load_yaml(PUBLISHED)["runs"]
    return tuple(_run(row, f"{PUBLISHED.name}: runs[{number}]") for number, row in enumerate(rows))


def forecast(run: Run, machine: Machine | None = None) -> Forecast:
    """The forecast of ``run`` on its machine, or on ``machine`` in its place."""
    model, layout, work, practice = parts_of(run)
    found = step_time(model, layout, work, machine or load_machine(run.machine), practice)
    return Forecast(run, _measured(run, model, layout, work), found.tokens_per_s_per_device, found)


def parts_of(run: Run) -> tuple[ModelConfig, Layout, Work, Practice]:
    """Model, layout, work and practice of a run, checked against each other."""
    model = load_model_config(run.model, run.name)
    layout = dataclasses.replace(parse_layout(run.layout), stage_layers=list(run.stage_layers))
    check_layout(layout, model, seq_len=run.seq_len)
    names = ("seq_len", "micro_batch", "micro_batches", "precision", "recompute", "recompute_share", "fused_attention")
    work = Work(**{name: getattr(run, name) for name in names})
    practice = dataclasses.replace(PRACTICES[run.practice], tp_overlap=run.tp_overlap, gathers_again=run.gathers_again)
    return model, layout, work, practice


def _measured(run: Run, model: ModelConfig, layout: Layout, work: Work) -> float:
    """Tokens/s of a device, from what the source gives."""
    if run.tokens_per_s is not None:
        return run.tokens_per_s
    if run.seconds is not None:
        return work.tokens(layout.dp) / run.seconds / layout.world
    assert run.tflops is not None
    return run.tflops * 1e12 / flops_per_token(model, run.seq_len)


def _run(row: JsonObject, where: str) -> Run:
    """The schema has no free mappings: load_model_config checks ``model``."""
    rest = {name: value for name, value in row.items() if name != "model"}
    run = dataclasses.replace(from_mapping(Run, rest, where), model=row["model"])
    if sum(getattr(run, name) is not None for name in ("tokens_per_s", "seconds", "tflops")) != 1:
        raise UserError(f"{where}: must have one of tokens_per_s, seconds and tflops")
    return run
