"""Names and packing of released checkpoints: one table a format, read in both directions.

A rule ties one released tensor to the logical tensors packed in it. ``{i}`` stands for the layer number. A further
format is a further table.

MindFormers' tables say besides along which dimension its model-parallel (``mp``) ranks share a tensor. What a rank
holds is always an equal part of the whole tensor: where ranks hold several projections fused, the rows of the whole
tensor are in the order that makes it so (``RowsByRank``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import ParamSpec, parameter_table

Box = tuple[slice, ...]  # explicit starts and stops, steps of 1
Read = Callable[[Box], np.ndarray]  # of a released tensor


class Transform(Protocol):
    """How logical tensors are packed into a released one."""

    def join(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        """Logical tensors -> released tensor."""
        ...

    def split(self, whole: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        """Released tensor -> logical tensors (views where possible); the inverse of join."""
        ...

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the released tensor."""
        ...

    def read(self, read: Read, part: int, box: Box, config: ModelConfig) -> np.ndarray:
        """The box of logical tensor number ``part``, out of boxes of the released tensor; as cut from ``split``."""
        ...


class Same:
    """One logical tensor, unchanged."""

    def join(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        return parts[0]

    def split(self, whole: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        return [whole]

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[0]

    def read(self, read: Read, part: int, box: Box, config: ModelConfig) -> np.ndarray:
        return read(box)


class InterleavedKeyValue:
    """k, v [K*D, E] <-> [2*K*D, E] whose rows are, for each key/value head in turn, D rows of k then D rows of v.

    Not [all k; all v]: taken that way every head but the first and the last mixes keys with values, shapes still fit.
    """

    def join(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        heads = [part.reshape(config.num_kv_heads, 1, config.head_dim, *part.shape[1:]) for part in parts]
        return np.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])

    def split(self, whole: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        heads = whole.reshape(config.num_kv_heads, 2, config.head_dim, *whole.shape[1:])
        return [heads[:, j].reshape(-1, *whole.shape[1:]) for j in range(2)]

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (shapes[0][0] + shapes[1][0], *shapes[0][1:])

    def read(self, read: Read, part: int, box: Box, config: ModelConfig) -> np.ndarray:
        D = config.head_dim
        return _gather_rows(read, box, D, 2 * D, part * D)


class RowsByRank:
    """Parts cut into ``ranks`` equal blocks of rows <-> one tensor: of each rank in turn, its block of every part.

    ``shares``: how the rows of the parts are to one another. [q; k; v] is one rank's heads of each, so taken as one
    rank's (or another number of ranks') the rows still fit, and heads of q, k and v mix.
    """

    def __init__(self, ranks: int, shares: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.shares = shares

    def join(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        blocks = [part.reshape(self.ranks, -1, *part.shape[1:]) for part in parts]
        return np.concatenate(blocks, axis=1).reshape(-1, *parts[0].shape[1:])

    def split(self, whole: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        blocks = whole.reshape(self.ranks, -1, *whole.shape[1:])
        cuts = np.cumsum(self.shares)[:-1] * blocks.shape[1] // sum(self.shares)
        return [block.reshape(-1, *whole.shape[1:]) for block in np.split(blocks, cuts, axis=1)]

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, read: Read, part: int, box: Box, config: ModelConfig) -> np.ndarray:
        # The rows of a whole part: heads of q, k and v, or channels of gate and up.
        attention = self.shares[part] * config.head_dim * (config.num_kv_heads // self.shares[-1])
        rows = config.ffn_hidden_size if len(self.shares) == 2 else attention
        unit = rows // (self.ranks * self.shares[part])
        block, before = unit * self.shares[part], unit * sum(self.shares[:part])
        return _gather_rows(read, box, block, unit * sum(self.shares), before)


def _gather_rows(read: Read, box: Box, block: int, stride: int, before: int) -> np.ndarray:
    """Rows ``box[0]`` of a part whose blocks of ``block`` rows lie every ``stride`` rows, from row ``before`` on."""
    first, last = box[0].start, box[0].stop
    if block == 1:  # rows in turn: one read of all of them
        return read((slice(first * stride, last * stride), *box[1:]))[before::stride]
    pieces = []
    for number in range(first // block, max(first // block + 1, -(-last // block))):
        low, high = max(first, number * block), min(last, (number + 1) * block)
        shift = number * (stride - block) + before
        pieces.append(read((slice(low + shift, max(low, high) + shift), *box[1:])))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class Rule:
    """One line of a table: the released name, the logical names packed in it, and how.

    ``axis``: the dimension of which each model-parallel rank holds its part; None where each holds the whole.
    """

    released: str
    logical: tuple[str, ...]
    transform: Transform
    axis: int | None = None


class Conv1D:
    """Matrices [out, in] <-> one [in, sum of outs], columns part after part; biases [out] <-> one [sum of outs].

    The released FLM code computes y = x W + b (GPT-2's Conv1D). The parts are equally large, so a c_attn read as
    [v | q | k], or a c_fc as [up | gate], would fit all the same.
    """

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def join(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        return np.ascontiguousarray(np.concatenate([part.T for part in parts], axis=-1))

    def split(self, whole: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        return [np.ascontiguousarray(part.T) for part in np.split(whole, self.parts, axis=-1)]

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (*shapes[0][1:], sum(shape[0] for shape in shapes))

    def read(self, read: Read, part: int, box: Box, config: ModelConfig) -> np.ndarray:
        # The parts of one pack are equally large: q, k and v of a family without grouped queries, gate and up.
        widths = {1: 0, 2: config.ffn_hidden_size, 3: config.num_heads * config.head_dim}
        before = part * widths[self.parts]
        columns = slice(box[0].start + before, box[0].stop + before)
        return np.ascontiguousarray(read((*box[1:], columns)).T)


def rule(released: str, *logical: str, transform: Transform | None = None, axis: int | None = None) -> Rule:
    """A line of a table; without a transform the one logical tensor is stored unchanged."""
    return Rule(released, logical, transform or Same(), axis)


# The Hugging Face release. Some copies lack the leading "transformer." (bind(..., prefix="")).
TELECHAT2_HF = (
    rule("transformer.word_embeddings.weight", "embed.weight"),
    rule("transformer.h.{i}.input_layernorm.weight", "layers.{i}.attn_norm.weight"),
    rule("transformer.h.{i}.self_attention.query.weight", "layers.{i}.attn.q.weight"),
    rule(
        "transformer.h.{i}.self_attention.key_value.weight",
        "layers.{i}.attn.k.weight",
        "layers.{i}.attn.v.weight",
        transform=InterleavedKeyValue(),
    ),
    rule("transformer.h.{i}.self_attention.dense.weight", "layers.{i}.attn.o.weight"),
    rule("transformer.h.{i}.self_attention.dense.bias", "layers.{i}.attn.o.bias"),
    rule("transformer.h.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
    rule("transformer.h.{i}.mlp.gate_proj.weight", "layers.{i}.ffn.gate.weight"),
    rule("transformer.h.{i}.mlp.up_proj.weight", "layers.{i}.ffn.up.weight"),
    rule("transformer.h.{i}.mlp.down_proj.weight", "layers.{i}.ffn.down.weight"),
    rule("transformer.h.{i}.mlp.down_proj.bias", "layers.{i}.ffn.down.bias"),
    rule("transformer.ln_f.weight", "norm.weight"),
    rule("lm_head.weight", "head.weight"),
)

# Llama's names, without a bias anywhere: Tele-FLM and, as a rule, TeleChat3.
TELEFLM_HF = (
    rule("model.embed_tokens.weight", "embed.weight"),
    rule("model.layers.{i}.input_layernorm.weight", "layers.{i}.attn_norm.weight"),
    *(rule(f"model.layers.{{i}}.self_attn.{x}_proj.weight", f"layers.{{i}}.attn.{x}.weight") for x in "qkvo"),
    rule("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
    *(rule(f"model.layers.{{i}}.mlp.{x}_proj.weight", f"layers.{{i}}.ffn.{x}.weight") for x in ("gate", "up", "down")),
    rule("model.norm.weight", "norm.weight"),
    rule("lm_head.weight", "head.weight"),
)


def telechat3_hf(config: ModelConfig) -> tuple[Rule, ...]:
    """Llama's names as TeleChat3 has them: none, or every linear of the blocks, with a bias."""
    if config.biases == "none":
        return TELEFLM_HF
    biases = (
        *(rule(f"model.layers.{{i}}.self_attn.{x}_proj.bias", f"layers.{{i}}.attn.{x}.bias") for x in "qkvo"),
        *(rule(f"model.layers.{{i}}.mlp.{x}_proj.bias", f"layers.{{i}}.ffn.{x}.bias") for x in ("gate", "up", "down")),
    )
    return (*TELEFLM_HF[:-2], *biases, *TELEFLM_HF[-2:])


def flm_hf(config: ModelConfig) -> tuple[Rule, ...]:
    """TeleChat-52B and FLM-101B: GPT-2's names, fused c_attn [q | k | v] and, with a gate, c_fc [gate | up]."""
    inputs = ("gate", "up") if config.activation == "swiglu" else ("up",)
    every = ("weight", "bias") if config.biases == "all" else ("weight",)
    outputs = ("weight",) if config.biases == "none" else ("weight", "bias")
    norms = ("weight", "bias") if config.norm == "layernorm" else ("weight",)

    def packed(released: str, module: str, names: Sequence[str], kinds: Sequence[str]) -> list[Rule]:
        return [
            rule(
                f"transformer.h.{{i}}.{released}.{kind}",
                *(f"layers.{{i}}.{module}.{name}.{kind}" for name in names),
                transform=Conv1D(len(names)),
            )
            for kind in kinds
        ]

    return (
        rule("transformer.wte.weight", "embed.weight"),
        *(rule(f"transformer.h.{{i}}.ln_1.{kind}", f"layers.{{i}}.attn_norm.{kind}") for kind in norms),
        *packed("attn.c_attn", "attn", ("q", "k", "v"), every),
        *packed("attn.c_proj", "attn", ("o",), outputs),
        *(rule(f"transformer.h.{{i}}.ln_2.{kind}", f"layers.{{i}}.ffn_norm.{kind}") for kind in norms),
        *packed("mlp.c_fc", "ffn", inputs, every),
        *packed("mlp.c_proj", "ffn", ("down",), outputs),
        *(rule(f"transformer.ln_f.{kind}", f"norm.{kind}") for kind in norms),
        rule("lm_head.weight", "head.weight"),
    )


MINDFORMERS_FORMS = ("plain", "qkv_concat", "mcore", "mcore_train")


def mindformers_rules(config: ModelConfig, form: str, mp: int = 1) -> tuple[Rule, ...]:
    """The table of MindFormers' checkpoints of TeleChat2, TeleChat-52B and TeleChat3.

    ``form``: plain (research/telechat2 and telechat3, training and inference), qkv_concat (their inference with fused
    projections, and all of research/telechat, where TeleChat-52B has no other), mcore (mindformers.models, inference),
    mcore_train (its training, TeleChat3 only). ``mp``: the ranks for which the rows of fused projections are ordered.

    Source: mindspore-lab/mindformers at fd4deeb research/telechat2/convert_weight.py and convert_reversed.py, and
    research/telechat/convert_weight_torch_to_ms.py (TeleChat-52B, ``--mp``); the wheel mindformers 1.9.0
    mindformers/models/telechat2/utils.py. MindFormers has no way back from qkv_concat; here it is the same table.
    TeleChat3: Tele-AI/TeleChat3 at 242aeb5 mindformers_telechat3/research/telechat3/convert_weight.py; the wheel
    mindformers 2.1.0 mindformers/models/telechat3/utils.py and parallel_core/utils/model_mixin.py.
    """
    if form == "mcore_train":
        return _mcore_train(config)
    if form == "mcore":
        return tuple(r for r in TELECHAT2_MCORE if config.biases == "outputs" or not r.released.endswith(".bias"))
    return _mindformers(config, form == "qkv_concat", mp)


def _mcore_train(config: ModelConfig) -> tuple[Rule, ...]:
    """linear_qkv has, of each group in turn, its query heads, its key head, its value head (Megatron's order and
    MindFormers' default); linear_fc1 has rows of gate and up in turn."""
    K, at, to = config.num_kv_heads, "decoder.layers.{i}.", "layers.{i}."
    q, k, v = (f"{to}attn.{part}.weight" for part in "qkv")
    gate, up = f"{to}ffn.gate.weight", f"{to}ffn.up.weight"
    qkv, fc1 = RowsByRank(K, (config.num_heads // K, 1, 1)), RowsByRank(config.ffn_hidden_size, (1, 1))
    kept = [r for r in TELECHAT2_MCORE if not r.released.endswith((".bias", "linear_q.weight", "hidden.weight"))]
    fused = {
        "linear_k": rule(f"{at}self_attention.linear_qkv.weight", q, k, v, transform=qkv),
        "gating": rule(f"{at}mlp.linear_fc1.weight", gate, up, transform=fc1),
    }
    named = ((r, r.released.split(".")[-2]) for r in kept)
    return tuple(fused.get(name, r) for r, name in named if name != "linear_v")


def _mindformers(config: ModelConfig, fused: bool, mp: int) -> tuple[Rule, ...]:
    at, to = "model.layers.{i}.", "layers.{i}."
    H, K = config.num_heads, config.num_kv_heads
    # TeleChat-52B's converter for one rank puts single heads after one another: [q_0; k_0; v_0; q_1; ...].
    blocks = H if config.family == "flm" and mp == 1 else mp
    q, k, v = (f"{to}attn.{part}.weight" for part in "qkv")
    gate, up = f"{to}ffn.gate.weight", f"{to}ffn.up.weight"
    inputs: tuple[Rule, ...]
    if fused:
        inputs = (
            rule(f"{at}attention.w_qkv.weight", q, k, v, transform=RowsByRank(blocks, (H, K, K)), axis=0),
            rule(f"{at}feed_forward.w_gate_hidden.weight", gate, up, transform=RowsByRank(mp, (1, 1)), axis=0),
        )
    else:
        packed = (rule(f"{at}attention.wk_v.weight", k, v, transform=InterleavedKeyValue(), axis=0),)
        apart = (rule(f"{at}attention.wk.weight", k, axis=0), rule(f"{at}attention.wv.weight", v, axis=0))
        inputs = (
            rule(f"{at}attention.wq.weight", q, axis=0),
            *(apart if config.family == "telechat3" else packed),
            rule(f"{at}feed_forward.w1.weight", gate, axis=0),
            rule(f"{at}feed_forward.w3.weight", up, axis=0),
        )
    biases = (
        rule(f"{at}attention.wo.bias", f"{to}attn.o.bias"),
        rule(f"{at}feed_forward.w2.bias", f"{to}ffn.down.bias"),
    )
    return (
        rule("model.tok_embeddings.embedding_weight", "embed.weight", axis=0),
        rule(f"{at}attention_norm.weight", f"{to}attn_norm.weight"),
        rule(f"{at}ffn_norm.weight", f"{to}ffn_norm.weight"),
        *inputs,
        rule(f"{at}attention.wo.weight", f"{to}attn.o.weight", axis=1),
        rule(f"{at}feed_forward.w2.weight", f"{to}ffn.down.weight", axis=1),
        *(biases if config.biases == "outputs" else ()),
        rule("model.norm_out.weight", "norm.weight"),
        rule("lm_head.weight", "head.weight", axis=0),
    )


# Keys, values, gate and up apart and whole: the network's loader fuses them and cuts them for its ranks.
TELECHAT2_MCORE = (
    rule("embedding.word_embeddings.weight", "embed.weight"),
    rule("decoder.layers.{i}.input_layernorm.weight", "layers.{i}.attn_norm.weight"),
    *(rule(f"decoder.layers.{{i}}.self_attention.linear_{x}.weight", f"layers.{{i}}.attn.{x}.weight") for x in "qkv"),
    rule("decoder.layers.{i}.self_attention.linear_proj.weight", "layers.{i}.attn.o.weight"),
    rule("decoder.layers.{i}.self_attention.linear_proj.bias", "layers.{i}.attn.o.bias"),
    rule("decoder.layers.{i}.pre_mlp_layernorm.weight", "layers.{i}.ffn_norm.weight"),
    rule("decoder.layers.{i}.mlp.gating.weight", "layers.{i}.ffn.gate.weight"),
    rule("decoder.layers.{i}.mlp.hidden.weight", "layers.{i}.ffn.up.weight"),
    rule("decoder.layers.{i}.mlp.linear_fc2.weight", "layers.{i}.ffn.down.weight"),
    rule("decoder.layers.{i}.mlp.linear_fc2.bias", "layers.{i}.ffn.down.bias"),
    rule("decoder.final_layernorm.weight", "norm.weight"),
    rule("output_layer.weight", "head.weight"),
)


def hf_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The table of the release that the model's family has."""
    if config.family == "flm":
        return flm_hf(config)
    if config.family == "telechat3":
        return telechat3_hf(config)
    return TELEFLM_HF if config.family == "teleflm" else TELECHAT2_HF


def hf_prefix(config: ModelConfig) -> str:
    """What every name but the head's begins with in the release; some copies lack it."""
    return "model." if config.family in ("teleflm", "telechat3") else "transformer."


@dataclass(frozen=True)
class Binding:
    """A rule filled in for one layer of one model."""

    released: str
    logical: tuple[str, ...]
    transform: Transform
    shape: tuple[int, ...]
    axis: int | None = None

    def split(self, whole: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
        """The released tensor -> {logical name: tensor}."""
        return dict(zip(self.logical, self.transform.split(whole, config), strict=True))

    def read(self, read: Read, name: str, box: Box, config: ModelConfig) -> np.ndarray:
        """A box of a logical tensor, reading only the boxes of the released tensor that hold it."""
        return self.transform.read(read, self.logical.index(name), box, config)

    def join(self, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> np.ndarray:
        """Logical tensors by name -> the released tensor; UserError if parts of one pack differ in dtype."""
        parts = [tensors[name] for name in self.logical]
        if len({part.dtype for part in parts}) > 1:
            found = ", ".join(f"{name} {part.dtype}" for name, part in zip(self.logical, parts, strict=True))
            raise UserError(f"{self.released}: its parts differ in dtype ({found}); give --dtype to make them one")
        return self.transform.join(parts, config)


def bind(config: ModelConfig, rules: Sequence[Rule] | None = None, prefix: str | None = None) -> dict[str, Binding]:
    """Released name -> binding for a whole model, in the model's forward order; a tied head has no line.

    ``rules``: by default those of the release of the model's family. ``prefix`` replaces ``hf_prefix`` ("" for copies
    without it). Whether the format can hold the model is ``convert.places``' to say.
    """
    table = parameter_table(config)
    rules = hf_rules(config) if rules is None else rules
    stem = hf_prefix(config)
    prefix = stem if prefix is None else prefix
    if config.tied_embeddings:
        rules = [line for line in rules if line.logical != ("head.weight",)]
    bindings: dict[str, Binding] = {}
    blocks = [r for r in rules if "{i}" in r.released]
    first = rules.index(blocks[0])
    lines = [(r, "") for r in rules[:first]]
    lines += [(r, str(i)) for i in range(config.num_layers) for r in blocks]
    lines += [(r, "") for r in rules[first:] if "{i}" not in r.released]
    for line, layer in lines:
        name = line.released.replace("{i}", layer)
        if name.startswith(stem):
            name = prefix + name.removeprefix(stem)
        logical = tuple(pattern.replace("{i}", layer) for pattern in line.logical)
        shape = line.transform.joined_shape([table[part].shape for part in logical])
        bindings[name] = Binding(name, logical, line.transform, shape, line.axis)
    return bindings


def released_table(bindings: Mapping[str, Binding], config: ModelConfig) -> dict[str, ParamSpec]:
    """Released name -> shape and kind, as check_shapes wants it."""
    kinds = parameter_table(config)
    return {name: ParamSpec(b.shape, kinds[b.logical[0]].kind) for name, b in bindings.items()}


_DERIVED = re.compile(
    r"(.+\.)?(original_inv_freq|inv_freq|masked_bias|causal_mask|casual_mask|position_ids|_extra_state\d*"
    r"|(cos|sin)_cached|freqs_(cis|cos|sin)|rotary(_pos)?_emb\.(cos|sin|freqs|scale))"
)
_MASK = re.compile(r"(.+\.)?(attn|attention|self_attn|self_attention)\.bias")


def is_derived(name: str, shape: Sequence[int] | None = None) -> bool:
    """Whether a tensor is a buffer that modelling code computes from the config: rotary tables, causal masks, states of
    an implementation. GPT-2's mask is called attn.bias; its ``shape`` [1, 1, S, S] tells it from a bias."""
    if _MASK.fullmatch(name):
        return shape is not None and len(shape) >= 2
    return _DERIVED.fullmatch(name) is not None
