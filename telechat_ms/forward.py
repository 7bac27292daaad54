"""One forward pass, with gradients when asked for: logits, loss, d loss / d weight by name."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor

from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.train.loss_scale import gradients_of_batch
from telechat_twins.core.types import JsonObject
from telechat_twins.telechat_ms import ops
from telechat_twins.telechat_ms.model import Decoder
from telechat_twins.telechat_ms.weights import named_weights, to_numpy


def batch_logits(model: Decoder, batch: Batch) -> Tensor:
    """Logits [B, S, V] of a batch; the row's length S decides the rotary scaling."""
    S = batch.input_ids.shape[1]
    blocks = ops.attention_blocks(S, S, batch.doc_ids)
    return model(Tensor(batch.input_ids), model.rope(batch.positions, S), blocks)


def batch_loss(logits: Tensor, batch: Batch, num_targets: int) -> Tensor:
    """Sum of the batch's token losses divided by the number of targets in the *global* batch."""
    total = ops.cross_entropy(logits, Tensor(batch.targets))
    return total / Tensor(num_targets, total.dtype)


def run(
    config: ModelConfig,
    get: Callable[[str], np.ndarray],
    batch: Batch,
    precision: str = "fp32",
    grads: bool = False,
) -> JsonObject:
    """``logits`` [B, S, V] float32 (fp64: float64), ``loss`` if the batch has targets, ``grads`` by logical name.

    fp16: gradients are those of the loss times ``loss_scale`` (core.train.loss_scale.largest_scale), divided by it in
    fp32.
    """
    model = Decoder(config, precision)
    model.load_weights(get)
    result: JsonObject = {}

    def compute(scale: float) -> dict[str, np.ndarray]:
        """Gradients of scale * loss."""

        def loss_of_batch() -> Tensor:
            logits = batch_logits(model, batch)
            result["logits"] = to_numpy(logits)  # the backward may write over them
            if not batch.num_targets:
                return logits
            loss = batch_loss(logits, batch, batch.num_targets)
            result["loss"] = float(loss.asnumpy())
            return loss * Tensor(scale, loss.dtype)

        if not (grads and batch.num_targets):
            loss_of_batch()
            return {}
        weights = named_weights(model)
        _, gradients = ms.value_and_grad(loss_of_batch, None, list(weights.values()))()
        return {name: to_numpy(g) for name, g in zip(weights, gradients, strict=True)}

    return result | gradients_of_batch(compute, precision, grads and batch.num_targets > 0)
