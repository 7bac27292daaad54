"""What one of four ranks does in test_collectives.py: every check of ``CHECKS``, results as results_<rank>.json.

    collective_checks.py BACKEND FOLDER

Inputs are functions of the rank, so that each rank knows what the others hold and computes the answer in numpy alone.
A check returns None where this rank has no part in it; what it raises is its result.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

WORLD = 4
GROUPS = {"two": ((0, 1), (2, 3)), "three": ((0, 2, 3),), "four": ((0, 1, 2, 3),)}
FLOATS = ("float32", "float64", "bfloat16", "float16")
DTYPES = (*FLOATS, "int32")
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int32": 0.0}  # roundoff
CHECKS: dict[str, Callable[[Env], None]] = {}


class Env:
    """One backend as seen from a rank: its modules, its groups, and the way between numpy and its tensors."""

    def __init__(self, backend: str) -> None:
        package = {"pt": "telechat_twins.pt_reference", "ms": "telechat_twins.telechat_ms"}[backend]
        importlib.import_module(package)
        self.backend = backend
        self.mesh: ModuleType = importlib.import_module(f"{package}.mesh")
        self.c: Any = importlib.import_module(f"{package}.collectives")
        self.framework: Any = importlib.import_module({"pt": "torch", "ms": "mindspore"}[backend])
        self.rank, self.world = self.mesh.join(120.0)
        self.groups: dict[str, Any] = {}

    def make_groups(self) -> None:
        for name, sets in GROUPS.items():
            for ranks in sets:
                self.groups[name] = self.mesh.make_group(name, ranks, self.rank) or self.groups.get(name)
        # Two channels each way between neighbours in a ring, as a pipeline has them.
        self.links: dict[tuple[str, int], Any] = {}
        for src in range(WORLD):
            dst = (src + 1) % WORLD
            self.links["forward", src] = self.mesh.make_link("forward", src, dst, self.rank)
            self.links["backward", dst] = self.mesh.make_link("backward", dst, src, self.rank)

    def dtype(self, name: str) -> Any:
        return getattr(self.framework, name)

    def tensor(self, array: np.ndarray, dtype: str = "float32") -> Any:
        """A tensor of ``dtype``; transposed arrays stay transposed where the framework has strides."""
        if self.backend == "pt":
            wide = np.asarray(array, np.float64 if dtype != "int32" else np.int32)
            return self.framework.from_numpy(wide).to(self.dtype(dtype))
        made = self.framework.Tensor(np.array(array, "float32" if dtype == "bfloat16" else dtype, order="C"))
        return made.astype(self.dtype(dtype))

    def numpy(self, x: Any) -> np.ndarray:
        """float64, or int32 as it is."""
        if self.backend == "pt":
            return x.detach().numpy() if x.dtype == self.framework.int32 else x.detach().double().numpy()
        return x.asnumpy() if x.dtype == self.framework.int32 else x.astype(self.framework.float64).asnumpy()

    def transposed(self, x: Any) -> Any:
        """x with its last two axes exchanged and, where the framework can, without moving its elements."""
        view = x.transpose(-1, -2) if self.backend == "pt" else self.framework.mint.transpose(x, -1, -2)
        assert not view.is_contiguous(), "the input of this check must not be contiguous"
        return view

    def gradient(self, call: Callable[[Any], Any], x: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(output, gradient of x) of ``call`` in float32, for the gradient ``grad`` of the output."""
        given, outer = self.tensor(x), self.tensor(grad)
        if self.backend == "pt":
            given.requires_grad_()
            out = call(given)
            out.backward(outer)
            return self.numpy(out), self.numpy(given.grad)

        def scalar(t: Any) -> Any:
            out = call(t)
            return (out * outer).sum(), out

        (_, out), dx = self.framework.value_and_grad(scalar, 0, has_aux=True)(given)
        return self.numpy(out), self.numpy(dx)


def values(rank: int, shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """What ``rank`` holds, already rounded to ``dtype``, as float64 or int32."""
    rng = np.random.default_rng([seed, rank, *shape])
    if dtype == "int32":
        return rng.integers(-1000, 1000, shape, dtype=np.int32)
    drawn = rng.standard_normal(shape)
    return drawn.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float64)


