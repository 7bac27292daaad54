"""The operators of kernels/pytorch/ops.py in each implementation of the CPU against their float64 definitions.

A float32 result may be off by six times what float32 costs the definition itself, and never less than a few units in
the last place (as in test_operators.py); a bfloat16 one by a few of its own roundings, 2^-9 each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import KeyRanges, causal_ranges
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.dispatch import describe
from telechat_twins.kernels.pytorch import attention_in_cpp, in_cpp
from telechat_twins.kernels.pytorch import composite as torch_composite
from telechat_twins.kernels.pytorch import cpu as torch_cpu
from telechat_twins.kernels.pytorch import ops as pytorch
from telechat_twins.kernels.pytorch import tiles as torch_tiles
from telechat_twins.kernels.pytorch.autograd import SwiGLU
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.weights import to_numpy

PACKAGES = {"torch": torch_cpu, "composite": torch_composite}
ATTENTION_PACKAGES = {"cpp": attention_in_cpp, **PACKAGES}
COMPILED = {"cpp": in_cpp, **PACKAGES}  # of in_cpp.OPERATORS
FACTOR, FLOOR = 6.0, 8 * 2.0**-24
EPS = 1e-5
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def forget_the_choice() -> Iterator[None]:
    yield
    pytorch.select()


def draw(*shape: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def tensor(array: np.ndarray) -> torch.Tensor:
    """Not contiguous where it has more than one axis: every second channel of a wider tensor."""
    found = torch.from_numpy(np.ascontiguousarray(array))
    if found.ndim < 2 or not found.is_floating_point():
        return found
    wide = torch.full((*found.shape[:-1], 2 * found.shape[-1]), 7.0, dtype=found.dtype)
    wide[..., ::2] = found
    return wide[..., ::2]


def broken(got: Arrays, define: Callable[[type], Arrays], factor: float = FACTOR, floor: float = FLOOR) -> list[str]:
    """What of ``got`` is further from the float64 definition than rounding explains."""
    truth, plain = define(np.float64), define(np.float32)
    return [
        f"{name}: {relative_frobenius(got[name], truth[name]):.2e}"
        for name in truth
        if not relative_frobenius(got[name], truth[name])
        <= max(factor * relative_frobenius(plain[name], truth[name]), floor)
    ]


def numpy_of(**tensors: torch.Tensor) -> Arrays:
    return {name: to_numpy(x) for name, x in tensors.items()}


def grown(width: int) -> np.ndarray:
    mask = np.ones(width, np.float32)
    mask[width // 2 :] = 0.25
    mask[-1] = 0.0
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (2, 13, 131), (5, 13, 1031), (3, 300, 1031)])
@pytest.mark.parametrize("package", COMPILED.values(), ids=COMPILED)
def test_norms(package: ModuleType, shape: tuple[int, ...], masked: bool) -> None:
    if masked and shape[-1] == 1:
        pytest.skip("the only channel would be masked")
    E = shape[-1]
    arrays = [draw(*shape), draw(*shape, seed=1), draw(E, seed=2) + 1, draw(E, seed=3), draw(*shape, seed=4)]
    mask = grown(E) if masked else None
    x, residual, weight, bias, grad = (tensor(a) for a in arrays)
    there = None if mask is None else torch.from_numpy(mask)

    def define(dtype: type) -> Arrays:
        x, residual, weight, bias, grad = (a.astype(dtype) for a in arrays)
        m = None if mask is None else mask.astype(dtype)
        eps = dtype(EPS)
        dx, dw = reference.rms_norm_backward(grad, x, weight, eps, m)
        normed, stream = reference.add_rms_norm(x, residual, weight, eps, m)
        dstream, dw2 = reference.add_rms_norm_backward(grad, residual, stream, weight, eps, m)
        rms = {"rms": reference.rms_norm(x, weight, eps, m), "dx": dx, "dw": dw}
        added = {"normed": normed, "stream": stream, "dstream": dstream, "dw2": dw2}
        dln, dwln, dbln = reference.layer_norm_backward(grad, x, weight, eps, m)
        ln = {"ln": reference.layer_norm(x, weight, bias, eps, m), "dln": dln, "dwln": dwln, "dbln": dbln}
        # Of one channel nothing is left but the bias, and what is zero has no relative error.
        return {**rms, **added, **(ln if E > 1 else {"ln": ln["ln"], "dbln": dbln})}

    out, rstd = package.rms_norm(x, weight, EPS, torch.float32, there)
    dx, dw = package.rms_norm_backward(grad, x, weight, rstd, there)
    normed, stream, rstd2 = package.add_rms_norm(x, residual, weight, EPS, torch.float32, there)
    dstream, dw2 = package.add_rms_norm_backward(grad, residual, stream, weight, rstd2, there)
    ln, mean, rstd3 = package.layer_norm(x, weight, bias, EPS, torch.float32, there)
    dln, dwln, dbln = package.layer_norm_backward(grad, x, weight, mean, rstd3, there)
    got = numpy_of(rms=out, dx=dx, dw=dw, normed=normed, stream=stream, dstream=dstream, dw2=dw2)
    got |= numpy_of(ln=ln, dln=dln, dwln=dwln, dbln=dbln)
    assert rstd.shape == (np.prod(shape[:-1]),) and rstd.dtype == torch.float32
    assert not broken(got, define)
    got["dx"] = got["dx"] + got["rms"] * 1e-3
    got["dw"][-1:] += 1e-2
    assert len(broken(got, define)) == 2


@pytest.mark.parametrize("package", COMPILED.values(), ids=COMPILED)
def test_rope_of_queries_and_keys(package: ModuleType) -> None:
    q, k = draw(2, 11, 6, 10), draw(2, 11, 2, 10, seed=1)
    angle, scale = draw(1, 11, 1, 5, seed=2), np.exp(draw(1, 11, 1, 5, seed=3, spread=0.2))
    tables = [np.cos(angle), np.sin(angle), scale, 1 / scale]

    def define(dtype: type) -> Arrays:
        parts = [a.astype(dtype) for a in (q, k, *tables)]
        out, back = reference.rope_qk(*parts), reference.rope_qk_backward(*parts)
        return {"q": out[0], "k": out[1], "dq": back[0], "dk": back[1]}

    given = [torch.from_numpy(t) for t in tables]
    out = package.rope_qk(tensor(q), tensor(k), *given)
    back = package.rope_qk(tensor(q), tensor(k), given[0], -given[1], *given[2:])
    assert not broken(numpy_of(q=out[0], k=out[1], dq=back[0], dk=back[1]), define)
    swapped = torch.cat(out[0].chunk(2, -1)[::-1], -1)
    assert broken(numpy_of(q=swapped, k=out[1], dq=back[0], dk=back[1]), define)


@pytest.mark.parametrize("shape", [(1,), (2, 13, 37), (700, 401)])
@pytest.mark.parametrize("package", COMPILED.values(), ids=COMPILED)
def test_activations(package: ModuleType, shape: tuple[int, ...]) -> None:
    gate, up, grad = draw(*shape, spread=4.0), draw(*shape, seed=1), draw(*shape, seed=2)

    def define(dtype: type) -> Arrays:
        g, u, d = (a.astype(dtype) for a in (gate, up, grad))
        dg, du = reference.swiglu_backward(d, g, u)
        swiglu = {"swiglu": reference.swiglu(g, u), "dg": dg, "du": du}
        return {**swiglu, "gelu": reference.gelu(g), "dgelu": reference.gelu_backward(d, g)}

    g, u, d = tensor(gate), tensor(up), tensor(grad)
    dg, du = package.swiglu_backward(d, g, u)
    got = numpy_of(swiglu=package.swiglu(g, u), dg=dg, du=du, gelu=package.gelu(g), dgelu=package.gelu_backward(d, g))
    # float32's tanh of the definition costs about as much as an implementation's; gelu's tail needs some room
    assert not broken(got, define, factor=10.0, floor=16 * 2.0**-24)
    if len(shape) > 1:
        got["du"].reshape(-1)[-8:] = 0.0  # a dropped tail
        assert broken(got, define, factor=10.0, floor=16 * 2.0**-24)


def ranges_of(kind: str, B: int, S: int, T: int) -> KeyRanges:
    if kind in ("causal", "documents"):
        docs = np.sort(np.random.default_rng(5).integers(0, 4, (B, T)), 1) if kind == "documents" else None
        return causal_ranges(S, T, docs)
    rng = np.random.default_rng(6)
    first = rng.integers(0, T, (B, S))
    last = np.minimum(first + rng.integers(0, T, (B, S)), T)
    if kind == "empty":
        last[:, ::2] = first[:, ::2]
        last[:, : S // 2] = first[:, : S // 2]
    if kind == "full":
        return KeyRanges(np.tile(np.array([0, T], np.int32), (1, S, 1)), T, "full")
    return KeyRanges(np.stack((first, last), -1).astype(np.int32), T, "ranges")


def on_device(ranges: KeyRanges) -> KeyRanges:
    return ranges._replace(ranges=torch.from_numpy(ranges.ranges))


ATTENTION = {
    "one": ("causal", 1, 1, 1, 1, 1, 2),
    "gqa": ("causal", 2, 37, 37, 8, 4, 6),
    "mqa, cached": ("causal", 1, 5, 23, 6, 1, 10),
    "documents": ("documents", 3, 29, 29, 4, 2, 8),
    "any runs": ("ranges", 2, 31, 17, 4, 2, 8),
    "rows without keys": ("empty", 2, 31, 17, 4, 2, 8),
    "full": ("full", 1, 7, 300, 4, 4, 8),
    "many blocks": ("documents", 1, 1031, 1031, 2, 1, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("package", [torch_cpu, in_cpp])
def test_gradients_written_over_gate_and_up(package: ModuleType, dtype: torch.dtype) -> None:
    """The same bits in place, of tensors above the size that blocks are for; leaves stay as they are."""
    grad, gate, up = (torch.randn(300, 700).to(dtype) for _ in range(3))
    apart = package.swiglu_backward(grad, gate, up)
    over = [x.clone() for x in (gate, up)]
    written = package.swiglu_backward(grad, *over, in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(apart, written, strict=True))
    assert [x.data_ptr() for x in written] == [x.data_ptr() for x in over]
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    SwiGLU.apply(package, *leaves).backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(leaves, (gate, up), strict=True))
    assert all(torch.equal(a.grad, b) for a, b in zip(leaves, apart, strict=True))
    inner = [x * 1 for x in leaves]
    SwiGLU.apply(package, *inner).backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(inner, apart, strict=True)), "not overwritten"


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("package", ATTENTION_PACKAGES.values(), ids=ATTENTION_PACKAGES)
def test_attention_and_its_gradient(package: ModuleType, name: str) -> None:
    kind, B, S, T, H, K, D = ATTENTION[name]
    arrays = [draw(B, S, H, D), draw(B, T, K, D, seed=1), draw(B, T, K, D, seed=2), draw(B, S, H, D, seed=3)]
    ranges = ranges_of(kind, B, S, T)
    visible = reference.visible_keys(ranges.ranges, T)

    def define(dtype: type) -> Arrays:
        q, k, v, grad = (a.astype(dtype) for a in arrays)
        out, lse = reference.attention(q, k, v, visible)
        dq, dk, dv = reference.attention_backward(grad, q, k, v, visible, out, lse)
        return {"out": out, "lse": np.where(np.isfinite(lse), lse, 0.0), "dq": dq, "dk": dk, "dv": dv}

    q, k, v, grad = (tensor(a) for a in arrays)
    out, lse = package.attention(q, k, v, on_device(ranges))
    found = package.attention_backward(grad, q, k, v, on_device(ranges), out, lse)
    blind = ~visible.any(-1)
    assert torch.equal(torch.isneginf(lse), torch.from_numpy(np.broadcast_to(blind[:, None], lse.shape).copy()))
    assert not torch.cat([x.flatten() for x in (out, *found)]).isnan().any()
    finite = torch.where(torch.isfinite(lse), lse, 0.0)
    got = numpy_of(out=out, lse=finite, **dict(zip(("dq", "dk", "dv"), found, strict=True)))
    assert not broken(got, define)
    if T > 1:
        wrong = package.attention_backward(grad, q, k, v, on_device(ranges), out, lse + 1e-3)
        got |= numpy_of(**dict(zip(("dq", "dk", "dv"), wrong, strict=True)))
        assert {line.partition(":")[0] for line in broken(got, define)} >= {"dk", "dv"}


@pytest.mark.parametrize("package", ATTENTION_PACKAGES.values(), ids=ATTENTION_PACKAGES)
def test_blocks_of_keys_merge_to_the_whole(package: ModuleType) -> None:
    q, k, v = draw(2, 9, 4, 8), draw(2, 12, 2, 8, seed=1), draw(2, 12, 2, 8, seed=2)
    visible = np.ones((1, 9, 12), bool)
    visible[:, :4, 5:] = False  # four queries see nothing of the second block
    visible[:, 4] = False
    visible[:, 4, 5:] = True  # one nothing of the first

    def define(dtype: type) -> Arrays:
        out, lse = reference.attention(*(a.astype(dtype) for a in (q, k, v)), visible)
        return {"out": out, "lse": lse}

    parts = []
    for keys in (slice(0, 5), slice(5, 12)):
        ranges = ops.hidden_keys(visible[..., keys])[0][1]
        parts.append(package.attention(tensor(q), tensor(k)[:, keys], tensor(v)[:, keys], ranges, out_f32=True))
    out, lse = package.merge_blocks(*parts[0], *parts[1])
    assert not broken(numpy_of(out=out, lse=lse), define)
    assert broken(numpy_of(out=(parts[0][0] + parts[1][0]) / 2, lse=lse), define)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged in (package.merge_blocks(out, lse, *nothing), package.merge_blocks(*nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    assert torch.isneginf(package.merge_blocks(*nothing, *nothing)[1]).all()


def test_keys_with_a_gap_come_in_two_parts() -> None:
    """A ring's own block when each document is zigzagged: a query sees a run in each half of the keys."""
    visible = np.zeros((1, 4, 4), bool)
    visible[0, [0, 1, 2, 2, 3, 3], [0, 1, 0, 2, 1, 3]] = True
    q, k, v = draw(1, 2, 4, 8), draw(1, 2, 4, 8, seed=1), draw(1, 2, 4, 8, seed=2)
    out, lse = ops.attention_block(*(torch.from_numpy(a) for a in (q, k, v)), ops.hidden_keys(visible))
    wide = [a.astype(np.float64).transpose(0, 2, 1, 3) for a in (q, k, v)]
    truth, true_lse = reference.attention(*wide, visible)
    assert relative_frobenius(out.numpy().transpose(0, 2, 1, 3), truth) < 1e-6
    assert relative_frobenius(lse[..., 0].numpy(), true_lse) < 1e-6
    grad = draw(1, 2, 4, 8, seed=3)
    delta = (out * torch.from_numpy(grad)).sum(-1, keepdim=True)
    tensors = [torch.from_numpy(a) for a in (q, k, v)]
    found = ops.attention_block_backward(*tensors, ops.hidden_keys(visible), lse, torch.from_numpy(grad), delta)
    wanted = reference.attention_backward(
        grad.astype(np.float64).transpose(0, 2, 1, 3), *wide, visible, truth, true_lse
    )
    for got, expected in zip(found, wanted, strict=True):
        assert relative_frobenius(got.numpy().transpose(0, 2, 1, 3), expected) < 2e-6
    with pytest.raises(ValueError, match="gap"):
        ops.hidden_keys(np.array([[[True, False, True, True, False, True, False, True]]]))


