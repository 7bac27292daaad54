#!/bin/bash
# llama.cpp prints a dictionary in a chat template as nothing at all, the items of a list without anything between them, and
# leaves the pattern of "format" as it is.
#
# Version:      llama.cpp as in xllamacpp 2026.10.11549 (CPU wheel), gguf 0.19.0, jinja2 3.1.6, CPython 3.11.
# Likely guess: {{ tool_call.arguments }} or {{ tools }} without "tojson", as some templates have it, is Python's form of the
#               value, as in transformers, or is refused like the many filters that llama.cpp's Jinja does not know.
# Behaviour:    a dictionary prints as the empty text, ['a', 'b'] as ab, none as the empty text, and '%.2f' | format(1.5) as
#               %.2f. Each is accepted; filters that it does not know are refused.
# Matters:      the model gets a call without arguments, or a system prompt without its tools, and answers all the same.
# Seen:         transformers' way: <{'city': 'x', 'days': 2}> <['a', 'b']> <None> <1.50> hi;
#               llama.cpp: <> <ab> <> <%.2f> hi
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
    "{%- set call = {'city': 'x', 'days': 2} -%}<{{ call }}> <{{ ['a', 'b'] }}> <{{ none }}> "
    "<{{ '%.2f' | format(1.5) }}> {{ messages[0].content }}"
)

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


messages = [{"role": "user", "content": "hi"}]
body = json.dumps({"messages": messages}).encode()
with urlopen(Request(f"{server.listening_address}/apply-template", body, {"Content-Type": "application/json"})) as answer:
    theirs = json.load(answer)["prompt"]
ours = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE).render(messages=messages)
print("transformers' way:", ours)
print("llama.cpp:        ", theirs)
expected = "<{'city': 'x', 'days': 2}> <['a', 'b']> <None> <1.50> hi"
sys.exit(0 if ours == expected and theirs == "<> <ab> <> <%.2f> hi" else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/ask.py" "$scratch" 2> /dev/null
