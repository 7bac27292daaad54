"""Engines that run C++ kernels: on MindSpore tensors through the extension, on numpy arrays through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np

from telechat_twins.kernels.cpu.build import KERNELS, load_extension, load_plain

if TYPE_CHECKING:
    import mindspore as ms

Array: TypeAlias = "np.ndarray | ms.Tensor"
DType: TypeAlias = "np.dtype | ms.Type"
Spec: TypeAlias = tuple[DType, tuple[int, ...]]  # dtype and shape of an output
NAMES = ("float32", "bfloat16", "float16", "int32", "int64", "float64", "int8")  # in the order of kernel.h's Dtype
AXES = 6


def usual_threads() -> int:
    """Default number of threads: OMP_NUM_THREADS, or the processors of the process's affinity mask.

    MindSpore sets the variable to 1 on import, in the C library's environment only: os.environ has the user's value.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))


class MindSporeEngine:
    """Kernels as operators of MindSpore's PyNative mode."""

    def __init__(self) -> None:
        import mindspore as ms

        self._module = load_extension()
        self._codes = {getattr(ms, name): code for code, name in enumerate(NAMES)}
        self.dtypes = {name: getattr(ms, name) for name in NAMES}
        self._run, self._numbers = self._module.run, functools.cache(self._find)
        self.set_threads(usual_threads())

    def _find(self, name: str) -> int:
        number, *_ = self._module.find(name)
        if number < 0:
            raise KeyError(f"no kernel is named {name!r}")
        return number

    def run(
        self, name: str, inputs: Sequence[Array], outputs: Sequence[Spec], scalars: Sequence[float], free: int
    ) -> Any:
        """Run a kernel; returns its outputs: None, a tensor, or a tuple. The first ``free`` inputs may be strided."""
        codes = self._codes
        return self._run(self._numbers(name), inputs, [(codes[t], shape) for t, shape in outputs], scalars, free)

    def name_of(self, x: Array) -> str:
        code = self._codes.get(x.dtype)
        return str(x.dtype).lower() if code is None else NAMES[code]

    def unit_stride(self, x: ms.Tensor) -> ms.Tensor:
        """x, or a copy whose last axis is contiguous."""
        return x if x.is_contiguous() or x.stride()[-1] == 1 else x.contiguous()

    def set_threads(self, threads: int) -> None:
        self._module.set_threads(threads)

    def refuse_split(self, refuse: bool) -> None:
        self._module.refuse_split(refuse)


class View(ctypes.Structure):
    """struct View of kernel.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * AXES),
        ("stride", ctypes.c_int64 * AXES),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class NumpyEngine:
    """Kernels on numpy arrays, for tests and the address sanitizer."""

    def __init__(self, *flags: str, sources: tuple[str, ...] = KERNELS) -> None:
        """``flags``, ``sources``: see ``load_plain``."""
        self._library = load_plain(*flags, sources=sources)
        types = [np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in NAMES]
        self._codes = {dtype: code for code, dtype in enumerate(types)}
        self.dtypes = dict(zip(NAMES, types, strict=True))
        self._numbers = functools.cache(self._find)

    def _find(self, name: str) -> tuple[int, tuple[int, ...]]:
        """A kernel's number; how many inputs, outputs and scalars it takes."""
        counts = [ctypes.c_int() for _ in range(3)]
        number = self._library.tele_kernel(name.encode(), *map(ctypes.byref, counts))
        if number < 0:
            raise KeyError(f"no kernel is named {name!r}")
        return number, tuple(c.value for c in counts)

    def run(
        self, name: str, inputs: Sequence[Array], outputs: Sequence[Spec], scalars: Sequence[float], free: int
    ) -> Any:
        number, counts = self._numbers(name)
        if counts != (len(inputs), len(outputs), len(scalars)):
            raise ValueError(f"{name}: {len(inputs)}, {len(outputs)}, {len(scalars)} arguments for {counts}")
        given = [x if i < free else np.ascontiguousarray(x) for i, x in enumerate(inputs)]
        made = [np.empty(shape, dtype) for dtype, shape in outputs]
        self._library.tele_run(number, self._views(given), self._views(made), (ctypes.c_double * 16)(*scalars))
        return None if not made else made[0] if len(made) == 1 else tuple(made)

    def call(self, name: str, inputs: int, outputs: int, scalars: Sequence[float]) -> Call:
        """A call of one of this engine's kernels, see Call."""
        return Call(name, inputs, outputs, scalars, self._library)

    def _views(self, arrays: Sequence[np.ndarray]) -> ctypes.Array[View]:
        views = (View * max(1, len(arrays)))()
        for view, x in zip(views, arrays, strict=False):
            view.data, view.ndim, view.dtype = x.ctypes.data, x.ndim, self._codes[x.dtype]
            view.shape[: x.ndim] = x.shape
            view.stride[: x.ndim] = [s // x.itemsize for s in x.strides]
        return views

    def name_of(self, x: Array) -> str:
        code = self._codes.get(x.dtype)
        return str(x.dtype) if code is None else NAMES[code]

    def unit_stride(self, x: np.ndarray) -> np.ndarray:
        return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)

    def set_threads(self, threads: int) -> None:
        self._library.tele_set_threads(threads)

    def refuse_split(self, refuse: bool) -> None:
        self._library.tele_refuse_split(refuse)


