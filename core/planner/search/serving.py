"""The best way to serve a model on a number of devices: tensor x pipeline ranks of a replica, and its batch.

A replica holds the weights in bf16, or matrices in int8 with a factor a row, and a paged cache of keys and values. A
prompt of P tokens is computed once, short ones several in a pass; then each of A steps reads all weights and every
sequence's cache. A matrix product takes the longer of its operations and its bytes; a tensor rank waits for two sums a
layer. Pipeline stages work on different sequences at the same time: they add throughput and cache, and no speed for one
request.

    latency of a request   prompt + A * step(1)
    tokens a second        pp * b * A / (prompts(b) + A * step(b)) for each replica with b sequences a stage

`tele serve` runs the stages of a pipeline one after another; that they work at the same time is for planning only.
"""

from __future__ import annotations

from dataclasses import dataclass

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout, check_layout
from telechat_twins.core.parallel.sharding import padded_rows
from telechat_twins.core.planner.machine import Machine
from telechat_twins.core.planner.memory.inference import cache_bytes, weight_bytes, working_bytes
from telechat_twins.core.planner.search.question import usable_bytes
from telechat_twins.core.planner.search.report import counted
from telechat_twins.core.planner.time.operators import Rates
from telechat_twins.core.planner.time.transfers import Ways
from telechat_twins.core.types import JsonObject

WIDTH = 2  # bytes of an activation, a key or a value
OPERATORS = 14  # of a block in a step: products, norms, rotation, cache, attention, activation, sums
MOST_SEQUENCES = 4096
STEP_TOKENS = 512  # of prompts that share a pass, as in core.inference.engine; a longer prompt has one of its own


@dataclass(frozen=True)
class Serving:
    """Prompts of ``prompt`` tokens with answers of ``answer``; ``target``: "latency" or "throughput"."""

    model: ModelConfig
    machine: Machine
    devices: int
    prompt: int
    answer: int
    target: str
    quantize: str = "none"
    memory_gib: float | None = None
    top: int = 11

    @property
    def limit(self) -> float:
        """Bytes that an estimate may have, so that with its margin it fits."""
        return usable_bytes(self.machine, self.memory_gib)


@dataclass(frozen=True)
class ServingPlan:
    """``replicas`` of tp x pp ranks, each with ``sequences`` at a time on a stage. Seconds to the first token of an
    idle replica, and of a token with all sequences running; tokens a second of all replicas; bytes of a device, and of
    one sequence's keys and values at its full length."""

    tp: int
    pp: int
    replicas: int
    sequences: int
    first_token: float
    token: float
    latency: float
    throughput: float
    memory: int
    cache: int

    @property
    def name(self) -> str:
        parts = [f"{axis}{size}" for axis, size in (("pp", self.pp), ("tp", self.tp)) if size > 1]
        return ".".join(parts) or "single"


