"""What frozen parameters and adapters, and a loss by blocks of rows, change in the tensors that a rank keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.head_rows import head_blocks, trained_by_rows
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.model.params import ParamSpec
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.sharding import Shard
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.memory.executor import Executor


class Trained(NamedTuple):
    """Of a pipeline rank: ``extra`` bytes a position and block that adapters add to what a block keeps or, negative,
    spare; ``passed`` blocks of each chunk, from its first, that run forward only; ``cast``, the share of the blocks'
    matrices that are trained; whether the ``head`` is; whether its loss is computed ``by_rows``."""

    extra: float = 0.0
    passed: Sequence[int] = ()
    cast: float = 1.0
    head: bool = True
    by_rows: bool = False


WHOLE = Trained()  # a model without frozen parameters


def trained_of(
    config: ModelConfig,
    layout: Layout,
    table: Mapping[str, Shard],
    constants: Collection[str],
    chunks: Sequence[Sequence[int]],
    first: int,
    widths: Widths,
    executor: Executor,
    lora: LoraConfig | None,
    by_rows: bool,
) -> Trained:
    """For a rank with the parameters ``table`` and the blocks ``chunks``, of which those before block ``first`` have no
    trained parameter in or before them. ``by_rows``: of ``head_by_rows``."""
    matrices = {name: shard for name, shard in table.items() if name.startswith("layers.") and name.endswith(".weight")}
    matrices = {name: shard for name, shard in matrices.items() if len(shard.shape) == 2}
    sizes = {name: shard.shape[0] * shard.shape[1] for name, shard in matrices.items()}
    updated = sum(size for name, size in sizes.items() if name not in constants)
    return Trained(
        _extra(config, layout, table, constants, widths, executor, lora),
        [sum(layer < first for layer in layers) for layers in chunks],
        updated / sum(sizes.values()) if sizes else 1.0,
        not (_head(config) in table and _head(config) in constants),
        by_rows and _head(config) in table,
    )


def _head(config: ModelConfig) -> str:
    return "embed.weight" if config.tied_embeddings else "head.weight"


def head_by_rows(
    config: ModelConfig,
    layout: Layout,
    constants: Collection[str],
    precision: str,
    executor: Executor,
    positions: int,
    whole_logits: bool,
) -> bool:
    """Whether the loss of a micro-batch of ``positions`` is computed by blocks of rows. ``whole_logits``: the objective
    reads the logits, or weighs the tokens."""
    if layout.tp > 1 or whole_logits:
        return False
    if _head(config) in constants:
        return executor.loss_by_rows and Widths.of(precision).compute == 4

    plain = precision == "fp32" or (precision in ("bf16", "amp") and config.num_tokens == config.vocab_size)
    found = trained_by_rows(positions, config.vocab_size, config.hidden_size, Widths.of(precision).compute)
    return executor.trained_by_rows and plain and found


def first_trained(config: ModelConfig, names: Collection[str], constants: Collection[str]) -> int:
    """The first block through which gradients pass, of a model with the parameters ``names``; past the last one where
    only the head is trained."""

    def block(name: str) -> int:
        if name.startswith("layers."):
            return int(name.split(".")[1])
        return 0 if name == "embed.weight" else config.num_layers

    return min((block(name) for name in names if name not in constants), default=config.num_layers)


def spared_operations(
    config: ModelConfig, table: Mapping[str, ParamSpec], constants: Collection[str], attention: float
) -> tuple[float, float]:
    """(operations a token that products are spared, what is left of ``attention``).

    A frozen matrix has no gradient of its own: two products in place of three, and one in blocks that gradients do not
    pass through, whose attention has a forward pass alone, a third. An adapter has all three.
    """
    first = first_trained(config, table, constants)
    frozen = {name: table[name] for name in constants if table[name].kind in ("matrix", "head")}
    passed = [name for name in frozen if name.startswith("layers.") and int(name.split(".")[1]) < first]
    less = 2 * sum(spec.size for spec in frozen.values()) + 2 * sum(frozen[name].size for name in passed)
    return less, attention * (1.0 - 2.0 / 3.0 * first / config.num_layers)


def head_kept(config: ModelConfig, cast: int, trained: Trained) -> int:
    """Bytes that a graph keeps for the head's matrix: its ``cast``, or by rows its own gradient, in float32."""
    if trained.by_rows:
        return 4 * config.vocab_size * config.hidden_size * trained.head
    return cast


def rows_bytes(config: ModelConfig, positions: int, widths: Widths, trained: bool) -> int:
    """Bytes beside what is kept while the loss is computed by rows: the largest block of logits and, of a ``trained``
    head, its input, whose gradient is kept, and in 16 bits a block's part of the head's."""

    blocks = head_blocks(positions, config.vocab_size, config.ffn_hidden_size, trained)
    width = widths.compute
    block = width * config.vocab_size * max(one.stop - one.start for one in blocks)
    part = 4 * config.vocab_size * config.hidden_size if width < 4 else 0
    return block + (positions * config.hidden_size * width + part) * trained


def _extra(
    config: ModelConfig,
    layout: Layout,
    table: Mapping[str, Shard],
    constants: Collection[str],
    widths: Widths,
    executor: Executor,
    lora: LoraConfig | None,
) -> float:
    """``Trained.extra``, a mean over the rank's blocks.

    An adapter keeps its low-rank product; with dropout it reads a copy of its input, which is kept in its place, and so
    is the mask. Spared are the inputs that no gradient of a weight needs, unless they are computed
    again anyway; the attention's output stays for the attention.
    """
    tp, blocks = layout.tp, [name.split(".") for name in table if name.startswith("layers.")]
    layers = max(1, len({parts[1] for parts in blocks}))
    sizes: dict[tuple[str, ...], int] = {("q", "k", "v"): config.hidden_size, ("gate", "up"): config.hidden_size}
    sizes |= {("down",): config.ffn_hidden_size // tp, ("o",): config.num_heads * config.head_dim // tp}
    inputs = {module: modules for modules in sizes for module in modules}
    dropout = lora is not None and lora.dropout > 0.0
    read: set[tuple[str, tuple[str, ...]]] = set()
    dropped: set[tuple[str, tuple[str, ...]]] = set()
    for parts in blocks:
        if parts[-2] not in inputs or parts[-1] == "bias" or ".".join(parts) in constants:
            continue
        where = dropped if dropout and parts[-1].startswith("lora_") else read
        where.add((parts[1], inputs[parts[-2]]))
    extra: float = 0.0
    if not (executor.recomputes_inputs and tp == 1):
        whole = sum(size for modules, size in sizes.items() if modules != ("o",))
        extra -= whole - sum(sizes[modules] for _, modules in read if modules != ("o",)) / layers
    extra += sum(shard.shape[0] for name, shard in table.items() if name.endswith(".lora_a")) / layers
    copies = sum(sizes[modules] for _, modules in dropped) / layers
    return extra * widths.compute + copies * (widths.compute + (widths.compute if executor.wide_masks else 1))