def test_attention_needs_memory_linear_in_the_sequence() -> None:
    """The largest product of a block of queries stays below 64 MB of float32 at sequence 16384 with 8 heads."""
    sizes = []
    for heads in (1, 2, 8):
        blocks = list(torch_cpu._query_blocks(on_device(causal_ranges(16384, 16384)), 1, 16384, heads))
        assert sum(last - first for _, first, last, _, _ in blocks) == 16384
        sizes += [(last - first) * heads * (run.stop - run.start) * 4 for _, first, last, run, _ in blocks]
    assert 2 * max(sizes) < 64e6


@pytest.mark.parametrize("spread", [3.0, 1e4])
@pytest.mark.parametrize("package", COMPILED.values(), ids=COMPILED)
def test_cross_entropy_of_a_part_of_the_vocabulary(package: ModuleType, spread: float) -> None:
    N, C, first, real, z = 700, 401, 400, 397, 1e-4
    logits = draw(N, C, spread=spread)
    targets = np.random.default_rng(1).integers(0, 1200, N).astype(np.int32)
    targets[::3] = IGNORE
    lse = reference.log_sum(logits[:, :real].astype(np.float64)) + 0.3  # over more columns than these

    def define(dtype: type) -> Arrays:
        own, picked = reference.cross_entropy_shard(logits.astype(dtype), targets, first, real)
        grad = reference.cross_entropy_shard_backward(logits.astype(dtype), targets, first, real, lse.astype(dtype), z)
        return {"own": own, "picked": picked, "grad": 0.5 * grad}

    given, wanted = torch.from_numpy(logits.copy()), torch.from_numpy(targets)
    own, picked = package.cross_entropy_forward(given, wanted, first, real)
    args = (given, wanted, first, real, torch.from_numpy(lse.astype(np.float32)), torch.tensor(0.5), z)
    apart = package.cross_entropy_backward(*args, in_place=False)
    assert torch.equal(given, torch.from_numpy(logits))
    got = numpy_of(own=own, picked=picked, grad=apart)
    assert not broken(got, define)
    assert not got["grad"][targets == IGNORE].any() and not got["grad"][:, real:].any()
    written = package.cross_entropy_backward(*args, in_place=True)
    assert torch.equal(written, apart)
    if package is torch_cpu:
        assert written.data_ptr() == given.data_ptr()
    got["grad"] = np.roll(got["grad"], 1, axis=0)
    assert broken(got, define)
    nothing = package.cross_entropy_forward(torch.from_numpy(logits), wanted, first, 0)
    assert torch.isneginf(nothing[0]).all() and not nothing[1].any()


