"""Weight sources: the tensors of a model by logical name, from a release or a canonical checkpoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from telechat_twins.convert.hf.folder import HfFolder, check_record
from telechat_twins.convert.hf.sums import SUMS, check_sums
from telechat_twins.convert.names import Box
from telechat_twins.convert.rounding import rounded
from telechat_twins.core.checkpoint.read import Checkpoint, check_shapes, open_checkpoint
from telechat_twins.core.checkpoint.source import ReadBox
from telechat_twins.core.data.encoders.special import find_tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import standing
from telechat_twins.core.files.safetensors import DTYPES
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.near import near_path
from telechat_twins.core.schema import from_mapping
from telechat_twins.core.types import JsonObject


def open_model(path: str | Path, verify: bool = True) -> ModelSource:
    """Open a released folder, a canonical step folder, or a run folder (its latest checkpoint).

    ``verify`` hashes every file of a canonical checkpoint, and of a release that has SHA256SUMS; headers and sizes are
    always checked. UserError says what is wrong with the folder.
    """
    path = standing(Path(path))
    if (path / "config.json").is_file():
        return HfSource(HfFolder(path, verify))
    if path.is_file():
        raise UserError(f"{path}: is a file; give the folder of a model or of a checkpoint, e.g. {path.parent}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a released model or a checkpoint{near_path(path)}")
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path}: is an adapter of PEFT's, not a model; {_instead(path)}")
    if not (path / "manifest.json").is_file() and not (path / "latest").is_file():
        raise UserError(
            f"{path}: no model found; a released folder has config.json, a checkpoint manifest.json, a run latest"
            f"{_below(path)}"
        )
    return CanonicalSource(open_checkpoint(path, verify))


def _instead(adapter: Path) -> str:
    """What to give in place of an adapter."""
    return (
        f"give its base here, and this folder as --adapter where there is that option; else both as one model: tele "
        f"merge BASE {adapter} DST"
    )


def _below(path: Path) -> str:
    """For the message about a folder without a model: three folders in it that have one, released ones first."""
    found = [file.parent for name in ("config.json", "latest") for file in sorted(path.glob(f"*/{name}"))]
    return f"; below it are {', '.join(map(str, found[:3]))}" if found else ""


class ModelSource(ABC):
    """Weights under logical names, read when asked for.

    ``config``; ``path``; ``tokenizer_path`` (of the tokenizer beside it, or None); ``notes`` (what had to be assumed);
    ``record`` (config and file layout of the release that the weights came from, or None); ``assets`` (small files that
    belong to the model).
    """

    config: ModelConfig
    path: Path
    tokenizer_path: Path | None
    notes: tuple[str, ...] = ()
    record: JsonObject | None = None
    assets: Sequence[Path] = ()

    def names(self) -> list[str]:
        """Logical names in forward order."""
        return list(parameter_table(self.config))

    @abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The stored dtype of a logical name."""

    def logical(self) -> Iterator[tuple[str, np.ndarray]]:
        """(logical name, tensor) of the whole model in forward order."""
        for name in self.names():
            yield name, self.tensor(name)

    @abstractmethod
    def tensor(self, name: str) -> np.ndarray:
        """The tensor of a logical name, in its stored dtype; UserError for a name the model has not."""

    def read(self, name: str, box: Box) -> np.ndarray:
        """The box of a logical tensor, in its stored dtype; where the format allows it, no other bytes are read."""
        return self.tensor(name)[box]

    @abstractmethod
    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Hash every file of which a SHA-256 is recorded; UserError names one that is altered.

        ``share`` = (rank, ranks): only this rank's share of the files.
        """

    @abstractmethod
    def export(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Tensors by logical name (gradients, say) -> the names and packing of this source.

        Tensors that are packed together must be given together (KeyError).
        """

    @abstractmethod
    def files(self) -> list[Path]:
        """The files this model is made of: nothing else may be written over them."""


def _passed_over(folder: Path) -> Iterator[str]:
    """Notes on what of a released folder is not part of the model here."""
    if (folder / "adapter_config.json").is_file():
        yield f"{folder}: has an adapter of PEFT's beside the model, which acts only as --adapter {folder}"
    if any(folder.glob("additional_chat_templates/*.jinja")):
        yield (
            f"{folder}: its additional_chat_templates are not copied to what is made from this model; copy the folder "
            "beside the tokenizer there"
        )


