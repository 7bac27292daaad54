#!/bin/bash
# PEFT saves alpha_pattern and rank_pattern sorted by name, and lets the first pattern that matches decide: an adapter with
# two patterns for one layer computes something else after it was saved and loaded.
#
# Version:      peft 0.21.2, torch 2.13.0, transformers 4.57.1, CPython 3.11.
# Likely guess: PeftModel.from_pretrained(base, folder) computes what the model computed before save_pretrained(folder).
# Behaviour:    patterns are tried in the order of the dictionary (get_pattern_key returns the first match), and
#               save_pretrained writes adapter_config.json with sort_keys=True, dictionaries inside it included. With
#               {"b_proj": 16, ".*_proj": 4} layer b_proj is trained with alpha 16; saved, ".*_proj" comes first, and the
#               layer has alpha 4. Nothing is said. (With rank_pattern the shapes then differ, which is an error.)
# Matters:      whoever reads adapter_config.json as PEFT does gets what PEFT loads, not what was trained. Patterns of which
#               no two match the same layer are safe: tele convert writes such only.
# Seen:         scale of b_proj: 8.0 trained, 2.0 loaded; largest difference of the outputs 0.77
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "peft==0.21.2" "torch==2.13.0" "transformers==4.57.1" \
    "numpy==1.26.4"
cat > "$scratch/saved.py" <<'PYTHON'
import copy
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a_proj, self.b_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.a_proj(self.b_proj(x))


torch.manual_seed(0)
base, x = Two(), torch.randn(2, 8)
patterns = {"b_proj": 16, ".*_proj": 4}
config = LoraConfig(
    r=2, lora_alpha=2, target_modules=["a_proj", "b_proj"], alpha_pattern=patterns, init_lora_weights=False
)
trained = get_peft_model(copy.deepcopy(base), config)
trained.save_pretrained(sys.argv[1])
loaded = PeftModel.from_pretrained(copy.deepcopy(base), sys.argv[1])
scales = [model.base_model.model.b_proj.scaling["default"] for model in (trained, loaded)]
apart = (trained(x) - loaded(x)).abs().max().item()
print(f"scale of b_proj: {scales[0]} trained, {scales[1]} loaded; largest difference of the outputs {apart:.2f}")
sys.exit(0 if scales == [8.0, 2.0] and apart > 0.1 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/saved.py" "$scratch/adapter" 2> /dev/null