@pytest.mark.parametrize("name", COMPILED)
def test_loss_and_the_place_of_its_gradient(name: str) -> None:
    pytorch.select({"cross_entropy": name})
    x = torch.from_numpy(draw(13, 151)).requires_grad_()
    targets = torch.arange(13) * 7
    before = x.detach().clone()
    pytorch.cross_entropy(x, targets, 1e-3).backward()
    truth = reference.cross_entropy_backward(before.numpy().astype(np.float64), targets.numpy(), 1e-3)
    assert torch.equal(x.detach(), before), "a leaf must stay"
    assert relative_frobenius(x.grad.numpy(), truth) < 1e-6
    held = x * 1.0
    seen = to_numpy(held)  # a copy: the backward writes over computed logits
    loss = pytorch.cross_entropy(held, targets)
    loss.backward()
    np.testing.assert_array_equal(seen, before.numpy())
    assert torch.equal(held, before) == (name == "composite")


@pytest.mark.parametrize("package", COMPILED.values(), ids=COMPILED)
def test_adamw_with_scale_and_copy(package: ModuleType) -> None:
    arrays = [draw(1031), draw(1031, seed=1), draw(1031, seed=2, spread=0.1), draw(1031, seed=3) ** 2]
    step = AdamWStep(3, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=0.3)

    def define(dtype: type) -> Arrays:
        found = reference.adamw(*(a.astype(dtype) for a in arrays), step=step)
        return dict(zip(("master", "m", "v"), found, strict=True))

    for dtype, floor in ((torch.float32, FLOOR), (torch.float64, 1e-14)):
        if dtype == torch.float64 and package is in_cpp:
            continue
        master, grad, m, v = (torch.from_numpy(a.copy()).to(dtype) for a in arrays)
        copy = torch.empty_like(master, dtype=torch.bfloat16)
        package.adamw(master, grad, m, v, step, copy=copy)
        exact = define(np.float64) if dtype == torch.float64 else None
        got = numpy_of(master=master, m=m, v=v)
        if exact is None:
            assert not broken(got, define)
        else:
            assert all(relative_frobenius(got[key], exact[key]) < floor for key in exact)
        assert torch.equal(copy, master.to(torch.bfloat16))
        late = define(np.float64)["master"] * (1 + 1e-3)  # no decay
        assert broken({**got, "master": late}, define)


