"""Where the optional material lies that is never committed: the released tokenizer, real dialogues, extra goldens."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared_file(relative: str) -> Path:
    """The file or folder beside the checkout, or skip the test with the reason."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs {relative}, which is not beside this checkout")
    return path
