"""Faults of the model's arithmetic: one process against one device's right model and float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from telechat_twins.core.backends import load
from tests.mutation.fault import FORWARD, Change, Tensors, fault

Changes = Iterator[Change]


def _linear(backend: str, wrong: Callable[..., Any]) -> Changes:
    """``wrong(real, x, weight, bias, compute)`` in the place of every product."""
    ops = load(backend, "ops")
    real = ops.linear
    yield ops, "linear", lambda x, w, b, c, again=None: wrong(real, x, w, b, c)


def _rms(backend: str, wrong: Callable[..., Any]) -> Changes:
    """``wrong(real, x, weight, eps, stat, compute, mask)`` in the place of every RMS norm, fused with a sum or not."""
    ops = load(backend, "ops")
    real = ops.rms_norm

    def norm(x: Any, weight: Any, eps: float, stat: Any, compute: Any, mask: Any = None) -> Any:
        return wrong(real, x, weight, eps, stat, compute, mask)

    yield ops, "rms_norm", norm
    yield ops, "add_rms_norm", lambda x, residual, *rest: (norm(residual + x, *rest), residual + x)


def _rope(backend: str, wrong: Callable[..., Any]) -> Changes:
    """``wrong(real, q, k, cos, sin, *scales)`` in the place of the rotation."""
    ops = load(backend, "ops")
    real = ops.rope_qk
    yield ops, "rope_qk", lambda *args: wrong(real, *args)


def _attention(backend: str, wrong: Callable[..., Any]) -> Changes:
    """``wrong(real, q, k, v, visible)`` in the place of attention."""
    ops = load(backend, "ops")
    real = ops.attention
    yield ops, "attention", lambda *args: wrong(real, *args)


@fault("remainder", "layout single", "loss")
def attention_output_bias_missed(backend: str) -> Changes:
    """Of TeleChat2's two biases only the one after the ffn is added."""
    return _linear(
        backend, lambda real, x, w, b, c: real(x, w, b if b is None or w.shape[0] != w.shape[1] else b * 0.0, c)
    )  # fmt: skip


@fault("remainder", "layout single", "loss")
def ffn_output_bias_missed(backend: str) -> Changes:
    """Of TeleChat2's two biases only the one after the attention is added."""
    return _linear(
        backend, lambda real, x, w, b, c: real(x, w, b if b is None or w.shape[0] >= w.shape[1] else b * 0.0, c)
    )  # fmt: skip


@fault("remainder", "layout single", r"gradient \(.*bias\)")
def bias_without_gradient(backend: str) -> Changes:
    """Biases are added as constants."""
    t = Tensors(backend)
    return _linear(backend, lambda real, x, w, b, c: real(x, w, None if b is None else t.constant(b) + b * 0.0, c))


@fault("twice", "layout single:flm", "loss")
def bias_added_twice(backend: str) -> Changes:
    """Once by the product and once after it."""
    return _linear(backend, lambda real, x, w, b, c: real(x, w, b, c) if b is None else real(x, w, b, c) + b)


@fault("factor", "layout single", "loss")
def eps_of_another_release(backend: str) -> Changes:
    """The norms' eps is 1e-6 where the release has 1e-5."""
    return _rms(backend, lambda real, x, w, eps, *rest: real(x, w, eps / 10, *rest))


@fault("factor", "layout single:fp64", "loss")
def eps_outside_the_root(backend: str) -> Changes:
    """x / (rms + eps) in the place of x / sqrt(mean(x^2) + eps)."""
    t = Tensors(backend)
    return _rms(backend, lambda real, x, w, eps, *rest: x / (t.mean(x * x, -1) ** 0.5 + eps) * w)


@fault("factor", "layout single", "loss")
def gain_plus_one(backend: str) -> Changes:
    """Gains are read as if the release kept them less 1, as Gemma's does."""
    return _rms(backend, lambda real, x, w, *rest: real(x, w + 1.0, *rest))


@fault("axis", "layout single", "loss")
def mean_subtracted(backend: str) -> Changes:
    """The RMS norm is computed as a layer norm."""
    t = Tensors(backend)
    return _rms(backend, lambda real, x, *rest: real(x - t.mean(x, -1), *rest))


@fault("axis", "layout single", "loss")
def statistics_over_positions(backend: str) -> Changes:
    """The mean of squares is taken over the sequence."""
    t = Tensors(backend)
    return _rms(backend, lambda real, x, w, eps, *rest: x / (t.mean(x * x, 1) + eps) ** 0.5 * w)


