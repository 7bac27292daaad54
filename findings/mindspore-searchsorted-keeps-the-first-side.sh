#!/bin/bash
# MindSpore's searchsorted on the CPU takes for every later call of a process the side that its first call had:
# right=True after a call without it finds the left place, and the other way round.
#
# Version:      mindspore 2.9.0, numpy 1.26.4, CPython 3.11, x86-64, CPU, PyNative mode. ops.searchsorted and
#               mint.searchsorted, by right= and by side=; once for each dtype of the values.
# Likely guess: `right` belongs to a call, as in torch and numpy; two equal calls of a program give the same.
# Behaviour:    the kernel is kept after its first use for a dtype, and the side with it. The argument of later calls is
#               passed over without a word. A test of each side in a process of its own, or of one side only, passes.
# Matters:      what looks up both borders of an interval (documents of a packed row, shards, ranks of a score, weights
#               of a mix) gets the same border twice, an empty interval, from the second call on; which of the two is
#               wrong depends on what else the process looked up before. numpy.searchsorted of asnumpy() has both sides.
# Seen:         of 2 in 1 2 2 3: right False, True, False: 1 1 1; True, False, True: 3 3 3; float32 False, then int32
#               True, then float32 True: 1 3 1
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
cat > look_up.py <<'PYTHON'
import sys

import mindspore as ms
import numpy as np

ms.set_device("CPU")
ms.set_context(mode=ms.PYNATIVE_MODE)
for call in sys.argv[1:]:
    module, dtype, right = call.split(":")
    lib = {"ops": ms.ops, "mint": ms.mint}[module]
    sorted_values = ms.Tensor(np.array([1, 2, 2, 3], dtype))
    place = lib.searchsorted(sorted_values, ms.Tensor(np.array([2], dtype)), right=right == "True")
    print(place.asnumpy()[0], end=" ")
print()
PYTHON
look_up() { GLOG_v=3 "$scratch/venv/bin/python" look_up.py "$@" | tail -1; }
left_first=$(look_up ops:float32:False ops:float32:True ops:float32:False)
right_first=$(look_up mint:float32:True mint:float32:False mint:float32:True)
by_dtype=$(look_up mint:float32:False mint:int32:True mint:float32:True)
alone=$(look_up mint:float32:True)
echo "False, True, False: $left_first; True, False, True: $right_first"
echo "float32 False, int32 True, float32 True: $by_dtype; True alone: $alone"
[[ $left_first == "1 1 1 " && $right_first == "3 3 3 " && $by_dtype == "1 3 1 " && $alone == "3 " ]]
