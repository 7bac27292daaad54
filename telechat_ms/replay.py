"""One operator of the decoder alone, on the numbers of a case: what a training step would make of them.

Norms, linear layers and the embedding are model.py's modules, the others the functions of ops.py that it calls.
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from telechat_twins.core.parallel.mesh import Group
from telechat_twins.core.parity.locate.case import Case, Replayed, norm_config
from telechat_twins.core.parity.locate.operators import OPERATORS, role
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.mindspore import composite as composite
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.replay import define as define
from telechat_twins.telechat_ms import ops
from telechat_twins.telechat_ms.losses import TokenLosses
from telechat_twins.telechat_ms.model import Dtypes, Embedding, Linear, Norm
from telechat_twins.telechat_ms.weights import masked, multiplied, to_numpy, to_tensor

Tensors = dict[str, Tensor]


def replay(case: Case) -> Replayed:
    """Run the case's operator forward, and backward where the case has gradients of its outputs."""
    dtypes = Dtypes(case.precision)
    x = {name: _placed(case, name, array, dtypes) for name, array in case.inputs.items()}
    if case.operator == "adamw":
        return Replayed({name: to_numpy(out) for name, out in _adamw(case, x).items()}, {})
    names = [name for name in OPERATORS[case.operator].derived if name in x]
    kept: dict[str, np.ndarray] = {}

    def run() -> Tensor:
        """The sum of outputs times their gradients, in float32 or wider: the CPU has no sum of 16-bit numbers."""
        outputs = _RUNS[case.operator](case, x, dtypes)
        kept.update({name: to_numpy(out) for name, out in outputs.items()})  # the backward may write over them
        wide = ms.float64 if dtypes.stat == ms.float64 else ms.float32
        parts = [
            (outputs[name].astype(wide) * to_tensor(grad).astype(wide).reshape(outputs[name].shape)).sum()
            for name, grad in case.grads.items()
        ]
        return sum(parts[1:], parts[0]) if parts else Tensor(0.0, wide)

    if not case.grads:
        run()
        return Replayed(kept, {})
    _, found = ms.value_and_grad(run, None, [x[name] for name in names])()
    return Replayed(kept, {name: to_numpy(gradient) for name, gradient in zip(names, found, strict=True)})


def _placed(case: Case, name: str, array: np.ndarray, dtypes: Dtypes) -> Tensor:
    """An input in the dtype in which the operator meets it; a parameter where it has a gradient, or is updated."""
    if array.dtype.kind in "iu":
        return to_tensor(array)
    tensor = to_tensor(array).astype(getattr(dtypes, role(case.operator, name)))
    changes = case.operator == "adamw" or name in OPERATORS[case.operator].derived
    return Parameter(tensor, name=name) if changes else tensor


def _shapes(case: Case, layer: str) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias", "lora_a", "lora_b")
    return {f"{layer}.{kind}": case.inputs[kind].shape for kind in kinds if kind in case.inputs}


def _filled(module: nn.Cell, x: Tensors) -> None:
    """Put the case's tensors in the place of the module's parameters, so that gradients reach them."""
    for kind in ("weight", "bias", "lora_a", "lora_b"):
        if kind in x and getattr(module, kind, None) is not None:
            delattr(module, kind)
            setattr(module, kind, x[kind])


def _embedding(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    module = Embedding(case.inputs["weight"].shape, dtypes)
    _filled(module, x)
    return {"out": multiplied(module(x["ids"]), case.setting("multiplier"))}


def _norm(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    module = Norm("norm", _shapes(case, "norm"), norm_config(case), dtypes)
    _filled(module, x)
    module.mask = x.get("mask")
    if "residual" in x:
        out, stream = module.after_sum(x["x"], x["residual"])
        return {"out": out, "stream": stream}
    return {"out": module(x["x"])}


def _linear(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    module = Linear("layer", _shapes(case, "layer"), dtypes)
    _filled(module, x)
    out = multiplied(module(x["x"]), case.setting("multiplier"))
    return {"out": out if "padding" not in x else out.astype(dtypes.stat) + x["padding"]}


def _adapted_linear(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    module = Linear("layer", _shapes(case, "layer"), dtypes, {"layer": case.setting("scale")})
    _filled(module, x)
    return {"out": module(x["x"], x.get("dropped"))}


def _rope(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    tables = [x[name] for name in ("cos", "sin", "scale_q", "scale_k") if name in x]
    return dict(zip("qk", ops.rope_qk(x["q"], x["k"], *tables), strict=True))


def _attention(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    B, S = x["q"].shape[:2]
    out = ops.attention(x["q"], x["k"], x["v"], ops.attention_blocks(S, S, case.inputs.get("doc_ids")))
    mask = x.get("mask")
    return {"out": masked(out.reshape(B, S, -1), None if mask is None else mask.reshape(-1)).reshape(out.shape)}


def _swiglu(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    return {"out": masked(ops.swiglu(x["gate"], x["up"], dtypes.stat), x.get("mask"))}


def _gelu(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    return {"out": masked(ops.gelu(x["x"]), x.get("mask"))}


def _add(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    out = ops.add(x["stream"], x["branch"])
    if "before" not in x:
        return {"out": out}
    c = case.setting("grown")
    return {"out": multiplied(out, c) + multiplied(x["before"], 1.0 - c)}


def _cross_entropy(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    logits = x["logits"].astype(dtypes.stat)  # as the decoder leaves them
    if "weights" not in x:
        total = ops.cross_entropy(logits, x["targets"])
    else:
        flat, alone = logits.reshape(-1, logits.shape[-1]), Group("tp", (0,), 0)
        losses = TokenLosses.apply(flat, x["targets"].reshape(-1), logits.shape[-1], alone)
        total = ops.total(losses * x["weights"].reshape(-1).astype(losses.dtype))
    return {"loss": total / Tensor(case.setting("terms"), total.dtype)}


def _adamw(case: Case, x: Tensors) -> Tensors:
    scalars = {name: case.setting(name) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale")}
    step = AdamWStep(int(case.setting("step")), **scalars)
    fused = kernels.serving("adamw", x["master"].dtype)
    (fused or composite).adamw(x["master"], x["grad"], x["m"], x["v"], step)
    return {name: x[name] for name in ("master", "m", "v")}


_RUNS: dict[str, Callable[[Case, Tensors, Dtypes], Tensors]] = {
    "embedding": _embedding,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "add_rms_norm": _norm,
    "linear": _linear,
    "adapted_linear": _adapted_linear,
    "rope": _rope,
    "attention": _attention,
    "swiglu": _swiglu,
    "gelu": _gelu,
    "add": _add,
    "cross_entropy": _cross_entropy,
}
