"""Checks of every collective and of its gradient, in groups of two, three and four ranks, against numpy."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tests.support.collectives import CHECKS, DTYPES, FLOATS, Env, check, close_sum, equal, values


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


def planted_missing_sum(env: Env) -> None:
    """The check of copy_to with a backward that forgets the sum over ranks, a classic: it must not pass."""
    whole = env.c.all_reduce
    env.c.all_reduce = lambda x, group, op="sum": x
    try:
        gradient_copy_to(env, env.groups["four"])
    finally:
        env.c.all_reduce = whole


CHECKS["planted_missing_sum"] = planted_missing_sum
