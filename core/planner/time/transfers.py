"""Seconds of collectives and messages, from where a layout's groups lie on a machine."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.sharding import kv_copies
from telechat_twins.core.parallel.traffic import wire_bytes
from telechat_twins.core.planner.machine import LinkSpec, Machine, OperationSpec

GIGA, MICRO = 1e9, 1e-6


@dataclass(frozen=True)
class Way:
    """How a group's members reach each other: bytes per second and seconds a hop. ``measured``: the operations that
    have figures of their own."""

    size: int
    bandwidth: float
    latency: float
    measured: Mapping[str, OperationSpec]

    def seconds(self, op: str, calls: float, payload: float) -> float:
        """Time of ``calls`` of ``op`` (as in core.parallel.traffic) that pass in ``payload`` bytes in all.

        A ring moves ``wire_bytes`` at the bandwidth of its slowest link; small messages cost the hops of a tree.
        """
        if self.size == 1 or not calls:
            return 0.0
        moved = wire_bytes(op, self.size, 1) * payload
        if op in self.measured:
            own = self.measured[op]
            if own.sizes:
                return calls * MICRO * interpolated(own.sizes, own.microseconds, payload / calls)
            return calls * own.latency * MICRO + moved / (own.bandwidth * GIGA)
        hops = 1 if op in ("shift", "send") else math.ceil(math.log2(self.size)) * (2 if op == "all_reduce" else 1)
        return calls * hops * self.latency + moved / self.bandwidth


def interpolated(sizes: Sequence[int], times: Sequence[float], size: float) -> float:
    """The time of a message of ``size`` bytes: linear between the sizes measured and beyond the largest, constant below
    the smallest."""
    if size <= sizes[0] or len(sizes) == 1:
        return times[0]
    after = min(bisect_left(sizes, size), len(sizes) - 1)
    slope = (times[after] - times[after - 1]) / (sizes[after] - sizes[after - 1])
    return times[after - 1] + max(0.0, slope) * (size - sizes[after - 1])


class Ways:
    """The ways of all groups of ``layout`` on ``machine``, for the first rank of the second stage if there is one."""

    def __init__(self, model: ModelConfig, layout: Layout, machine: Machine) -> None:
        tp, cp, dp, ulysses = layout.tp, layout.cp, layout.dp, layout.ulysses
        # (members, distance in ranks between neighbours) of each group; tp is fastest (core.parallel.layout).
        groups = {
            "tp": (tp, 1),
            "kv": (kv_copies(model, layout), 1),
            "ulysses": (ulysses, tp),
            "ring": (layout.ring, tp * ulysses),
            "cp": (cp, tp),
            "dp": (dp, tp * cp),
            "replicas": (dp * cp, tp),
            "forward_out": (layout.pp, tp * cp * dp),
            "backward_out": (layout.pp, tp * cp * dp),
            "tied": (min(layout.pp, 2), tp * cp * dp * (layout.pp - 1)),
            "world": (layout.world, 1),
        }
        self.ways = {name: _way(machine, *place) for name, place in groups.items()}

    def seconds(self, traffic: Mapping[tuple[str, str], Sequence[float]]) -> float:
        """Time of all collectives of ``traffic`` one after the other."""
        return sum(self.ways[group].seconds(op, *row) for (op, group), row in traffic.items())


def _way(machine: Machine, size: int, stride: int) -> Way:
    per_node = machine.devices_per_node
    span = max(1, size * stride)
    # A group whose ranks do not fill whole nodes may straddle one; then its slowest link is between nodes.
    inside = span <= per_node and per_node % span == 0
    link = machine.node if inside else machine.cluster
    members = 1 if inside else max(1, min(size, per_node // max(1, stride)))
    bandwidth = _reached(link)
    if members > 1:
        # The members on one node send over all their ports, and exchange the parts inside the node.
        bandwidth = min(bandwidth * members, _reached(machine.node))
    own = {one.op: one for one in link.measured}
    if "shift" in own:
        own.setdefault("send", own["shift"])
    return Way(size, bandwidth, link.latency.value * MICRO, own)


def _reached(link: LinkSpec) -> float:
    return link.bandwidth.value * GIGA * link.efficiency.value