@fault("remainder", "layout single", r"gradient \(.*norm")
def gain_without_gradient(backend: str) -> Changes:
    """Gains of norms are multiplied as constants."""
    t = Tensors(backend)
    return _rms(backend, lambda real, x, w, *rest: real(x, t.constant(w) + w * 0.0, *rest))


@fault("stale", "layout single", r"gradient")
def norm_statistics_as_constants(backend: str) -> Changes:
    """The gradient does not pass through the mean of squares."""
    t = Tensors(backend)
    return _rms(
        backend, lambda real, x, w, eps, *rest: x / t.constant((t.mean(x * x, -1) + eps) ** 0.5) * w
    )  # fmt: skip


@fault("axis", "layout single:flm", "loss")
def unbiased_variance(backend: str) -> Changes:
    """The layer norm divides by E - 1."""
    ops = load(backend, "ops")
    real = ops.layer_norm
    shrunk = (63 / 64) ** 0.5
    yield ops, "layer_norm", lambda x, w, *rest: real(x, w * shrunk, *rest)


@fault("remainder", "layout single:flm", "loss")
def layer_norm_bias_missed(backend: str) -> Changes:
    """The layer norm has a gain only."""
    ops = load(backend, "ops")
    real = ops.layer_norm
    yield ops, "layer_norm", lambda x, w, b, *rest: real(x, w, b * 0.0, *rest)


@fault("halves", "layout single", "loss")
def rotary_pairs_interleaved(backend: str) -> Changes:
    """Channels 2i and 2i + 1 are rotated together, in the place of i and i + D/2."""

    def halves(x: Any) -> Any:
        return x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).swapaxes(-1, -2).reshape(*x.shape)

    def pairs(x: Any) -> Any:
        return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).swapaxes(-1, -2).reshape(*x.shape)

    return _rope(backend, lambda real, q, k, *t: tuple(pairs(x) for x in real(halves(q), halves(k), *t)))


@fault("factor", "layout single", "loss")
def rotation_reversed(backend: str) -> Changes:
    """The sine has the other sign."""
    return _rope(backend, lambda real, q, k, cos, sin, *scales: real(q, k, cos, -sin, *scales))


@fault("remainder", "layout single", "loss")
def keys_not_rotated(backend: str) -> Changes:
    """Only queries know their positions."""
    return _rope(backend, lambda real, q, k, *tables: (real(q, k, *tables)[0], k))


@fault("position", "layout single", "loss")
def queries_one_position_on(backend: str) -> Changes:
    """Queries are rotated by the angle of the next position, keys by their own."""
    t = Tensors(backend)

    def wrong(real: Any, q: Any, k: Any, *tables: Any) -> Any:
        return real(q, k, *(t.rolled(table, 1) for table in tables))[0], real(q, k, *tables)[1]

    return _rope(backend, wrong)


@fault("halves", "layout single:flm", "loss")
def xpos_scales_swapped(backend: str) -> Changes:
    """Queries decay with the scales of keys."""
    return _rope(backend, lambda real, q, k, cos, sin, a, b: real(q, k, cos, sin, b, a))


@fault("factor", "layout single:flm", "loss")
def xpos_scales_missed(backend: str) -> Changes:
    """xPos is computed as plain rotary positions."""
    return _rope(backend, lambda real, q, k, cos, sin, a, b: real(q, k, cos, sin))


@fault("dtype", "layout single", "loss")
def rotary_tables_in_float16(backend: str) -> Changes:
    """Cosines and sines are stored in 16 bits, in a float32 run."""
    t = Tensors(backend)
    return _rope(backend, lambda real, q, k, *tables: real(q, k, *(t.rounded(x, "float16") for x in tables)))


@fault("factor", "layout single:longer", "loss")
def rotary_base_of_the_trained_length(backend: str) -> Changes:
    """A row longer than those of training has the rotary tables of a short one."""
    model = load(backend, "model")
    real = model.rope_tables
    yield model, "rope_tables", lambda config, positions, seq_len, wide: real(config, positions, 8, wide)


@fault("factor", "layout single", "loss")
def attention_scale_twice(backend: str) -> Changes:
    """Scores are divided by D, not by its root."""
    return _attention(backend, lambda real, q, k, v, visible: real(q * q.shape[-1] ** -0.5, k, v, visible))


@fault("position", "layout single", "loss")
def next_key_visible(backend: str) -> Changes:
    """A query sees the key after its own."""
    t = Tensors(backend)
    return _attention(
        backend, lambda real, q, k, v, visible: real(q, t.rolled(k, 1), t.rolled(v, 1), visible)
    )  # fmt: skip