def equal(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape, f"shape {found.shape}, wanted {wanted.shape}"
    assert np.array_equal(found, wanted), f"found {found.ravel()[:8]}, wanted {wanted.ravel()[:8]}"


def close_sum(found: np.ndarray, terms: list[np.ndarray], dtype: str) -> None:
    """``found`` is the sum of ``terms``, added in float32 or wider in any order, then rounded once to ``dtype``.

    n - 1 additions err by at most (n - 1) u sum|terms| (Higham 2002, section 4.2), the last rounding by one u of dtype.
    """
    wanted = np.sum(terms, axis=0)
    assert found.shape == wanted.shape, f"shape {found.shape}, wanted {wanted.shape}"
    adding = min(UNIT[dtype], UNIT["float32"])
    bound = 1.01 * ((len(terms) - 1) * adding * np.sum(np.abs(terms), axis=0) + UNIT[dtype] * np.abs(wanted))
    worst = np.max(np.abs(found - wanted) - bound, initial=-1.0)
    assert worst <= 0, f"beyond its bound by {worst}: found {found.ravel()[:6]}, wanted {wanted.ravel()[:6]}"


def check(name: str, *, groups: tuple[str, ...] = tuple(GROUPS), each: tuple[Any, ...] = ()) -> Callable[[Any], Any]:
    """Register ``function(env, group[, item])`` for each group and item as "name-group[-item]"."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for group in groups:
            for item in each or (None,):
                label = "-".join([name, group] + ([] if item is None else [str(item)]))
                CHECKS[label] = _bound(function, group, item)
        return function

    return register


def _bound(function: Callable[..., None], group: str, item: Any) -> Callable[[Env], None]:
    def run(env: Env) -> None:
        if env.groups[group] is None:
            raise LookupError("no part in it")
        function(env, env.groups[group], *(() if item is None else (item,)))

    return run


@check("all_reduce", each=DTYPES)
def _(env: Env, group: Any, dtype: str) -> None:
    held = [values(r, (3, 5, 7), dtype) for r in group.ranks]
    x = env.tensor(held[group.rank], dtype)
    out = env.c.all_reduce(x, group)
    assert out.dtype == x.dtype
    close_sum(env.numpy(out), held, dtype)
    equal(env.numpy(x), held[group.rank])  # the input is as it was


@check("all_reduce_max", each=DTYPES)
def _(env: Env, group: Any, dtype: str) -> None:
    held = [values(r, (4, 3), dtype) for r in group.ranks]
    equal(env.numpy(env.c.all_reduce(env.tensor(held[group.rank], dtype), group, "max")), np.max(held, axis=0))


@check("sums_are_wide", groups=("three", "four"), each=("bfloat16", "float16"))
def _(env: Env, group: Any, dtype: str) -> None:
    """2/u next to 0.75, which alone is less than half of the distance to the next number: lost unless added widely."""
    large = {"bfloat16": 256.0, "float16": 2048.0}[dtype]
    mine = np.full((group.size, 2), large if group.rank == 0 else 0.75)
    wanted = large + 2  # the multiple of 2 nearest to large + 1.5 and to large + 2.25
    for out in (
        env.c.all_reduce(env.tensor(mine, dtype), group),
        env.c.reduce_scatter(env.tensor(mine, dtype), group, 0),
    ):
        equal(env.numpy(out), np.full(out.shape, wanted))


@check("all_reduce_scalar")
def _(env: Env, group: Any) -> None:
    out = env.numpy(env.c.all_reduce(env.tensor(np.array(group.rank + 1.0)), group))
    equal(out, np.array(group.size * (group.size + 1) / 2))


@check("start_all_reduce")
def _(env: Env, group: Any) -> None:
    """Several in flight, waited for in another order; a second wait gives the same."""
    held = [[values(r, (17, i + 1), seed=i) for r in group.ranks] for i in range(3)]
    handles = [env.c.start_all_reduce(env.tensor(h[group.rank]), group) for h in held]
    for i in (2, 0, 1, 1):
        close_sum(env.numpy(handles[i].wait()), held[i], "float32")


@check("all_gather", each=DTYPES)
def _(env: Env, group: Any, dtype: str) -> None:
    for axis in (0, 1, 2, -1):
        held = [values(r, (3, 5, 7), dtype) for r in group.ranks]
        out = env.c.all_gather(env.tensor(held[group.rank], dtype), group, axis)
        equal(env.numpy(out), np.concatenate(held, axis))


@check("all_gather_uneven", each=("float32", "bfloat16", "int32"))
def _(env: Env, group: Any, dtype: str) -> None:
    for axis in (0, 1, -1):
        lengths = [(2 * r + 3) % 5 for r in range(group.size)]  # 3, 0, 2, 4: one rank has nothing
        shapes = [(3, n) if axis else (n, 3) for n in lengths]
        held = [values(r, shape, dtype) for r, shape in zip(group.ranks, shapes, strict=True)]
        out = env.c.all_gather(env.tensor(held[group.rank], dtype), group, axis, lengths)
        equal(env.numpy(out), np.concatenate(held, axis))


@check("reduce_scatter", each=FLOATS)
def _(env: Env, group: Any, dtype: str) -> None:
    for axis in (0, 1, 2, -1):
        shape = [3, 5, 7]
        shape[axis] *= group.size
        held = [values(r, tuple(shape), dtype) for r in group.ranks]
        out = env.c.reduce_scatter(env.tensor(held[group.rank], dtype), group, axis)
        close_sum(env.numpy(out), [np.split(h, group.size, axis)[group.rank] for h in held], dtype)


@check("start_reduce_scatter")
def _(env: Env, group: Any) -> None:
    held = [[values(r, (3 * group.size, i + 1), seed=i) for r in group.ranks] for i in range(2)]
    handles = [env.c.start_reduce_scatter(env.tensor(h[group.rank]), group, 0) for h in held]
    for i in (1, 0):
        close_sum(env.numpy(handles[i].wait()), [np.split(h, group.size)[group.rank] for h in held[i]], "float32")


@check("all_to_all", each=DTYPES)
def _(env: Env, group: Any, dtype: str) -> None:
    for split_axis, concat_axis in ((0, 1), (2, 1), (1, 0), (1, 1), (-1, 0)):
        shape = [3, 5, 7]
        shape[split_axis] *= group.size
        held = [values(r, tuple(shape), dtype) for r in group.ranks]
        out = env.c.all_to_all(env.tensor(held[group.rank], dtype), group, split_axis, concat_axis)
        equal(
            env.numpy(out), np.concatenate([np.split(h, group.size, split_axis)[group.rank] for h in held], concat_axis)
        )


@check("broadcast", each=DTYPES)
def _(env: Env, group: Any, dtype: str) -> None:
    for source in range(group.size):
        mine = env.tensor(values(env.rank, (3, 5), dtype), dtype)
        equal(env.numpy(env.c.broadcast(mine, group, source)), values(group.ranks[source], (3, 5), dtype))


@check("start_shift", each=DTYPES)
def _(env: Env, group: Any, dtype: str) -> None:
    """Once round the ring, the next block in flight while this one is looked at, as ring attention does."""
    block = env.tensor(values(env.rank, (3, 5), dtype), dtype)
    for step in range(group.size + 1):
        coming = env.c.start_shift(block, group)
        equal(env.numpy(block), values(group.ranks[(group.rank - step) % group.size], (3, 5), dtype))
        block = coming.wait()


@check("start_shift_two_rings")
def _(env: Env, group: Any) -> None:
    """Keys and their gradients travel at the same time; 3 MB is far more than a socket holds."""
    one, two = (values(env.rank, (n, 1000)) for n in (800, 700))
    handles = [env.c.start_shift(env.tensor(a), group) for a in (one, two)]
    before = group.ranks[group.rank - 1]
    for handle, n in zip(handles[::-1], (700, 800), strict=True):
        equal(env.numpy(handle.wait()), values(before, (n, 1000)))


@check("non_contiguous", each=("float32", "bfloat16"))
def _(env: Env, group: Any, dtype: str) -> None:
    n, c = group.size, env.c
    held = [values(r, (2, 3 * n, 5 * n), dtype) for r in group.ranks]
    turned = [np.swapaxes(h, 1, 2) for h in held]

    def mine() -> Any:
        return env.transposed(env.tensor(held[group.rank], dtype))

    close_sum(env.numpy(c.all_reduce(mine(), group)), turned, dtype)
    equal(env.numpy(c.all_gather(mine(), group, 1)), np.concatenate(turned, 1))
    pieces = [np.split(t, n, 1)[group.rank] for t in turned]
    close_sum(env.numpy(c.reduce_scatter(mine(), group, 1)), pieces, dtype)
    equal(env.numpy(c.all_to_all(mine(), group, 1, 2)), np.concatenate(pieces, 2))
    equal(env.numpy(c.broadcast(mine(), group, n - 1)), turned[n - 1])
    equal(env.numpy(c.start_shift(mine(), group).wait()), turned[group.rank - 1])


@check("refuses")
def _(env: Env, group: Any) -> None:
    """Lengths that do not divide, on every rank alike and before a message is sent."""
    x = env.tensor(np.zeros((group.size + 1, 3)))
    for call in (
        lambda: env.c.reduce_scatter(x, group, 0),
        lambda: env.c.all_to_all(x, group, 0, 1),
        lambda: env.c.all_gather(x, group, 0, [1] * group.size),
        lambda: env.mesh.make_group("turned", (1, 0), env.rank),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("took what it cannot do")


@check("agree", each=("sum", "max", "min"))
def _(env: Env, group: Any, op: str) -> None:
    """Float64 to the last bit: 1 + 2^-52 and 1e-300 are no float32."""
    held = [[1.0 + (r + 1) * 2.0**-52, 1e-300 * (r + 1), -1e300, float(r), np.pi] for r in range(group.size)]
    out = env.c.agree(held[group.rank], group, op)
    assert out == {"sum": np.sum, "max": np.max, "min": np.min}[op](held, axis=0).tolist(), out
    held[0][3] = np.nan
    assert np.isnan(env.c.agree(held[group.rank], group, op)[3]), "a NaN of one rank must reach all"


@check("barrier")
def _(env: Env, group: Any) -> None:
    arrived = [time.time()]
    if group.rank == 0:
        time.sleep(0.3)
        arrived = [time.time()]
    env.c.barrier(group)
    left = time.time()
    assert left >= max(env.c.agree(arrived, group, "max")), "left before the last rank came"


@check("gradient_gather_sequence")
def _(env: Env, group: Any) -> None:
    for axis in (0, 1):
        shape = (3, 5)
        held = [values(r, shape) for r in group.ranks]
        whole = np.concatenate(held, axis)
        grads = [values(r, whole.shape, seed=1) for r in group.ranks]
        out, dx = env.gradient(
            lambda t, a=axis: env.c.gather_sequence(t, group, a), held[group.rank], grads[group.rank]
        )
        equal(out, whole)
        close_sum(dx, [np.split(g, group.size, axis)[group.rank] for g in grads], "float32")


@check("gradient_scatter_sum")
def _(env: Env, group: Any) -> None:
    for axis in (0, 1):
        shape = (3 * group.size, 5) if axis == 0 else (3, 5 * group.size)
        held = [values(r, shape) for r in group.ranks]
        small = np.split(held[0], group.size, axis)[0].shape
        grads = [values(r, small, seed=1) for r in group.ranks]
        out, dx = env.gradient(lambda t, a=axis: env.c.scatter_sum(t, group, a), held[group.rank], grads[group.rank])
        close_sum(out, [np.split(h, group.size, axis)[group.rank] for h in held], "float32")
        equal(dx, np.concatenate(grads, axis))


def gradient_copy_to(env: Env, group: Any) -> None:
    grads = [values(r, (3, 5), seed=1) for r in group.ranks]
    out, dx = env.gradient(lambda t: env.c.copy_to(t, group), values(0, (3, 5)), grads[group.rank])
    equal(out, values(0, (3, 5)))
    close_sum(dx, grads, "float32")


check("gradient_copy_to")(gradient_copy_to)


@check("gradient_reduce_from")
def _(env: Env, group: Any) -> None:
    held, grad = [values(r, (3, 5)) for r in group.ranks], values(0, (3, 5), seed=1)
    out, dx = env.gradient(lambda t: env.c.reduce_from(t, group), held[group.rank], grad)
    close_sum(out, held, "float32")
    equal(dx, grad)


@check("gradient_swap_heads")
def _(env: Env, group: Any) -> None:
    """[B, s, H, D] with all heads of some positions -> all positions of some heads, and its gradient back."""
    n = group.size
    held = [values(r, (2, 3, 2 * n, 5)) for r in group.ranks]
    grads = [values(r, (2, 3 * n, 2, 5), seed=1) for r in group.ranks]
    out, dx = env.gradient(lambda t: env.c.swap_heads(t, group, 2, 1), held[group.rank], grads[group.rank])
    equal(out, np.concatenate([np.split(h, n, 2)[group.rank] for h in held], 1))
    equal(dx, np.concatenate([np.split(g, n, 1)[group.rank] for g in grads], 2))


@check("gradient_of_a_split_product")
def _(env: Env, group: Any) -> None:
    """x W1 W2 with W1 in columns and W2 in rows over the group: output and dx as of one process."""
    n, x, grad = group.size, values(0, (4, 6), seed=2), values(0, (4, 3), seed=3)
    first, second = values(0, (6, 5 * n), seed=4), values(0, (5 * n, 3), seed=5)
    mine = [env.tensor(p) for p in (np.split(first, n, 1)[group.rank], np.split(second, n, 0)[group.rank])]
    matmul = env.framework.matmul if env.backend == "pt" else env.framework.ops.matmul
    out, dx = env.gradient(
        lambda t: env.c.reduce_from(matmul(matmul(env.c.copy_to(t, group), mine[0]), mine[1]), group), x, grad
    )
    for found, wanted in ((out, x @ first @ second), (dx, grad @ second.T @ first.T)):
        # 5n, 3 and 6 terms in float32: relative Frobenius error of about 1e-7; a missing sum is an error of about 1.
        assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted), "not what one process computes"


@check("links", groups=("four",), each=DTYPES)
def _(env: Env, group: Any, dtype: str) -> None:
    """Both directions round the ring, several messages of other shapes on the way before the first is received."""
    links, r, shapes = env.links, env.rank, [(3, 5), (7,), (2, 2, 2)]
    sent = [
        env.c.send(env.tensor(values(r, shape, dtype, seed), dtype), links[way, r])
        for seed, shape in enumerate(shapes)
        for way in ("forward", "backward")
    ]
    for way, source in (("backward", (r + 1) % WORLD), ("forward", (r - 1) % WORLD)):
        for seed, shape in enumerate(shapes):
            equal(
                env.numpy(env.c.recv(shape, env.dtype(dtype), links[way, source])), values(source, shape, dtype, seed)
            )
    for handle in sent:
        handle.wait()


@check("links_of_one_pair", groups=("two",))
def _(env: Env, group: Any) -> None:
    """Two channels from the same rank to the same rank, received in another order than sent: as when a pipeline of two
    is a ring, where activations and gradients take the same way."""
    sent, links = [], {}
    for a, b in GROUPS["two"]:
        for way in ("forward", "backward"):
            links[way] = env.mesh.make_link(way, a, b, env.rank) or links.get(way)
    if group.rank == 0:
        for seed in range(2):
            sent += [env.c.send(env.tensor(values(w, (3, seed + 1))), links[n]) for w, n in enumerate(links)]
    else:
        for way, name in ((1, "backward"), (0, "forward")):
            for seed in range(2):
                out = env.c.recv((3, seed + 1), env.framework.float32, links[name])
                equal(env.numpy(out), values(way, (3, seed + 1)))
    for handle in sent:
        handle.wait()


@check("links_large", groups=("four",))
def _(env: Env, group: Any) -> None:
    """8 MB each way sent before either side receives: a send that waited for its receiver would hang here."""
    r, shape = env.rank, (2, 1000, 1000)
    sent = [env.c.send(env.tensor(values(r, shape)), env.links[way, r]) for way in ("forward", "backward")]
    for way, source in (("forward", (r - 1) % WORLD), ("backward", (r + 1) % WORLD)):
        equal(env.numpy(env.c.recv(shape, env.framework.float32, env.links[way, source])), values(source, shape))
    for handle in sent:
        handle.wait()


@check("traffic", groups=("three", "four"))
def _(env: Env, group: Any) -> None:
    """Payload: what this rank hands over; sums travel in float32. The same on every backend, composed or native."""
    n, c = group.size, env.c
    x, half = env.tensor(np.ones((n, 6))), env.tensor(np.ones((n, 6)), "bfloat16")
    c.TRAFFIC.reset()
    c.all_reduce(x, group)
    c.all_reduce(half, group)
    c.all_gather(half, group, 0)
    c.reduce_scatter(half, group, 0)
    c.all_to_all(x, group, 0, 1)
    c.start_shift(half, group).wait()
    env.gradient(lambda t: c.gather_sequence(t, group, 0), np.ones((n, 6)), np.ones((n * n, 6)))
    c.agree([1.0, 2.0], group, "sum")
    if n == WORLD:
        handle = c.send(half, env.links["forward", env.rank])
        c.recv((n, 6), env.framework.bfloat16, env.links["forward", (env.rank - 1) % n])
        handle.wait()
    name = group.name
    wanted = {
        ("all_reduce", name): [2, 2 * 24 * n],
        ("all_gather", name): [2, 12 * n + 24 * n],
        ("reduce_scatter", name): [2, 24 * n + 24 * n * n],
        ("all_to_all", name): [1, 24 * n],
        ("shift", name): [1, 12 * n],
        ("agree", name): [1, 16],
    } | ({("send", "forward"): [1, 12 * n]} if n == WORLD else {})
    assert dict(c.TRAFFIC) == wanted, dict(c.TRAFFIC)


class Note:
    """A heartbeat that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def enter(self, op: str, group: str, ranks: Any) -> None:
        self.seen.append((op, group, tuple(ranks)))

    def leave(self) -> None:
        self.seen.append(())


@check("heartbeat", groups=("four",))
def _(env: Env, group: Any) -> None:
    note = Note()
    watched = env.mesh.make_group("watched", group.ranks, env.rank, note)
    assert watched.handle is group.handle, "an equal set of ranks shares its communicator"
    env.c.all_reduce(env.tensor(np.ones(3)), watched)
    env.c.start_shift(env.tensor(np.ones(3)), watched).wait()
    assert note.seen == [("all_reduce", "watched", group.ranks), (), ("shift", "watched", group.ranks), ()], note.seen


@check("meshes", groups=("four",), each=("tp4", "tp2.dp2", "ring2.ulysses2", "pp2.tp2", "pp4", "pp2.cp2.vpp2"))
def _(env: Env, group: Any, text: str) -> None:
    """The groups of a layout are the layout's, talk, and its links lead round the pipeline."""
    from telechat_twins.core.parallel.layout import parse_layout

    layout = parse_layout(text)
    mesh = env.mesh.make_mesh(layout, env.rank, tied=True)
    assert mesh.coord == layout.coord(env.rank)
    for axis in ("tp", "cp", "ring", "ulysses", "dp", "replicas", "world"):
        made = getattr(mesh, axis)
        assert (made.name, made.ranks) == (axis, layout.ranks(axis, env.rank))
        assert env.c.agree([float(env.rank)], made, "sum") == [float(sum(made.ranks))], axis
    pipeline = layout.ranks("pp", env.rank)
    here, pp, wraps = mesh.coord.pp, layout.pp, layout.virtual > 1
    ends = {pipeline[0], pipeline[-1]} if pp > 1 and env.rank in (pipeline[0], pipeline[-1]) else {env.rank}
    assert set(mesh.tied.ranks) == ends
    after = pp > 1 and (wraps or here < pp - 1)
    before = pp > 1 and (wraps or here > 0)
    for out, coming, leads, comes, to in (
        (mesh.forward_out, mesh.forward_in, after, before, 1),
        (mesh.backward_out, mesh.backward_in, before, after, -1),
    ):
        assert (out is not None, coming is not None) == (leads, comes)
        handle = env.c.send(env.tensor(np.full(2, env.rank)), out) if out else None
        if coming:
            source = pipeline[(here - to) % pp]
            equal(env.numpy(env.c.recv((2,), env.framework.float32, coming)), np.full(2, float(source)))
        if handle:
            handle.wait()


class Rehearsal:
    """mindspore.mint.distributed as on Ascend: what the CPU has no kernel for is called first, so that MindSpore checks
    the arguments and shapes, must end in "unregistered", and is then answered from what the CPU has."""

    def __init__(self, dist: Any) -> None:
        self.dist = dist

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dist, name)

    def _try(self, call: Callable[..., Any], tensor: Any, *args: Any, **options: Any) -> None:
        try:
            call(*args, **options)
            tensor.asnumpy()  # errors come with the next reading
        except RuntimeError as error:
            assert "unregistered" in str(error), error
        else:
            raise AssertionError(f"{call.__name__}: the CPU can do it; call it there too")

    def _fill(self, out: Any, pieces: list[Any], work: Any) -> Any:
        concat = importlib.import_module("mindspore").ops.concat
        out.assign_value(concat(pieces, 0))
        return work

    def _gathered(self, tensor: Any, group: str) -> tuple[list[Any], int, Any]:
        """Every rank's tensor, this rank's index in the group, a work to wait for."""
        communication = importlib.import_module("mindspore.communication")
        pieces = [tensor * 0 for _ in range(communication.get_group_size(group))]
        work = self.dist.all_gather(pieces, tensor, group=group, async_op=True)
        return pieces, communication.get_rank(group), work

    def reduce_scatter_tensor(self, out: Any, x: Any, group: str, async_op: bool) -> Any:
        self._try(self.dist.reduce_scatter_tensor, out, out, x, group=group, async_op=async_op)
        pieces, rank, work = self._gathered(x, group)
        n = out.shape[0]
        return self._fill(out, [sum(p[rank * n : (rank + 1) * n] for p in pieces)], work)

    def all_to_all_single(self, out: Any, x: Any, group: str, async_op: bool) -> Any:
        self._try(self.dist.all_to_all_single, out, out, x, group=group, async_op=async_op)
        pieces, rank, work = self._gathered(x, group)
        n = x.shape[0] // len(pieces)
        return self._fill(out, [p[rank * n : (rank + 1) * n] for p in pieces], work)

    def batch_isend_irecv(self, operations: list[Any]) -> list[Any]:
        self._try(self.dist.batch_isend_irecv, operations[1].tensor, operations)
        calls = {"isend": self.dist.isend, "irecv": self.dist.irecv}
        return [calls[o.op](o.tensor, o.peer, group=o.group) for o in operations]


