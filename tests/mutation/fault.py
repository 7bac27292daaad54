"""A planted fault: functions of the product replaced in this process, and put back afterwards.

A fault is written once and planted in either twin: it takes the backend's name and yields what to replace. Faults of
programs of many ranks send as many messages as the right program, so that no rank waits for another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

Change = tuple[Any, str, Any]  # owner, attribute, what to put there
Plant = Callable[[str], Iterable[Change]]
FORWARD = {"ms": "construct", "pt": "forward"}  # the method that a module computes in

KINDS = {
    "factor": "a factor that is missing, or there twice",
    "axis": "statistics over another axis, or of other elements",
    "halves": "two halves, two heads or two arguments swapped",
    "group": "a sum over the wrong group of ranks, or no sum",
    "stale": "a buffer of before: a gradient, a message, a table, an optimizer's moment",
    "twice": "a copy counted twice, or work done twice",
    "position": "positions, labels or steps off by one",
    "one rank": "the data, or the part, of one rank in the place of another's",
    "dtype": "a dtype too narrow somewhere",
    "remainder": "a remainder, a bias, a mask or a padding that is dropped",
    "schedule": "another learning rate, clipping or decay",
    "resume": "state that a checkpoint does not give back",
    "growth": "what is new in a growing model does not begin as it must",
    "adapter": "low-rank adapters",
    "preference": "the loss of preference pairs",
}


@dataclass(frozen=True)
class Fault:
    """``check``: the check of the suite that is expected to see it (tests/mutation/checks.py); ``bound``: a pattern of
    the bound that must be broken. ``text`` says what the fault is. ``survives``: why no bound sees it, for a fault that
    is kept although none does."""

    name: str
    kind: str
    check: str
    bound: str
    text: str
    plant: Plant
    survives: str = ""


CATALOGUE: dict[str, Fault] = {}


def fault(kind: str, check: str, bound: str, survives: str = "") -> Callable[[Plant], Plant]:
    """Enter a function into the catalogue, under its name; its docstring says what the fault is."""

    def enter(plant: Plant) -> Plant:
        name = str(plant.__name__).replace("_", " ")
        if kind not in KINDS or name in CATALOGUE:
            raise ValueError(f"{name}: kind '{kind}' is unknown, or the name is taken")
        text = " ".join((plant.__doc__ or "").split())
        CATALOGUE[name] = Fault(name, kind, check, bound, text, plant, survives)
        return plant

    return enter


@contextmanager
def planted(fault: Fault | None, backend: str) -> Iterator[None]:
    """The process with the fault; without one as it is."""
    with ExitStack() as stack:
        for owner, name, value in fault.plant(backend) if fault is not None else ():
            stack.enter_context(_changed(owner, name, value))
        yield


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    real = vars(owner).get(name)  # a static method as it is, not as a class would bind it
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, real)
        else:
            delattr(owner, name)


class Tensors:
    """The few functions on tensors that faults need, in either framework."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.library: ModuleType = importlib.import_module({"ms": "mindspore", "pt": "torch"}[backend])
        self.space: Any = self.library.ops if backend == "ms" else self.library

    def cat(self, tensors: Any, axis: int = 0) -> Any:
        return self.space.concat(tuple(tensors), axis) if self.backend == "ms" else self.space.cat(tuple(tensors), axis)

    def rolled(self, x: Any, axis: int, by: int = 1) -> Any:
        """x with the first ``by`` entries of ``axis`` moved to its end."""
        parts = x.shape[axis] - by
        first, rest = self.part(x, axis, 0, by), self.part(x, axis, by, parts)
        return self.cat((rest, first), axis)

    def swapped(self, x: Any, axis: int) -> Any:
        """x with the two halves of ``axis`` swapped."""
        return self.rolled(x, axis, x.shape[axis] // 2)

    def part(self, x: Any, axis: int, first: int, count: int) -> Any:
        """``count`` entries of ``axis``."""
        return x[tuple(slice(first, first + count) if i == axis else slice(None) for i in range(x.ndim))]

    def constant(self, x: Any) -> Any:
        """x without a gradient."""
        return self.space.stop_gradient(x) if self.backend == "ms" else x.detach()

    def mean(self, x: Any, axis: int) -> Any:
        """With ``axis`` kept, of length 1."""
        return x.mean(axis, keep_dims=True) if self.backend == "ms" else x.mean(axis, keepdim=True)

    def tanh(self, x: Any) -> Any:
        return self.space.tanh(x)

    def sigmoid(self, x: Any) -> Any:
        return self.space.sigmoid(x)

    def rounded(self, x: Any, dtype: str = "bfloat16") -> Any:
        """x as if it had been held in ``dtype``; the gradient passes through the same cast."""
        narrow = getattr(self.library, dtype)
        if self.backend == "ms":
            return self.space.cast(self.space.cast(x, narrow), x.dtype)
        return x.to(narrow).to(x.dtype)

    def erf(self, x: Any) -> Any:
        return self.space.erf(x)

    def cast(self, x: Any, dtype: Any) -> Any:
        """x in a dtype of the framework, or one given by its name."""
        dtype = getattr(self.library, dtype) if isinstance(dtype, str) else dtype
        return self.space.cast(x, dtype) if self.backend == "ms" else x.to(dtype)

    def not_negative(self, x: Any) -> Any:
        """max(x, 0)."""
        return x * (x > 0).astype(x.dtype) if self.backend == "ms" else x.clamp(min=0)
