"""Tensors that a decoder block keeps for its backward pass, one by one, as its operators save them.

Elements are counted for one position of a micro-batch on a rank; the widths are those of the tensors' dtypes. Letters:
E hidden, H query heads, K kv heads, D head dim, F ffn, V vocabulary. kernels/*/autograd.py of each framework says what
an operator saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.sharding import padded_rows
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.memory.executor import Executor

STATISTIC = 4  # bytes of a float32 statistic


RECOMPUTED = ("attention_norm.norm", "ffn_norm.norm", "feed_forward.mul")  # with Executor.recomputes_inputs


class Kept(NamedTuple):
    """A tensor kept for the backward: ``elements`` a position, ``width`` bytes each.

    ``site`` is the operator that made it, in the names that MindFormers' ``select_recompute`` patterns match.
    ``shared`` elements are what is left of it when its communication is done again (``select_comm_recompute``).
    """

    site: str
    elements: float
    width: int
    shared: float | None = None

    @property
    def size(self) -> float:
        """Bytes a position."""
        return self.elements * self.width


def block_kept(
    config: ModelConfig, layout: Layout, widths: Widths, executor: Executor, seq_len: int, fused: bool
) -> list[Kept]:
    """What one block keeps without recomputation. ``fused``: attention keeps no probabilities."""
    tp = layout.tp
    E, F = config.hidden_size / 1, config.ffn_hidden_size / tp
    HD = config.num_heads * config.head_dim / tp
    # With more tensor ranks than kv heads, and with more Ulysses ranks than kv heads of a rank, heads are repeated.
    kv_heads = max(config.num_kv_heads // tp, 1)
    if layout.ulysses > 1 and kv_heads % layout.ulysses:
        kv_heads = layout.ulysses
    KD = kv_heads * config.head_dim
    own = E / tp if layout.sequence_parallel else E  # of the stream: a tensor rank's own positions
    statistics = 1 + (config.norm == "layernorm")
    kept = [
        Kept("attention_norm.input", own, widths.residual),
        Kept("attention_norm.statistics", statistics * own / E, STATISTIC),
        Kept("attention_norm.norm", E, widths.compute, own),
        Kept("attention.wq", HD, widths.compute),
        Kept("attention.wk", KD, widths.compute),
        Kept("attention.wv", KD, widths.compute),
        Kept("attention.flash_attention", HD, widths.compute),
        Kept("attention.statistics", executor.statistics * config.num_heads / tp, STATISTIC),
        Kept("ffn_norm.input", own, widths.residual),
        Kept("ffn_norm.statistics", statistics * own / E, STATISTIC),
        Kept("ffn_norm.norm", E, widths.compute, own),
        Kept("feed_forward.w3", F, widths.compute),
        Kept("feed_forward.mul", F, widths.compute),
    ]
    if config.activation == "swiglu":
        kept.append(Kept("feed_forward.w1", F, widths.compute))
        if executor.keeps_silu:
            kept.append(Kept("feed_forward.w1.activation.silu", F, widths.compute))
    if layout.ring > 1:
        # A ring merges blocks in float32, and the output projection reads a copy in the compute dtype.
        kept.append(Kept("attention.merged", HD, max(widths.compute, 4)))
    if layout.ulysses > 1:
        kept.append(Kept("attention.exchanged", HD, widths.compute))  # the output before it goes back to its positions
    if not fused and layout.ring == 1:
        kept.append(Kept("attention.probabilities", config.num_heads / tp * seq_len, widths.compute))
    again = executor.recomputes_inputs and tp == 1  # tensor ranks would have to gather their positions anew
    return [one for one in kept if not (again and one.site in RECOMPUTED)]


def total(kept: Iterable[Kept]) -> float:
    """Bytes a position."""
    return sum(one.size for one in kept)


def input_bytes(config: ModelConfig, layout: Layout, widths: Widths) -> float:
    """Bytes a position of a block's input: what full recomputation keeps of a block."""
    spread = layout.tp if layout.sequence_parallel else 1
    return config.hidden_size / spread * widths.residual


