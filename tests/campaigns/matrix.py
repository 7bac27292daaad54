"""Goldens, parity, conversion and exports in environments of other versions; the page docs/matrix.md.

    python -m tests.campaigns.matrix [--cells NAME ...] [--keep] [--again] [--page] [--ci]

For each cell of tests/campaigns/matrix_cells.py an environment is made under build/matrix, its tests run, the result
and pytest's output go to build/matrix/results, and one line is printed. A cell whose result stands for this commit and
these requirements is not run again (--again does), so an interrupted run goes on where it was. An environment is
removed after its tests unless --keep is given: each takes up to 5 GB. --page writes docs/matrix.md and
docs/matrix.zh.md from the results that stand. The exit code is 1 when a test failed or an environment could not be
made that the cells do not expect to fail.

--ci runs the tests of CI_CELL alone, in an environment that sees the packages of the running one and adds only what
differs: seconds in place of minutes. Neither result nor page is written. Where pip cannot install it within
CI_INSTALL_S, the reason is printed and the exit code is 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tests.campaigns.matrix_cells import CELLS, CI_CELL, CI_TESTS, PLAIN, Cell
from tests.campaigns.matrix_page import write_pages
from tests.house import ROOT

PLACE = ROOT / "build" / "matrix"
RESULTS = PLACE / "results"
CI_INSTALL_S = 60
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
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    _install(cell, folder)
    stamp.write_text(wanted)
    return python


def _install(cell: Cell, folder: Path, *options: str, limit_s: float | None = None) -> None:
    """pip's installation into an environment. RuntimeError with pip's first error line, or when it takes too long."""
    names, constraints = requirements(cell)
    (folder / "constraints.txt").write_text("\n".join(constraints) + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-compile",
               "--disable-pip-version-check", "-c", str(folder / "constraints.txt"), *options, *names]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pip was not ready after {limit_s} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        # Of other versions of Python: the reason is the next line.
        told = [line for line in errors if not line.startswith("ERROR: Ignored")] or ["no message"]
        raise RuntimeError(told[0])


def run_in_ci() -> int:
    """CI_TESTS of CI_CELL over the packages of the running environment; the exit code."""
    cell, folder = next(cell for cell in CELLS if cell.name == CI_CELL), PLACE / "ci"
    if (folder / "pyvenv.cfg").is_file():
        shutil.rmtree(folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    own = next(folder.glob("lib/python*/site-packages"))
    # Folders of a .pth file come after the environment's own packages, so what is installed there goes first.
    (own / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    try:
        _install(cell, folder, "--retries", "1", limit_s=CI_INSTALL_S)
    except RuntimeError as error:
        print(f"{cell.name}: skipped, its packages could not be installed: {error}")
        return 0
    command = [str(folder / "bin" / "python"), "-m", "pytest", *CI_TESTS, "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, env=_variables(cell), check=False).returncode


def _variables(cell: Cell) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TELE_TEST_BACKENDS": cell.backends}


def processor_s() -> float:
    """Processor seconds, user and system, of the children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(cell: Cell) -> dict[str, Any]:
    """Make the environment and run the tests; a mapping for JSON."""
    python = environment(cell)
    started, used = time.monotonic(), processor_s()
    report, log = RESULTS / f"{cell.name}.xml", RESULTS / f"{cell.name}.log"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", *cell.tests, "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
    with log.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, env=_variables(cell), stdout=output, stderr=output, check=False)
    used = processor_s() - used
    versions = json.loads(
        subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    )
    counts, failed = _counts(report, log.read_text())
    seconds = round(time.monotonic() - started)
    return {"versions": versions, **counts, "failed": failed, "seconds": seconds, "processor_s": round(used, 1),
            "exit": done.returncode}  # fmt: skip


def uninstallable(cell: Cell, message: str) -> dict[str, Any]:
    """The result of a cell whose environment could not be made; expected (exit 0) where ``lacks`` says so."""
    expected = bool(cell.lacks) and cell.lacks in message
    return {"versions": {}, "tests": 0, "skipped": 0, "failed": [message], "seconds": 0, "processor_s": 0.0,
            "exit": int(not expected)}  # fmt: skip


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
    parser.add_argument("--ci", action="store_true")
    args = parser.parse_args()
    if args.ci:
        return run_in_ci()
    RESULTS.mkdir(parents=True, exist_ok=True)
    wrong = False
    for cell in () if args.page else [cell for cell in CELLS if cell.name in args.cells]:
        result, digest = standing(cell), key(cell)
        if result is None or result["key"] != digest or args.again:
            try:
                result = run(cell)
            except RuntimeError as error:
                result = uninstallable(cell, str(error))
            result["key"] = digest
            (RESULTS / f"{cell.name}.json").write_text(json.dumps(result, indent=1) + "\n")
            if not args.keep and (PLACE / cell.name / "pyvenv.cfg").is_file():
                shutil.rmtree(PLACE / cell.name)
        wrong |= bool(result["exit"])
        if not result["versions"]:
            print(f"{cell.name}: not installable{'' if result['exit'] else ', as expected'}: {result['failed'][0]}")
            continue
        passed = result["tests"] - len(result["failed"])
        print(f"{cell.name}: {passed} passed, {len(result['failed'])} failed, {result['skipped']} skipped, "
              f"{result['processor_s']:.0f} processor s {' '.join(result['failed'][:3])}", flush=True)  # fmt: skip
    write_pages({cell.name: found for cell in CELLS if (found := standing(cell)) is not None})
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
