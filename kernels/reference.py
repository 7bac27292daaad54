"""Numpy definitions of the operators, forward and backward, computed in the dtype of their inputs.

float64 inputs give the reference for every implementation, float32 inputs the rounding error of the definition itself.
B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden, V vocabulary, N rows, C columns of a vocabulary
shard. A ``_backward`` takes the gradient of the output and the forward's inputs, and returns the gradients of the
inputs in the forward's order.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.int8 import GROUP, LEAST


def rms_norm(x: Array, weight: Array, eps: float, mask: Array | None = None) -> Array:
    """x * weight / sqrt(mean(x^2) + eps) over the last axis.

    ``mask`` [E] in [0, 1] is the growth mask (masked structural growth, arXiv 2305.02869): mean(x^2) becomes
    sum(mask * x^2) / sum(mask), and the output is multiplied by the mask. With zeros and ones the result is exactly the
    norm over the channels with mask 1.
    """
    out = x / np.sqrt(_mean(x * x, mask) + eps) * weight
    return out if mask is None else out * mask


def rms_norm_backward(
    grad: Array, x: Array, weight: Array, eps: float, mask: Array | None = None
) -> tuple[Array, Array]:
    """(dx, dweight). With r = 1/sqrt(mean(x^2) + eps), g = grad * weight * mask, c = mask / sum(mask) (else 1/E):

    dx = r * g - x * r^3 * c * sum(g * x), dw = sum(grad * mask * x * r).
    """
    r = 1.0 / np.sqrt(_mean(x * x, mask) + eps)
    if mask is not None:
        grad = grad * mask
    g = grad * weight
    share = 1.0 / x.shape[-1] if mask is None else mask / mask.sum()
    dx = r * g - x * r**3 * share * np.sum(g * x, -1, keepdims=True)
    return dx, (grad * x * r).reshape(-1, x.shape[-1]).sum(0)


def add_rms_norm(
    x: Array, residual: Array, weight: Array, eps: float, mask: Array | None = None
) -> tuple[Array, Array]:
    """(rms_norm of the stream, the stream x + residual)."""
    stream = x + residual
    return rms_norm(stream, weight, eps, mask), stream


def add_rms_norm_backward(
    grad: Array, grad_stream: Array, stream: Array, weight: Array, eps: float, mask: Array | None = None
) -> tuple[Array, Array]:
    """(dstream, the gradient of both x and residual; dweight) from the gradients of both outputs."""
    dx, dw = rms_norm_backward(grad, stream, weight, eps, mask)
    return dx + grad_stream, dw


def layer_norm(
    x: Array, weight: Array, bias: Array, eps: float, mask: Array | None = None, counted: int | None = None
) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; ``mask`` as in rms_norm.

    ``counted``: mean and variance are those of the first ``counted`` channels, and the mask multiplies the output only
    (a model grown without masks, whose function is preserved only by the mean over its old channels).
    """
    few, weights = (x, mask) if counted is None else (x[..., :counted], None)
    mean = _mean(few, weights)
    out = (x - mean) / np.sqrt(_mean((few - mean) ** 2, weights) + eps) * weight + bias
    return out if mask is None else out * mask