def search(question: Serving) -> list[ServingPlan]:
    """Plans that fit, the best for the target first."""
    plans = []
    for tp in range(1, min(question.devices, question.model.num_heads) + 1):
        try:
            check_layout(Layout(tp=tp), question.model)
        except UserError:
            continue
        for pp in range(1, min(question.devices // tp, question.model.num_layers) + 1):
            if (plan := _plan(question, tp, pp)) is not None:
                plans.append(plan)
    if question.target == "latency":
        plans.sort(key=lambda plan: (plan.latency, plan.tp * plan.pp))
    else:
        plans.sort(key=lambda plan: (-plan.throughput, plan.tp * plan.pp))
    return plans[: question.top]


def _plan(question: Serving, tp: int, pp: int) -> ServingPlan | None:
    """The plan of these ranks with the batch that serves the target; None if not one sequence fits."""
    model, length = question.model, question.prompt + question.answer
    layers = -(-model.num_layers // pp)
    together = 1 if question.target == "latency" else max(1, STEP_TOKENS // question.prompt)
    fixed = weight_bytes(model, tp, pp, question.quantize) + working_bytes(model, tp, together * question.prompt)
    each = pp * cache_bytes(model, tp, length, layers)  # every stage's sequences pass through all stages
    most = int((question.limit - fixed) // each)
    if most < 1:
        return None
    replicas = question.devices // (tp * pp)
    costs = _Costs(question, tp, pp)
    prompt, alone = costs.prompt(), costs.step(1)

    def throughput(batch: int) -> float:
        share = min(batch, together)
        prompts = batch / share * (prompt if share == 1 else costs.prompt(share))
        return replicas * pp * batch * question.answer / (prompts + question.answer * costs.step(batch))

    sizes = {1} if question.target == "latency" else {*(1 << n for n in range(13)), most}
    batch = max((b for b in sizes if b <= min(most, MOST_SEQUENCES)), key=throughput)
    return ServingPlan(
        tp,
        pp,
        replicas,
        batch,
        prompt + alone,
        costs.step(batch),
        prompt + question.answer * alone,
        throughput(batch),
        int(fixed + batch * each),
        each // pp,
    )


class _Costs:
    """Seconds of a replica's prompt and of its steps."""

    def __init__(self, question: Serving, tp: int, pp: int) -> None:
        self.question, self.tp, self.pp = question, tp, pp
        self.rates = Rates.of(question.machine, "bf16", tp * pp)
        self.ways = Ways(question.model, Layout(tp=tp, pp=pp), question.machine).ways
        model = question.model
        D, inputs = model.head_dim, 2 if model.activation == "swiglu" else 1
        E, F = model.hidden_size, model.ffn_hidden_size // tp
        H, K = model.num_heads // tp, max(model.num_kv_heads // tp, 1)
        self.matrices = [(E, (H + 2 * K) * D), (H * D, E), (E, inputs * F), (F, E)]
        self.heads, self.keys = H, K

    def prompt(self, count: int = 1) -> float:
        """``count`` whole prompts in one pass through all layers, and the logits of their first tokens."""
        model, P = self.question.model, self.question.prompt
        attention = 2.0 * count * P * P * self.heads * model.head_dim / self.rates.attention
        return model.num_layers * (self._block(count * P) + attention) + self._ends(count * P, count)

    def step(self, sequences: int) -> float:
        """One token for each of ``sequences``, whose caches are half full of answers on average."""
        model = self.question.model
        context = self.question.prompt + self.question.answer / 2
        cache = 2.0 * sequences * context * self.keys * model.head_dim * WIDTH / self.rates.memory
        return model.num_layers * (self._block(sequences) + cache) + self._ends(sequences, sequences)

    def _block(self, rows: int) -> float:
        seconds = sum(self._product(rows, k, n) for k, n in self.matrices)
        elementwise = rows * (6 * self.question.model.hidden_size + 3 * self.matrices[3][0]) * WIDTH
        seconds += elementwise / self.rates.memory + OPERATORS * self.question.machine.efficiency.launch * 1e-6
        return seconds + self.ways["tp"].seconds("all_reduce", 2, 2 * rows * self.question.model.hidden_size * WIDTH)

    def _product(self, rows: int, k: int, n: int, quantized: bool = True) -> float:
        """[rows, k] x [k, n]: the longer of its operations and its bytes, of which the matrix may be int8."""
        width = 1 if quantized and self.question.quantize == "int8" else WIDTH
        tile = self.rates.tile
        operations = 2.0 * (rows + tile) * (k + tile) * (n + tile) / self.rates.products
        return max(operations, (width * k * n + WIDTH * rows * (k + n)) / self.rates.memory)

    def _ends(self, rows: int, wanted: int) -> float:
        model = self.question.model
        sent = (self.pp - 1) * self.ways["forward_out"].seconds("send", 1, rows * model.hidden_size * WIDTH)
        return sent + self._product(wanted, model.hidden_size, padded_rows(model.vocab_size, self.tp))


def described(plan: ServingPlan) -> JsonObject:
    """A plan as JSON."""
    return {
        "layout": plan.name,
        "tp": plan.tp,
        "pp": plan.pp,
        "replicas": plan.replicas,
        "sequences": plan.sequences,
        "first_token_seconds": plan.first_token,
        "token_seconds": plan.token,
        "latency_seconds": plan.latency,
        "tokens_per_s": plan.throughput,
        "memory_bytes": plan.memory,
        "sequence_cache_bytes": plan.cache,
    }


def text(question: Serving, plans: list[ServingPlan], model: str) -> list[str]:
    """The plans in lines."""
    lines = [
        f"serving {model} on {counted(question.devices, 'device')} of {question.machine.title}: prompts of "
        f"{question.prompt:,} tokens, answers of {question.answer:,}, for {question.target}; weights "
        + ("in int8" if question.quantize == "int8" else "in bf16"),
        "",
    ]
    if not plans:
        less = "" if question.quantize == "int8" else "--quantize int8, "
        return [
            *lines,
            f"none fits {question.limit / 2**30:.1f} GiB a device: give more --devices, {less}a shorter --prompt-len "
            "or --answer-len, or a machine with more memory",
        ]
    row = "  {:<12}{:>9}{:>11}{:>13}{:>13}{:>12}{:>13}{:>8}{:>12}"
    titles = ("replica", "replicas", "sequences", "first token", "token", "latency", "tokens/s", "GiB", "MiB a seq.")
    lines.append(row.format(*titles))
    for plan in plans:
        lines.append(
            row.format(
                plan.name,
                plan.replicas,
                plan.pp * plan.sequences,
                f"{plan.first_token * 1e3:,.0f} ms",
                f"{plan.token * 1e3:,.1f} ms",
                f"{plan.latency:,.2f} s",
                f"{plan.throughput:,.0f}" if plan.throughput >= 10 else f"{plan.throughput:.2g}",
                f"{plan.memory / 2**30:.1f}",
                f"{plan.cache / 2**20:,.0f}",
            )
        )
    lines += [
        "",
        "first token and latency: of one request on an idle replica; token: with all sequences running; "
        "MiB a seq.: keys and values of a whole sequence on a device",
    ]
    best = plans[0]
    lines.append(f"tele serve --checkpoint F --layout {best.name}, on each replica")
    if best.pp > 1 and question.target == "throughput":
        lines.append(
            f"tele serve runs the {best.pp} stages one after another, and would give about "
            f"{best.throughput / best.pp:,.0f} tokens/s; the table is for a server whose stages work at once"
        )
    return lines
