"""TeleChat2, Tele-FLM and FLM-101B in PyTorch: one decoder, its config says which.

The file knows no ranks, no optimizer and no data: a module is as large as the shapes it is given, and a table of fewer
parameters makes a smaller part of the model.

What differs from Llama. TeleChat2: biases on the attention output and on the ffn output only; rotary tables whose base
and amplitude depend on the sequence length (core.model.position); the norm casts before it multiplies by its gain.
Tele-FLM: multipliers of embeddings and logits. FLM-101B: these, biases everywhere, LayerNorm, gelu, xPos. The table of
shapes decides which biases, gates and low-rank adapters (core.model.lora) there are. A model between two sizes has
masks over what is new (core.model.growth_mask).

B batch, S sequence, H heads, K kv heads, D head dim, E hidden, F ffn, V vocab. Parameter names are the logical names of
core.model.params; telechat_ms/model.py is this file in MindSpore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import LoraConfig, lora_scale, lora_table
from telechat_twins.core.model.lora_dropout import BlockDropout, LoraDropout
from telechat_twins.core.model.masks import masks, padding_bias
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.model.position import rope_tables, xpos_scales
from telechat_twins.core.model.precision import PRECISION
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.weights import (
    empty_parameter,
    kept,
    masked,
    multiplied,
    named_weights,
    submodule,
    to_numpy,
    to_tensor,
)


class Dtypes:
    """core.model.precision.Precision with PyTorch's dtypes."""

    def __init__(self, precision: str) -> None:
        names = PRECISION[precision]
        self.weight, self.compute, self.residual, self.stat, self.master = (
            getattr(torch, n) for n in (names.weight, names.compute, names.residual, names.stat, names.master)
        )


Shapes = Mapping[str, tuple[int, ...]]  # parameter name -> shape
Scales = Mapping[str, float]  # name of a linear with an adapter -> what B A x is multiplied by
T = TypeVar("T")
Again = ops.Again
Rope = tuple[Tensor, ...]  # cos, sin and, with xPos, the scales of queries and keys: each [B or 1, S, 1, D/2]


class Shaped(Protocol):
    """core.model.params.ParamSpec or core.parallel.sharding.Shard: what is held, and which box of the whole tensor it
    is."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def index(self) -> tuple[slice, ...]: ...


class Added(Protocol):
    """Adapters of generation beside a linear layer (adapters.py)."""

    def added(self, out: Tensor, x: Tensor) -> Tensor: ...


class Linear(nn.Module):
    """weight [out, in], where the released model has one bias [out], and an adapter lora_a [r, in], lora_b [out, r]
    where the table of shapes has one: W x + b + scale B A dropout(x)."""

    served: Added | None = None

    def __init__(self, name: str, shapes: Shapes, dtypes: Dtypes, scales: Scales | None = None) -> None:
        super().__init__()
        self.compute, self.scale = dtypes.compute, (scales or {}).get(name, 1.0)
        self.weight = empty_parameter(shapes[f"{name}.weight"], dtypes.weight)
        self.bias, self.lora_a, self.lora_b = (
            empty_parameter(shapes[f"{name}.{kind}"], dtypes.weight) if f"{name}.{kind}" in shapes else None
            for kind in ("bias", "lora_a", "lora_b")
        )

    def forward(self, x: Tensor, dropped: Tensor | None = None, again: Again | None = None) -> Tensor:
        """x [B, S, in] -> [B, S, out]; ``dropped``: x as the adapter reads it, by default x itself. ``again`` computes
        x anew, for a backward pass that need not keep it then."""
        return self.product(x, dropped, self.bias, again)

    def product(self, x: Tensor, dropped: Tensor | None, bias: Tensor | None, again: Again | None) -> Tensor:
        if (adapted := self.adapted(bias)) is not None:
            return ops.adapted_linears(x, dropped, [adapted], self.compute, again)[0]
        out = ops.linear(x, self.weight, bias, self.compute, again)
        return out if self.served is None else self.served.added(out, x)

    def adapted(self, bias: Tensor | None) -> ops.Adapted | None:
        """The layer as ``ops.adapted_linears`` takes it; None without an adapter that is trained."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return ops.Adapted(self.weight, bias, self.lora_a, self.lora_b, self.scale)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where the table has a bias. ``mask`` [E] is how far each channel has grown.

    An RMSNorm that divides the sum of squares by another number than E, share * E: x / sqrt(sum / (share * E) + eps) is
    sqrt(share) * x / sqrt(sum / E + share * eps).
    """

    def __init__(self, name: str, shapes: Shapes, config: ModelConfig, dtypes: Dtypes) -> None:
        super().__init__()
        self.share, self.counted, self.dtypes = config.norm_share, config.norm_channels, dtypes
        self.eps = config.norm_eps * self.share
        self.weight = empty_parameter(shapes[f"{name}.weight"], dtypes.weight)
        bias = shapes.get(f"{name}.bias")
        self.bias = empty_parameter(bias, dtypes.weight) if bias is not None else None
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._of(x)

    def _of(self, x: Tensor) -> Tensor:
        gain, stat, compute = self._gain(), self.dtypes.stat, self.dtypes.compute
        if self.bias is not None:
            return ops.layer_norm(x, gain, self.bias, self.eps, stat, compute, self.mask, self.counted)
        return ops.rms_norm(x, gain, self.eps, stat, compute, self.mask)

    def again(self, x: Tensor) -> Again | None:
        """Computes the norm of x anew, bit for bit, for layers that would otherwise keep it; None: they keep it."""
        return lambda: self._of(x)

    def after_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and that sum: (normed, stream)."""
        if self.bias is not None:
            stream = residual + x.to(residual.dtype)
            return self._of(stream), stream
        stat, compute = self.dtypes.stat, self.dtypes.compute
        return ops.add_rms_norm(x, residual, self._gain(), self.eps, stat, compute, self.mask)

    def _gain(self) -> Tensor:
        return multiplied(self.weight, math.sqrt(self.share))


