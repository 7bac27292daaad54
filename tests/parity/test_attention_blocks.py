"""Attention put together from blocks of keys, as a ring does it, against attention over all keys at once (float64).

In float32 the error must not depend on the number of blocks: 2e-6 relative for the output and each gradient, ten times
what a float32 emulation in numpy measures (2e-7 to 4e-7).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from tests.support.frameworks import BACKENDS

B, S, H, K, D = 2, 48, 4, 2, 8
LIMIT = 2e-6


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {"q": (B, S, H, D), "k": (B, S, K, D), "v": (B, S, K, D), "grad": (B, S, H, D)}
    return {name: (2 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def truth() -> dict[str, np.ndarray]:
    q, k, v, grad = (x.astype(np.float64) for x in inputs().values())
    visible = np.tri(S, dtype=bool)[None]
    out, log_sum_exp = reference.attention(q, k, v, visible)
    dq, dk, dv = reference.attention_backward(grad, q, k, v, visible, out, log_sum_exp)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def in_blocks(backend: str, parts: int, final_lse: bool = True, weigh: bool = True) -> dict[str, np.ndarray]:
    """All queries against ``parts`` blocks of keys, one after another, from the last one to the first.

    ``final_lse`` and ``weigh`` off are the faults of a wrong ring: a block's own log-sum-exp in the backward, and
    partial outputs averaged instead of merged.
    """
    ops, to_tensor, to_numpy = load(backend, "ops"), load(backend, "model").to_tensor, load(backend, "model").to_numpy
    q, k, v, grad = (to_tensor(np.ascontiguousarray(x.transpose(0, 2, 1, 3))) for x in inputs().values())
    size = S // parts
    blocks = [slice(i * size, (i + 1) * size) for i in range(parts)]
    masks = [ops.hidden_keys(np.tri(S, dtype=bool)[None, :, block]) for block in blocks]
    # The first block to come must be one that every query sees something of; a ring begins with its own keys.
    order = [0, *range(parts - 1, 0, -1)]
    out: Any = None
    own_lse = {}
    for i in order:
        part, lse = ops.attention_block(q, k[:, :, blocks[i]], v[:, :, blocks[i]], masks[i])
        own_lse[i] = lse
        if out is None:
            out, log_sum_exp = part, lse
        elif weigh:
            out, log_sum_exp = ops.merge_blocks(out, log_sum_exp, part, lse)
        else:
            out = (out + part) / 2
    delta = (out * grad).sum(-1, keepdims=True)
    dq, dk, dv = 0, {}, {}
    for i in order:
        lse = log_sum_exp if final_lse else own_lse[i]
        block_k, block_v = k[:, :, blocks[i]], v[:, :, blocks[i]]
        dq_part, dk[i], dv[i] = ops.attention_block_backward(q, block_k, block_v, masks[i], lse, grad, delta)
        dq = dq + dq_part

    def joined(pieces: dict[int, Any]) -> np.ndarray:
        return np.concatenate([to_numpy(pieces[i]) for i in range(parts)], 2)

    results = {"out": to_numpy(out), "dq": to_numpy(dq), "dk": joined(dk), "dv": joined(dv)}
    return {name: x.transpose(0, 2, 1, 3) for name, x in results.items()}


def errors(got: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: relative_frobenius(got[name], expected) for name, expected in truth().items()}


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8, 16, 48])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_make_the_whole(backend: str, parts: int) -> None:
    assert all(error <= LIMIT for error in errors(in_blocks(backend, parts)).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_faults_are_far_beyond_the_limit(backend: str) -> None:
    own = errors(in_blocks(backend, 4, final_lse=False))
    assert own["out"] <= LIMIT and min(own["dq"], own["dk"], own["dv"]) > 1e3 * LIMIT
    assert errors(in_blocks(backend, 4, weigh=False))["out"] > 1e3 * LIMIT


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_which_nothing_is_seen_weighs_nothing(backend: str) -> None:
    ops, to_tensor, to_numpy = load(backend, "ops"), load(backend, "model").to_tensor, load(backend, "model").to_numpy
    q, k, v, _ = (to_tensor(np.ascontiguousarray(x.transpose(0, 2, 1, 3))) for x in inputs().values())
    out, lse = ops.attention_block(q, k, v, None)
    nothing, its_lse = ops.attention_block(q, k, v, ops.hidden_keys(np.zeros((1, S, S), bool)))
    merged, merged_lse = ops.merge_blocks(out, lse, nothing, its_lse)
    np.testing.assert_array_equal(to_numpy(merged), to_numpy(out))
    np.testing.assert_array_equal(to_numpy(merged_lse), to_numpy(lse))