def layer_norm_backward(
    grad: Array, x: Array, weight: Array, eps: float, mask: Array | None = None, counted: int | None = None
) -> tuple[Array, Array, Array]:
    """(dx, dweight, dbias). With r = 1/sqrt(var + eps), n = (x - mean) * r, g = grad * weight * mask and c = mask /
    sum(mask) (else 1/E; with ``counted``, 1/counted on the first ``counted`` channels and 0 on the others):

    dx = r * (g - c * sum(g) - n * c * sum(g * n)), dw = sum(grad * mask * n), db = sum(grad * mask).
    """
    few, weights = (x, mask) if counted is None else (x[..., :counted], None)
    mean = _mean(few, weights)
    r = 1.0 / np.sqrt(_mean((few - mean) ** 2, weights) + eps)
    n = (x - mean) * r
    if mask is not None:
        grad = grad * mask
    g = grad * weight
    share: Array | float = 1.0 / x.shape[-1] if mask is None else mask / mask.sum()
    if counted is not None:
        share = (np.arange(x.shape[-1]) < counted) / counted
    dx = r * (g - share * np.sum(g, -1, keepdims=True) - n * share * np.sum(g * n, -1, keepdims=True))
    rows = (-1, x.shape[-1])
    return dx, (grad * n).reshape(rows).sum(0), grad.reshape(rows).sum(0)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Half rotation of x [..., D] by cos, sin [..., D/2]: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = np.split(x, 2, -1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def rope_backward(grad: Array, cos: Array, sin: Array) -> Array:
    """The transposed rotation; an attention scale included in cos and sin remains a factor."""
    return rope(grad, cos, -sin)


def rope_qk(
    q: Array, k: Array, cos: Array, sin: Array, scale_q: Array | None = None, scale_k: Array | None = None
) -> tuple[Array, Array]:
    """Rotary embedding of q [B, S, H, D] and k [B, S, K, D] by cos, sin [B or 1, S, 1, D/2].

    ``scale_q``, ``scale_k`` [B or 1, S, 1, D/2] multiply both halves after the rotation (xPos, arXiv 2212.10554:
    zeta^p and zeta^-p at position p).
    """
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    if scale_q is not None:
        q = q * np.concatenate((scale_q, scale_q), -1)
    if scale_k is not None:
        k = k * np.concatenate((scale_k, scale_k), -1)
    return q, k


def rope_qk_backward(
    grad_q: Array, grad_k: Array, cos: Array, sin: Array, scale_q: Array | None = None, scale_k: Array | None = None
) -> tuple[Array, Array]:
    if scale_q is not None:
        grad_q = grad_q * np.concatenate((scale_q, scale_q), -1)
    if scale_k is not None:
        grad_k = grad_k * np.concatenate((scale_k, scale_k), -1)
    return rope_backward(grad_q, cos, sin), rope_backward(grad_k, cos, sin)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up with silu(x) = x / (1 + e^-x)."""
    return gate * _sigmoid(gate) * up


def swiglu_backward(grad: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    s = _sigmoid(gate)
    return grad * up * s * (1.0 + gate * (1.0 - s)), grad * gate * s


_GELU_A, _GELU_B = 0.7978845608028654, 0.044715  # sqrt(2 / pi); Hendrycks and Gimpel, arXiv 1606.08415


def gelu(x: Array) -> Array:
    """GELU, tanh form: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""
    return 0.5 * x * (1.0 + np.tanh(_GELU_A * (x + _GELU_B * x**3)))


def gelu_backward(grad: Array, x: Array) -> Array:
    t = np.tanh(_GELU_A * (x + _GELU_B * x**3))
    return grad * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * _GELU_A * (1.0 + 3.0 * _GELU_B * x * x))


def visible_keys(key_range: Array, num_keys: int) -> Array:
    """Mask bool [B or 1, S, T] of ``key_range`` [B or 1, S, 2] (first, last): key t is visible if first <= t < last."""
    keys = np.arange(num_keys)
    return (keys >= key_range[..., :1]) & (keys < key_range[..., 1:])


def attention(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, Array]:
    """q [B, S, H, D], k and v [B, T, K, D], visible bool [B or 1, S, T] -> out [B, S, H, D], log_sum_exp [B, H, S].

    out = softmax(q k / sqrt(D)) v. A query without visible keys gives zeros and a log_sum_exp of -inf.
    """
    scores = _scores(q, k, visible)  # [B, H, S, T], -inf where hidden
    top = np.max(scores, -1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)  # without visible keys: exp(-inf - 0) = 0
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)  # [B, H, S, 1]
    with np.errstate(divide="ignore"):
        log_sum_exp = (top + np.log(total))[..., 0]
    weights = weights / np.where(total == 0.0, 1.0, total)
    return np.einsum("bhst,bthd->bshd", weights, _repeat(v, q.shape[2])), log_sum_exp


