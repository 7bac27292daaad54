#!/bin/bash
# MindSpore's Momentum optimizer ignores use_nesterov on the CPU.
#
# Version:      mindspore 2.9.0, CPython 3.11, x86-64, CPU, PyNative and graph mode.
# Likely guess: nn.Momentum(..., use_nesterov=True) makes the step of its documentation, p - (grad lr + v momentum lr); CPU is
#               among the platforms named.
# Behaviour:    it makes the step without Nesterov, p - lr v, bit for bit; ops.ApplyMomentum(use_nesterov=True), which it
#               calls, does the same. Nothing is reported. nn.SGD(nesterov=True) honours its flag.
# Matters:      a small run on the CPU that is to check a recipe, or to be compared with PyTorch, is trained by another
#               optimizer from the first step on.
# Seen:         after three gradients of 1, lr 0.1, momentum 0.9: Momentum -0.561 with and -0.561 without Nesterov; by the
#               formula -0.8049; nn.SGD with Nesterov -0.8049
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
from mindspore import nn

ms.set_context(mode=ms.PYNATIVE_MODE)
RATE, MOMENTUM = 0.1, 0.9


def trained(make) -> float:
    parameter = ms.Parameter(ms.Tensor(np.zeros(4, np.float32)), name="weight")
    optimizer = make([parameter])
    for _ in range(3):
        optimizer((ms.Tensor(np.ones(4, np.float32)),))
    return float(parameter.asnumpy()[0])


plain, nesterov = (trained(lambda p, flag=flag: nn.Momentum(p, RATE, MOMENTUM, use_nesterov=flag)) for flag in (False, True))
other = trained(lambda p: nn.SGD(p, RATE, momentum=MOMENTUM, nesterov=True))
weight = velocity = 0.0
for _ in range(3):
    velocity = MOMENTUM * velocity + 1
    weight -= RATE + velocity * MOMENTUM * RATE
print(f"Momentum {nesterov:.4g} with and {plain:.4g} without Nesterov; by the formula {weight:.4f}; nn.SGD {other:.4f}")
same = nesterov == plain and abs(nesterov - weight) > 0.2 and abs(other - weight) < 1e-5
raise SystemExit(0 if same else 1)
PYTHON
