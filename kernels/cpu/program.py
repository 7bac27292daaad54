"""Programs: kernels that run one after another in one call, on memory by address.

    program = Program(library)
    x, y = program.view("float32"), program.view("float32")
    program.add("gelu", [x], [y], [])
    program.place(x, address, (rows, columns))          and y
    program.run()

Views are placed anew where addresses or shapes change; the kernels and which views they share stay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from telechat_twins.kernels.cpu.engine import View, describe_view

MOST_VIEWS, MOST_SCALARS = 16, 8  # of one kernel: kMostViews, kMostScalars of program.cc


class Program:
    """A list of kernels of ``library`` (build.load_plain, build.extension_library) with its views and scalars."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._run = library.tele_run_program
        self._run.argtypes, self._run.restype = (
            [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p],
            None,
        )
        self._words: list[int] = []
        self._dtypes: list[str] = []
        self._values: list[float] = []
        self._views: ctypes.Array[View] | None = None
        self._frozen: tuple[ctypes.Array[ctypes.c_int32], ctypes.Array[ctypes.c_double]] | None = None

    def view(self, dtype: str) -> int:
        """The number of a new view; ``dtype`` is one of engine.NAMES."""
        self._dtypes.append(dtype)
        return len(self._dtypes) - 1

    def dtype(self, view: int) -> str:
        return self._dtypes[view]

    def scalar(self, value: float = 0.0) -> int:
        """The number of a new scalar."""
        self._values.append(value)
        return len(self._values) - 1

    def add(self, name: str, inputs: Sequence[int], outputs: Sequence[int], scalars: Sequence[int]) -> None:
        """Append a kernel, on views and scalars by their numbers.

        Raises KeyError for an unknown kernel, ValueError for wrong numbers of arguments.
        """
        counts = [ctypes.c_int() for _ in range(3)]
        number = self._library.tele_kernel(name.encode(), *map(ctypes.byref, counts))
        if number < 0:
            raise KeyError(f"no kernel is named {name!r}")
        given = [len(inputs), len(outputs), len(scalars)]
        if [c.value for c in counts] != given or max(given[:2]) > MOST_VIEWS or given[2] > MOST_SCALARS:
            raise ValueError(f"{name}: {given} arguments for {[c.value for c in counts]}")
        if not all(0 <= view < len(self._dtypes) for view in (*inputs, *outputs)):
            raise ValueError(f"{name}: views {[*inputs, *outputs]} of {len(self._dtypes)}")
        if not all(0 <= scalar < len(self._values) for scalar in scalars):
            raise ValueError(f"{name}: scalars {[*scalars]} of {len(self._values)}")
        self._words += [number, *given, *inputs, *outputs, *scalars]

    def close(self) -> None:
        """No more kernels, views or scalars: those that there are can be placed, set and run."""
        self._views = (View * max(1, len(self._dtypes)))()
        words = (ctypes.c_int32 * len(self._words))(*self._words)
        self._frozen = words, (ctypes.c_double * max(1, len(self._values)))(*self._values)

    def place(self, view: int, address: int, shape: Sequence[int]) -> None:
        """The contiguous array at ``address``; its memory must live as long as the program runs."""
        assert self._views is not None, "close() comes first"
        describe_view(self._views[view], address, shape, self._dtypes[view])

    def move(self, view: int, address: int) -> None:
        """A placed view to another array of the same shape."""
        assert self._views is not None
        self._views[view].data = address

    def set(self, scalar: int, value: float) -> None:
        assert self._frozen is not None
        self._frozen[1][scalar] = value

    def run(self) -> None:
        """Run the kernels in order. Other Python threads go on meanwhile."""
        assert self._frozen is not None and self._views is not None
        words, values = self._frozen
        self._run(words, len(words), self._views, values)