def core_bytes(kept: Iterable[Kept]) -> float:
    """What selective recomputation of the twins drops of a block: probabilities and statistics of attention. Its inputs
    stay, and so do its output and the activation's product, which the next linears read."""
    return total(one for one in kept if one.site in ("attention.probabilities", "attention.statistics"))


def probability_bytes(kept: Iterable[Kept]) -> float:
    """Bytes a position of attention's probabilities, where they are made at all."""
    return total(one for one in kept if one.site == "attention.probabilities")


def ends_kept(
    config: ModelConfig,
    layout: Layout,
    widths: Widths,
    executor: Executor,
    head: bool,
    head_trained: bool = True,
    by_rows: bool = False,
) -> tuple[float, float]:
    """(bytes a position kept by the final norm, bytes of logits and of what the loss makes of them); zeros without
    ``head``. A head that is not trained does not keep the normed stream; with ``by_rows`` no logits are kept, but the
    gradient of that stream."""
    if not head:
        return 0.0, 0.0
    spread = layout.tp if layout.sequence_parallel else 1
    columns = padded_rows(config.vocab_size, layout.tp)
    statistics = (1 + (config.norm == "layernorm")) / spread + 1  # of the norm, and the log-sum-exp of the loss
    normed = config.hidden_size * widths.compute if head_trained or by_rows else 0
    norm = config.hidden_size / spread * widths.residual + normed + STATISTIC * (statistics - by_rows)
    if by_rows:
        return norm, 0.0
    shards = executor.wide_shards and (layout.tp > 1 or config.num_tokens != config.vocab_size)
    wide = executor.wide_logits or shards
    width = max(widths.compute, 4) if wide else widths.compute
    copies = executor.logit_copies + (executor.scaled_logits if config.logit_mult != 1.0 else 0)
    logits = columns * width * copies
    if wide and widths.compute < 4:
        logits += columns * widths.compute  # their gradient in the compute dtype, which the head's products read
    return norm, logits


def block_workspace(config: ModelConfig, layout: Layout, widths: Widths) -> float:
    """Bytes a position of a block's largest set of temporaries in its backward: the gradients of the product, of gate
    and of up at once, and of the normed stream."""
    F, wide = config.ffn_hidden_size / layout.tp, max(widths.compute, 4)
    inputs = 3 if config.activation == "swiglu" else 2
    # With tensor parallelism the stream's gradient is summed over ranks in float32, and scattered.
    stream = config.hidden_size * (widths.compute + (wide if layout.tp > 1 else 0))
    return inputs * F * widths.compute + stream


def ring_workspace(config: ModelConfig, layout: Layout, widths: Widths) -> float:
    """Bytes a position of a ring's backward: keys and values twice, the float32 sums of their gradients twice, and the
    float32 gradient of the queries."""
    if layout.ring == 1:
        return 0.0
    wide = max(widths.compute, 4)
    keys = 2 * max(config.num_kv_heads // layout.tp, 1) * config.head_dim
    queries = config.num_heads * config.head_dim / layout.tp
    return keys * (2 * widths.compute + 2 * wide) + queries * wide


def cast_bytes(config: ModelConfig, layout: Layout, widths: Widths, executor: Executor) -> tuple[int, int]:
    """(of a block, of the head): bytes of matrices in the compute dtype that a graph keeps beside wider weights."""
    if widths.weight <= widths.compute or not executor.casts:
        return 0, 0
    tp, inputs = layout.tp, 3 if config.activation == "swiglu" else 2
    keys = max(config.num_kv_heads // tp, 1) * config.head_dim
    rows = 2 * (config.num_heads * config.head_dim // tp + keys) + inputs * config.ffn_hidden_size // tp
    head = padded_rows(config.vocab_size, tp)
    return widths.compute * config.hidden_size * rows, widths.compute * config.hidden_size * head
