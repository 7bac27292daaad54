"""AdamW with decoupled decay on flat fp32 masters.

Masters and states are flat vectors, one a bucket (core.parallel.sharding), so that an update is a handful of operators
whatever the number of layers. A rank keeps its part of each bucket only, and the ranks that share weights gather the
updated parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from telechat_twins.core.checkpoint.read import TensorPiece
from telechat_twins.core.config import OptimConfig
from telechat_twins.core.model.growth import Growth
from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.core.parallel.sharding import Box, FlatPiece, Shard, flat_pieces
from telechat_twins.core.train.births import birth_classes
from telechat_twins.core.train.recipe import class_decay, class_rate, corrections, is_young, tells_classes_apart
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.mindspore import composite as composite
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.telechat_ms.collectives import agree, all_gather
from telechat_twins.telechat_ms.data_parallel import GradientBuckets
from telechat_twins.telechat_ms.ops import total

Read = Callable[[str, Box], np.ndarray]


class AdamW:
    """Owns the masters, their gradients and m, v. The model's weights are copies that ``step`` refreshes."""

    def __init__(
        self,
        weights: Mapping[str, Parameter],
        table: Mapping[str, Shard],
        config: OptimConfig,
        dtype: ms.Type,
        mesh: Mesh,
    ) -> None:
        self.weights, self.table, self.config, self.mesh = dict(weights), dict(table), config, mesh
        self.dtype, self.step_count = dtype, 0
        self.gradients = GradientBuckets(weights, table, mesh, dtype, tells_classes_apart(config))
        self.parts: list[Tensor] = []  # gradients after ``reduce``
        self._stale: set[int] = set()  # buckets whose masters changed and whose weights did not yet
        self.masters, self.m, self.v = ([self._vector(number, kind) for number in self._numbers] for kind in "wmv")
        # Buckets with entries that came to be by growth: the class of each, and after how many updates each class came.
        self._young: dict[int, tuple[Tensor, list[int]]] = {}

    def reduce(self) -> None:
        """Sum the accumulated gradients over ranks; what this rank keeps of them is in ``parts``."""
        self.parts = self.gradients.finish()

    def grad_norm(self) -> float:
        """L2 norm over the gradients of all ranks; the parts are summed in float64, each parameter once."""
        counted = self.gradients.parts > 1 or self.mesh.replicas.rank == 0
        squares = [
            self._square_sum(part)
            for part, bucket in zip(self.parts, self.gradients.buckets, strict=True)
            if bucket.owner and counted
        ]
        mine = sum(float(square.asnumpy().item()) for square in squares)
        return math.sqrt(agree([mine], self.mesh.world, "sum")[0])

    def _square_sum(self, part: Tensor) -> Tensor:
        adder = self.gradients.adder
        return total(ops.square(ops.cast(part, ms.float64))) if adder is None else adder.square_sum(part)

    def step(self, lr: float, grad_scale: float) -> None:
        """One update with gradients times ``grad_scale``; the accumulators are empty afterwards.

        ``lr`` is that of the vector-like parameters; core.train.recipe has those of the other classes.
        """
        self.step_count += 1
        config, fused = self.config, kernels.serving("adamw", self.dtype)
        for number, bucket in enumerate(self.gradients.buckets):
            rate = class_rate(config, lr, bucket.mup_class)
            decay = class_decay(config, bucket.decays, bucket.mup_class)
            young = self._still_young(number)
            vectors = self.masters[number], self.parts[number], self.m[number], self.v[number]
            scalars = AdamWStep(self.step_count, rate, config.beta1, config.beta2, config.eps, decay, grad_scale)
            if fused is not None and self.gradients.adder is not None and self.gradients.parts == 1 and not young:
                # The new weights are written where they belong while the masters are at hand.
                for segment in bucket.segments:
                    place = {"first": segment.start, "grad_first": segment.start, "count": segment.size}
                    fused.adamw(*vectors, scalars, copy=self.weights[segment.name], **place)
            else:
                (fused or composite).adamw(*vectors, scalars)
                self._stale.add(number)
                if young:
                    self._correct(number, rate)
        self.discard()
        self.refresh()

    def _still_young(self, number: int) -> bool:
        """Whether a bucket has entries whose age shows in Adam's bias correction; forgets those that grew out of it."""
        if number not in self._young:
            return False
        births, dtype = self._young[number][1], str(self.dtype).lower()
        young = any(is_young(self.config, self.step_count, born, dtype) for born in births)
        if not young:
            del self._young[number]
        return young

    def _correct(self, number: int, rate: float) -> None:
        """Exchange the bias correction of young entries, after an update that took all for as old as the oldest."""
        index, births = self._young[number]
        master, m, root = self.masters[number], self.m[number], ops.sqrt(self.v[number])

        def update(born: int) -> Tensor:
            first, second = (Tensor(number, self.dtype) for number in corrections(self.config, self.step_count, born))
            return m * first / (root * second + Tensor(self.config.eps, self.dtype))

        taken = update(0)
        for number_of_class, born in enumerate(births[1:], 1):
            own = ops.cast(index == number_of_class, self.dtype)
            master.set_data(master - (update(born) - taken) * own * Tensor(rate, self.dtype))

    def discard(self) -> None:
        self.parts = []
        self.gradients.discard()

    def load_masters(self, read: Read) -> None:
        """Masters from ``read(name, box)``; the weights follow with ``refresh``, which every rank must call."""
        self._stale = set(self._numbers)
        for number in self._numbers:
            self._fill(self.masters[number], number, read)

    def load_state(self, read: Read, step_count: int, history: Sequence[Growth] = ()) -> None:
        """m and v from ``read("m.<name>", box)`` and ``read("v.<name>", box)``; ``history``: how the model grew."""
        self.step_count = step_count
        for number in self._numbers:
            classes = birth_classes(history, self._pieces(number), self.m[number].size)
            if classes is not None:
                self._young[number] = Tensor(classes[0]), classes[1]
            self._fill(self.m[number], number, lambda name, box: read(f"m.{name}", box))
            self._fill(self.v[number], number, lambda name, box: read(f"v.{name}", box))

    def export_masters(self) -> Iterator[TensorPiece]:
        yield from self._export(self.masters, "")

    def export_state(self) -> Iterator[TensorPiece]:
        yield from self._export(self.m, "m.")
        yield from self._export(self.v, "v.")

    def export_gradients(self) -> Iterator[TensorPiece]:
        """The gradients after ``reduce``, under the parameters' names."""
        yield from self._export(self.parts, "")

    @property
    def _numbers(self) -> range:
        return range(len(self.gradients.buckets))

    def _vector(self, number: int, kind: str) -> Parameter:
        size = self.gradients.buckets[number].size // self.gradients.parts
        return Parameter(ms.mint.zeros(size, dtype=self.dtype), name=f"{kind}{number}")

    def _pieces(self, number: int) -> Iterator[FlatPiece]:
        yield from flat_pieces(self.gradients.buckets[number], self.table, self.gradients.part, self.gradients.parts)

    def _fill(self, vector: Parameter, number: int, read: Read) -> None:
        flat = np.zeros(vector.shape, str(self.dtype).lower())
        for piece in self._pieces(number):
            flat[piece.first : piece.last] = read(piece.name, piece.box).reshape(-1)
        vector.set_data(Tensor(flat))

    def _export(self, vectors: list[Parameter] | list[Tensor], prefix: str) -> Iterator[TensorPiece]:
        """The boxes that this rank, of all that hold them, writes; in the order of the model."""
        if self.gradients.parts == 1 and self.mesh.replicas.rank:
            return
        owned = [
            (number, piece)
            for number, bucket in enumerate(self.gradients.buckets)
            if bucket.owner
            for piece in self._pieces(number)
        ]
        order = {name: i for i, name in enumerate(self.table)}
        for number, piece in sorted(owned, key=lambda item: (order[item[1].name], item[1].first)):
            array = vectors[number][piece.first : piece.last].asnumpy()
            yield TensorPiece(
                prefix + piece.name,
                array.reshape([s.stop - s.start for s in piece.box]),
                tuple(s.start for s in piece.box),
                self.table[piece.name].whole,
            )

    def refresh(self) -> None:
        """Weights from masters, where these changed, rounded to their dtype before they travel."""
        for number in sorted(self._stale):
            master, bucket = self.masters[number], self.gradients.buckets[number]
            dtype = self.weights[bucket.segments[0].name].dtype
            flat: Tensor = ops.cast(master, dtype)
            if self.gradients.parts > 1:
                flat = all_gather(flat, self.mesh.replicas, 0)
            sizes = [segment.size for segment in bucket.segments]
            rest = bucket.size - sum(sizes)
            pieces = ops.split(flat, [*sizes, rest] if rest else sizes)
            for segment, piece in zip(bucket.segments, pieces, strict=False):
                weight = self.weights[segment.name]
                weight.set_data(piece.reshape(weight.shape).contiguous())
        self._stale.clear()
