"""The same call into either framework: differentiate an operator, or load a golden case."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from telechat_twins.convert.hf.config import read_config
from telechat_twins.convert.source import ModelSource, open_model
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import ModelConfig

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
BACKENDS = tuple(os.environ.get("TELE_TEST_BACKENDS", "ms,pt").split(","))  # make matrix sets it


def differentiate(
    backend: str, call: Callable[..., Any], arrays: list[np.ndarray], grad_out: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """``call(ops, dtype, *tensors)`` on the backend's ops module -> output and the gradient of every array."""
    return {"ms": _differentiate_ms, "pt": _differentiate_pt}[backend](call, arrays, grad_out)


def _differentiate_pt(
    call: Callable[..., Any], arrays: list[np.ndarray], grad_out: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    import torch

    from telechat_twins.pt_reference import ops

    tensors = [torch.from_numpy(a.copy()).requires_grad_() for a in arrays]
    out = call(ops, tensors[0].dtype, *tensors)
    out.backward(torch.from_numpy(grad_out).reshape(out.shape))
    return out.detach().numpy(), [t.grad.numpy() for t in tensors]


def _differentiate_ms(
    call: Callable[..., Any], arrays: list[np.ndarray], grad_out: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    import mindspore as ms

    from telechat_twins.telechat_ms import ops

    tensors = [ms.Tensor(a) for a in arrays]
    weight = ms.Tensor(grad_out)

    def scalar(*inputs: Any) -> Any:
        out = call(ops, inputs[0].dtype, *inputs)
        return (out * weight.reshape(out.shape)).sum(), out

    (_, out), gradients = ms.value_and_grad(scalar, tuple(range(len(tensors))), has_aux=True)(*tensors)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)  # one input comes without its tuple
    return out.asnumpy(), [g.asnumpy() for g in gradients]


def golden_source(weights: str, config: str, folder: str | None = None) -> ModelSource:
    """A golden's weights and config opened by the production reader, as the released folder they came from."""
    if folder is None:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the source reads from it until the process ends
    for name, target in (("model.safetensors", weights), ("config.json", config)):
        link = Path(folder) / name
        if not link.exists():
            link.symlink_to(GOLDENS / target)
    return open_model(folder)


def golden_config(path: str) -> ModelConfig:
    return read_config(json.loads((GOLDENS / path).read_text()), path)[0]


@cache
def golden_arrays(path: str) -> dict[str, np.ndarray]:
    return load_file(GOLDENS / path)


def golden_batch(io: dict[str, np.ndarray], loss: str) -> Batch:
    """The inputs of a golden with the labels that its ``loss_mean``, ``loss_ignore`` or ``loss_masked`` used."""
    ids = io["input_ids"].astype(np.int32)
    labels = io["labels_ignore" if loss == "loss_ignore" else "labels"].astype(np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return Batch(ids, shift_labels(labels, io["loss_mask"] if loss == "loss_masked" else None), positions)