@pytest.mark.skipif(bool(torch_tiles.obstacle()), reason="without AMX tiles, torch serves")
def test_linear_in_tiles() -> None:
    """Passed by address: each gradient by itself, dy strided; the second call reuses the first."""
    pytorch.select()
    assert pytorch.serving("linear", q4) is torch_tiles
    for seed in (0, 1):
        x, weight, bias, grad = (draw(*shape, seed=seed) for shape in ((2, 13, 70), (40, 70), (40,), (2, 40, 13)))

        def define(dtype: type, given: tuple[np.ndarray, ...] = (x, weight, bias, grad)) -> Arrays:
            a, w, b, g = (t.astype(dtype) for t in given)
            dx, dw, db = reference.linear_backward(g.swapaxes(1, 2), a, w)
            return {"out": reference.linear(a, w, b), "dx": dx, "dw": dw, "db": db}

        inputs = [tensor(t).requires_grad_() for t in (x, weight, bias)]
        out = pytorch.linear(*inputs, torch.float32)
        out.backward(tensor(grad).transpose(1, 2))
        named = zip(("dx", "dw", "db"), inputs, strict=True)
        got = numpy_of(out=out.detach(), **{name: t.grad for name, t in named if t.grad is not None})
        assert len(got) == 4 and not broken(got, define)
        got["dw"][-1] *= 1 + 1e-3
        assert broken(got, define)


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_linear_and_embedding(package: ModuleType) -> None:
    x, weight, bias, grad = draw(2, 13, 37), draw(29, 37, seed=1), draw(29, seed=2), draw(2, 13, 29, seed=3)
    ids, table = np.array([3, 1, 3, 3, 0, 6]), draw(7, 5)

    def define(dtype: type) -> Arrays:
        a, w, b, g = (t.astype(dtype) for t in (x, weight, bias, grad))
        dx, dw, db = reference.linear_backward(g, a, w)
        rows = reference.embedding_backward(x[0, :6, :5].astype(dtype), ids, 7)
        return {"out": reference.linear(a, w, b), "dx": dx, "dw": dw, "db": db, "rows": rows}

    out = package.linear(tensor(x), tensor(weight), tensor(bias))
    dx, dw, db = package.linear_backward(tensor(grad), tensor(x), tensor(weight), (True, True, True))
    rows = package.embedding_backward(tensor(x[0, :6, :5]), torch.from_numpy(ids), 7)
    got = numpy_of(out=out, dx=dx, dw=dw, db=db, rows=rows)
    assert not broken(got, define)
    assert package.linear_backward(tensor(grad), tensor(x), tensor(weight), (False, False, False)) == (None,) * 3
    np.testing.assert_array_equal(package.embedding(torch.from_numpy(table), torch.from_numpy(ids)), table[ids])
    got["rows"][3] -= x[0, 0, :5]  # of three that add up one is lost
    assert broken(got, define)


