#!/bin/bash
# Inside one torch.autocast block an optimizer's step has no effect on what the model computes.
#
# Version:      torch 2.13.0, CPython 3.11, CPU (device "cpu", bfloat16).
# Likely guess: a training loop, or a copy of averaged weights with an evaluation before and after it, may stand as a whole
#               inside "with torch.autocast": at worst the backward pass, too, runs under it, which the documentation
#               calls unnecessary.
# Behaviour:    the bfloat16 copy of each float32 weight that requires a gradient is made once and kept until the outermost
#               block ends. optimizer.step() and weight.copy_() change the weight and not the copy: every later forward
#               pass of the block uses the first weights. There is no warning.
# Matters:      the loss stays where it was while the weights run away, since each gradient is that of the first
#               weights; an evaluation of averaged weights repeats the figures of the weights before.
# Seen:         loss of five steps in one block: 2.0000 2.0000 2.0000 2.0000 2.0000; in a block each: 2.0000 1.2825 0.8208
#               0.5237 0.3365
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "numpy==1.26.4"
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import contextlib

import torch


def losses(outer, inner) -> list[float]:
    layer = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 0.25)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.025)
    found = []
    with outer():
        for _ in range(5):
            with inner():
                loss = layer(torch.ones(1, 8)).float().square().sum() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


one, each = losses(autocast, contextlib.nullcontext), losses(contextlib.nullcontext, autocast)
print("loss of five steps in one block:", *(f"{loss:.4f}" for loss in one))
print("in a block each:", *(f"{loss:.4f}" for loss in each))
raise SystemExit(0 if len(set(one)) == 1 and each[-1] < each[0] / 4 else 1)
PYTHON
