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

ReadBox = Callable[[str, tuple[slice, ...]], np.ndarray]  # part of a parameter, by its logical name
OpenReader = Callable[[str], ReadBox]  # of the model in a folder that was verified before


class WeightSource(Protocol):
    """An opened model: its configuration, the tokenizer beside it, and its tensors by logical name."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer_path(self) -> Path | None: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def tensor(self, name: str) -> np.ndarray: ...
