"""Fused operators in Triton on torch tensors: functions without autograd (definitions: kernels.reference).

NVIDIA GPUs through triton, Ascend through triton-ascend, and for tests the CPU through Triton's interpreter.
"""

from __future__ import annotations

from telechat_twins.kernels.triton.adamw import adamw
from telechat_twins.kernels.triton.attention import attention, merge_blocks
from telechat_twins.kernels.triton.attention_backward import attention_backward, attention_delta
from telechat_twins.kernels.triton.cross_entropy import cross_entropy_backward, cross_entropy_forward
from telechat_twins.kernels.triton.embedding import embedding, embedding_backward
from telechat_twins.kernels.triton.norm import (
    add_rms_norm,
    add_rms_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from telechat_twins.kernels.triton.pointwise import gelu, gelu_backward, swiglu, swiglu_backward
from telechat_twins.kernels.triton.rope import rope_qk, rope_qk_backward

__all__ = [
    "adamw",
    "add_rms_norm",
    "add_rms_norm_backward",
    "attention",
    "attention_backward",
    "attention_delta",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "embedding",
    "embedding_backward",
    "gelu",
    "gelu_backward",
    "layer_norm",
    "layer_norm_backward",
    "merge_blocks",
    "rms_norm",
    "rms_norm_backward",
    "rope_qk",
    "rope_qk_backward",
    "swiglu",
    "swiglu_backward",
]
