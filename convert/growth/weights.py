"""Growing the tensors of a model: which numbers the old entries keep and which the new ones begin with.

A grown tensor is made in bands of rows, so that memory does not depend on its size. Axes: V vocabulary, E channels,
H query heads * D, K kv heads * D, F ffn. With masks the new entries may be anything (Yao et al., arXiv 2305.02869);
without them, what writes the new channels, what reads new heads and neurons, and the outputs of new blocks are zero
(Gesmundo and Maile, arXiv 2308.06103), and under LayerNorm, which moves a zero, the gains of new channels too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from telechat_twins.convert.growth.plan import GrowthPlan
from telechat_twins.core.checkpoint.pieces import PieceSpec
from telechat_twins.core.checkpoint.read import TensorPiece
from telechat_twins.core.model.growth import axis_maps
from telechat_twins.core.model.growth_mask import head_map, kv_map
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.params import parameter_axes, parameter_table

Read = Callable[[str, tuple[slice, ...]], np.ndarray]  # a box of an old tensor, by its old name

BAND_BYTES = 8 * 2**20  # small enough to be in a cache when it is written, and for memory to be used again
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class _Rule:
    """How one parameter grows. ``source``: the old parameter that its old entries come from; None: it has none.

    ``index``: for every row, and column, the old one (-1: new). ``zero``: new rows, and columns, that begin at zero.
    """

    shape: tuple[int, ...]
    source: str | None
    index: tuple[np.ndarray, ...]
    zero: tuple[np.ndarray, ...]

    @property
    def bands(self) -> Iterator[slice]:
        rows = self.shape[0]
        step = max(1, BAND_BYTES // (4 * (self.shape[1] if len(self.shape) == 2 else 1)))
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows))

    def piece(self, name: str, rows: slice, array: np.ndarray) -> TensorPiece:
        return TensorPiece(name, array, (rows.start, 0)[: len(self.shape)], self.shape)

    def spec(self, name: str, rows: slice, dtype: np.dtype) -> PieceSpec:
        extent = (rows.stop - rows.start, *self.shape[1:])
        return PieceSpec(name, dtype, (rows.start, 0)[: len(self.shape)], extent, self.shape)

    def old_entries(self, rows: slice) -> list[np.ndarray] | None:
        """The old rows, and columns, that a band continues; None where it continues none."""
        wanted = [part[part >= 0] for part in (self.index[0][rows], *self.index[1:])]
        return wanted if self.source is not None and all(part.size for part in wanted) else None


def grow_weights(plan: GrowthPlan, read: Read, dtype: np.dtype = FLOAT32) -> Iterator[TensorPiece]:
    """All parameters of the grown model in forward order, in bands of rows, each in the dtype that ``read`` gives;
    ``dtype``: of those that continue no old one."""
    for name in parameter_table(plan.config):
        rule = _rule(plan, name)
        for rows in rule.bands:
            old = _old_band(rule, rows, read, plan.scale(name))
            if old is not None:
                dtype = old.dtype
            out = np.zeros((rows.stop - rows.start, *rule.shape[1:]), dtype)
            _draw_new(plan, name, rule, rows, out)
            _place_old(rule, rows, old, out)
            yield rule.piece(name, rows, out)


def planned_weights(plan: GrowthPlan, dtype_of: Callable[[str], np.dtype], dtype: np.dtype) -> Iterator[PieceSpec]:
    """What grow_weights will make; ``dtype_of``: of an old tensor, by its old name."""
    for name in parameter_table(plan.config):
        rule = _rule(plan, name)
        for rows in rule.bands:
            if rule.source is not None and rule.old_entries(rows) is not None:
                dtype = dtype_of(rule.source)
            yield rule.spec(name, rows, dtype)


def planned_state(plan: GrowthPlan) -> Iterator[PieceSpec]:
    """What grow_state will make."""
    for letter, name in itertools.product("mv", parameter_table(plan.config)):
        rule = _rule(plan, name)
        for rows in rule.bands:
            yield rule.spec(f"{letter}.{name}", rows, FLOAT32)


def grow_arrays(plan: GrowthPlan, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """grow_weights of a model in memory."""
    grown: dict[str, np.ndarray] = {}
    for piece in grow_weights(plan, lambda name, box: weights[name][box]):
        whole = grown.setdefault(piece.name, np.empty(piece.shape, piece.array.dtype))
        whole[piece.offset[0] : piece.offset[0] + len(piece.array)] = piece.array
    return grown


def grow_state(plan: GrowthPlan, read: Read) -> Iterator[TensorPiece]:
    """``m.<name>`` and ``v.<name>``: old entries keep theirs, new entries and new blocks begin at zero.

    A tensor multiplied by k has gradients divided by k, so m is divided by k and v by k^2; s copies of a kv head share
    its gradient, so theirs are divided by s and s^2 too. ``read`` is asked for the old model's "m.<name>", "v.<name>".
    """
    copies = max(1, int(np.bincount(kv_map(plan.growth.before.heads, plan.growth.after.heads) + 1)[1:].max()))
    for letter, power in (("m", 1), ("v", 2)):
        for name in parameter_table(plan.config):
            rule = _rule(plan, name)
            known = rule.source is not None and _layer(name) not in plan.growth.new_layers
            factor = (plan.scale(name) * (copies if parameter_axes(name)[0] == "K" else 1)) ** -power
            state = replace(rule, source=f"{letter}.{rule.source}" if known else None)
            for rows in rule.bands:
                out = np.zeros((rows.stop - rows.start, *rule.shape[1:]), np.float32)
                _place_old(rule, rows, _old_band(state, rows, read, factor), out)
                yield rule.piece(f"{letter}.{name}", rows, out)


def _rule(plan: GrowthPlan, name: str) -> _Rule:
    growth, config = plan.growth, plan.config
    spec, axes, layer = parameter_table(config)[name], parameter_axes(name), _layer(name)
    maps = axis_maps(growth.before, growth.after)
    index = tuple(maps[axis] for axis in axes)
    *_, module, kind = name.split(".")
    writes, zero = module in ("o", "down"), [np.zeros(len(part), bool) for part in index]
    # New dimensions of old heads: scores and outputs must not see them.
    if module == "k":
        zero[0] |= _inner(plan, "K")
    elif name.endswith("o.weight"):
        zero[1] |= _inner(plan, "H")
    source = None if layer is not None and growth.layers[layer] < 0 else _renamed(name, layer, growth.layers)
    if growth.method == "zero":
        if writes or (config.norm == "layernorm" and module in ("norm", "attn_norm", "ffn_norm")):
            zero[0] |= index[0] < 0
        if module == "embed" or (writes and kind == "weight"):
            zero[1] |= index[1] < 0
        if writes and layer in growth.new_layers:
            source, index = None, tuple(np.full(len(part), -1) for part in index)
            zero = [np.ones(len(part), bool) for part in index]
    if source is None:
        index = tuple(np.full(len(part), -1) for part in index)
    return _Rule(spec.shape, source, index, tuple(zero))


def _inner(plan: GrowthPlan, axis: str) -> np.ndarray:
    """bool: dimensions that are new in a head that is not."""
    growth = plan.growth
    heads = (head_map if axis == "H" else kv_map)(growth.before.heads, growth.after.heads)
    known = np.repeat(heads >= 0, growth.after.head_dim)
    return known & (axis_maps(growth.before, growth.after)[axis] < 0)


def _old_band(rule: _Rule, rows: slice, read: Read, scale: float) -> np.ndarray | None:
    """The old entries of a band: [its old rows, old columns], scaled; None without any."""
    wanted = rule.old_entries(rows)
    if rule.source is None or wanted is None:
        return None
    box = tuple(slice(int(part.min()), int(part.max()) + 1) for part in wanted)
    array = read(rule.source, box)
    local = [part - part.min() for part in wanted]
    for axis, part in enumerate(local):
        if not np.array_equal(part, np.arange(array.shape[axis])):
            array = np.take(array, part, axis)
    # Rounded once: the factors are roots and ratios that no narrow type holds.
    return array if scale == 1.0 else (array.astype(np.float64) * scale).astype(array.dtype)


def _place_old(rule: _Rule, rows: slice, old: np.ndarray | None, out: np.ndarray) -> None:
    if old is None:
        return
    at = [np.flatnonzero(part >= 0) for part in (rule.index[0][rows], *rule.index[1:])]
    # Old columns and rows mostly lie together: slices copy several times faster than an index.
    if all(part[-1] - part[0] + 1 == len(part) for part in at):
        out[tuple(slice(part[0], part[-1] + 1) for part in at)] = old
    else:
        out[np.ix_(*at)] = old


def _draw_new(plan: GrowthPlan, name: str, rule: _Rule, rows: slice, out: np.ndarray) -> None:
    """The new entries that do not begin at zero, as core.model.init makes them for the grown model."""
    index, zero = (rule.index[0][rows], *rule.index[1:]), (rule.zero[0][rows], *rule.zero[1:])

    def draw(*box: slice) -> None:
        whole = tuple(slice(s.start + shift, s.stop + shift) for s, shift in zip(box, (rows.start, 0), strict=False))
        init_tensor(name, plan.config, plan.options.seed, whole, plan.options.scheme, out[box])

    fresh_rows, old_rows = _runs((index[0] < 0) & ~zero[0]), _runs(index[0] >= 0)
    if len(index) == 1:
        for run in fresh_rows:
            draw(run)
        return
    for run in fresh_rows:
        for columns in _runs(~zero[1]):
            draw(run, columns)
    for columns in _runs((index[1] < 0) & ~zero[1]):
        for run in old_rows:
            draw(run, columns)


def _runs(which: np.ndarray) -> list[slice]:
    """The stretches of a bool vector that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], which, [False])).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _renamed(name: str, layer: int | None, layers: tuple[int, ...]) -> str:
    return name if layer is None else f"layers.{layers[layer]}.{name.split('.', 2)[2]}"
