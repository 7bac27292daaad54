#!/bin/bash
# MindSpore's load_checkpoint passes over filter_prefix and specify_prefix when the file is a safetensors file.
#
# Version:      MindSpore 2.9.0 (CPU), numpy 1.26.4, CPython 3.11.
# Likely guess: the same call with format="safetensors" leaves out, or takes alone, the parameters of the prefix; what does not
#               work for a format is refused or warned of, as the deprecation of both arguments is for .ckpt files.
# Behaviour:    for .ckpt both hold, and win over choice_func, as documented. For safetensors neither is looked at, not even the
#               warning of their deprecation appears, and choice_func, which they should override, is what counts.
# Matters:      a script that was right with .ckpt loads Adam's moments beside the weights after the move to safetensors: three
#               times the memory; with net= given, a head that was to be left out is loaded over the new one. Give choice_func.
# Seen:         ckpt: filter_prefix ['head', 'layer'] specify_prefix ['layer'];
#               safetensors: filter_prefix ['adam_m.layer', 'head', 'layer'] specify_prefix ['adam_m.layer', 'head', 'layer'];
#               head after loading into a net with filter_prefix "head": ckpt 0, safetensors 1
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "mindspore==2.9.0" "numpy==1.26.4"
cd "$scratch"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import mindspore as ms
import numpy as np


class Net(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.layer = ms.Parameter(ms.Tensor(np.zeros(2, np.float32)), name="layer")
        self.head = ms.Parameter(ms.Tensor(np.zeros(2, np.float32)), name="head")


rows = [{"name": name, "data": ms.Tensor(np.ones(2, np.float32))} for name in ("layer", "head", "adam_m.layer")]
seen = {}
for form in ("ckpt", "safetensors"):
    file = f"saved.{form}"
    ms.save_checkpoint(rows, file, format=form)
    left = sorted(ms.load_checkpoint(file, format=form, filter_prefix="adam_m"))
    alone = sorted(ms.load_checkpoint(file, format=form, specify_prefix="layer"))
    net = Net()
    ms.load_checkpoint(file, net, format=form, filter_prefix=["adam_m", "head"])
    seen[form] = (left, alone, int(net.head.asnumpy()[0]))
    print(f"{form}: filter_prefix {left} specify_prefix {alone}; head {seen[form][2]}")
every = ["adam_m.layer", "head", "layer"]
same = seen == {"ckpt": (["head", "layer"], ["layer"], 0), "safetensors": (every, every, 1)}
raise SystemExit(0 if same else 1)
PYTHON