class Embedding(nn.Module):
    """weight [V, E]: ids [B, S] -> rows [B, S, E] in the ``residual`` dtype."""

    def __init__(self, shape: tuple[int, ...], dtypes: Dtypes) -> None:
        super().__init__()
        self.residual = dtypes.residual
        self.weight = empty_parameter(shape, dtypes.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        return ops.embedding(self.weight, input_ids).to(self.residual)


class Attention(nn.Module):
    """``core`` is what q, k and v meet in; a layout may put one there that spans several processes, generation one that
    keeps k and v."""

    def __init__(self, shapes: Shapes, head_dim: int, dtypes: Dtypes, recompute: str, scales: Scales) -> None:
        super().__init__()
        self.head_dim, self.core = head_dim, ops.attention
        self.recompute_core = recompute == "selective"
        self.mask: Tensor | None = None  # [H * D], over heads
        self.q, self.k, self.v, self.o = (Linear(f"attn.{name}", shapes, dtypes, scales) for name in "qkvo")

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        blocks: ops.Visible,
        dropout: BlockDropout | None = None,
        again: Again | None = None,
    ) -> Tensor:
        B, S, _ = x.shape
        # Query heads H and kv heads K of this rank: [B, S, E] -> [B, S, H, D] and twice [B, S, K, D].
        layers = (self.q, self.k, self.v)
        projected = ops.linears(x, dropped(x, dropout, "q", *layers), *layers, again=again)
        q, k, v = (part.view(B, S, -1, self.head_dim) for part in projected)
        # Positions enter by rotation alone, of queries and keys.
        q, k = ops.rope_qk(q, k, *rope)
        if self.recompute_core and self.training:
            out = checkpoint(self.core, q, k, v, blocks, use_reentrant=False)
        else:
            out = self.core(q, k, v, blocks)
        # [B, S, H, D] -> [B, S, H * D]; the heads of a growing model count as far as they have grown.
        out = masked(out.reshape(B, S, -1), self.mask)
        return self.o(out, dropped(out, dropout, "o", self.o))


class FeedForward(nn.Module):
    """With a gate silu(gate) * up, without one gelu(up)."""

    def __init__(self, shapes: Shapes, dtypes: Dtypes, recompute: str, scales: Scales) -> None:
        super().__init__()
        self.stat, self.recompute_core = dtypes.stat, recompute == "selective"
        self.mask: Tensor | None = None  # [F]
        self.gate = Linear("ffn.gate", shapes, dtypes, scales) if "ffn.gate.weight" in shapes else None
        self.up, self.down = (Linear(f"ffn.{name}", shapes, dtypes, scales) for name in ("up", "down"))

    def forward(self, x: Tensor, dropout: BlockDropout | None = None, again: Again | None = None) -> Tensor:
        core: Callable[..., Tensor]
        inputs: tuple[object, ...]
        layers = [layer for layer in (self.gate, self.up) if layer is not None]
        # [B, S, E] -> one or two of [B, S, F]
        projected = ops.linears(x, dropped(x, dropout, "up", *layers), *layers, again=again)
        core, inputs = (ops.gelu, projected) if self.gate is None else (ops.swiglu, (*projected, self.stat))
        core_again = None if again is None else lambda: masked(core(*inputs), self.mask)
        checkpointed = self.recompute_core and self.training
        out = masked(
            checkpoint(core, *inputs, use_reentrant=False) if checkpointed else core(*inputs), self.mask
        )  # [B, S, F]
        return self.down(out, dropped(out, dropout, "down", self.down), core_again)


