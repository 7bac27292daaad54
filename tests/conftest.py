"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Tests run two at a time on few cores; spinning OpenMP threads would keep the other test waiting. Must be set before
# a framework is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples in every run: a failure can be repeated, and a slow machine is not a failure.
settings.register_profile("house", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("house")