@pytest.mark.parametrize("name", COMPILED)
def test_bfloat16_keeps_float32_statistics(name: str) -> None:
    """Inputs and outputs rounded to 2^-9; a sum of 4096 terms in bfloat16 would be off by far more."""
    pytorch.select({op: name for op in ("rms_norm", "swiglu", "cross_entropy", "attention", "linear")})
    x = torch.from_numpy(draw(3, 4096)).bfloat16().requires_grad_()
    weight = torch.ones(4096).bfloat16().requires_grad_()
    out = pytorch.rms_norm(x, weight, EPS, torch.float32, torch.bfloat16)
    out.sum().backward()
    wide = to_numpy(x).astype(np.float64)
    dx, dw = reference.rms_norm_backward(np.ones((3, 4096)), wide, np.ones(4096), EPS)
    assert relative_frobenius(to_numpy(out), reference.rms_norm(wide, np.ones(4096), EPS)) < 2**-8
    assert relative_frobenius(to_numpy(x.grad), dx) < 2**-8 and relative_frobenius(to_numpy(weight.grad), dw) < 2**-8
    logits = torch.from_numpy(draw(4, 4096)).bfloat16().requires_grad_()
    loss = pytorch.cross_entropy(logits, torch.arange(4))
    wide = to_numpy(logits).astype(np.float64)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / reference.cross_entropy(wide, np.arange(4)) - 1) < 1e-6
    loss.backward()
    assert relative_frobenius(to_numpy(logits.grad), reference.cross_entropy_backward(wide, np.arange(4))) < 2**-8


