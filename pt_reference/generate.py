"""The engine's side of this backend: one pass of the model over the new tokens of several sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from telechat_twins.core.inference.adapters import ReadPair
from telechat_twins.core.inference.pages import PAGE_SIZE
from telechat_twins.core.inference.ring_pages import RankStep, pages_of_rank, rank_step
from telechat_twins.core.inference.runner import Step
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.position import RotaryRows
from telechat_twins.core.model.quantize import Int8Matrix
from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.kernels.pytorch.decoding import decoder_program
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.adapters import apply_adapters
from telechat_twins.pt_reference.collectives import broadcast
from telechat_twins.pt_reference.inference_parallel import spread
from telechat_twins.pt_reference.model import Decoder, Rope
from telechat_twins.pt_reference.ops import short_page
from telechat_twins.pt_reference.paged_attention import apply_paged_attention
from telechat_twins.pt_reference.parallelize import parallelize
from telechat_twins.pt_reference.ring_pages import Places, apply_ring_pages, place_step
from telechat_twins.pt_reference.weights import held_weight, load_weights, to_numpy

__all__ = ["Runner", "on_cpu", "short_page"]

ModelInputs = tuple[Tensor, Rope, ops.Pages | Places, Tensor | None]


def on_cpu() -> bool:
    """Whether models of this process compute on its processors."""
    return ops.device().type == "cpu"


class Runner:
    """core.inference.runner.Runner on the device of this process."""

    def __init__(
        self,
        config: ModelConfig,
        get: Callable[[str], np.ndarray | Int8Matrix],
        num_pages: int,
        precision: str = "fp32",
        page_size: int = PAGE_SIZE,
        mesh: Mesh | None = None,
        adapters: Sequence[ReadPair] = (),
    ) -> None:
        """Weights come from ``get(name)``, one at a time, as they are or in 8 bits (core.model.quantize);
        ``num_pages`` as core.inference.pages.PagePool counts them. With ``mesh`` this rank holds its part of the model
        (core.parallel.sharding.chunk_table) and of the pages (core.inference.ring_pages), and all ranks make the same
        steps; ``get`` and ``adapters`` (core.inference.adapters) give its part of the weights."""
        self.config, self.num_pages, self.page_size = config, num_pages, page_size
        self.mesh = mesh
        if mesh is None:
            self.model = Decoder(config, precision).to(ops.device())
        else:
            (self.model,), _ = parallelize(config, mesh, precision)
        self.model.eval()
        load_weights(self.model, get)
        self._adapters = apply_adapters(self.model, adapters) if adapters else None
        if mesh is None or mesh.cp.size == 1:
            apply_paged_attention(self.model, num_pages, page_size)
        else:
            apply_ring_pages(self.model, pages_of_rank(num_pages, mesh.cp.size), page_size, mesh.cp)
        # Steps of few tokens in one call, where it serves.
        self.program = None
        if mesh is None:
            dtypes = self.model.dtypes
            caches = [block.attn.core for block in self.model.layers.values()]
            self.program = decoder_program(
                config,
                (dtypes.weight, dtypes.compute, dtypes.residual),
                lambda name: held_weight(self.model, name),
                [(cache.k, cache.v) for cache in caches],
                () if self._adapters is None else self._adapters.held,
            )
        self._rows = RotaryRows(config, np.float64 if self.model.dtypes.stat == torch.float64 else np.float32)

    @torch.inference_mode()
    def run(self, step: Step) -> np.ndarray:
        """Store keys and values of the new tokens; logits [W, V] float32 of the wanted ones."""
        if self.program is not None and self.program.takes(step):
            return self.program.run(step, self._rows.rows(step.positions, step.scaling_lengths))
        if self.mesh is None:
            pages = ops.place_pages(step, self.page_size, self.model.dtypes.compute)
            return to_numpy(self.model(*self._inputs(step, pages))[0])
        if self.mesh.cp.size == 1:
            pages = ops.place_pages(step, self.page_size, self.model.dtypes.compute)
            return to_numpy(spread(self.model, self.mesh, *self._inputs(step, pages), len(step.wanted)))
        own = rank_step(step, self.mesh.cp.size, self.mesh.cp.rank, self.page_size)
        places = place_step(own, self.page_size, self.model.dtypes.compute)
        logits = spread(self.model, self.mesh, *self._inputs(own, places), len(own.wanted))
        return to_numpy(logits)[own.order]

    def _inputs(self, step: Step | RankStep, places: ops.Pages | Places) -> ModelInputs:
        """Ids, rotary tables, ``places`` and what is wanted, as the model takes them."""
        if self._adapters is not None:
            self._adapters.place(step.owners)
        device = ops.device()
        rope = tuple(
            torch.from_numpy(table[None, :, None]).to(device)
            for table in self._rows.rows(step.positions, step.scaling_lengths)
        )
        wanted = None if step.wants_all else torch.from_numpy(step.wanted).to(device)
        return torch.from_numpy(step.ids[None]).to(device), rope, places, wanted

    def share(self, words: np.ndarray) -> np.ndarray:
        """The int32 words of rank 0, on every rank."""
        if self.mesh is None:
            return words
        return broadcast(torch.from_numpy(words).to(ops.device()), self.mesh.world, 0).cpu().numpy()
