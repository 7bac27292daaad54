"""Parallel layout: rank coordinates, process groups, and the divisibility that a model must satisfy.

The world is pp x dp x cp x tp with tp fastest: ``rank = ((p * dp + d) * cp + c) * tp + t``. The context axis is itself
ring x ulysses with ulysses fastest: ``c = r * ulysses + u``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from telechat_twins.core.errors import UserError
from telechat_twins.core.near import nearest
from telechat_twins.core.schema import option

if TYPE_CHECKING:  # core.config holds a Layout, so it is the one that imports
    from telechat_twins.core.model.config import ModelConfig

SCHEDULES = ("1f1b", "gpipe")
MAX_RANKS = 1 << 20  # along an axis
MAX_STAGES = 256  # of a pipeline
AXES = ("tp", "cp", "ring", "ulysses", "dp", "replicas", "pp", "world", "model")


class Coord(NamedTuple):
    """A rank's coordinate on each axis, counted from 0."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Division of model and batch among the ranks; the section ``parallel`` of a run.

    Raises UserError, naming the field, where its own values contradict each other. ``check_layout`` checks it against a
    model.
    """

    pp: int = option(1, help="pipeline ranks: each has some of the layers", min=1)
    dp: int = option(1, help="data-parallel ranks: each has some samples of the batch", min=1)
    cp: int = option(1, help="context-parallel ranks: each has some tokens of every sequence", min=1)
    tp: int = option(1, help="tensor-parallel ranks: each has a part of every matrix", min=1)
    ulysses: int = option(
        1, help="ranks of cp that exchange heads by all-to-all; the other factor, cp / ulysses, is a zigzag ring", min=1
    )
    virtual: int = option(1, help="model chunks of a pipeline rank; above 1: interleaved 1F1B", min=1)
    schedule: str = option("1f1b", help="pipeline schedule", choices=SCHEDULES)
    stage_layers: list[int] = option([], help="layers of each of the pp * virtual stages in order; [] balances", min=1)
    sequence_parallel: bool = option(True, help="norms and residual stream are split over tp along the sequence")
    zero1: bool = option(True, help="optimizer states are split over the ranks that hold the same weights")
    bucket_mb: float = option(25.0, help="MiB of gradients in one all-reduce", above=0.0)

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "cp", "tp", "ulysses", "virtual"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name}: must be at least 1, found {getattr(self, name)}")
            if getattr(self, name) > MAX_RANKS:
                raise UserError(f"parallel.{name}: must be at most {MAX_RANKS}, found {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"parallel.schedule: {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.stages > MAX_STAGES:
            raise UserError(
                f"parallel.pp: pp {self.pp} x virtual {self.virtual} = {self.stages} stages; at most {MAX_STAGES}"
            )
        if self.bucket_mb <= 0:
            raise UserError(f"parallel.bucket_mb: must be above 0, found {self.bucket_mb}")
        if self.cp % self.ulysses:
            near = _nearest(self.ulysses, range(1, self.cp + 1), lambda u: self.cp % u == 0)
            raise UserError(f"parallel.ulysses: {self.ulysses} does not divide cp {self.cp}; nearest that does: {near}")
        if self.virtual > 1 and self.pp == 1:
            raise UserError(f"parallel.virtual: {self.virtual} chunks a rank need pp >= 2, found pp 1; use virtual 1")
        if self.virtual > 1 and self.schedule != "1f1b":
            raise UserError(
                f"parallel.virtual: {self.virtual} chunks a rank need schedule 1f1b, found {self.schedule}; "
                "use virtual 1 or schedule 1f1b"
            )
        if self.stage_layers and len(self.stage_layers) != self.stages:
            raise UserError(
                f"parallel.stage_layers: {len(self.stage_layers)} numbers for pp {self.pp} x virtual {self.virtual} = "
                f"{self.stages} stages; give {self.stages}, or [] to balance"
            )
        if self.stage_layers and min(self.stage_layers) < 1:
            stage = self.stage_layers.index(min(self.stage_layers))
            raise UserError(
                f"parallel.stage_layers: stage {stage} has {self.stage_layers[stage]} layers; each needs at least 1"
            )

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def ring(self) -> int:
        return self.cp // self.ulysses

    @property
    def stages(self) -> int:
        return self.pp * self.virtual

    @property
    def name(self) -> str:
        """Canonical text such as ``pp2.dp2.cp4.ulysses2.tp2``, the inverse of ``parse_layout``.

        It leaves out ``stage_layers`` and ``bucket_mb``.
        """
        if self.world == 1:
            return "single"
        sizes = {axis: getattr(self, axis) for axis in _NAMED} | {"vpp": self.virtual}
        parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
        flags = (("gpipe", self.schedule == "gpipe"), ("nosp", not self.sequence_parallel), ("nozero", not self.zero1))
        return ".".join(parts + [word for word, on in flags if on])

    def coord(self, rank: int) -> Coord:
        """Coordinates of ``rank``, 0 <= rank < world."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside a world of {self.world}")
        rest, t = divmod(rank, self.tp)
        rest, c = divmod(rest, self.cp)
        p, d = divmod(rest, self.dp)
        return Coord(p, d, c, t)

    def rank_of(self, coord: Coord) -> int:
        """The rank at ``coord``: the inverse of ``coord``."""
        p, d, c, t = coord
        return ((p * self.dp + d) * self.cp + c) * self.tp + t

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """The group of ``rank`` along ``axis`` (one of AXES), in order along the axis.

        ``replicas``: the dp x cp ranks that hold the same weights. ``model``: the pp x tp ranks that together hold one
        copy of the model.
        """
        p, d, c, t = self.coord(rank)
        r, u = divmod(c, self.ulysses)
        one, many = {
            "tp": ((p, d, c, None), ()),
            "cp": ((p, d, None, t), ()),
            "ring": ((p, d, None, t), range(u, self.cp, self.ulysses)),
            "ulysses": ((p, d, None, t), range(r * self.ulysses, (r + 1) * self.ulysses)),
            "dp": ((p, None, c, t), ()),
            "replicas": ((p, None, None, t), ()),
            "pp": ((None, d, c, t), ()),
            "world": ((None, None, None, None), ()),
            "model": ((None, d, c, None), ()),
        }[axis]
        sizes = (self.pp, self.dp, self.cp, self.tp)
        # The free axes vary in the order of the rank formula, so the group is sorted by rank.
        pps, dps, cps, tps = (
            (many or range(size)) if fixed is None else (fixed,) for fixed, size in zip(one, sizes, strict=True)
        )
        return tuple(self.rank_of(Coord(*place)) for place in _product(pps, dps, cps, tps))


