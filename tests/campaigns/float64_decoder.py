"""A second decoder, in numpy and float64, that shares no code with the project: the judge of the equivalence campaign.

Written from the published formulas of TeleChat2, Tele-FLM, TeleChat-52B and FLM-101B: it reads a release's config.json
and safetensors itself and gives logits, loss and the gradient of every released tensor, by a backward written by hand.
Nothing here imports from the packages under test, and none of them may import this.

``fault`` plants one mistake (FAULTS); a campaign holds that each is seen. Letters: B batch, S sequence, H heads, K kv
heads, D head dim, E hidden, F ffn, V vocab.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]
Moved = Callable[[np.ndarray], np.ndarray]  # what rounding does to numbers, or nothing
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """What config.json says. ``family``: telechat2, teleflm, flm (TeleChat-52B, FLM-101B); ``scaled``: rotary base and
    amplitude follow the length as in TeleChat2; ``decay``: xPos's scale base, or None."""

    family: str
    V: int
    E: int
    F: int
    L: int
    H: int
    K: int
    eps: float
    theta: float
    centred: bool = False
    gated: bool = True
    biases: str = "none"
    scaled: bool = False
    trained: int = 1
    base: int = 1
    decay: float | None = None
    input_mult: float = 1.0
    logit_mult: float = 1.0
    tied: bool = False
    prefix: str = "transformer."

    @property
    def D(self) -> int:
        return self.E // self.H


def read_shape(path: Path) -> Shape:
    """The Shape of a release's config.json."""
    c: dict[str, Any] = json.loads((path / "config.json").read_text())
    if c.get("model_type") == "TeleFLM":
        return Shape(
            family="teleflm", V=c["vocab_size"], E=c["hidden_size"], F=c["intermediate_size"],
            L=c["num_hidden_layers"], H=c["num_attention_heads"],
            K=c.get("num_key_value_heads") or c["num_attention_heads"], eps=c["rms_norm_eps"],
            theta=c.get("rope_theta", 10000.0), input_mult=c["input_mult"],
            logit_mult=c["output_mult"] / c["mup_scale_factor"],
        )  # fmt: skip
    if "n_embd" in c:
        return Shape(
            family="flm", V=c["vocab_size"], E=c["n_embd"], F=c["n_inner"], L=c["n_layer"], H=c["n_head"],
            K=c["n_head"], eps=c["layer_norm_epsilon"], theta=c["rotary_theta"],
            centred=not c.get("use_RMSNorm", False), gated=c["activation_function"] == "silu",
            biases="all" if c.get("add_bias_linear", True) else "none",
            decay=c["rotary_xpos_scale_base"] if c["rotary_use_xpos"] else None, input_mult=c["input_mult"],
            logit_mult=c["output_mult"] / c["mup_scale_factor"], tied=c.get("tie_word_embeddings", True),
        )  # fmt: skip
    heads = c["n_head"]
    return Shape(
        family="telechat2", V=c["vocab_size"], E=c["hidden_size"], F=c["ffn_hidden_size"], L=c["n_layer"], H=heads,
        K=c.get("num_key_value_heads") or heads, eps=c["layer_norm_epsilon"], theta=c.get("rope_theta", 10000.0),
        biases="outputs", scaled=True, trained=c["training_seqlen"], base=c["base_seqlen"],
    )  # fmt: skip


def read_release(path: Path) -> tuple[Shape, Weights]:
    """Shape and weights of a folder; some copies of TeleChat2 lack the leading "transformer." of their names."""
    shape, weights = read_shape(path), read_weights(path)
    bare = not any(name.startswith("transformer.") for name in weights)
    return (replace(shape, prefix="") if bare else shape), weights


