#!/bin/bash
# PEFT's add_weighted_adapter makes an adapter of rsLoRA adapters sqrt(r) times too strong, r being the rank of the new one.
#
# Version:      peft 0.21.2, torch 2.13.0, transformers 4.57.1, CPython 3.11.
# Likely guess: combination_type "cat" of adapters with weights 1 adds up what they do to the weights, exactly; "svd" of enough
#               rank does so, too; of one adapter with weight 1 each type makes a copy.
# Behaviour:    the scale of each adapter is multiplied into its matrices, and the new one gets lora_alpha = r so that its own
#               scale is 1. But it inherits use_rslora from the first adapter, and its scale is then r / sqrt(r). This is so
#               of "cat", "svd", "linear" and the others alike; plain LoRA is right.
# Matters:      two adapters of rank 64 merged by "cat" act 11 times as strongly as they should: the model talks nonsense, and
#               the adapters, their weights or the training are suspected. Nothing is said. Before, write
#               use_rslora false and lora_alpha sqrt(r) times as large into their configs, or merge them into the base one by one.
# Seen:         new change of the weights over the sum of the old ones, rank 4 and 4: LoRA cat 1, svd 1, copy of one 1;
#               rsLoRA cat 2.828, svd 2.828, copy of one 2
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "peft==0.21.2" "torch==2.13.0" "transformers==4.57.1" \
    "numpy==1.26.4"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model


def ratios(use_rslora: bool) -> dict[str, float]:
    """|change of the combined adapter| / |sum of the changes of its parts|, by the way of combining."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_rslora=use_rslora, init_lora_weights=False)
    tuned = get_peft_model(model, config, adapter_name="one")
    tuned.add_adapter("two", config)
    change = tuned.base_model.model[0].get_delta_weight
    found = {}
    for name, parts, kind, options in (
        ("cat", ["one", "two"], "cat", {}),
        ("svd", ["one", "two"], "svd", {"svd_rank": 8}),
        ("copy of one", ["one"], "linear", {}),
    ):
        tuned.add_weighted_adapter(parts, [1.0] * len(parts), name.replace(" ", "_"), combination_type=kind, **options)
        ratio = change(name.replace(" ", "_")).norm() / sum(change(part) for part in parts).norm()
        found[name] = round(ratio.item(), 3)
    return found


seen = [ratios(False), ratios(True)]
for name, found in zip(("LoRA", "rsLoRA"), seen, strict=True):
    print(f"{name}:", ", ".join(f"{kind} {ratio:g}" for kind, ratio in found.items()))
expected = [{"cat": 1.0, "svd": 1.0, "copy of one": 1.0}, {"cat": 2.828, "svd": 2.828, "copy of one": 2.0}]
raise SystemExit(0 if seen == expected else 1)
PYTHON
