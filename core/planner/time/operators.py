"""Seconds of a block and of the ends of the model on one device: a roofline over each operator's operations and bytes.

Shapes: t tokens of a micro-batch on a rank, S places of the whole sequence, E hidden, F ffn, V vocabulary, H and K
heads and kv heads of a tensor rank, D head dim. ``spread``: tensor ranks among which the stream between layers is
divided. Attention counts the causal half of the pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout, sequence_multiple
from telechat_twins.core.parallel.sharding import padded_rows
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.machine import Host, Machine
from telechat_twins.core.planner.time.work import Practice, Work

# Bytes an element of the scores of attention that is not fused: the first product writes, softmax reads and writes,
# dropout reads, writes and keeps a mask of one byte, the second product reads; all else has 2 bytes.
_SCORE_BYTES = 13.0
# The backward of fused attention has 5 products (scores again, their gradient, dq, dk, dv) for the forward's 2; without
# fusion the scores are kept, or made again by recomputation.
_ATTENTION_BACKWARD = {True: 2.5, False: 2.0}


class Cost(NamedTuple):
    """Seconds by class of operator."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    host: float = 0.0

    def plus(self, *others: Cost) -> Cost:
        """The sum of costs, by class."""
        return Cost(*(sum(parts) for parts in zip(self, *others, strict=True)))

    def times(self, factor: float) -> Cost:
        """Each class times ``factor``."""
        return Cost(*(factor * part for part in self))

    @property
    def seconds(self) -> float:
        """The sum of all classes."""
        return self.matmul + self.attention + self.elementwise + self.host


@dataclass(frozen=True)
class HostTimes:
    """Seconds that the host takes beside the operators (core.planner.machine.Host); zeros on devices that work through
    a queue of operators."""

    block: tuple[float, float] = (0.0, 0.0)
    ends: tuple[float, float] = (0.0, 0.0)
    tensor_ends: tuple[float, float] = (0.0, 0.0)
    stage: tuple[float, float] = (0.0, 0.0)
    ring: tuple[float, float] = (0.0, 0.0)
    ring_byte: tuple[float, float] = (0.0, 0.0)
    step: float = 0.0
    update: float = 0.0
    exchange: float = 0.0

    @classmethod
    def of(cls, host: Host | None, cores: float) -> HostTimes:
        """The times of a rank with ``cores`` cores: below one, ranks take turns; above, it shares its core's caches
        and clock with no other."""
        if host is None:
            return cls()
        us = 1e-6 / (cores**host.exponent if cores > 1.0 else cores)
        return cls(
            (us * host.block_forward, us * host.block_backward),
            (us * host.ends_forward, us * host.ends_backward),
            (us * host.tensor_ends_forward, us * host.tensor_ends_backward),
            (us * host.stage_forward, us * host.stage_backward),
            (us * host.ring_forward, us * host.ring_backward),
            (1e-6 * us * host.ring_forward_mb, 1e-6 * us * host.ring_backward_mb),
            us * host.step,
            us * host.update,
            us * host.exchange,
        )


class Passes(NamedTuple):
    """Forward, backward, and what selective recomputation repeats between them."""

    forward: Cost
    backward: Cost
    again: Cost = Cost()


@dataclass(frozen=True)
class Rates:
    """What a rank reaches on ``machine``: FLOP/s of products and attention, bytes per second (``updates``: of norm and
    update of the optimizer), seconds an operator, and those of the host."""

    products: float
    attention: float
    memory: float
    tile: float
    launch: float
    updates: float
    host: HostTimes

    @classmethod
    def of(cls, machine: Machine, precision: str, world: int) -> Rates:
        """Rates in a ``precision`` mode, where ``world`` ranks may share a CPU's cores."""
        share = cores = 1.0
        if machine.shared_cores:
            cores = machine.devices_per_node / world
            share = cores**machine.core_exponent if cores > 1.0 else cores  # below one core, ranks take turns
        peak, efficiency = machine.peak(precision) * share, machine.efficiency
        memory = machine.memory_bandwidth.value * 1e9 * efficiency.memory * share
        return cls(
            peak * efficiency.matmul,
            peak * efficiency.attention,
            memory,
            efficiency.tile,
            efficiency.launch * 1e-6 if machine.host is None else 0.0,
            memory if machine.host is None else machine.host.update_bandwidth * 1e9 * share,
            HostTimes.of(machine.host, cores),
        )

    def product(self, m: float, k: float, n: float, width: int) -> float:
        """Seconds of [m, k] x [k, n] with operands and result of ``width`` bytes."""
        tile = self.tile
        shape = (m / (m + tile)) * (k / (k + tile)) * (n / (n + tile))
        compute = 2.0 * m * k * n / (self.products * shape)
        return max(compute, width * (m * k + k * n + m * n) / self.memory) + self.launch

    def stream(self, size: float, operators: int = 1) -> float:
        """Seconds of ``operators`` elementwise operators that move ``size`` bytes in all."""
        return size / self.memory + operators * self.launch

    def update(self, size: float) -> float:
        """Seconds of norm and update, which move ``size`` bytes in all."""
        return size / self.updates + 4 * self.launch + self.host.update


