#!/bin/bash
# transformers' Llama in float64 is not computed in float64: RMSNorm and the rotary tables go through float32 in a model of
# any dtype, and what comes out is called float64.
#
# Version:      transformers 5.24.0, torch 2.13.0, CPython 3.11, CPU.
# Likely guess: LlamaForCausalLM(config).double() is a reference that is right to about 1e-15.
# Behaviour:    LlamaRMSNorm casts its input to float32 and back, LlamaRotaryEmbedding keeps inv_freq in float32 and takes
#               cosines there; cos and logits have dtype float64. Nothing is said.
# Matters:      as a judge of float32 implementations it is itself wrong by their own rounding. The golden of TeleChat3
#               replaces both modules (tests/campaigns/telechat3_goldens.py).
# Seen:         logits torch.float64, cos torch.float64; relative distance from float64 throughout 5e-08
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.24.0" "numpy==1.26.4"
cat > "$scratch/double.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, attn_implementation="sdpa")).double().eval()
ids = torch.randint(0, 64, (1, 32))
seen = {}
model.model.rotary_emb.register_forward_hook(lambda module, given, out: seen.update(cos=out[0]))
with torch.no_grad():
    given = model(ids).logits
    norms = [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]
    for norm in norms:
        norm.forward = lambda x, norm=norm: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight
    frequency = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = (torch.arange(32, dtype=torch.float64)[:, None] * frequency).repeat(1, 2)[None]
    model.model.rotary_emb.forward = lambda x, position_ids: (angle.cos(), angle.sin())
    right = model(ids).logits
apart = ((given - right).norm() / right.norm()).item()
print(f"logits {given.dtype}, cos {seen['cos'].dtype}; relative distance from float64 throughout {apart:.0e}")
sys.exit(0 if 1e-9 < apart < 1e-5 and given.dtype == torch.float64 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/double.py" 2> /dev/null
