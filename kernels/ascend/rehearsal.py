"""Ascend's code path on a machine without an Ascend.

Every CANN operator is called through ``call``. On Ascend that is the call itself. In a ``rehearsal`` on MindSpore's CPU
device the operator is called for real, too: MindSpore checks its arguments, dtypes and shapes as it would on Ascend and
then finds no kernel for the device. Exactly that refusal is expected, any other outcome is an error; then the operator
is answered by its definition in numpy (kernels.ascend.definitions), which also checks what CANN documents and MindSpore
leaves to the device.

MindSpore runs operators in the background, and a failure can be reported once more at the next one: after each refusal
the reports are read until none is left, so that none is taken for that of another operator.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import mindspore as ms
import numpy as np
from mindspore import Tensor

from telechat_twins.kernels.ascend import definitions as ascend_definitions
from telechat_twins.kernels.ascend.operands import Operand

# How an operator that has no kernel for the CPU is refused, where the words are not those of all the others.
REFUSALS = {"LayerNormExt": "Create kernelmod for op LayerNormExt failed"}
IN_PLACE = {
    "AdamW": ("var", "m", "v"),
    "InplaceIndexCopy": ("input",),
}  # the arguments that an operator overwrites, in the order of its results
_PATIENCE, _PAUSE = 60.0, 0.002  # seconds: until the reports must have ended, and between two looks

Argument: TypeAlias = "Tensor | ms.Type | bool | int | float | str | Sequence[int] | Sequence[Tensor] | None"
Results: TypeAlias = "Tensor | tuple[Tensor, ...]"

_counts: Counter[str] | None = None


def rehearsing() -> bool:
    """Whether CANN's operators are being answered by their definitions."""
    return _counts is not None


@contextmanager
def rehearsal() -> Iterator[Counter[str]]:
    """Inside, Ascend's code path runs on the CPU; yields how often each operator was called, by MindSpore's name.

    RuntimeError on another device, and when one is going on already.
    """
    global _counts
    device = ms.get_context("device_target")
    if device != "CPU":
        raise RuntimeError(f"a rehearsal is for the CPU; on {device} the operators run themselves")
    if _counts is not None:
        raise RuntimeError("a rehearsal is going on already")
    _counts = Counter()
    try:
        yield _counts
    finally:
        _counts = None


def call(name: str, operator: Callable[..., Results], *args: Argument, **kwargs: Argument) -> Any:
    """``operator(*args, **kwargs)``; in a rehearsal, its refusal and then the answer of the definition ``name``.

    Raises what MindSpore's own checks raise, TypeError or ValueError from the documented constraints, and RuntimeError
    when the operator is not refused as one without a kernel is.
    """
    if _counts is None:
        return operator(*args, **kwargs)
    named = inspect.signature(operator).bind(*args, **kwargs).arguments
    operands = {key: _operand(value) if isinstance(value, Tensor) else value for key, value in named.items()}
    _settle(name)  # what an operator before this one did is not this one's doing
    _expect_refusal(name, operator, args, kwargs)
    answers = getattr(ascend_definitions, ascend_definitions.NAMES[name])(**operands)
    _counts[name] += 1
    if name in IN_PLACE:
        for key, answer in zip(IN_PLACE[name], answers, strict=True):
            named[key].copy_(_tensor(answer))
        return tuple(named[key] for key in IN_PLACE[name])
    return _tensor(answers) if isinstance(answers, Operand) else tuple(_tensor(answer) for answer in answers)


def _expect_refusal(
    name: str, operator: Callable[..., Results], args: tuple[Argument, ...], kwargs: dict[str, Argument]
) -> None:
    expected = REFUSALS.get(name, f"The kernel {name} unregistered")
    try:
        results = operator(*args, **kwargs)
        for result in results if isinstance(results, tuple | list) else (results,):
            result.asnumpy()
    except RuntimeError as error:
        if not _is(error, expected):
            _settle(name, str(error).splitlines()[0])
            raise
    except Exception as error:
        _settle(name, str(error).splitlines()[0])
        raise
    else:
        raise RuntimeError(f"{name} ran on the CPU; a rehearsal expects it to be refused: {expected!r}")
    _settle(name, expected)


def _settle(name: str, expected: str = "") -> None:
    """Read until nothing fails any more. Raises a failure that is not the ``expected`` one."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            (Tensor(np.ones(1, np.float32)) + 1).asnumpy()
            return
        except Exception as error:
            if not expected or not _is(error, expected):
                raise
            time.sleep(_PAUSE)  # the thread that runs operators may still be on its way past the refused one
    raise RuntimeError(f"{name}: its refusal is reported without end")


def _is(error: Exception, expected: str) -> bool:
    return str(error).startswith(expected)


def _operand(tensor: Tensor) -> Operand:
    name = str(tensor.dtype).lower()
    if name == "bfloat16":
        return Operand(tensor.astype(ms.float32).asnumpy().astype(np.float64), name)
    array = tensor.asnumpy()
    return Operand(array.astype(np.float64) if name.startswith("float") else array, name)


def _tensor(operand: Operand) -> Tensor:
    dtype = getattr(ms, operand.dtype)
    if operand.dtype == "bfloat16":
        return Tensor(operand.value.astype(np.float32)).astype(dtype)
    return Tensor(np.ascontiguousarray(operand.value), dtype)
