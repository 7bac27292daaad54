"""Emulation of Ascend's code path on a machine without an Ascend.

Every CANN operator is called through ``call``, on Ascend a plain call. In a ``rehearsal`` on MindSpore's CPU device the
operator is called too: MindSpore checks arguments, dtypes and shapes as on Ascend and then fails to find a kernel for
the device. Any outcome but that failure is an error. The result then comes from the operator's numpy definition
(kernels.ascend.definitions), which also checks the constraints that CANN documents and MindSpore leaves to the device.

MindSpore runs operators asynchronously and may report a failure again at the next operator: after each expected failure
the reports are drained, so that none is attributed to another operator.
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

# The message of an operator without a CPU kernel, where it differs from the usual one.
REFUSALS = {"LayerNormExt": "Create kernelmod for op LayerNormExt failed"}
IN_PLACE = {
    "AdamW": ("var", "m", "v"),
    "InplaceIndexCopy": ("input",),
}  # the arguments that an operator overwrites, in the order of its results
_DRAIN_TIMEOUT_S, _POLL_S = 60.0, 0.002  # until failure reports must have ended; between two polls

Argument: TypeAlias = "Tensor | ms.Type | bool | int | float | str | Sequence[int] | Sequence[Tensor] | None"
Results: TypeAlias = "Tensor | tuple[Tensor, ...]"

_counts: Counter[str] | None = None


def rehearsing() -> bool:
    """Whether CANN's operators are computed by their definitions."""
    return _counts is not None


@contextmanager
def rehearsal() -> Iterator[Counter[str]]:
    """Context in which Ascend's code path runs on the CPU; yields the number of calls by MindSpore's operator name.

    Raises RuntimeError on another device, and inside another rehearsal.
    """
    global _counts
    device = ms.get_context("device_target")
    if device != "CPU":
        raise RuntimeError(f"rehearsal: needs MindSpore's CPU device, got {device}, where the operators themselves run")
    if _counts is not None:
        raise RuntimeError("rehearsal: already active; rehearsals do not nest")
    _counts = Counter()
    try:
        yield _counts
    finally:
        _counts = None


def call(name: str, operator: Callable[..., Results], *args: Argument, **kwargs: Argument) -> Any:
    """``operator(*args, **kwargs)``; in a rehearsal, its expected failure and then the result of the definition
    ``name``.

    Raises the errors of MindSpore's own checks, TypeError or ValueError from the documented constraints, and
    RuntimeError when the operator does not fail for lack of a kernel.
    """
    if _counts is None:
        return operator(*args, **kwargs)
    named = inspect.signature(operator).bind(*args, **kwargs).arguments
    operands = {key: _operand(value) if isinstance(value, Tensor) else value for key, value in named.items()}
    _settle(name)  # raises failures of earlier operators before this one runs
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
        raise RuntimeError(f"{name}: ran on the CPU; a rehearsal expects the failure {expected!r}")
    _settle(name, expected)


def _settle(name: str, expected: str = "") -> None:
    """Run a trivial operator until no failure is reported. Raises a failure other than ``expected``."""
    deadline = time.monotonic() + _DRAIN_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            (Tensor(np.ones(1, np.float32)) + 1).asnumpy()
            return
        except Exception as error:
            if not expected or not _is(error, expected):
                raise
            time.sleep(_POLL_S)  # MindSpore's executor thread may not have passed the failed operator yet
    raise RuntimeError(f"{name}: its failure is still reported after {_DRAIN_TIMEOUT_S:.0f} s")


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
