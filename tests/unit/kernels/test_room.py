"""Large results on PyTorch's CPU: where they lie, and which copies are not made."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from telechat_twins.kernels.pytorch import attention_in_cpp, room  # noqa: E402
from telechat_twins.kernels.pytorch import tiles as torch_tiles  # noqa: E402
from tests.support.pages import asked_for_large_pages, needs_large_pages  # noqa: E402

MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (70, 1024), (2, 3, 65537)])
def test_shape_dtype_and_cache_line(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = room.empty(shape, dtype)
    assert (x.shape, x.dtype, x.device.type, x.data_ptr() % 64) == (shape, dtype, "cpu", 0)
    assert x.is_contiguous() and not x.requires_grad
    x.fill_(2.0)
    assert float(x.double().sum()) == 2.0 * np.prod(shape)


@needs_large_pages
def test_vectors_of_a_whole_training_lie_on_large_pages() -> None:
    pytest.importorskip("mindspore")
    from telechat_twins.telechat_ms.optim import _aligned_zeros

    vector, array = room.zeros(4 * MIB, torch.float32, torch.device("cpu")), _aligned_zeros(4 * MIB, "float32")
    assert vector.shape == (4 * MIB,) and vector.dtype == torch.float32 and not vector.any() and not array.any()
    for middle in (vector.data_ptr() + 8 * MIB, array.ctypes.data + 8 * MIB):
        assert asked_for_large_pages(middle)


def test_the_place_of_a_freed_result_fits_the_next_of_its_size() -> None:
    """As between the results of a forward pass that its backward pass keeps."""
    room.empty((32 * MIB,), torch.uint8).fill_(0)  # from now on glibc takes results from its heap
    kept, places = [], []
    for _ in range(16):
        passing = room.empty((MIB,), torch.uint8)
        kept.append(room.empty((3 * MIB,), torch.uint8))
        places.append(passing.data_ptr())
        del passing
    assert len(set(places[-4:])) == 1, places  # the first may fill holes that earlier tests have left


@pytest.mark.skipif(bool(attention_in_cpp.obstacle()), reason="needs a compiler")
def test_a_turned_weight_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the backward pass of a frozen matrix has it; a copy of the head was the largest tensor of a step."""
    read, real = [], torch_tiles._product

    def seen(a: torch.Tensor, w: torch.Tensor, *rest: object, **how: bool) -> torch.Tensor:
        read.append(w)
        return real(a, w, *rest, **how)

    monkeypatch.setattr(torch_tiles, "_product", seen)
    monkeypatch.setitem(torch_tiles._state, "serves", True)
    rng = np.random.default_rng(0)
    x, weight = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((2, 9, 70), (70, 130)))
    out = torch_tiles.linear(x, weight.t())
    exact = x.double() @ weight.double()
    assert out.shape == exact.shape and float((out - exact).abs().max()) < 1e-4
    assert [w.data_ptr() for w in read] == [weight.data_ptr()] and read[0].is_contiguous()


KEEPING = """
import sys, torch
from telechat_twins.kernels.pytorch import room

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

kept = room.keep_freed() if sys.argv[1] == "keep" else None
before, places = resident(), set()
for _ in range(3):
    x = room.empty((16 << 20,), torch.float32).fill_(1.0)
    places.add(x.data_ptr())
    del x
print(kept, resident() - before, len(places))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_training_keeps_the_memory_of_freed_results() -> None:
    """Of 64 MiB, which glibc returns to the system otherwise."""
    kept, back = (
        subprocess.run([sys.executable, "-c", KEEPING, how], capture_output=True, text=True, check=True).stdout.split()
        for how in ("keep", "return")
    )
    assert kept[0] == "True" and int(kept[1]) >= 60 and kept[2] == "1", kept
    assert int(back[1]) < 30, back
