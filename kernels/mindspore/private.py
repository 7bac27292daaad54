"""Private names of MindSpore that this project uses, in one place.

tests/unit/kernels/test_private_names.py fails when a release renames them or changes their signature.

``Function`` is the class of operators with a gradient of their own. ``run_backward`` and ``executor`` belong to the
engine under ``ms.grad``; they are None in a release that lacks them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import mindspore as ms
from mindspore import Tensor
from mindspore.mint.distributed import distributed


class Context(Protocol):
    """State of one call of a Function for its backward pass: saved tensors, and attributes of each operator's own."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...


try:
    from mindspore.common._grad_function import _Function
except ImportError:

    class Function:  # type: ignore[no-redef]
        """Stands in where MindSpore has no such class; composite operators on one rank need none."""

        @classmethod
        def apply(cls, *_: object) -> Tensor:
            """Raises RuntimeError."""
            raise RuntimeError(f"MindSpore {ms.__version__} has no custom gradients in PyNative mode; use 2.9.0")

else:

    class Function(_Function):  # type: ignore[no-redef]
        """An operator with a gradient of its own: static ``forward(ctx, *inputs)`` and ``backward(ctx, *grads)``.

        MindSpore 2.9.0 and 2.10.0 never free the tuple ``ctx.needs_input_grad`` of a call: 40 + 8 n bytes for n inputs,
        for ever. So every forward pass ends by putting the one empty tuple in its place, which frees it. Nothing here
        reads it: a gradient that the engine does not want is dropped by the engine.
        """

        def __init_subclass__(cls, **options: object) -> None:
            super().__init_subclass__(**options)
            forward = cls.__dict__.get("forward")
            if forward is None:
                return

            @functools.wraps(forward.__func__)
            def released(ctx: Context, *inputs: object) -> Tensor | tuple[Tensor, ...]:
                try:
                    return forward.__func__(ctx, *inputs)
                finally:
                    ctx.needs_input_grad = ()

            cls.forward = staticmethod(released)  # type: ignore[method-assign]


try:
    from mindspore._c_expression import run_backward
    from mindspore.graph.api import _pynative_executor as executor
except ImportError:
    run_backward = executor = None


def recording() -> bool:
    """Whether operators are recorded for a backward pass; True where this release cannot tell."""
    return executor is None or executor.grad_flag()


def import_extension(builder: ms.ops.CustomOpBuilder, library: Path) -> ModuleType:
    """The module of a library that was compiled outside ``builder``, registered as MindSpore's own build does it."""
    return builder._import_module(str(library))


def set_world_rank(rank: int) -> None:
    """The rank that point-to-point calls of mint.distributed look up for this process on the CPU."""
    distributed._GROUP_RANK_CACHE["hccl_world_group"] = rank


__all__ = ["Context", "Function", "executor", "import_extension", "recording", "run_backward", "set_world_rank"]
