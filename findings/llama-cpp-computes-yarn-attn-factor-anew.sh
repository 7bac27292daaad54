#!/bin/bash
# llama.cpp ignores the YaRN factor on cos and sin that its converter takes over from transformers' attention_factor.
#
# Version:      llama.cpp as in xllamacpp 2026.10.11549 (CPU wheel), gguf 0.19.0, CPython 3.11. The converter is the
#               convert_hf_to_gguf.py that llama-cpp-python 0.3.36 has with it.
# Likely guess: attention_factor of a Llama with YaRN, which transformers multiplies cos and sin by, holds in llama.cpp too:
#               the converter writes it into the GGUF file as rope.scaling.yarn_attn_factor.
# Behaviour:    for models with YaRN the value of that key is replaced by 0.1 ln(factor) + 1 whatever the file says. Read
#               and multiplied with it is another key, rope.scaling.attn_factor, which the converter does not write here.
# Matters:      a model whose factor is not the usual one (TeleChat3: 0.07 ln(factor) + 1) gives other logits from the first
#               pair of tokens on, without a word; --override-kv ARCHITECTURE.rope.scaling.attn_factor=float:VALUE mends it,
#               VALUE being attention_factor / (0.1 ln(factor) + 1).
# Seen:         distance of the log-probabilities from those of a file without a factor: yarn_attn_factor 1.5: 0;
#               attn_factor 1.5: 1.48
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "xllamacpp==2026.10.11549" "gguf==0.19.0" "numpy==1.26.4"
cat > "$scratch/ask.py" <<'PYTHON'
import sys

import numpy as np
import xllamacpp
from gguf import GGUFWriter, RopeScalingType

SIZE, WIDTH, WORDS = 260, 64, [0, 30, 80, 40, 70, 35, 90, 50]


def write(file, **factors):
    """A Llama of one layer with random weights, one head, YaRN with factor 4."""
    random = np.random.default_rng(0)
    made = GGUFWriter(file, "llama")
    made.add_context_length(256)
    made.add_embedding_length(WIDTH)
    made.add_block_count(1)
    made.add_feed_forward_length(WIDTH)
    made.add_head_count(1)
    made.add_head_count_kv(1)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_rope_dimension_count(WIDTH)
    made.add_rope_freq_base(10000.0)
    made.add_rope_scaling_type(RopeScalingType.YARN)
    made.add_rope_scaling_factor(4.0)
    made.add_rope_scaling_orig_ctx_len(64)
    for key, value in factors.items():
        made.add_float32(f"llama.rope.scaling.{key}", value)
    made.add_tokenizer_model("llama")
    made.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"])
    made.add_token_scores([0.0] * SIZE)
    made.add_token_types([2, 3, 3, *[6] * 256, 1])
    for name, *shape in (
        ("token_embd", SIZE, WIDTH), ("output", SIZE, WIDTH), ("output_norm", WIDTH), ("blk.0.attn_norm", WIDTH),
        ("blk.0.attn_q", WIDTH, WIDTH), ("blk.0.attn_k", WIDTH, WIDTH), ("blk.0.attn_v", WIDTH, WIDTH),
        ("blk.0.attn_output", WIDTH, WIDTH), ("blk.0.ffn_norm", WIDTH), ("blk.0.ffn_gate", WIDTH, WIDTH),
        ("blk.0.ffn_up", WIDTH, WIDTH), ("blk.0.ffn_down", WIDTH, WIDTH),
    ):  # fmt: skip
        made.add_tensor(f"{name}.weight", random.normal(0, 0.3 if len(shape) > 1 else 1, shape).astype(np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def probabilities(file):
    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 256, 1, 0, False
    server = xllamacpp.Server(settings)
    row = np.zeros(SIZE)
    for seed in range(100):  # a drawn end of text is answered without probabilities
        asked = {"prompt": WORDS, "n_predict": 1, "n_probs": SIZE, "seed": seed}
        if (given := server.handle_completions(asked)["choices"][0]["logprobs"]) is not None:
            break
    for entry in given["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


found = []
for number, factors in enumerate(({}, {"yarn_attn_factor": 1.5}, {"attn_factor": 1.5})):
    file = f"{sys.argv[1]}/{number}.gguf"
    write(file, **factors)
    found.append(probabilities(file))
ignored, read = (float(np.abs(other - found[0]).max()) for other in found[1:])
print(f"distance of the log-probabilities: yarn_attn_factor 1.5: {ignored:g}; attn_factor 1.5: {read:.3g}")
sys.exit(0 if ignored == 0 and read > 0.01 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/ask.py" "$scratch" 2> /dev/null
