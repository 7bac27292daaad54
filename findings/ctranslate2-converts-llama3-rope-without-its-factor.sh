#!/bin/bash
# CTranslate2 accepts the RoPE scaling of Llama 3.1 and computes as if there were none: the converter does not write the
# factor. Nor does it look at hidden_act: every Llama has SiLU.
#
# Version:      ctranslate2 4.8.5 (its Python converter and CPU wheel), transformers 5.24.0, torch 2.13.0, CPython 3.11.
# Likely guess: rope_type "llama3" is in the converter's list of what it supports, and yarn and dynamic are refused with
#               NotImplementedError: what converts gives the logits of transformers.
# Behaviour:    low_freq_factor and high_freq_factor are written; factor is so only for "linear". Without it each
#               frequency is divided by 1: the log-probabilities are those of a model without scaling, to 1e-5.
#               original_max_position_embeddings is not written either. With hidden_act "gelu" or "relu" the
#               feed-forward layers still use SiLU.
# Matters:      the first tokens are nearly right and the difference grows with the length: a short check passes, and a long
#               context, which the scaling is for, falls apart. TeleChat and Tele-FLM written as Llama have SiLU and no
#               llama3 scaling.
# Seen:         distance of the log-probabilities, 200 tokens: plain 7.4e-06, linear 7.6e-06; llama3, factor 8: 5.8 from
#               transformers, 7.4e-06 from transformers without scaling; gelu 1.7; yarn and dynamic refused
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "ctranslate2==4.8.5" "transformers==5.24.0" \
    "torch==2.13.0" "numpy==2.3.5"
cd "$scratch"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import ctranslate2
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {f"w{number}": number for number in range(62)} | {"<s>": 62, "</s>": 63}
vocabulary = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", unk_token="w0")
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 62, "eos_token_id": 63}
ids = torch.randint(0, 60, (1, 200), generator=torch.Generator().manual_seed(1))


def model(**changes):
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in llama.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.3 * noise if "norm" in name else 0.15 * noise
    return llama


def by_transformers(**changes):
    with torch.no_grad():
        return model(**changes)(ids).logits.log_softmax(-1)[0].numpy()


def by_ctranslate2(**changes):
    model(**changes).save_pretrained("hf")
    tokenizer.save_pretrained("hf")
    ctranslate2.converters.TransformersConverter("hf").convert("ct2", force=True)
    generator = ctranslate2.Generator("ct2", device="cpu", compute_type="float32")
    tokens = [[f"w{number}" for number in ids[0].tolist()]]
    return np.array(generator.forward_batch(tokens, return_log_probs=True))[0]


def distance(one, other):
    return float(np.abs(one - other).max())


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0, **more}}


llama3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
plain, linear, gelu = {}, rope("linear"), {"hidden_act": "gelu"}
seen = {name: distance(by_ctranslate2(**c), by_transformers(**c)) for name, c in (("plain", plain), ("linear", linear))}
scaled = by_ctranslate2(**llama3)
seen["llama3"] = distance(scaled, by_transformers(**llama3))
seen["llama3, unscaled"] = distance(scaled, by_transformers())
seen["gelu"] = distance(by_ctranslate2(**gelu), by_transformers(**gelu))
refused = 0
for kind in ("yarn", "dynamic"):
    try:
        by_ctranslate2(**rope(kind))
    except NotImplementedError:
        refused += 1
print(*(f"{name} {value:.2g};" for name, value in seen.items()), "refused", refused)
right = all(seen[name] < 1e-4 for name in ("plain", "linear", "llama3, unscaled"))
raise SystemExit(0 if right and seen["llama3"] > 1 and seen["gelu"] > 0.5 and refused == 2 else 1)
PYTHON
