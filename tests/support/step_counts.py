"""Operators of a training step and the bytes that they allocate: numbers that no load of the machine changes.

python -m tests.support.step_counts    writes tests/support/step_counts.json anew
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telechat_twins.core import backends
from telechat_twins.core.bench.worker import bench_config, timed_steps

FILE = Path(__file__).with_suffix(".json")
OPTIONS = {"model": "telechat2-tiny", "seq_len": 32, "micro_batch": 1, "micro_batches": 1}
Counts = dict[str, dict[str, int]]


def counts(backend: str, precision: str) -> Counts:
    """Calls by operator of the second step, and the bytes of their results; MindSpore: of the C++ operators."""
    config = bench_config({**OPTIONS, "precision": precision})
    # Products in matrix tiles are other calls, on some processors only.
    products = dataclasses.replace(config.kernels, linear="cpp" if backend == "ms" else "torch")
    config = dataclasses.replace(config, kernels=products)
    trainer = backends.load(backend, "train").Trainer(config)
    timed_steps(trainer, config, 0, 1)
    return _mindspore(trainer, config) if backend == "ms" else _pytorch(trainer, config)


def _mindspore(trainer: Any, config: Any) -> Counts:
    import mindspore as ms

    from telechat_twins.kernels.cpu.engine import NAMES, engine_of

    engine, calls, size = engine_of(ms.Tensor([1.0])), Counter[str](), 0
    run, widths = engine.run, dict(zip(NAMES, (4, 2, 2, 4, 8, 8, 1), strict=True))
    names = {dtype: name for name, dtype in engine.dtypes.items()}

    def counted(name: str, inputs: Sequence[Any], outputs: Sequence[Any], *rest: Any) -> Any:
        nonlocal size
        calls[name] += 1
        for dtype, shape in outputs:
            count = widths[names[dtype]]
            for extent in shape:
                count *= int(extent)
            size += count
        return run(name, inputs, outputs, *rest)

    engine.run = counted  # type: ignore[method-assign]
    try:
        timed_steps(trainer, config, 1, 1)
    finally:
        del engine.run
    return {"calls": dict(sorted(calls.items())), "bytes": {"results": size}}


def _pytorch(trainer: Any, config: Any) -> Counts:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.size = Counter[str](), 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            self.calls[str(func.overloadpacket)] += 1
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                    self.size += x.untyped_storage().nbytes()
            return out

    with Counting() as counting:
        timed_steps(trainer, config, 1, 1)
    return {"calls": dict(sorted(counting.calls.items())), "bytes": {"results": counting.size}}


def versions() -> dict[str, str]:
    """The framework versions that the counts belong to."""
    import mindspore
    import torch

    return {"ms": mindspore.__version__, "pt": torch.__version__.partition("+")[0]}


if __name__ == "__main__":
    found = {f"{name} {precision}": counts(name, precision) for name in ("ms", "pt") for precision in ("fp32", "bf16")}
    FILE.write_text(json.dumps({"versions": versions(), "counts": found}, indent=1) + "\n", encoding="utf-8")
