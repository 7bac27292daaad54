"""Every operator's definition in numpy, forward and backward, computed in the dtype of its inputs: the judge.

Give float64 to judge, float32 to see what rounding alone costs. B batch, S queries, T keys, H heads, K kv heads,
D head dim, E hidden, V vocab. A ``_backward`` takes the gradient of the output and the forward's inputs and returns the
gradients of the inputs in the forward's order.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

from core.batch import IGNORE


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x * weight / sqrt(mean(x^2) + eps) over the last axis."""
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def rms_norm_backward(grad: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """With r = 1/sqrt(mean(x^2) + eps) and g = grad * weight:

    dx = r * (g - x * r^2 * mean(g * x)), dw = sum(grad * x * r).
    """
    r = 1.0 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    g = grad * weight
    dx = r * (g - x * r * r * np.mean(g * x, -1, keepdims=True))
    return dx, (grad * x * r).reshape(-1, x.shape[-1]).sum(0)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Half rotation of x [..., D] by cos, sin [..., D/2]: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = np.split(x, 2, -1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def rope_backward(grad: Array, cos: Array, sin: Array) -> Array:
    """The transposed rotation; a length-dependent attention scale inside cos and sin stays a factor."""
    return rope(grad, cos, -sin)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up with silu(x) = x / (1 + e^-x)."""
    return gate * _sigmoid(gate) * up


def swiglu_backward(grad: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    s = _sigmoid(gate)
    return grad * up * s * (1.0 + gate * (1.0 - s)), grad * gate * s


def attention(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, Array]:
    """q [B, S, H, D], k and v [B, T, K, D], visible bool [B or 1, S, T] -> out [B, S, H, D], log_sum_exp [B, H, S].

    Scores are q k / sqrt(D). A row that sees no key gives zeros and a log-sum-exp of -inf.
    """
    scores = _scores(q, k, visible)  # [B, H, S, T]
    top = np.max(scores, -1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_sum_exp = (top + np.log(total))[..., 0]
    weights = weights / np.where(total == 0.0, 1.0, total)
    return np.einsum("bhst,bthd->bshd", weights, _repeat(v, q.shape[2])), log_sum_exp


def attention_backward(
    grad: Array, q: Array, k: Array, v: Array, visible: Array, out: Array, log_sum_exp: Array
) -> tuple[Array, Array, Array]:
    """P = exp(scores - log_sum_exp), dS = P * (dP - rowsum(grad * out)): FlashAttention (2022), Algorithm 4."""
    H, K, D = q.shape[2], k.shape[2], q.shape[3]
    finite = np.where(np.isfinite(log_sum_exp), log_sum_exp, 0.0)
    weights = np.exp(_scores(q, k, visible) - finite[..., None])
    d_weights = np.einsum("bshd,bthd->bhst", grad, _repeat(v, H))
    d_scores = weights * (d_weights - np.einsum("bshd,bshd->bhs", grad, out)[..., None]) / np.sqrt(q.dtype.type(D))
    dq = np.einsum("bhst,bthd->bshd", d_scores, _repeat(k, H))
    dk = np.einsum("bhst,bshd->bthd", d_scores, q)
    dv = np.einsum("bhst,bshd->bthd", weights, grad)
    B, T = k.shape[:2]
    return dq, dk.reshape(B, T, K, H // K, D).sum(3), dv.reshape(B, T, K, H // K, D).sum(3)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Sum of -log softmax(logits)[target] over the positions whose target is not IGNORE; logits [N, V], targets [N]."""
    top = logits.max(-1, keepdims=True)
    log_sum_exp = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
    counted = targets != IGNORE
    picked = np.take_along_axis(logits, np.where(counted, targets, 0)[:, None], -1)[:, 0]
    return np.where(counted, log_sum_exp - picked, 0.0).sum()


def cross_entropy_backward(logits: Array, targets: Array) -> Array:
    """softmax(logits) - onehot(target) on the counted rows."""
    top = logits.max(-1, keepdims=True)
    probs = np.exp(logits - top)
    probs /= probs.sum(-1, keepdims=True)
    counted = targets != IGNORE
    probs[np.arange(len(targets)), np.where(counted, targets, 0)] -= 1.0
    return np.where(counted[:, None], probs, 0.0)


def adamw(
    master: Array,
    grad: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> tuple[Array, Array, Array]:
    """Update number ``step`` (from 1): decoupled decay, then lr * m_hat / (sqrt(v_hat) + eps). Returns master, m, v."""
    m = beta1 * m + (1.0 - beta1) * grad
    v = beta2 * v + (1.0 - beta2) * grad * grad
    update = (m / (1.0 - beta1**step)) / (np.sqrt(v / (1.0 - beta2**step)) + eps)
    return master * (1.0 - lr * decay) - lr * update, m, v


def _scores(q: Array, k: Array, visible: Array) -> Array:
    scores = np.einsum("bshd,bthd->bhst", q, _repeat(k, q.shape[2])) / np.sqrt(q.dtype.type(q.shape[3]))
    return np.where(visible[:, None], scores, -np.inf)


def _repeat(kv: Array, num_heads: int) -> Array:
    """Query heads j*H/K .. (j+1)*H/K - 1 share kv head j."""
    return np.repeat(kv, num_heads // kv.shape[2], 2)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))
