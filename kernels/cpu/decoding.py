"""Steps of generation as one call: all kernels of a decoder from ids to logits, on weights and pages by address.

The kernels are those that MindSpore's operators call one by one, in their order, so that the bits are the same; what is
saved is the time between them, of Python and of a framework, which for one row is as long as the kernels. Which kernels
there are, and with which biases, follows from the model's table of parameters. float32, bfloat16, float16, and int8
matrices; a model between two sizes or over several ranks runs operator by operator. Sequences with low-rank adapters
(core.inference.adapters) go through a program of their adapter's while they all have the same; a pass over all weights
for each of several takes longer than one pass operator by operator.

N tokens, W of them wanted, E hidden, H heads, K kv heads, D head dim, F ffn, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from telechat_twins.core.inference.runner import Step
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.masks import padding_bias
from telechat_twins.core.model.params import parameter_table
from telechat_twins.kernels.cpu.ops import FEW
from telechat_twins.kernels.cpu.program import Program

DTYPES = ("float32", "bfloat16", "float16")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}
_LINE = 64  # bytes of a cache line


class Memory(NamedTuple):
    """A contiguous array of a framework: ``dtype`` one of engine.NAMES; ``owner`` keeps it alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: object


class Matrix(NamedTuple):
    """A parameter: its values and, in int8, float32 factors of its rows."""

    values: Memory
    factors: Memory | None = None


Held = Callable[[str], Matrix]  # a parameter by its logical name
Pages = Sequence[tuple[Memory, Memory]]  # keys and values [P, size, K, D] of each block
LowRank = Mapping[
    str, tuple[Memory, Memory]
]  # A [r, in] and scale B [out, r] of an adapter, by a linear's logical name


def serves(config: ModelConfig, dtypes: Sequence[str]) -> bool:
    """Whether this decoder can run in one call: without growth masks or norms over some channels, in one of DTYPES.
    ``dtypes``: of weights, products and stream, which must be one."""
    plain = config.growth is None and config.norm_divisor is None
    return plain and len(set(dtypes)) == 1 and dtypes[0] in DTYPES


