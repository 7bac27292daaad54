"""Goldens, parity, conversion and exports in environments of other versions; the page docs/matrix.md.

    python -m tests.campaigns.matrix [--cells NAME ...] [--keep] [--again] [--page]

For each cell of tests/campaigns/matrix_cells.py an environment is made under build/matrix, its tests run, the result
goes to build/matrix/results, and one line is printed. A cell whose result stands for this commit and these
requirements is not run again (--again does), so an interrupted run goes on where it was. An environment is removed
after its tests unless --keep is given: each takes up to 5 GB. --page writes docs/matrix.md and docs/matrix.zh.md from
the results that stand. The exit code is 1 when a test failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tests.campaigns.matrix_cells import CELLS, PLAIN, Cell
from tests.campaigns.matrix_page import write_pages
from tests.house import ROOT

PLACE = ROOT / "build" / "matrix"
RESULTS = PLACE / "results"
SHOWN = ("mindspore", "torch", "transformers", "mindformers", "numpy", "tokenizers", "safetensors")
VERSIONS = (
    "import importlib.metadata as m, json; found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}; "
    f"print(json.dumps({{n: found[n] for n in {SHOWN!r} if n in found}}))"
)


def requirements(cell: Cell) -> tuple[list[str], list[str]]:
    """(what is asked for, constraints): the versions of requirements.lock wherever the cell says nothing else."""
    locked = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    pins = {line.partition("==")[0]: line for line in locked}
    own = {line.partition("==")[0] for line in cell.packages if "==" in line}
    return [*PLAIN, *cell.packages], [pins[name] for name in pins if name not in (*own, *cell.free)]


def environment(cell: Cell) -> Path:
    """The cell's python; made where it does not stand as required. RuntimeError with pip's last line."""
    folder, wanted = PLACE / cell.name, json.dumps(requirements(cell))
    stamp = folder / "requirements.json"
    python = folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    if (folder / "pyvenv.cfg").is_file():
        shutil.rmtree(folder)
    names, constraints = requirements(cell)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (folder / "constraints.txt").write_text("\n".join(constraints) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check", "-c",
         str(folder / "constraints.txt"), *names],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise RuntimeError(errors[0])
    stamp.write_text(wanted)
    return python


def run(cell: Cell) -> dict[str, Any]:
    """Make the environment and run the tests; a mapping for JSON."""
    python, started = environment(cell), time.monotonic()
    report = RESULTS / f"{cell.name}.xml"
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TELE_TEST_BACKENDS": cell.backends}
    done = subprocess.run(
        [str(python), "-m", "pytest", *cell.tests, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    versions = json.loads(
        subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    )
    counts, failed = _counts(report, done.stdout)
    seconds = round(time.monotonic() - started)
    return {"versions": versions, **counts, "failed": failed, "seconds": seconds, "exit": done.returncode}


def _counts(report: Path, output: str) -> tuple[dict[str, int], list[str]]:
    if not report.is_file():
        return {"tests": 0, "skipped": 0}, [output[-300:]]
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {"tests": len(cases) - skipped, "skipped": skipped}, failed


def key(cell: Cell) -> str:
    """Digest of what a result depends on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    facts = [requirements(cell), cell.tests, cell.backends, commit]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def standing(cell: Cell) -> dict[str, Any] | None:
    """The recorded result of a cell, of whatever commit."""
    file = RESULTS / f"{cell.name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="+", default=[cell.name for cell in CELLS])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    wrong = False
    for cell in () if args.page else [cell for cell in CELLS if cell.name in args.cells]:
        result, digest = standing(cell), key(cell)
        if result is None or result["key"] != digest or args.again:
            try:
                result = run(cell)
            except RuntimeError as error:
                result = {"versions": {}, "tests": 0, "skipped": 0, "failed": [str(error)], "seconds": 0, "exit": 1}
            result["key"] = digest
            (RESULTS / f"{cell.name}.json").write_text(json.dumps(result, indent=1) + "\n")
            if not args.keep and (PLACE / cell.name / "pyvenv.cfg").is_file():
                shutil.rmtree(PLACE / cell.name)
        wrong |= bool(result["exit"])
        passed = result["tests"] - len(result["failed"])
        print(f"{cell.name}: {passed} passed, {len(result['failed'])} failed, {result['skipped']} skipped, "
              f"{result['seconds']} s {' '.join(result['failed'][:3])}", flush=True)  # fmt: skip
    write_pages({cell.name: found for cell in CELLS if (found := standing(cell)) is not None})
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
