#!/bin/bash
# MindSpore's softmax in float16 on the CPU is zero in every class where torch's is right, as soon as the exponentials
# add up to more than 65504: a vocabulary of 131072 at the beginning of training.
#
# Version:      mindspore 2.9.0, torch 2.13.0, numpy 1.26.4, CPython 3.11, x86-64, CPU, PyNative mode.
# Likely guess: softmax subtracts the maximum, so nothing can overflow; the sum is kept in float32, as log_softmax's is
#               beside it.
# Behaviour:    exp(x - max) is 1 at most, but their sum is float16 and becomes inf: each class gets 0, not NaN, and the
#               row adds up to 0. log_softmax is right. torch has it the other way round: softmax is right, and
#               log_softmax of the same row is -inf throughout.
# Matters:      logits of an untrained or strongly tempered model are nearly equal. With the probabilities 0 sampling
#               draws nothing sensible, and gradients that go through softmax (distillation, routers, KL) vanish instead
#               of failing: isfinite() is true. Cast to float32 before; up to 65,504 classes all is well.
# Seen:         equal logits, 60,000 and 131,072 classes: MindSpore softmax 1.67e-05, 0; log_softmax -11, -11.8; torch
#               softmax 1.67e-05, 7.63e-06; log_softmax -11, -inf; sums of normal logits of deviation 0.02: MindSpore
#               1.00, 0
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "torch==2.13.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - <<'PYTHON'
import mindspore as ms
import numpy as np
import torch

ms.set_device("CPU")
ms.set_context(mode=ms.PYNATIVE_MODE)
drawn = np.random.default_rng(0).normal(0, 0.02, (1, 131072))
sizes = (60000, 131072)
seen = {}
for size in sizes:
    equal = np.zeros((1, size), np.float16)
    of_mindspore, of_torch = ms.Tensor(equal), torch.from_numpy(equal)
    found = {
        "MindSpore softmax": ms.ops.softmax(of_mindspore, -1).asnumpy(),
        "MindSpore log_softmax": ms.ops.log_softmax(of_mindspore, -1).asnumpy(),
        "torch softmax": of_torch.softmax(-1).numpy(),
        "torch log_softmax": of_torch.log_softmax(-1).numpy(),
    }
    for name, values in found.items():
        assert (values == values[0, 0]).all()
        seen[name, size] = float(values[0, 0])
    probabilities = ms.ops.softmax(ms.Tensor(drawn[:, :size].astype(np.float16)), -1).asnumpy()
    seen["sum", size] = float(probabilities.astype(np.float64).sum())
for name in ("MindSpore softmax", "MindSpore log_softmax", "torch softmax", "torch log_softmax", "sum"):
    print(f"{name}:", *(f"{seen[name, size]:.3g}" for size in sizes))
small = seen["MindSpore softmax", 60000] > 1e-5 and abs(seen["sum", 60000] - 1) < 0.01
zero = seen["MindSpore softmax", 131072] == 0 and seen["sum", 131072] == 0
right = abs(seen["MindSpore log_softmax", 131072] + 11.78) < 0.02 and seen["torch softmax", 131072] > 7e-6
raise SystemExit(0 if small and zero and right and seen["torch log_softmax", 131072] == -np.inf else 1)
PYTHON
