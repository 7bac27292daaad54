"""Gradients of one rank in flat buckets: accumulated over micro-batches, then summed over the ranks that share weights.

The sums of all buckets are started together after the last backward pass: MindSpore's PyNative mode returns the
gradients of a pass at its end. With ZeRO-1 (Rajbhandari et al., arXiv 1910.02054) each of the n ranks receives, and
updates, 1/n of every bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, ops

from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.core.parallel.sharding import Bucket, Shard, plan_buckets
from telechat_twins.core.parallel.transfer import Handle
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.telechat_ms.collectives import all_reduce, start_all_reduce, start_reduce_scatter

BYTES = 4  # of a float32 gradient


class GradientBuckets:
    """The accumulators. ``buckets`` is the plan, ``part`` of ``parts`` what this rank keeps of each; ``by_class`` as in
    core.parallel.sharding.plan_buckets."""

    def __init__(
        self,
        weights: Mapping[str, Parameter],
        table: Mapping[str, Shard],
        mesh: Mesh,
        dtype: ms.Type,
        by_class: bool = False,
    ) -> None:
        layout, replicas = mesh.layout, mesh.replicas
        self.weights, self.mesh, self.dtype = dict(weights), mesh, dtype
        self.parts, self.part = (replicas.size, replicas.rank) if layout.zero1 else (1, 0)
        limit = int(layout.bucket_mb * 2**20 / BYTES) if replicas.size > 1 else None
        self.buckets = plan_buckets(table, self.parts, limit, by_class)
        # A fused operator adds into flat vectors that stay; without one, tensors are held until they are joined.
        self.adder = kernels.serving("adamw", dtype)
        if not hasattr(self.adder, "accumulate"):
            self.adder = None
        self._places = {s.name: (number, s.start) for number, b in enumerate(self.buckets) for s in b.segments}
        self._flat: dict[int, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self._passes = 0
        self._seen: dict[str, int] = {}

    def expect(self, passes: int) -> None:
        """``passes`` backward passes will each add to every parameter; then come the sums over ranks."""
        self._passes, self._seen = passes, {}

    def add(self, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Take the gradients of one backward pass."""
        for name, gradient in zip(names, gradients, strict=True):
            again = self._seen.get(name, 0)
            if self.adder is not None:
                number, start = self._places[name]
                if number not in self._flat:
                    self._flat[number] = ms.mint.zeros(self.buckets[number].size, dtype=self.dtype)
                self.adder.accumulate(self._flat[number], gradient, start, again > 0)
            else:
                gradient = ops.cast(gradient, self.dtype)
                self._held[name] = self._held[name] + gradient if again else gradient
            self._seen[name] = again + 1

    def finish(self) -> list[Tensor]:
        """This rank's part of every bucket's total, once the backward passes are done."""
        for name in self.weights:
            if self._seen.get(name, 0) != self._passes:
                raise RuntimeError(f"{name} received {self._seen.get(name, 0)} of {self._passes} gradients")
        handles = [self._start(number, bucket) for number, bucket in enumerate(self.buckets)]
        self._held = {}
        return [handle.wait() for handle in handles]

    def discard(self) -> None:
        """Forget what was accumulated."""
        self._held, self._seen = {}, {}

    def _start(self, number: int, bucket: Bucket) -> Handle[Tensor]:
        flat = self._joined(bucket) if self.adder is None else self._flat[number]
        # Sums over ranks of the model itself, where each computed a part of the gradient of one parameter.
        for axis in bucket.sum_over:
            flat = all_reduce(flat, getattr(self.mesh, axis))
        replicas = self.mesh.replicas
        return start_reduce_scatter(flat, replicas, 0) if self.parts > 1 else start_all_reduce(flat, replicas)

    def _joined(self, bucket: Bucket) -> Tensor:
        pieces = [self._held[segment.name].reshape(-1) for segment in bucket.segments]
        missing = bucket.size - sum(segment.size for segment in bucket.segments)
        if missing:
            pieces.append(ms.mint.zeros(missing, dtype=self.dtype))
        return ops.concat(pieces)


def owned_range(bucket: Bucket, part: int, parts: int) -> slice:
    """The elements of a bucket that rank ``part`` of ``parts`` keeps."""
    size = bucket.size // parts
    return slice(part * size, (part + 1) * size)