class DecoderPrograms:
    """One decoder with its weights and pages: a program of the kernels of few rows and, but in float16, another whose
    products take any number, as MindSpore's operators have them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        dtype: str,
        held: Held,
        pages: Pages,
        adapters: Sequence[LowRank] = (),
    ) -> None:
        """``held`` gives every parameter of core.model.params.parameter_table, vectors and dense matrices in ``dtype``,
        one of DTYPES, as the pages and ``adapters`` are, which are numbered from 1. ValueError for others."""
        table = parameter_table(config)
        self.matrices = {name: _checked(name, held(name), spec.shape, dtype) for name, spec in table.items()}
        self.pages = [_checked_pages(pair, config, dtype) for pair in pages]
        kinds = (False,) if dtype == "float16" else (False, True)
        for adapter in adapters:
            for name, pair in adapter.items():
                _check_low_rank(name, pair, table[f"{name}.weight"].shape, dtype)
        # By adapter, the model alone first.
        self._programs = [
            [DecoderProgram(library, config, dtype, self.matrices, self.pages, kind, adapter) for kind in kinds]
            for adapter in ({}, *adapters)
        ]

    def takes(self, step: Step) -> bool:
        """Whether there is a program for as many tokens as these, all with one adapter or none."""
        return self._program(step) is not None

    def run(self, step: Step, rope: Sequence[np.ndarray]) -> np.ndarray:
        """Logits [W, V] float32; ``rope``: cos, sin and, with xPos, the scales, float32 [N, D/2] each. ValueError for a
        step that ``takes`` refuses."""
        program = self._program(step)
        if program is None:
            counts = (
                f"{len(step.ids)} tokens, {len(step.wanted)} of them wanted, adapters {set(step.adapters.tolist())}"
            )
            raise ValueError(f"step: {counts}, which no program takes")
        return program.run(step, rope)

    def _program(self, step: Step) -> DecoderProgram | None:
        number = int(step.adapters[0])
        if (step.adapters != number).any():
            return None
        return next((program for program in self._programs[number] if program.takes(step)), None)


class DecoderProgram:
    """One program of ``DecoderPrograms``; with ``many`` its dense products take any number of rows."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        dtype: str,
        matrices: Mapping[str, Matrix],
        pages: Pages,
        many: bool,
        adapter: LowRank,
    ) -> None:
        self._adapter, self._spare = adapter, dict[tuple[str, int], int]()
        self._config, self._dtype, self._many = config, dtype, many
        self._program = Program(library)
        self._table, self._matrices, self._pages = parameter_table(config), matrices, pages
        self._fixed: list[tuple[int, Memory]] = []
        self._widths: dict[int, tuple[int, ...]] = {}  # of an activation's view: the axes behind N or W
        self._last: set[int] = set()  # activations of the wanted tokens alone
        self._room: dict[int, np.ndarray] = {}  # of views with memory of their own
        self._alias: dict[int, int] = {}  # views of another view's memory
        self._rows = (0, 0)
        self._shapes: dict[int, tuple[int, ...]] = {}  # of the last step's arrays
        linear = [name for name, spec in self._table.items() if spec.kind in ("matrix", "head")]
        whole = not (config.tied_embeddings or adapter)
        whole = whole and all(self._matrices[name].factors is not None for name in linear)
        # The kernel of few rows serves any number that meet int8 matrices (kernels/cpu/ops.py).
        self._most = math.inf if whole else FEW
        self._record()

    def takes(self, step: Step) -> bool:
        if self._many:  # the head is a product of few rows
            return len(step.wanted) <= FEW
        return len(step.ids) <= self._most

    def run(self, step: Step, rope: Sequence[np.ndarray]) -> np.ndarray:
        tokens, wanted = len(step.ids), len(step.wanted)
        if (tokens, wanted) != self._rows:
            self._place_rows(tokens, wanted)
        arrays = [step.ids, step.wanted, step.slots, step.starts, step.lengths, step.tables]
        given: list[np.ndarray] = [np.ascontiguousarray(array, np.int32) for array in arrays]
        given += [np.ascontiguousarray(table, np.float32)[None, :, None] for table in rope]
        logits = np.empty((wanted, self._config.vocab_size), np.float32)
        for view, array in zip((*self._inputs, self._logits), (*given, logits), strict=True):
            if self._shapes.get(view) == array.shape:
                self._program.move(view, array.ctypes.data)
            else:
                self._program.place(view, array.ctypes.data, array.shape)
                self._shapes[view] = array.shape
        self._program.set(self._singles, step.singles)
        self._program.run()
        return logits

    def _place_rows(self, tokens: int, wanted: int) -> None:
        """Memory and views of the activations."""
        for view, axes in self._widths.items():
            rows = wanted if view in self._last else tokens
            if view not in self._alias:
                size = rows * math.prod(axes) * _BYTES[self._program.dtype(view)] + _LINE
                if view not in self._room or len(self._room[view]) < size:
                    self._room[view] = np.empty(size, np.uint8)
            address = self._room[self._alias.get(view, view)].ctypes.data
            shape = (1, rows, *axes) if len(axes) == 2 else (rows, *axes)
            self._program.place(view, address + -address % _LINE, shape)
        self._rows = tokens, wanted

    def _record(self) -> None:
        p, config = self._program, self._config
        E, F, D = config.hidden_size, config.ffn_hidden_size, config.head_dim
        H, K = config.num_heads, config.num_kv_heads
        self._none, self._zero, self._one = p.view("float32"), p.scalar(0.0), p.scalar(1.0)
        self._eps, self._scale, self._singles = p.scalar(config.norm_eps), p.scalar(D**-0.5), p.scalar()
        self._statistics = [self._rows_of("float32"), self._rows_of("float32")]
        ids, wanted, *places = (p.view("int32") for _ in range(6))
        tables = [p.view("float32") for _ in range(4 if config.position == "xpos" else 2)]
        self._inputs = ids, wanted, *places, *tables
        self._logits = p.view("float32")
        self._stream, self._sum, self._normed, self._branch = (self._rows_of(self._dtype, E) for _ in range(4))
        self._q, self._k, self._v = (self._rows_of(self._dtype, heads * D) for heads in (H, K, K))
        self._attended = self._rows_of(self._dtype, H * D)
        heads = [self._seen(view, n, D) for view, n in ((self._q, H), (self._k, K), (self._v, K), (self._attended, H))]
        turned = [self._rows_of(self._dtype, H, D), self._rows_of(self._dtype, K, D)]
        self._gate, self._up, self._active = (self._rows_of(self._dtype, F) for _ in range(3))
        embed = self._matrix("embed.weight")[0]
        p.add("embedding", [embed, ids], [self._stream], [])
        if config.input_mult != 1.0:
            factor = p.scalar(config.input_mult)
            p.add("scaled", [self._stream, self._none], [self._stream], [factor, self._zero])
        for number, pages in enumerate(self._pages):
            self._block(f"layers.{number}.", [self._fix(memory) for memory in pages], heads, turned, places, tables)
        rows, normed = (self._rows_of(self._dtype, E, wanted=True) for _ in range(2))
        found = self._rows_of(self._dtype, config.vocab_size, wanted=True)
        p.add("embedding", [self._stream, wanted], [rows], [])
        self._norm("norm", rows, normed)
        head = (*self._matrix("embed.weight" if config.tied_embeddings else "head.weight"), self._none)
        self._few_rows(normed, [head], [found])
        bias, added = padding_bias(config, 0, config.vocab_size), self._none
        if bias is not None:
            padding = np.ascontiguousarray(bias, np.float32)
            added = self._fix(Memory(padding.ctypes.data, padding.shape, "float32", padding))
        flag = self._zero if bias is None else self._one
        p.add("scaled", [found, added], [self._logits], [p.scalar(config.logit_mult), flag])
        p.close()
        p.place(self._none, 0, (0,))
        for view, memory in self._fixed:
            p.place(view, memory.address, memory.shape)

    def _block(
        self,
        name: str,
        pages: list[int],
        heads: list[int],
        turned: list[int],
        places: list[int],
        tables: list[int],
    ) -> None:
        p = self._program
        self._norm(f"{name}attn_norm", self._stream, self._normed)
        self._linears(self._normed, [f"{name}attn.{part}" for part in "qkv"], [self._q, self._k, self._v])
        q, k, v, out = heads
        scaled = self._one if len(tables) == 4 else self._zero
        p.add("rope", [q, k, *(tables + [self._none] * 2)[:4]], turned, [self._one, scaled, scaled])
        p.add("paged_attention", [*turned, v, *pages, *places], [out], [self._scale, self._singles])
        self._linears(self._attended, [f"{name}attn.o"], [self._branch])
        self._added_norm(f"{name}ffn_norm")
        if f"{name}ffn.gate.weight" in self._table:
            self._linears(self._normed, [f"{name}ffn.gate", f"{name}ffn.up"], [self._gate, self._up])
            p.add("swiglu", [self._gate, self._up], [self._active], [])
        else:
            self._linears(self._normed, [f"{name}ffn.up"], [self._up])
            p.add("gelu", [self._up], [self._active], [])
        self._linears(self._active, [f"{name}ffn.down"], [self._branch])
        p.add("add", [self._sum, self._branch], [self._stream], [])

    def _norm(self, name: str, x: int, normed: int) -> None:
        weight, rest = self._matrix(f"{name}.weight")[0], [self._eps, self._zero]
        first, second = self._statistics
        if f"{name}.bias" in self._table:
            bias = self._matrix(f"{name}.bias")[0]
            self._program.add("layer_norm", [x, weight, bias, self._none], [normed, first, second], rest)
        else:
            self._program.add("rms_norm", [x, weight, self._none], [normed, first], rest)

    def _added_norm(self, name: str) -> None:
        """The sum of stream and branch in ``_sum``, and its norm in ``_normed``."""
        if f"{name}.bias" in self._table:
            self._program.add("add", [self._stream, self._branch], [self._sum], [])
            self._norm(name, self._sum, self._normed)
            return
        weight = self._matrix(f"{name}.weight")[0]
        inputs, outputs = [self._branch, self._stream, weight, self._none], [self._normed, self._sum]
        self._program.add("add_rms_norm", inputs, [*outputs, self._statistics[0]], [self._eps, self._zero])

    def _linears(self, x: int, names: Sequence[str], outputs: Sequence[int]) -> None:
        """Products of x [N, in] with the matrices of up to three layers, of few rows in one kernel."""
        layers = [(*self._matrix(f"{name}.weight"), self._bias(name)) for name in names]
        if self._many and all(factors == self._none for _, factors, _ in layers):
            for layer, out in zip(layers, outputs, strict=True):
                self._product(x, layer, out)
        else:
            self._few_rows(x, layers, outputs)
        for name, out in zip(names, outputs, strict=True):
            if name in self._adapter:
                self._add_low_rank(x, self._adapter[name], out)

    def _add_low_rank(self, x: int, pair: tuple[Memory, Memory], out: int) -> None:
        """out + scale B A x in place of ``out``."""
        spare = []
        for kind, matrix in zip("ab", pair, strict=True):
            place = kind, matrix.shape[0]
            if place not in self._spare:
                self._spare[place] = self._rows_of(self._dtype, matrix.shape[0])
            spare.append(self._spare[place])
        for rows, matrix, found in zip((x, spare[0]), pair, spare, strict=True):
            layer = self._fix(matrix), self._none, self._none
            if self._many:
                self._product(rows, layer, found)
            else:
                self._few_rows(rows, [layer], [found])
        self._program.add("add", [out, spare[1]], [out], [])

    def _few_rows(self, x: int, layers: Sequence[tuple[int, int, int]], outputs: Sequence[int]) -> None:
        inputs, scalars = [x], []
        for layer in layers:
            inputs += layer
            scalars += [self._flag(view) for view in layer[1:]]
        self._program.add(f"linear_rows_{len(layers)}" if len(layers) > 1 else "linear_rows", inputs, outputs, scalars)

    def _product(self, x: int, layer: tuple[int, int, int], out: int) -> None:
        """As kernels.mindspore.autograd.Linear multiplies."""
        matrix, _, bias = layer
        plain = [self._zero, self._zero]  # neither operand is transposed
        if self._dtype == "float32":
            self._program.add("matmul", [x, matrix, bias], [out], [*plain, self._flag(bias)])
            return
        self._program.add("matmul_bf16", [x, matrix], [out], plain)
        if bias != self._none:
            self._program.add("add_bias", [out, bias], [], [])

    def _bias(self, name: str) -> int:
        return self._matrix(f"{name}.bias")[0] if f"{name}.bias" in self._table else self._none

    def _flag(self, view: int) -> int:
        """The scalar that says whether there is such an input."""
        return self._zero if view == self._none else self._one

    def _matrix(self, name: str) -> tuple[int, int]:
        """Views of a parameter's values and factors."""
        values, factors = self._matrices[name]
        return self._fix(values), self._none if factors is None else self._fix(factors)

    def _fix(self, memory: Memory) -> int:
        """A view that stays where it is."""
        view = self._program.view(memory.dtype)
        self._fixed.append((view, memory))
        return view

    def _rows_of(self, dtype: str, *axes: int, wanted: bool = False) -> int:
        """A view of an activation [N, *axes], or [W, *axes] of the ``wanted``; with two axes [1, N, *axes]."""
        view = self._program.view(dtype)
        self._widths[view] = axes
        if wanted:
            self._last.add(view)
        return view

    def _seen(self, view: int, heads: int, head_dim: int) -> int:
        """The memory of an activation [N, heads * head_dim] as [1, N, heads, head_dim]."""
        other = self._rows_of(self._dtype, heads, head_dim)
        self._alias[other] = view
        return other


