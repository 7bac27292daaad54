"""Transfers in flight, as the collectives of both backends return them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from telechat_twins.core.parallel.mesh import Group, Link, watched

T = TypeVar("T")  # the framework's tensor, which is not callable


class Work(Protocol):
    """A transfer as the framework's library returns it."""

    def wait(self) -> object: ...


@dataclass
class Handle(Generic[T]):
    """A transfer in flight. It keeps the tensors alive; ``wait`` may be called again for the same result."""

    op: str
    group: Group | Link
    works: Sequence[Work]
    result: Callable[[], T] | T
    kept: T | None = None

    def wait(self) -> T:
        """What was received or reduced; of a send, the tensor sent."""
        if self.works:
            with watched(self.op, self.group):
                for work in self.works:
                    work.wait()
            self.works, self.kept = (), None
        if callable(self.result):
            self.result = self.result()
        return self.result
