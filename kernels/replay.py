"""One operator of the decoder on a case's numbers by its definition (kernels.reference), forward and backward.

float64 is the judge of a replayed operator; float32 shows what rounding costs the definition itself on these numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import causal_ranges
from telechat_twins.core.parity.locate.case import Arrays, Case, Replayed, as_floats
from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep

Definition = Callable[[Case, Arrays, Arrays, type], tuple[Arrays, Arrays]]


def define(case: Case, dtype: type = np.float64) -> Replayed:
    """Outputs, and gradients where the case has some, of the definition computed in ``dtype`` (float32, float64)."""
    inputs, grads = as_floats(case.inputs, dtype), as_floats(case.grads, dtype)
    outputs, found = _DEFINITIONS[case.operator](case, inputs, grads, dtype)
    return Replayed(outputs, found if case.grads else {})


def _embedding(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    factor = dtype(case.setting("multiplier"))
    out = reference.embedding(x["weight"], x["ids"]) * factor
    if not grads:
        return {"out": out}, {}
    return {"out": out}, {
        "weight": reference.embedding_backward(grads["out"] * factor, x["ids"], len(x["weight"])),
    }


def _rms_norm(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    eps, gain, root = _gain(case, x["weight"], dtype)
    mask = x.get("mask")
    out = reference.rms_norm(x["x"], gain, eps, mask)
    if not grads:
        return {"out": out}, {}
    dx, dgain = reference.rms_norm_backward(grads["out"], x["x"], gain, eps, mask)
    return {"out": out}, {"x": dx, "weight": dgain * root}


def _add_rms_norm(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    eps, gain, root = _gain(case, x["weight"], dtype)
    mask = x.get("mask")
    out, stream = reference.add_rms_norm(x["x"], x["residual"], gain, eps, mask)
    outputs = {"out": out, "stream": stream}
    if not grads:
        return outputs, {}
    first, second = (grads.get(name, np.zeros_like(out)) for name in ("out", "stream"))
    dstream, dgain = reference.add_rms_norm_backward(first, second, stream, gain, eps, mask)
    return outputs, {"x": dstream, "residual": dstream, "weight": dgain * root}


def _gain(case: Case, weight: Array, dtype: type) -> tuple[float, Array, float]:
    """(eps, gain, sqrt(share)) of a norm that divides by share * E: x / sqrt(sum / (share * E) + eps)."""
    share = case.setting("share")
    root = dtype(np.sqrt(share))
    return dtype(case.setting("eps") * share), weight * root, root


def _layer_norm(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    counted = case.settings.get("counted")
    more = (dtype(case.setting("eps")), x.get("mask"), None if counted is None else int(counted))
    outputs = {"out": reference.layer_norm(x["x"], x["weight"], x["bias"], *more)}
    if not grads:
        return outputs, {}
    found = reference.layer_norm_backward(grads["out"], x["x"], x["weight"], *more)
    return outputs, dict(zip(("x", "weight", "bias"), found, strict=True))


def _linear(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    factor = dtype(case.setting("multiplier"))
    out = reference.linear(x["x"], x["weight"], x.get("bias")) * factor + x.get("padding", dtype(0.0))
    if not grads:
        return {"out": out}, {}
    dx, dweight, dbias = reference.linear_backward(grads["out"] * factor, x["x"], x["weight"])
    return {"out": out}, {"x": dx, "weight": dweight} | ({"bias": dbias} if "bias" in x else {})


def _adapted_linear(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    """W x + b + scale B A d with d = x, or x after dropout: dB = scale dy^T (A d), dA = scale (dy B)^T d."""
    scale, read = dtype(case.setting("scale")), x.get("dropped", x["x"])
    low = reference.linear(read, x["lora_a"])
    out = reference.linear(x["x"], x["weight"], x.get("bias")) + scale * reference.linear(low, x["lora_b"])
    if not grads:
        return {"out": out}, {}
    dlow, db, _ = reference.linear_backward(grads["out"] * scale, low, x["lora_b"])
    dread, da, _ = reference.linear_backward(dlow, read, x["lora_a"])
    dx = grads["out"] @ x["weight"]
    if "dropped" in x:
        return {"out": out}, {"x": dx, "dropped": dread, "lora_a": da, "lora_b": db}
    return {"out": out}, {"x": dx + dread, "lora_a": da, "lora_b": db}


def _rope(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    tables = x["cos"], x["sin"], x.get("scale_q"), x.get("scale_k")
    q, k = reference.rope_qk(x["q"], x["k"], *tables)
    if not grads:
        return {"q": q, "k": k}, {}
    first, second = (grads.get(name, np.zeros_like(x[name])) for name in "qk")
    return {"q": q, "k": k}, dict(zip("qk", reference.rope_qk_backward(first, second, *tables), strict=True))


def _attention(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    q, k, v = (x[name] for name in "qkv")
    mask, S = x.get("mask", dtype(1.0)), q.shape[1]
    visible = reference.visible_keys(causal_ranges(S, S, x.get("doc_ids")).ranges, S)
    out, log_sum_exp = reference.attention(q, k, v, visible)
    if not grads:
        return {"out": out * mask}, {}
    found = reference.attention_backward(grads["out"] * mask, q, k, v, visible, out, log_sum_exp)
    return {"out": out * mask}, dict(zip("qkv", found, strict=True))


def _swiglu(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    mask = x.get("mask", dtype(1.0))
    out = reference.swiglu(x["gate"], x["up"]) * mask
    if not grads:
        return {"out": out}, {}
    found = reference.swiglu_backward(grads["out"] * mask, x["gate"], x["up"])
    return {"out": out}, dict(zip(("gate", "up"), found, strict=True))


def _gelu(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    mask = x.get("mask", dtype(1.0))
    out = reference.gelu(x["x"]) * mask
    return {"out": out}, {"x": reference.gelu_backward(grads["out"] * mask, x["x"])} if grads else {}


def _add(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    """stream + branch; of a new block that has grown as far as c: c (stream + branch) + (1 - c) before."""
    if "before" not in x:
        return {"out": x["stream"] + x["branch"]}, {"stream": grads["out"], "branch": grads["out"]} if grads else {}
    c = dtype(case.setting("grown"))
    out = c * (x["stream"] + x["branch"]) + (dtype(1.0) - c) * x["before"]
    if not grads:
        return {"out": out}, {}
    dsum = c * grads["out"]
    return {"out": out}, {"stream": dsum, "branch": dsum, "before": (dtype(1.0) - c) * grads["out"]}


def _cross_entropy(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    """Sum of weight * token loss over the number of terms."""
    shape, terms = x["logits"].shape, dtype(case.setting("terms"))
    logits, targets = x["logits"].reshape(-1, shape[-1]), x["targets"].reshape(-1)
    weights = x["weights"].reshape(-1) if "weights" in x else np.ones(len(logits), dtype)
    weights = np.where(targets == IGNORE, dtype(0.0), weights)
    log_sum_exp, picked = reference.cross_entropy_shard(logits, targets, 0, shape[-1])
    outputs = {"loss": np.asarray(((log_sum_exp - picked) * weights).sum() / terms)}
    if not grads:
        return outputs, {}
    unit = reference.cross_entropy_backward(logits, targets) * weights[:, None] * (grads["loss"] / terms)
    return outputs, {"logits": unit.reshape(shape)}


def _adamw(case: Case, x: Arrays, grads: Arrays, dtype: type) -> tuple[Arrays, Arrays]:
    scalars = {name: case.setting(name) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale")}
    step = AdamWStep(int(case.setting("step")), **scalars)
    found = reference.adamw(x["master"], x["grad"], x["m"], x["v"], step)
    return dict(zip(("master", "m", "v"), found, strict=True)), {}


_DEFINITIONS: dict[str, Definition] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add_rms_norm": _add_rms_norm,
    "linear": _linear,
    "adapted_linear": _adapted_linear,
    "rope": _rope,
    "attention": _attention,
    "swiglu": _swiglu,
    "gelu": _gelu,
    "add": _add,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
}
