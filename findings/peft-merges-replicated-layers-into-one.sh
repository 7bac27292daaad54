#!/bin/bash
# PEFT merges adapters into replicated layers although it has a check against it: the check looks in the wrong dictionary, and
# the shared weights get the changes of all copies.
#
# Version:      peft 0.21.2, transformers 4.57.1, torch 2.13.0, CPython 3.11, CPU.
# Likely guess: merge_and_unload() of a model grown by layer_replication computes what the adapter computes, or refuses: "Cannot
#               merge LORA layers when base model layers are replicated" stands in LoraModel._check_merge_allowed.
# Behaviour:    that check asks self.peft_config.get("layer_replication"), but peft_config is a dictionary of configurations by
#               adapter name, so it is never true. Copies of a layer share its weights and have adapters of their own; each is
#               added to the one tensor, and every copy then computes with the sum.
# Matters:      the merged model answers otherwise than the one that was evaluated, and nothing says so. Copy the layers before
#               (each with weights of its own), then train and merge without layer_replication.
# Seen:         largest change of the logits by the adapter and by merging it: 0.39 and 8e-08; two layers made four: 0.36 and
#               0.3, and no ValueError
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
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(8)[None]


def changes(**options) -> tuple[float, float]:
    """Largest change of the logits by an adapter with random weights, and by merging it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)).eval()
    with torch.no_grad():
        plain = model(ids).logits  # lora_B is zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        adapted = model(ids).logits
        merged = model.merge_and_unload()(ids).logits
    return (adapted - plain).abs().max().item(), (merged - adapted).abs().max().item()


holds = True
for name, options, wrong in (("as it is", {}, False), ("layers [0, 1, 0, 1]", {"layer_replication": [[0, 2], [0, 2]]}, True)):
    adapter, merging = changes(**options)
    print(f"{name}: largest change of the logits by the adapter {adapter:.2g}, by merging {merging:.2g}")
    holds = holds and (merging > 0.1 * adapter) == wrong
raise SystemExit(0 if holds else 1)
PYTHON
