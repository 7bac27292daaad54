"""Baseline for training: a transformers Llama of the measured model's shapes, as users train it.

On the twin's device. Attention by scaled_dot_product_attention (on a GPU PyTorch's FlashAttention), the model's own
loss, AdamW fused, gradients clipped by norm; bf16 is autocast over float32 weights. ``python -m
telechat_twins.kernels.bench.hf_step hf OPTIONS`` is a worker of ``tele bench step --peers hf``; ``hf-compile`` is the
same model through torch.compile. Weights are random. The transformers library is not a dependency of this project; this
module is used only where it is installed.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from telechat_twins.core.bench.worker import serve
from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.bench.hf import llama, transformers, where


class HfTrainer:
    """The Trainer of core.bench.worker for this model, on one process."""

    def __init__(self, config: RunConfig, compiled: bool) -> None:
        if config.train.precision not in ("fp32", "bf16"):
            raise UserError(
                f"--precision: must be fp32 or bf16 for the peers hf and hf-compile, found {config.train.precision}; "
                "leave them out of --peers, or take one of these"
            )
        self.config, self.compiled = config, compiled
        self.model = llama(config.model, torch.float32).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups: list[JsonObject] = [
            {"params": matrices, "weight_decay": config.optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (config.optim.beta1, config.optim.beta2)
        self.adamw = torch.optim.AdamW(groups, config.optim.lr, betas, config.optim.eps, fused=True)

    def share(self, global_batch: int) -> tuple[int, int]:
        return 0, global_batch

    def gradients(self, batch: Batch, num_targets: int, loss_scale: float) -> float:
        """The gradients of the mean loss, of labels that the model shifts itself."""
        device = self.model.device
        ids = torch.from_numpy(batch.input_ids.astype(np.int64)).to(device)
        size, total = self.config.train.micro_batch, 0.0
        for rows in ids.split(size):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
                loss = self.forward(input_ids=rows, labels=rows, use_cache=False).loss * (len(rows) / len(ids))
            (loss * loss_scale).backward()
            total += loss.item()
        return total

    def grad_norm(self, loss_scale: float) -> float:
        """The norm of the gradients, to which ``update`` clips them."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) / loss_scale

    def update(self, lr: float, grad_scale: float) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(grad_scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def implementation(self) -> dict[str, str]:
        how = ", torch.compile" if self.compiled else ""
        return {
            "backend": f"transformers {transformers.__version__}, PyTorch {torch.__version__}{how}",
            "device": where(self.model.device),
        }

    def device_peak(self) -> int:
        """Largest number of bytes in the device's pool; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.model.device.type == "cuda" else 0


if __name__ == "__main__":
    raise SystemExit(serve(sys.argv[1:], lambda name, config: HfTrainer(config, name == "hf-compile")))
