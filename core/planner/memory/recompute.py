"""Recomputation policies: those that the twins execute, and MindFormers' lists of operators and layers.

``train.recompute`` has three values, which both twins execute: "none"; "selective", the core of attention and the
activation again; "full", of each block only its input is kept.

MindFormers' ``recompute_config`` names more, which is for planning only: no twin executes it. ``recompute`` and
``select_recompute`` are true, or the number of layers of each pipeline rank, or of each chunk and rank;
``select_recompute`` may also be a mapping from patterns of operators to such numbers, with two default patterns.
``select_comm_recompute`` does the communication after the matching operators again, and what was gathered is not kept.
``recompute_slice_activation`` keeps the input of a wholly recomputed layer divided over the tensor ranks, where
``recompute`` is true: MindFormers' LayerSetting passes it on for no list of numbers. Two keys that it reads reach no
layer at all, ``mp_comm_recompute`` and ``parallel_optimizer_comm_recompute``: its layers are recomputed with their
communication, and MindSpore 2.9's Cell.recompute only warns of the other. Values that would change a plan if they were
passed on are named in ``RecomputeLists.idle``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files import ROOT
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.planner.memory.activations import Kept
from telechat_twins.core.schema import load_yaml
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

POLICIES = ("none", "selective", "full")
BUNDLED = ROOT / "configs" / "recompute"
# MindFormers' defaults (mindformers/modules/transformer or models/utils: LayerSetting).
OPERATORS = (r"feed_forward\.mul", r"feed_forward\.w1\.activation\.silu")
COMMUNICATION = (r".*\.norm",)
_FLAGS = {"recompute_slice_activation": False, "mp_comm_recompute": True, "parallel_optimizer_comm_recompute": False}
_KEYS = ("recompute", "select_recompute", "select_comm_recompute", *_FLAGS)

Counts = list[list[int]]  # of each chunk and pipeline rank: how many of its layers, from the first


@dataclass(frozen=True)
class RecomputeLists:
    """MindFormers' section, resolved for a layout: counts of layers for whole recomputation and for each pattern.

    ``slices``: into how many parts the input of a wholly recomputed layer is divided, beyond sequence parallelism.
    ``idle``: what the section asks for without effect, each with the reason.
    """

    full: Counts
    operators: dict[str, Counts]
    communication: dict[str, Counts]
    slices: int
    idle: tuple[str, ...] = ()

    def kept(self, chunk: int, rank: int, layer: int, kept: Sequence[Kept]) -> list[Kept]:
        """What layer ``layer`` of a rank's chunk keeps, of the tensors ``kept`` without recomputation."""
        if layer < self.full[chunk][rank]:
            return []
        again = [p for p, counts in self.operators.items() if layer < counts[chunk][rank]]
        regathered = [p for p, counts in self.communication.items() if layer < counts[chunk][rank]]
        found = [one for one in kept if not any(re.fullmatch(p, one.site) for p in again)]
        return [
            one._replace(elements=one.shared)
            if one.shared is not None and any(re.fullmatch(p, one.site) for p in regathered)
            else one
            for one in found
        ]


def bundled_lists() -> list[str]:
    """Names of the bundled lists."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def load_lists(name: str, layout: Layout, layers: list[list[int]]) -> RecomputeLists:
    """The section ``recompute_config`` of MindFormers' YAML ``name``, or of a bundled one, for ``layout``.

    ``layers``: layers of each of the pp * virtual stages. UserError for an unknown name, key or form.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else BUNDLED / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(bundled_lists())
        raise UserError(f"--recompute-lists: no file {shown(name)}; give MindFormers' YAML, or a bundled name: {known}")
    values = load_yaml(path)
    section = values.get("recompute_config") if isinstance(values, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{path.name}: expected a section recompute_config, found {shown(section)}")
    return resolve(section, layout, [len(one) for one in layers], f"{path.name}: recompute_config")


def resolve(section: JsonObject, layout: Layout, layers: Sequence[int], where: str) -> RecomputeLists:
    """A section for a layout whose stages have ``layers`` layers. UserError names the key."""
    for key in section:
        if key not in _KEYS:
            raise UserError(f"{where}.{key}: unknown; there are {', '.join(_KEYS)}")
    held = [list(layers[chunk * layout.pp : (chunk + 1) * layout.pp]) for chunk in range(layout.virtual)]

    def counts(key: str, value: object) -> Counts:
        return _counts(value, held, f"{where}.{key}")

    def patterns(key: str, defaults: Sequence[str]) -> dict[str, Counts]:
        value = section.get(key, False)
        if isinstance(value, dict):
            return {pattern: counts(f"{key}.{pattern}", one) for pattern, one in value.items()}
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return {pattern: counts(key, True) for pattern in value}
        return {pattern: counts(key, value) for pattern in defaults}

    for key in ("select_recompute", "select_comm_recompute"):
        for pattern in patterns(key, ()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}.{key}: {shown(pattern)} is not a regular expression: {error}") from None
    flags = {key: section.get(key, usual) for key, usual in _FLAGS.items()}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{where}.{key}: expected true or false, found {shown(value)}")
    whole = section.get("recompute", False) is True
    sliced = whole and flags["recompute_slice_activation"] and not layout.sequence_parallel
    return RecomputeLists(
        counts("recompute", section.get("recompute", False)),
        patterns("select_recompute", OPERATORS),
        patterns("select_comm_recompute", COMMUNICATION),
        layout.tp if sliced else 1,
        tuple(_idle(flags, isinstance(section.get("recompute"), list))),
    )


def _idle(flags: Mapping[str, bool], listed: bool) -> Iterator[str]:
    """What is asked for without effect. ``listed``: layers are recomputed whole, by numbers."""
    if flags["recompute_slice_activation"] and listed:
        yield "recompute_slice_activation: true, which MindFormers passes on with recompute: true only"
    if not flags["mp_comm_recompute"]:
        yield "mp_comm_recompute: false, which MindFormers passes on to no layer"
    if flags["parallel_optimizer_comm_recompute"]:
        yield "parallel_optimizer_comm_recompute: true, which MindFormers passes on to no layer"


def _counts(value: object, held: Counts, where: str) -> Counts:
    """``value`` in the form of ``held``, at most the layers that there are."""
    chunks, ranks = len(held), len(held[0])
    if isinstance(value, bool):
        return [list(row) if value else [0] * ranks for row in held]
    if isinstance(value, list) and len(value) == ranks and all(isinstance(one, int) for one in value):
        return _spread(value, held)
    rows = value if isinstance(value, list) and len(value) == chunks else []
    lists = bool(rows) and all(isinstance(row, list) and len(row) == ranks for row in rows)
    if lists and all(isinstance(one, int) for row in rows for one in row):
        return [[_most(*pair) for pair in zip(*two, strict=True)] for two in zip(rows, held, strict=True)]
    raise UserError(
        f"{where}: expected true, false, {ranks} numbers (one a pipeline rank) or {chunks} lists of them, "
        f"found {shown(value)}"
    )


def _most(number: int, held: int) -> int:
    """How many of the ``held`` layers: ``number`` of them, or all for true."""
    return held if number is True else max(0, min(number, held))


def _spread(numbers: Sequence[int], held: Counts) -> Counts:
    """A rank's number of layers dealt out to its chunks in turn, as MindFormers does."""
    found = [[0] * len(numbers) for _ in held]
    for rank, number in enumerate(numbers):
        left = _most(number, sum(row[rank] for row in held))
        while left > 0:
            for chunk, row in enumerate(held):
                if left > 0 and found[chunk][rank] < row[rank]:
                    found[chunk][rank] += 1
                    left -= 1
    return found
