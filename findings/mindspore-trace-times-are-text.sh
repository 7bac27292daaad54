#!/bin/bash
# MindSpore's profiler writes the times of its trace as text, not as numbers.
#
# Version:      mindspore 2.9.0, CPython 3.11, x86-64, CPU device, PyNative mode.
# Likely guess: trace_view.json is in the Trace Event Format, as torch.profiler's and TensorFlow's traces are, so that
#               sum(event["dur"] for event in events) is the time of all operators in microseconds.
# Behaviour:    "ts" and "dur" of every complete event are JSON strings ("1795972803667377.342", "334807.000"), which the
#               format defines as numbers; sum() raises TypeError, and sorting by them is alphabetical. The file is a bare
#               list, and on a CPU, too, it lies in a folder NAME_ascend_ms/ASCEND_PROFILER_OUTPUT.
# Matters:      a script that adds up or compares the traces of two frameworks stops, or orders "9.5" after "10.0".
# Seen:         list of 9, 4 complete events, types of ts and dur: str, str
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
GLOG_v=3 "$scratch/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

x = ms.Tensor(np.random.rand(64, 64).astype(np.float32))
ready = tensorboard_trace_handler("out")
with profile(activities=[ProfilerActivity.CPU], on_trace_ready=ready, start_profile=False) as recording:
    for _ in range(2):
        ops.softmax(ops.matmul(x, x)).asnumpy()
        recording.step()
(path,) = Path("out").rglob("trace_view.json")
trace = json.loads(path.read_text())
events = [event for event in trace if event["ph"] == "X"]
types = {key: {type(event[key]).__name__ for event in events} for key in ("ts", "dur")}
print(f"{type(trace).__name__} of {len(trace)}, {len(events)} complete events, {types}; {path.parent}")
same = isinstance(trace, list) and types == {"ts": {"str"}, "dur": {"str"}} and path.parent.name == "ASCEND_PROFILER_OUTPUT"
raise SystemExit(0 if same else 1)
PYTHON
