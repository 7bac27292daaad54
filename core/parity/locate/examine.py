"""Examination of a suspect: is the operator wrong, or what it is given?

Three measurements, each against the operator's float64 definition: what the side in doubt recorded, on its own inputs;
what its backend computes of the other side's inputs, alone, here and now; and what the other side recorded, on its own
inputs. The first shows whether the operator made its output of its inputs in the run, the second whether the operator
itself does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from telechat_twins.core import backends
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import PRECISIONS
from telechat_twins.core.parity.compare.records import differing_settings
from telechat_twins.core.parity.locate.case import Arrays, Case
from telechat_twins.core.parity.locate.find import Found
from telechat_twins.core.parity.locate.recipe import (
    Recipe,
    Setting,
    fill,
    frozen,
    missing,
    patterns,
    recipe,
    unknown,
    wanted_keys,
    whole_tensors,
)
from telechat_twins.core.parity.locate.verdict import Define, Measured, Verdict, compare, judge
from telechat_twins.core.parity.locate.walk import Suspect
from telechat_twins.core.parity.record.format import Record

DECISIVE = ("model.", "optim.", "lora", "preference", "kernels.", "train.seed", "train.global_batch", "train.freeze")
OPERATOR, CALL, INPUTS, SETTINGS, UNKNOWN = "operator", "call", "inputs", "settings", "unknown"


@dataclass(frozen=True)
class Examined:
    """One suspect. ``recorded``: worst measurement of each side's record; ``replayed``: the operator alone.
    ``missing``: whole tensors that are needed, by side. ``why_not``: why it cannot be replayed. ``unlike``: settings in
    which the runs of A and B differ, "key: A -> B"."""

    suspect: Suspect
    side: str
    recorded: dict[str, Measured] = field(default_factory=dict)
    replayed: Verdict | None = None
    missing: dict[str, list[str]] = field(default_factory=dict)
    why_not: str = ""
    unlike: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """operator: wrong alone as well; call: right alone, wrong in the run; unknown. Right in both: settings, where
        the runs of A and B differ in theirs, else inputs."""
        if self.replayed is not None and not self.replayed.holds:
            return OPERATOR
        mine = self.recorded.get(self.side)
        if mine is None or self.replayed is None:
            return UNKNOWN
        if not mine.holds:
            return CALL
        return SETTINGS if self.unlike else INPUTS

    def text(self) -> str:
        """The verdict as a sentence."""
        name = f"{self.suspect.operator} of {self.suspect.site}"
        if self.why_not:
            return f"{name}: not replayed: {self.why_not}"
        if self.missing:
            keys = {key for keys in self.missing.values() for key in keys}
            return f"{name}: not replayed: {len(keys)} whole tensors are missing"
        if self.replayed is None:
            return f"{name}: not replayed: {_recorded_text(self.recorded)}"
        alone = self.replayed.worst
        measured = f"{alone.name} {alone.error:.2g} from float64, limit {alone.limit:.2g}"
        where = backends.TITLES[self.replayed.backend]
        if self.verdict == OPERATOR:
            return f"{name}: the operator is wrong: alone in {where}, on the other side's inputs, {measured}"
        if self.verdict == CALL:
            mine = self.recorded[self.side]
            return (
                f"{name}: right alone in {where} ({measured}), wrong in the run of {self.side}: {mine.name} "
                f"{mine.error:.2g} from the float64 result on its own inputs, limit {mine.limit:.2g}. Look at what "
                "calls it: arguments, buffers, the layout's sums, or the program of that run"
            )
        if self.verdict in (INPUTS, SETTINGS):
            cause = "its inputs make the difference"
            if self.unlike:
                cause = f"the settings of A and B differ, and make the difference: {', '.join(self.unlike)}"
            return f"{name}: right alone in {where} ({measured}) and in the run: {cause}"
        return f"{name}: right alone in {where} ({measured}); the run's own inputs are not recorded in full"


def examine(found: Found, setting: Setting, records: dict[str, Record]) -> list[Examined]:
    """Every suspect of the first wrong quantity, in the order of suspicion. ``records``: A and B."""
    sides = [found.side] if found.side in records else list(records)
    unlike = _unlike(records["A"], records["B"])
    return [
        replace(_examine(suspect, side, setting, records), unlike=unlike)
        for side in sides
        for suspect in found.check.suspects
    ]


def _unlike(a: Record, b: Record) -> tuple[str, ...]:
    """Settings that decide numbers and differ; steps, folders and intervals do not."""
    found = [line for line in differing_settings(a, b) if line.startswith(DECISIVE)]
    if a.header.precision != b.header.precision:
        found.append(f"train.precision: {a.header.precision} -> {b.header.precision}")
    return tuple(found)


def needed(suspects: Sequence[Suspect], setting: Setting) -> list[str]:
    """Patterns of `tele parity record --full` for the replay of all ``suspects``."""
    keys: list[str] = []
    for suspect in suspects:
        made = recipe(suspect, setting)
        keys += [] if made.why_not else wanted_keys(made, setting.step)
    return patterns(keys)


def _examine(suspect: Suspect, side: str, setting: Setting, records: dict[str, Record]) -> Examined:
    made = recipe(suspect, setting)
    why_not = made.why_not or _why_not(made, setting, records)
    if why_not:
        return Examined(suspect, side, why_not=why_not)
    lacking = {name: keys for name, record in records.items() if (keys := missing(made, record, setting.step))}
    held = [name for name in records if name not in lacking]
    if not held:
        return Examined(suspect, side, missing=lacking)
    try:
        define = _define(records[side].header.backend)
    except UserError as error:
        return Examined(suspect, side, why_not=str(error))
    cases = {name: _filled(made, setting, records[name]) for name in held}
    recorded = {name: row for name, (case, results) in cases.items() if (row := _recorded(case, results, define))}
    other = next((name for name in held if name != side), side)
    return Examined(suspect, side, recorded, _replayed(made, cases[other][0], records[side]), {}, "")


def _why_not(made: Recipe, setting: Setting, records: dict[str, Record]) -> str:
    """Why no record can be replayed, whatever it holds in full; empty where one can."""
    for record in records.values():
        if keys := unknown(made, record, setting.step):
            return f"{record.path} does not record {keys[0]}"
        if (names := frozen(made, record, setting.step)) and setting.weight is None:
            return f"it reads {names[0]}, which the run does not train and therefore does not record"
    return ""


def _filled(made: Recipe, setting: Setting, record: Record) -> tuple[Case, Arrays]:
    return fill(made, record, setting.step, _precision(record), whole_tensors(record), setting.weight)


def _precision(record: Record) -> str:
    return record.header.precision if record.header.precision in PRECISIONS else "fp32"


def _define(backend: str) -> Define:
    """The float64 definitions, which come with the twins' replays: of ``backend``, or else of the one installed."""
    for name in (backend, *(other for other in backends.BACKENDS if other != backend)):
        try:
            define: Define = backends.load(name, "replay").define
            return define
        except UserError as error:
            problem = error
    raise problem


def _recorded(case: Case, results: Arrays, define: Define) -> Measured | None:
    """The worst of what a side recorded, against the definition on its own inputs."""
    rows = compare(case, results, define)
    return None if not rows else max(rows, key=lambda row: row.share)


def _replayed(made: Recipe, case: Case, record: Record) -> Verdict | None:
    """The operator alone in the backend of the side in doubt, in its precision, on ``case``'s inputs; None where that
    backend is not installed."""
    inputs = Case(case.operator, case.inputs, case.grads, _precision(record), case.settings, made.suspect.site)
    try:
        return judge(inputs, record.header.backend)
    except UserError:
        return None


def _recorded_text(recorded: dict[str, Measured]) -> str:
    said = [
        f"{name} recorded {row.name} {row.error:.2g} from float64, limit {row.limit:.2g}"
        for name, row in recorded.items()
    ]
    return "its backend is not installed here" + ("; " + "; ".join(said) if said else "")
