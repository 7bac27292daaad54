"""Checks of what lies around the collectives: links of a pipeline, traffic count, heartbeats, meshes of layouts, and
MindSpore's Ascend branch rehearsed on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.collectives import CHECKS, DTYPES, GROUPS, WORLD, Env, check, equal, values


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
