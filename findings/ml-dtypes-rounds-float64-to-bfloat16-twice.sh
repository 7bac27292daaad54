#!/bin/bash
# ml_dtypes casts float64 to bfloat16 in two roundings: values just beside the middle of two numbers go to the wrong one.
#
# Version:      ml_dtypes 0.5.4, numpy 1.26.4, CPython 3.11.
# Likely guess: array.astype(ml_dtypes.bfloat16) of float64 gives the nearest bfloat16, as astype(float16) gives the
#               nearest float16.
# Behaviour:    the value is rounded to float32 first and to bfloat16 then. 1 + 2^-8 + 2^-30 lies above the middle of 1 and
#               1.0078125; float32 rounds it to the middle itself, and the tie goes to the even one, 1.
# Matters:      sums taken in float64 so as to be rounded once (merged adapters, averaged checkpoints) are rounded twice.
# Seen:         bfloat16 of 1 + 2^-8 + 2^-30: 1 (the nearest is 1.0078125); float16 of 1 + 2^-11 + 2^-30: 1.0009765625
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "ml_dtypes==0.5.4" "numpy==1.26.4"
"$scratch/venv/bin/python" - <<'PYTHON'
import sys

import ml_dtypes
import numpy as np

rough = float(np.array([1 + 2.0**-8 + 2.0**-30]).astype(ml_dtypes.bfloat16)[0])
half = float(np.array([1 + 2.0**-11 + 2.0**-30]).astype(np.float16)[0])
print(f"bfloat16 of 1 + 2^-8 + 2^-30: {rough:g} (the nearest is 1.0078125); float16 of 1 + 2^-11 + 2^-30: {half}")
sys.exit(0 if rough == 1.0 and half == 1.0009765625 else 1)
PYTHON
