#!/bin/bash
# MindFormers' PmaAdamW, AdamW with averaged weights, makes every weight of the model 11 % smaller at each fusion with its
# default settings.
#
# Version:      mindformers 1.9.0 (its pma_adamw.py is the same in 2.1.0), mindspore 2.9.0 (CPU, PyNative), CPython 3.11.
# Likely guess: fused_algo "ema", the default, puts an exponential average of the weights of the last steps in their place:
#               weights that do not change stay what they are, as with "sma".
# Behaviour:    the average begins at zero, not at the weights, anew after every fusion, and is not divided by
#               1 - (1 - ema_alpha)^fused_num. With the defaults, ema_alpha 0.2 and fused_num 10, what is put in place is 0.893
#               of the weights, norms and biases included.
# Matters:      the loss jumps every fused_num x interleave_step steps (10,000 by default) and recovers between them, so it looks
#               like the data or the rate; a run that ends at a fusion delivers the shrunk weights. "sma" is right.
# Seen:         weight 1, gradients 0, after 0 to 3 fusions: ema 1 0.8926 0.7968 0.7112; sma 1 1 1 1
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindformers==1.9.0" "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON' | grep -v " - mindformers/"
import mindspore as ms
import numpy as np
from mindformers.core.optim.pma_adamw import PmaAdamW

ms.set_device("CPU")


def weights(algorithm: str) -> list[float]:
    """The weight before the first and after each of three fusions; interleave_step 1 only makes the run short."""
    weight = ms.Parameter(ms.Tensor(np.ones(2, np.float32)), name="weight")
    optimizer = PmaAdamW([weight], learning_rate=1e-9, interleave_step=1, fused_algo=algorithm)
    found = [1.0]
    for _ in range(3):
        for _ in range(10):
            optimizer((ms.Tensor(np.zeros(2, np.float32)),))
        found.append(round(float(weight.asnumpy()[0]), 4))
    return found


seen = {algorithm: weights(algorithm) for algorithm in ("ema", "sma")}
for algorithm, found in seen.items():
    print(f"{algorithm}:", *(f"{value:g}" for value in found))
raise SystemExit(0 if seen == {"ema": [1.0, 0.8926, 0.7968, 0.7112], "sma": [1.0] * 4} else 1)
PYTHON
