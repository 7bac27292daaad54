"""The engine's side of this backend: one pass of the model over the new tokens of several sequences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from core.config import ModelConfig
from core.pages import PAGE_SIZE
from core.position import RotaryRows
from core.quantize import Int8Matrix
from core.runner import Step
from pt_reference import ops
from pt_reference.collectives import broadcast
from pt_reference.inference_parallel import spread
from pt_reference.mesh import Mesh
from pt_reference.model import Decoder, to_numpy
from pt_reference.paged_attention import apply_paged_attention
from pt_reference.parallelize import parallelize
from pt_reference.weights import load_weights


class Runner:
    """core.runner.Runner on the device of this process."""

    def __init__(
        self,
        config: ModelConfig,
        get: Callable[[str], np.ndarray | Int8Matrix],
        num_pages: int,
        precision: str = "fp32",
        page_size: int = PAGE_SIZE,
        mesh: Mesh | None = None,
    ) -> None:
        """Weights come from ``get(name)``, one at a time, as they are or in 8 bits (core.quantize); ``num_pages`` as
        core.pages.PagePool counts them. With ``mesh`` this rank holds its part of the model (core.sharding.chunk_table)
        and all ranks make the same steps; ``get`` gives the part."""
        self.config, self.num_pages, self.page_size = config, num_pages, page_size
        self.mesh = mesh
        if mesh is None:
            self.model = Decoder(config, precision).to(ops.device())
        else:
            (self.model,), _ = parallelize(config, mesh, precision)
        self.model.eval()
        load_weights(self.model, get)
        apply_paged_attention(self.model, num_pages, page_size)
        self._rows = RotaryRows(config, np.float64 if self.model.dtypes.stat == torch.float64 else np.float32)

    @torch.inference_mode()
    def run(self, step: Step) -> np.ndarray:
        """Store keys and values of the new tokens; logits [W, V] float32 of the wanted ones."""
        device = ops.device()
        rope = tuple(
            torch.from_numpy(table[None, :, None]).to(device)
            for table in self._rows.rows(step.positions, step.scaling_lengths)
        )
        ids = torch.from_numpy(step.ids[None]).to(device)
        wanted = None if step.wants_all else torch.from_numpy(step.wanted).to(device)
        pages = ops.place_pages(step, self.page_size, self.model.dtypes.compute)
        if self.mesh is None:
            return to_numpy(self.model(ids, rope, pages, wanted)[0])
        return to_numpy(spread(self.model, self.mesh, ids, rope, pages, wanted, len(step.wanted)))

    def share(self, words: np.ndarray) -> np.ndarray:
        """The int32 words of rank 0, on every rank."""
        if self.mesh is None:
            return words
        return broadcast(torch.from_numpy(words).to(ops.device()), self.mesh.world, 0).cpu().numpy()
