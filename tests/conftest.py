"""Settings of all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Tests run two at a time on few cores; spinning OpenMP threads would keep the other test waiting. Must be set before
# a framework is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# xdist's workers have 80 columns; help has what its pages have, unless a test sets another width.
os.environ["COLUMNS"] = "120"

# A shell starts jobs in the background with Ctrl-C ignored, and nohup ignores the hangup, too; what is started from
# there inherits that. Tests of interrupts send both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run: a failure can be repeated, and a slow machine is not a failure.
settings.register_profile("house", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("house")

# Files of half a minute and more, longest first, those of many processes between the others. Started last, one of them
# would leave the other workers without work: see pytest_collection_modifyitems.
LONG_FILES = (
    "parity/test_layouts.py",
    "parity/test_docs_commands.py",
    "multiproc/test_growth_runs.py",
    "parity/test_locate.py",
    "multiproc/test_parallel_training.py",
    "parity/test_golden_records.py",
    "multiproc/test_launch_real.py",
    "parity/test_training_parity.py",
    "parity/test_mup_search.py",
    "unit/kernels/test_cpu_kernels.py",
    "multiproc/test_nodes.py",
    "parity/test_generation_parity.py",
    "multiproc/test_wheel.py",
    "mutation/test_mutation.py",
    "parity/test_families.py",
    "parity/test_relay.py",
    "multiproc/test_kills.py",
    "parity/test_demo.py",
    "multiproc/test_collectives.py",
    "unit/house/test_docs.py",
    "parity/test_mup_commands.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first. Workers take whole files in this order (``--no-loadscope-reorder``), so that they all end
    with short ones. UsageError for a file that is not there."""
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONG_FILES)}
    if lost := [str(path) for path in place if not path.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py: LONG_FILES names files that are not there: {', '.join(lost)}")
    items.sort(key=lambda item: place.get(item.path, len(place)))
