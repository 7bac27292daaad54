"""What differs between programs that execute the same training step: which tensors they keep, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Executor:
    """One program and its operators.

    ``statistics``: float32 numbers that fused attention keeps of each head and position. ``keeps_silu``: silu(gate) is
    kept beside gate, up and the product, instead of being computed again. ``late_gradients``: the gradients of a
    backward pass exist together, until they are accumulated at its end; otherwise one at a time.
    ``views``: masters of the weights' own dtype are views of the weights also where ZeRO-1 divides them.
    ``casts``: where weights are wider than products, every graph keeps copies of its matrices in the products' dtype;
    otherwise one copy of all stands during the step (the gather of ZeRO-1 moves the narrow ones).
    ``eager_messages``: gradients sent to the stage before, and rotary tables of every micro-batch, stay for the step.
    ``recomputes_inputs``: linear layers compute their inputs again (norms, the activation's product), as the twins do
    on a CPU. ``reuses_freed``: what comes after a backward pass, gradients that it returns and sums over ranks, takes
    the place of activations that it freed; otherwise it is counted beside them. ``library``: bytes that the operators'
    libraries keep, compiled code and scratch; ``message_copies``: copies of a bucket of gradients in its transport.
    These three were measured on CPUs only. ``wide_logits``: logits are turned into float32 before the loss, and
    ``wide_shards``, before the loss of a vocabulary that is divided over tensor ranks or padded; ``logit_copies``:
    float32 tensors of their size. ``loss_by_rows``: the loss of a frozen float32 head is computed by blocks of rows,
    and ``trained_by_rows`` that of a trained one too, where core.model.head_rows.trained_by_rows says so.
    ``scaled_logits``: float32 tensors of the logits' size beside them where they are multiplied by a number: the
    operand that a product keeps, and the copy that it makes of one, which is a view. ``wide_masks``: masks of dropout
    are kept in the dtype of products, otherwise as bytes.
    """

    name: str
    statistics: int = 1
    keeps_silu: bool = False
    late_gradients: bool = False
    views: bool = False
    casts: bool = True
    eager_messages: bool = True
    wide_logits: bool = False
    wide_shards: bool = False
    logit_copies: int = 1
    recomputes_inputs: bool = False
    reuses_freed: bool = False
    library: int = 0
    message_copies: int = 0
    loss_by_rows: bool = False
    trained_by_rows: bool = False
    scaled_logits: int = 0
    wide_masks: bool = False


MINDSPORE = Executor("ms", late_gradients=True, wide_logits=True, wide_shards=True, wide_masks=True)
PYTORCH = Executor("pt", views=True, loss_by_rows=True)
# MindSpore's static graph with MindFormers' TeleChat2: silu and mul are operators of their own; CANN's flash attention
# keeps the maximum and the sum of a row's softmax eight times each; parameters' gradients are accumulated one by one.
MINDFORMERS = Executor(
    "mindformers", statistics=16, keeps_silu=True, casts=False, eager_messages=False, wide_logits=True, logit_copies=3
)

EXECUTORS = {one.name: one for one in (MINDSPORE, PYTORCH, MINDFORMERS)}


def on_cpu(executor: Executor) -> Executor:
    """The same program on a CPU."""
    twin = executor.name in _LIBRARY
    library, copies = _LIBRARY.get(executor.name, 0), 2 if executor.name == "ms" else 0
    wide = executor.wide_logits and not twin  # the twins' own operators of the loss read 16-bit logits
    rows = twin or executor.loss_by_rows
    found = replace(executor, recomputes_inputs=twin, reuses_freed=twin, library=library, message_copies=copies)
    found = replace(found, loss_by_rows=rows, trained_by_rows=twin)
    return replace(found, wide_logits=wide, scaled_logits=2 if executor.name == "ms" else 0)


# Resident memory of a process that is in no tensor, above that of its first step with a narrow model.
_LIBRARY = {"ms": 25_000_000, "pt": 14_000_000}