class DecoderBlock(nn.Module):
    """Pre-norm: both branches read the norm and add to the stream."""

    def __init__(self, config: ModelConfig, shapes: Shapes, dtypes: Dtypes, recompute: str, scales: Scales) -> None:
        super().__init__()
        self.residual, self.recomputed = dtypes.residual, recompute == "full"
        self.mask: float | None = None  # of a new block
        self.attn_norm = Norm("attn_norm", shapes, config, dtypes)
        self.attn = Attention(shapes, config.head_dim, dtypes, recompute, scales)
        self.ffn_norm = Norm("ffn_norm", shapes, config, dtypes)
        self.ffn = FeedForward(shapes, dtypes, recompute, scales)

    def forward(self, x: Tensor, rope: Rope, blocks: ops.Visible, dropout: BlockDropout | None = None) -> Tensor:
        """The stream x [B, S, E] -> the stream after both branches."""
        branch = self.attn(self.attn_norm(x), rope, blocks, dropout, self._again(self.attn_norm, x))
        # The sum and the norm that reads it are one operator: the stream is read and written once.
        normed, stream = self.ffn_norm.after_sum(branch, x)
        out = ops.add(stream, self.ffn(normed, dropout, self._again(self.ffn_norm, stream)))
        # A new block of a growing model begins as the identity.
        return out if self.mask is None else multiplied(out, self.mask) + multiplied(x, 1.0 - self.mask)

    def _again(self, norm: Norm, x: Tensor) -> Again | None:
        """How the layers behind the norm compute their input again, from the stream, which the norm keeps anyway; None
        where the block itself is computed again and keeps only its input."""
        return None if self.recomputed else norm.again(x)