q4 = torch.zeros(2, 3, 4, 6)
ids = torch.zeros(5, dtype=torch.int32)
f32 = torch.float32


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: pytorch.linear(q4, torch.zeros(7, 5), None, f32), ValueError, r"weight: got shape \(7, 5\), needs"),
        (lambda: pytorch.linear(q4, torch.zeros(7, 6), ids, f32), ValueError, r"bias: got shape \(5,\), needs \(7,\)"),
        (lambda: pytorch.embedding(torch.zeros(3, 4), torch.zeros(2)), TypeError, "ids: got torch.float32, needs int"),
        (lambda: pytorch.rms_norm(q4, torch.zeros(5), EPS, f32, f32), ValueError, r"weight: got shape \(5,\)"),
        (
            lambda: pytorch.rms_norm(q4, torch.zeros(6, device="meta"), EPS, f32, f32),
            ValueError,
            "weight: got a tensor on meta, needs one on that of x, cpu",
        ),
        (lambda: pytorch.add_rms_norm(q4, q4[:1], q4[0, 0, 0], EPS, f32, f32), ValueError, "residual: got shape"),
        (lambda: pytorch.rope_qk(q4, q4, q4, q4), ValueError, r"cos: got shape .*, needs \(1 or 2, 3, 1, 3\)"),
        (lambda: pytorch.rope_qk(q4, q4[:, :2], q4, q4), ValueError, r"k: got shape .*, needs \(2, 3, K, 6\)"),
        (lambda: pytorch.swiglu(q4, q4[0], f32), ValueError, "up: got shape"),
        (lambda: pytorch.swiglu(q4, q4.double(), f32), TypeError, "up: got torch.float64, needs that of gate"),
        (
            lambda: pytorch.attention(q4, q4[:, :, :3], q4[:, :, :3], on_device(causal_ranges(3, 3))),
            ValueError,
            "k: got 3 heads, needs a number that divides the 4 of q",
        ),
        (lambda: pytorch.attention(q4, q4, q4[:, :2], on_device(causal_ranges(3, 3))), ValueError, "v: got shape"),
        (lambda: pytorch.attention(q4, q4, q4, on_device(causal_ranges(2, 3))), ValueError, "key_ranges: got shape"),
        (lambda: pytorch.attention(q4, q4, q4, on_device(causal_ranges(3, 4))), ValueError, "key_ranges: .* 4 keys"),
        (lambda: pytorch.cross_entropy(torch.zeros(4, 9), ids), ValueError, r"targets: got shape \(5,\), needs \(4,\)"),
        (lambda: pytorch.cross_entropy(torch.zeros(5, 9), ids.float()), TypeError, "targets: got torch.float32"),
        (lambda: pytorch.shard_statistics(torch.zeros(5, 9), ids, 0, 10), ValueError, "real: got 10, needs 0 to the 9"),
        (lambda: pytorch.merge_blocks(q4, q4, q4[:1], q4), ValueError, "more: got shape"),
        (
            lambda: pytorch.adamw(q4, q4, q4.double(), q4, AdamWStep(1, 0.1, 0.9, 0.9, 1e-8, 0.0)),
            TypeError,
            "m: got torch.float64, needs that of master, torch.float32",
        ),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_choices_of_the_devices() -> None:
    best = {op: c.implementation for op, c in pytorch.select().items() if c.implementation != "torch"}
    vectors = "cpp" if torch_tiles.vectors_lead() else "torch"
    assert best.pop("linear", "torch") == (vectors if torch_tiles.obstacle() else "amx")
    assert best == dict.fromkeys(("attention", *in_cpp.OPERATORS), "cpp")
    assert pytorch.serving("attention", q4) is attention_in_cpp and pytorch.serving("rope", q4) is in_cpp
    assert all(pytorch.serving(operator, q4.double()) is torch_cpu for operator in best)
    assert any("cpp has no float64" in line for line in pytorch.described(torch.float64))
    chosen = pytorch.select({"rms_norm": "composite"})
    assert pytorch.choices() is chosen and chosen["rms_norm"].reason == "requested"
    assert pytorch.serving("rms_norm", q4) is torch_composite and pytorch.serving("swiglu", q4) is in_cpp
    assert "composite: rms_norm (requested)" in describe(chosen)
    with pytest.raises(UserError, match="kernels.merge_blocks: 'cpp' is not an implementation on CPU; use one of: "):
        pytorch.select({"merge_blocks": "cpp"})
    with pytest.raises(ValueError, match="device: got 'tpu'"):
        pytorch.select({}, "tpu")
    assert pytorch.choices() is chosen, "a mistake changes nothing"


