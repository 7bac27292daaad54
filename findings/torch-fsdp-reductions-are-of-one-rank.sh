#!/bin/bash
# torch's item(), float() and bool() of a sum, a norm or a maximum of FSDP2's parameters give each rank the value of its own
# shard.
#
# Version:      torch 2.13.0, CPython 3.11, CPU, gloo, two processes.
# Likely guess: a DTensor is the whole tensor: weight.norm().item() is its norm on every rank, or item() refuses, as numpy()
#               and tolist() of a DTensor do. clip_grad_norm_'s result, and weight.std().item(), are of the whole tensor.
# Behaviour:    sum, mean, norm, amax and all end in a pending reduction (placement Partial). item() does not carry it out: it gives
#               what the shard alone has, without a warning. full_tensor() carries it out.
# Matters:      logged weight norms are too small and differ by rank; "if not weight.isfinite().all()" is true on the one rank
#               that holds the NaN: that rank skips its step or leaves the loop, the others go on.
# Seen:         weights 0 to 15, sum 120, maximum 15, norm 35.21: rank 0 28, 7, 11.83; rank 1 92, 15, 33.17; mean 7.5: 3.5 and 11.5;
#               full_tensor() 120 on both; NaN in the last row, all finite: rank 0 True, rank 1 False
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "numpy==1.26.4"
cat > "$scratch/ranks.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.fsdp import fully_shard


def rank_values(rank: int, folder: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(16.0).reshape(4, 4))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    weight = model.weight.detach()
    values = [weight.sum().item(), weight.amax().item(), round(weight.norm().item(), 2), float(weight.mean())]
    values.append(weight.sum().full_tensor().item())
    if rank == 1:
        weight.to_local()[-1, -1] = float("nan")
    values.append(bool(weight.isfinite().all()))
    results.put((rank, values))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(rank_values, args=(sys.argv[1], results), nprocs=2)
    seen = sorted(results.get() for _ in range(2))
    for rank, values in seen:
        print(f"rank {rank}: sum {values[0]:g}, maximum {values[1]:g}, norm {values[2]:g}, mean {values[3]:g};"
              f" full_tensor() of the sum {values[4]:g}; all finite {values[5]}")  # fmt: skip
    sys.exit(0 if seen == [(0, [28, 7, 11.83, 3.5, 120, True]), (1, [92, 15, 33.17, 11.5, 120, False])] else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/ranks.py" "$scratch" 2> /dev/null
