#!/bin/bash
# MindSpore's Tensor.assign_value gives the tensor other memory: whatever shared the old memory keeps the old values.
#
# Version:      MindSpore 2.9.0 (CPU, PyNative), numpy 1.26.4, CPython 3.11.
# Likely guess: assign_value writes the values into the tensor, as copy_ does, so that a parameter tied to it by set_data,
#               and a numpy array that it was made of by from_numpy, see them.
# Behaviour:    both ties hold for copy_ and end, without a word, with the first assign_value. From then on the two are
#               updated apart.
# Matters:      weights that are views of an optimizer's masters, and tied embeddings, stop following.
# Seen:         copy_: tied parameter 3, array 3; assign_value: tensor 2, tied parameter 3, array 3
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import sys

import mindspore as ms
import numpy as np

array = np.zeros(4, np.float32)
base = ms.Tensor.from_numpy(array)
tied = ms.Parameter(ms.Tensor(np.ones(4, np.float32)), name="tied")
tied.set_data(base)


def seen() -> tuple[float, float, float]:
    return float(base.asnumpy()[0]), float(tied.asnumpy()[0]), float(array[0])


base.copy_(ms.Tensor(np.full(4, 3, np.float32)))
copied = seen()
base.assign_value(ms.Tensor(np.full(4, 2, np.float32)))
assigned = seen()
print(f"copy_: tied parameter {copied[1]:g}, array {copied[2]:g}; ", end="")
print(f"assign_value: tensor {assigned[0]:g}, tied parameter {assigned[1]:g}, array {assigned[2]:g}")
sys.exit(0 if copied == (3, 3, 3) and assigned == (2, 3, 3) else 1)
PYTHON
