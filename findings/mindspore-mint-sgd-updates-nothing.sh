#!/bin/bash
# MindSpore's mint.optim.SGD, its counterpart of torch.optim.SGD, leaves the parameters as they are on the CPU.
#
# Version:      mindspore 2.9.0, numpy 1.26.4, CPython 3.11, x86-64, CPU, PyNative mode.
# Likely guess: the step is p - lr g, as mint.optim.Adam's beside it is Adam's; what has no kernel on the CPU is
#               refused, as mint.optim.AdamW is ("kernel AdamW unregistered").
# Behaviour:    nothing changes, with or without momentum, Nesterov or weight decay, and nothing is reported. The step
#               ends in Tensor.add_, which on the CPU returns the sum and does not write it.
#               mindspore.experimental.optim.SGD and nn.SGD make the step.
# Matters:      a script moved from torch to mint runs, prints a loss that wanders with the batches, and saves the
#               weights that it began with. Compare one weight before and after the first step.
# Seen:         1 2 after three gradients of 1, lr 0.1: mint SGD 1 2, with momentum 1 2, with Nesterov 1 2, with weight
#               decay 1 2; mint Adam 0.7 1.7; experimental SGD 0.7 1.7; nn.SGD 0.7 1.7
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
from mindspore import mint, nn
from mindspore.experimental import optim

ms.set_device("CPU")
ms.set_context(mode=ms.PYNATIVE_MODE)


def after_three_steps(make):
    parameter = ms.Parameter(ms.Tensor(np.array([1, 2], np.float32)), name="p")
    optimizer = make([parameter])
    for _ in range(3):
        optimizer((ms.Tensor(np.ones(2, np.float32)),))
    return parameter.asnumpy()


makers = {
    "mint SGD": lambda p: mint.optim.SGD(p, lr=0.1),
    "mint SGD, momentum": lambda p: mint.optim.SGD(p, lr=0.1, momentum=0.9),
    "mint SGD, Nesterov": lambda p: mint.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "mint SGD, weight decay": lambda p: mint.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "mint Adam": lambda p: mint.optim.Adam(p, lr=0.1),
    "experimental SGD": lambda p: optim.SGD(p, lr=0.1),
    "nn.SGD": lambda p: nn.SGD(p, learning_rate=0.1),
}
seen = {name: after_three_steps(make) for name, make in makers.items()}
for name, values in seen.items():
    print(f"{name}:", *(f"{value:.3g}" for value in values))
unchanged = all((values == [1, 2]).all() for name, values in seen.items() if name.startswith("mint SGD"))
others = [np.allclose(seen[name], [0.7, 1.7], atol=1e-4) for name in ("mint Adam", "experimental SGD", "nn.SGD")]
raise SystemExit(0 if unchanged and all(others) else 1)
PYTHON
