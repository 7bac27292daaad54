"""Campaign of `tele parity locate` on layouts of several processes: faults in every rank, and whether they are named.

    python -m tests.campaigns.locate_layouts [--backend ms|pt] [--layouts tp2,pp2,dp2,ring2]

One launch a layout and backend does a step of every fault, one after another. Each record is walked against one of the
other backend and a float64 one, both of one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.parity import worker
from telechat_twins.core.parity.locate.find import Walk, locate
from telechat_twins.core.parity.record.format import Record
from telechat_twins.core.parity.record.read import open_record
from telechat_twins.core.parity.record.recorder import step_folder
from telechat_twins.core.parity.record.sites import sites
from telechat_twins.core.parity.worker import Task, launch_tasks, run_alone, write_batch
from tests.campaigns.locate import OTHER, catalogue, is_named
from tests.campaigns.located_faults import Fault, planted
from tests.support.recording import RATE, random_batch, small_run

LAYOUTS = ("tp2", "pp2", "dp2", "ring2")
# Faults that are the same function in every layout: they need neither another block nor another rank.
FAULTS = (
    "eps of another release",
    "gain plus one",
    "mean subtracted",
    "gain without gradient",
    "statistics as constants",
    "rotation reversed",
    "v halves swapped",
)
RIGHT = "right"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("ms", "pt"))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    args = parser.parse_args(argv)
    right = total = 0
    for backend in [args.backend] if args.backend else ["pt", "ms"]:
        for layout in args.layouts.split(","):
            with tempfile.TemporaryDirectory() as folder:
                for name, found in walks(backend, layout, FAULTS, Path(folder)).items():
                    named = is_right(name, found)
                    right, total = right + named, total + 1
                    what = "nothing" if found.found is None else f"{found.found.suspect} side {found.found.side}"
                    print(f"{backend} {layout} {'named ' if named else 'MISSED'} {name}: {what}", flush=True)
    print(f"{right} of {total} named")
    return 0 if right >= total * 55 / 60 else 1


def is_right(name: str, found: Walk) -> bool:
    """Whether a fault is named, or of a right run nothing."""
    return found.found is None if name == RIGHT else is_named(catalogue()[name], found)


def walks(backend: str, layout: str, names: Sequence[str], folder: Path) -> dict[str, Walk]:
    """By name, what `locate` finds of each fault in ``layout``, and of a right run."""
    tasks = [task(name, layout, folder) for name in (RIGHT, *names)]
    code = launch_tasks(backend, tasks, folder / "many", script=Path(__file__))
    if code:
        raise SystemExit(code)
    other = _alone(OTHER[backend], "fp32", folder)
    exact = _alone("pt", "fp64", folder)
    model = small_run().model
    found = {}
    for number, one in enumerate(tasks):
        record = open_record(step_folder(folder / "many" / str(number), 1))
        found[one.name] = locate(record, other, exact, sites(model), model.num_layers)
    return found


def task(name: str, layout: str, folder: Path, precision: str = "fp32") -> Task:
    """One update of the model of tests/campaigns/locate.py, recorded."""
    run = small_run(precision=precision)
    batch = folder / "batch.safetensors"
    where = str(batch) if batch.exists() else write_batch(batch, random_batch(run))
    return Task(
        name=name,
        model=run.model,
        layout=parse_layout(layout),
        batch=where,
        precision=precision,
        gradients=False,
        steps=1,
        optim=replace(run.optim, lr=RATE),
        record=True,
    )


def _alone(backend: str, precision: str, folder: Path) -> Record:
    run_alone(backend, task(RIGHT, "single", folder, precision), folder / f"{backend}-{precision}")
    return open_record(step_folder(folder / f"{backend}-{precision}", 1))


@contextmanager
def _around(task: Task, backend: str) -> Iterator[None]:
    fault: Fault | None = catalogue().get(task.name)
    with planted(fault, backend):
        yield


def rank_main() -> int:
    """A rank's part of a launch."""
    return worker.main(around=_around)


if __name__ == "__main__":
    import sys

    # The launcher starts this file with a job's description, a person without.
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        raise SystemExit(run_script(rank_main))
    else:
        raise SystemExit(main())