class Decoder(nn.Module):
    """Token ids to logits. Weights are uninitialised until ``load_weights``.

    ``recompute``: none; selective (attention core and activation are computed again in the backward); full (each
    block keeps only its input). ``table`` names the parameters to hold, with their shapes; the default is the whole
    model, with adapters where ``lora`` is given. Without layer 0 the input is a hidden state, without the final norm
    the output is one.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: str = "fp32",
        recompute: str = "none",
        table: Mapping[str, Shaped] | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        super().__init__()
        dtypes = Dtypes(precision)
        self.config, self.dtypes, self.recompute = config, dtypes, recompute
        if table is None:
            table = parameter_table(config) | ({} if lora is None else lora_table(config, lora))
        shapes = {name: spec.shape for name, spec in table.items()}
        self.names = list(shapes)
        numbers = list(dict.fromkeys(name.split(".")[1] for name in shapes if name.startswith("layers.")))
        self.first, self.last = "0" in numbers, "norm.weight" in shapes
        self.embed = Embedding(shapes["embed.weight"], dtypes) if "embed.weight" in shapes else None
        adapted = [] if lora is None else [name.removesuffix(".lora_a") for name in shapes if name.endswith(".lora_a")]
        self.adapter_scales = {name: lora_scale(lora, name) for name in adapted if lora is not None}
        self.layers = nn.ModuleDict(
            {
                i: DecoderBlock(config, _below(i, shapes), dtypes, recompute, _below(i, self.adapter_scales))
                for i in numbers
            }
        )
        self.norm = Norm("norm", shapes, config, dtypes) if self.last else None
        self.head = Linear("head", shapes, dtypes) if "head.weight" in shapes else None
        self.padding = None
        if self.last:
            vocabulary = table["head.weight" if self.head is not None else "embed.weight"]
            bias = padding_bias(config, vocabulary.index[0].start, vocabulary.shape[0])
            self.padding = None if bias is None else to_tensor(bias).to(ops.device(), dtypes.stat)
        block = f"layers.{numbers[0]}."
        self.columns = table[block + "attn.o.weight"].index[1], table[block + "ffn.down.weight"].index[1]
        self.set_mask(None if config.growth is None else config.growth.mask)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        blocks: ops.Visible,
        wanted: Tensor | None = None,
        dropout: LoraDropout | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Ids [B, S], ``rope`` tables, ``ops.attention_blocks`` -> logits [B, S, V] in the ``compute`` dtype.

        The output multiplier is applied in the ``compute`` dtype, as TeleChat-52B's released code does.

        A part of the model takes a hidden state [B, S, E] instead of ids, or returns one. ``wanted`` int32 [W]: of the
        positions 0 .. S-1 only these have their logits computed. ``dropout``: the masks of the adapters' inputs.
        ``targets`` [B, S]: the sum of the token losses in place of logits, where ``loss_head`` is not None.
        """
        if self.first and self.embed is not None:
            x = multiplied(self.embed(x), self.config.input_mult)  # [B, S, E]
        for number, layer in self.layers.items():
            # The masks are an argument, so that a block computed again in the backward finds its own micro-batch's.
            drops = None if dropout is None else dropout.block(int(number), self.config.hidden_size, self.columns)
            if self.recompute == "full" and self.training:
                x = checkpoint(layer, x, rope, blocks, drops, use_reentrant=False)
            else:
                x = layer(x, rope, blocks, drops)
        if self.norm is None:
            return x
        if wanted is not None:
            x = ops.positions(x, wanted)
        x = self.norm(x)
        if targets is not None:
            head = self.loss_head(targets.numel())
            assert head is not None  # by contract
            return ops.head_loss(x, head, targets)
        if self.head is not None:
            logits = self.head(x)
        else:
            assert self.embed is not None  # tied
            logits = ops.linear(x, self.embed.weight, None, self.dtypes.compute)
        logits = multiplied(logits, self.config.logit_mult)
        return logits if self.padding is None else logits + self.padding.to(logits.dtype)

    def loss_head(self, rows: int) -> ops.Head | None:
        """The head, where its loss of ``rows`` targets is computed without the logits of the whole micro-batch."""
        layer = self.embed if self.head is None else self.head
        if not self.last or layer is None or getattr(layer, "bias", None) is not None:
            return None
        head = ops.Head(layer.weight, self.config.logit_mult, self.padding, self.config.ffn_hidden_size)
        return head if ops.serves_head(head, rows, self.dtypes.compute) else None

    def use_adapters(self, on: bool) -> None:
        """Switch the adapters on, or off: the model is then its base, exactly."""
        for name, scale in self.adapter_scales.items():
            submodule(self, name).scale = scale if on else 0.0

    def set_mask(self, c: float | None) -> None:
        """Of a model with ``config.growth``: how far what is new counts from now on; None: all of it, no masks."""
        growth = self.config.growth
        channels, heads, neurons = (
            None if x is None else to_tensor(x).to(ops.device(), self.dtypes.stat)
            for x in masks(self.config, c, self.columns)
        )
        for number, block in self.layers.items():
            block.mask = c if growth is not None and int(number) in growth.new_layers else None
            block.attn_norm.mask = block.ffn_norm.mask = channels
            block.attn.mask, block.ffn.mask = heads, neurons
        if self.norm is not None:
            self.norm.mask = channels

    def rope(self, positions: np.ndarray, seq_len: int) -> Rope:
        """Rotary tables for positions [B or 1, S] of a row of ``seq_len`` tokens."""
        wide = np.float64 if self.dtypes.stat == torch.float64 else np.float32
        tables = *rope_tables(self.config, positions, seq_len, wide), *(xpos_scales(self.config, positions, wide) or ())
        return tuple(torch.from_numpy(table[:, :, None]).to(ops.device()) for table in tables)

    def load_weights(self, get: Callable[[str], np.ndarray], names: Collection[str] | None = None) -> None:
        """Fill the parameters ``names``, by default all, from ``get(name)``, one tensor at a time, cast to the
        parameter's dtype."""
        held = named_weights(self)
        for name in self.names if names is None else names:
            with torch.no_grad():
                held[name].copy_(to_tensor(get(name)))

    def read_weight(self, name: str) -> np.ndarray:
        """A parameter as numpy; 16-bit floats as float32."""
        return to_numpy(named_weights(self)[name])


def dropped(x: Tensor, dropout: BlockDropout | None, target: str, *layers: Linear) -> Tensor | None:
    """x [B, S, n] as the adapters of ``layers``, which all read it, see it in training; None: as it is."""
    if dropout is None or all(layer.lora_a is None for layer in layers):
        return None
    return kept(x, dropout.factor, torch.from_numpy(dropout.keep(target)).to(x.device))


def _below(number: str, entries: Mapping[str, T]) -> dict[str, T]:
    """The shapes, or the scales, of one decoder block, by their names inside the block."""
    start = f"layers.{number}."
    return {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}
