#!/bin/bash
# MindSpore on the CPU keeps memory at every call of an operator that takes a plain number or a dtype.
#
# Version:      mindspore 2.9.0 (the same with 2.10.0), CPython 3.11, x86-64, PyNative mode.
# Likely guess: ops.cast(x, ms.float16) in a loop, its result thrown away, needs no more memory after a few rounds, as x + x
#               needs none.
# Behaviour:    every call keeps about 670 bytes until the process ends: 160 of malloc and a block of 512 of MindSpore's
#               pool for each operand that is not a tensor (the dtype of a cast; axis and keep_dims of a sum; the two flags
#               of a matrix product). Operators of tensors alone keep nothing. gc.collect() gives
#               none of it back.
# Matters:      a training step casts and sums many times, on the CPU for every micro-batch; a million calls are 0.7 GB and
#               more, and nothing that MindSpore prints accounts for them.
# Seen:         add: 0 bytes a call; cast: 670 to 990; matmul: 1020 to 1420 (a part of it is how the heap grows)
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - <<'PYTHON'
import gc

import mindspore as ms
import numpy as np
from mindspore import ops


def anonymous() -> int:
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


x = ms.Tensor(np.ones((8, 16), np.float32))
square = ms.Tensor(np.ones((16, 16), np.float32))
cases = {
    "add": lambda: x + x,
    "cast": lambda: ops.cast(x, ms.float16),
    "matmul": lambda: ops.MatMul(transpose_b=True)(x, square),
}
kept = {}
for name, call in cases.items():
    for _ in range(300):
        call()
    ms.runtime.synchronize()
    gc.collect()
    before = anonymous()
    for _ in range(2000):
        call()
    ms.runtime.synchronize()
    gc.collect()
    kept[name] = (anonymous() - before) / 2000
    print(f"{name}: {kept[name]:.0f} bytes a call", flush=True)
same = kept["add"] < 50 and kept["cast"] > 500 and kept["matmul"] > 500
raise SystemExit(0 if same else 1)
PYTHON
