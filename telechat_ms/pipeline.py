"""Pipeline execution of a step: micro-batches through this rank's model chunks, in core.parallel.schedule's order.

Several forward graphs are outstanding at once. Activations go to the next pipeline rank and gradients to the previous
one over one-way links. A link delivers in the order of sending, which is also the order in which the receiver needs
the messages (tests/unit/parallel/test_schedule.py holds that).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from mindspore import Parameter, Tensor

from telechat_twins.core.parallel.mesh import Link, Mesh, used
from telechat_twins.core.parallel.objective import RowObjective
from telechat_twins.core.parallel.schedule import Action, actions, peak_live
from telechat_twins.core.parallel.sequence import LocalBatch
from telechat_twins.core.parallel.transfer import Handle
from telechat_twins.telechat_ms.autograd import ENGINE, Recorded, record
from telechat_twins.telechat_ms.collectives import recv, send
from telechat_twins.telechat_ms.context_parallel import attention_plan
from telechat_twins.telechat_ms.losses import row_surrogate, weighted_cross_entropy
from telechat_twins.telechat_ms.model import Decoder
from telechat_twins.telechat_ms.tensor_parallel import cross_entropy
from telechat_twins.telechat_ms.weights import named_weights

Watch = Callable[[int, Tensor], None]
Take = Callable[[Sequence[str], Sequence[Tensor]], None]


class Pipeline:
    """``stages``: the model chunks of this rank. ``take(names, gradients)`` receives what each backward pass gives.
    ``first_trained``: the first stage of the whole pipeline that has a trainable parameter (core.train.trainable);
    those before it run forward only.

    ``whole_logits``: the logits of every micro-batch are observed, so that they must exist.

    Of the last run: ``peak``, most graphs that were alive at once; ``waited``, seconds spent waiting for other stages.
    """

    def __init__(self, stages: Sequence[Decoder], mesh: Mesh, take: Take, first_trained: int = 0) -> None:
        self.stages, self.mesh, self.take, self.peak, self.waited = list(stages), mesh, take, 0, 0.0
        self.first_trained, self.whole_logits = first_trained, False

    def run(
        self,
        batches: Sequence[LocalBatch],
        num_targets: int,
        loss_scale: float = 1.0,
        backward: bool = True,
        watch: Watch | None = None,
        objective: RowObjective | None = None,
    ) -> float:
        """Forward, and backward, of all micro-batches; gradients of loss_scale * loss go to ``take``.

        Returns sum(weight * token loss) / num_targets of what this rank computed: 0 on pipeline ranks without the head.
        With an ``objective`` the gradients are those of it / num_targets; it keeps its value, and 0 is returned.
        ``watch(micro, logits)`` sees the logits [B, s, V/tp] where they are made.
        """
        take = self.take if backward else None
        step = _Step(
            self.stages, self.mesh, batches, num_targets, loss_scale, watch, objective, take, self.first_trained
        )
        step.whole_logits = self.whole_logits
        layout = self.mesh.layout
        self.peak = 0
        for action in actions(layout.schedule, layout.pp, layout.virtual, len(batches), self.mesh.coord.pp):
            if action.kind == "F":
                step.forward(action)
            elif backward:
                step.backward(action)
            self.peak = max(self.peak, len(step.held))
        step.end()
        self.waited = step.waited
        return float(sum(float(loss.asnumpy()) for loss in step.losses)) if objective is None else 0.0


class _Step:
    """State of one run: outstanding graphs, messages in flight, losses. Graphs and messages by (micro, chunk)."""

    def __init__(
        self,
        stages: Sequence[Decoder],
        mesh: Mesh,
        batches: Sequence[LocalBatch],
        num_targets: int,
        loss_scale: float,
        watch: Watch | None,
        objective: RowObjective | None,
        take: Take | None,
        first_trained: int,
    ) -> None:
        self.stages, self.mesh, self.batches = stages, mesh, batches
        # How many stages each chunk lies after the first that trains: gradients travel back as far as that one.
        self.after_trained = [n * mesh.layout.pp + mesh.coord.pp - first_trained for n in range(len(stages))]
        self.num_targets, self.loss_scale, self.take = num_targets, loss_scale, take
        self.watch, self.objective = watch, objective
        self.weights: list[dict[str, Parameter]] = [
            {name: weight for name, weight in named_weights(stage).items() if weight.requires_grad} for stage in stages
        ]
        self.plans = [attention_plan(batch.visibility, mesh) for batch in batches]
        self.ropes = [stages[0].rope(batch.positions, batch.seq_len) for batch in batches]
        self.held: dict[tuple[int, int], Recorded] = {}
        self.sent: dict[tuple[int, int], Handle[Tensor]] = {}
        self.sent_back: deque[Handle[Tensor]] = deque()
        self.losses: list[Tensor] = []
        self.waited, self.whole_logits = 0.0, False

    def forward(self, action: Action) -> None:
        micro, chunk = action.micro, action.chunk
        stage, batch = self.stages[chunk], self.batches[micro]
        # The first chunk starts from token ids, every other one from the stream [B, s, E] of the chunk before it.
        given = Tensor(batch.input_ids) if stage.first else self._receive(micro, used(self.mesh.forward_in))

        targets = self._targets(stage, batch)

        def run(x: Tensor | None) -> Tensor:
            given_x = given if x is None else x
            out = stage(given_x, self.ropes[micro], self.plans[micro], dropout=batch.dropout, targets=targets)
            if not stage.last:
                return out
            if targets is not None:
                return out / Tensor(self.num_targets, out.dtype)
            if self.watch is not None:
                self.watch(micro, out)
            return self._loss(out, batch, stage.config.vocab_size)

        after = self.after_trained[chunk]
        if self.take is None or after < 0:
            out = run(None)
        else:
            x = given if after > 0 else None
            # The graph stays until this micro-batch's backward, which comes after other micro-batches' forwards.
            self.held[micro, chunk] = recorded = record(run, x, list(self.weights[chunk].values()))
            out = recorded.output
        if stage.last:
            self.losses.append(out)
        else:
            self.sent[micro, chunk] = send(out, used(self.mesh.forward_out))

    def backward(self, action: Action) -> None:
        micro, chunk = action.micro, action.chunk
        stage, after = self.stages[chunk], self.after_trained[chunk]
        if after >= 0:
            recorded = self.held.pop((micro, chunk))
            if stage.last:
                grad = Tensor(self.loss_scale, recorded.output.dtype)  # d(loss_scale * loss) / d loss
            else:
                grad = self._receive(micro, used(self.mesh.backward_in))
            dx, gradients = recorded.backward(grad)
            # The stream's gradient leaves first: the previous rank waits for it, the accumulators do not.
            if after > 0:
                self._send_back(dx)
            assert self.take is not None  # a backward pass is scheduled only where gradients are wanted
            self.take(list(self.weights[chunk]), gradients)
        if not stage.last:
            # Where a gradient came back the message has arrived; where none does, the next stage is at this
            # micro-batch's backward at the latest.
            self.sent.pop((micro, chunk)).wait()

    def _targets(self, stage: Decoder, batch: LocalBatch) -> Tensor | None:
        """The targets, where the stage can compute the loss by itself and only its sum is wanted, for gradients."""
        plain = self.watch is None and self.objective is None and batch.weights is None and not self.whole_logits
        # A pass that public functions run twice (telechat_ms.autograd) has the plain loss.
        plain = plain and ENGINE == "recorded" and self.take is not None and self.mesh.tp.size == 1
        if not plain or stage.loss_head(batch.targets.size) is None:
            return None
        return Tensor(batch.targets)

    def _loss(self, logits: Tensor, batch: LocalBatch, vocab_size: int) -> Tensor:
        """What this micro-batch adds to the loss, or a scalar with the gradient of what it adds to the objective."""
        if self.objective is not None:
            return row_surrogate(logits, batch, vocab_size, self.mesh, self.objective, self.num_targets)
        if batch.weights is not None:
            total = weighted_cross_entropy(logits, batch, vocab_size, self.mesh)
        else:
            total = cross_entropy(logits, Tensor(batch.targets), vocab_size, self.mesh)
        # One divisor for the whole global batch, so that micro-batches and ranks only have to be added up.
        return total / Tensor(self.num_targets, total.dtype)

    def end(self) -> None:
        """Wait until everything sent has arrived."""
        for handle in (*self.sent.values(), *self.sent_back):
            handle.wait()

    def _send_back(self, grad: Tensor) -> None:
        """Send a gradient to the previous stage, and release one that has arrived.

        The rank before holds at most its ``peak_live`` graphs; so after that many further ones it has used this one.
        """
        layout, before = self.mesh.layout, (self.mesh.coord.pp - 1) % self.mesh.layout.pp
        self.sent_back.append(send(grad, used(self.mesh.backward_out)))
        if len(self.sent_back) > peak_live(layout.schedule, layout.pp, layout.virtual, len(self.batches), before):
            self.sent_back.popleft().wait()

    def _receive(self, micro: int, link: Link) -> Tensor:
        """The stream [B, s, E], or its gradient; with sequence parallelism a rank's own positions only."""
        layout, stage = self.mesh.layout, self.stages[0]
        B, s = self.batches[micro].input_ids.shape
        shape = (B, s // (layout.tp if layout.sequence_parallel else 1), stage.config.hidden_size)
        started = time.perf_counter()
        x = recv(shape, stage.dtypes.residual, link)
        self.waited += time.perf_counter() - started
        return x
