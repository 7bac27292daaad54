"""Pictures become files as everything else does: whole or not at all, with the file named that the disk refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.core.files.pictures import save_picture
from tests.house import ROOT


class Drawn:
    """In place of a matplotlib figure: writes some bytes, and then meets ``error``."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error, self.format = error, ""

    def savefig(self, path: Path, dpi: int, format: str) -> None:
        self.format = format
        path.write_bytes(b"half")
        if self.error is not None:
            raise self.error


def test_a_picture_that_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    full: Any = Drawn(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError) as error:
        save_picture(full, tmp_path / "step.png", 100)
    assert error.value.filename == str(tmp_path / "step.png") and not os.listdir(tmp_path)
    for name, wanted in (("step.svg", "svg"), ("step", "png")):
        drawn: Any = Drawn()
        save_picture(drawn, tmp_path / name, 100)
        assert drawn.format == wanted and (tmp_path / name).is_file()


def test_every_picture_is_saved_so() -> None:
    found = [
        str(path.relative_to(ROOT))
        for folder in ("core", "convert", "kernels", "telechat_ms", "pt_reference")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if ".savefig(" in path.read_text(encoding="utf-8")
    ]
    assert found == ["core/files/pictures.py"]
