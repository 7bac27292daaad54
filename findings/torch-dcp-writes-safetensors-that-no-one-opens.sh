#!/bin/bash
# torch's distributed checkpoint in Hugging Face's format writes a file that nothing can open, and reports success, as soon as
# the state holds anything but tensors, a step number for instance.
#
# Version:      torch 2.13.0, safetensors 0.8.0, CPython 3.11, CPU, one process. HuggingFaceStorageWriter and -Reader of
#               torch.distributed.checkpoint.
# Likely guess: a value that safetensors cannot hold is refused when saving, as a tied or a not contiguous tensor is; or it
#               is kept, as dcp.save keeps it in its own format.
# Behaviour:    the number is pickled, and its bytes are put into the .safetensors file before the header. dcp.save
#               returns as usual, the index lists "step" among the weights, and the size looks right. Its own reader and
#               safetensors both fail with "header too large": the weights cannot be had any more either.
# Matters:      {"model": ..., "step": 5}, or an optimizer's param_groups, is what every training loop hands to dcp.save; the
#               loss of the checkpoint is noticed when it is needed. Save a tensor (torch.tensor(5)), or the model alone.
# Seen:         with "step": 5: saved, index ['step', 'w'], own reader CheckpointException, safetensors SafetensorError; with
#               torch.tensor(5): saved, index ['step', 'w'], own reader ok, safetensors ok
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "safetensors==0.8.0" "numpy==1.26.4"
cd "$scratch"
cat > ask.py <<'PYTHON'
import json
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

warnings.simplefilter("ignore")


def opened(read):
    try:
        return "ok" if torch.equal(read(), torch.arange(4.0)) else "other values"
    except BaseException as error:  # CheckpointException is none of Exception's children
        return type(error).__name__


def by_torch(folder):
    state = {"w": torch.zeros(4)}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(path=folder), no_dist=True)
    return state["w"]


def by_safetensors(folder):
    with safe_open(next(Path(folder).glob("*.safetensors")), "pt") as file:
        return file.get_tensor("w")


found = {}
for step in (5, torch.tensor(5)):
    folder = f"saved-{type(step).__name__}"
    state = {"w": torch.arange(4.0), "step": step}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(path=folder), no_dist=True)
    index = json.loads(Path(folder, "model.safetensors.index.json").read_text())["weight_map"]
    found[type(step).__name__] = opened(lambda: by_torch(folder)), opened(lambda: by_safetensors(folder))
    print(f"step {step!r}: saved, index {sorted(index)},", "own reader {}, safetensors {}".format(*found[type(step).__name__]))
same = found == {"int": ("CheckpointException", "SafetensorError"), "Tensor": ("ok", "ok")}
raise SystemExit(0 if same else 1)
PYTHON
"$scratch/venv/bin/python" ask.py 2> /dev/null
