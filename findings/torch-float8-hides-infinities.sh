#!/bin/bash
# torch casts infinity to float8_e4m3fn as 448, its largest number: a check for overflow after the cast finds nothing. ml_dtypes,
# JAX's, makes NaN of it.
#
# Version:      torch 2.13.0, ml_dtypes 0.5.4, numpy 1.26.4, CPython 3.11, CPU.
# Likely guess: e4m3fn has no infinity, so what is too large becomes NaN, as in ml_dtypes and by rounding to a format without
#               infinities; if finite values are cut off at 448, inf at least does not become a number. float8_e5m2 keeps it.
# Behaviour:    everything from 449 on, 1e6 and inf included, is 448, from float32, float16, bfloat16 and float64 alike; only NaN
#               stays NaN. float8_e5m2 of torch does not cut off: 1e6 is inf; float8_e4m3fnuz makes NaN of both.
# Matters:      an activation or gradient that is infinite, or a scale that is wrong by orders of magnitude, comes back as a
#               plain number, and no isfinite() behind the cast stops the step. Look for infinities before it.
# Seen:         inf: torch e4m3fn 448, e4m3fnuz nan, e5m2 inf; ml_dtypes e4m3fn nan, e5m2 inf; 1e6: torch 448, nan, inf;
#               ml_dtypes nan, inf; 464: 448 in both; 465: torch 448, ml_dtypes nan
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "numpy==1.26.4" "ml_dtypes==0.5.4"
"$scratch/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import torch

in_torch = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
in_ml_dtypes = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
expected = {
    float("inf"): ["448", "nan", "inf", "nan", "inf"],
    1e6: ["448", "nan", "inf", "nan", "inf"],
    464.0: ["448", "nan", "448", "448", "448"],
    465.0: ["448", "nan", "448", "nan", "448"],
    float("nan"): ["nan"] * 5,
}
holds = True
for value, right in expected.items():
    with np.errstate(all="ignore"):
        theirs = [float(np.float32(value).astype(dtype)) for dtype in in_ml_dtypes]
    found = [f"{x:g}" for x in [*(torch.tensor([value]).to(dtype).float().item() for dtype in in_torch), *theirs]]
    print(f"{value:g}: torch e4m3fn {found[0]}, e4m3fnuz {found[1]}, e5m2 {found[2]}; ml_dtypes e4m3fn {found[3]}, e5m2 {found[4]}")
    holds = holds and found == right
for dtype in (torch.float64, torch.bfloat16, torch.float16):
    many = torch.full((64,), float("inf"), dtype=dtype).to(torch.float8_e4m3fn).float()
    holds = holds and many.eq(448).all().item()
raise SystemExit(0 if holds else 1)
PYTHON
