"""Adapters of linears that another format packs into one matrix: key_value of TeleChat2, c_attn and c_fc of FLM, w_qkv.

An adapter of a packed matrix has one A for all its parts, and its B has the rows of the packed matrix, in the same
order. So, apart, every part gets A whole and its own rows of B (they are interleaved by heads in key_value: taken as
[keys; values], shapes still fit). Together, parts with the same A share it; parts with different A are stacked,

    A = [A_k; A_v]      rows of k in B = [B_k, 0]      rows of v = [0, B_v]

with rank and alpha multiplied by the number of parts, which leaves alpha / rank as it was: exact, at twice the rank.
A part without an adapter has rows of zeros. Both are recognised on the way back, so that there and back is the same
bits in either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.convert.names import Binding, Conv1D
from telechat_twins.core.checkpoint.adapter import A, Adapter, B
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import AdapterModule
from telechat_twins.core.model.params import parameter_table


@dataclass(frozen=True)
class PackedLinear:
    """A linear of another format: ``name`` without .weight there, ``parts`` the logical linears in it."""

    name: str
    parts: tuple[str, ...]
    binding: Binding
    rows: int
    columns: int

    def split_b(self, b: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        """B [rows, r] -> that of each part [out, r]."""
        if isinstance(self.binding.transform, Conv1D):  # W is [in, out] there, and B [out, r] all the same
            return self.binding.transform.split(b.T, config)
        return self.binding.transform.split(b, config)

    def join_b(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        """The inverse of ``split_b``."""
        joined = self.binding.transform.join(parts, config)
        return np.ascontiguousarray(joined.T if isinstance(self.binding.transform, Conv1D) else joined)


def packed_linears(bindings: Mapping[str, Binding], config: ModelConfig) -> dict[str, PackedLinear]:
    """Name there -> linear, of every matrix that can have an adapter."""
    table = parameter_table(config)
    linears = {}
    for released, binding in bindings.items():
        if released.endswith(".weight") and all(table[name].kind == "matrix" for name in binding.logical):
            name = released.removesuffix(".weight")
            shapes = [table[part].shape for part in binding.logical]
            parts = tuple(part.removesuffix(".weight") for part in binding.logical)
            linears[name] = PackedLinear(name, parts, binding, sum(shape[0] for shape in shapes), shapes[0][1])
    return linears


@dataclass(frozen=True)
class Pair:
    """Both halves of an adapter as another format stores them: ``a`` [r, in] and ``b`` [rows, r], when read."""

    rank: int
    alpha: float
    a: Callable[[], np.ndarray]
    b: Callable[[], np.ndarray]


class Unpacked:
    """The logical adapters in pairs of another format: ``modules`` in the model's order, and ``read``."""

    def __init__(self, pairs: Mapping[str, Pair], linears: Mapping[str, PackedLinear], config: ModelConfig) -> None:
        self._config, self._pairs, self._linears = config, pairs, linears
        self._places: dict[str, tuple[str, int, slice]] = {}  # part -> linear there, which part, which of the ranks
        self._last: tuple[str, list[np.ndarray]] | None = None
        found: dict[str, AdapterModule] = {}
        for name, pair in pairs.items():
            kept, blocks = self._blocks(name)
            for number, (part, block) in enumerate(zip(linears[name].parts, blocks, strict=True)):
                if number in kept:
                    rank = block.stop - block.start
                    self._places[part] = name, number, block
                    alpha = pair.alpha if rank == pair.rank else pair.alpha * rank / pair.rank
                    found[part] = AdapterModule(name=part, rank=rank, alpha=alpha)
        order = [part for linear in linears.values() for part in linear.parts]
        self.modules = {part: found[part] for part in order if part in found}

    def read(self, tensor: str) -> np.ndarray:
        """``layers.3.attn.k.lora_b`` and the like, as stored."""
        part, _, half = tensor.rpartition(".")
        name, number, block = self._places[part]
        if half == A:
            return self._pairs[name].a()[block]
        return np.ascontiguousarray(self._split(name)[number][:, block])

    def _split(self, name: str) -> list[np.ndarray]:
        if self._last is None or self._last[0] != name:
            self._last = name, self._linears[name].split_b(self._pairs[name].b(), self._config)
        return self._last[1]

    def _blocks(self, name: str) -> tuple[list[int], list[slice]]:
        """Which parts have an adapter, and each part's share of the ranks."""
        pair, linear = self._pairs[name], self._linears[name]
        everything = list(range(len(linear.parts))), [slice(0, pair.rank)] * len(linear.parts)
        if len(linear.parts) == 1:
            return everything
        parts = self._split(name)
        kept = [number for number, part in enumerate(parts) if not _is_zero(part)]
        if not kept:
            return everything  # an adapter that was not trained yet
        size = pair.rank // len(kept)
        blocks = [slice(0, pair.rank)] * len(parts)
        if len(kept) == 1 or size * len(kept) != pair.rank:
            return kept, blocks
        for place, number in enumerate(kept):
            blocks[number] = slice(place * size, (place + 1) * size)
        a = pair.a()
        stacked = all(
            not _is_zero(parts[j][:, blocks[j]]) and all(_is_zero(parts[j][:, blocks[i]]) for i in kept if i != j)
            for j in kept
        ) and any(a[blocks[j]].tobytes() != a[blocks[kept[0]]].tobytes() for j in kept)
        return (kept, blocks) if stacked else (kept, everything[1])


