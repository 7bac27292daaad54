#!/bin/bash
# torch's Optimizer.load_state_dict rounds whatever an optimizer keeps for a bfloat16 parameter to bfloat16: float32
# masters and moments, and integer counters too.
#
# Version:      torch 2.13.0, CPython 3.11, CPU.
# Likely guess: load_state_dict(state_dict()) restores the state; dtypes are part of it. Its documentation speaks of
#               parameter names and learning rates only.
# Behaviour:    every tensor of the state, of whatever dtype, is cast to the dtype of its parameter if that is a floating
#               one. The one exception goes by name: "step". (A guess that is meant so: pytorch/pytorch#3658; the rule is in
#               _process_value_according_to_param_policy.)
# Matters:      an optimizer of one's own that keeps float32 masters beside bfloat16 weights loses them at every resume,
#               and adds to bfloat16 masters from then on, in which small updates vanish; a counter of tokens is off by
#               hundreds. Nothing is reported, and the loss barely moves. Adafactor, Muon or 8-bit optimizers written as
#               subclasses must override it.
# Seen:         master torch.float32 1.00100005 -> torch.bfloat16 1; tokens torch.int64 1000001 -> torch.bfloat16 999424
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "numpy==1.26.4"
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import io

import torch


class Masters(torch.optim.SGD):
    """SGD on float32 masters of its parameters, counting tokens."""

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(master=parameter.float(), tokens=torch.tensor(0))
            state["master"] -= self.param_groups[0]["lr"] * parameter.grad.float()
            state["tokens"] += 1000001
            parameter.copy_(state["master"])


def fresh():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    return parameter, Masters([parameter], lr=1e-3)


parameter, optimizer = fresh()
parameter.grad = -torch.ones_like(parameter)
optimizer.step()
file = io.BytesIO()
torch.save(optimizer.state_dict(), file)
file.seek(0)
other, resumed = fresh()
resumed.load_state_dict(torch.load(file))
before, after = optimizer.state[parameter], resumed.state[other]
for name, index in (("master", (0,)), ("tokens", ())):
    print(f"{name} {before[name].dtype} {before[name][index].item():.9g} -> ", end="")
    print(f"{after[name].dtype} {after[name][index].item():.9g}")
same = all(value.dtype == torch.bfloat16 for value in after.values())
same = same and after["master"][0] == 1 and after["tokens"] == 999424
raise SystemExit(0 if same else 1)
PYTHON
