#!/bin/bash
# llama.cpp counts and cuts text in bytes where a chat template says length or [a:b]: Chinese is three times as long, and is
# cut within a character.
#
# Version:      llama.cpp as in xllamacpp 2026.10.11549 (CPU wheel), gguf 0.19.0, jinja2 3.1.6, CPython 3.11.
# Likely guess: a template that transformers renders one way is rendered the same way by llama.cpp, or refused: of what its
#               Jinja lacks (division, |round, |sum, .find) it says so.
# Behaviour:    the strings of its Jinja are bytes of UTF-8 for length, indices and slices. Nothing is refused; a cut that
#               leaves half a character gives U+FFFD in the prompt. For ASCII all is the same, so tests in English pass.
# Matters:      templates that shorten or branch by length (system prompts, titles, the text before a marker found by its
#               place) build another prompt for Chinese than the one that the model was trained with, without a word.
# Seen:         of four characters, length, [:2] and a branch on length > 9: transformers' way: 4 你好, short;
#               llama.cpp: 12 \ufffd, long
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "xllamacpp==2026.10.11549" "gguf==0.19.0" "numpy==1.26.4" \
    "jinja2==3.1.6"
cat > "$scratch/ask.py" <<'PYTHON'
import json
import sys
from urllib.request import Request, urlopen

import numpy as np
import xllamacpp
from gguf import GGUFWriter
from jinja2.sandbox import ImmutableSandboxedEnvironment

SIZE, WIDTH, FILE = 259, 64, f"{sys.argv[1]}/model.gguf"
TEMPLATE = (
    "{%- set text = messages[0].content -%}{{ text | length }} {{ text[:2] }}, "
    "{% if text | length > 9 %}long{% else %}short{% endif %}"
)
TEXT = "你好世界"

made = GGUFWriter(FILE, "llama")
made.add_context_length(256)
made.add_embedding_length(WIDTH)
made.add_block_count(1)
made.add_feed_forward_length(WIDTH)
made.add_head_count(1)
made.add_head_count_kv(1)
made.add_layer_norm_rms_eps(1e-5)
made.add_tokenizer_model("llama")
made.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
made.add_token_scores([0.0] * SIZE)
made.add_token_types([2, 3, 3, *[6] * 256])
made.add_chat_template(TEMPLATE)
for name, *shape in (
    ("token_embd", SIZE, WIDTH), ("output", SIZE, WIDTH), ("output_norm", WIDTH), ("blk.0.attn_norm", WIDTH),
    ("blk.0.attn_q", WIDTH, WIDTH), ("blk.0.attn_k", WIDTH, WIDTH), ("blk.0.attn_v", WIDTH, WIDTH),
    ("blk.0.attn_output", WIDTH, WIDTH), ("blk.0.ffn_norm", WIDTH), ("blk.0.ffn_gate", WIDTH, WIDTH),
    ("blk.0.ffn_up", WIDTH, WIDTH), ("blk.0.ffn_down", WIDTH, WIDTH),
):  # fmt: skip
    made.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
made.write_header_to_file()
made.write_kv_data_to_file()
made.write_tensors_to_file()
made.close()

settings = xllamacpp.CommonParams()
settings.model.path = FILE
settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 256, 1, 0, False
settings.use_jinja = True
server = xllamacpp.Server(settings)


messages = [{"role": "user", "content": TEXT}]
body = json.dumps({"messages": messages}).encode()
with urlopen(Request(f"{server.listening_address}/apply-template", body, {"Content-Type": "application/json"})) as answer:
    theirs = json.load(answer)["prompt"]
ours = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE).render(messages=messages)
print("transformers' way:", ours)
print("llama.cpp:        ", ascii(theirs)[1:-1])
sys.exit(0 if ours == "4 你好, short" and theirs == "12 \ufffd, long" else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/ask.py" "$scratch" 2> /dev/null
