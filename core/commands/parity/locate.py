"""``tele parity locate``: names the first operator of two records that is beyond its budget, and replays it."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_file, writable_file
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.parity.compare.records import choose_reference, differing_settings
from telechat_twins.core.parity.locate.examine import Examined, examine, needed
from telechat_twins.core.parity.locate.find import Found, Walk, locate
from telechat_twins.core.parity.locate.recipe import Setting
from telechat_twins.core.parity.locate.report import (
    culprit,
    smaller,
    to_json,
    walk_lines,
    write_json,
    write_reproduction,
)
from telechat_twins.core.parity.locate.rerun import again, batch_of, exact, run_of, setting_of, untrained_weights
from telechat_twins.core.parity.record.format import Record
from telechat_twins.core.parity.record.read import open_record
from telechat_twins.core.parity.record.sites import sites


def run(args: argparse.Namespace) -> int:
    """Locate, print and write what was found; 1 when something was."""
    out = Path(args.out)
    writable_file(out / "locate.json", "--out")
    records = {"A": open_record(args.one), "B": open_record(args.other)}
    reference = None if args.reference is None else open_record(args.reference)
    notes = _check(records, reference)
    if reference is None and args.rerun:
        reference = _exact(records, out)
    if reference is None:
        notes.append("no float64 record: the two sides are held against each other; give --reference or --rerun")
    walk = _walk(records, reference)
    print("\n".join(walk_lines(walk)))
    examined: list[Examined] = []
    if walk.found is not None:
        examined = _examined(walk.found, records, args, out, notes)
    print("\n".join(f"note: {note}" for note in notes) + ("\n" if notes else ""), end="")
    write_json(out / "locate.json", to_json(walk, examined, notes))
    return 0 if walk.found is None else 1


def _check(records: dict[str, Record], reference: Record | None) -> list[str]:
    """UserError for records that cannot be held against each other; notes on what differs."""
    a, b = records["A"], records["B"]
    choose_reference(a, b, reference)
    others = [b] if reference is None else [b, reference]
    notes = []
    for other in others:
        if other.header.digests["batch"] != a.header.digests["batch"]:
            raise UserError(f"{a.path} and {other.path}: batches must be the same ones, found two; record both again")
        if not set(other.header.steps) & set(a.header.steps):
            raise UserError(f"{a.path} and {other.path}: must have a recorded step in common, found none")
        if other.header.digests["weights"] != a.header.digests["weights"]:
            notes.append(f"{a.path} and {other.path} began with different weights")
    if different := differing_settings(a, b):
        notes.append(f"settings of A and B that differ: {', '.join(different)}")
    return notes


def _walk(records: dict[str, Record], reference: Record | None) -> Walk:
    config = run_of(records["B"])
    places = sites(config.model, config.lora)
    return locate(records["A"], records["B"], reference, places, config.model.num_layers)


def _exact(records: dict[str, Record], out: Path) -> Record:
    from telechat_twins.convert.record_rank import SCRIPT

    backend = next((name for name in ("pt", "ms") if _installed(name)), None)
    if backend is None:
        raise UserError("--rerun: needs an installed backend; run: " + backends.install_command("pt"))
    return exact(records["B"], backend, out / "reference", SCRIPT)


def _installed(backend: str) -> bool:
    try:
        backends.load(backend, "replay")
    except UserError:
        return False
    return True


def _examined(
    found: Found, records: dict[str, Record], args: argparse.Namespace, out: Path, notes: list[str]
) -> list[Examined]:
    """Replay the suspects, and leave a small failing input; print what comes of it."""
    from telechat_twins.convert.initial import open_initial

    step, record = found.check.step, records["B"]
    weight = untrained_weights(run_of(record), open_initial)
    setting = setting_of(record, step, _batch(record, step, notes), weight)
    if args.rerun:
        records = _with_whole_tensors(found, setting, records, out)
    examined = examine(found, setting, records)
    for one in examined:
        print(one.text())
    if any(one.missing for one in examined):
        _print_commands(found, setting, records, out)
    wrong = culprit(examined)
    if wrong is not None and wrong.replayed is not None:
        verdict = wrong.replayed
        case = smaller(verdict)
        script = write_reproduction(out, case, verdict.backend, backends.TITLES[verdict.backend])
        print(f"an input of {case.size} numbers on which it fails: {script.parent}; run: python {script}")
    return examined


def _batch(record: Record, step: int, notes: list[str]) -> Batch | None:
    """The batch of the step where the run's data is here."""
    try:
        return batch_of(run_of(record), record, step)
    except UserError as error:
        notes.append(f"the batch is not at hand: {error}")
        return None


def _with_whole_tensors(found: Found, setting: Setting, records: dict[str, Record], out: Path) -> dict[str, Record]:
    """The records, those of installed backends taken again with what a replay of the suspects needs."""
    from telechat_twins.convert.record_rank import SCRIPT

    full = needed(found.check.suspects, setting)
    return {
        side: again(record, full, out / side.lower(), SCRIPT) if full and _installed(record.header.backend) else record
        for side, record in records.items()
    }


def _print_commands(found: Found, setting: Setting, records: dict[str, Record], out: Path) -> None:
    """How each site records what a replay needs; its config lies in ``out``."""
    full = " ".join(shlex.quote(pattern) for pattern in needed(found.check.suspects, setting))
    print("to replay it, record these tensors in full at each site, and locate again:")
    for side, record in records.items():
        header, config = record.header, out / f"{side.lower()}.yaml"
        with new_file(config) as beside:
            beside.write_text(json.dumps(run_of(record).to_dict(), indent=1), encoding="utf-8")  # which YAML reads
        steps = f"--steps {max(header.steps)} --at {' '.join(map(str, header.steps))}"
        what = f"--backend {header.backend} --config {config} {steps} --out {side} --full {full}"
        print(f"  {side}: tele parity record {what}")
