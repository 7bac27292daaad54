"""Pipeline execution of a step: micro-batches through this rank's model chunks, in core.parallel.schedule's order.

Several forward graphs are outstanding at once. Activations go to the next pipeline rank and gradients to the previous
one over one-way links. A link delivers in the order of sending, which is also the order in which the receiver needs
the messages (tests/unit/parallel/test_schedule.py holds that).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from telechat_twins.core.parallel.mesh import Link, Mesh, used
from telechat_twins.core.parallel.objective import RowObjective
from telechat_twins.core.parallel.schedule import Action, actions, peak_live
from telechat_twins.core.parallel.sequence import LocalBatch
from telechat_twins.core.parallel.transfer import Handle
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.collectives import recv, send
from telechat_twins.pt_reference.context_parallel import attention_plan
from telechat_twins.pt_reference.losses import row_surrogate, weighted_cross_entropy
from telechat_twins.pt_reference.model import Decoder
from telechat_twins.pt_reference.tensor_parallel import cross_entropy

Watch = Callable[[int, Tensor], None]


class Pipeline:
    """``stages``: the model chunks of this rank. ``first_trained``: the first stage of the whole pipeline that has a
    trainable parameter (core.train.trainable); those before it run forward only.

    ``whole_logits``: the logits of every micro-batch are observed, so that they must exist.

    Of the last run: ``peak``, most graphs that were alive at once; ``waited``, seconds spent waiting for other stages.
    """

    def __init__(self, stages: Sequence[Decoder], mesh: Mesh, first_trained: int = 0) -> None:
        self.stages, self.mesh, self.peak, self.waited = list(stages), mesh, 0, 0.0
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
        """Forward, and backward, of all micro-batches; gradients of loss_scale * loss go to the parameters' hooks.

        Returns sum(weight * token loss) / num_targets of what this rank computed: 0 on pipeline ranks without the head.
        With an ``objective`` the gradients are those of it / num_targets; it keeps its value, and 0 is returned.
        ``watch(micro, logits)`` sees the logits [B, s, V/tp] where they are made.
        """
        step = _Step(self.stages, self.mesh, batches, num_targets, loss_scale, watch, objective, self.first_trained)
        step.whole_logits = self.whole_logits
        layout = self.mesh.layout
        self.peak = 0
        with torch.set_grad_enabled(backward):
            for action in actions(layout.schedule, layout.pp, layout.virtual, len(batches), self.mesh.coord.pp):
                if action.kind == "F":
                    step.forward(action)
                elif backward:
                    step.backward(action)
                self.peak = max(self.peak, len(step.held))
        step.end()
        self.waited = step.waited
        return float(sum(loss.item() for loss in step.losses)) if objective is None else 0.0


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
        first_trained: int,
    ) -> None:
        self.stages, self.mesh, self.batches = stages, mesh, batches
        # How many stages each chunk lies after the first that trains: gradients travel back as far as that one.
        self.after_trained = [n * mesh.layout.pp + mesh.coord.pp - first_trained for n in range(len(stages))]
        self.num_targets, self.loss_scale = num_targets, loss_scale
        self.watch, self.objective = watch, objective
        self.plans = [attention_plan(batch.visibility, mesh) for batch in batches]
        self.ropes = [stages[0].rope(batch.positions, batch.seq_len) for batch in batches]
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.sent: dict[tuple[int, int], Handle[Tensor]] = {}
        self.sent_back: deque[Handle[Tensor]] = deque()
        self.losses: list[Tensor] = []
        self.waited, self.whole_logits = 0.0, False

    def forward(self, action: Action) -> None:
        micro, chunk = action.micro, action.chunk
        stage, batch = self.stages[chunk], self.batches[micro]
        # The first chunk starts from token ids, every other one from the stream x [B, s, E] of the chunk before it,
        # made a leaf so that its gradient can be read and sent back.
        if stage.first:
            x = torch.from_numpy(batch.input_ids).to(ops.device()).long()
        else:
            x = self._receive(micro, used(self.mesh.forward_in))
            x.requires_grad_(self.after_trained[chunk] > 0)
        targets = self._targets(stage, batch)
        out = stage(x, self.ropes[micro], self.plans[micro], dropout=batch.dropout, targets=targets)
        if stage.last:
            if self.watch is not None:
                self.watch(micro, out)
            out = out / self.num_targets if targets is not None else self._loss(out, batch, stage.config.vocab_size)
            self.losses.append(out.detach())
        else:
            self.sent[micro, chunk] = send(out, used(self.mesh.forward_out))
        if torch.is_grad_enabled() and self.after_trained[chunk] >= 0:
            # The graph stays until this micro-batch's backward, which comes after other micro-batches' forwards.
            self.held[micro, chunk] = (x, out)

    def backward(self, action: Action) -> None:
        micro, chunk = action.micro, action.chunk
        stage, after = self.stages[chunk], self.after_trained[chunk]
        if after >= 0:
            x, out = self.held.pop((micro, chunk))
            if stage.last:
                (out * self.loss_scale).backward()
            else:
                # The product of the arriving gradient with this chunk's Jacobian; weights' gradients go to their hooks.
                out.backward(self._receive(micro, used(self.mesh.backward_in)))
            if after > 0:
                self._send_back(x.grad)
        if not stage.last:
            # Where a gradient came back the message has arrived; where none does, the next stage is at this
            # micro-batch's backward at the latest.
            self.sent.pop((micro, chunk)).wait()

    def _targets(self, stage: Decoder, batch: LocalBatch) -> Tensor | None:
        """The targets, where the stage can compute the loss by itself and only its sum is wanted, for gradients."""
        plain = self.watch is None and self.objective is None and batch.weights is None and not self.whole_logits
        plain = plain and torch.is_grad_enabled() and self.mesh.tp.size == 1
        if not plain or stage.loss_head(batch.targets.size) is None:
            return None
        return torch.from_numpy(batch.targets).to(ops.device())

    def _loss(self, logits: Tensor, batch: LocalBatch, vocab_size: int) -> Tensor:
        """What this micro-batch adds to the loss, or a scalar with the gradient of what it adds to the objective."""
        if self.objective is not None:
            return row_surrogate(logits, batch, vocab_size, self.mesh, self.objective, self.num_targets)
        if batch.weights is not None:
            total = weighted_cross_entropy(logits, batch, vocab_size, self.mesh)
        else:
            targets = torch.from_numpy(batch.targets).to(logits.device)
            total = cross_entropy(logits, targets, vocab_size, self.mesh)
        # One divisor for the whole global batch, so that micro-batches and ranks only have to be added up.
        return total / self.num_targets

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