def attention_backward(
    grad: Array, q: Array, k: Array, v: Array, visible: Array, out: Array, log_sum_exp: Array
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) from the output and log_sum_exp [B, H, S] of these keys, or of a larger set that contains them.

    P = exp(scores - log_sum_exp), dP = grad v^T, dS = P * (dP - rowsum(grad * out)), dq = dS k / sqrt(D), dk = dS^T q /
    sqrt(D), dv = P^T grad (FlashAttention, arXiv 2205.14135, algorithm 4).
    """
    H, K, D = q.shape[2], k.shape[2], q.shape[3]
    finite = np.where(np.isfinite(log_sum_exp), log_sum_exp, 0.0)
    weights = np.exp(_scores(q, k, visible) - finite[..., None])  # P [B, H, S, T]
    d_weights = np.einsum("bshd,bthd->bhst", grad, _repeat(v, H))
    d_scores = weights * (d_weights - np.einsum("bshd,bshd->bhs", grad, out)[..., None]) / np.sqrt(q.dtype.type(D))
    dq = np.einsum("bhst,bthd->bshd", d_scores, _repeat(k, H))
    dk = np.einsum("bhst,bshd->bthd", d_scores, q)
    dv = np.einsum("bhst,bshd->bthd", weights, grad)
    B, T = k.shape[:2]
    # Repeated heads [B, T, H, D] to kv heads [B, T, K, D]: the sum over the heads of a group.
    return dq, dk.reshape(B, T, K, H // K, D).sum(3), dv.reshape(B, T, K, H // K, D).sum(3)


def merge_blocks(out: Array, log_sum_exp: Array, more: Array, more_lse: Array) -> tuple[Array, Array]:
    """Attention over the union of two sets of keys from attention over each; out [B, S, H, D], log_sum_exp [B, H, S].

    With log-sum-exps a and b: joint = log(e^a + e^b), out = e^(a - joint) out + e^(b - joint) more; zeros and -inf
    where neither set has a visible key.
    """
    joint = np.logaddexp(log_sum_exp, more_lse)
    safe = np.where(np.isfinite(joint), joint, 0.0)
    first, second = (np.exp(lse - safe).transpose(0, 2, 1)[..., None] for lse in (log_sum_exp, more_lse))
    return out * first + more * second, joint


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    k_pages: Array,
    v_pages: Array,
    slots: Array,
    starts: Array,
    lengths: Array,
    tables: Array,
) -> Array:
    """Paged attention: causal attention of the last tokens of sequences with keys and values in pages, q [1, N, H, D].

    k and v [1, N, K, D] are written first, in place: row i at slots[i] = page * size + place in k_pages and v_pages
    [P, size, K, D]. Sequence r has the queries starts[r] .. starts[r + 1] - 1, which are the last of its lengths[r]
    positions; position p is row p % size of page tables[r, p // size].
    """
    out = np.empty_like(q)
    size = k_pages.shape[1]
    for pages, x in ((k_pages, k), (v_pages, v)):
        pages.reshape(-1, *x.shape[2:])[slots] = x[0]
    for first, last, length, table in zip(starts[:-1], starts[1:], lengths, tables, strict=True):
        used = table[: -(-length // size)]
        keys, values = (pages[used].reshape(-1, *k.shape[2:])[:length] for pages in (k_pages, v_pages))
        visible = np.arange(length) <= np.arange(length - (last - first), length)[:, None]
        out[:, first:last] = attention(q[:, first:last], keys[None], values[None], visible[None])[0]
    return out


def cross_entropy(logits: Array, targets: Array, z_loss: float = 0.0) -> Array:
    """Sum of -log softmax(logits)[target] + z_loss * lse^2 over the rows whose target is not IGNORE.

    logits [N, V], targets [N]; lse: log_sum_exp of the row (the z-loss of PaLM, arXiv 2204.02311, section 5).
    """
    log_sum_exp = log_sum(logits)
    counted = targets != IGNORE
    picked = np.take_along_axis(logits, np.where(counted, targets, 0)[:, None], -1)[:, 0]
    return np.where(counted, log_sum_exp - picked + z_loss * log_sum_exp**2, 0.0).sum()


def cross_entropy_backward(logits: Array, targets: Array, z_loss: float = 0.0) -> Array:
    """dlogits: softmax(logits) * (1 + 2 z_loss lse) - onehot(target), 0 in rows with target IGNORE."""
    return cross_entropy_shard_backward(logits, targets, 0, logits.shape[-1], log_sum(logits), z_loss)


def log_sum(logits: Array) -> Array:
    """log_sum_exp [N] over the columns of logits [N, C]."""
    top = logits.max(-1, keepdims=True)
    return top[:, 0] + np.log(np.exp(logits - top).sum(-1))


def cross_entropy_shard(logits: Array, targets: Array, first: int, real: int) -> tuple[Array, Array]:
    """Statistics of a vocabulary shard, columns [first, first + C): (log_sum_exp, picked), both [N].

    logits [N, C], whose columns from ``real`` on are padding. ``picked`` is the target's logit, 0 where another rank
    has it or it is IGNORE. Without a real column log_sum_exp is -inf. Over ranks: lse = log(sum(exp(log_sum_exp))), and
    the token loss is lse - sum(picked).
    """
    local = targets - first
    held = (targets != IGNORE) & (local >= 0) & (local < real)
    picked = np.take_along_axis(logits, np.where(held, local, 0)[:, None], -1)[:, 0]
    own = log_sum(logits[:, :real]) if real else np.full(len(logits), -np.inf, logits.dtype)
    return own, np.where(held, picked, 0.0)


def cross_entropy_shard_backward(
    logits: Array, targets: Array, first: int, real: int, log_sum_exp: Array, z_loss: float = 0.0
) -> Array:
    """d (sum of losses) / d logits [N, C] of a shard, from the log_sum_exp [N] over all ranks; 0 in padding columns."""
    local = targets - first
    counted = targets != IGNORE
    held = counted & (local >= 0) & (local < real)
    grad = np.zeros_like(logits)
    grad[:, :real] = np.exp(logits[:, :real] - log_sum_exp[:, None]) * (1.0 + 2.0 * z_loss * log_sum_exp[:, None])
    grad[np.flatnonzero(held), local[held]] -= 1.0
    return np.where(counted[:, None], grad, 0.0)


def embedding(table: Array, ids: Array) -> Array:
    """table [V, E], ids [...] -> [..., E]."""
    return table[ids]


def embedding_backward(grad: Array, ids: Array, vocab_size: int) -> Array:
    """grad [..., E] summed into rows [V, E] by id."""
    table = np.zeros((vocab_size, grad.shape[-1]), grad.dtype)
    np.add.at(table, ids.reshape(-1), grad.reshape(-1, grad.shape[-1]))
    return table


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., in] @ weight [out, in]^T + bias [out]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def quantized_rows(x: Array) -> Array:
    """x [..., k] as the products with int8 matrices round it: in groups of GROUP columns, round(127 x / m) m / 127 with
    m the group's largest magnitude; the quotient is taken in float32, the product in the dtype of x."""
    out = np.empty_like(x)
    for first in range(0, x.shape[-1], GROUP):
        part = x[..., first : first + GROUP]
        most = np.abs(part).max(-1, keepdims=True, initial=0.0).astype(np.float32)
        quotient = np.divide(np.float32(127.0), most, out=np.zeros_like(most), where=most >= LEAST)
        whole = np.rint(part.astype(np.float32) * quotient)
        out[..., first : first + GROUP] = whole.astype(x.dtype) * (most / np.float32(127.0)).astype(x.dtype)
    return out


def linear_backward(grad: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """(dx, dweight, dbias)."""
    rows = grad.reshape(-1, grad.shape[-1])
    return grad @ weight, rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(0)


def adamw(master: Array, grad: Array, m: Array, v: Array, step: AdamWStep) -> tuple[Array, Array, Array]:
    """One AdamW update with grad * grad_scale: decoupled decay, then lr * m_hat / (sqrt(v_hat) + eps).

    Returns the new master, m and v (Loshchilov and Hutter, arXiv 1711.05101).
    """
    grad = grad * step.grad_scale
    m = step.beta1 * m + (1.0 - step.beta1) * grad
    v = step.beta2 * v + (1.0 - step.beta2) * grad * grad
    update = (m / step.bias_correction1) / (np.sqrt(v / step.bias_correction2) + step.eps)
    return master * step.decay_factor - step.lr * update, m, v


def _mean(x: Array, mask: Array | None) -> Array:
    if mask is None:
        return np.mean(x, -1, keepdims=True)
    return np.sum(mask * x, -1, keepdims=True) / mask.sum()


def _scores(q: Array, k: Array, visible: Array) -> Array:
    scores = np.einsum("bshd,bthd->bhst", q, _repeat(k, q.shape[2])) / np.sqrt(q.dtype.type(q.shape[3]))
    return np.where(visible[:, None], scores, -np.inf)


def _repeat(kv: Array, num_heads: int) -> Array:
    """kv [B, T, K, D] -> [B, T, H, D]: query heads j*H/K .. (j+1)*H/K - 1 share kv head j."""
    return np.repeat(kv, num_heads // kv.shape[2], 2)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))
