"""TeleChat2 in PyTorch. The file knows no ranks, no optimizer and no data.

What differs from Llama: biases on the attention output and on the ffn output only; rotary tables whose base and
amplitude depend on the sequence length (core.position); the norm casts before it multiplies by its gain.

B batch, S sequence, H heads, K kv heads, D head dim, E hidden, F ffn, V vocab. Parameter names are the logical names of
core.params; telechat_ms/model.py is this file in MindSpore.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.config import ModelConfig
from core.params import parameter_table
from core.position import rope_tables
from core.precision import PRECISION
from core.visibility import Block
from pt_reference import ops


class Dtypes:
    """core.precision.Precision with PyTorch's dtypes."""

    def __init__(self, precision: str) -> None:
        names = PRECISION[precision]
        self.weight, self.compute, self.residual, self.stat, self.master = (
            getattr(torch, n) for n in (names.weight, names.compute, names.residual, names.stat, names.master)
        )


class Linear(nn.Module):
    """weight [out, in] and, where the released model has one, bias [out]."""

    def __init__(self, num_in: int, num_out: int, dtypes: Dtypes, bias: bool = False) -> None:
        super().__init__()
        self.compute = dtypes.compute
        self.weight = nn.Parameter(torch.empty(num_out, num_in, dtype=dtypes.weight))
        self.bias = nn.Parameter(torch.empty(num_out, dtype=dtypes.weight)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.compute)


class Norm(nn.Module):
    def __init__(self, config: ModelConfig, dtypes: Dtypes) -> None:
        super().__init__()
        self.eps, self.dtypes = config.norm_eps, dtypes
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=dtypes.weight))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.dtypes.stat, self.dtypes.compute)


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, dtypes: Dtypes) -> None:
        super().__init__()
        self.residual = dtypes.residual
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtypes.weight))

    def forward(self, input_ids: Tensor) -> Tensor:
        return ops.embedding(self.weight, input_ids).to(self.residual)


class KeyValueCache:
    """Rotated keys and values of one layer, [B, capacity, K, D], filled up to ``length``."""

    def __init__(self, batch: int, capacity: int, config: ModelConfig, dtype: torch.dtype) -> None:
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=ops.device()) for _ in "kv")
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions and return all keys and values so far."""
        end = self.length + k.shape[1]
        self.k[:, self.length : end], self.v[:, self.length : end] = k, v
        self.length = end
        return self.k[:, :end], self.v[:, :end]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, dtypes: Dtypes, recompute: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.recompute_core = recompute == "selective"
        E, HD, KD = config.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q = Linear(E, HD, dtypes)
        self.k = Linear(E, KD, dtypes)
        self.v = Linear(E, KD, dtypes)
        self.o = Linear(HD, E, dtypes, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, blocks: list[Block], cache: KeyValueCache | None) -> Tensor:
        B, S, _ = x.shape
        q = ops.rope(self.q(x).view(B, S, self.num_heads, self.head_dim), cos, sin)
        k = ops.rope(self.k(x).view(B, S, self.num_kv_heads, self.head_dim), cos, sin)
        v = self.v(x).view(B, S, self.num_kv_heads, self.head_dim)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.recompute_core and self.training:
            out = checkpoint(ops.attention, q, k, v, blocks, use_reentrant=False)
        else:
            out = ops.attention(q, k, v, blocks)
        return self.o(out.reshape(B, S, -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, dtypes: Dtypes, recompute: str) -> None:
        super().__init__()
        self.stat, self.recompute_core = dtypes.stat, recompute == "selective"
        E, F = config.hidden_size, config.ffn_hidden_size
        self.gate = Linear(E, F, dtypes)
        self.up = Linear(E, F, dtypes)
        self.down = Linear(F, E, dtypes, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if self.recompute_core and self.training:
            return self.down(checkpoint(ops.swiglu, gate, up, self.stat, use_reentrant=False))
        return self.down(ops.swiglu(gate, up, self.stat))


class DecoderBlock(nn.Module):
    """Pre-norm: both branches read the norm and add to the stream."""

    def __init__(self, config: ModelConfig, dtypes: Dtypes, recompute: str) -> None:
        super().__init__()
        self.residual = dtypes.residual
        self.attn_norm = Norm(config, dtypes)
        self.attn = Attention(config, dtypes, recompute)
        self.ffn_norm = Norm(config, dtypes)
        self.ffn = FeedForward(config, dtypes, recompute)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, blocks: list[Block], cache: KeyValueCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, blocks, cache).to(self.residual)
        return x + self.ffn(self.ffn_norm(x)).to(self.residual)


class Decoder(nn.Module):
    """Token ids to logits. Weights are uninitialised until ``load_weights``.

    ``recompute``: none; selective (attention core and activation are computed again in the backward); full (each
    block keeps only its input).
    """

    def __init__(self, config: ModelConfig, precision: str = "fp32", recompute: str = "none") -> None:
        super().__init__()
        dtypes = Dtypes(precision)
        self.config, self.dtypes, self.recompute = config, dtypes, recompute
        self.embed = Embedding(config, dtypes)
        self.layers = nn.ModuleList(DecoderBlock(config, dtypes, recompute) for _ in range(config.num_layers))
        self.norm = Norm(config, dtypes)
        self.head = Linear(config.hidden_size, config.vocab_size, dtypes)

    def forward(
        self,
        input_ids: Tensor,
        rope: tuple[Tensor, Tensor],
        blocks: list[Block],
        caches: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """input_ids [B, S], ``rope`` tables, ``ops.attention_blocks`` -> logits [B, S, V] in the ``stat`` dtype."""
        cos, sin = rope
        x = self.embed(input_ids)  # [B, S, E]
        for i, layer in enumerate(self.layers):
            cache = caches[i] if caches is not None else None
            if self.recompute == "full" and self.training:
                x = checkpoint(layer, x, cos, sin, blocks, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, blocks, cache)
        return self.head(self.norm(x)).to(self.dtypes.stat)

    def rope(self, positions: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
        """Rotary tables for positions [B or 1, S] of a row of ``seq_len`` tokens: cos, sin [B or 1, S, 1, D/2]."""
        wide = np.float64 if self.dtypes.stat == torch.float64 else np.float32
        cos, sin = rope_tables(self.config, positions, seq_len, wide)
        return tuple(torch.from_numpy(table[:, :, None]).to(ops.device()) for table in (cos, sin))

    def load_weights(self, get: Callable[[str], np.ndarray]) -> None:
        """Fill every parameter from ``get(name)``, one tensor at a time, cast to the weight dtype."""
        for name, parameter in named_weights(self).items():
            with torch.no_grad():
                parameter.copy_(to_tensor(get(name)))


def named_weights(model: Decoder) -> dict[str, nn.Parameter]:
    """Parameters by logical name, in the order of core.params.parameter_table."""
    held = dict(model.named_parameters())
    return {name: held[name] for name in parameter_table(model.config)}


def to_tensor(array: np.ndarray) -> Tensor:
    """numpy to torch without loss; bfloat16 travels as its bits because numpy has no such type of its own."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """torch to numpy; bfloat16, which numpy lacks, becomes float32 (exact)."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
