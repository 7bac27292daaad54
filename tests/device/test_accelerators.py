"""The goldens on an accelerator, where there is one: a GPU for PyTorch, an Ascend for MindSpore."""

from __future__ import annotations

import pytest

from tests.parity.test_goldens import CASES, check_forward, check_gradients, open_case
from tests.support.frameworks import golden_arrays, golden_batch


def require_device(backend: str) -> None:
    """Skip unless this process's backend would compute on an accelerator."""
    if backend == "pt":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no GPU: PyTorch computes on the CPU here, which tests/parity covers")
    else:
        mindspore = pytest.importorskip("mindspore")
        if mindspore.get_context("device_target") != "Ascend":
            pytest.skip("no Ascend: MindSpore computes on the CPU here, which tests/parity covers")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["ms", "pt"])
def test_goldens_on_the_device(backend: str, case: str) -> None:
    require_device(backend)
    config, source, io = open_case(case)
    batch = golden_batch(io, "loss_mean")
    check_forward(backend, config, source.tensor, io, "fp32table", batch, "loss_mean")
    truth = golden_arrays(f"{case}/grads_fp32table.safetensors")
    check_gradients(backend, config, source.tensor, batch, source.export, truth)
