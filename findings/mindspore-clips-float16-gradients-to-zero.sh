#!/bin/bash
# MindSpore's clip_by_global_norm and clip_by_norm square float16 gradients in float16: an element above 255 makes all of
# them zero, and many small ones are not clipped at all.
#
# Version:      mindspore 2.9.0, CPython 3.11, x86-64, CPU, PyNative mode.
# Likely guess: gradients of norm 500 are scaled down to the norm that is asked for; the norm is added up in float32, as
#               torch's clip_grad_norm_ does with float16 gradients, and as clip_by_global_norm's cast of the sum to float32
#               suggests.
# Behaviour:    the squares, and their sum, are float16. 256 squared is infinite, and every gradient of the step, of every
#               parameter, is divided by infinity: 0, not NaN. Squares of elements below 1.7e-4 are zero, so that the norm
#               of a large layer's usual gradient comes out as 0, and nothing is clipped.
# Matters:      this is the step that clipping is for. With zeros in place of inf no check for overflow sees it, and a loss
#               scale is never lowered; the moments of Adam decay meanwhile. Cast gradients to float32 before.
# Seen:         clip_by_global_norm to 1 of [300, 400] and [1]: [0, 0] and [0]; clip_by_norm of [300, 400]: [0, 0]; float32:
#               [0.6, 0.8] and [0.002]; 4,000,000 elements of 0.0001, clipped to 0.1: norm 0.2 as before
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
cat > ask.py <<'PYTHON'
import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

found = {}
for dtype in (ms.float16, ms.float32):
    clipped = ops.clip_by_global_norm([Tensor([300.0, 400.0], dtype), Tensor([1.0], dtype)], 1.0)
    alone = ops.clip_by_norm(Tensor([300.0, 400.0], dtype), 1.0)
    small = ops.clip_by_global_norm([Tensor(np.full(4_000_000, 1e-4), dtype)], 0.1)[0].asnumpy()
    norm = float(np.sqrt((small.astype(np.float64) ** 2).sum()))
    found[dtype] = [*clipped[0].asnumpy().tolist(), *clipped[1].asnumpy().tolist(), *alone.asnumpy().tolist(), norm]
    print(dtype, "global:", clipped[0].asnumpy(), clipped[1].asnumpy(), "one:", alone.asnumpy(), f"small: norm {norm:.4f}")
half, single = found[ms.float16], found[ms.float32]
same = half[:5] == [0] * 5 and abs(half[5] - 0.2) < 0.001
same = same and np.allclose(single, [0.6, 0.8, 0.002, 0.6, 0.8, 0.1], rtol=1e-4)
raise SystemExit(0 if same else 1)
PYTHON
GLOG_v=3 "$scratch/venv/bin/python" ask.py
