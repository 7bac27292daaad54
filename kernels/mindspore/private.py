"""Private MindSpore names that this project uses.

tests/unit/kernels/test_private_names.py fails when a release renames them or changes their signature.

``Function`` is the base class of custom autograd functions. ``run_backward`` and ``executor`` belong to the engine
under ``ms.grad``; they are None in a release that lacks them.
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
    """State of one call of a Function for its backward pass: saved tensors and attributes set by the operator."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...


try:
    from mindspore.common._grad_function import _Function
except ImportError:

    class Function:  # type: ignore[no-redef]
        """Placeholder for a MindSpore without custom autograd functions; composite operators on one rank need none."""

        @classmethod
        def apply(cls, *_: object) -> Tensor:
            """Always raises RuntimeError."""
            raise RuntimeError(
                f"custom gradients in PyNative mode: not in MindSpore {ms.__version__}; install MindSpore 2.9.0"
            )

else:

    class Function(_Function):  # type: ignore[no-redef]
        """Custom autograd function: static ``forward(ctx, *inputs)`` and ``backward(ctx, *grads)``.

        MindSpore 2.9.0 and 2.10.0 leak the tuple ``ctx.needs_input_grad`` of each call, 40 + 8 n bytes for n inputs.
        Every forward pass therefore replaces it by the shared empty tuple, which frees it. No backward here reads it;
        the engine drops gradients it does not need.
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
    """Whether operators are recorded for a backward pass; True where this release does not expose it."""
    return executor is None or executor.grad_flag()


def is_leaf(x: Tensor) -> bool:
    """Whether no recorded operator computed x; True where this release does not tell."""
    leaf: bool = getattr(x, "_is_leaf", True)
    return leaf


def import_extension(builder: ms.ops.CustomOpBuilder, library: Path) -> ModuleType:
    """The module of a library compiled outside ``builder``, registered in the way of MindSpore's own build."""
    return builder._import_module(str(library))


def set_world_rank(rank: int) -> None:
    """Set the rank that point-to-point calls of mint.distributed look up for this process on the CPU."""
    distributed._GROUP_RANK_CACHE["hccl_world_group"] = rank


__all__ = [
    "Context",
    "Function",
    "executor",
    "import_extension",
    "is_leaf",
    "recording",
    "run_backward",
    "set_world_rank",
]
