#!/bin/bash
# Importing mindspore sets OMP_NUM_THREADS=1 for every process started afterwards, and os.environ does not show it.
#
# Version:      MindSpore 2.9.0 (CPU), numpy 1.26.4, CPython 3.11.
# Likely guess: an import leaves the environment alone; where it did not, os.environ and the child would agree.
# Behaviour:    where the variable is not set, the import sets it to 1 in the C library's environment. os.environ still
#               has no such key, a child that subprocess starts without `env` inherits the 1, and one that gets
#               `env=os.environ` does not. Ranks of msrun, which imports mindspore, are such children.
# Matters:      whatever a MindSpore program starts and counts its threads by this variable (PyTorch, a data worker, a
#               benchmark's other contestant) runs on one core, and a look at os.environ finds no reason.
# Seen:         os.environ: None; child: 1; child with env=os.environ: None
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
env -u OMP_NUM_THREADS "$scratch/venv/bin/python" - <<'PYTHON'
import os
import subprocess
import sys

import mindspore  # noqa: F401

ASK = [sys.executable, "-c", "import os; print(os.environ.get('OMP_NUM_THREADS'))"]
here = str(os.environ.get("OMP_NUM_THREADS"))
child, given = (
    subprocess.run(ASK, env=env, capture_output=True, text=True, check=True).stdout.strip()
    for env in (None, dict(os.environ))
)
print(f"os.environ: {here}; child: {child}; child with env=os.environ: {given}")
sys.exit(0 if (here, child, given) == ("None", "1", "None") else 1)
PYTHON