@dataclass(frozen=True)
class Shape:
    """Local sizes of a micro-batch on one rank."""

    tokens: int
    length: int
    spread: int
    heads: int
    kv_heads: int
    widths: Widths

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout, work: Work, practice: Practice) -> Shape:
        """Sizes after padding the sequence as the layout needs it."""
        length = work.seq_len + -work.seq_len % sequence_multiple(layout)
        widths = Widths.of(work.precision)
        if practice.stream_in_compute:
            widths = dataclasses.replace(widths, residual=widths.compute)
        return cls(
            work.micro_batch * length // layout.cp,
            length,
            layout.tp if layout.sequence_parallel else 1,
            model.num_heads // layout.tp,
            max(model.num_kv_heads // layout.tp, 1),
            widths,
        )


def block_passes(
    model: ModelConfig, layout: Layout, work: Work, rates: Rates, practice: Practice, shape: Shape
) -> Passes:
    """One decoder block, without recomputation and without transfers."""
    t, E, F, D = shape.tokens, model.hidden_size, model.ffn_hidden_size // layout.tp, model.head_dim
    H, K, a, r = shape.heads, shape.kv_heads, shape.widths.compute, shape.widths.residual
    gates = 2 if model.activation == "swiglu" else 1
    matrices = [(E, H * D), (E, K * D), (E, K * D), (H * D, E), *[(E, F)] * gates, (F, E)]
    forward = sum(rates.product(t, k, n, a) for k, n in matrices)
    # The backward of a product is two products: the gradients of its input and of its weight.
    backward = sum(rates.product(t, n, k, a) + rates.product(k, t, n, a) for k, n in matrices)
    weights = sum(k * n for k, n in matrices)
    stream = t * E / shape.spread
    # norm; sum and norm; sum. Rotation of queries and keys. Activation.
    rotation = t * (H + K) * D * (2 * a if practice.rotary_bytes is None else practice.rotary_bytes)
    passes = stream * (r + a) + stream * (2 * a + 2 * r) + stream * (2 * r + a) + rotation
    activation = a * t * F * (gates + 1)
    back = stream * (2 * r + a) + stream * (3 * r + 2 * a) + stream * 2 * r + rotation
    back += a * t * F * (2 * gates + 1) + weights * _accumulated(shape.widths, practice)
    cast = weights * (shape.widths.weight + a) if shape.widths.weight != a else 0
    attention = attention_pass(t, shape.length, H, D, a, work.fused_attention, rates) / practice.attention
    again = Cost(
        0.0,
        attention if practice.selective != "activation" else 0.0,
        rates.stream(activation) if practice.selective != "attention" else 0.0,
    )
    return Passes(
        Cost(forward, attention, rates.stream(passes + activation + cast, 6), rates.host.block[0]),
        Cost(
            backward,
            attention * _ATTENTION_BACKWARD[work.fused_attention],
            rates.stream(back + cast, 8 + len(matrices)),
            rates.host.block[1],
        ),
        again,
    )


def attention_pass(t: float, length: int, heads: int, head_dim: int, width: int, fused: bool, rates: Rates) -> float:
    """Seconds of the forward of attention of ``t`` queries among the keys of ``length`` places."""
    pairs = t * length * heads
    if fused:
        return 2.0 * pairs * head_dim / rates.attention + rates.launch
    # Without fusion the whole square is computed, as two batched products with a short inner or outer dimension.
    products = rates.product(t, head_dim, length, 0) + rates.product(t, length, head_dim, 0)
    return heads * (products - 2 * rates.launch) + rates.stream(pairs * _SCORE_BYTES * width / 2, 4)


def ends_passes(
    model: ModelConfig, layout: Layout, rates: Rates, practice: Practice, shape: Shape
) -> dict[str, Passes]:
    """The embedding ("first") and the final norm, head and loss ("last")."""
    t, E, V = shape.tokens, model.hidden_size, padded_rows(model.vocab_size, layout.tp)
    a, r = shape.widths.compute, shape.widths.residual
    lookup = t * E * (shape.widths.weight + r)
    norm = t * E / shape.spread * (r + a)
    adds = V * E * _accumulated(shape.widths, practice)
    head = rates.product(t, E, V, a)
    back = rates.product(t, V, E, a) + rates.product(E, t, V, a)
    stat = shape.widths.stat
    more = rates.host.tensor_ends if layout.tp > 1 else (0.0, 0.0)
    host = [end + extra for end, extra in zip(rates.host.ends, more, strict=True)]
    return {
        "first": Passes(
            Cost(0.0, 0.0, rates.stream(lookup, 2)),
            Cost(0.0, 0.0, rates.stream(t * E * (r + 2 * stat) + V * E * (2 * stat + shape.widths.weight), 3)),
        ),
        "last": Passes(
            Cost(head, 0.0, rates.stream(norm + t * V * (2 * a + stat), 5), host[0]),
            Cost(back, 0.0, rates.stream(2 * norm + t * V * (a + stat) + adds, 6), host[1]),
        ),
    }


def _accumulated(widths: Widths, practice: Practice) -> float:
    """Bytes an element that adding a micro-batch's gradient to the float32 accumulator moves."""
    return 2.0 * widths.master if practice.fused_accumulation else 2.0 * widths.master + 2 * widths.weight
