"""The Stepper that both backends share: it drives a mesh, a pipeline and an optimizer, which the backend constructs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from telechat_twins.core.checkpoint.read import Checkpoint, TensorPiece
from telechat_twins.core.config import RunConfig
from telechat_twins.core.launch.memory import return_freed
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.growth import Growth, read_history
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.lora import init_adapter, is_adapter
from telechat_twins.core.model.lora_dropout import LoraDropout
from telechat_twins.core.parallel.mesh import Group, Mesh
from telechat_twins.core.parallel.objective import RowObjective
from telechat_twins.core.parallel.sequence import LocalBatch, split_batch
from telechat_twins.core.parallel.sharding import Box, Shard
from telechat_twins.core.train.preference import PairObjective, RowSums
from telechat_twins.core.train.trainable import constant_names

Read = Callable[[str, Box], np.ndarray]  # (logical name, box of the whole tensor) -> the values inside
Watch = Callable[[int, Any], None]  # (micro-batch, the backend's logits [B, s, V/tp])
Observe = Callable[[Sequence[LocalBatch], float], AbstractContextManager[None]]  # (micro-batches, loss scale)


class See(Protocol):
    """Receiver of the value of a site (core.parity.record.sites), or of its gradient: this rank's [b, s, n] of
    micro-batch ``micro``."""

    def wants(self, micro: int) -> bool:
        """Whether anything of this micro-batch is recorded."""
        ...

    def __call__(self, site: str, micro: int, array: np.ndarray, dtype: str, gradient: bool) -> None: ...


class Stage(Protocol):
    """A chunk of the model that this rank holds; telechat_ms.model and pt_reference.model describe the methods."""

    names: list[str]

    def set_mask(self, c: float | None) -> None: ...

    def use_adapters(self, on: bool) -> None: ...

    def load_weights(self, get: Callable[[str], np.ndarray], names: Collection[str]) -> None: ...

    def read_weight(self, name: str) -> np.ndarray: ...


S = TypeVar("S", bound=Stage)


class Pipeline(Protocol):
    """Forward and backward of a step's micro-batches; telechat_ms.pipeline and pt_reference.pipeline describe it."""

    peak: int
    waited: float
    whole_logits: bool

    def run(
        self,
        batches: Sequence[LocalBatch],
        num_targets: int,
        loss_scale: float,
        backward: bool = True,
        watch: Watch | None = None,
        objective: RowObjective | None = None,
    ) -> float: ...


class Gradients(Protocol):
    """The fp32 accumulators of one step."""

    def expect(self, passes: int) -> None: ...


class Optimizer(Protocol):
    """AdamW on the masters that this rank owns; telechat_ms.optim and pt_reference.optim describe the methods."""

    @property
    def gradients(self) -> Gradients: ...

    @property
    def step_count(self) -> int: ...

    def refresh(self) -> None: ...

    def reduce(self) -> None: ...

    def grad_norm(self) -> float: ...

    def step(self, lr: float, grad_scale: float) -> None: ...

    def discard(self) -> None: ...

    def load_masters(self, read: Read) -> None: ...

    def load_state(self, read: Read, step_count: int, history: Sequence[Growth] = ()) -> None: ...

    def export_masters(self) -> Iterator[TensorPiece]: ...

    def export_state(self) -> Iterator[TensorPiece]: ...

    def export_gradients(self) -> Iterator[TensorPiece]: ...


