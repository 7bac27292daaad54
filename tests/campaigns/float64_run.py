"""Forward and backward of the campaign's own decoder (tests/campaigns/float64_decoder.py) over one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.campaigns.float64_decoder import (
    IGNORED,
    Attention,
    Moved,
    Names,
    Norm,
    Parts,
    Shape,
    Tables,
    Weights,
    activate,
    activate_back,
    pack,
    product,
    tables,
    turn,
    unpack,
)

Criterion = Callable[[np.ndarray, np.ndarray], tuple[Any, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Inputs:
    """ids, labels [B, S] as Hugging Face has them (same positions, IGNORED to skip); counted [B, S] bool, or None: the
    labels that count; docs [B, S] int or None: attention stays inside one number, and positions restart with it."""

    ids: np.ndarray
    labels: np.ndarray
    counted: np.ndarray | None = None
    docs: np.ndarray | None = None

    def targets(self, fault: str = "") -> np.ndarray:
        """[B, S]: what each position predicts, the label of the next one of its document."""
        labels = self.labels if self.counted is None else np.where(self.counted, self.labels, IGNORED)
        if fault == "label shift":
            return labels
        found = np.full_like(labels, IGNORED)
        found[:, :-1] = labels[:, 1:]
        if self.docs is not None:
            found[:, :-1][self.docs[:, 1:] != self.docs[:, :-1]] = IGNORED
        return found

    def positions(self) -> np.ndarray:
        """[B, S]: places in the row, or in the document."""
        places = np.tile(np.arange(self.ids.shape[1]), (len(self.ids), 1))
        if self.docs is None:
            return places
        starts = np.zeros_like(places)
        new = self.docs[:, 1:] != self.docs[:, :-1]
        starts[:, 1:] = np.maximum.accumulate(np.where(new, places[:, 1:], 0), 1)
        return places - starts


class Block:
    """One pre-norm block; ``y`` the stream after it."""

    def __init__(
        self,
        shape: Shape,
        W: Mapping[str, np.ndarray],
        i: int,
        x: np.ndarray,
        rope: Any,
        docs: Any,
        fault: str,
        moved: Moved,
    ) -> None:
        self.shape, self.i, self.rope, self.fault = shape, i, rope, fault
        self.names, self.w = Names.of(shape, i), unpack(shape, W, i, fault)
        q_table, k_table = rope
        self.norm1 = self._norm(W, self.names.norm1, x)
        heads = [self._heads(self._linear(self.norm1.y, name)) for name in "qkv"]
        q, k = turn(heads[0], q_table, fault), turn(heads[1], k_table, fault)
        self.attention = Attention(q, k, heads[2], docs, fault, moved)
        self.mixed = self.attention.y.reshape(x.shape)
        x = x + self._linear(self.mixed, "o", missed=fault == "attention bias missed")
        self.norm2 = self._norm(W, self.names.norm2, x)
        self.gate = self._linear(self.norm2.y, "gate") if shape.gated else None
        self.up = self._linear(self.norm2.y, "up")
        if fault == "gate and up swapped":
            self.gate, self.up = self.up, self.gate
        self.inner = activate(self.gate, self.up)
        self.y = x + self._linear(self.inner, "down", missed=fault == "ffn bias missed")

    def back(self, dy: np.ndarray, found: Weights) -> np.ndarray:
        """The gradient of the stream before; those of the block's tensors go to ``found``."""
        d: Parts = {}
        dx = dy
        d_inner = self._linear_back("down", self.inner, dy, d)
        d_gate, d_up = activate_back(self.gate, self.up, d_inner)
        d_normed = self._linear_back("up", self.norm2.y, d_up, d)
        if d_gate is not None:
            d_normed = d_normed + self._linear_back("gate", self.norm2.y, d_gate, d)
        dx = dx + self._norm_back(self.norm2, self.names.norm2, d_normed, found)
        d_mixed = self._linear_back("o", self.mixed, dx, d)
        dq, dk, dv = self.attention.back(d_mixed.reshape(self.attention.y.shape))
        q_table, k_table = self.rope
        flat = {
            "q": turn(dq, q_table, "", back=True),
            "k": turn(dk, k_table, "", back=True),
            "v": dv,
        }
        d_normed = np.zeros_like(self.norm1.y)
        for name, gradient in flat.items():
            d_normed += self._linear_back(name, self.norm1.y, gradient.reshape(*gradient.shape[:2], -1), d)
        found |= pack(self.shape, d, self.i)
        return dx + self._norm_back(self.norm1, self.names.norm1, d_normed, found)

    def _heads(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, self.shape.D)

    def _linear(self, x: np.ndarray, name: str, missed: bool = False) -> np.ndarray:
        bias = self.w.get(f"{name}.b")
        y = x @ self.w[name].T
        return y if bias is None or missed else y + bias

    def _linear_back(self, name: str, x: np.ndarray, dy: np.ndarray, d: Parts) -> np.ndarray:
        d[name] = product(x, dy)
        if f"{name}.b" in self.w:
            d[f"{name}.b"] = dy.sum((0, 1))
        return dy @ self.w[name]

    def _norm(self, W: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> Norm:
        bias = W[f"{name}.bias"] if self.shape.centred else None
        return Norm(x, W[f"{name}.weight"], bias, self.shape.eps, self.shape.centred)

    def _norm_back(self, norm: Norm, name: str, dy: np.ndarray, found: Weights) -> np.ndarray:
        dx, found[f"{name}.weight"], db = norm.back(dy)
        if self.shape.centred:
            found[f"{name}.bias"] = db
        return dx


def run(
    shape: Shape,
    W: Mapping[str, np.ndarray],
    inputs: Inputs,
    fault: str = "",
    nudge: tuple[int, float] | None = None,
    grads: bool = True,
    criterion: Criterion | None = None,
) -> dict[str, Any]:
    """``logits`` [B, S, V], ``loss``, and with ``grads`` the gradient of every released tensor by name.

    ``nudge`` (seed, u): weights, rotary angles, scores, their gradients and the stream between blocks times
    1 + u N(0, 1), as far as a rounding to unit roundoff u would move each of them. Without gradients the arithmetic
    may be complex. ``criterion(logits, targets)``: another loss and its gradient by the logits.
    """
    random, u = (None, 0.0) if nudge is None else (np.random.default_rng(nudge[0]), nudge[1])

    def moved(x: np.ndarray) -> np.ndarray:
        return x if random is None else x * (1.0 + u * random.standard_normal(x.shape))

    W = {name: moved(array) for name, array in W.items()}
    embed, head, last = _ends(shape)
    factor = 1.0 if fault == "input_mult lost" else shape.input_mult
    rope: tuple[Tables, Tables] = tables(shape, inputs.positions(), fault, moved)
    x = W[embed][inputs.ids] * factor
    blocks = []
    for i in range(shape.L):
        blocks.append(Block(shape, W, i, x, rope, inputs.docs, fault, moved))
        x = moved(blocks[-1].y)
    bias = W[f"{last}.bias"] if shape.centred and fault != "norm bias missed" else None
    norm = Norm(x, W[f"{last}.weight"], bias, shape.eps, shape.centred)
    multiplier = 1.0 if fault == "logit_mult lost" else shape.logit_mult
    logits = norm.y @ W[head].T * multiplier
    targets = inputs.targets(fault)
    loss, d_logits = cross_entropy(logits, targets, fault) if criterion is None else criterion(logits, targets)
    result: dict[str, Any] = {"logits": logits, "loss": loss}
    if not grads:
        return result
    found: Weights = {}
    d_logits = d_logits * multiplier
    found[head] = product(norm.y, d_logits)
    dx, found[f"{last}.weight"], db = norm.back(d_logits @ W[head])
    if shape.centred:
        found[f"{last}.bias"] = db
    for block in reversed(blocks):
        dx = block.back(dx, found)
    table = np.zeros_like(W[embed])
    np.add.at(table, inputs.ids, dx * factor)
    found[embed] = found[embed] + table if head == embed else table
    return result | {"grads": found}


def cross_entropy(logits: np.ndarray, targets: np.ndarray, fault: str = "") -> tuple[Any, np.ndarray]:
    """Mean over counted targets of -log softmax(logits)[target], and its gradient by the logits."""
    counted = targets != IGNORED
    share = counted / max(counted.sum(), 1)
    if fault == "mean of row means":
        per_row = counted.sum(1, keepdims=True)
        share = counted / np.maximum(per_row, 1) / max((per_row > 0).sum(), 1)
    shifted = logits - logits.real.max(-1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(-1, keepdims=True)
    wanted = np.where(counted, targets, 0)[..., None]
    picked = np.take_along_axis(shifted, wanted, -1)[..., 0]
    loss = ((np.log(total[..., 0]) - picked) * share).sum()
    gradient = e / total * share[..., None]
    np.put_along_axis(gradient, wanted, np.take_along_axis(gradient, wanted, -1) - share[..., None], -1)
    return loss, gradient


def _ends(shape: Shape) -> tuple[str, str, str]:
    """Released names of embedding, head and final norm."""
    if shape.family == "teleflm":
        return "model.embed_tokens.weight", "lm_head.weight", "model.norm"
    embed = shape.prefix + ("wte" if shape.family == "flm" else "word_embeddings") + ".weight"
    return embed, embed if shape.tied else "lm_head.weight", shape.prefix + "ln_f"