class HfSource(ModelSource):
    """A released folder."""

    def __init__(self, folder: HfFolder) -> None:
        self.folder = folder
        self.path = folder.path
        self.notes = (*folder.notes, *_passed_over(folder.path))
        self.config = folder.config
        self.tokenizer_path = find_tokenizer(folder.path)
        self.record = folder.source_record()
        self.assets = folder.assets
        self._released = {name: b for b in folder.bindings.values() for name in b.logical}

    def dtype(self, name: str) -> np.dtype:
        return DTYPES[self.folder.code(self._released[name].released)]

    def logical(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.folder.logical()  # what is packed together is read once

    def tensor(self, name: str) -> np.ndarray:
        if name not in self._released:
            raise UserError(f"{self.path}: the model has no tensor '{name}'")
        binding = self._released[name]
        return binding.split(self.folder.read(binding.released), self.config)[name]

    def read(self, name: str, box: Box) -> np.ndarray:
        if name not in self._released:
            raise UserError(f"{self.path}: the model has no tensor '{name}'")
        binding = self._released[name]
        return binding.read(lambda part: self.folder.read(binding.released, part), name, box, self.config)

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        needed = [*self.folder.assets, *(file.path for file in self.folder.files.values())]
        check_sums(self.path, needed, share=share)

    def export(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = dict.fromkeys(self._released[name].released for name in tensors)
        return {name: self.folder.bindings[name].join(tensors, self.config) for name in wanted}

    def files(self) -> list[Path]:
        sums = [self.path / SUMS] if (self.path / SUMS).is_file() else []
        return [*(file.path for file in self.folder.files.values()), *self.folder.assets, *sums]


class CanonicalSource(ModelSource):
    """A canonical checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        if checkpoint.model.get("adapter") is not None:
            raise UserError(f"{self.path}: is an adapter, not a model; {_instead(self.path)}")
        self.config = checkpoint_config(checkpoint)
        shapes = {name: checkpoint.shape("weights", name) for name in checkpoint.names("weights")}
        check_shapes(parameter_table(self.config), shapes, str(self.path))
        self.record = checkpoint.model.get("hf")
        if self.record is not None:
            check_record(self.record, str(self.path / "model.json"))
        self.assets = checkpoint.assets
        self.tokenizer_path = find_tokenizer(checkpoint.path, checkpoint.assets)

    def dtype(self, name: str) -> np.dtype:
        return self.checkpoint.dtype("weights", name)

    def tensor(self, name: str) -> np.ndarray:
        return self.checkpoint.read("weights", name)

    def read(self, name: str, box: Box) -> np.ndarray:
        return self.checkpoint.read("weights", name, box)

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        self.checkpoint.verify(share=share)

    def export(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(tensors)

    def files(self) -> list[Path]:
        return self.checkpoint.files


def checkpoint_config(checkpoint: Checkpoint) -> ModelConfig:
    """The ModelConfig that a checkpoint's model.json holds; UserError names the file and the field."""
    where = checkpoint.path / "model.json"
    values: object = checkpoint.model.get("config")
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds no config")
    return from_mapping(ModelConfig, values, f"{where}: config")


class PlainSource(ModelSource):
    """A model that grew, as the plain model that computes the same, where there is one.

    An RMSNorm that divides by norm_divisor is one over all channels with its gain times sqrt(norm_divisor / E) and its
    epsilon times norm_divisor / E. Rows of the vocabulary that only pad are left out. The rest is as it was; what has
    no plain form (a LayerNorm over some channels, masks between two sizes) stays in the config.
    """

    def __init__(self, source: ModelSource) -> None:
        config = source.config
        folded = config.norm == "rmsnorm" and config.norm_divisor is not None
        self.source, self.path, self.tokenizer_path = source, source.path, source.tokenizer_path
        self.notes, self.record, self.assets = source.notes, source.record, source.assets
        self._gain = math.sqrt(config.norm_share) if folded else 1.0
        self.config = replace(
            config,
            vocab_size=config.num_tokens,
            vocab_tokens=None,
            norm_eps=config.norm_eps * config.norm_share if folded else config.norm_eps,
            norm_divisor=None if folded else config.norm_divisor,
        )
        if folded:
            self.notes = (*self.notes, f"norm_divisor {config.norm_divisor:g} is folded into gains and epsilon")
        if self.config.vocab_size < config.vocab_size:
            self.notes = (*self.notes, f"{config.vocab_size - config.num_tokens} rows of padding are left out")

    def dtype(self, name: str) -> np.dtype:
        return self.source.dtype(name)

    def tensor(self, name: str) -> np.ndarray:
        array = self.source.tensor(name)
        if name in ("embed.weight", "head.weight"):
            return array[: self.config.vocab_size]
        if self._gain != 1.0 and name.endswith("norm.weight"):
            return rounded(array.astype(np.float64) * self._gain, array.dtype)
        return array

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        self.source.verify(share)

    def export(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.source.export(tensors)

    def files(self) -> list[Path]:
        return self.source.files()


def weight_reader(path: str) -> ReadBox:
    """``read(name, box)`` of the weights of a model's folder, for a rank that needs parts; the folder was verified."""
    return open_model(path, verify=False).read