@fault("halves", "layout single", "loss")
def heads_interleaved_over_kv_heads(backend: str) -> Changes:
    """Query head h reads kv head h % K, not h // (H / K)."""

    def wrong(real: Any, q: Any, k: Any, v: Any, visible: Any) -> Any:
        B, S, H, D = q.shape
        K = k.shape[2]
        q = q.reshape(B, S, H // K, K, D).swapaxes(2, 3).reshape(B, S, H, D)
        return real(q, k, v, visible).reshape(B, S, K, H // K, D).swapaxes(2, 3).reshape(B, S, H, D)

    return _attention(backend, wrong)


@fault("halves", "layout single", "loss")
def kv_heads_swapped(backend: str) -> Changes:
    """The first half of the query heads reads the keys and values of the second."""
    t = Tensors(backend)
    return _attention(
        backend, lambda real, q, k, v, visible: real(q, t.swapped(k, 2), t.swapped(v, 2), visible)
    )  # fmt: skip


@fault("halves", "layout single", "loss")
def keys_and_values_swapped(backend: str) -> Changes:
    """As when a packed matrix is cut in the wrong order."""
    return _attention(backend, lambda real, q, k, v, visible: real(q, v, k, visible))


@fault("remainder", "layout single:gather", "loss")
def documents_see_each_other(backend: str) -> Changes:
    """The documents of a row are not kept apart."""
    ops = load(backend, "ops")
    real = ops.attention_blocks
    yield ops, "attention_blocks", lambda queries, keys, doc_ids: real(queries, keys, None)


@fault("dtype", "layout single", "loss")
def probabilities_times_values_in_bfloat16(backend: str) -> Changes:
    """Attention's output is rounded to bfloat16 in a float32 run."""
    t = Tensors(backend)
    return _attention(backend, lambda real, *args: t.rounded(real(*args)))


@fault("halves", "layout single", "loss")
def gate_and_up_swapped(backend: str) -> Changes:
    """As when a packed matrix is cut in the wrong order."""
    ops = load(backend, "ops")
    real = ops.swiglu
    yield ops, "swiglu", lambda gate, up, stat: real(up, gate, stat)


@fault("factor", "layout single", "loss")
def gelu_gate(backend: str) -> Changes:
    """The gate has a (fast) gelu, x * sigmoid(1.702 x), not silu."""
    ops, t = load(backend, "ops"), Tensors(backend)
    yield ops, "swiglu", lambda gate, up, stat: gate * t.sigmoid(gate * 1.702) * up


@fault("factor", "layout single:flm", "loss")
def gelu_by_the_error_function(backend: str) -> Changes:
    """The exact form, in the place of the one by tanh that the model was trained with."""
    ops, t = load(backend, "ops"), Tensors(backend)
    yield ops, "gelu", lambda x: x * 0.5 * (t.erf(x * 0.7071067811865476) + 1.0)


@fault("stale", "layout single", "loss")
def ffn_reads_the_stream_before_attention(backend: str) -> Changes:
    """Both branches of a block read the same stream, as in parallel blocks."""
    ops = load(backend, "ops")
    norm, both = ops.rms_norm, ops.add_rms_norm
    yield ops, "add_rms_norm", lambda x, residual, *rest: (norm(residual, *rest), both(x, residual, *rest)[1])


@fault("remainder", "layout single", "loss")
def ffn_without_residual(backend: str) -> Changes:
    """The stream is replaced by the branch."""
    yield load(backend, "ops"), "add", lambda stream, branch: branch


@fault("factor", "layout single:flm", "loss")
def input_multiplier_missed(backend: str) -> Changes:
    """Embeddings enter as they are."""
    model = load(backend, "model")
    real = model.multiplied
    yield model, "multiplied", lambda x, factor: x if factor == 1.5 else real(x, factor)


@fault("factor", "layout single:flm", "loss")
def logit_multiplier_missed(backend: str) -> Changes:
    """Logits leave as they are."""
    model = load(backend, "model")
    real = model.multiplied
    yield model, "multiplied", lambda x, factor: x if factor == 0.5 else real(x, factor)


@fault("dtype", "layout single:odd+fp64", "loss")
def factor_in_float32(backend: str) -> Changes:
    """Multipliers are float32 numbers in a float64 run, as MindSpore makes of Python's."""
    model = load(backend, "model")
    real = model.multiplied
    yield model, "multiplied", lambda x, factor: real(x, float(np.float32(factor)))


@fault("group", "layout single:tied", r"gradient \(embed")
def tied_table_trained_by_the_head_alone(backend: str) -> Changes:
    """The lookup's part of the gradient of a tied table is lost."""
    ops, t = load(backend, "ops"), Tensors(backend)
    real = ops.embedding
    yield ops, "embedding", lambda table, ids: real(t.constant(table) + table * 0.0, ids)


@fault("position", "layout single", "loss")
def embedding_of_the_token_before(backend: str) -> Changes:
    """The lookup reads the row of the next smaller id."""
    ops, t = load(backend, "ops"), Tensors(backend)
    real = ops.embedding
    yield ops, "embedding", lambda table, ids: real(table, t.not_negative(ids - 1))


@fault("remainder", "layout single:grown", "loss")
def padding_rows_predicted(backend: str) -> Changes:
    """Rows of the vocabulary that stand for no token take part in the softmax."""
    yield load(backend, "model"), "padding_bias", lambda *args: None


@fault("growth", "layout single:grown", "loss")
def heads_without_mask(backend: str) -> Changes:
    """New heads count in full from the start."""
    return _without_mask(backend, 1)


@fault("growth", "layout single:grown", "loss")
def neurons_without_mask(backend: str) -> Changes:
    """New neurons count in full from the start."""
    return _without_mask(backend, 2)


@fault("growth", "layout single:grown", "loss")
def channels_without_mask(backend: str) -> Changes:
    """Norms count new channels in full from the start."""
    return _without_mask(backend, 0)


def _without_mask(backend: str, which: int) -> Changes:
    model = load(backend, "model")
    real = model.masks
    yield model, "masks", lambda *args: tuple(None if n == which else mask for n, mask in enumerate(real(*args)))


@fault("growth", "layout single:grown", "loss")
def norm_masked_after_its_statistics(backend: str) -> Changes:
    """The mask multiplies what a norm gives, and not what its mean is taken of."""

    def wrong(real: Any, x: Any, w: Any, eps: float, stat: Any, compute: Any, mask: Any) -> Any:
        out = real(x, w, eps, stat, compute, None)
        return out if mask is None else out * mask

    return _rms(backend, wrong)


@fault("growth", "layout single:grown", "loss")
def new_block_without_identity(backend: str) -> Changes:
    """A new block counts in full from the start."""
    block = load(backend, "model").DecoderBlock
    real = getattr(block, FORWARD[backend])

    def wrong(self: Any, *args: Any) -> Any:
        kept, self.mask = self.mask, None
        try:
            return real(self, *args)
        finally:
            self.mask = kept

    yield block, FORWARD[backend], wrong


@fault("growth", "layout single:zero", "loss")
def norm_divides_by_the_new_width(backend: str) -> Changes:
    """Norms of a model grown without masks take their mean over all channels."""
    norm = load(backend, "model").Norm
    real = norm.__init__

    def wrong(self: Any, *args: Any) -> None:
        real(self, *args)
        self.eps, self.share = self.eps / self.share, 1.0

    yield norm, "__init__", wrong


@fault("dtype", "layout single", "loss")
def stream_in_bfloat16(backend: str) -> Changes:
    """The stream between blocks is rounded to bfloat16 in a float32 run."""
    ops, t = load(backend, "ops"), Tensors(backend)
    real = ops.add
    yield ops, "add", lambda stream, branch: t.rounded(real(stream, branch))


@fault("dtype", "rounding", "norm")
def statistics_in_bfloat16(backend: str) -> Changes:
    """In a bfloat16 run, squares and their mean are rounded to bfloat16."""
    t = Tensors(backend)

    def wrong(real: Any, x: Any, w: Any, eps: float, stat: Any, compute: Any, mask: Any) -> Any:
        wide = t.cast(x, "float32")
        root = t.rounded(t.mean(t.rounded(wide * wide), -1) + eps) ** 0.5
        return t.cast(wide / root, compute) * w

    return _rms(backend, wrong)


@fault("dtype", "rounding", "norm")
def gain_before_the_rounding(backend: str) -> Changes:
    """A bfloat16 norm is multiplied by its gain in float32 and rounded once, where the released code rounds twice."""
    t = Tensors(backend)

    def wrong(real: Any, x: Any, w: Any, eps: float, stat: Any, compute: Any, mask: Any) -> Any:
        wide = t.cast(x, "float32")
        return t.cast(wide / (t.mean(wide * wide, -1) + eps) ** 0.5 * t.cast(w, "float32"), compute)

    return _rms(backend, wrong)
