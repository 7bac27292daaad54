"""Where a command may write a model: a new place, or with --force one that holds a model and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from telechat_twins.core.errors import UserError

_DESCRIBED = ("manifest.json", "config.json", "model.json", "adapter_config.json")


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise UserError unless DST is new or empty or, with --force, a folder that holds a model and nothing else."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: DST must be a folder, found a file or a link there; choose another DST")
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{target}: DST must not be, contain or lie in SRC; choose a DST outside {source}")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise UserError(f"{target}: exists and is not empty; choose another DST, or --force to replace the model in it")
    described = any((target / name).is_file() for name in _DESCRIBED)
    weights = any(any(target.glob(f"{place}*.{kind}")) for place in ("", "rank_0/") for kind in ("safetensors", "ckpt"))
    ours = re.compile(r"assets|rank_\d+")
    folders = [p.name for p in target.iterdir() if p.is_dir() and not ours.fullmatch(p.name)]
    if folders or not described or not weights:
        found = f"but this folder also holds '{folders[0]}'" if folders else "but this folder holds no model"
        raise UserError(f"{target}: --force replaces a model and nothing else, {found}; choose another DST")
