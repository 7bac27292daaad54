"""The private names of MindSpore that this project uses, in one place; tests/unit/test_autograd_ms.py watches them.

``Function`` is the class of operators with a gradient of their own. ``run_backward`` and ``executor`` belong to the
engine under ``ms.grad``; they are None in a release that lacks them.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor

try:
    from mindspore.common._grad_function import _Function as Function
except ImportError:

    class Function:  # type: ignore[no-redef]
        """Stands in where MindSpore has no such class; composite operators on one rank need none."""

        @classmethod
        def apply(cls, *_: Any) -> Tensor:
            """Raises RuntimeError."""
            raise RuntimeError(f"MindSpore {ms.__version__} has no custom gradients in PyNative mode; use 2.9.0")


try:
    from mindspore._c_expression import run_backward
    from mindspore.graph.api import _pynative_executor as executor
except ImportError:
    run_backward = executor = None


def recording() -> bool:
    """Whether operators are recorded for a backward pass; True where this release cannot tell."""
    return executor is None or executor.grad_flag()


__all__ = ["Function", "executor", "recording", "run_backward"]
