"""The engine's side of this backend: one pass of the model over the new tokens of several sequences."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor

from core.config import ModelConfig
from core.pages import PAGE_SIZE
from core.position import RotaryRows
from core.quantize import Int8Matrix
from core.runner import Step
from telechat_ms import ops
from telechat_ms.collectives import broadcast
from telechat_ms.inference_parallel import spread
from telechat_ms.mesh import Mesh
from telechat_ms.model import Decoder, to_numpy
from telechat_ms.paged_attention import apply_paged_attention
from telechat_ms.parallelize import parallelize
from telechat_ms.weights import load_weights


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
            self.model = Decoder(config, precision)
        else:
            (self.model,), _ = parallelize(config, mesh, precision)
        self.model.set_train(False)
        load_weights(self.model, get)
        apply_paged_attention(self.model, num_pages, page_size)
        self._rows = RotaryRows(config, np.float64 if self.model.dtypes.stat == ms.float64 else np.float32)

    def run(self, step: Step) -> np.ndarray:
        """Store keys and values of the new tokens; logits [W, V] float32 of the wanted ones."""
        rope = tuple(Tensor(table[None, :, None]) for table in self._rows.rows(step.positions, step.scaling_lengths))
        pages = ops.place_pages(step, self.page_size, self.model.dtypes.compute)
        wanted = None if step.wants_all else Tensor(step.wanted)
        if self.mesh is None:
            return to_numpy(self.model(Tensor(step.ids[None]), rope, pages, wanted))[0]
        return to_numpy(spread(self.model, self.mesh, Tensor(step.ids[None]), rope, pages, wanted, len(step.wanted)))

    def share(self, words: np.ndarray) -> np.ndarray:
        """The int32 words of rank 0, on every rank."""
        return words if self.mesh is None else broadcast(Tensor(words), self.mesh.world, 0).asnumpy()
