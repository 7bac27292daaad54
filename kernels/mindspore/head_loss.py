"""Loss of a frozen head, by blocks of rows: the logits of a whole micro-batch never exist.

A frozen head has no gradient of its own, so all that the backward pass needs is the gradient of its input, [N, E]. It
is computed with the loss while a block's logits are at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor, ops

from telechat_twins.core.model.batch import head_blocks
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.mindspore.autograd import Gradients, turned_product
from telechat_twins.kernels.mindspore.composite import total_loss
from telechat_twins.kernels.mindspore.private import Context, Function


class FrozenHead(NamedTuple):
    """logits = multiplier * (x @ weight^T) + padding; weight [V, E] float32, padding [V] or None, both constants.
    ``ffn_hidden_size`` F: columns of ffn.down's input in the block before."""

    weight: Tensor
    multiplier: float
    padding: Tensor | None
    ffn_hidden_size: int


def serves(head: FrozenHead) -> bool:
    """Whether ``frozen_head_loss`` takes this head: float32, with operators of kernels.cpu."""
    weight = head.weight
    return (
        weight.dtype == ms.float32
        and not weight.requires_grad
        and kernels.serving("linear", ms.float32) is not None
        and kernels.serving("cross_entropy", ms.float32) is not None
    )


def frozen_head_loss(x: Tensor, head: FrozenHead, targets: Tensor) -> Tensor:
    """kernels.mindspore.ops.cross_entropy of the head's logits of x [..., E] float32, targets [...]: a sum, float32."""
    return FrozenHeadLoss.apply(x.reshape(-1, x.shape[-1]), head, targets.reshape(-1))


class FrozenHeadLoss(Function):
    """x [N, E], targets [N]. Keeps the gradient of x."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, head: FrozenHead, targets: Tensor) -> Tensor:
        weight, multiplier, padding, ffn_hidden_size = head
        cpp, module = kernels.serving("linear", ms.float32), kernels.serving("cross_entropy", ms.float32)
        assert cpp is not None and module is not None  # ``serves``
        V, one, times = weight.shape[0], Tensor([1.0], ms.float32), Tensor(multiplier, ms.float32)
        losses, dxs = [], []
        for part in head_blocks(x.shape[0], V, ffn_hidden_size):
            logits = cpp.matmul(x[part], weight)
            logits = logits if multiplier == 1.0 else logits * times
            logits = logits if padding is None else logits + padding
            log_sum_exp, picked = module.cross_entropy_forward(logits, targets[part], 0, V)
            losses.append(log_sum_exp - picked)
            dlogits = module.cross_entropy_backward(logits, targets[part], 0, V, log_sum_exp, one)
            dxs.append(turned_product(cpp, dlogits, weight))
            del logits, dlogits  # before the next block's are made
        dx = dxs[0] if len(dxs) == 1 else ops.concat(dxs, 0)
        ctx.save_for_backward(dx if multiplier == 1.0 else dx * times)
        return total_loss(losses[0] if len(losses) == 1 else ops.concat(losses, 0), targets)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        return ctx.saved_tensors[0] * grad, None, None
