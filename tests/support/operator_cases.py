"""Random cases of every operator that locate replays."""

from __future__ import annotations

import numpy as np

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.parity.locate.case import Arrays, Case, Settings
from telechat_twins.core.parity.locate.operators import OPERATORS

B, S, E, H, K, D, F, V, R = 2, 9, 12, 4, 2, 6, 10, 17, 3


def random_case(operator: str, seed: int = 0, precision: str = "fp32", optional: bool = True) -> Case:
    """Awkward shapes, every optional input where ``optional``, gradients of all outputs."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    inputs, outputs, settings = _made(operator, normal, rng)
    if not optional:
        inputs = {name: x for name, x in inputs.items() if name not in OPERATORS[operator].optional}
    grads = {} if operator == "adamw" else {name: normal(*shape) for name, shape in outputs.items()}
    return Case(operator, inputs, grads, precision, settings, operator)


def _made(operator, normal, rng) -> tuple[Arrays, dict[str, tuple[int, ...]], Settings]:
    mask = np.array([1.0, 1.0, 0.3, 1.0, 0.0, 0.3] * 2, np.float32)
    angle = rng.uniform(0, 6, (1, S, 1, D // 2)).astype(np.float32)
    ids = rng.integers(0, V, (B, S)).astype(np.int32)
    stream = (B, S, E)
    gain = rng.uniform(0.6, 1.4, E).astype(np.float32)
    if operator == "embedding":
        return {"weight": normal(V, E), "ids": ids}, {"out": stream}, {"multiplier": 2.5}
    if operator == "rms_norm":
        return {"x": normal(*stream), "weight": gain, "mask": mask}, {"out": stream}, {"eps": 1e-5, "share": 0.75}
    if operator == "add_rms_norm":
        inputs = {"x": normal(*stream), "residual": normal(*stream), "weight": gain, "mask": mask}
        return inputs, {"out": stream, "stream": stream}, {"eps": 1e-5, "share": 1.0}
    if operator == "layer_norm":
        inputs = {"x": normal(*stream), "weight": gain, "bias": normal(E), "mask": mask}
        return inputs, {"out": stream}, {"eps": 1e-5, "counted": None}
    if operator == "linear":
        inputs = {"x": normal(*stream), "weight": normal(V, E), "bias": normal(V)}
        inputs["padding"] = np.where(np.arange(V) < V - 2, 0.0, -1e4).astype(np.float32)
        return inputs, {"out": (B, S, V)}, {"multiplier": 0.5}
    if operator == "adapted_linear":
        inputs = {"x": normal(*stream), "weight": normal(F, E), "bias": normal(F)}
        inputs |= {"lora_a": normal(R, E), "lora_b": normal(F, R)}
        inputs["dropped"] = np.where(rng.random(stream) < 0.8, inputs["x"] / 0.8, 0.0).astype(np.float32)
        return inputs, {"out": (B, S, F)}, {"scale": 1.5}
    if operator == "rope":
        inputs = {"q": normal(B, S, H, D), "k": normal(B, S, K, D), "cos": np.cos(angle), "sin": np.sin(angle)}
        inputs |= {"scale_q": np.exp(0.1 * angle), "scale_k": np.exp(-0.1 * angle)}
        return inputs, {"q": (B, S, H, D), "k": (B, S, K, D)}, {}
    if operator == "attention":
        inputs = {"q": normal(B, S, H, D), "k": normal(B, S, K, D), "v": normal(B, S, K, D)}
        inputs["doc_ids"] = np.sort(rng.integers(0, 3, (B, S)), 1).astype(np.int32)
        inputs["mask"] = rng.uniform(0, 1, (H, D)).astype(np.float32)
        return inputs, {"out": (B, S, H, D)}, {}
    if operator == "swiglu":
        return {"gate": normal(B, S, F), "up": normal(B, S, F), "mask": mask[:F]}, {"out": (B, S, F)}, {}
    if operator == "gelu":
        return {"x": normal(B, S, F), "mask": mask[:F]}, {"out": (B, S, F)}, {}
    if operator == "add":
        return {n: normal(*stream) for n in ("stream", "branch", "before")}, {"out": stream}, {"grown": 0.25}
    if operator == "cross_entropy":
        targets = np.where(rng.random((B, S)) < 0.3, IGNORE, ids).astype(np.int32)
        inputs = {"logits": 3 * normal(B, S, V), "targets": targets}
        return inputs | {"weights": rng.uniform(0, 2, (B, S)).astype(np.float32)}, {"loss": ()}, {"terms": 12.0}
    inputs = {name: normal(40) for name in ("master", "grad", "m")} | {"v": normal(40) ** 2}
    scalars = {"step": 3, "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
    return inputs, {}, scalars
