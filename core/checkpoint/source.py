"""The weights of a model as read by logical name, in whatever format they are stored.

Core reads canonical checkpoints only. For other formats the caller opens the model (convert.source) and passes in the
source, or the function that opens a reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.types import JsonObject

ReadBox = Callable[[str, tuple[slice, ...]], np.ndarray]  # part of a parameter, by its logical name
OpenReader = Callable[[str], ReadBox]  # of the model in a folder that was verified before


class WeightSource(Protocol):
    """An opened model: its configuration, the tokenizer beside it, and its tensors by logical name."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer_path(self) -> Path | None: ...

    @property
    def notes(self) -> Sequence[str]: ...

    @property
    def record(self) -> JsonObject | None:
        """Config and file layout of the release that the weights came from; model.json keeps it under "hf"."""
        ...

    @property
    def assets(self) -> Sequence[Path]:
        """Small files that belong to the model: tokenizer, chat template, code of a release."""
        ...

    def tensor(self, name: str) -> np.ndarray: ...

    def read(self, name: str, box: tuple[slice, ...], /) -> np.ndarray:
        """A box of a tensor."""
        ...

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Hash this rank's share of the files that have a recorded hash; UserError names one that is altered."""
        ...


OpenInitial = Callable[[str, ModelConfig | None], WeightSource]  # convert.initial.open_initial
