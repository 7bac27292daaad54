"""What `tele parity compare` takes: two records, two run folders, or two outputs of `tele forward`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.record.read import is_record

Kind = Literal["records", "runs", "forward"]
NAMES = {
    "records": "a record (record.json)",
    "runs": "a run folder (metrics.jsonl)",
    "forward": "an output of `tele forward` (.safetensors)",
}


def kind_of(path: str) -> Kind:
    """What a path holds; UserError when it is none of the three."""
    place = Path(path)
    if is_record(place):
        return "records"
    if place.is_dir() and (place / "metrics.jsonl").exists() or place.name == "metrics.jsonl" and place.is_file():
        return "runs"
    if place.is_file() and place.suffix == ".safetensors":
        return "forward"
    wanted = ", ".join(NAMES.values())
    found = "a folder without these" if place.is_dir() else "another file" if place.exists() else "no such file"
    raise UserError(f"{path}: must be {wanted}; found {found}")


def common_kind(paths: list[str]) -> Kind:
    """What all paths hold; UserError when they differ."""
    kinds = [kind_of(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{path}: must be of the same kind as {paths[0]}, {NAMES[kinds[0]]}, found {NAMES[kind]}; compare like "
                "with like"
            )
    return kinds[0]