def test_an_accelerator_without_its_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="kernels.embedding|kernels.rms_norm: triton is unavailable on GPU"):
        pytorch.select({}, "cuda")
    with pytest.raises(UserError, match="torch_npu is not installed; to use a slower one"):
        pytorch.select({}, "npu")
    wanted = {name: "composite" for name in pytorch.candidates("cuda")}
    assert {choice.implementation for choice in pytorch.select(wanted, "cuda").values()} == {"composite"}
    monkeypatch.setattr(pytorch.importlib.util, "find_spec", lambda name: name)
    chosen = pytorch.select({"attention": "torch"}, "cuda")
    assert chosen["attention"].implementation == "torch" and chosen["rms_norm"].implementation == "triton"
    chosen = pytorch.select({}, "npu")
    assert chosen["attention"].implementation == "cann" and chosen["cross_entropy"].implementation == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_a_step_by_the_compiled_operators(dtype: torch.dtype) -> None:
    """Gradients into their bucket, written and then added; sums of squares, of columns and of two tensors."""
    x, y = (torch.from_numpy(draw(33, 70, seed=seed)).to(dtype) for seed in (0, 1))
    bucket = torch.full((3 * x.numel(),), float("nan"))
    place = bucket[x.numel() : 2 * x.numel()].view(x.shape)
    in_cpp.accumulate(place, x, False)
    assert torch.equal(place, x.float()), "what was there before does not count"
    in_cpp.accumulate(place, y, True)
    assert torch.equal(place, x.float() + y.float())
    assert int(bucket.isnan().sum()) == 2 * x.numel(), "neighbours stay"
    assert torch.equal(in_cpp.add(x, y), (x.float() + y.float()).to(dtype))
    torch.testing.assert_close(in_cpp.square_sum(x.flatten()), x.double().square().sum(), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(in_cpp.column_sum(x), x.double().sum(0).float(), rtol=1e-6, atol=1e-5)
    ids = torch.arange(33) % 7
    truth = torch.zeros(9, 70, dtype=torch.float64).index_add_(0, ids, x.double()).float()
    torch.testing.assert_close(in_cpp.embedding_backward(x, ids, 9), truth, rtol=1e-6, atol=1e-5)
