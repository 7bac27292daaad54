"""Argument checks of the PyTorch operators; an error names the argument, what it got and what it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from telechat_twins.core.model.visibility import KeyRanges


def same_shape(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Raises ValueError unless ``x`` has the shape and device of ``y``."""
    if x.shape != y.shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, needs that of {other}, {tuple(y.shape)}")
    same_device(name, x, other, y)


def same_dtype(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name}: got {x.dtype}, needs that of {other}, {y.dtype}")


def same_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, needs one on that of {other}, {y.device}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, needs (out, {x.shape[-1] if x.ndim else 'in'})")
    same_dtype("weight", weight, "x", x)
    same_device("weight", weight, "x", x)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, needs ({weight.shape[0]},)")
        same_dtype("bias", bias, "x", x)
        same_device("bias", bias, "x", x)


def embedding(table: Tensor, ids: Tensor) -> None:
    if table.ndim != 2:
        raise ValueError(f"table: got shape {tuple(table.shape)}, needs (V, E)")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: got {ids.dtype}, needs int32 or int64")
    same_device("ids", ids, "table", table)


def norm(x: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, needs (..., E)")
    for name, vector in (("weight", weight), ("mask", mask)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, needs ({x.shape[-1]},)")
        same_device(name, vector, "x", x)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None, scale_k: Tensor | None) -> None:
    if q.ndim != 4 or q.shape[-1] % 2:
        raise ValueError(f"q: got shape {tuple(q.shape)}, needs (B, S, H, D) with an even D")
    B, S, _, D = q.shape
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (B, S, D):
        raise ValueError(f"k: got shape {tuple(k.shape)}, needs ({B}, {S}, K, {D})")
    same_device("k", k, "q", q)
    for name, table in (("cos", cos), ("sin", sin), ("scale_q", scale_q), ("scale_k", scale_k)):
        if table is None:
            continue
        if table.ndim != 4 or table.shape[0] not in (1, B) or table.shape[1:] != (S, 1, D // 2):
            raise ValueError(f"{name}: got shape {tuple(table.shape)}, needs (1 or {B}, {S}, 1, {D // 2})")
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: got {table.dtype}, needs float32 (float64 for float64 inputs)")
        same_device(name, table, "q", q)


def attention(q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"q: got shape {tuple(q.shape)}, needs (B, S, H, D)")
    B, S, H, D = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[3]) != (B, D):
        raise ValueError(f"k: got shape {tuple(k.shape)}, needs ({B}, T, K, {D})")
    if H % k.shape[2]:
        raise ValueError(f"k: got {k.shape[2]} heads, needs a number that divides the {H} of q")
    same_shape("v", v, "k", k)
    same_dtype("k", k, "q", q)
    same_dtype("v", v, "q", q)
    same_device("k", k, "q", q)
    if key_ranges is None:
        return
    shape = tuple(key_ranges.ranges.shape)
    if len(shape) != 3 or shape[0] not in (1, B) or shape[1:] != (S, 2):
        raise ValueError(f"key_ranges: got shape {shape}, needs (1 or {B}, {S}, 2)")
    if key_ranges.num_keys != k.shape[1]:
        raise ValueError(f"key_ranges: got ranges over {key_ranges.num_keys} keys, needs the {k.shape[1]} of k")


def cross_entropy(logits: Tensor, targets: Tensor, real: int) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, needs (N, C)")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, needs ({logits.shape[0]},)")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets: got {targets.dtype}, needs int32 or int64")
    if not 0 <= real <= logits.shape[1]:
        raise ValueError(f"real: got {real}, needs 0 to the {logits.shape[1]} columns of logits")
    same_device("targets", targets, "logits", logits)


def adamw(master: Tensor, grad: Tensor, m: Tensor, v: Tensor, copy: Tensor | None) -> None:
    if master.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"master: got {master.dtype}, needs float32 or float64")
    for name, vector in (("grad", grad), ("m", m), ("v", v)):
        same_shape(name, vector, "master", master)
        same_dtype(name, vector, "master", master)
    if copy is not None:
        same_shape("copy", copy, "master", master)