class Call:
    """Prepared call of a kernel on memory by address, for contiguous tensors of a framework without an engine.

    Views and scalars that stay the same from call to call are set once.
    """

    def __init__(
        self, name: str, inputs: int, outputs: int, scalars: Sequence[float], library: ctypes.CDLL | None = None
    ) -> None:
        """``library``: of ``load_plain``, that of all kernels without it. Raises KeyError for an unknown kernel,
        ValueError for wrong numbers of arguments."""
        library = library or load_plain()
        counts = [ctypes.c_int() for _ in range(3)]
        self._number = library.tele_kernel(name.encode(), *map(ctypes.byref, counts))
        if self._number < 0:
            raise KeyError(f"no kernel is named {name!r}")
        if [c.value for c in counts] != [inputs, outputs, len(scalars)]:
            raise ValueError(f"{name}: {inputs}, {outputs}, {len(scalars)} arguments for {counts}")
        self._run, self._scalars, self._count = library.tele_run, (ctypes.c_double * 16)(*scalars), len(scalars)
        self.inputs, self.outputs = (View * max(1, inputs))(), (View * max(1, outputs))()

    def set(self, scalars: Sequence[float]) -> None:
        """Other scalars, as many; ValueError for another number."""
        if len(scalars) != self._count:
            raise ValueError(f"{len(scalars)} scalars for {self._count}")
        self._scalars[: self._count] = [*scalars]

    def run(self) -> None:
        self._run(self._number, self.inputs, self.outputs, self._scalars)


def describe_view(view: View, address: int, shape: Sequence[int], dtype: str) -> None:
    """Set ``view`` to the contiguous array at ``address``; ``dtype`` is one of NAMES."""
    view.data, view.ndim, view.dtype = address, len(shape), NAMES.index(dtype)
    stride = 1
    for axis in reversed(range(len(shape))):
        view.shape[axis], view.stride[axis] = shape[axis], stride
        stride *= shape[axis]


Engine: TypeAlias = MindSporeEngine | NumpyEngine

_engines: dict[str, Engine] = {}
_threads: list[int] = []  # the limit set by limit_threads, applied to engines made later
_refused: list[bool] = []  # the choice of choose_split, likewise


def engine_of(x: Array) -> Engine:
    """The engine for the type of x, made on first use."""
    kind = "numpy" if isinstance(x, np.ndarray) else "mindspore"
    if kind not in _engines:
        _engines[kind] = NumpyEngine() if kind == "numpy" else MindSporeEngine()
        for threads in _threads:
            _engines[kind].set_threads(threads)
        for refuse in _refused:
            _engines[kind].refuse_split(refuse)
    return _engines[kind]


def use_engine(kind: str, engine: Engine) -> None:
    """Use ``engine`` for tensors of ``kind`` ("numpy", "mindspore"), e.g. one with other compiler flags."""
    _engines[kind] = engine


def limit_threads(threads: int) -> None:
    """Limit the threads of every kernel of this process."""
    _threads[:] = [threads]
    for engine in _engines.values():
        engine.set_threads(threads)


def choose_split(split: bool) -> None:
    """Whether float32 products of this process use matrix tiles, where there are any (kernels/cpu/split_matmul.cc)."""
    _refused[:] = [not split]
    for engine in _engines.values():
        engine.refuse_split(not split)


def tiles_obstacle(kind: str) -> str:
    """Why the library of ``kind`` ("numpy", "mindspore") cannot use matrix tiles here, a clause; empty where it can.

    Raises BuildError where the library cannot be compiled, which on a processor without tiles is not tried.
    """
    try:
        features = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        features = []
    if not {"amx_bf16", "amx_tile", "avx512bw"} <= set(features):
        return "the processor has no AMX tiles of bfloat16"
    granted = load_extension().has_split() if kind == "mindspore" else load_plain().tele_has_split()
    return "" if granted else "the system does not grant AMX tiles, or the compiler does not know them"
