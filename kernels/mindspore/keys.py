"""Visible keys of a forward pass, as attention takes them."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from mindspore import Tensor

from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.mindspore import composite
from telechat_twins.kernels.reference import visible_keys


class Keys(NamedTuple):
    """Visible keys in the form of the module that serves attention, and as the ranges they were made from."""

    device: Tensor | KeyRanges
    module: ModuleType
    ranges: KeyRanges

    def as_mask(self) -> Tensor:
        """For composite operators, which serve float64: additive, [B or 1, 1, 1, S, T]."""
        return composite.hidden_keys(visible_keys(self.ranges.ranges, self.ranges.num_keys))
