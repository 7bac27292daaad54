"""From a layout to a model that spans its ranks: every step, in the order in which it is applied."""

from __future__ import annotations

from collections.abc import Callable, Collection

from telechat_twins.core.launch.heartbeat import open_heartbeat
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.parallel.layout import Layout, check_layout
from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.core.parallel.sharding import Shard, chunk_table, is_tied_across, kv_copies
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.context_parallel import apply_context_parallel
from telechat_twins.pt_reference.mesh import join, make_mesh
from telechat_twins.pt_reference.model import Decoder
from telechat_twins.pt_reference.tensor_parallel import apply_tensor_parallel
from telechat_twins.pt_reference.weights import freeze


def open_mesh(config: ModelConfig, layout: Layout) -> Mesh:
    """Meet the other processes and make the groups of ``layout``; UserError before any group if it cannot be."""
    rank, world = join()
    check_layout(layout, config, world=world)
    return make_mesh(layout, rank, open_heartbeat(), is_tied_across(config, layout), kv_copies(config, layout))


def parallelize(
    config: ModelConfig,
    mesh: Mesh,
    precision: str = "fp32",
    recompute: str = "none",
    lora: LoraConfig | None = None,
    trainable: Callable[[dict[str, Shard]], Collection[str]] | None = None,
) -> tuple[list[Decoder], dict[str, Shard]]:
    """The model chunks that this rank holds, communicating where the layout wants it, and their parameters' shards.

    ``trainable`` names those of a table that train (core.train.trainable); the others are constants. By default all do.

    Data parallelism (pt_reference.data_parallel, inside the optimizer) and the pipeline's order of execution
    (pt_reference.pipeline) surround what is made here.
    """
    table: dict[str, Shard] = {}
    stages = []
    for chunk in range(mesh.layout.virtual):
        # 1. Only the layers of this stage, and of each matrix only this rank's part, are ever allocated.
        here = chunk_table(config, mesh.layout, mesh.coord, chunk, lora)
        stage = Decoder(config, precision, recompute, here, lora)
        if trainable is not None:
            freeze(stage, trainable(here))
        stage = stage.to(ops.device()).train()
        # 2. Tensor and sequence parallelism: communication around the split matrices.
        apply_tensor_parallel(stage, mesh)
        # 3. Context parallelism: attention over all positions of the sequence.
        apply_context_parallel(stage, mesh)
        stages.append(stage)
        table |= here
    return stages, table
