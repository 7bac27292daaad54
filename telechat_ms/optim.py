"""AdamW with decoupled weight decay on flat fp32 master weights, optionally sharded (ZeRO-1).

Masters, m and v are flat vectors, one per bucket (core.parallel.sharding): the number of operators of an update does
not depend on the number of layers. A rank keeps its part of each bucket, and the ranks that share weights gather the
updated parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from telechat_twins.core.checkpoint.read import TensorPiece
from telechat_twins.core.config import OptimConfig
from telechat_twins.core.launch.memory import ask_large_pages
from telechat_twins.core.model.growth import Growth
from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.core.parallel.sharding import Box, FlatPiece, Shard, flat_pieces, owned_pieces
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
    """Masters, gradients, m and v of one rank. The model's weights are rounded copies that ``step`` refreshes.

    Where the weights have the master dtype and the C++ operator updates all of a bucket in place, the weights are views
    of the masters, and there is one storage for both.
    """

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
        self._stale: set[int] = set()  # buckets whose weights lag behind their masters
        self._arrays: dict[str, np.ndarray] = {}  # the storage of vectors on the CPU, by name
        self.masters, self.m, self.v = ([self._vector(number, kind) for number in self._numbers] for kind in "wmv")
        for number in self._numbers:
            if self._shared(number):
                self._tie(number)
        # Buckets with entries added by growth: the birth class of each entry, and the updates made before each class.
        self._young: dict[int, tuple[Tensor, list[int]]] = {}

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
        mine = sum(float(square.asnumpy().item()) for square in squares)
        return math.sqrt(agree([mine], self.mesh.world, "sum")[0])

    def _square_sum(self, part: Tensor) -> Tensor:
        """Sum of squares of a flat vector, float64 [1] or []."""
        adder = self.gradients.adder
        return total(ops.square(ops.cast(part, ms.float64))) if adder is None else adder.square_sum(part)

    def step(self, lr: float, grad_scale: float) -> None:
        """One update with gradients times ``grad_scale``; gradients are forgotten afterwards.

        ``lr`` is the rate of vector-like parameters; core.train.recipe derives those of the other muP classes.
        """
        self.step_count += 1
        config, fused = self.config, kernels.serving("adamw", self.dtype)
        for number, bucket in enumerate(self.gradients.buckets):
            rate = class_rate(config, lr, bucket.mup_class)
            decay = class_decay(config, bucket.decays, bucket.mup_class)
            young = self._still_young(number)
            vectors = self.masters[number], self.parts[number], self.m[number], self.v[number]
            scalars = AdamWStep(self.step_count, rate, config.beta1, config.beta2, config.eps, decay, grad_scale)
            if fused is not None and self._shared(number):
                fused.adamw(*vectors, scalars)
                if young:
                    self._correct(number, rate)
            elif fused is not None and self.gradients.adder is not None and self.gradients.parts == 1 and not young:
                # A pass per parameter over its segment of the bucket also writes the rounded weights.
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
        """Whether the bias correction of some entries of a bucket still differs from that of the oldest ones.

        Once it does not, the bucket is treated as uniform from then on.
        """
        if number not in self._young:
            return False
        births, dtype = self._young[number][1], str(self.dtype).lower()
        young = any(is_young(self.config, self.step_count, born, dtype) for born in births)
        if not young:
            del self._young[number]
        return young

    def _correct(self, number: int, rate: float) -> None:
        """Replace the bias correction of young entries, after an update that treated all entries as the oldest.

        With c1(a) = 1 / (1 - beta1^a), c2(a) = 1 / sqrt(1 - beta2^a) and an entry's age a in updates, the update is
        u(a) = m c1(a) / (sqrt(v) c2(a) + eps). Adding -rate * (u(a) - u(oldest)) exchanges one for the other, since m
        and v do not depend on the age.
        """
        index, births = self._young[number]
        master, m, root = self.masters[number], self.m[number], ops.sqrt(self.v[number])

        def update(born: int) -> Tensor:
            first, second = (Tensor(factor, self.dtype) for factor in corrections(self.config, self.step_count, born))
            return m * first / (root * second + Tensor(self.config.eps, self.dtype))

        taken = update(0)
        for number_of_class, born in enumerate(births[1:], 1):
            own = ops.cast(index == number_of_class, self.dtype)
            ops.assign(master, master - (update(born) - taken) * own * Tensor(rate, self.dtype))

    def discard(self) -> None:
        self.parts = []
        self.gradients.discard()

    def load_masters(self, read: Read) -> None:
        """Load masters from ``read(name, box)``; ``refresh``, a collective of all ranks, then updates the weights."""
        self._stale = set(self._numbers)
        for number in self._numbers:
            self._fill(self.masters[number], number, read)

    def load_state(self, read: Read, step_count: int, history: Sequence[Growth] = ()) -> None:
        """Load m and v from ``read("m.<name>", box)`` and ``read("v.<name>", box)``; ``history``: all growths."""
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
        """A vector of zeros for this rank's part of a bucket."""
        size = self.gradients.buckets[number].size // self.gradients.parts
        if self.gradients.adder is None:
            return Parameter(ms.mint.zeros(size, dtype=self.dtype), name=f"{kind}{number}")
        # On the CPU the storage is an array of numpy, which ``_fill`` writes in place: Parameter(zeros) and an assigned
        # tensor would each leave a second copy of the vector in MindSpore's memory pool.
        array = _aligned_zeros(size, str(self.dtype).lower())
        vector = Parameter(ms.mint.empty(1, dtype=self.dtype), name=f"{kind}{number}")
        vector.set_data(Tensor.from_numpy(array))
        if vector.data_ptr() != array.ctypes.data:
            raise RuntimeError(f"{kind}{number}: Tensor.from_numpy copied; MindSpore 2.9.0 shares the array")
        self._arrays[f"{kind}{number}"] = array
        return vector

    def _pieces(self, number: int) -> Iterator[FlatPiece]:
        yield from flat_pieces(self.gradients.buckets[number], self.table, self.gradients.part, self.gradients.parts)

    @cached_property
    def _owned(self) -> list[tuple[int, FlatPiece]]:
        return owned_pieces(self.gradients.buckets, self.table, self.gradients.part, self.gradients.parts)

    def _fill(self, vector: Parameter, number: int, read: Read) -> None:
        array = self._arrays.get(vector.name)
        if array is not None:
            vector[:1].asnumpy()  # waits for the operators that still read or write the storage
        flat = np.empty(vector.shape, str(self.dtype).lower()) if array is None else array
        flat[:] = 0
        for piece in self._pieces(number):
            flat[piece.first : piece.last] = read(piece.name, piece.box).reshape(-1)
        if array is None:
            vector.set_data(Tensor(flat))

    def _export(self, vectors: list[Parameter] | list[Tensor], prefix: str) -> Iterator[TensorPiece]:
        """Boxes of the vectors that this rank writes, in the model's order; each is written by exactly one rank."""
        if self.gradients.parts == 1 and self.mesh.replicas.rank:
            return
        shared: dict[int, np.ndarray | None] = {}
        for number, piece in self._owned:
            if number not in shared:
                shared[number] = self._in_place(vectors[number])
            held = shared[number]
            at = slice(piece.first, piece.last)
            array = vectors[number][at].asnumpy() if held is None else held[at]
            whole = self.table[piece.name].whole
            yield TensorPiece(prefix + piece.name, array.reshape(piece.shape), piece.offset, whole)

    def _in_place(self, vector: Parameter | Tensor) -> np.ndarray | None:
        """The array whose storage a vector has, once all operators have written it; None where it has its own."""
        array = self._arrays.get(vector.name) if isinstance(vector, Parameter) else None
        if not isinstance(vector, Parameter) and self.gradients.adder is not None:
            shared: np.ndarray = vector.asnumpy()  # of the CPU: the tensor's own storage
            return shared
        if array is None or vector.data_ptr() != array.ctypes.data:
            return None
        vector[:1].asnumpy()
        return array

    def _shared(self, number: int) -> bool:
        """Whether the weights of a bucket are views of its master. Only with the operator of the CPU: plain operators
        replace a vector's storage."""
        weight = self.weights[self.gradients.buckets[number].segments[0].name]
        return self.gradients.adder is not None and self.gradients.parts == 1 and weight.dtype == self.dtype

    def _tie(self, number: int) -> None:
        """Make the weights of a bucket views of its master."""
        for segment in self.gradients.buckets[number].segments:
            weight = self.weights[segment.name]
            view = self.masters[number][segment.start : segment.start + segment.size].view(weight.shape)
            weight.set_data(view)
            if weight.data_ptr() != view.data_ptr():
                raise RuntimeError(f"{segment.name}: Parameter.set_data copied a view; MindSpore 2.9.0 keeps it")

    def refresh(self) -> None:
        """Update the weights of buckets whose masters changed: rounded to the weights' dtype, then gathered."""
        for number in sorted(self._stale):
            if self._shared(number):
                self._tie(number)
                continue
            master, bucket = self.masters[number], self.gradients.buckets[number]
            dtype = self.weights[bucket.segments[0].name].dtype
            flat: Tensor = ops.cast(master, dtype)
            if self.gradients.parts > 1:
                flat = all_gather(flat, self.mesh.replicas, 0)
            sizes = [segment.size for segment in bucket.segments]
            rest = bucket.size - sum(sizes)  # padding to a multiple of the number of parts
            pieces = ops.split(flat, [*sizes, rest] if rest else sizes)
            for segment, piece in zip(bucket.segments, pieces, strict=False):
                weight = self.weights[segment.name]
                weight.set_data(piece.reshape(weight.shape).contiguous())
        self._stale.clear()


def _aligned_zeros(size: int, dtype: str) -> np.ndarray:
    """Zeros that begin at a cache line, for loads and stores that do not cross one; on large pages where the system has
    some."""
    room = np.zeros(size + 64 // np.dtype(dtype).itemsize, dtype)
    first = -room.ctypes.data % 64 // room.itemsize
    ask_large_pages(room.ctypes.data, room.nbytes)
    return room[first : first + size]
