"""Pictures that matplotlib draws, as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.files.atomic import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Write ``figure`` in the format of the suffix of ``path`` (none: PNG), atomically: no viewer sees half a picture.

    Its folder is made if need be. OSErrors propagate and name ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as beside:
        figure.savefig(beside, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