def packed_pairs(adapter: Adapter, linears: Mapping[str, PackedLinear]) -> Iterator[tuple[str, float, Pair]]:
    """(name there, scale, pair) of every linear there that has an adapter, in its order.

    UserError for parts whose scales differ: one B A x has one.
    """
    for name, linear in linears.items():
        present = [adapter.modules[part] for part in linear.parts if part in adapter.modules]
        if not present:
            continue
        scales = {module.scale for module in present}
        if len(scales) > 1:
            said = ", ".join(f"{module.name} {module.scale:g}" for module in present)
            raise UserError(
                f"{adapter.path}: {name} holds {' and '.join(linear.parts)} under one scale, and theirs (alpha / rank) "
                f"are {said}; merge the adapter into the model instead (tele merge)"
            )
        yield name, present[0].scale, _joined(adapter, linear, present)


def _joined(adapter: Adapter, linear: PackedLinear, present: Sequence[AdapterModule]) -> Pair:
    """The one adapter of a packed linear."""
    halves = [adapter.read(f"{module.name}.{A}") for module in present]
    alike = all(half.shape == halves[0].shape and half.tobytes() == halves[0].tobytes() for half in halves)
    ranks = [present[0].rank] if alike else [module.rank for module in present]
    total = sum(ranks)
    starts = dict(zip((module.name for module in present), np.cumsum([0, *ranks]), strict=False))

    def joined_b() -> np.ndarray:
        parts = []
        for part in linear.parts:
            rows = parameter_table(adapter.config)[f"{part}.weight"].shape[0]
            wide = np.zeros((rows, total), halves[0].dtype)
            if part in adapter.modules:
                start = 0 if alike else int(starts[part])
                wide[:, start : start + adapter.modules[part].rank] = adapter.read(f"{part}.{B}")
            parts.append(wide)
        return linear.join_b(parts, adapter.config)

    alpha = present[0].alpha if len(ranks) == 1 else present[0].scale * total
    if len(set(ranks)) == 1:
        alpha = present[0].alpha * len(ranks)
    return Pair(total, alpha, lambda: halves[0] if alike else np.concatenate(halves), joined_b)


def _is_zero(array: np.ndarray) -> bool:
    """Whether every bit is zero: a negative zero would not come back."""
    return not np.ascontiguousarray(array).view(np.uint8).any()