def read_weights(path: Path) -> Weights:
    """All tensors of a release as float64; of sharded ones those that the index places in each file."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return _read_file(path / "model.safetensors")
    found: Weights = {}
    places = json.loads(index.read_text())["weight_map"]
    for name in sorted(set(places.values())):
        held = _read_file(path / name)
        found |= {key: value for key, value in held.items() if places.get(key) == name}
    return found


def _read_file(path: Path) -> Weights:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        data = raw[start + first : start + last]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            array = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        found[name] = array.reshape(entry["shape"]).astype(np.float64)
    return found


# What each planted mistake is; whether it can show in a case, ``shows`` tells.
FAULTS = {
    "kv packing": "[all K; all V] in the place of K and V head by head",
    "attention bias missed": "no bias on the attention's output",
    "ffn bias missed": "no bias on the ffn's output",
    "norm bias missed": "no bias on the final norm",
    "interleaved rotation": "neighbouring channels rotate together, not the two halves",
    "mscale lost": "no attention scale beyond the trained length",
    "wrong alpha": "floor in the place of ceil in the rotary base's growth",
    "label shift": "position t predicts label t",
    "kv heads tiled": "query head j meets kv head j mod K",
    "gate and up swapped": "silu on the wrong half",
    "decay lost": "no xPos scales",
    "input_mult lost": "embeddings are not multiplied",
    "logit_mult lost": "logits are not multiplied",
    "mean of row means": "every row counts alike, however many targets it has",
    "documents see each other": "packed documents are one text to the attention",
}


def shows(fault: str, shape: Shape, ids: np.ndarray, targets: np.ndarray, docs: np.ndarray | None) -> bool:
    """Whether a planted mistake changes this case's arithmetic at all."""
    S = ids.shape[1]
    rotary = shape.D > 2 and S > 1
    longer = shape.scaled and shape.trained < S
    counts = (targets != IGNORED).sum(1)
    return {
        "kv packing": shape.family == "telechat2" and shape.K > 1,
        "attention bias missed": shape.biases != "none",
        "ffn bias missed": shape.biases != "none",
        "norm bias missed": shape.centred,
        "interleaved rotation": rotary,
        "mscale lost": longer,
        "wrong alpha": shape.scaled and rotary and growth(shape, S, "") != growth(shape, S, "wrong alpha"),
        "label shift": True,
        "kv heads tiled": 1 < shape.K < shape.H,
        "gate and up swapped": shape.gated,
        "decay lost": shape.decay is not None and S > 2,
        "input_mult lost": shape.input_mult != 1.0,
        "logit_mult lost": shape.logit_mult != 1.0,
        "mean of row means": len(ids) > 1 and len(set(counts[counts > 0])) > 1,
        "documents see each other": docs is not None and (docs != docs[:, :1]).any(),
    }[fault]


def growth(shape: Shape, S: int, fault: str) -> float:
    """alpha = max(2^ceil(log2(max(S, trained) / base) + 1) - 1, 1)."""
    steps = math.log2(max(S, shape.trained) / shape.base) + 1
    return max(2.0 ** (math.floor(steps) if fault == "wrong alpha" else math.ceil(steps)) - 1.0, 1.0)


Tables = tuple[np.ndarray, np.ndarray]


