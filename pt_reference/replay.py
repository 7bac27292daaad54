"""One operator of the decoder alone, on the numbers of a case: what a training step would make of them.

Norms, linear layers and the embedding are model.py's modules, the others the functions of ops.py that it calls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from telechat_twins.core.parallel.mesh import Group
from telechat_twins.core.parity.locate.case import Case, Replayed, norm_config
from telechat_twins.core.parity.locate.operators import OPERATORS, role
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.replay import define as define
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.losses import TokenLosses
from telechat_twins.pt_reference.model import Dtypes, Embedding, Linear, Norm
from telechat_twins.pt_reference.weights import masked, multiplied, to_numpy, to_tensor

Tensors = dict[str, Tensor]


def replay(case: Case) -> Replayed:
    """Run the case's operator forward, and backward where the case has gradients of its outputs."""
    dtypes = Dtypes(case.precision)
    x = {name: _placed(case, name, array, dtypes) for name, array in case.inputs.items()}
    if case.operator == "adamw":
        return Replayed({name: to_numpy(out) for name, out in _adamw(case, x).items()}, {})
    names = [name for name in OPERATORS[case.operator].derived if name in x]
    leaves = [x[name].requires_grad_() for name in names]
    with torch.set_grad_enabled(bool(case.grads)):
        outputs = _RUNS[case.operator](case, x, dtypes)
        kept = {name: to_numpy(out).copy() for name, out in outputs.items()}  # the backward may write over them
    if not case.grads:
        return Replayed(kept, {})
    ends = [outputs[name] for name in case.grads]
    starts = [
        to_tensor(grad).to(e.device, e.dtype).reshape(e.shape)
        for grad, e in zip(case.grads.values(), ends, strict=True)
    ]
    found = torch.autograd.grad(ends, leaves, starts, allow_unused=True)
    wide = {n: torch.zeros_like(leaf) if g is None else g for n, leaf, g in zip(names, leaves, found, strict=True)}
    return Replayed(kept, {name: to_numpy(gradient) for name, gradient in wide.items()})


def _placed(case: Case, name: str, array: np.ndarray, dtypes: Dtypes) -> Tensor:
    """An input in the dtype in which the operator meets it."""
    tensor = to_tensor(array).to(ops.device())
    return tensor if array.dtype.kind in "iu" else tensor.to(getattr(dtypes, role(case.operator, name)))


def _shapes(case: Case, layer: str) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias", "lora_a", "lora_b")
    return {f"{layer}.{kind}": case.inputs[kind].shape for kind in kinds if kind in case.inputs}


def _filled(module: nn.Module, x: Tensors) -> None:
    """Put the case's tensors in the place of the module's parameters, so that gradients reach them."""
    for kind in ("weight", "bias", "lora_a", "lora_b"):
        if kind in x and getattr(module, kind, None) is not None:
            delattr(module, kind)
            setattr(module, kind, x[kind])


def _embedding(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    module = Embedding(case.inputs["weight"].shape, dtypes)
    _filled(module, x)
    return {"out": multiplied(module(x["ids"].long()), case.setting("multiplier"))}


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
    return {"out": out if "padding" not in x else out + x["padding"].to(out.dtype)}


def _adapted_linear(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    module = Linear("layer", _shapes(case, "layer"), dtypes, {"layer": case.setting("scale")})
    _filled(module, x)
    return {"out": module(x["x"], x.get("dropped"))}


def _rope(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    tables = [x[name] for name in ("cos", "sin", "scale_q", "scale_k") if name in x]
    return dict(zip("qk", ops.rope_qk(x["q"], x["k"], *tables), strict=True))


def _attention(case: Case, x: Tensors, dtypes: Dtypes) -> Tensors:
    S = x["q"].shape[1]
    out = ops.attention(x["q"], x["k"], x["v"], ops.attention_blocks(S, S, case.inputs.get("doc_ids")))
    mask = x.get("mask")
    return {"out": masked(out.flatten(2), None if mask is None else mask.flatten()).reshape(out.shape)}


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
    if "weights" not in x:
        total = ops.cross_entropy(x["logits"].clone(), x["targets"])
    else:
        vocab_size = x["logits"].shape[-1]
        flat, alone = x["logits"].flatten(0, -2).clone(), Group("tp", (0,), 0)
        losses = TokenLosses.apply(flat, x["targets"].flatten(), vocab_size, alone)
        total = (losses * x["weights"].flatten().to(losses.dtype)).sum()
    return {"loss": total / case.setting("terms")}


def _adamw(case: Case, x: Tensors) -> Tensors:
    scalars = {name: case.setting(name) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale")}
    step = AdamWStep(int(case.setting("step")), **scalars)
    kernels.adamw(x["master"], x["grad"], x["m"], x["v"], step)
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
