"""Visible keys of a forward pass, placed for the implementation of attention."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from mindspore import Tensor

from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.mindspore import composite
from telechat_twins.kernels.reference import visible_keys


class Keys(NamedTuple):
    """``device``: the form that ``module`` takes; ``ranges``: the key ranges [B or 1, S, 2] on the host."""

    device: Tensor | KeyRanges
    module: ModuleType
    ranges: KeyRanges

    def as_mask(self) -> Tensor:
        """The additive mask [B or 1, 1, 1, S, T] of the composite operators."""
        return composite.hidden_keys(visible_keys(self.ranges.ranges, self.ranges.num_keys))
