"""The gradients of a grown model as gradients of the one it grew from, and those of its new entries."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from telechat_twins.convert.growth.plan import GrowthPlan
from telechat_twins.core.model.growth import axis_maps
from telechat_twins.core.model.params import parameter_axes, parameter_table

Places = tuple[np.ndarray, ...]  # an open mesh (numpy.ix_)


def old_entries(plan: GrowthPlan, name: str) -> tuple[str, Places, Places] | None:
    """The old parameter that ``name`` continues, and where its entries are in the grown tensor and in the old one.

    None for a parameter of a new block.
    """
    growth, old_name = plan.growth, name
    if name.startswith("layers."):
        layer = int(name.split(".")[1])
        if layer in growth.new_layers:
            return None
        old_name = f"layers.{growth.layers[layer]}.{name.split('.', 2)[2]}"
    maps = [axis_maps(growth.before, growth.after)[axis] for axis in parameter_axes(name)]
    return old_name, np.ix_(*[np.flatnonzero(m >= 0) for m in maps]), np.ix_(*[m[m >= 0] for m in maps])


def gradients_of_old(plan: GrowthPlan, grown: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients with respect to the old model's parameters, float64, from those of the grown one.

    A parameter that was multiplied by k has its gradient times k; one that was copied sums those of its copies.
    """
    total = {name: np.zeros(spec.shape) for name, spec in parameter_table(plan.source).items()}
    for name, gradient in grown.items():
        old = old_entries(plan, name)
        if old is not None:
            np.add.at(total[old[0]], old[2], gradient[old[1]].astype(np.float64) * plan.scale(name))
    return total


def gradients_of_new(plan: GrowthPlan, grown: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients of new entries, by parameter, flat; parameters without any are left out."""
    found = {}
    for name, gradient in grown.items():
        new = np.ones(gradient.shape, bool)
        old = old_entries(plan, name)
        if old is not None:
            new[old[1]] = False
        if new.any():
            found[name] = gradient[new]
    return found