def parse_layout(text: str) -> Layout:
    """A layout from text: parts joined by dots, each an axis and its size, or a word.

    ``pp2 dp2 cp2 tp2``; ``ring2`` is cp2 over a ring, ``ulysses2`` alone is cp2 by Ulysses only, and both together are
    cp4, which may also be written ``cp4.ulysses2``; ``vpp2`` is virtual 2; ``gpipe``, ``nosp`` (sequence_parallel off),
    ``nozero`` (zero1 off), ``single``. UserError for an unknown or repeated part and for a size out of range.
    """
    where, sizes, words = f"layout '{text}'", dict[str, int](), set[str]()
    parts = text.strip().split(".")
    if parts == ["single"]:
        return Layout()
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(-?[0-9]+)", part)
        name = match[1] if match else part
        if not (name in _SIZED and match) and not (name in _WORDS and not match):
            raise UserError(f"{where}: unknown part '{part}'; {_hint(part, name, match[2] if match else '')}")
        if name in sizes or name in words:
            raise UserError(f"{where}: '{name}' appears twice; give it once")
        if match and len(match[2]) > len(str(MAX_RANKS)):
            raise UserError(f"{where}: '{part}' is out of range; at most {name}{MAX_RANKS}")
        if match and int(match[2]) < 1:
            raise UserError(f"{where}: '{part}' is below 1; leave it out or give at least {name}1")
        if match:
            sizes[name] = int(match[2])
        else:
            words.add(name)
    ring, ulysses = sizes.get("ring"), sizes.get("ulysses")
    cp = sizes.get("cp") or (ring or 1) * (ulysses or 1)
    if ring is not None and cp != ring * (ulysses or max(cp // ring, 1)):
        product = f"ring{ring}" + (f" x ulysses{ulysses}" if ulysses else "")
        near = _multiple(cp, ring, ulysses)
        raise UserError(f"{where}: cp{cp} is not the product of {product}; nearest that is: cp{near}")
    return Layout(
        cp=cp,
        ulysses=ulysses or (cp // ring if ring else 1),
        pp=sizes.get("pp", 1),
        dp=sizes.get("dp", 1),
        tp=sizes.get("tp", 1),
        virtual=sizes.get("vpp", 1),
        schedule="gpipe" if "gpipe" in words else "1f1b",
        sequence_parallel="nosp" not in words,
        zero1="nozero" not in words,
    )


def check_layout(
    layout: Layout,
    model: ModelConfig,
    *,
    world: int | None = None,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    seq_len: int | None = None,
) -> None:
    """Check a layout against ``model`` and the run, before any process group is created.

    UserError names the field, the two numbers that do not fit and the nearest legal choice. Vocabulary and sequence
    length are padded, so they need no check. Arguments that are None are not checked.
    """
    _check_heads(layout, model)
    _check_stages(layout, model)
    if seq_len is not None and seq_len < 1:
        raise UserError(f"data.seq_len: must be at least 1, found {seq_len}")
    if world is not None and world != layout.world:
        replica = layout.world // layout.dp
        other = f", or set parallel.dp to {world // replica}" if world % replica == 0 and world > 0 else ""
        raise UserError(
            f"parallel: layout {layout.name} has {layout.world} ranks but {world} processes were started; "
            f"start {layout.world}{other}"
        )
    if global_batch is not None:
        _check_batch(layout, global_batch, micro_batch or 1)


def stage_layers(layout: Layout, config: ModelConfig) -> list[list[int]]:
    """Layers of each of the pp * virtual global stages, in order; every stage has at least one.

    An explicit ``layout.stage_layers`` takes precedence. Otherwise the most expensive stage is made as cheap as
    possible: a block costs its parameter count (one multiply-add for each parameter and token), the embedding nothing
    (it is a lookup), the head V * E. Among equal divisions the most even one is taken, and then the one with the
    cheapest first stages, whose activations are kept longest. UserError when there are more stages than layers or when
    the explicit numbers do not add up.
    """
    from telechat_twins.core.model.params import block_table

    _check_stages(layout, config)
    counts: Sequence[int] = layout.stage_layers
    if not counts:
        costs = [sum(spec.size for spec in block_table(config).values())] * config.num_layers
        # The stage with the last block also computes the head, whether tied to the embedding or not.
        costs[-1] += config.vocab_size * config.hidden_size
        counts = _balance(tuple(costs), layout.stages)
    first = [sum(counts[:i]) for i in range(len(counts))]
    return [list(range(start, start + count)) for start, count in zip(first, counts, strict=True)]


_NAMED = ("pp", "dp", "cp", "ulysses", "tp")
_SIZED = ("pp", "dp", "cp", "tp", "ring", "ulysses", "vpp")
_WORDS = ("gpipe", "nosp", "nozero")


def sequence_multiple(layout: Layout) -> int:
    """The number of which S is padded to a multiple: 2 * ring chunks, each divisible by ulysses, and with sequence
    parallelism the places of a rank divisible by tp."""
    chunks = 2 * layout.ring if layout.ring > 1 else 1
    return math.lcm(chunks * layout.ulysses, layout.cp * (layout.tp if layout.sequence_parallel else 1))


def _hint(part: str, name: str, size: str) -> str:
    if part == "single":
        return "'single' cannot be combined with other parts"
    if name in _SIZED:
        return f"did you mean '{name}2'?"
    if part != part.lower():
        return f"did you mean '{part.lower()}'?"
    parts = re.findall(r"[a-z]+[0-9]*", part)
    if len(parts) > 1 and all(one.rstrip("0123456789") in (*_SIZED, *_WORDS) for one in parts):
        return f"parts are joined by dots; did you mean '{'.'.join(parts)}'?"
    if near := nearest(name, [*_SIZED, *_WORDS, "single"], cutoff=0.5):
        return f"did you mean '{near}{(size or '2') if near in _SIZED else ''}'?"
    return f"legal parts: {', '.join(f'{axis}N' for axis in _SIZED)}, {', '.join(_WORDS)}, single"


def _multiple(cp: int, ring: int, ulysses: int | None) -> int:
    return ring * ulysses if ulysses else max(round(cp / ring), 1) * ring


def _product(*axes: Iterable[int]) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for axis in axes:
        places = [(*place, i) for place in places for i in axis]
    return places


def _nearest(wanted: int, candidates: Iterable[int], legal: Callable[[int], bool]) -> int:
    """The legal candidate closest to ``wanted``, the smaller of two equally close ones. 1 must be legal."""
    return min((n for n in candidates if legal(n)), key=lambda n: (abs(n - wanted), n))


def _nest(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0


def _check_heads(layout: Layout, model: ModelConfig) -> None:
    heads, kv_heads, ffn, tp = model.num_heads, model.num_kv_heads, model.ffn_hidden_size, layout.tp

    def legal_tp(n: int) -> bool:
        return heads % n == 0 and ffn % n == 0 and _nest(n, kv_heads)

    if not legal_tp(tp):
        near = _nearest(tp, range(1, heads + 1), legal_tp)
        if heads % tp:
            clash = f"does not divide model.num_heads {heads}"
        elif ffn % tp:
            clash = f"does not divide model.ffn_hidden_size {ffn}"
        else:
            clash = f"and model.num_kv_heads {kv_heads}: neither divides the other"
        raise UserError(f"parallel.tp: {tp} {clash}; nearest tp that fits this model: {near}")

    local, local_kv = heads // tp, max(kv_heads // tp, 1)

    def legal_ulysses(n: int) -> bool:
        return layout.cp % n == 0 and local % n == 0 and _nest(n, local_kv)

    if not legal_ulysses(layout.ulysses):
        near = _nearest(layout.ulysses, range(1, layout.cp + 1), legal_ulysses)
        if local % layout.ulysses:
            clash = f"does not divide the {local} heads of a rank (model.num_heads {heads} / tp {tp})"
        else:
            clash = f"and the {local_kv} kv heads of a rank: neither divides the other"
        raise UserError(
            f"parallel.ulysses: {layout.ulysses} {clash}; nearest ulysses that fits this model and cp "
            f"{layout.cp}: {near}"
        )


def _check_stages(layout: Layout, model: ModelConfig) -> None:
    layers = model.num_layers
    if layout.pp > layers:
        raise UserError(
            f"parallel.pp: {layout.pp} stages are more than model.num_layers {layers}; nearest pp that fits: {layers}"
        )
    if layout.stages > layers:
        raise UserError(
            f"parallel.virtual: pp {layout.pp} x virtual {layout.virtual} = {layout.stages} stages are more than "
            f"model.num_layers {layers}; nearest virtual that fits: {layers // layout.pp}"
        )
    if layout.stage_layers and sum(layout.stage_layers) != layers:
        raise UserError(
            f"parallel.stage_layers: {layout.stage_layers} add up to {sum(layout.stage_layers)}, model.num_layers is "
            f"{layers}{_mended(layout.stage_layers, layers)}"
        )


def _mended(counts: Sequence[int], total: int) -> str:
    """Suggestion that brings the sum of ``counts`` to ``total``: layers are taken from the largest stage or given to
    the smallest, one at a time."""
    mended, missing = list(counts), total - sum(counts)
    if abs(missing) * len(counts) > 100_000:
        return "; or give [] to balance"
    for _ in range(abs(missing)):
        if missing < 0:
            mended[mended.index(max(mended))] -= 1
        else:
            mended[mended.index(min(mended))] += 1
    return f"; nearest that fits: {mended}"


def _check_batch(layout: Layout, global_batch: int, micro_batch: int) -> None:
    share = layout.dp * micro_batch
    if global_batch % share:
        near = _nearest_multiple(global_batch, share)
        fitting = [d for d in range(1, layout.dp) if global_batch % (d * micro_batch) == 0]
        other = f", or parallel.dp {fitting[-1]}" if fitting else ""
        raise UserError(
            f"train.global_batch: {global_batch} is not a multiple of dp {layout.dp} x micro_batch {micro_batch} = "
            f"{share}; nearest that is: {near}{other}"
        )
    micro_batches = global_batch // share
    if layout.virtual > 1 and micro_batches % layout.pp:
        near = _nearest_multiple(global_batch, share * layout.pp)
        raise UserError(
            f"train.global_batch: {global_batch} makes {micro_batches} micro-batches, and interleaving (virtual "
            f"{layout.virtual}) needs a multiple of pp {layout.pp}; nearest global_batch that fits: {near}"
        )


def _nearest_multiple(wanted: int, unit: int) -> int:
    below = max(wanted // unit * unit, unit)
    return below if wanted - below <= below + unit - wanted else below + unit


@lru_cache(maxsize=16)
def _balance(costs: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Optimal division of ``costs`` into ``stages`` runs of at least one: smallest maximum, then smallest sum of
    squares, then the lexicographically first. Returns the lengths of the runs."""
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)

    def fits(limit: int) -> bool:
        runs, load = 1, 0
        for cost in costs:
            runs, load = (runs, load + cost) if load + cost <= limit else (runs + 1, cost)
        return runs <= stages

    # Bisect for the smallest limit on a run's cost with which a greedy division needs no more than `stages` runs.
    low, limit = max(costs), total[-1]
    while low < limit:
        middle = (low + limit) // 2
        low, limit = (low, middle) if fits(middle) else (middle + 1, limit)

    layers = len(costs)
    # Dynamic programming under that limit. In round n, best[i] is (sum of squares, length of the first run) of the best
    # division of costs[i:] into n runs; the first length that reaches the smallest sum is kept.
    best: dict[int, tuple[int, int]] = {layers: (0, 0)}
    rounds = []
    for runs in range(1, stages + 1):
        step: dict[int, tuple[int, int]] = {}
        for first in range(stages - runs, layers):
            for last in range(first + 1, layers + 1):
                load = total[last] - total[first]
                if load > limit:
                    break
                if last in best and (first not in step or best[last][0] + load * load < step[first][0]):
                    step[first] = (best[last][0] + load * load, last - first)
        rounds.append(step)
        best = step
    counts, first = [], 0
    for step in reversed(rounds):
        counts.append(step[first][1])
        first += step[first][1]
    return tuple(counts)
