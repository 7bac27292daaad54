"""Incremental decoding of one sequence with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from core.config import ModelConfig
from pt_reference import ops
from pt_reference.model import Decoder, KeyValueCache, to_numpy


class Session:
    """One growing sequence. The cache holds rotated keys, so the rotary base must not move under it.

    ``rescale="request"`` fixes base and attention scale from the planned final length given to ``reset``;
    ``rescale="step"`` takes them from the length at each step, while cached keys keep the old
    ones, as in the released code.
    """

    def __init__(
        self,
        config: ModelConfig,
        get: Callable[[str], np.ndarray],
        precision: str = "fp32",
        max_len: int | None = None,
        rescale: str = "request",
    ) -> None:
        self.config, self.rescale = config, rescale
        self.model = Decoder(config, precision).to(ops.device()).eval()
        self.model.load_weights(get)
        self._capacity = max_len or config.max_seqlen
        self.reset()

    def reset(self, total_len: int | None = None) -> None:
        """Forget the sequence. ``total_len``: tokens that prompt and answer may reach together."""
        self.length = 0
        self._total_len = total_len or self._capacity
        self._capacity = max(self._capacity, self._total_len)
        compute = self.model.dtypes.compute
        self._caches = [KeyValueCache(1, self._capacity, self.config, compute) for _ in range(self.config.num_layers)]

    @torch.inference_mode()
    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens; logits [V] float32 for the token after the last of them."""
        end = self.length + len(ids)
        if end > self._capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self._capacity}; reset with a larger total_len")
        positions = np.arange(self.length, end)[None]
        rope = self.model.rope(positions, end if self.rescale == "step" else self._total_len)
        input_ids = torch.tensor([list(ids)], device=ops.device())
        blocks = ops.attention_blocks(len(ids), end, None)
        logits = self.model(input_ids, rope, blocks, self._caches)
        self.length = end
        return to_numpy(logits[0, -1])
