"""The calls of torch_npu: bound to the recorded schemas, answered by the numpy definitions, compared in float64.

torch_npu imports only where CANN is; here every operator is replaced by one that binds its arguments to the schema that
the wheel declares (names, order, types) and answers with what kernels.ascend.definitions says, in the order and number
of the schema's results. Limits as in tests/parity/test_rehearsal.py: two spacings of the dtype.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.visibility import KeyRanges, causal_ranges
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.ascend import definitions as define
from telechat_twins.kernels.ascend.operands import Operand
from telechat_twins.kernels.pytorch import npu_signatures

torch = pytest.importorskip("torch")

from telechat_twins.kernels.pytorch import npu as npu  # noqa: E402

SPACING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
Given = dict[str, Any]


def operand(x: Any) -> Operand:
    name = str(x.dtype).removeprefix("torch.")
    return Operand((x.double() if x.is_floating_point() else x).numpy().copy(), name)


def tensor(x: np.ndarray, dtype: str = "float32") -> Any:
    return torch.from_numpy(np.ascontiguousarray(x, np.float64)).to(getattr(torch, dtype))


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return tensor(x, dtype).double().numpy()


def fusion_attention(given: Given) -> list[Any]:
    names = {"atten_mask": "attn_mask", "scale": "scale_value"}
    given = {names.get(name, name): value for name, value in given.items()}
    lengths = {"attn_mask": None, "actual_seq_qlen": None, "actual_seq_kvlen": None}
    top, total, nothing, out = define.fusion_attention(**lengths | tuples(given))
    return [out, top, total, nothing, 0, 0, 0]


def fusion_attention_grad(given: Given) -> list[Any]:
    given = {"attn_mask" if name == "atten_mask" else name: value for name, value in given.items()}
    lengths = {"attn_mask": None, "actual_seq_qlen": None, "actual_seq_kvlen": None}
    results = define.fusion_attention_grad(**lengths | tuples(given))
    return [*results, Operand(np.zeros(0), "float32")]


def tuples(given: Given) -> Given:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def adam_w(given: Given) -> list[Any]:
    """The powers are those before this update: beta1^(t-1), and the operator multiplies by beta1 once more."""
    count = np.log(given["beta1_power"]) / np.log(given["beta1"])
    assert given["beta2_power"] == pytest.approx(given["beta2"] ** count) and not given["amsgrad"]
    state = (given["var"], given["m"], given["v"], given["grad"], Operand(np.array([round(count)]), "int64"))
    rates = (given["lr"], given["beta1"], given["beta2"], given["weight_decay"], given["epsilon"])
    return list(define.adamw(*state, *rates))


def inference(given: Given) -> list[Any]:
    assert given.pop("inner_precise") == 0
    return list(define.fused_infer_attention(**given))


ANSWERS: dict[str, Callable[[Given], list[Any]]] = {
    "npu_rms_norm": lambda g: list(define.rms_norm(g["self"], g["gamma"], g["epsilon"])),
    "npu_rms_norm_backward": lambda g: list(define.rms_norm_grad(g["dy"], g["self"], g["rstd"], g["gamma"])),
    "npu_add_rms_norm": lambda g: list(define.add_rms_norm(**g)),
    "npu_swiglu": lambda g: [define.swiglu(g["self"], g["dim"])],
    "npu_swiglu_backward": lambda g: [define.swiglu_grad(g["grad_output"], g["self"], g["dim"])],
    "npu_gelu": lambda g: [define.gelu(g["self"], g["approximate"])],
    "npu_gelu_backward": lambda g: [define.gelu_grad(g["grad_output"], g["self"], g["approximate"])],
    "npu_rotary_mul": lambda g: [define.rotary(g["self"], g["r1"], g["r2"], ["half", ""].index(g["rotary_mode"]))],
    "npu_fusion_attention": fusion_attention,
    "npu_fusion_attention_grad": fusion_attention_grad,
    "npu_ring_attention_update": lambda g: list(define.ring_update(layout=g.pop("input_layout"), **g)),
    "npu_fused_infer_attention_score": inference,
    "npu_apply_adam_w.out": adam_w,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()

    def operator(name: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            bound = npu_signatures.bind(name, args, kwargs, torch.Tensor)
            given = {key: operand(x) if isinstance(x, torch.Tensor) else x for key, x in bound.items()}
            results = ANSWERS[name](given)
            assert len(results) == len(npu_signatures.SCHEMAS[name].results)
            counts[name] += 1
            answers = [tensor(r.value, r.dtype) if isinstance(r, Operand) else r for r in results]
            if name.endswith(".out"):
                for target, answer in zip(("var", "m", "v"), answers, strict=True):
                    bound[target].copy_(answer)
            return answers[0] if len(answers) == 1 else tuple(answers)

        return called

    monkeypatch.setattr(npu, "operator", operator)
    yield counts


def near(got: Any, truth: Any, dtype: str) -> None:
    assert len(truth)
    for found, expected in zip(got, truth, strict=True):
        found = found.double().numpy()
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
        seen = np.isfinite(expected)
        assert relative_frobenius(found[seen], expected[seen]) <= 2 * SPACING[dtype] if seen.any() else True


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", SPACING)
def test_norms(calls: Counter[str], dtype: str, masked: bool) -> None:
    rng = np.random.default_rng(1)
    x, more, grad = (rounded(rng.normal(size=(2, 5, 7)), dtype) for _ in range(3))
    weight = rounded(rng.uniform(0.5, 1.5, 7), dtype)
    mask = np.clip(np.linspace(1.5, -0.5, 7), 0.0, 1.0) if masked else None
    held = None if mask is None else tensor(mask)
    xt, mt, gt, wt = (tensor(a, dtype) for a in (x, more, grad, weight))
    out, rstd = npu.rms_norm(xt, wt, 1e-5, xt.dtype, held)
    assert rstd.shape == (10,) and rstd.dtype == torch.float32
    backward = npu.rms_norm_backward(gt, xt, wt, rstd, held)
    truth = (reference.rms_norm(x, weight, 1e-5, mask), *reference.rms_norm_backward(grad, x, weight, 1e-5, mask))
    near((out, *backward), truth, dtype)
    out, stream, rstd = npu.add_rms_norm(xt, mt, wt, 1e-5, xt.dtype, held)
    near((out, stream), (reference.rms_norm(x + more, weight, 1e-5, mask), x + more), dtype)
    backward = npu.add_rms_norm_backward(gt, mt, stream, wt, rstd, held)
    seen = stream.double().numpy()
    near(backward, reference.add_rms_norm_backward(grad, more, seen, weight, 1e-5, mask), dtype)


@pytest.mark.parametrize("dtype", SPACING)
def test_activations_and_rotation(calls: Counter[str], dtype: str) -> None:
    rng = np.random.default_rng(2)
    gate, up, grad = (rounded(rng.normal(size=(3, 7)), dtype) for _ in range(3))
    gt, ut, dt = (tensor(a, dtype) for a in (gate, up, grad))
    near([npu.swiglu(gt, ut)], [reference.swiglu(gate, up)], dtype)
    near(npu.swiglu_backward(dt, gt, ut), reference.swiglu_backward(grad, gate, up), dtype)
    near([npu.gelu(gt), npu.gelu_backward(dt, gt)], [reference.gelu(gate), reference.gelu_backward(grad, gate)], dtype)
    q, k = rounded(rng.normal(size=(2, 5, 4, 8)), dtype), rounded(rng.normal(size=(2, 5, 2, 8)), dtype)
    angle = rng.uniform(0, 6, (1, 5, 1, 4))
    cos, sin = rounded(np.cos(angle), "float32"), rounded(np.sin(angle), "float32")
    scale = rounded(rng.uniform(0.5, 2, cos.shape), "float32")
    got = npu.rope_qk(tensor(q, dtype), tensor(k, dtype), tensor(cos), tensor(sin), tensor(scale), None)
    near(got, reference.rope_qk(q, k, cos, sin, scale, None), dtype)


DOCUMENTS = np.array([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2, 3]])
RANGES = {
    "one query": causal_ranges(1, 6),
    "causal": causal_ranges(7, 7),
    "last of more keys": causal_ranges(3, 7),
    "documents": causal_ranges(7, 7, DOCUMENTS),
    "last of documents": causal_ranges(3, 7, DOCUMENTS),
    "runs": KeyRanges(np.int32([[[0, 2], [1, 3], [2, 2]]]), 3, "ranges"),
}


@pytest.mark.parametrize("D", [8, 16])
@pytest.mark.parametrize("dtype", SPACING)
@pytest.mark.parametrize("what", RANGES)
def test_attention(calls: Counter[str], what: str, dtype: str, D: int) -> None:
    key_ranges = RANGES[what]
    rng = np.random.default_rng(3)
    S, T = key_ranges.ranges.shape[1], key_ranges.num_keys
    q, grad = (rounded(rng.normal(size=(2, S, 4, D)), dtype) for _ in range(2))
    k, v = (rounded(rng.normal(size=(2, T, 2, D)), dtype) for _ in range(2))
    visible = reference.visible_keys(key_ranges.ranges, T)
    qt, kt, vt, gt = (tensor(a, dtype) for a in (q, k, v, grad))
    out, lse = npu.attention(qt, kt, vt, key_ranges)
    near((out, lse), reference.attention(q, k, v, visible), dtype)
    gradients = npu.attention_backward(gt, qt, kt, vt, key_ranges, out, lse)
    seen, exact = out.double().numpy(), reference.attention(q, k, v, visible)[1]
    near(gradients, reference.attention_backward(grad, q, k, v, visible, seen, exact), dtype)
    delta = (gt.double() * out.double()).sum(-1).transpose(1, 2).float()
    near(
        npu.attention_backward(gt, qt, kt, vt, key_ranges, None, lse, delta=delta),
        [g.double().numpy() for g in gradients],
        dtype,
    )


def test_union_of_blocks(calls: Counter[str]) -> None:
    rng = np.random.default_rng(4)
    out, more = (rounded(rng.normal(size=(2, 3, 4, 8)), "float32") for _ in range(2))
    lse, other = (rounded(rng.normal(size=(2, 4, 3)), "float32") for _ in range(2))
    lse[0, 0, 0] = other[0, 0, 0] = other[1, 2, 1] = -np.inf
    out[0, 0, 0] = more[0, 0, 0] = 0.0
    got = npu.merge_blocks(tensor(out), tensor(lse), tensor(more), tensor(other))
    near(got, reference.merge_blocks(out, lse, more, other), "float32")


@pytest.mark.parametrize("dtype", SPACING)
@pytest.mark.parametrize("S", [1, 4])
def test_attention_over_a_cache(calls: Counter[str], S: int, dtype: str) -> None:
    rng = np.random.default_rng(5)
    q, cache = rounded(rng.normal(size=(2, S, 4, 16)), dtype), np.full((2, 2, 9, 2, 16), np.nan)
    cache[:, :, :6] = rounded(rng.normal(size=(2, 2, 6, 2, 16)), dtype)
    out = npu.cached_attention(tensor(q, dtype), tensor(cache[0], dtype), tensor(cache[1], dtype), 6)
    visible = reference.visible_keys(causal_ranges(S, 6).ranges, 6)
    near([out], reference.attention(q, cache[0, :, :6], cache[1, :, :6], visible)[:1], dtype)
    assert calls["npu_fused_infer_attention_score"] == (dtype != "float32")


@pytest.mark.parametrize("step", [1, 7])
def test_adamw(calls: Counter[str], step: int) -> None:
    rng = np.random.default_rng(6)
    master, grad, m, v = (rounded(np.abs(rng.normal(size=9)), "float32") for _ in range(4))
    held = [tensor(x) for x in (master, grad, m, v)]
    copy = tensor(np.zeros(9), "bfloat16")
    scalars = AdamWStep(step, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=0.25)
    npu.adamw(*held, scalars, copy=copy)
    truth = reference.adamw(master, grad, m, v, scalars)
    near((held[0], *held[2:]), truth, "float32")
    assert torch.equal(copy, held[0].bfloat16())


def test_every_operator_of_the_table_is_called(calls: Counter[str]) -> None:
    """The table holds what is called and nothing else, so that no call escapes the check."""
    source = Path(npu.__file__).read_text()
    called = set(re.findall(r'operator\("(\w+(?:\.\w+)?)"\)', source))
    assert called == set(npu_signatures.SCHEMAS) == set(ANSWERS)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "message"),
    [
        ("npu_rms_norm", ["x", "x"], {"eps": 1e-5}, "unexpected keyword argument 'eps'"),
        ("npu_rms_norm", ["x"], {"epsilon": 1e-5}, "missing a required argument: 'gamma'"),
        ("npu_rms_norm", ["x", "x", "x"], {}, "epsilon: Tensor; needs float"),
        ("npu_gelu", ["x", "tanh"], {}, "too many positional arguments"),
        ("npu_fusion_attention", ["x", "x", "x", 4.0, "BSND"], {}, "head_num: float; needs int"),
        ("npu_fusion_attention", ["x", "x", "x", 4, "BSND"], {"pre_tokens": 0}, "unexpected keyword argument"),
        ("npu_fusion_attention", ["x", "x", "x", 4, "TND"], {"actual_seq_qlen": "x"}, "actual_seq_qlen: Tensor"),
        ("npu_ring_attention_update", ["x"] * 6, {"layout": "SBH"}, "unexpected keyword argument 'layout'"),
        ("npu_fused_infer_attention_score", ["x"] * 3, {"softmax_lse_flag": 1}, "softmax_lse_flag: int; needs bool"),
        ("npu_flash_attention", ["x"], {}, "not an operator of the recorded table"),
    ],
)
def test_a_planted_fault_in_a_call_turns_red(name: str, args: list[Any], kwargs: Given, message: str) -> None:
    def made(value: Any) -> Any:
        return torch.ones(2, 4) if isinstance(value, str) and value == "x" else value

    given = {key: made(value) for key, value in kwargs.items()}
    with pytest.raises(TypeError, match=re.escape(message)):
        npu_signatures.bind(name, tuple(made(a) for a in args), given, torch.Tensor)


def test_schemas_are_read_whole() -> None:
    schema = npu_signatures.SCHEMAS["npu_fusion_attention_grad"]
    assert list(schema.types)[:6] == ["query", "key", "value", "dy", "head_num", "input_layout"]
    assert schema.types["actual_seq_qlen"] == "int[]?" and schema.results == ("Tensor",) * 5
    adam = npu_signatures.SCHEMAS["npu_apply_adam_w.out"]
    assert adam.types["var"] == "Tensor" and len(adam.results) == 3
    with pytest.raises(ValueError, match="declaration"):
        npu_signatures.parse("npu_rms_norm(Tensor self")


def test_without_torch_npu_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(UserError, match=r"npu_gelu needs torch_npu.*install torch_npu"):
        npu.gelu(torch.ones(2))


def test_mistakes_are_named() -> None:
    q, k = torch.ones(2, 5, 4, 16), torch.ones(2, 5, 2, 16)
    with pytest.raises(TypeError, match="k: torch.float16"):
        npu.attention(q, k.half(), k.half(), causal_ranges(5, 5))
    with pytest.raises(ValueError, match="q: 4 heads"):
        npu.attention(q, torch.ones(2, 5, 3, 16), torch.ones(2, 5, 3, 16), causal_ranges(5, 5))
    with pytest.raises(TypeError, match="float64"):
        npu.rms_norm(q.double(), torch.ones(16), 1e-5, torch.float32)