NATIVE = (
    "reduce_scatter-{}-float32",
    "start_reduce_scatter-{}",
    "all_to_all-{}-float32",
    "start_shift-{}-float32",
    "start_shift_two_rings-{}",
    "non_contiguous-{}-float32",
    "gradient_gather_sequence-{}",
    "gradient_swap_heads-{}",
    "all_reduce-{}-bfloat16",
    "agree-{}-sum",
    "broadcast-{}-int32",
)


@check("native")
def _(env: Env, group: Any) -> None:
    """MindSpore's Ascend branch of everything, rehearsed on the CPU."""
    if env.backend == "pt":
        raise LookupError("PyTorch has one branch")
    c = env.c
    kept = c.dist, c._composed
    c.dist, c._composed = Rehearsal(c.dist), lambda: False
    try:
        for name in NATIVE:
            CHECKS[name.format(group.name)](env)
        if group.name == "two":
            link = env.mesh.Link("forward", group.ranks[0], group.ranks[1], group.handle)
            if group.rank == 0:
                c.send(env.tensor(values(0, (3, 5))), link).wait()
            else:
                equal(env.numpy(c.recv((3, 5), env.framework.float32, link)), values(0, (3, 5)))
    finally:
        c.dist, c._composed = kept


def planted_missing_sum(env: Env) -> None:
    """The check of copy_to with a backward that forgets the sum over ranks, a classic: it must not pass."""
    whole = env.c.all_reduce
    env.c.all_reduce = lambda x, group, op="sum": x
    try:
        gradient_copy_to(env, env.groups["four"])
    finally:
        env.c.all_reduce = whole


CHECKS["planted_missing_sum"] = planted_missing_sum


def main(backend: str, folder: str) -> None:
    env = Env(backend)
    assert env.world == WORLD
    env.make_groups()
    results: dict[str, str] = {}
    for name, run in CHECKS.items():
        started = time.perf_counter()
        try:
            run(env)
            results[name] = "ok"
        except LookupError:
            results[name] = "no part"
        except Exception as error:  # the result of this check; the others still run
            results[name] = f"{error}\n{''.join(traceback.format_exception(error)[-3:])}"
        print(f"{name} {time.perf_counter() - started:.3f} s: {results[name]}", flush=True)
        # After every check: when one rank hangs, the others' results say where.
        Path(folder, f"results_{env.rank}.json").write_text(json.dumps(results))
    env.mesh.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