def _checked(name: str, matrix: Matrix, shape: tuple[int, ...], dtype: str) -> Matrix:
    values, factors = matrix
    if values.shape != shape or values.dtype != (dtype if factors is None else "int8"):
        raise ValueError(f"{name}: {values.dtype} {values.shape}, needs {dtype} or, with factors, int8 {shape}")
    if factors is not None and (factors.shape != shape[:1] or factors.dtype != "float32"):
        raise ValueError(f"{name}: factors {factors.dtype} {factors.shape}, needs float32 {shape[:1]}")
    return matrix


def _check_low_rank(name: str, pair: tuple[Memory, Memory], shape: tuple[int, ...], dtype: str) -> None:
    rank = pair[0].shape[0]
    found = [(half.shape, half.dtype) for half in pair]
    if found != [((rank, shape[1]), dtype), ((shape[0], rank), dtype)]:
        raise ValueError(f"{name}: adapter {found}, needs {dtype} [r, {shape[1]}] and [{shape[0]}, r]")


def _checked_pages(pair: tuple[Memory, Memory], config: ModelConfig, dtype: str) -> tuple[Memory, Memory]:
    for memory in pair:
        if memory.dtype != dtype or memory.shape[2:] != (config.num_kv_heads, config.head_dim):
            needs = f"{dtype} [P, size, {config.num_kv_heads}, {config.head_dim}]"
            raise ValueError(f"pages: {memory.dtype} {memory.shape}, needs {needs}")
    return pair
