"""CANN operators of MindSpore 2.9, one function each, all called through ``kernels.ascend.rehearsal.call``.

The functions take only the arguments that this project sets; the others have MindSpore's documented defaults.
Argument names, and the order and form of the results, are those of mindspore.ops.auto_generate.gen_ops_prim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import ParamSpec, TypeVar

from mindspore import Tensor, ops
from mindspore.ops.auto_generate import gen_ops_prim as prim

from telechat_twins.kernels.ascend.rehearsal import call

ANY_DISTANCE = 2147483647  # pre_tokens and next_tokens without effect: sparse_mode decides

P = ParamSpec("P")
R = TypeVar("R")


def cann(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function that calls the operator ``name``: on the device, or by its definition in a rehearsal."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def calling(*args: P.args, **kwargs: P.kwargs) -> R:
            return call(name, function, *args, **kwargs)

        return calling

    return decorate


@cann("RmsNorm")
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(y, rstd float32 [..., 1])."""
    return ops.rms_norm(x, gamma, epsilon)


@cann("RmsNormGrad")
def rms_norm_grad(dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dgamma float32)."""
    return prim.RmsNormGrad()(dy, x, rstd, gamma)


@cann("AddRmsNorm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, rstd float32 [..., 1], x1 + x2)."""
    return ops.add_rms_norm(x1, x2, gamma, epsilon)


@cann("LayerNormExt")
def layer_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean [..., 1], rstd [..., 1])."""
    return prim.LayerNormExt()(input, normalized_shape, weight, bias, eps)


@cann("LayerNormGradExt")
def layer_norm_grad(
    dy: Tensor, x: Tensor, normalized_shape: tuple[int, ...], mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta). The fifth argument, the forward's third output, is named variance in MindSpore."""
    return prim.LayerNormGradExt()(dy, x, normalized_shape, mean, rstd, gamma, beta)


@cann("Swiglu")
def swiglu(input: Tensor, dim: int) -> Tensor:
    """silu of the first half along ``dim`` times the second half."""
    return ops.swiglu(input, dim)


@cann("SwigluGrad")
def swiglu_grad(grad_output: Tensor, input: Tensor, dim: int) -> Tensor:
    """The gradient of ``input``."""
    return prim.SwigluGrad()(grad_output, input, dim)


@cann("GeluExt")
def gelu(input: Tensor, approximate: str) -> Tensor:
    """``approximate``: "tanh" or "none"."""
    return prim.GeluExt()(input, approximate)


@cann("GeluGradExt")
def gelu_grad(grad: Tensor, input: Tensor, approximate: str) -> Tensor:
    """The gradient of ``input``."""
    return prim.GeluGradExt()(grad, input, approximate)


@cann("RotaryPositionEmbedding")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
    """Rotary embedding; mode 0: half rotation, 1: interleaved pairs. cos and sin have all D columns."""
    return ops.rotary_position_embedding(x, cos, sin, mode)


@cann("RotaryPositionEmbeddingGrad")
def rotary_grad(dy: Tensor, cos: Tensor, sin: Tensor, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dcos, dsin); the last two are undefined without the forward's x, which is not passed here."""
    return prim.RotaryPositionEmbeddingGrad()(dy, cos, sin, None, mode)


@cann("FlashAttentionScore")
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    actual_seq_qlen: tuple[int, ...] | None,
    actual_seq_kvlen: tuple[int, ...] | None,
    head_num: int,
    scale_value: float,
    input_layout: str,
    sparse_mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(softmax_max, softmax_sum, an unused result, attention_out)."""
    operator = _attention(head_num, scale_value, input_layout, sparse_mode)
    return operator(query, key, value, None, None, None, attn_mask, None, actual_seq_qlen, actual_seq_kvlen)


@cann("FlashAttentionScoreGrad")
def flash_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    attn_mask: Tensor | None,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    attention_in: Tensor,
    actual_seq_qlen: tuple[int, ...] | None,
    actual_seq_kvlen: tuple[int, ...] | None,
    head_num: int,
    scale_value: float,
    input_layout: str,
    sparse_mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, an unused result)."""
    operator = _attention_grad(head_num, scale_value, input_layout, sparse_mode)
    return operator(
        query,
        key,
        value,
        dy,
        atten_mask=attn_mask,
        softmax_max=softmax_max,
        softmax_sum=softmax_sum,
        attention_in=attention_in,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
    )


@cann("RingAttentionUpdate")
def ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(attn_out, softmax_max, softmax_sum)."""
    before = (prev_attn_out, prev_softmax_max, prev_softmax_sum)
    return ops.ring_attention_update(*before, cur_attn_out, cur_softmax_max, cur_softmax_sum, layout=layout)


@cann("FusedInferAttentionScore")
def fused_infer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None,
    actual_seq_lengths: Sequence[int],
    actual_seq_lengths_kv: Sequence[int],
    num_heads: int,
    scale: float,
    input_layout: str,
    num_key_value_heads: int,
    sparse_mode: int,
    softmax_lse_flag: bool,
    block_table: Tensor | None = None,
    block_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """(attention_out, log_sum_exp float32 [B, N, S, 1], or one zero without ``softmax_lse_flag``).

    With ``block_table`` int32 [B, M], for one query per row, key and value are blocks [P, block_size, K * D].
    """
    return ops.fused_infer_attention_score(
        query,
        key,
        value,
        atten_mask=atten_mask,
        actual_seq_lengths=list(actual_seq_lengths),
        actual_seq_lengths_kv=list(actual_seq_lengths_kv),
        num_heads=num_heads,
        scale=scale,
        input_layout=input_layout,
        num_key_value_heads=num_key_value_heads,
        sparse_mode=sparse_mode,
        softmax_lse_flag=softmax_lse_flag,
        block_table=block_table,
        block_size=block_size,
        inner_precise=0,  # high precision; every row has a visible key
    )


@cann("InplaceIndexCopy")
def index_copy(input: Tensor, dim: int, index: Tensor, tensor: Tensor) -> Tensor:
    """Write the rows ``tensor`` to the rows ``index`` of ``input``, in place."""
    return input.index_copy_(dim, index, tensor)


@cann("EmbeddingDenseBackward")
def embedding_grad(grad: Tensor, indices: Tensor, num_weights: int) -> Tensor:
    """Rows of ``grad`` [N, E] summed by index into [num_weights, E]."""
    return prim.EmbeddingDenseBackward()(grad, indices, num_weights, None, False)


@cann("AdamW")
def adamw(
    var: Tensor,
    m: Tensor,
    v: Tensor,
    gradient: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes var, m and v in place. ``step`` [1] counts from 0: the operator adds 1 before the bias correction."""
    # Without amsgrad max_v is neither read nor written; mindspore.mint.optim.AdamW passes v for it, too.
    return prim.AdamW()(var, m, v, v, gradient, step, lr, beta1, beta2, decay, eps, False, False)


@cache
def _attention(head_num: int, scale: float, layout: str, sparse_mode: int) -> prim.FlashAttentionScore:
    return prim.FlashAttentionScore(head_num, 1.0, scale, ANY_DISTANCE, ANY_DISTANCE, 0, layout, sparse_mode)


@cache
def _attention_grad(head_num: int, scale: float, layout: str, sparse_mode: int) -> prim.FlashAttentionScoreGrad:
    return prim.FlashAttentionScoreGrad(head_num, 1.0, scale, ANY_DISTANCE, ANY_DISTANCE, 0, layout, sparse_mode)
