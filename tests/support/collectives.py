"""Checks of collectives on one rank of four: the rank's backend, its inputs, comparisons, and the register of checks.

Inputs are functions of the rank, so that each rank knows what the others hold and computes the answer in numpy alone.
A check raises AssertionError when it fails, and LookupError where this rank has no part in it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

WORLD = 4
GROUPS = {"two": ((0, 1), (2, 3)), "three": ((0, 2, 3),), "four": ((0, 1, 2, 3),)}
FLOATS = ("float32", "float64", "bfloat16", "float16")
DTYPES = (*FLOATS, "int32")
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int32": 0.0}  # roundoff
CHECKS: dict[str, Callable[[Env], None]] = {}  # by label, in the order in which all ranks run them


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
