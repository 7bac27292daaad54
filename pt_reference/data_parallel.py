"""Gradients of one rank in flat buckets: accumulated over micro-batches, then summed over the ranks that share weights.

A bucket's reduction starts when the last backward pass has delivered all its gradients, while that pass goes on with
earlier layers. With ZeRO-1 (Rajbhandari et al., arXiv 1910.02054) each of the n ranks receives, and updates, 1/n of
every bucket.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.core.parallel.sharding import Bucket, Shard, plan_buckets
from telechat_twins.core.parallel.transfer import Handle
from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.pytorch.room import GradientPlace, zeros
from telechat_twins.pt_reference.collectives import all_reduce, start_all_reduce, start_reduce_scatter

BYTES = 4  # of a float32 gradient


class GradientBuckets:
    """The accumulators. ``buckets`` is the plan, ``part`` of ``parts`` what this rank keeps of each; ``by_class`` as in
    core.parallel.sharding.plan_buckets."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        table: Mapping[str, Shard],
        mesh: Mesh,
        dtype: torch.dtype,
        by_class: bool = False,
    ) -> None:
        layout, replicas = mesh.layout, mesh.replicas
        self.mesh, self.dtype = mesh, dtype
        self.parts, self.part = (replicas.size, replicas.rank) if layout.zero1 else (1, 0)
        limit = int(layout.bucket_mb * 2**20 / BYTES) if replicas.size > 1 else None
        self.buckets = plan_buckets(table, self.parts, limit, by_class)
        device = next((weight.device for weight in weights.values()), None)  # a rank may have none to train
        self._flat = [zeros(bucket.size, dtype, device) for bucket in self.buckets]
        self.adder = kernels.adder(dtype, torch.device("cpu") if device is None else device)
        self._pending: dict[int, Handle[Tensor]] = {}
        self._passes = 0
        self._seen: dict[str, int] = {}
        self._waits: list[int] = []  # gradients that a bucket's reduction waits for
        self._places: list[GradientPlace] = []
        for number, bucket in enumerate(self.buckets):
            for segment in bucket.segments:
                weight = weights[segment.name]
                view = self._flat[number][segment.start : segment.start + segment.size].view(weight.shape)
                place = GradientPlace(view, weight)
                self._places.append(place)
                weight.register_post_accumulate_grad_hook(self._hook(segment.name, number, view, place))

    def expect(self, passes: int) -> None:
        """``passes`` backward passes will each add to every parameter; then come the sums over ranks."""
        self._passes, self._seen = passes, {}
        self._waits = [passes * len(bucket.segments) for bucket in self.buckets]
        for place in self._places:
            place.offer()

    def finish(self) -> list[Tensor]:
        """This rank's part of every bucket's total, once the backward passes are done."""
        for number, bucket in enumerate(self.buckets):
            late = [s.name for s in bucket.segments if self._seen.get(s.name, 0) != self._passes]
            if late:
                raise RuntimeError(f"{late[0]} received {self._seen.get(late[0], 0)} of {self._passes} gradients")
            if number not in self._pending:
                self._start(number)
        return [self._pending.pop(number).wait() for number in range(len(self.buckets))]

    def discard(self) -> None:
        """Forget what was accumulated: the next pass writes over it."""
        self._seen = {}
        for place in self._places:
            place.withdraw()

    def _hook(self, name: str, number: int, accumulator: Tensor, place: GradientPlace):  # type: ignore[no-untyped-def]
        bucket = self.buckets[number]

        def take(weight: Tensor) -> None:
            gradient, again = weight.grad, self._seen.get(name, 0)
            assert gradient is not None  # it has just been accumulated
            place.withdraw()
            if gradient.data_ptr() == accumulator.data_ptr():
                pass  # the first one, computed in its place
            elif self.adder is not None:
                self.adder.accumulate(accumulator, gradient, again > 0)
            elif again:
                accumulator.add_(gradient)
            else:
                accumulator.copy_(gradient)
            weight.grad = None
            self._seen[name] = again + 1
            self._waits[number] -= 1
            # Sums over ranks of the model itself wait for the end: their ranks may be at different places now.
            if not bucket.sum_over and not self._waits[number]:
                self._start(number)

        return take

    def _start(self, number: int) -> None:
        flat = self._flat[number]
        for axis in self.buckets[number].sum_over:
            flat.copy_(all_reduce(flat, getattr(self.mesh, axis)))
        replicas = self.mesh.replicas
        scattered = self.parts > 1
        self._pending[number] = (
            start_reduce_scatter(flat, replicas, 0) if scattered else start_all_reduce(flat, replicas)
        )


def owned_range(bucket: Bucket, part: int, parts: int) -> slice:
    """The elements of a bucket that rank ``part`` of ``parts`` keeps."""
    size = bucket.size // parts
    return slice(part * size, (part + 1) * size)
