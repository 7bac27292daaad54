"""Catalogue of the faults that `tele parity locate` must name: operator, layer and direction of each. Here those inside
operators; tests/campaigns/locate_step_faults.py has those of what lies around them.

x input, w weight, b bias, f the framework, real the right function. The two blocks of the models are 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from telechat_twins.core.backends import load
from tests.campaigns.located_faults import Framework, fault, linear_fault, operator_fault

Changes = Iterator[tuple[Any, str, Any]]


def _root_of_mean(f: Framework, x: Any, eps: float, axis: int = -1) -> Any:
    return (f.mean(x * x, axis) + eps) ** 0.5


# Norms: x, gain, eps, stat, compute, mask.
for where, layer in (("attn_norm", 0), ("attn_norm", 1)):
    site = f"layers.{layer}.{where}"
    if layer == 0:
        operator_fault(
            "eps of another release",
            "rms_norm",
            "rms_norm",
            site,
            lambda f, real, x, w, eps, *r: real(x, w, 10 * eps, *r),
        )
        operator_fault("gain plus one", "rms_norm", "rms_norm", site, lambda f, real, x, w, *r: real(x, w + 1.0, *r))
        operator_fault(
            "statistics over positions",
            "rms_norm",
            "rms_norm",
            site,
            lambda f, real, x, w, eps, *r: x / _root_of_mean(f, x, eps, 1) * w,
        )
        operator_fault(
            "statistics as constants",
            "rms_norm",
            "rms_norm",
            site,
            lambda f, real, x, w, eps, *r: x / f.constant(_root_of_mean(f, x, eps)) * w,
            backward=True,
        )
    else:
        operator_fault(
            "mean subtracted", "rms_norm", "rms_norm", site, lambda f, real, x, *r: real(x - f.mean(x, -1), *r)
        )
        operator_fault(
            "statistics in bfloat16",
            "rms_norm",
            "rms_norm",
            site,
            lambda f, real, x, w, eps, *r: x / f.rounded(_root_of_mean(f, x, eps)) * w,
        )
        operator_fault(
            "norm of the stream before",
            "rms_norm",
            "rms_norm",
            site,
            lambda f, real, x, *r: real(f.before(x) + x * 0.0, *r),
        )
        operator_fault(
            "gain without gradient",
            "rms_norm",
            "rms_norm",
            site,
            lambda f, real, x, w, *r: real(x, f.frozen(w), *r),
            backward=True,
        )
operator_fault(
    "last norm without its last channel",
    "rms_norm",
    "rms_norm",
    "norm",
    lambda f, real, x, *r: real(f.without_last(x, -1), *r),
)

# Sum and norm: x, residual, gain, eps, stat, compute, mask -> (normed, stream).
operator_fault(
    "second norm's eps",
    "add_rms_norm",
    "rms_norm",
    "layers.1.ffn_norm",
    lambda f, real, x, y, w, eps, *r: (real(x, y, w, eps * 10, *r)[0], real(x, y, w, eps, *r)[1]),
)
operator_fault(
    "second norm of the stream before attention",
    "add_rms_norm",
    "rms_norm",
    "layers.0.ffn_norm",
    lambda f, real, x, y, *r: (real(x * 0.0, y, *r)[0], real(x, y, *r)[1]),
)
operator_fault(
    "attention without residual",
    "add_rms_norm",
    "add",
    "layers.0.attn_sum",
    lambda f, real, x, y, *r: real(x, y * 0.0, *r),
)
operator_fault(
    "stream in bfloat16 after attention",
    "add_rms_norm",
    "add",
    "layers.1.attn_sum",
    lambda f, real, x, y, *r: (real(x, y, *r)[0], f.rounded(real(x, y, *r)[1])),
)
operator_fault(
    "second norm's gain gradient doubled",
    "add_rms_norm",
    "rms_norm",
    "layers.0.ffn_norm",
    lambda f, real, x, y, w, *r: real(x, y, 2.0 * w, *r),
    backward=True,
)

operator_fault(
    "second norm's statistics as constants",
    "add_rms_norm",
    "rms_norm",
    "layers.1.ffn_norm",
    lambda f, real, x, y, w, eps, *r: ((x + y) / f.constant(_root_of_mean(f, x + y, eps)) * w, x + y),
    backward=True,
)
operator_fault(
    "residual's gradient lost at attention",
    "add_rms_norm",
    "add",
    "layers.1.attn_sum",
    lambda f, real, x, y, *r: real(x, f.frozen(y), *r),
    backward=True,
)
operator_fault(
    "residual's gradient lost at the ffn",
    "add",
    "add",
    "layers.0",
    lambda f, real, x, y: real(f.frozen(x), y),
    backward=True,
)

# Linear layers: x, weight, bias, compute.
linear_fault("q transposed", "layers.0.attn.q", lambda f, real, x, w, b, c: real(x, w.swapaxes(0, 1), b, c))
linear_fault("k in bfloat16", "layers.1.attn.k", lambda f, real, x, w, b, c: real(f.rounded(x), f.rounded(w), b, c))
linear_fault("v halves swapped", "layers.0.attn.v", lambda f, real, x, w, b, c: f.swapped(real(x, w, b, c), -1))
linear_fault("v heads off by one", "layers.1.attn.v", lambda f, real, x, w, b, c: f.rolled(real(x, w, b, c), -1, 32))
linear_fault("o bias missed", "layers.0.attn.o", lambda f, real, x, w, b, c: real(x, w, b * 0.0, c))
linear_fault("o bias twice", "layers.1.attn.o", lambda f, real, x, w, b, c: real(x, w, b + b, c))
linear_fault(
    "gate remainder dropped", "layers.0.ffn.gate", lambda f, real, x, w, b, c: real(f.without_last(x, -1), w, b, c)
)
linear_fault("up of the block before", "layers.1.ffn.up", lambda f, real, x, w, b, c: real(x * 1.01, w, b, c))
linear_fault("down bias missed", "layers.1.ffn.down", lambda f, real, x, w, b, c: real(x, w, b * 0.0, c))
linear_fault("down scaled by depth", "layers.0.ffn.down", lambda f, real, x, w, b, c: real(x, w, b, c) * 0.5)
linear_fault("head in bfloat16", "logits", lambda f, real, x, w, b, c: f.rounded(real(x, w, b, c)))
linear_fault("head rows off by one", "logits", lambda f, real, x, w, b, c: real(x, f.rolled(w, 0), b, c))
linear_fault(
    "q weight's gradient halved", "layers.1.attn.q", lambda f, real, x, w, b, c: real(x, w * 0.5, b, c), backward=True
)
linear_fault(
    "o input's gradient transposed",
    "layers.0.attn.o",
    lambda f, real, x, w, b, c: real(x, f.constant(w).swapaxes(0, 1), b * 0.0, c) + real(f.constant(x), w, None, c),
    backward=True,
)
linear_fault(
    "o bias without gradient",
    "layers.1.attn.o",
    lambda f, real, x, w, b, c: real(x, w, f.frozen(b), c),
    backward=True,
)
linear_fault(
    "down gradient of all rows but the last",
    "layers.0.ffn.down",
    lambda f, real, x, w, b, c: real(f.without_last(x, 0), w, b, c),
    backward=True,
)
linear_fault(
    "gate gradient in bfloat16",
    "layers.1.ffn.gate",
    lambda f, real, x, w, b, c: f.rounded(real(x, f.rounded(w), b, c)),
    backward=True,
)
linear_fault("head's gradient doubled", "logits", lambda f, real, x, w, b, c: real(x, w * 2.0, b, c), backward=True)

# Rotary positions: q, k, cos, sin.
operator_fault(
    "positions off by one",
    "rope_qk",
    "rope",
    "layers.0.attn.rope_q",
    lambda f, real, q, k, *t: real(q, k, *(f.rolled(table, 1) for table in t)),
)
operator_fault(
    "keys not rotated", "rope_qk", "rope", "layers.1.attn.rope_k", lambda f, real, q, k, *t: (real(q, k, *t)[0], k)
)
operator_fault(
    "queries one position on",
    "rope_qk",
    "rope",
    "layers.1.attn.rope_q",
    lambda f, real, q, k, *t: (real(q, k, *(f.rolled(table, 1) for table in t))[0], real(q, k, *t)[1]),
)
operator_fault(
    "rotation reversed", "rope_qk", "rope", "layers.0.attn.rope_q", lambda f, real, q, k, a, b: real(q, k, a, -b)
)
operator_fault(
    "key halves swapped",
    "rope_qk",
    "rope",
    "layers.0.attn.rope_k",
    lambda f, real, q, k, *t: (real(q, k, *t)[0], real(q, f.swapped(k, -1), *t)[1]),
)
operator_fault(
    "rotary tables in float16",
    "rope_qk",
    "rope",
    "layers.1.attn.rope_q",
    lambda f, real, q, k, *t: real(q, k, *(f.rounded(table, "float16") for table in t)),
)
operator_fault(
    "last position not rotated",
    "rope_qk",
    "rope",
    "layers.0.attn.rope_q",
    lambda f, real, q, k, a, b: real(q, k, a, f.without_last(b, 1)),
)
operator_fault(
    "rotation's gradient not transposed",
    "rope_qk",
    "rope",
    "layers.1.attn.rope_q",
    lambda f, real, q, k, a, b: real(q, k, a, -b),
    backward=True,
)

# Attention: q, k, v, visible.
operator_fault(
    "attention scale missed",
    "attention",
    "attention",
    "layers.1.attn.core",
    lambda f, real, q, k, v, s: real(q * 32**0.5, k, v, s),
)
operator_fault(
    "attention scale twice",
    "attention",
    "attention",
    "layers.0.attn.core",
    lambda f, real, q, k, v, s: real(q * 32**-0.5, k, v, s),
)
operator_fault(
    "next key visible",
    "attention",
    "attention",
    "layers.1.attn.core",
    lambda f, real, q, k, v, s: real(q, f.rolled(k, 1), f.rolled(v, 1), s),
)
operator_fault(
    "kv heads swapped",
    "attention",
    "attention",
    "layers.0.attn.core",
    lambda f, real, q, k, v, s: real(q, f.swapped(k, 2), f.swapped(v, 2), s),
)
operator_fault(
    "keys and values swapped",
    "attention",
    "attention",
    "layers.1.attn.core",
    lambda f, real, q, k, v, s: real(q, v, k, s),
)
operator_fault(
    "keys of another row",
    "attention",
    "attention",
    "layers.0.attn.core",
    lambda f, real, q, k, v, s: real(q, f.rolled(k, 0), v, s),
)
operator_fault(
    "keys of the block before",
    "attention",
    "attention",
    "layers.1.attn.core",
    lambda f, real, q, k, v, s: real(q, f.before(k) + k * 0.0, v, s),
)
operator_fault(
    "attention's output in bfloat16",
    "attention",
    "attention",
    "layers.0.attn.core",
    lambda f, real, *args: f.rounded(real(*args)),
)
operator_fault(
    "last query dropped",
    "attention",
    "attention",
    "layers.1.attn.core",
    lambda f, real, *args: f.without_last(real(*args), 1),
)
operator_fault(
    "gradient of keys without scale",
    "attention",
    "attention",
    "layers.0.attn.core",
    lambda f, real, q, k, v, s: real(q * 2.0, k, v, s),
    backward=True,
)
operator_fault(
    "gradient of values of one head a group",
    "attention",
    "attention",
    "layers.1.attn.core",
    lambda f, real, q, k, v, s: f.without_last(real(q, k, v, s), 2),
    backward=True,
)

# Activation and sums.
operator_fault("gate and up swapped", "swiglu", "swiglu", "layers.0.ffn.act", lambda f, real, g, u, s: real(u, g, s))
operator_fault(
    "gelu gate", "swiglu", "swiglu", "layers.1.ffn.act", lambda f, real, g, u, s: g * f.sigmoid(g * 1.702) * u
)
operator_fault(
    "silu in bfloat16", "swiglu", "swiglu", "layers.0.ffn.act", lambda f, real, g, u, s: real(f.rounded(g), u, s)
)
operator_fault(
    "silu's slope as sigmoid",
    "swiglu",
    "swiglu",
    "layers.1.ffn.act",
    lambda f, real, g, u, s: g * f.constant(f.sigmoid(g)) * u,
    backward=True,
)
operator_fault("ffn without residual", "add", "add", "layers.1", lambda f, real, x, y: real(x * 0.0, y))
operator_fault("branch added twice", "add", "add", "layers.0", lambda f, real, x, y: real(real(x, y), y))
operator_fault("stream in bfloat16", "add", "add", "layers.0", lambda f, real, x, y: f.rounded(real(x, y)))
operator_fault("stale stream", "add", "add", "layers.1", lambda f, real, x, y: real(f.before(x) + x * 0.0, y))
operator_fault(
    "branch's gradient halved", "add", "add", "layers.1", lambda f, real, x, y: real(x, y * 0.5), backward=True
)

# The embedding, outside of the blocks.
operator_fault(
    "row of the token after", "embedding", "embedding", "embed", lambda f, real, w, ids: real(f.rolled(w, 0), ids)
)
operator_fault(
    "embedding in bfloat16", "embedding", "embedding", "embed", lambda f, real, w, ids: f.rounded(real(w, ids))
)
operator_fault(
    "embedding's gradient of all rows but the last",
    "embedding",
    "embedding",
    "embed",
    lambda f, real, w, ids: f.without_last(real(w, ids), 0),
    backward=True,
)

# The loss: logits, targets.
operator_fault(
    "logits of the loss in bfloat16",
    "cross_entropy",
    "cross_entropy",
    "loss",
    lambda f, real, x, t: real(f.rounded(x), t),
)
operator_fault(
    "targets one position on", "cross_entropy", "cross_entropy", "loss", lambda f, real, x, t: real(x, f.rolled(t, 1))
)
operator_fault(
    "softmax's gradient without the target",
    "cross_entropy",
    "cross_entropy",
    "loss",
    lambda f, real, x, t: real(x, f.rolled(t, 1)),
    backward=True,
)


linear_fault(
    "k of the position before",
    "layers.0.attn.k",
    lambda f, real, x, w, b, c: f.rolled(real(x, w, b, c), 1, x.shape[1] - 1),
)
linear_fault(
    "gate's weight gradient of half the positions",
    "layers.0.ffn.gate",
    lambda f, real, x, w, b, c: f.joined(
        [
            real(f.part(x, 1, 0, x.shape[1] // 2), w, b, c),
            real(f.part(x, 1, x.shape[1] // 2, x.shape[1]), f.constant(w), b, c),
        ],
        1,
    ),
    backward=True,
)
linear_fault(
    "q's input without its gradient",
    "layers.1.attn.q",
    lambda f, real, x, w, b, c: real(f.frozen(x), w, b, c),
    backward=True,
)
operator_fault("stream scaled by 1 + 1e-5", "add", "add", "layers.1", lambda f, real, x, y: real(x * (1 + 1e-5), y))
operator_fault(
    "gate's slope of the identity",
    "swiglu",
    "swiglu",
    "layers.0.ffn.act",
    lambda f, real, g, u, s: real(f.constant(g), u, s) + (g - f.constant(g)) * u,
    backward=True,
)
operator_fault(
    "gain's gradient of one row of the batch",
    "rms_norm",
    "rms_norm",
    "layers.1.attn_norm",
    lambda f, real, x, w, *r: f.joined(
        [real(f.part(x, 0, 0, 1), w, *r), real(f.part(x, 0, 1, x.shape[0]), f.constant(w), *r)], 0
    ),
    backward=True,
)
operator_fault(
    "first position's logits of the second",
    "cross_entropy",
    "cross_entropy",
    "loss",
    lambda f, real, x, t: real(f.joined([f.part(x, -2, 1, 2), f.part(x, -2, 1, x.shape[-2])], -2), t),
)


# Layer norms, gelu, xPos and biases of FLM-101B.
def _flm(name: str, function: str, operator: str, site: str, wrong: Any, backward: bool = False) -> None:
    operator_fault(name, function, operator, site, wrong, backward=backward, preset="flm-tiny")


_flm(
    "unbiased variance",
    "layer_norm",
    "layer_norm",
    "layers.0.attn_norm",
    lambda f, real, x, w, *r: real(x, w * 0.996, *r),
)
_flm(
    "layer norm's bias missed", "layer_norm", "layer_norm", "norm", lambda f, real, x, w, b, *r: real(x, w, b * 0.0, *r)
)
_flm("gelu by sigmoid", "gelu", "gelu", "layers.1.ffn.act", lambda f, real, x: x * f.sigmoid(x * 1.702))
_flm(
    "xpos scales swapped",
    "rope_qk",
    "rope",
    "layers.1.attn.rope_q",
    lambda f, real, q, k, c, s, a, b: real(q, k, c, s, b, a),
)
_flm(
    "xpos scales missed", "rope_qk", "rope", "layers.0.attn.rope_q", lambda f, real, q, k, c, s, a, b: real(q, k, c, s)
)
_flm(
    "gelu's gradient of relu",
    "gelu",
    "gelu",
    "layers.0.ffn.act",
    lambda f, real, x: x * f.constant(f.sigmoid(9.0 * x)),
    True,
)
linear_fault("q bias missed", "layers.1.attn.q", lambda f, real, x, w, b, c: real(x, w, b * 0.0, c), preset="flm-tiny")
linear_fault("up bias twice", "layers.0.ffn.up", lambda f, real, x, w, b, c: real(x, w, b + b, c), preset="flm-tiny")


def _reversed_everywhere(backend: str) -> Changes:
    ops = load(backend, "ops")
    real = ops.rope_qk
    yield ops, "rope_qk", lambda q, k, cos, sin, *scales: real(q, k, cos, -sin, *scales)


fault("rotation reversed everywhere", "rope", "layers.0.attn.rope_q", "forward", _reversed_everywhere)

operator_fault(
    "one gain for all channels",
    "rms_norm",
    "rms_norm",
    "layers.1.attn_norm",
    lambda f, real, x, w, *r: real(x, f.mean(w, -1) + w * 0.0, *r),
)
linear_fault("v reads channels one on", "layers.1.attn.v", lambda f, real, x, w, b, c: real(f.rolled(x, -1), w, b, c))
operator_fault(
    "slowest pair not rotated",
    "rope_qk",
    "rope",
    "layers.0.attn.rope_q",
    lambda f, real, q, k, a, b: real(q, k, a, f.without_last(b, -1)),
)
operator_fault(
    "query heads of the next group",
    "attention",
    "attention",
    "layers.0.attn.core",
    lambda f, real, q, k, v, s: real(f.rolled(q, 2), k, v, s),
)
operator_fault(
    "gate without gradient",
    "swiglu",
    "swiglu",
    "layers.1.ffn.act",
    lambda f, real, g, u, s: real(f.frozen(g), u, s),
    backward=True,
)
linear_fault(
    "o's weight gradient of the first row of the batch twice",
    "layers.1.attn.o",
    lambda f, real, x, w, b, c: (
        real(f.joined([f.constant(f.part(x, 0, 0, 1)) * 2.0, f.constant(f.part(x, 0, 1, x.shape[0]))], 0), w, b, c)
        + real(x, f.constant(w), b * 0.0, c)
    ),
    backward=True,
)
