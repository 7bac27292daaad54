"""MindSpore's .ckpt files, through MindSpore's own functions, imported when such a file is met.

A .ckpt (protobuf) is read and written as a whole: it is in memory at once, unlike safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.safetensors_io import DTYPES, TensorInfo

_CODES = {"Float64": "F64", "Float32": "F32", "Float16": "F16", "BFloat16": "BF16"}
_PICKLED = (b"PK\x03\x04", b"\x80")  # torch.save since 1.6, and before


class CkptFile:
    """An opened .ckpt. ``tensors``: name -> shape and dtype, like SafetensorsFile's; the values are in memory."""

    def __init__(self, path: str | Path) -> None:
        """UserError if there is no MindSpore, or the file is no checkpoint of MindSpore's."""
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                start = file.read(4)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        if start.startswith(_PICKLED):
            raise UserError(
                f"{self.path}: is a pickled file, not MindSpore's; it is not read (it can run code), convert it to "
                "safetensors with the tools of whoever made it"
            )
        ms = _mindspore(self.path)
        try:
            self._parameters: dict[str, Any] = ms.load_checkpoint(str(self.path))
        except (ValueError, RuntimeError, TypeError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path}: is no checkpoint that MindSpore reads ({reason})") from None
        self.tensors = {name: _info(parameter) for name, parameter in self._parameters.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype."""
        value: np.ndarray = self._parameters[name].asnumpy()
        # MindSpore's bfloat16 is a numpy dtype of its own.
        return value.view(np.uint16).view(DTYPES["BF16"]) if self.tensors[name].code == "BF16" else value


def save_ckpt(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a .ckpt with MindSpore; UserError if there is none."""
    ms = _mindspore(path)
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(array)} for name, array in tensors.items()], str(path))


def _mindspore(path: Path) -> Any:
    try:
        import mindspore
    except ImportError as error:
        raise UserError(
            f"{path.name}: a .ckpt is read and written by MindSpore, which cannot be imported here ({error}); install "
            "the extra 'ms', or use safetensors"
        ) from None
    return mindspore


def _info(parameter: Any) -> TensorInfo:
    name, shape = str(parameter.dtype), tuple(int(size) for size in parameter.shape)
    if name not in _CODES:
        return TensorInfo(name, shape, 0, 0)  # of no model's tensor; its dtype is refused if one is looked for
    return TensorInfo(_CODES[name], shape, 0, math.prod(shape) * DTYPES[_CODES[name]].itemsize)
