"""Baseline for training: TeleChat2 composed of separate PyTorch operators, as in the released code.

An independent implementation from the model's description. Keys and values are interleaved in one matrix and repeated
for their query heads; scores are a full S x S matrix with an additive mask and a float32 softmax; the loss copies the
logits with a shift; AdamW is torch.optim's with foreach. Rotary tables are computed once per run instead of once per
layer and step, which favours this baseline.
``python -m telechat_twins.kernels.bench.eager eager OPTIONS`` is a worker of ``tele bench step``.
Shapes: B batch, S sequence, H heads, K kv heads, D head dim, E hidden, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telechat_twins.core.bench.worker import serve
from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.position import rope_tables
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.pytorch import private


class EagerNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        values = x.to(torch.float32)
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * values.to(x.dtype)


class EagerAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, D
        self.query = nn.Linear(E, self.heads * D, bias=False)
        self.key_value = nn.Linear(E, 2 * self.kv_heads * D, bias=False)
        self.dense = nn.Linear(self.heads * D, E)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        B, S, _ = x.shape
        q = self.query(x).view(B, S, self.heads, self.head_dim).transpose(1, 2)
        mixed = self.key_value(x).view(B, S, self.kv_heads, 2 * self.head_dim)
        k, v = (t.transpose(1, 2) for t in mixed.chunk(2, -1))
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = repeat_kv(k, self.heads // self.kv_heads), repeat_kv(v, self.heads // self.kv_heads)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim) + mask
        weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return self.dense(torch.matmul(weights, v).transpose(1, 2).reshape(B, S, -1))


class EagerBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, width = config.hidden_size, config.ffn_hidden_size
        self.input_layernorm, self.post_attention_layernorm = (EagerNorm(E, config.norm_eps) for _ in range(2))
        self.self_attention = EagerAttention(config)
        self.gate_proj, self.up_proj = (nn.Linear(E, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, E)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), cos, sin, mask)
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class EagerModel(nn.Module):
    """Ids [B, S] -> logits [B, S, V] in float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(EagerBlock(config) for _ in range(config.num_layers))
        self.ln_f = EagerNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.word_embeddings.weight
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        cos, sin, mask = self._constants(input_ids.shape[1])
        x = self.word_embeddings(input_ids)
        for block in self.h:
            x = block(x, cos, sin, mask)
        return self.lm_head(self.ln_f(x))

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of labels [B, S], shifted here: the logits of position i predict label i + 1."""
        logits = self(input_ids)
        shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
        return F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))

    def load(self, get: Callable[[str], np.ndarray]) -> None:
        """Load every parameter from ``get(logical name)``."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(released_tensor(name, self.config, get)))

    def _constants(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._tables is None or self._tables[0].shape[0] != length:
            cos, sin = (torch.from_numpy(t) for t in rope_tables(self.config, np.arange(length), length))
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            mask = torch.zeros(length, length).masked_fill(later, torch.finfo(torch.float32).min)
            self._tables = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), mask[None, None]
        return self._tables


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """[B, K, S, D] -> [B, K * times, S, D]."""
    B, K, S, D = x.shape
    return x if times == 1 else x[:, :, None].expand(B, K, times, S, D).reshape(B, K * times, S, D)


_RENAMED = {
    "word_embeddings.weight": "embed.weight",
    "ln_f.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attention.query": "attn.q",
    "self_attention.dense": "attn.o",
    "gate_proj": "ffn.gate",
    "up_proj": "ffn.up",
    "down_proj": "ffn.down",
}


def released_tensor(name: str, config: ModelConfig, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """This model's parameter ``name`` from the logical tensors; keys and values are interleaved by head."""
    if name in _RENAMED:
        return get(_RENAMED[name])
    _, number, rest = name.split(".", 2)
    block = f"layers.{number}."
    if rest == "self_attention.key_value.weight":
        k, v = (
            get(f"{block}attn.{letter}.weight").reshape(config.num_kv_heads, config.head_dim, -1) for letter in "kv"
        )
        return np.concatenate((k, v), 1).reshape(-1, config.hidden_size)
    module, _, leaf = rest.rpartition(".")
    return get(f"{block}{_RENAMED[module]}.{leaf}")


class EagerTrainer:
    """The Stepper of core.bench.worker for this model, in float32 on one process."""

    def __init__(self, config: RunConfig) -> None:
        if config.train.precision != "fp32":
            raise UserError(f"--precision {config.train.precision}: the eager composition computes in fp32 only")
        self.config, model = config, config.model
        self.model = EagerModel(model)
        self.model.load(lambda name: init_tensor(name, model, config.train.seed))
        named = {name: p for name, p in self.model.named_parameters()}
        groups: list[JsonObject] = [
            {"params": [p for p in named.values() if p.ndim == 2], "weight_decay": config.optim.weight_decay},
            {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        betas = (config.optim.beta1, config.optim.beta2)
        self.adamw = torch.optim.AdamW(groups, config.optim.lr, betas, config.optim.eps, foreach=True)

    def share(self, global_batch: int) -> tuple[int, int]:
        return 0, global_batch

    def gradients(self, batch: Batch, num_targets: int, loss_scale: float) -> float:
        """Gradients with the released scripts' labels: the ids themselves; a row's last logits have no label."""
        ids = torch.from_numpy(batch.input_ids.astype(np.int64))
        size, total = self.config.train.micro_batch, 0.0
        for rows in ids.split(size):
            loss = self.model.loss(rows, rows) * (len(rows) / len(ids))
            (loss * loss_scale).backward()
            total += loss.item()
        return total

    def grad_norm(self, loss_scale: float) -> float:
        norms = private.foreach_norm([p.grad for p in self.model.parameters()])
        return float(torch.linalg.vector_norm(torch.stack(norms))) / loss_scale

    def update(self, lr: float, grad_scale: float) -> None:
        """Clip the gradients by ``grad_scale``, as torch.nn.utils.clip_grad_norm_ does, and update."""
        private.foreach_scale([p.grad for p in self.model.parameters()], grad_scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def implementation(self) -> dict[str, str]:
        return {"backend": f"PyTorch {torch.__version__}, eager composition", "device": "cpu"}


if __name__ == "__main__":
    raise SystemExit(serve(sys.argv[1:], lambda _, config: EagerTrainer(config)))
