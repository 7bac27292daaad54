#!/bin/bash
# MindSpore's astype copies a reshaped tensor, although it has the dtype that is asked for.
#
# Version:      mindspore 2.9.0, CPython 3.11, x86-64, CPU, PyNative mode.
# Likely guess: x.astype(x.dtype) returns the memory of x, as it does for the result of an operator, and as ops.cast does
#               for every tensor; a reshape that needs no copy changes nothing about that.
# Behaviour:    of a contiguous reshape, of a view or of a slice, astype and to make a copy. is_contiguous is True of all.
#               ops.cast shares the memory of all of them.
# Matters:      layers reshape their products to [batch, sequence, width]; where a program then asks for float32 before the
#               loss, as mixed precision does, logits that are float32 already stand in memory twice.
# Seen:         result: astype shares, cast shares; reshape, view, slice: astype copies, cast shares
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - <<'PYTHON'
import mindspore as ms
import numpy as np
from mindspore import ops

x = ms.Tensor(np.ones((64, 64), np.float32)) * 2.0
cases = {"result": x, "reshape": x.reshape(-1, 32), "view": x.view(-1, 32), "slice": x[:32]}
seen = {}
for name, y in cases.items():
    assert y.is_contiguous() and y.dtype == ms.float32
    shares = {
        "astype": y.astype(ms.float32).data_ptr() == y.data_ptr(),
        "cast": ops.cast(y, ms.float32).data_ptr() == y.data_ptr(),
    }
    seen[name] = shares
    print(f"{name}: " + ", ".join(f"{how} {'shares' if same else 'copies'}" for how, same in shares.items()))
expected = {name: {"astype": name == "result", "cast": True} for name in cases}
raise SystemExit(0 if seen == expected else 1)
PYTHON