def tables(shape: Shape, positions: np.ndarray, fault: str, moved: Moved) -> tuple[Tables, Tables]:
    """(cos, sin) of queries and of keys, all scales in them, each [B, S, 1, D/2]."""
    D, S = shape.D, positions.shape[1]
    theta, amplitude = shape.theta, 1.0
    if shape.scaled:
        if D > 2:
            theta *= growth(shape, S, fault) ** (D / (D - 2))
        if shape.trained < S and fault != "mscale lost":
            amplitude = 0.1 * math.log(S / shape.trained) + 1.0
    channel = np.arange(D // 2)
    angle = moved(positions[:, :, None, None] * theta ** (-2.0 * channel / D))
    cos, sin = amplitude * np.cos(angle), amplitude * np.sin(angle)
    if shape.decay is None or fault == "decay lost":
        return (cos, sin), (cos, sin)
    zeta = (2 * channel + 0.4 * D) / (1.4 * D)
    power = zeta ** ((positions[:, :, None, None] - (S + 1) // 2) / shape.decay)
    return (cos * power, sin * power), (cos / power, sin / power)


def turn(x: np.ndarray, table: Tables, fault: str, back: bool = False) -> np.ndarray:
    """x [B, S, H, D] rotated; ``back``: the gradient's way, by the transposed rotation."""
    cos, sin = table
    sin = -sin if back else sin
    half = x.shape[-1] // 2
    if fault == "interleaved rotation":
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Norm:
    """RMSNorm, or with ``centred`` LayerNorm: n = x / sqrt(mean(x^2) + eps), y = n w + b."""

    def __init__(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, eps: float, centred: bool) -> None:
        self.w, self.centred = w, centred
        x = x - x.mean(-1, keepdims=True) if centred else x
        self.r = 1.0 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        self.n = x * self.r
        self.y = self.n * w + (0.0 if b is None else b)

    def back(self, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """dx, dw, db."""
        dn = dy * self.w
        dx = dn - self.n * (dn * self.n).mean(-1, keepdims=True)
        if self.centred:
            dx = dx - dn.mean(-1, keepdims=True)
        return dx * self.r, (dy * self.n).sum((0, 1)), dy.sum((0, 1))


def product(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The gradient [out, in] of a weight from its input [B, S, in] and its output's gradient [B, S, out]."""
    return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


class Attention:
    """Softmax attention, causal and inside documents; q [B, S, H, D], k and v [B, S, K, D] -> y [B, S, H, D]."""

    def __init__(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, docs: np.ndarray | None, fault: str, moved: Moved
    ) -> None:
        self.moved = moved
        H, K, S = q.shape[2], k.shape[2], q.shape[1]
        self.met = np.arange(H) % K if fault == "kv heads tiled" else np.arange(H) // (H // K)
        self.q, self.k, self.v, self.K = q, k[:, :, self.met], v[:, :, self.met], K
        self.scale = 1.0 / math.sqrt(q.shape[-1])
        seen = np.tril(np.ones((S, S), bool))[None, None]
        if docs is not None and fault != "documents see each other":
            seen = seen & (docs[:, None, :, None] == docs[:, None, None, :])
        scores = np.einsum("bqhd,bkhd->bhqk", self.q, self.k) * self.scale
        scores = moved(scores)
        scores = scores - np.where(seen, scores.real, -np.inf).max(-1, keepdims=True)
        e = np.where(seen, np.exp(np.where(seen, scores, 0.0)), 0.0)
        self.p = e / e.sum(-1, keepdims=True)
        self.y = np.einsum("bhqk,bkhd->bqhd", self.p, self.v)

    def back(self, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """dq, dk, dv, the latter summed over the query heads that share them."""
        dp = np.einsum("bqhd,bkhd->bhqk", dy, self.v)
        ds = self.p * (self.moved(dp) - self.moved((dp * self.p).sum(-1, keepdims=True))) * self.scale
        dq = np.einsum("bhqk,bkhd->bqhd", ds, self.k)
        dk, dv = np.einsum("bhqk,bqhd->bkhd", ds, self.q), np.einsum("bhqk,bqhd->bkhd", self.p, dy)
        shared = [np.stack([d[:, :, self.met == j].sum(2) for j in range(self.K)], 2) for d in (dk, dv)]
        return dq, shared[0], shared[1]


_GELU = math.sqrt(2.0 / math.pi)


def activate(gate: np.ndarray | None, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, or gelu(up) in its tanh form."""
    if gate is not None:
        return gate / (1.0 + np.exp(-gate)) * up
    return 0.5 * up * (1.0 + np.tanh(_GELU * (up + 0.044715 * up**3)))


def activate_back(gate: np.ndarray | None, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """d gate, d up."""
    if gate is not None:
        s = 1.0 / (1.0 + np.exp(-gate))
        return dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s
    t = np.tanh(_GELU * (up + 0.044715 * up**3))
    slope = 0.5 * (1.0 + t) + 0.5 * up * (1.0 - t * t) * _GELU * (1.0 + 3 * 0.044715 * up**2)
    return None, dy * slope


@dataclass(frozen=True)
class Names:
    """Released names of a block's tensors."""

    norm1: str
    norm2: str
    out: str
    down: str

    @classmethod
    def of(cls, shape: Shape, i: int) -> Names:
        if shape.family == "teleflm":
            at = f"model.layers.{i}."
            return cls(
                at + "input_layernorm", at + "post_attention_layernorm", at + "self_attn.o_proj", at + "mlp.down_proj"
            )
        at = f"{shape.prefix}h.{i}."
        if shape.family == "flm":
            return cls(at + "ln_1", at + "ln_2", at + "attn.c_proj", at + "mlp.c_proj")
        return cls(
            at + "input_layernorm", at + "post_attention_layernorm", at + "self_attention.dense", at + "mlp.down_proj"
        )


Parts = dict[str, np.ndarray]  # q, k, v, o, gate, up, down as [out, in], and q.b ... where there are biases


def unpack(shape: Shape, W: Mapping[str, np.ndarray], i: int, fault: str) -> Parts:
    """The matrices of block i, each [out, in]."""
    K, D, n = shape.K, shape.D, Names.of(shape, i)
    if shape.family == "teleflm":
        at = f"model.layers.{i}."
        parts = {name: W[f"{at}self_attn.{name}_proj.weight"] for name in "qkvo"}
        return parts | {name: W[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    if shape.family == "telechat2":
        at = f"{shape.prefix}h.{i}."
        kv = W[at + "self_attention.key_value.weight"]
        if fault == "kv packing":
            k, v = kv[: K * D], kv[K * D :]
        else:
            rows = np.arange(2 * K * D).reshape(K, 2, D)
            k, v = kv[rows[:, 0].ravel()], kv[rows[:, 1].ravel()]
        parts = {"q": W[at + "self_attention.query.weight"], "k": k, "v": v, "o": W[n.out + ".weight"]}
        parts |= {"gate": W[at + "mlp.gate_proj.weight"], "up": W[at + "mlp.up_proj.weight"]}
        parts |= {"down": W[n.down + ".weight"], "o.b": W[n.out + ".bias"], "down.b": W[n.down + ".bias"]}
        return parts
    at = f"{shape.prefix}h.{i}."
    parts = dict(zip("qkv", np.split(W[at + "attn.c_attn.weight"].T, 3), strict=True))
    inner = W[at + "mlp.c_fc.weight"].T
    parts |= dict(zip(("gate", "up"), np.split(inner, 2), strict=True)) if shape.gated else {"up": inner}
    parts |= {"o": W[n.out + ".weight"].T, "down": W[n.down + ".weight"].T}
    if shape.biases == "all":
        parts |= dict(zip(("q.b", "k.b", "v.b"), np.split(W[at + "attn.c_attn.bias"], 3), strict=True))
        inner = W[at + "mlp.c_fc.bias"]
        parts |= dict(zip(("gate.b", "up.b"), np.split(inner, 2), strict=True)) if shape.gated else {"up.b": inner}
        parts |= {"o.b": W[n.out + ".bias"], "down.b": W[n.down + ".bias"]}
    return parts


def pack(shape: Shape, d: Parts, i: int) -> Weights:
    """The way back: gradients of a block's matrices under the released names."""
    K, D, n = shape.K, shape.D, Names.of(shape, i)
    if shape.family == "teleflm":
        at = f"model.layers.{i}."
        found = {f"{at}self_attn.{name}_proj.weight": d[name] for name in "qkvo"}
        return found | {f"{at}mlp.{name}_proj.weight": d[name] for name in ("gate", "up", "down")}
    at = f"{shape.prefix}h.{i}."
    if shape.family == "telechat2":
        kv = np.empty((2 * K * D, shape.E))
        rows = np.arange(2 * K * D).reshape(K, 2, D)
        kv[rows[:, 0].ravel()], kv[rows[:, 1].ravel()] = d["k"], d["v"]
        return {
            at + "self_attention.query.weight": d["q"], at + "self_attention.key_value.weight": kv,
            n.out + ".weight": d["o"], n.out + ".bias": d["o.b"], n.down + ".weight": d["down"],
            n.down + ".bias": d["down.b"], at + "mlp.gate_proj.weight": d["gate"], at + "mlp.up_proj.weight": d["up"],
        }  # fmt: skip
    inner = ("gate", "up") if shape.gated else ("up",)
    found = {
        at + "attn.c_attn.weight": np.concatenate([d[name] for name in "qkv"]).T, n.out + ".weight": d["o"].T,
        at + "mlp.c_fc.weight": np.concatenate([d[name] for name in inner]).T, n.down + ".weight": d["down"].T,
    }  # fmt: skip
    if shape.biases == "all":
        found[at + "attn.c_attn.bias"] = np.concatenate([d[f"{name}.b"] for name in "qkv"])
        found[at + "mlp.c_fc.bias"] = np.concatenate([d[f"{name}.b"] for name in inner])
        found |= {n.out + ".bias": d["o.b"], n.down + ".bias": d["down.b"]}
    return found
