#!/bin/bash
# Megatron Core masks in every sample the positions at which the first sample had padding.
#
# Version:      megatron-core 0.16.1, torch 2.13.0, numpy 1.26.4, CPython 3.11, CPU. GPTDataset, with reset_position_ids,
#               reset_attention_mask and eod_mask_loss all off, as usual in pre-training.
# Likely guess: the loss mask of a sample depends on that sample: 0 where its own labels are the tokenizer's pad, else 1;
#               ds[i] is the same whatever was asked for before.
# Behaviour:    the first mask that a GPTDataset makes is kept for the later samples (position ids and the triangle are the
#               same for all of them), and then the padding of the first sample is written into it. Later samples copy it
#               and add their own. Each process, and each worker of a loader, has its own first sample. The copy of this class
#               in MindFormers 1.9.0 (dataset/blended_datasets/gpt_dataset.py) hands out the kept mask itself: there the
#               padding of all samples so far adds up.
# Matters:      rows padded to the sequence length: where the first one drawn is short, everything beyond its end is never
#               trained in any row, and which part that is changes with the seed, the number of workers and each resume. The
#               loss looks as usual.
# Seen:         trained labels of 16 in five rows: each alone [5, 16, 9, 12, 14], one after another [5, 5, 5, 5, 5]
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "megatron-core==0.16.1" "torch==2.13.0" "numpy==1.26.4" \
    "setuptools==80.9.0"
cd "$scratch"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import types

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

LENGTH, PAD, END = 16, 0, 2
builder = IndexedDatasetBuilder("rows.bin", dtype=np.uint16)
for length in (12, 14, 5, 9, 16, 7):  # of the rows, without their padding
    row = [*range(10, 9 + length), END] + [PAD] * (LENGTH - length)
    builder.add_document(row, [LENGTH])
builder.finalize("rows.idx")
tokenizer = types.SimpleNamespace(eod=END, pad=PAD, vocab_size=100, unique_identifiers={"kind": "example"})


def dataset() -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, tokenizer=tokenizer, split="1,0,0", path_to_cache="cache",
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )
    return GPTDataset(IndexedDataset("rows"), "rows", np.arange(6, dtype=np.int32), None, Split.train, config)


def trained(sample) -> int:
    return int(sample["loss_mask"].sum())


whole = dataset()
together = [trained(whole[i]) for i in range(len(whole))]
alone = [trained(dataset()[i]) for i in range(len(whole))]
print(f"trained labels of {LENGTH}: alone {alone}, one after another {together}")
raise SystemExit(0 if (alone, together) == ([5, 16, 9, 12, 14], [5] * 5) else 1)
PYTHON
