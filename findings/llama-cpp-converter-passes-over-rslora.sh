#!/bin/bash
# llama.cpp's converter for LoRA adapters reads lora_alpha of PEFT's adapter_config.json and nothing else: rsLoRA adapters come
# out sqrt(r) times too weak, and alpha_pattern has no effect.
#
# Version:      llama.cpp as in xllamacpp 2026.10.11549 (CPU wheel); convert_lora_to_gguf.py of llama-cpp-python 0.3.36;
#               peft 0.21.2, transformers 4.57.1, torch 2.13.0, CPython 3.11.
# Likely guess: an adapter that the converter accepts gives with llama.cpp what PEFT computes; it refuses others, as it does
#               with DoRA's magnitudes and with embeddings.
# Behaviour:    the file has one number for all layers, adapter.lora.alpha, and llama.cpp scales by alpha / r. With
#               use_rslora PEFT scales by alpha / sqrt(r); with alpha_pattern by each layer's own alpha. Both are passed over
#               without a word, and the conversion reports success.
# Matters:      at rank 64, which TeleChat2's recipe has, an rsLoRA adapter keeps an eighth of its effect: the model answers like
#               its base and nobody knows why. Multiply lora_B by sqrt(r), or by alpha / lora_alpha, before, or merge.
# Seen:         rank 16, largest distance of the log-probabilities from PEFT's, and the effect of the adapter: plain 0.002 of
#               0.70 (without an adapter 0.002, too: the cache is float16); use_rslora 2.02 of 2.70; alpha_pattern 1.35 of 2.05
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "xllamacpp==2026.10.11549" "gguf==0.19.0" "numpy==1.26.4" \
    "peft==0.21.2" "torch==2.13.0" "transformers==4.57.1"
"$scratch/venv/bin/pip" download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    --dest "$scratch" "llama-cpp-python==0.3.36"
tar -xzf "$scratch"/llama_cpp_python-0.3.36.tar.gz -C "$scratch" --strip-components=1
cat > "$scratch/ask.py" <<'PYTHON'
import os
import subprocess
import sys

import numpy as np
import torch
import xllamacpp
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER, SIZE, WIDTH, RANK, TOKEN = sys.argv[1], 260, 64, 16, 100
torch.manual_seed(1)
config = LlamaConfig(
    vocab_size=SIZE, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=256, rms_norm_eps=1e-5, initializer_range=0.3,
)  # fmt: skip
base = LlamaForCausalLM(config).eval()
base.save_pretrained(f"{FOLDER}/base")
weights = {name: tensor.numpy().copy() for name, tensor in base.state_dict().items()}


def write_base():
    """The base as a GGUF file. Of one token, queries and keys do not matter: their rows need no other order here."""
    made = GGUFWriter(f"{FOLDER}/base.gguf", "llama")
    made.add_context_length(256)
    made.add_embedding_length(WIDTH)
    made.add_block_count(1)
    made.add_feed_forward_length(WIDTH)
    made.add_head_count(1)
    made.add_head_count_kv(1)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_tokenizer_model("llama")
    made.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"])
    made.add_token_scores([0.0] * SIZE)
    made.add_token_types([2, 3, 3, *[6] * 256, 1])
    for name, ours in (
        ("token_embd", "model.embed_tokens"), ("output", "lm_head"), ("output_norm", "model.norm"),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm"), ("blk.0.attn_q", "model.layers.0.self_attn.q_proj"),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj"), ("blk.0.attn_v", "model.layers.0.self_attn.v_proj"),
        ("blk.0.attn_output", "model.layers.0.self_attn.o_proj"), ("blk.0.ffn_gate", "model.layers.0.mlp.gate_proj"),
        ("blk.0.ffn_norm", "model.layers.0.post_attention_layernorm"), ("blk.0.ffn_up", "model.layers.0.mlp.up_proj"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
    ):  # fmt: skip
        made.add_tensor(f"{name}.weight", weights[f"{ours}.weight"])
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def by_llama_cpp(adapter):
    settings = xllamacpp.CommonParams()
    settings.model.path = f"{FOLDER}/base.gguf"
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 256, 1, 0, False
    if adapter:
        chosen = xllamacpp.CommonAdapterLoraInfo()
        chosen.path, chosen.scale = adapter, 1.0
        settings.lora_adapters = [chosen]
    server = xllamacpp.Server(settings)
    found = np.full(SIZE, np.nan)
    for seed in range(100):  # a drawn end of text is answered without probabilities
        asked = {"prompt": [TOKEN], "n_predict": 1, "n_probs": SIZE, "seed": seed}
        if (given := server.handle_completions(asked)["choices"][0]["logprobs"]) is not None:
            break
    for entry in given["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def by_peft(model):
    with torch.inference_mode():
        return model(torch.tensor([[TOKEN]])).logits[0, -1].double().log_softmax(-1).numpy()


def distance(one, other):
    return float(np.nanmax(np.abs(one - other)))


write_base()
plain = by_peft(base)
found = {}
for name, extra in {
    "plain": {}, "use_rslora": {"use_rslora": True}, "alpha_pattern": {"alpha_pattern": {"o_proj": 32}},
}.items():  # fmt: skip
    torch.manual_seed(2)
    bare = LlamaForCausalLM(config)
    bare.load_state_dict(base.state_dict())
    model = get_peft_model(
        bare, LoraConfig(r=RANK, lora_alpha=8, target_modules=["o_proj", "down_proj"], init_lora_weights=False, **extra)
    ).eval()
    model.save_pretrained(f"{FOLDER}/{name}")
    subprocess.run(
        [sys.executable, f"{FOLDER}/vendor/llama.cpp/convert_lora_to_gguf.py", "--base", f"{FOLDER}/base", "--outtype",
         "f32", "--outfile", f"{FOLDER}/{name}.gguf", f"{FOLDER}/{name}"],
        check=True,
    )  # fmt: skip
    right = by_peft(model)
    found[name] = distance(by_llama_cpp(f"{FOLDER}/{name}.gguf"), right), distance(right, plain)
    print("{}: distance from PEFT {:.4f}, effect of the adapter {:.2f}".format(name, *found[name]))
print(f"without an adapter: distance from transformers {distance(by_llama_cpp(None), plain):.4f}")
sys.stdout.flush()
same = found["plain"][0] < 0.01 and all(found[name][0] > 0.3 for name in ("use_rslora", "alpha_pattern"))
os._exit(0 if same else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/ask.py" "$scratch" 2> /dev/null
