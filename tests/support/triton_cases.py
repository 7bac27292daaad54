"""Every operator of kernels.triton against its definition in float64, as functions from a case to relative errors.

Used under Triton's interpreter (tests/unit/kernels/test_triton_interpreted.py) and on a GPU
(tests/device/test_triton_gpu.py).
The definition gets the inputs as rounded to the case's dtype, so an error is the operator's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import KeyRanges, causal_ranges
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep

EPS = 1e-5
# Relative Frobenius. float32: sums of at most some hundred terms, each rounded to 2^-24; ten times what is measured.
# float16 and bfloat16: a result is computed in float32 and rounded once, at most 2^-11 and 2^-8 each; the norm over
# many lies below that.
LIMITS = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Attention also rounds probabilities and their gradients to the inputs' dtype before multiplying.
ATTENTION_LIMITS = {torch.float32: 4e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


class Case(NamedTuple):
    """``spaced``: every input is a view with gaps between its elements' rows."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    spaced: bool = False


def draw(case: Case, rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    x = torch.tensor(scale * rng.normal(size=shape), dtype=case.dtype, device=case.device)
    if not case.spaced:
        return x
    wide = torch.full((*shape[:-1], 2 * shape[-1] + 3), 1e30, dtype=torch.float32, device=case.device).to(x.dtype)
    wide[..., 2 : 2 + shape[-1]] = x
    return wide[..., 2 : 2 + shape[-1]]


def exact(x: Tensor | None) -> Any:
    return None if x is None else x.detach().cpu().to(torch.float64).numpy()


def errors(got: dict[str, Tensor], truth: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative error of each result; of a result that ought to be 0 its size; infinite for a NaN where none is due."""
    found = {}
    for name, expected in truth.items():
        actual = exact(got[name])
        infinite = np.isneginf(expected)
        if not np.array_equal(infinite, np.isneginf(actual)) or not np.isfinite(actual[~infinite]).all():
            found[name] = np.inf
        elif not np.any(expected[~infinite]):
            found[name] = float(np.linalg.norm(actual[~infinite]))
        else:
            found[name] = relative_frobenius(np.where(infinite, 0, actual), np.where(infinite, 0, expected))
    return found


def growth(case: Case, rng: np.random.Generator, E: int) -> Tensor:
    """A mask with channels that are there, that are not, and that are half grown."""
    mask = np.clip(rng.uniform(-0.5, 1.5, size=E), 0, 1)
    mask[0] = 1.0
    return torch.tensor(mask, dtype=torch.float32, device=case.device)


def rms_norm(
    ops: Any, case: Case, shape: tuple[int, ...], masked: bool = False, scale: float = 1.0
) -> dict[str, float]:
    rng = np.random.default_rng(case.seed)
    x, grad = draw(case, rng, *shape, scale=scale), draw(case, rng, *shape)
    weight = draw(case, rng, shape[-1])
    mask = growth(case, rng, shape[-1]) if masked else None
    out, rstd = ops.rms_norm(x, weight, EPS, None, mask)
    dx, dweight = ops.rms_norm_backward(grad, x, weight, rstd, mask)
    truth = reference.rms_norm_backward(exact(grad), exact(x), exact(weight), EPS, exact(mask))
    return errors(
        {"out": out, "dx": dx, "dweight": dweight},
        {"out": reference.rms_norm(exact(x), exact(weight), EPS, exact(mask)), "dx": truth[0], "dweight": truth[1]},
    )


def add_rms_norm(ops: Any, case: Case, shape: tuple[int, ...], masked: bool = False) -> dict[str, float]:
    rng = np.random.default_rng(case.seed)
    x, residual, grad, grad_stream = (draw(case, rng, *shape) for _ in range(4))
    weight = draw(case, rng, shape[-1])
    mask = growth(case, rng, shape[-1]) if masked else None
    out, stream, rstd = ops.add_rms_norm(x, residual, weight, EPS, None, mask)
    dstream, dweight = ops.add_rms_norm_backward(grad, grad_stream, stream, weight, rstd, mask)
    # The rounded stream is what is normed; it is judged by itself and then given to the definition.
    normed = reference.rms_norm(exact(stream), exact(weight), EPS, exact(mask))
    truth = reference.add_rms_norm_backward(
        exact(grad), exact(grad_stream), exact(stream), exact(weight), EPS, exact(mask)
    )
    return errors(
        {"out": out, "stream": stream, "dstream": dstream, "dweight": dweight},
        {"out": normed, "stream": exact(x) + exact(residual), "dstream": truth[0], "dweight": truth[1]},
    )


def layer_norm(ops: Any, case: Case, shape: tuple[int, ...], masked: bool = False) -> dict[str, float]:
    rng = np.random.default_rng(case.seed)
    x, grad = draw(case, rng, *shape), draw(case, rng, *shape)
    weight, bias = draw(case, rng, shape[-1]), draw(case, rng, shape[-1])
    mask = growth(case, rng, shape[-1]) if masked else None
    out, mean, rstd = ops.layer_norm(x, weight, bias, EPS, None, mask)
    dx, dweight, dbias = ops.layer_norm_backward(grad, x, weight, mean, rstd, mask)
    truth = reference.layer_norm_backward(exact(grad), exact(x), exact(weight), EPS, exact(mask))
    expected = reference.layer_norm(exact(x), exact(weight), exact(bias), EPS, exact(mask))
    return errors(
        {"out": out, "dx": dx, "dweight": dweight, "dbias": dbias},
        {"out": expected, "dx": truth[0], "dweight": truth[1], "dbias": truth[2]},
    )


def rope(ops: Any, case: Case, B: int, S: int, H: int, K: int, D: int, xpos: bool = False) -> dict[str, float]:
    rng = np.random.default_rng(case.seed)
    q, k, grad_q, grad_k = (draw(case, rng, B, S, heads, D) for heads in (H, K, H, K))
    angles = rng.uniform(0, 6, size=(B if xpos else 1, S, 1, D // 2))
    tables = [np.cos(angles), np.sin(angles)]
    if xpos:
        zeta = rng.uniform(0.5, 2, size=(1, S, 1, D // 2))
        tables += [zeta, 1 / zeta]
    given = [torch.tensor(t, dtype=torch.float32, device=case.device) for t in tables]
    got = [*ops.rope_qk(q, k, *given), *ops.rope_qk_backward(grad_q, grad_k, *given)]
    known = [exact(t) for t in given]
    truth = [
        *reference.rope_qk(exact(q), exact(k), *known),
        *reference.rope_qk_backward(exact(grad_q), exact(grad_k), *known),
    ]
    names = ("q", "k", "dq", "dk")
    return errors(dict(zip(names, got, strict=True)), dict(zip(names, truth, strict=True)))


def swiglu(ops: Any, case: Case, shape: tuple[int, ...], scale: float = 1.0) -> dict[str, float]:
    rng = np.random.default_rng(case.seed)
    gate, up, grad = draw(case, rng, *shape, scale=scale), draw(case, rng, *shape), draw(case, rng, *shape)
    dgate, dup = ops.swiglu_backward(grad, gate, up)
    truth = reference.swiglu_backward(exact(grad), exact(gate), exact(up))
    return errors(
        {"out": ops.swiglu(gate, up), "dgate": dgate, "dup": dup},
        {"out": reference.swiglu(exact(gate), exact(up)), "dgate": truth[0], "dup": truth[1]},
    )


def gelu(ops: Any, case: Case, shape: tuple[int, ...], scale: float = 1.0) -> dict[str, float]:
    rng = np.random.default_rng(case.seed)
    x, grad = draw(case, rng, *shape, scale=scale), draw(case, rng, *shape)
    return errors(
        {"out": ops.gelu(x), "dx": ops.gelu_backward(grad, x)},
        {"out": reference.gelu(exact(x)), "dx": reference.gelu_backward(exact(grad), exact(x))},
    )


def ranges(kind: str, B: int, S: int, T: int, seed: int = 0) -> np.ndarray:
    """Ranges of keys: causal, full, documents (one position long among them), empty (rows without keys), ragged."""
    rng = np.random.default_rng(seed)
    if kind == "causal":
        return causal_ranges(S, T).ranges
    if kind == "full":
        return np.broadcast_to(np.array([0, T], np.int32), (1, S, 2)).copy()
    if kind == "documents":
        ids = np.sort(rng.integers(0, 3, size=(B, T)), 1)
        ids[:, T // 2 :] += 1
        ids[:, T // 2 + 1 :] += 1  # a document of one token
        return causal_ranges(S, T, ids).ranges
    if kind == "empty":
        ragged = rng.integers(0, T + 1, size=(B, S, 2)).astype(np.int32)
        ragged[:, ::2] = 0
        return ragged
    if kind == "nothing":
        return np.zeros((1, S, 2), np.int32)
    if kind == "ragged":
        return np.sort(rng.integers(0, T + 1, size=(B, S, 2)), -1).astype(np.int32)
    raise ValueError(f"kind: {kind!r}")


def on_device(key_ranges: np.ndarray, num_keys: int, case: Case) -> KeyRanges:
    known = KeyRanges(key_ranges, num_keys, "ranges")
    return known._replace(ranges=torch.tensor(key_ranges, device=case.device))


def attention(
    ops: Any,
    case: Case,
    sizes: tuple[int, int, int, int, int, int],
    kind: str,
    scale: float = 1.0,
    out_f32: bool = False,
) -> dict[str, float]:
    """``sizes``: B, S, T, H, K, D. The backward gets the operator's own output and log-sum-exp, as training does."""
    B, S, T, H, K, D = sizes
    rng = np.random.default_rng(case.seed)
    q, k, v = (draw(case, rng, B, n, heads, D, scale=s) for n, heads, s in ((S, H, scale), (T, K, 1.0), (T, K, 1.0)))
    grad = draw(case, rng, B, S, H, D)
    numbers = ranges(kind, B, S, T, case.seed)
    seen = on_device(numbers, T, case)
    out, log_sum_exp = ops.attention(q, k, v, seen, out_f32=out_f32)
    dq, dk, dv = ops.attention_backward(grad, q, k, v, seen, out, log_sum_exp, out_f32=out_f32)
    visible = reference.visible_keys(numbers, T)
    true_out, true_lse = reference.attention(exact(q), exact(k), exact(v), visible)
    truth = reference.attention_backward(exact(grad), exact(q), exact(k), exact(v), visible, true_out, true_lse)
    return errors(
        {"out": out, "log_sum_exp": log_sum_exp, "dq": dq, "dk": dk, "dv": dv},
        {"out": true_out, "log_sum_exp": true_lse, "dq": truth[0], "dk": truth[1], "dv": truth[2]},
    )


def ring(ops: Any, case: Case, sizes: tuple[int, int, int, int, int], own_lse: bool = False) -> dict[str, float]:
    """Causal attention over all keys put together from two blocks of them, forward and backward, as a ring does it.

    ``sizes``: B, S, H, K, D. ``own_lse`` is the fault of a ring whose backward takes each block's own log-sum-exp.
    """
    B, S, H, K, D = sizes
    rng = np.random.default_rng(case.seed)
    q, k, v, grad = (draw(case, rng, B, S, heads, D) for heads in (H, K, K, H))
    numbers = ranges("causal", B, S, S)
    half = S // 2
    blocks = []
    for part in (slice(0, half), slice(half, S)):
        length = part.stop - part.start
        clipped = np.clip(numbers - part.start, 0, length).astype(np.int32)
        blocks.append((k[:, part], v[:, part], on_device(clipped, length, case)))
    parts = [ops.attention(q, *block, out_f32=True) for block in blocks]
    out, log_sum_exp = ops.merge_blocks(*parts[0], *parts[1])
    delta = ops.attention_delta(grad, out)
    gradients = []
    for block, (_, own) in zip(blocks, parts, strict=True):
        lse = own if own_lse else log_sum_exp
        gradients.append(ops.attention_backward(grad, q, *block, None, lse, delta=delta, out_f32=True))
    got = {"out": out, "log_sum_exp": log_sum_exp, "dq": gradients[0][0] + gradients[1][0]}
    got["dk"], got["dv"] = (torch.cat([g[i] for g in gradients], 1) for i in (1, 2))
    visible = reference.visible_keys(numbers, S)
    true_out, true_lse = reference.attention(exact(q), exact(k), exact(v), visible)
    truth = reference.attention_backward(exact(grad), exact(q), exact(k), exact(v), visible, true_out, true_lse)
    return errors(got, {"out": true_out, "log_sum_exp": true_lse, "dq": truth[0], "dk": truth[1], "dv": truth[2]})


def cross_entropy(
    ops: Any,
    case: Case,
    N: int,
    C: int,
    first: int = 0,
    real: int | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    in_place: bool = True,
) -> dict[str, float]:
    """A shard of columns; every fifth row is IGNORE, some targets belong to other ranks."""
    rng = np.random.default_rng(case.seed)
    real = C if real is None else real
    logits = draw(case, rng, N, C, scale=scale)
    targets = rng.integers(0, first + C + 7, size=N)
    targets[::5] = IGNORE
    given, known = torch.tensor(targets, device=case.device), exact(logits)
    log_sum_exp, picked = ops.cross_entropy_forward(logits, given, first, real)
    true_lse, true_picked = reference.cross_entropy_shard(known, targets, first, real)
    # The backward of a rank without tokens gets the other ranks' log-sum-exp.
    final = log_sum_exp if real else torch.ones_like(log_sum_exp)
    grad = ops.cross_entropy_backward(
        logits, given, first, real, final, torch.tensor(0.5, device=case.device), z_loss, in_place
    )
    if in_place:
        assert grad is logits
    truth = 0.5 * reference.cross_entropy_shard_backward(known, targets, first, real, exact(final), z_loss)
    return errors(
        {"log_sum_exp": log_sum_exp, "picked": picked, "grad": grad},
        {"log_sum_exp": true_lse, "picked": true_picked, "grad": truth},
    )


def embedding(ops: Any, case: Case, N: int, E: int, V: int, same: bool = False) -> dict[str, float]:
    rng = np.random.default_rng(case.seed)
    grad = draw(case, rng, N, E)
    ids = np.full(N, V // 2) if same else rng.integers(0, V, size=N)
    got = ops.embedding_backward(grad, torch.tensor(ids, device=case.device), V)
    return errors({"table": got}, {"table": reference.embedding_backward(exact(grad), ids, V)})


def adamw(ops: Any, case: Case, count: int, step: int = 3, scale_tensor: bool = False) -> dict[str, float]:
    rng = np.random.default_rng(case.seed)
    wide = case._replace(dtype=torch.float32, spaced=False)
    master, m, v = draw(wide, rng, count), draw(wide, rng, count, scale=0.1), draw(wide, rng, count) ** 2
    grad = draw(case._replace(spaced=False), rng, count)
    known = tuple(exact(x) for x in (master, grad, m, v))
    copy = torch.empty(count, dtype=torch.bfloat16, device=case.device)
    scalars = AdamWStep(step, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.25)
    if scale_tensor:  # a fourth of which the device holds half
        device_scale = torch.tensor(0.5, device=case.device)
        ops.adamw(master, grad, m, v, replace(scalars, grad_scale=0.5), copy, device_scale)
    else:
        ops.adamw(master, grad, m, v, scalars, copy)
    truth = reference.adamw(known[0], known[1], known[2], known[3], scalars)
    found = errors({"master": master, "m": m, "v": v}, dict(zip(("master", "m", "v"), truth, strict=True)))
    found["copy"] = float((copy.float() - master.to(torch.bfloat16).float()).abs().max()) if count else 0.0
    return found
