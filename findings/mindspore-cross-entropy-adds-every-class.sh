#!/bin/bash
# MindSpore's cross_entropy adds up the log-probabilities of all classes, for a label smoothing of 0 too: a class of logit -inf
# makes the loss NaN, and so do some thousands of classes in float16.
#
# Version:      mindspore 2.9.0, CPython 3.11, x86-64, CPU, PyNative mode. ops.cross_entropy, nn.CrossEntropyLoss and
#               ops.nll_loss; the sum stands in mindspore/ops/function/nn_func.py (_nll_loss, smooth_loss), for all devices.
# Likely guess: without label_smoothing the loss is the negative log-probability of the target, as in torch: the classes
#               that a mask set to -inf (padded vocabulary, forbidden tokens) do not matter, and float16 is as good as its
#               log_softmax.
# Behaviour:    loss = (1 - smoothing) * loss + smoothing / classes * sum over ALL classes; 0 * inf is NaN. In float16 the sum,
#               for reduction "mean" over all rows at once, passes 65504 soon: 4,000 classes in two rows, 100 in 143 rows. It
#               is a pass over all logits as well.
# Matters:      the gradient is right, since its factor is 0, so the model trains while the loss shows NaN, and everything that
#               goes by the loss stops: early stop, loss scaling, the search for the best checkpoint.
# Seen:         target 1, logits 1 2 -inf, float32: loss nan, gradient 0.269 -0.269 0, log-probability -0.313; float16, equal
#               logits, 2 rows: 2000 classes 7.602, 8000 classes nan; 100 classes: 100 rows 4.605, 200 rows nan
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
from mindspore import Tensor, nn, ops

target = Tensor([1], ms.int32)
logits = Tensor([[1.0, 2.0, -np.inf]])
loss, gradient = ms.value_and_grad(lambda z: ops.cross_entropy(z, target))(logits)
loss, gradient = float(loss), gradient.asnumpy()[0]
right = float(ops.log_softmax(logits)[0, 1])
as_cell = float(nn.CrossEntropyLoss()(logits, target))
print(f"float32: loss {loss} and {as_cell}, gradient {gradient.round(3)}, log-probability {right:.3f}")
half = {}
for rows, classes in ((2, 2000), (2, 8000), (100, 100), (200, 100)):
    targets = Tensor(np.zeros(rows, np.int32))
    half[rows, classes] = float(ops.cross_entropy(Tensor(np.zeros((rows, classes)), ms.float16), targets))
    print(f"float16: {rows} rows of {classes} classes: loss {half[rows, classes]:.3f}, ln {classes} is {np.log(classes):.3f}")
same = np.isnan([loss, as_cell, half[2, 8000], half[200, 100]]).all() and np.isfinite([right, *gradient]).all()
same = same and abs(half[2, 2000] - np.log(2000)) < 0.01 and abs(half[100, 100] - np.log(100)) < 0.01
raise SystemExit(0 if same else 1)
PYTHON
GLOG_v=3 "$scratch/venv/bin/python" ask.py
