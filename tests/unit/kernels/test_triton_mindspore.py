"""What the entry from MindSpore tensors would launch on an Ascend, launched on none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

from telechat_twins.core.model.visibility import causal_ranges  # noqa: E402
from telechat_twins.kernels.triton import mindspore_entry, ops  # noqa: E402
from telechat_twins.kernels.triton.blocks import ASCEND_910B3  # noqa: E402


def tensor(*shape: int, dtype: Any = ms.float16) -> Any:
    return ms.Tensor(np.ones(shape, np.float32), dtype)


def test_launches_get_the_tensors_themselves_and_new_results() -> None:
    x, weight = tensor(2, 3, 512), tensor(512)
    (out, rstd), launches = mindspore_entry.prepare("rms_norm", ASCEND_910B3, x, weight, 1e-5, ms.bfloat16)
    (launch,) = launches
    assert launch.arguments["x_ptr"] is x and launch.arguments["weight_ptr"] is weight
    assert launch.arguments["out_ptr"] is out and launch.arguments["rstd_ptr"] is rstd
    assert (out.shape, out.dtype) == ((2, 3, 512), ms.bfloat16) and (rstd.shape, rstd.dtype) == ((6,), ms.float32)
    assert launch.arguments["N"] == 6 and launch.arguments["residual_ptr"] is None


def test_attention_shares_what_its_kernels_share() -> None:
    q, k, grad = tensor(1, 16, 4, 64), tensor(1, 16, 2, 64), tensor(1, 16, 4, 64)
    seen = causal_ranges(16, 16)
    seen = seen._replace(ranges=ms.Tensor(seen.ranges))
    lse = tensor(1, 4, 16, dtype=ms.float32)
    gradients, launches = mindspore_entry.prepare("attention_backward", ASCEND_910B3, grad, q, k, k, seen, q, lse)
    delta, dq, dkdv = (launch.arguments for launch in launches)
    assert dq["delta_ptr"] is delta["delta_ptr"] is dkdv["delta_ptr"]
    assert dq["ranges_ptr"] is seen.ranges and dq["lse_ptr"] is lse and dq["q_ptr"] is q
    assert gradients[0] is dq["dq_ptr"] and gradients[1] is dkdv["dk_ptr"] and gradients[2] is dkdv["dv_ptr"]
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("operator", mindspore_entry.OPERATORS)
def test_operators_exist(operator: str) -> None:
    assert callable(getattr(ops, operator))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="operator: got 'embedding_backward', needs one of rms_norm"):
        mindspore_entry.prepare("embedding_backward", ASCEND_910B3, tensor(2, 3))
    with pytest.raises(TypeError, match="dtype: got Float64, needs"):
        mindspore_entry.prepare("gelu", ASCEND_910B3, tensor(2, 3, dtype=ms.float64))
    with pytest.raises(ValueError, match="up: got shape"):
        mindspore_entry.prepare("swiglu", ASCEND_910B3, tensor(2, 3), tensor(3, 3))
