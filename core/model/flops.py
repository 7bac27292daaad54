"""Floating-point operations per token."""

from __future__ import annotations

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import block_table


def flops_per_token(config: ModelConfig, seq_len: int, causal: bool = False) -> float:
    """Floating-point operations of one training token: 6 * N_matmul + 12 * L * H*D * S.

    N_matmul counts weights that multiply (the head does, tied or not; the embedding is a look-up). A forward product
    costs 2 per weight and the backward twice that. Attention: scores and their product with the values, 2 * 2*S*H*D a
    layer forward, times 3; ``causal`` counts only the half below the diagonal. The default counts the full square, the
    convention of published MFU figures, so that figures compare. Recomputation is not counted.
    """
    block = sum(spec.size for spec in block_table(config).values() if spec.kind == "matrix")
    matmul = config.num_layers * block + config.vocab_size * config.hidden_size
    attention = 12.0 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6.0 * matmul + (attention / 2 if causal else attention)
