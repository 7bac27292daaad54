#!/bin/bash
# MindFormers' learning rate schedules do not end with their decay: the polynomial one becomes negative after decay_steps, the
# warmup-stable-decay one after total_steps, and the cosine one jumps.
#
# Version:      mindformers 1.9.0, mindspore 2.9.0, CPython 3.11.
# Likely guess: decay_steps is the length of the decay, as --lr-decay-iters is in Megatron: after it the rate is lr_end.
#               PolynomialWithWarmUpLR's documentation demands a value smaller than total_steps - warmup_steps.
# Behaviour:    PolynomialWithWarmUpLR continues its straight line until total_steps, through lr_end and zero: gradient ascent.
#               WarmUpStableDecayLR does so from total_steps on. In CosineWithWarmUpLR decay_steps does not change the
#               curve, whose length is total_steps - warmup_steps, but cuts it off: at that step the rate falls to lr_end.
# Matters:      the loss rises after decay_steps, and nothing tells why; a run continued past total_steps unlearns; a cosine
#               that should have been shortened is not.
# Seen:         rate 1, lr_end 0.1, 100 steps, 10 of them warm-up: polynomial with decay_steps 40 at steps 30, 50, 60, 100:
#               0.55 0.1 -0.125 -1.025; warmup-stable-decay from 80 on at 90, 100, 110, 130: 0.55 0.1 -0.35 -1.25;
#               cosine with decay_steps 50 at 49, 50: 0.6436 0.1
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindformers==1.9.0" "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import mindspore as ms
from mindformers.core import lr


def rates(schedule, steps) -> list[float]:
    return [round(float(schedule(ms.Tensor(step, ms.int32)).asnumpy()), 4) for step in steps]


shape = {"learning_rate": 1.0, "lr_end": 0.1, "warmup_steps": 10, "total_steps": 100}
polynomial = rates(lr.PolynomialWithWarmUpLR(**shape, decay_steps=40), (30, 50, 60, 100))
stable = rates(lr.WarmUpStableDecayLR(**shape, decay_start_steps=80), (90, 100, 110, 130))
cosine = rates(lr.CosineWithWarmUpLR(**shape, decay_steps=50), (49, 50))
for name, found in (("polynomial", polynomial), ("warmup-stable-decay", stable), ("cosine", cosine)):
    print(f"{name}:", *found)
same = polynomial == [0.55, 0.1, -0.125, -1.025] and stable == [0.55, 0.1, -0.35, -1.25] and cosine == [0.6436, 0.1]
raise SystemExit(0 if same else 1)
PYTHON