class BaseTrainer(ABC, Generic[S]):
    """core.train.stepper.Stepper of one rank, all but ``implementation``.

    agree: the backend's collectives.agree(values, group, op). table: the parameters of this rank, trainable or not;
    ``optimizer`` has the trainable ones. The masters start from core.model.init with ``train.seed``, unless
    ``train.init`` gives them; the model's weights follow at the first ``gradients``.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        stages: Sequence[S],
        table: Mapping[str, Shard],
        pipeline: Pipeline,
        optimizer: Optimizer,
        agree: Callable[[list[float], Group, str], list[float]],
    ) -> None:
        self.config, self.mesh, self.stages, self.table = config, mesh, stages, table
        self.micro_batch = config.train.micro_batch
        self.pipeline, self.optimizer, self._agree = pipeline, optimizer, agree
        self.preference_metrics: dict[str, float] = {}
        self.observe: Observe | None = None  # entered around the forward and backward passes of ``gradients``
        self._constants = constant_names(list(table), config)
        if config.lora is not None:
            self.load_adapters(self._initial)
        if config.train.init is None:  # else load or load_weights follows
            self.load_weights(self._initial)

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def world(self) -> int:
        return self.mesh.layout.world

    def share(self, global_batch: int) -> tuple[int, int]:
        count = global_batch // self.mesh.layout.dp
        return self.mesh.coord.dp * count, count

    def count_targets(self, num_targets: int) -> int:
        return round(self._agree([num_targets], self.mesh.dp, "sum")[0])

    def agree(self, values: list[float], op: str) -> list[float]:
        return self._agree(values, self.mesh.world, op)

    def gradients(
        self,
        batch: Batch,
        num_targets: int,
        loss_scale: float,
        backward: bool = True,
        watch: Watch | None = None,
    ) -> float:
        """core.train.stepper.Stepper.gradients; ``backward`` and ``watch`` as in Pipeline.run."""
        pairs = None if self.config.preference is None else PairObjective(self.config.preference)
        self.optimizer.refresh()
        pieces = self._pieces(batch)
        if backward:
            first = self.mesh.coord.dp * len(batch.input_ids)  # of the global batch's rows
            pieces = [self._with_dropout(piece, first + n * self.micro_batch) for n, piece in enumerate(pieces)]
        self.optimizer.gradients.expect(len(pieces))
        self.pipeline.whole_logits = self.observe is not None
        with nullcontext() if self.observe is None else self.observe(pieces, loss_scale):
            if pairs is None:  # without an argument that a replaced ``run`` may not know
                loss = self.pipeline.run(pieces, num_targets, loss_scale, backward, watch)
            else:
                loss = self.pipeline.run(pieces, num_targets, loss_scale, backward, watch, pairs)
        if backward:
            self.optimizer.reduce()
        if pairs is not None:
            return self._agree_on_pairs(pairs, num_targets)
        # Tensor ranks computed the same sum; the ranks before the head computed none.
        return self.agree([loss if self.mesh.coord.tp == 0 else 0.0], "sum")[0]

    def _pieces(self, batch: Batch) -> list[LocalBatch]:
        """This rank's places of ``batch``, by micro-batch."""
        size = self.micro_batch
        return [
            split_batch(batch.rows(first, first + size), self.mesh.layout, self.mesh.coord.cp)
            for first in range(0, len(batch.input_ids), size)
        ]

    def _agree_on_pairs(self, pairs: PairObjective, num_pairs: int) -> float:
        """The mean loss over the pairs of all ranks; the means of their metrics are kept."""
        coord = self.mesh.coord
        # Tensor and context-parallel ranks saw the same pairs, the ranks before the head none.
        mine = [pairs.loss, pairs.margin, float(pairs.correct)] if coord.tp == coord.cp == 0 else [0.0] * 3
        loss, margin, correct = (total / num_pairs for total in self.agree(mine, "sum"))
        self.preference_metrics = {"reward_margin": margin, "reward_accuracy": correct}
        return loss

    def log_probs(self, batch: Batch, base: bool = False) -> list[float]:
        """core.train.stepper.Stepper.log_probs."""
        self.optimizer.refresh()
        pieces, found = self._pieces(batch), RowSums([])
        for stage in self.stages:
            stage.use_adapters(not base)
        self.pipeline.run(pieces, 1, 1.0, False, None, found)
        for stage in self.stages:
            stage.use_adapters(True)
        # One rank of each data-parallel rank's model has them; the others join in with zeros.
        coord, rows = self.mesh.coord, len(batch.input_ids)
        mine = [0.0] * (rows * self.mesh.layout.dp)
        if found.found and coord.tp == coord.cp == 0:
            mine[coord.dp * rows : (coord.dp + 1) * rows] = found.found
        return self.agree(mine, "sum")

    def held_out_loss(self, batch: Batch, num_targets: int) -> float:
        """core.train.stepper.Stepper.held_out_loss."""
        self.optimizer.refresh()
        loss = self.pipeline.run(self._pieces(batch), num_targets, 1.0, False)
        return self.agree([loss if self.mesh.coord.tp == 0 else 0.0], "sum")[0]

    def set_mask(self, c: float | None) -> None:
        for stage in self.stages:
            stage.set_mask(c)

    def grad_norm(self, loss_scale: float) -> float:
        return self.optimizer.grad_norm() / loss_scale

    def update(self, lr: float, grad_scale: float) -> None:
        self.optimizer.step(lr, grad_scale)

    def discard(self) -> None:
        self.optimizer.discard()

    def weights(self) -> Iterator[TensorPiece]:
        yield from self.optimizer.export_masters()
        if self.mesh.replicas.rank == 0:
            yield from self._frozen_pieces()

    def optimizer_state(self) -> Iterator[TensorPiece]:
        return self.optimizer.export_state()

    def load_weights(self, read: Read) -> None:
        if self.config.lora is None:
            self.optimizer.load_masters(read)
        self._load_constants(read, False)
        return_freed()  # the arrays that were read

    def load_adapters(self, read: Read) -> None:
        """All adapters: those that are trained, and those that ``train.freeze`` names."""
        self.optimizer.load_masters(read)
        self._load_constants(read, True)

    def _load_constants(self, read: Read, adapters: bool) -> None:
        """The frozen adapters, or all other frozen parameters."""
        for stage in self.stages:
            names = [name for name in stage.names if name in self._constants and is_adapter(name) == adapters]
            stage.load_weights(lambda name: _local(self.table[name], read(name, self.table[name].index)), names)

    def load(self, checkpoint: Checkpoint, optimizer: bool) -> None:
        def read(name: str, box: Box) -> np.ndarray:
            return checkpoint.read("weights", name, box)

        if self.config.lora is None:
            self.load_weights(read)
        else:
            self.load_adapters(read)
        if optimizer:
            assert checkpoint.trainer is not None  # a step folder of a run, which the caller has checked
            steps = checkpoint.trainer["optimizer_steps"]
            history = read_history(checkpoint.model, str(checkpoint.path / "model.json"))
            self.optimizer.load_state(lambda key, box: checkpoint.read("optimizer", key, box), steps, history)
            return_freed()

    @property
    def step(self) -> int:
        return self.optimizer.step_count

    def _initial(self, name: str, box: Box) -> np.ndarray:
        """The initial value of a part of a parameter."""
        config = self.config
        if config.lora is not None and is_adapter(name):
            return init_adapter(name, config.model, config.lora, config.train.seed, box)
        return init_tensor(name, config.model, config.train.seed, box)

    def _with_dropout(self, local: LocalBatch, first: int) -> LocalBatch:
        """A micro-batch whose rows are number ``first`` and on of the global batch, with the adapters' dropout masks.

        The step is that of the optimizer, so a resumed run has the masks that an uninterrupted one would have.
        """
        lora, seed = self.config.lora, self.config.train.seed
        if lora is None or lora.dropout == 0.0:
            return local
        rows = np.arange(len(local.input_ids)) + first
        return replace(local, dropout=LoraDropout(lora.dropout, seed, self.step, rows, local.index))

    def _frozen_pieces(self) -> Iterator[TensorPiece]:
        """The parts of frozen parameters that this rank, of all that hold them, writes; with ``lora`` those of adapters
        alone: their base has a folder of its own."""
        saved = [name for name in self._constants if self.config.lora is None or is_adapter(name)]
        for stage in self.stages:
            for name in stage.names:
                shard = self.table[name]
                if name in saved and shard.owner:
                    array = stage.read_weight(name)[: shard.index[0].stop - shard.index[0].start]
                    yield TensorPiece(name, array, tuple(s.start for s in shard.index), shard.whole)

    @abstractmethod
    def observed(self, see: See) -> AbstractContextManager[None]:
        """The backend's observe.observed of this rank's stages."""

    @abstractmethod
    def device_peak(self) -> int:
        """core.train.stepper.Stepper.device_peak."""

    @abstractmethod
    def profiled(self, folder: Path, steps: int) -> AbstractContextManager[Callable[[], object]]:
        """core.train.stepper.Stepper.profiled."""

    @abstractmethod
    def implementation(self) -> dict[str, str]:
        """core.train.stepper.Stepper.implementation."""


def _local(shard: Shard, values: np.ndarray) -> np.ndarray:
    """The values of a shard with the rows of zeros that pad it."""
    missing = shard.shape[0] - values.shape[0]
    return values if not missing else np.pad(values, ((0, missing), *((0, 0),) * (values.ndim - 1)))
