"""Campaign of `tele parity locate`: every fault of the catalogue in either twin, and whether it is named.

    python -m tests.campaigns.locate [--backend ms|pt] [--precision P] [--blind] [--only WORD]

The twin with the fault is recorded in this process, and walked against the other twin's record and a float64 one.
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from telechat_twins.core.config import RunConfig
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.parity.locate.find import Walk, locate
from telechat_twins.core.parity.record.format import Record
from telechat_twins.core.parity.record.sites import sites
from tests.campaigns.located_faults import Fault, planted
from tests.support.recording import random_batch, record_step, small_run

OTHER = {"ms": "pt", "pt": "ms"}


def catalogue() -> dict[str, Fault]:
    """All faults by name."""
    from tests.campaigns import locate_catalogue as locate_catalogue  # enters them, as the next does
    from tests.campaigns import locate_step_faults as locate_step_faults
    from tests.campaigns.located_faults import CATALOGUE

    return CATALOGUE


@dataclass(frozen=True)
class Scene:
    """What a fault is planted in."""

    preset: str
    case: str

    def run(self, precision: str) -> RunConfig:
        more: dict[str, object] = {}
        if self.case == "lora":
            more["lora"] = {"rank": 4, "alpha": 12, "targets": ["all-linear"]}
        if self.case == "pairs":
            more["preference"] = {"beta": 0.3}
        if self.case == "growth":
            old = {"mask": 0.3, "anneal_steps": 10, "hidden_size": 96, "ffn_hidden_size": 256}
            more["model__growth"] = old | {"num_heads": 2, "num_kv_heads": 1, "new_layers": [1]}
        return small_run(self.preset, precision, **more)

    def batch(self) -> Batch:
        made = random_batch(self.run("fp32"), self.case == "documents")
        return replace(made, reference=np.array([-100.0, -105.0])) if self.case == "pairs" else made

    def record(self, backend: str, precision: str, folder: Path, full: tuple[str, ...] = ()) -> Record:
        return record_step(backend, self.run(precision), folder, full, self.batch())


@cache
def clean(scene: Scene, backend: str, precision: str) -> Record:
    """The record without a fault, in a temporary folder that lasts as long as this process."""
    folder = tempfile.mkdtemp(prefix="locate-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return scene.record(backend, precision, Path(folder))


def walk(fault: Fault, backend: str, folder: Path, precision: str = "fp32", blind: bool = False) -> Walk:
    """The faulty twin against the other one; ``blind``: without the float64 record."""
    scene = Scene(fault.preset, fault.case)
    with planted(fault, backend):
        faulty = scene.record(backend, precision, folder)
    run = scene.run(precision)
    places = sites(run.model, run.lora)
    exact = None if blind else clean(scene, "pt", "fp64")
    return locate(faulty, clean(scene, OTHER[backend], precision), exact, places, run.model.num_layers)


def is_named(fault: Fault, found: Walk) -> bool:
    """Whether operator, layer and direction are those of the fault, and the side is not B."""
    if found.found is None or found.found.side == "B":
        return False
    suspect = found.found.suspect
    layer = int(fault.site.split(".")[1]) if fault.site.startswith("layers.") else None
    return (suspect.operator, suspect.layer, suspect.direction) == (fault.operator, layer, fault.direction)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("ms", "pt"))
    parser.add_argument("--precision", choices=("fp32", "bf16", "amp", "fp16"), default="fp32")
    parser.add_argument("--blind", action="store_true", help="without the float64 record: only the two sides")
    parser.add_argument("--only", default="", help="faults with this in their name")
    args = parser.parse_args()
    right, total = 0, 0
    for backend in [args.backend] if args.backend else ["pt", "ms"]:
        mine = [0, 0]
        for name, fault in catalogue().items():
            if args.only not in name:
                continue
            started = time.perf_counter()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found = walk(fault, backend, Path(folder), args.precision, args.blind)
            except (RuntimeError, AttributeError, TypeError, ValueError) as error:
                print(f"{backend} FAILED {name}: {str(error)[:300]}", flush=True)
                mine[1] += 1
                continue
            named = is_named(fault, found)
            mine = [mine[0] + named, mine[1] + 1]
            said = "nothing" if found.found is None else _said(found)
            mark = "named " if named else "MISSED"
            print(f"{backend} {mark} {name}: {said} ({time.perf_counter() - started:.1f} s)", flush=True)
            if not named:
                print(f"          expected {fault.operator} {fault.site} {fault.direction}")
        print(f"{backend}: {mine[0]} of {mine[1]} faults named")
        right, total = right + mine[0], total + mine[1]
    return 0 if right >= total * 55 / 60 else 1


def _said(found: Walk) -> str:
    assert found.found is not None
    suspect, excess = found.found.suspect, found.found.excess
    what = f"{suspect.operator} {suspect.site} {suspect.direction}"
    return f"{what} ({excess.key}, {excess.margin:.3g} x its limit, side {found.found.side})"


if __name__ == "__main__":
    raise SystemExit(main())
