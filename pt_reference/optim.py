"""AdamW with decoupled weight decay on flat fp32 master weights, optionally sharded (ZeRO-1).

Weights, masters, m and v are flat vectors, one per bucket (core.parallel.sharding). A rank keeps the masters, m and v
of its part of each bucket, and the ranks that share weights gather the updated parts. kernels/pytorch/ops.py selects
the implementation of the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from telechat_twins.core.checkpoint.read import TensorPiece
from telechat_twins.core.config import OptimConfig
from telechat_twins.core.model.growth import Growth
from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.core.parallel.sharding import Box, FlatPiece, Shard, flat_pieces, owned_pieces
from telechat_twins.core.train.births import birth_classes
from telechat_twins.core.train.recipe import class_decay, class_rate, corrections, is_young, tells_classes_apart
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.pytorch.room import zeros
from telechat_twins.pt_reference.collectives import agree, all_gather
from telechat_twins.pt_reference.data_parallel import GradientBuckets, owned_range
from telechat_twins.pt_reference.weights import to_numpy, to_tensor

Read = Callable[[str, Box], np.ndarray]


class AdamW:
    """Masters, gradients, m and v of one rank. The model's weights are views of flat vectors that ``step`` refreshes.

    Where the weights already have the master dtype, the masters are views of the same vectors.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        table: Mapping[str, Shard],
        config: OptimConfig,
        dtype: torch.dtype,
        mesh: Mesh,
    ) -> None:
        self.table, self.mesh = dict(table), mesh
        self.gradients = GradientBuckets(weights, table, mesh, dtype, tells_classes_apart(config))
        self.parts: list[Tensor] = []  # gradients after ``reduce``
        self._stale = False
        self._flat = [self._flatten(weights, number) for number in range(len(self.gradients.buckets))]
        self.masters = [self._mine(number).to(dtype) for number in range(len(self._flat))]
        self._config, self._steps = config, 0
        self._m, self._v = ([zeros(len(w), w.dtype, w.device) for w in self.masters] for _ in "mv")
        # Buckets with entries added by growth: the birth class of each entry, and the updates made before each class.
        self._young: dict[int, tuple[Tensor, list[int]]] = {}

    @property
    def step_count(self) -> int:
        """Number of updates made, from which the bias correction follows."""
        return self._steps

    def reduce(self) -> None:
        """Sum the accumulated gradients over ranks; this rank's share is in ``parts``."""
        self.parts = self.gradients.finish()

    def grad_norm(self) -> float:
        """L2 norm of the gradients of all ranks: squares summed in float64, each parameter once."""
        # Sharded, every rank of the replicas has a part of its own; otherwise all have the same, and rank 0 counts it.
        # A bucket of weights that several tensor or pipeline ranks hold is counted by its owner.
        counted = self.gradients.parts > 1 or self.mesh.replicas.rank == 0
        squares = [
            self._square_sum(part)
            for part, bucket in zip(self.parts, self.gradients.buckets, strict=True)
            if bucket.owner and counted
        ]
        mine = torch.stack(squares).sum().item() if squares else 0.0
        return math.sqrt(agree([mine], self.mesh.world, "sum")[0])

    def _square_sum(self, part: Tensor) -> Tensor:
        adder = self.gradients.adder
        return _sum_of_squares(part) if adder is None else adder.square_sum(part)

    def step(self, lr: float, grad_scale: float) -> None:
        """One update with gradients times ``grad_scale``; gradients are forgotten afterwards.

        ``lr`` is the rate of vector-like parameters; core.train.recipe derives those of the other muP classes.
        """
        config, buckets = self._config, self.gradients
        self._steps += 1
        for number, (master, part, bucket) in enumerate(zip(self.masters, self.parts, buckets.buckets, strict=True)):
            mine = self._mine(number)
            rate, young = class_rate(config, lr, bucket.mup_class), self._still_young(number)
            decay = class_decay(config, bucket.decays, bucket.mup_class)
            scalars = AdamWStep(self._steps, rate, config.beta1, config.beta2, config.eps, decay, grad_scale)
            same = mine.data_ptr() == master.data_ptr()  # float32 weights are their own masters
            copy = None if same or young else mine
            kernels.adamw(master, part, self._m[number], self._v[number], scalars, copy)
            if young:
                self._correct(number, rate)
                if not same:
                    mine.copy_(master)
        self.discard()
        self._gather()

    def _still_young(self, number: int) -> bool:
        """Whether the bias correction of some entries of a bucket still differs from that of the oldest ones.

        Once it does not, the bucket is treated as uniform from then on.
        """
        if number not in self._young:
            return False
        births, dtype = self._young[number][1], str(self.masters[number].dtype).removeprefix("torch.")
        young = any(is_young(self._config, self._steps, born, dtype) for born in births)
        if not young:
            del self._young[number]
        return young

    def _correct(self, number: int, rate: float) -> None:
        """Replace the bias correction of young entries, after an update that treated all entries as the oldest.

        With c1(a) = 1 / (1 - beta1^a), c2(a) = 1 / sqrt(1 - beta2^a) and an entry's age a in updates, the update is
        u(a) = m c1(a) / (sqrt(v) c2(a) + eps). Adding -rate * (u(a) - u(oldest)) exchanges one for the other, since m
        and v do not depend on the age.
        """
        (index, births), eps = self._young[number], self._config.eps
        master, m, root = self.masters[number], self._m[number], self._v[number].sqrt()
        first, second = corrections(self._config, self._steps)
        taken = m * first / (root * second + eps)
        for number_of_class, born in enumerate(births[1:], 1):
            first, second = corrections(self._config, self._steps, born)
            extra = m * first / (root * second + eps) - taken
            master.sub_(torch.where(index == number_of_class, extra, 0.0), alpha=rate)

    def discard(self) -> None:
        self.parts = []
        self.gradients.discard()

    def load_masters(self, read: Read) -> None:
        """Load masters from ``read(name, box)``; ``refresh``, a collective of all ranks, then updates the weights."""
        self._stale = True
        for number, master in enumerate(self.masters):
            self._fill(master, number, read)

    def load_state(self, read: Read, step_count: int, history: Sequence[Growth] = ()) -> None:
        """Load m and v from ``read("m.<name>", box)`` and ``read("v.<name>", box)``; ``history``: all growths."""
        self._steps = step_count
        for number, vector in enumerate(self._m):
            classes = birth_classes(history, self._pieces(number), vector.numel())
            if classes is not None:
                self._young[number] = to_tensor(classes[0]).to(vector.device), classes[1]
        for letter, vectors in (("m", self._m), ("v", self._v)):
            for number, vector in enumerate(vectors):
                self._fill(vector, number, _below(read, letter))

    def export_masters(self) -> Iterator[TensorPiece]:
        yield from self._export(self.masters, "")

    def export_state(self) -> Iterator[TensorPiece]:
        for letter, vectors in (("m", self._m), ("v", self._v)):
            yield from self._export(vectors, f"{letter}.")

    def export_gradients(self) -> Iterator[TensorPiece]:
        """The gradients after ``reduce``, under the parameters' names."""
        yield from self._export(self.parts, "")

    def _flatten(self, weights: Mapping[str, nn.Parameter], number: int) -> Tensor:
        """A bucket's weights moved into one vector of their dtype, of which they become views."""
        bucket = self.gradients.buckets[number]
        first = weights[bucket.segments[0].name]
        flat = zeros(bucket.size, first.dtype, first.device)
        for segment in bucket.segments:
            weight = weights[segment.name]
            weight.data = flat[segment.start : segment.start + segment.size].view(weight.shape)
        return flat

    def _mine(self, number: int) -> Tensor:
        """The part of a bucket's weights that this rank updates."""
        bucket = self.gradients.buckets[number]
        return self._flat[number][owned_range(bucket, self.gradients.part, self.gradients.parts)]

    def _pieces(self, number: int) -> Iterator[FlatPiece]:
        yield from flat_pieces(self.gradients.buckets[number], self.table, self.gradients.part, self.gradients.parts)

    @cached_property
    def _owned(self) -> list[tuple[int, FlatPiece]]:
        return owned_pieces(self.gradients.buckets, self.table, self.gradients.part, self.gradients.parts)

    def _fill(self, vector: Tensor, number: int, read: Read) -> None:
        vector.zero_()
        for piece in self._pieces(number):
            vector[piece.first : piece.last].copy_(to_tensor(read(piece.name, piece.box)).flatten())

    def _export(self, vectors: list[Tensor], prefix: str) -> Iterator[TensorPiece]:
        """Boxes of the vectors that this rank writes, in the model's order; each is written by exactly one rank."""
        if self.gradients.parts == 1 and self.mesh.replicas.rank:
            return
        # Vectors of a CPU are read by numpy where they are.
        shared = [to_numpy(vector) if vector.device.type == "cpu" else None for vector in vectors]
        for number, piece in self._owned:
            held = shared[number]
            at = slice(piece.first, piece.last)
            array = to_numpy(vectors[number][at]) if held is None else held[at]
            whole = self.table[piece.name].whole
            yield TensorPiece(prefix + piece.name, array.reshape(piece.shape), piece.offset, whole)

    def refresh(self) -> None:
        """Update the weights after masters were loaded: the own part, rounded, then those of the other ranks."""
        if not self._stale:
            return
        self._stale = False
        for number, master in enumerate(self.masters):
            mine = self._mine(number)
            if mine.data_ptr() != master.data_ptr():
                mine.copy_(master)
        self._gather()

    def _gather(self) -> None:
        """Gather the updated parts of the weights of the other ranks."""
        if self.gradients.parts > 1:
            for number, flat in enumerate(self._flat):
                flat.copy_(all_gather(self._mine(number), self.mesh.replicas, 0))


_ROW = 1024  # elements summed in the vector's dtype before the sum goes on in float64


def _below(read: Read, letter: str) -> Read:
    return lambda name, box: read(f"{letter}.{name}", box)


def _sum_of_squares(vector: Tensor) -> Tensor:
    """Sum of squares of a long vector, float64 [], without a float64 copy of the vector.

    The squares of each row of _ROW elements are summed in the vector's dtype, with an error of a few units in the last
    place that averages out over rows; the row sums are added in float64.
    """
    if vector.dtype == torch.float64:
        return torch.linalg.vector_norm(vector).square()
    whole = vector.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(vector[:whole].view(-1, _ROW), dim=-1).double()
    rest = torch.linalg.vector_norm(vector[whole:], dtype=torch.float64)
    return rows.square().sum() + rest.square()
