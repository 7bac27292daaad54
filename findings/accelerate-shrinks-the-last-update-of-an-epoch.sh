#!/bin/bash
# accelerate divides by the full number of accumulated batches also where an epoch's last update has fewer: that update's
# gradient is too small, without a word.
#
# Version:      accelerate 1.15.0, torch 2.13.0, CPython 3.11, CPU, one process. gradient_accumulation_steps and
#               GradientAccumulationPlugin alike.
# Likely guess: accumulate() knows where the loader ends, since it steps there (sync_with_dataloader=True, the default), so
#               the batches that are left over are averaged like every other group.
# Behaviour:    backward() divides each loss by gradient_accumulation_steps, always. Of 17 batches in groups of 16 the last one
#               is an update of its own with 1/16 of its gradient.
# Matters:      a small set (some hundred rows, 16 or 32 batches an update) learns hardly anything from an epoch's last batches,
#               and runs that differ only in how the rows are divided into batches come out different. Drop the last
#               batches, or scale their loss.
# Seen:         every batch with gradient 1, 6 batches, 4 an update: gradients of the updates 1.0, 0.5; 5 batches: 1.0, 0.25
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "accelerate==1.15.0" "torch==2.13.0" "numpy==1.26.4"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin


def gradients(batches: int, **options) -> list[float]:
    """Of each update of an epoch in which every batch has the gradient 1."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, **options)
    model = torch.nn.Linear(1, 1, bias=False)
    loader = torch.utils.data.DataLoader(torch.ones(batches, 1), batch_size=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).mean())
            if accelerator.sync_gradients:
                seen.append(model.weight.grad.item())
            optimizer.step()
            optimizer.zero_grad()
    return seen


holds = True
for name, options in (
    ("gradient_accumulation_steps=4", {"gradient_accumulation_steps": 4}),
    ("GradientAccumulationPlugin", {"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=4)}),
):
    for batches, expected in ((6, [1.0, 0.5]), (5, [1.0, 0.25])):
        found = gradients(batches, **options)
        print(f"{name}, {batches} batches: gradients of the updates {found}")
        holds = holds and found == expected
raise SystemExit(0 if holds else 1)
PYTHON
