"""The frameworks' private names exist as kernels/*/private.py uses them; a release that changes one fails here."""

from __future__ import annotations

import inspect
import re

import mindspore as ms
import pytest
import torch
from mindspore.mint.distributed import distributed

from telechat_twins.kernels.mindspore import private as ms_private
from telechat_twins.kernels.pytorch import private as pt_private


def test_mindspore_has_custom_gradients() -> None:
    base = ms_private.Function.__base__
    assert (base.__module__, base.__name__) == ("mindspore.common._grad_function", "_Function")
    assert callable(base.apply)


def test_mindspore_runs_backward_from_python() -> None:
    named = re.findall(r"(\w+): \w+", ms_private.run_backward.__doc__.splitlines()[0])
    assert named[:6] == ["tensors", "grad_tensors", "keep_graph", "create_graph", "inputs", "allow_unreachable"]
    assert ms_private.recording() is False and not inspect.signature(ms_private.executor.grad_flag).parameters


def test_mindspore_tells_leaves_from_what_it_computed() -> None:
    seen: list[bool] = []

    class Double(ms_private.Function):
        @staticmethod
        def forward(ctx: ms_private.Context, x: ms.Tensor) -> ms.Tensor:
            seen.append(ms_private.is_leaf(x))
            return x + x

        @staticmethod
        def backward(ctx: ms_private.Context, grad: ms.Tensor) -> ms.Tensor:
            return grad + grad

    ms.grad(lambda x: Double.apply(Double.apply(x)).sum())(ms.Tensor([1.0]))
    assert seen == [True, False] and ms_private.is_leaf(ms.Tensor([1.0]))


def test_mindspore_loads_a_compiled_extension() -> None:
    parameters = inspect.signature(ms.ops.CustomOpBuilder._import_module).parameters
    assert next(iter(parameters)) == "module_path"


def test_mindspore_keeps_the_world_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_GROUP_RANK_CACHE", dict(distributed._GROUP_RANK_CACHE))
    ms_private.set_world_rank(3)
    assert distributed.get_cache_group_rank() == 3


SCHEMAS = {
    "mkldnn::_linear_pointwise": "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)",
    "mkldnn::_reorder_linear_weight": "(Tensor self, int? batch_size=None)",
    "mkldnn::_is_mkldnn_bf16_supported": "()",
    "aten::_foreach_norm": "(Tensor[] self, Scalar ord=2, ScalarType? dtype=None)",
    "aten::_foreach_mul_": "(Tensor(a!)[] self, Scalar scalar)",
}


@pytest.mark.parametrize("operator", SCHEMAS)
def test_pytorch_has_the_operator(operator: str) -> None:
    schemas = [str(schema) for schema in torch._C._jit_get_schemas_for_operator(operator)]
    assert any(SCHEMAS[operator] in schema for schema in schemas), schemas


def test_views_of_one_storage_share_a_key() -> None:
    x, other = torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")
    assert pt_private.storage_key(x) == pt_private.storage_key(x.t()) != pt_private.storage_key(other)


def test_triton_has_bindings_to_mlir() -> None:
    pytest.importorskip("triton")
    ir = pt_private.triton_ir()
    assert callable(ir.context) and callable(ir.load_dialects)
