"""Peak FLOP/s of a run's devices, which the model FLOPs utilisation (MFU) is a share of."""

from __future__ import annotations

import math
from pathlib import Path

from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import CONFIGS
from telechat_twins.core.near import nearest
from telechat_twins.core.schema import load_yaml

_HALF = ("bf16", "fp16", "amp")  # matrix products in 16 bits


def peak_flops(config: RunConfig) -> float | None:
    """FLOP/s of all devices of the run together; None where ``train.peak_tflops`` and ``train.machine`` are unset.

    A machine file (configs/machines) gives TFLOP/s of one device as ``peak_bf16: {value: ...}`` and ``peak_fp32``.
    UserError for a machine that is not there or has no figure for the run's precision.
    """
    train = config.train
    tflops = train.peak_tflops if train.machine is None else _of_machine(train.machine, train.precision)
    return None if tflops is None else tflops * 1e12 * config.parallel.world


def _of_machine(name: str, precision: str) -> float:
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / "machines" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (CONFIGS / "machines").glob("*.yaml"))
        near = nearest(name, known)
        hint = f"did you mean '{near}'? " if near else ""
        raise UserError(
            f"train.machine: no machine file {path}; {hint}give a YAML file or one of {', '.join(known) or '(none)'}, "
            "or set train.peak_tflops"
        )
    tree = load_yaml(path)
    key = "peak_bf16" if precision in _HALF else "peak_fp32"
    entry = tree.get(key) if isinstance(tree, dict) else None
    value = entry.get("value") if isinstance(entry, dict) else entry
    if precision == "fp64" or isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"train.machine: {path} has no {key} for precision {precision}; set train.peak_tflops")
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{path}: {key}: must be TFLOP/s above 0, found {value}")
    return float(value)
