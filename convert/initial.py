"""Initial weights of a training run (`train.init`): any model folder, opened without hashing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import standing
from telechat_twins.core.files.safetensors import SafetensorsFile, load_json
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.near import near_path

# The readers of models are imported when one is opened: most runs begin without, and the imports take half a second.
if TYPE_CHECKING:
    from telechat_twins.convert.source import ModelSource


def open_initial(path: str | Path, model: ModelConfig | None = None) -> ModelSource:
    """Open a released folder, a canonical step folder, a run folder (its latest checkpoint), or MindFormers' weights.

    ``model``: the run's own, for a MindFormers checkpoint that does not say which model it is. Headers and sizes are
    checked, ``verify`` hashes. UserError says what is wrong with the folder.
    """
    from telechat_twins.convert.mindformers.source import MODEL, Known, MindFormersSource
    from telechat_twins.convert.source import open_model

    path = standing(Path(path))
    if not path.exists():
        raise UserError(
            f"train.init: {path}: no such folder; give a released model, a checkpoint, a run or MindFormers' weights "
            f"(tele train --init DIR){near_path(path)}"
        )
    if path.is_file() and path.suffix == ".safetensors" and not is_mindformers(path):
        raise UserError(f"train.init: {path}: is one file of a model; give the folder that holds it, {path.parent}")
    if not is_mindformers(path):
        return open_model(path, verify=False)
    try:
        described = any((path / name).is_file() for name in (MODEL, "config.json"))
        known = Known(path, None if described or model is None else model.to_dict())
        return MindFormersSource(path, known)
    except UserError as error:
        raise UserError(
            f"{error}. To say more about this checkpoint, make a canonical one of it first: tele convert --from "
            "mindformers --to canonical"
        ) from None


def is_mindformers(path: Path) -> bool:
    """Whether a folder (or file) holds weights under MindFormers' names, or in its folders of ranks."""
    from telechat_twins.convert.mindformers.source import MODEL, is_mindformers_name

    if path.is_file():
        named = path.suffix == ".safetensors" and any(map(is_mindformers_name, SafetensorsFile(path).tensors))
        return named or path.suffix == ".ckpt"
    if not path.is_dir() or (path / "manifest.json").is_file() or (path / "latest").is_file():
        return False
    if (path / "rank_0").is_dir() or any(path.glob("*.ckpt")):
        return True
    if (path / MODEL).is_file() and "mindformers" in load_json(path / MODEL, "a model's description"):
        return True
    first = min(path.glob("*.safetensors"), default=None)
    return first is not None and any(map(is_mindformers_name, SafetensorsFile(first).tensors))
