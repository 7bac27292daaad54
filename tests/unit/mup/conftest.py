"""Fixtures of the muP tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mup_search import write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with run.yaml, search.yaml and their data."""
    return write_run(tmp_path)
